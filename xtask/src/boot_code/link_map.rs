//! The linker's map (`-Map`, as LLD writes it): the address of each input section of code and its object file.
//!
//! Each line has the virtual address, the load address, size and alignment in hexadecimal, then a name. The indentation
//! of the name distinguishes an output section, an input section as `FILE:(SECTION)`, and a symbol.

use anyhow::{Result, ensure};
use std::collections::{BTreeMap, BTreeSet};

/// The output sections that contain code.
const CODE: [&str; 2] = [".text.boot", ".text"];

/// An input section.
#[derive(Clone, Debug, PartialEq, Eq)]
struct InputSection {
    /// The object file, within its archive: `libc.a(read.o)`.
    file: String,
    /// The section's name.
    section: String,
}

/// The input sections of code, by the addresses of their symbols.
#[derive(Debug)]
pub(super) struct LinkMap {
    sections: Vec<InputSection>,
    /// Index into `sections` by the address of each symbol.
    symbols: BTreeMap<u64, usize>,
}

impl LinkMap {
    /// Reads a map.
    pub(super) fn parse(text: &str) -> Result<Self> {
        let mut this = Self { sections: Vec::new(), symbols: BTreeMap::new() };
        let mut is_code = false;
        let mut is_section = false;
        for line in text.lines() {
            let Some((address, size, name)) = split(line) else { continue };
            let indentation = name.len() - name.trim_start().len();
            let name = name.trim_start();
            match indentation {
                0 => is_code = CODE.contains(&name),
                8 if is_code => {
                    let section = section(name);
                    is_section = size > 0 && section.is_some();
                    if is_section {
                        this.sections.extend(section);
                        this.symbols.insert(address, this.sections.len() - 1);
                    }
                }
                16 if is_code && is_section => {
                    this.symbols.insert(address, this.sections.len() - 1);
                }
                _ => {}
            }
        }
        ensure!(!this.sections.is_empty(), "the map has no code sections");
        Ok(this)
    }

    /// The addresses of functions.
    pub(super) fn addresses(&self) -> impl Iterator<Item = u64> {
        self.symbols.keys().copied()
    }

    /// The linker-script patterns that match the input sections of these addresses.
    pub(super) fn patterns(&self, addresses: &BTreeSet<u64>) -> BTreeSet<String> {
        let reached = addresses.iter().filter_map(|address| self.sections.get(*self.symbols.get(address)?));
        reached.flat_map(|section| section.patterns(&self.sections)).collect()
    }
}

/// Address, size and name of a line; the name includes its indentation.
fn split(line: &str) -> Option<(u64, u64, &str)> {
    /// Width of the four numbers with their separators.
    const NUMBERS: usize = 16 + 1 + 16 + 1 + 8 + 1 + 5 + 1;
    let (numbers, name) = line.split_at_checked(NUMBERS)?;
    let mut numbers = numbers.split_whitespace();
    let mut next = || u64::from_str_radix(numbers.next()?, 16).ok();
    let (address, _, size) = (next()?, next()?, next()?);
    Some((address, size, name))
}

/// Parses `FILE:(SECTION)`; `None` for sections that the linker generated.
fn section(name: &str) -> Option<InputSection> {
    let (path, section) = name.strip_suffix(')')?.rsplit_once(":(")?;
    let file = path.rsplit('/').next()?;
    // An offset within a section: `.text+0x10`.
    let section = section.split("+0x").next()?;
    (!file.starts_with('<')).then(|| InputSection { file: file.to_owned(), section: section.to_owned() })
}

