//! The guest kernel for a profile: symbols, initcalls and call instructions.

use anyhow::{Context, Result, bail, ensure};
use kindling_vmm::Elf;
use std::collections::HashMap;

/// The base of the kernel image mapping of x86-64 (`__START_KERNEL_map`): link address base plus `n` is physical
/// address `n`.
pub(super) const KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;

/// A symbol.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Symbol {
    address: u64,
    name: String,
    is_code: bool,
}

/// The symbols of a System.map.
#[derive(Clone, Debug, Default)]
pub(super) struct Symbols {
    /// Symbols of code, sorted by address.
    code: Vec<Symbol>,
    addresses: HashMap<String, u64>,
    /// Entries of the initcall table by address; their names contain the source file.
    entries: HashMap<u64, String>,
}

impl Symbols {
    /// Parses a System.map: lines of address, kind, name.
    pub(super) fn parse(text: &str) -> Result<Self> {
        let mut this = Self::default();
        for (number, line) in text.lines().enumerate() {
            let symbol = parse_line(line)
                .with_context(|| format!("line {} of the kernel's System.map is malformed", number + 1))?;
            if symbol.name.starts_with("__initcall__kmod_") {
                this.entries.insert(symbol.address, symbol.name.clone());
            }
            this.addresses.insert(symbol.name.clone(), symbol.address);
            if symbol.is_code {
                this.code.push(symbol);
            }
        }
        this.code.sort_by_key(|symbol| symbol.address);
        Ok(this)
    }

    /// The address of a symbol.
    pub(super) fn address(&self, name: &str) -> Option<u64> {
        self.addresses.get(name).copied()
    }

    /// The function that contains an instruction. Its `.cold` part counts as the function.
    pub(super) fn function(&self, instruction: u64) -> Option<&str> {
        let in_section = |start: &str, end: &str| {
            let (start, end) = (self.address(start), self.address(end));
            start.zip(end).is_some_and(|(start, end)| (start..end).contains(&instruction))
        };
        if !in_section("_stext", "_etext") && !in_section("_sinittext", "_einittext") {
            return None;
        }
        let behind = self.code.partition_point(|symbol| symbol.address <= instruction);
        let name = &self.code.get(behind.checked_sub(1)?)?.name;
        Some(name.strip_suffix(".cold").unwrap_or(name))
    }

    /// The source file of an initcall without folder and extension, if its entry's name contains it:
    /// `__initcall__kmod_FILE__NUMBER_LINE_FUNCTION`.
    fn file_of_entry(&self, entry: u64) -> Option<&str> {
        let rest = self.entries.get(&entry)?.strip_prefix("__initcall__kmod_")?;
        Some(rest.split_once("__")?.0)
    }
}

fn parse_line(line: &str) -> Option<Symbol> {
    let mut words = line.split_whitespace();
    let address = u64::from_str_radix(words.next()?, 16).ok()?;
    let kind = words.next()?;
    let name = words.next()?.to_owned();
    Some(Symbol { address, name, is_code: matches!(kind, "T" | "t" | "W" | "w") })
}

/// The call instruction before a return address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Call {
    /// A direct call of this address.
    To(u64),
    /// An indirect call, or one whose target is patched during boot.
    Indirect,
}

/// An initcall.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Initcall {
    /// The address of its function.
    pub(super) address: u64,
    /// The name of its function.
    pub(super) name: String,
    /// Its level: `early`, `pure` and so on.
    pub(super) level: &'static str,
    /// Its source file, if known.
    pub(super) file: Option<String>,
}

/// The start symbol of each level (INIT_CALLS in include/asm-generic/vmlinux.lds.h), with its name from
/// `initcall_level_names` in init/main.c; the first level has no name there.
const LEVELS: [(&str, &str); 10] = [
    ("__initcall_start", "early"),
    ("__initcall0_start", "pure"),
    ("__initcall1_start", "core"),
    ("__initcall2_start", "postcore"),
    ("__initcall3_start", "arch"),
    ("__initcall4_start", "subsys"),
    ("__initcall5_start", "fs"),
    ("__initcallrootfs_start", "rootfs"),
    ("__initcall6_start", "device"),
    ("__initcall7_start", "late"),
];
/// The end symbol of the table: console initcalls, if there are any, are called elsewhere.
const TABLE_ENDS: [&str; 2] = ["__con_initcall_start", "__initcall_end"];
/// Upper limit of the number of initcalls, above that of any kernel.
const INITCALLS_MAX: u64 = 3000;

/// A kernel's file and its symbols.
#[derive(Debug)]
pub(super) struct KernelImage {
    file: Vec<u8>,
    elf: Elf,
    pub(super) symbols: Symbols,
}