impl InputSection {
    /// The patterns that match this section. Several, if there are variants of the function for other processors.
    fn patterns(&self, all: &[Self]) -> Vec<String> {
        let in_archive = self.file.strip_suffix(')').and_then(|file| file.split_once('('));
        if let Some(symbol) = self.section.strip_prefix(".text.").filter(|_| !is_c_archive(in_archive)) {
            return vec![format!("*(.text.{})", without_digests(symbol))];
        }
        // An object outside an archive without function sections is the startup code, or the compiler's.
        let Some((archive, object)) = in_archive else {
            let start = ["crt1.o", "crtbeginS.o"].into_iter().find(|name| self.file.ends_with(name));
            return start.map(|name| format!("*{name}(.text)")).into_iter().collect();
        };
        let variants = all.iter().filter_map(|other| {
            let other = other.file.strip_prefix(archive)?.strip_prefix('(')?.strip_suffix(')')?;
            (is_variant(object, other)).then_some(other)
        });
        let objects = std::iter::once(object).chain(variants);
        objects.map(|object| format!("*{archive}:{object}(.text .text.*)")).collect()
    }
}

/// Whether an object file is from a C archive, whose section names denote processors rather than functions as in Rust.
fn is_c_archive(in_archive: Option<(&str, &str)>) -> bool {
    in_archive.is_some_and(|(archive, _)| archive.ends_with(".a"))
}

/// A mangled name with a wildcard for the parts that depend on other code.
fn without_digests(symbol: &str) -> String {
    // The legacy mangling ends with `17h`, sixteen digits and `E`; the optimiser may append a suffix.
    if symbol.contains("_ZN") {
        return symbol.rfind("17h").map_or(symbol.to_owned(), |end| symbol[..end + 3].to_owned() + "*");
    }
    // The optimiser may append a number, which differs between builds.
    let is_newer = symbol.contains("_R");
    let numbered =
        symbol.rsplit_once('.').filter(|(_, number)| number.bytes().all(|byte| byte.is_ascii_digit()));
    let symbol = numbered.filter(|_| is_newer).map_or(symbol, |(symbol, _)| symbol);
    if is_newer { without_crates(symbol) + "*" } else { symbol.to_owned() }
}

/// A name of the v0 mangling with wildcards for what differs if the same source is built in another directory or with
/// another profile, because the digests of its crates differ then:
///
/// - a digest: `Cs`, digits of base 62, and `_` before the name of a crate;
/// - a back reference, `B`, an offset and `_`, because digests differ in length;
/// - the crate at the end that instantiated a generic function: of several that could, the digests decide.
fn without_crates(symbol: &str) -> String {
    let mut name = String::new();
    let mut rest = symbol;
    while let Some(at) = rest.find(['C', 'B']) {
        let tag = if rest[at..].starts_with("Cs") { "Cs" } else { &rest[at..=at] };
        name += &rest[..at];
        name += tag;
        rest = &rest[at + tag.len()..];
        let digits = rest.split_once('_').filter(|(digits, _)| match tag {
            "Cs" => digits.len() > 5 && is_base_62(digits),
            "B" => digits.len() < 4 && is_base_62(digits),
            _ => false,
        });
        if let Some((_, after)) = digits {
            name += "*_";
            rest = after;
        }
    }
    name += rest;
    let crate_at = name.rfind("Cs*_").filter(|at| {
        let crate_name = name[at + 4..].trim_start_matches(|c: char| c.is_ascii_digit());
        name[at + 4..].strip_suffix(crate_name).is_some_and(|length| length == crate_name.len().to_string())
    });
    match (crate_at, name.strip_suffix("B*_")) {
        // A name that is a crate's own begins with the crate.
        (Some(at), _) if name[..at].contains("Cs*_") => name.truncate(at),
        (_, Some(before)) => name.truncate(before.len()),
        _ => {}
    }
    name
}

fn is_base_62(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_alphanumeric())
}