impl KernelImage {
    /// Parses a vmlinux and its System.map.
    pub(super) fn new(file: Vec<u8>, system_map: &str) -> Result<Self> {
        let elf = Elf::parse(&file[..], file.len() as u64).context("cannot parse the kernel's vmlinux")?;
        Ok(Self { file, elf, symbols: Symbols::parse(system_map)? })
    }

    /// The bytes at a link address.
    fn bytes<const N: usize>(&self, address: u64) -> Option<[u8; N]> {
        let physical = address.checked_sub(KERNEL_MAP)?;
        let end = physical.checked_add(N as u64)?;
        let segment = self.elf.segments.iter().find(|segment| {
            segment.address <= physical && end <= segment.address.saturating_add(segment.file_size)
        })?;
        let start = usize::try_from(segment.file_offset + (physical - segment.address)).ok()?;
        self.file.get(start..start + N)?.try_into().ok()
    }

    /// The call instruction that ends at an address, if there is one.
    pub(super) fn call_before(&self, address: u64) -> Option<Call> {
        const CALL: u8 = 0xe8;
        if let Some([CALL, a, b, c, d]) = self.bytes(address.wrapping_sub(5)) {
            let target = address.wrapping_add_signed(i32::from_le_bytes([a, b, c, d]).into());
            let patched = |name: &str| {
                ["__SCT__", "__x86_indirect_thunk", "BUG_func"].iter().any(|start| name.starts_with(start))
            };
            match self.symbols.function(target) {
                Some(name) if patched(name) => return Some(Call::Indirect),
                Some(_) => return Some(Call::To(target)),
                None => {}
            }
        }
        let bytes: [u8; 7] = self.bytes(address.wrapping_sub(7))?;
        // FF /2 with the target in a register, or in memory with each kind of displacement (Intel SDM, volume 2, "CALL"
        // and tables 2-2 and 2-3).
        let lengths = [(5, 2), (4, 3), (3, 4), (1, 6), (0, 7)];
        let indirect = |&(at, length): &(usize, usize)| {
            bytes[at] == 0xff
                && bytes[at + 1] >> 3 & 7 == 2
                && call_length(bytes[at + 1], bytes.get(at + 2)) == length
        };
        lengths.iter().any(indirect).then_some(Call::Indirect)
    }

    /// The initcalls in table order. Entries are relative offsets (CONFIG_HAVE_ARCH_PREL32_RELOCATIONS).
    pub(super) fn initcalls(&self) -> Result<Vec<Initcall>> {
        let symbol = |name: &str| {
            self.symbols.address(name).with_context(|| format!("the kernel's System.map has no {name}"))
        };
        let start = symbol(LEVELS[0].0)?;
        let end = TABLE_ENDS
            .iter()
            .find_map(|name| self.symbols.address(name))
            .context("the kernel's System.map has no symbol for the end of the initcall table")?;
        if end < start || (end - start) / 4 > INITCALLS_MAX {
            bail!("the kernel's initcall table from {start:#x} to {end:#x} has an invalid size");
        }
        let levels: Vec<(u64, &str)> =
            LEVELS.iter().map(|&(name, level)| Ok((symbol(name)?, level))).collect::<Result<_>>()?;
        ensure!(
            levels.is_sorted_by_key(|(start, _)| *start),
            "the kernel's initcall levels are not in order"
        );
        let mut initcalls = Vec::new();
        for entry in (start..end).step_by(4) {
            let offset = self.bytes(entry).context("the kernel's initcall table is outside its file")?;
            let address = entry.wrapping_add_signed(i32::from_le_bytes(offset).into());
            let name = self
                .symbols
                .function(address)
                .with_context(|| format!("the initcall at {entry:#x} is not a function of the kernel"))?;
            let level = levels.iter().rev().find(|(start, _)| *start <= entry).map_or("", |(_, level)| level);
            let file = self.symbols.file_of_entry(entry).map(str::to_owned);
            initcalls.push(Initcall { address, name: name.to_owned(), level, file });
        }
        Ok(initcalls)
    }
}