/// Whether an object file has a variant of the same function for common processors: AVX2, or AVX-512 with vectors of 32
/// bytes.
fn is_variant(object: &str, other: &str) -> bool {
    let (Some((function, _)), Some((same, processor))) = (object.split_once('-'), other.split_once('-'))
    else {
        return false;
    };
    let is_common = ["avx2", "evex", "avx-unaligned"].iter().any(|name| processor.starts_with(name));
    let is_rare = ["rtm", "512"].iter().any(|name| processor.contains(name));
    function == same && is_common && !is_rare
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAP: &str = "             VMA              LMA     Size Align Out     In      Symbol
             324              324       10     1 .rodata
             324              324       10     1         /a/main.o:(.rodata.name)
            1000             1000      900    64 .text
            1000             1000       22    16         /lib/rcrt1.o:(.text)
            1000             1000       22     1                 _start
            1100             1100       40     1         /a/k-1.rcgu.o:(.text._ZN3abc4main17h1dc085950fcb0189E)
            1100             1100       40     1                 abc::main::h1dc085950fcb0189
            1200             1200       40     1         /lib/libc.a(memcpy-sse2.o):(.text+0x0)
            1200             1200       10     1                 one
            1210             1210       30     1                 two
            1300             1300       40     1         /lib/libc.a(memcpy-evex-erms.o):(.text.evex)
            1300             1300       40     1         /lib/libc.a(memcpy-avx512-erms.o):(.text.avx512)
            1400             1400       10    16         <internal>:(.iplt)
            1400             1400        0     1                 three
            1500             1500       10    16         /a/k-1.rcgu.o:(.text.main)
            1600             1600       10    16         /a/k-1.rcgu.o:(.text)
            1700             1700       10    16         /a/libstd-1.rlib(std-1.rcgu.o):(.text._RNvCsfLfy6EI15iL_3std4main)
";

    #[test]
    fn functions_are_named_by_their_input_sections() {
        let map = LinkMap::parse(MAP).unwrap();
        let all: Vec<u64> = map.addresses().collect();
        assert_eq!(all, [0x1000, 0x1100, 0x1200, 0x1210, 0x1300, 0x1500, 0x1600, 0x1700]);
        let patterns = |addresses: &[u64]| Vec::from_iter(map.patterns(&addresses.iter().copied().collect()));
        assert_eq!(patterns(&[0x1000, 0x1500, 0x1600]), ["*(.text.main)", "*crt1.o(.text)"]);
        assert_eq!(patterns(&[0x1700]), ["*(.text._RNvCs*_3std4main*)"]);
        assert_eq!(patterns(&[0x1100]), ["*(.text._ZN3abc4main17h*)"]);
    }

    #[test]
    fn what_depends_on_the_digests_of_crates_is_a_wildcard() {
        for (symbol, pattern) in [
            ("_RNvCsfLfy6EI15iL_3std4main", "_RNvCs*_3std4main*"),
            ("_RNvCsfLfy6EI15iL_3std4main.17", "_RNvCs*_3std4main*"),
            (
                "_RINvNtCsgEmfK2I1SDS_4core3ptr13drop_in_placeNtNtCs5jJgKPxfdgX_12kindling_vmm4exit4ExitECsfBu5GR4tatj_8kindling",
                "_RINvNtCs*_4core3ptr13drop_in_placeNtNtCs*_12kindling_vmm4exit4ExitE*",
            ),
            (
                "_RNvXs5_NtNtCslNYArtu3iFV_5alloc3vec5drainINtB5_5DrainTmENtB1n_3ops4drop4Drop4dropBA_",
                "_RNvXs5_NtNtCs*_5alloc3vec5drainINtB*_5DrainTmENtB*_3ops4drop4Drop4drop*",
            ),
            ("_RNvNtCsjrHSEGnQ3l9_3std7Balloon", "_RNvNtCs*_3std7Balloon*"),
        ] {
            assert_eq!(without_digests(symbol), pattern, "{symbol}");
        }
    }

    #[test]
    fn variants_for_other_processors_are_included() {
        let map = LinkMap::parse(MAP).unwrap();
        let patterns = Vec::from_iter(map.patterns(&BTreeSet::from([0x1210])));
        let expected = ["*libc.a:memcpy-evex-erms.o(.text .text.*)", "*libc.a:memcpy-sse2.o(.text .text.*)"];
        assert_eq!(patterns, expected);
    }

    #[test]
    fn a_map_of_another_linker_is_an_error() {
        assert!(LinkMap::parse("Memory Configuration\n\n.text 0x1000 0x20\n").is_err());
    }
}