/// The length of an indirect call, from its ModRM byte and the SIB byte.
fn call_length(mod_rm: u8, sib: Option<&u8>) -> usize {
    let (mode, register) = (mod_rm >> 6, mod_rm & 7);
    let has_sib = mode != 3 && register == 4;
    let displacement = match mode {
        0 if register == 5 || (has_sib && sib.is_some_and(|sib| sib & 7 == 5)) => 4,
        1 => 1,
        2 => 4,
        _ => 0,
    };
    2 + usize::from(has_sib) + displacement
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// The link address of the tests' kernel.
    pub(in super::super) const TEXT: u64 = KERNEL_MAP + 0x100_0000;

    /// A vmlinux with one segment that has these bytes at [`TEXT`] (System V ABI, ELF-64).
    pub(in super::super) fn vmlinux(code: &[u8]) -> Vec<u8> {
        let mut file = vec![0; 4096];
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        (file[16], file[18], file[32], file[54], file[56], file[64]) = (2, 62, 64, 56, 1, 1);
        let (start, size) = (TEXT - KERNEL_MAP, code.len() as u64);
        for (at, value) in [(24, start), (72, 4096), (88, start), (96, size), (104, size)] {
            file[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        file.extend(code);
        file
    }

    /// A kernel with functions at these offsets and `more` lines in its System.map.
    pub(in super::super) fn kernel(code: &[u8], functions: &[(&str, u64)], more: &str) -> KernelImage {
        let line = |name: &str, at: u64, kind: &str| format!("{:016x} {kind} {name}\n", TEXT + at);
        let mut map = line("_stext", 0, "T") + &line("_etext", code.len() as u64, "T");
        map += &functions.iter().map(|(name, at)| line(name, *at, "t")).collect::<String>();
        KernelImage::new(vmlinux(code), &(map + more)).unwrap()
    }

    #[test]
    fn an_instruction_belongs_to_the_preceding_symbol() {
        let kernel = kernel(&[0x90; 64], &[("first", 8), ("second", 16), ("first.cold", 40)], "");
        let function = |at: u64| kernel.symbols.function(TEXT + at);
        assert_eq!(function(8), Some("first"));
        assert_eq!(function(15), Some("first"));
        assert_eq!(function(16), Some("second"));
        assert_eq!(function(41), Some("first"));
        assert_eq!(function(64), None);
        assert_eq!(kernel.symbols.function(TEXT - 1), None);
        assert_eq!(kernel.symbols.function(0x20_0000), None);
        let error = Symbols::parse("ffffffff81000000 T _text\nnot a line\n").unwrap_err().to_string();
        assert_eq!(error, "line 2 of the kernel's System.map is malformed");
    }

    #[test]
    fn calls_are_decoded_from_their_return_address() {
        // Intel SDM, volume 2: E8 is a call by displacement, FF /2 an indirect one.
        let call = |code: &[u8]| {
            let mut bytes = vec![0x90; 16];
            bytes.extend(code);
            let end = bytes.len() as u64;
            bytes.extend([0x90; 16]);
            kernel(&bytes, &[("f", 0)], "").call_before(TEXT + end)
        };
        assert_eq!(call(&[0xe8, 0xf5, 0xff, 0xff, 0xff]), Some(Call::To(TEXT + 10)));
        assert_eq!(call(&[0xe8, 0x00, 0x10, 0x00, 0x00]), None, "outside the kernel's code");
        for code in [
            &[0xff, 0xd0][..],                           // call rax
            &[0x41, 0xff, 0xd4],                         // call r12
            &[0xff, 0x50, 0x08],                         // call [rax+8]
            &[0xff, 0x54, 0x24, 0x08],                   // call [rsp+8]
            &[0xff, 0x15, 0x01, 0x02, 0x03, 0x04],       // call [rip+n]
            &[0xff, 0x14, 0xc5, 0x01, 0x02, 0x03, 0x04], // call [rax*8+n]
            &[0xff, 0x14, 0x25, 0x01, 0x02, 0x03, 0x04], // call [n]
        ] {
            assert_eq!(call(code), Some(Call::Indirect), "{code:x?}");
        }
        for code in [&[0xff, 0xe0][..], &[0xff, 0x50], &[0x90], &[0xff, 0x14, 0xc5, 1, 2]] {
            assert_eq!(call(code), None, "{code:x?}");
        }
    }

    /// A kernel with one initcall at each of two levels; `second` is the offset of the second.
    fn with_table(second: i32) -> KernelImage {
        let mut code = vec![0x90; 64];
        code.extend((-64_i32).to_le_bytes());
        code.extend(second.to_le_bytes());
        let mut more = String::new();
        for (number, (name, _)) in LEVELS.iter().enumerate() {
            more += &format!("{:x} D {name}\n", TEXT + 64 + if number > 5 { 4 } else { 0 });
        }
        more += &format!("{:x} D __initcall_end\n", TEXT + 72);
        more += &format!("{:x} d __initcall__kmod_pty__291_947_second6\n", TEXT + 68);
        kernel(&code, &[("first", 0), ("second", 32)], &more)
    }

    #[test]
    fn initcalls_are_read_from_the_relative_table() {
        let initcalls = with_table(-36).initcalls().unwrap();
        let short: Vec<_> = initcalls
            .iter()
            .map(|call| (call.address - TEXT, &*call.name, call.level, call.file.as_deref()))
            .collect();
        assert_eq!(short, [(0, "first", "subsys", None), (32, "second", "late", Some("pty"))]);
        let error = with_table(1000).initcalls().unwrap_err().to_string();
        assert!(error.contains("is not a function of the kernel"), "{error}");
        let error = kernel(&[0x90], &[], "").initcalls().unwrap_err().to_string();
        assert_eq!(error, "the kernel's System.map has no __initcall_start");
    }
}
