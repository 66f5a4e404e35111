//! Memory of a monitor's process without guest memory.
//!
//! /proc/PID/smaps does not mark guest memory. Guest memory is writable and larger than any other mapping of a monitor.
//! The heuristic therefore takes the largest runs of adjacent writable mappings until their size reaches that of guest
//! memory, and of each run the shortest part that is large enough. (Runs of adjacent mappings, because Kindling maps
//! files over guest memory, which splits it.) Shared mappings of files are guest memory, too: an image or a disk that the guest
//! uses in place (virtio-pmem).

/// One mapping.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Mapping {
    start: u64,
    end: u64,
    writable: bool,
    /// Whether it is a shared mapping of a file.
    is_shared_file: bool,
    private: u64,
    proportional: u64,
}

impl Mapping {
    const fn size(&self) -> u64 {
        self.end - self.start
    }
}

/// Memory of a process in bytes, without guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Usage {
    /// Private pages.
    pub(super) private: u64,
    /// Proportional set size: private pages, and an equal share of each shared page.
    pub(super) proportional: u64,
}

/// Reads the usage of a monitor whose guest has `guest_bytes` of memory; `None` if no mappings match guest memory.
pub(super) fn without_guest(smaps: &str, guest_bytes: u64) -> Option<Usage> {
    let mappings = parse(smaps);
    let mut runs = runs(&mappings);
    runs.sort_by_key(|run| std::cmp::Reverse(size(run)));
    let (mut found, mut guest) = (0, Vec::new());
    for run in runs {
        if found >= guest_bytes {
            break;
        }
        let part = shortest_part(run, guest_bytes - found);
        found += size(part);
        guest.extend(part.iter().map(|mapping| mapping.start));
    }
    if found < guest_bytes {
        return None;
    }
    let is_guest = |mapping: &Mapping| mapping.is_shared_file || guest.contains(&mapping.start);
    let rest = || mappings.iter().filter(|mapping| !is_guest(mapping));
    Some(Usage {
        private: rest().map(|mapping| mapping.private).sum(),
        proportional: rest().map(|mapping| mapping.proportional).sum(),
    })
}

/// Private memory in bytes, including guest memory.
pub(super) fn private(smaps: &str) -> u64 {
    parse(smaps).iter().map(|mapping| mapping.private).sum()
}

fn size(run: &[Mapping]) -> u64 {
    run.iter().map(Mapping::size).sum()
}

/// Runs of adjacent writable mappings.
fn runs(mappings: &[Mapping]) -> Vec<&[Mapping]> {
    mappings
        .chunk_by(|a, b| a.writable && b.writable && a.end == b.start)
        .filter(|run| run[0].writable)
        .collect()
}

/// The shortest part of a run with at least `bytes`, or the whole run.
fn shortest_part(run: &[Mapping], bytes: u64) -> &[Mapping] {
    let mut best = run;
    for first in 0..run.len() {
        for last in first..run.len() {
            let part = &run[first..=last];
            if size(part) >= bytes && size(part) < size(best) {
                best = part;
            }
        }
    }
    best
}

fn parse(smaps: &str) -> Vec<Mapping> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in smaps.lines() {
        if let Some(mapping) = header(line) {
            mappings.push(mapping);
        } else if let (Some((name, value)), Some(mapping)) = (line.split_once(':'), mappings.last_mut()) {
            let kib = || value.trim().strip_suffix(" kB")?.parse::<u64>().ok();
            match name {
                "Private_Clean" | "Private_Dirty" => mapping.private += kib().unwrap_or(0) * 1024,
                "Pss" => mapping.proportional += kib().unwrap_or(0) * 1024,
                _ => {}
            }
        }
    }
    mappings
}

/// The first line of a mapping: `7f0000000000-7f0000021000 rw-p 00000000 00:00 0`.
fn header(line: &str) -> Option<Mapping> {
    let (range, rest) = line.split_once(' ')?;
    let (start, end) = range.split_once('-')?;
    let address = |text| u64::from_str_radix(text, 16).ok();
    let writable = rest.as_bytes().get(1) == Some(&b'w');
    let is_shared_file = rest.as_bytes().get(3) == Some(&b's') && rest.contains(" /");
    Some(Mapping {
        start: address(start)?,
        end: address(end)?,
        writable,
        is_shared_file,
        ..Mapping::default()
    })
    .filter(|mapping| mapping.start < mapping.end)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1024 * 1024;

    fn entry(start: u64, size: u64, access: &str, private: u64, pss: u64) -> String {
        format!(
            "{start:x}-{:x} {access} 00000000 00:00 0    [some: name]\nSize: 1 kB\nRss: 9 kB\nPss: {pss} kB\n\
             Pss_Dirty: 77 kB\nPrivate_Clean: 1 kB\nPrivate_Dirty: {} kB\nVmFlags: rd wr mr\n",
            start + size,
            private - 1,
        )
    }

    /// A heap, the text of a library, and 64 MiB of guest memory with a file mapped over its middle, directly after the
    /// stack of a thread.
    fn ours() -> String {
        let base = 0x7f00_0000_0000;
        [
            entry(0x40_0000, MIB, "rw-p", 100, 100),
            entry(0x60_0000, 200 * MIB, "r-xp", 10, 4),
            entry(base, 8 * MIB, "rw-p", 20, 20),
            entry(base + 8 * MIB, 30 * MIB, "rw-p", 5000, 5000),
            entry(base + 38 * MIB, 4 * MIB, "rw-p", 600, 600),
            entry(base + 42 * MIB, 30 * MIB, "rw-p", 7000, 7000),
            entry(base + 99 * MIB, MIB, "rw-p", 3, 3),
        ]
        .concat()
    }

    #[test]
    fn guest_memory_split_by_a_file_mapping_is_excluded() {
        let usage = without_guest(&ours(), 64 * MIB).unwrap();
        assert_eq!(usage, Usage { private: 133 * 1024, proportional: 127 * 1024 });
    }

    #[test]
    fn guest_memory_in_two_mappings_is_excluded() {
        let text = [
            entry(0x1_0000_0000, 1024 * MIB, "rw-s", 50, 50),
            entry(0x7_0000_0000, 3072 * MIB, "rw-s", 60, 60),
            entry(0x9_0000_0000, 8 * MIB, "rw-p", 70, 65),
        ]
        .concat();
        let usage = without_guest(&text, 4096 * MIB).unwrap();
        assert_eq!(usage, Usage { private: 70 * 1024, proportional: 65 * 1024 });
    }

    #[test]
    fn mappings_with_a_gap_are_not_taken_for_guest_memory() {
        // 40 MiB and 24 MiB of other memory with a gap between them, and 64 MiB of guest memory.
        let text = [
            entry(0x1_0000_0000, 40 * MIB, "rw-p", 10, 10),
            entry(0x1_0000_0000 + 41 * MIB, 24 * MIB, "rw-p", 11, 11),
            entry(0x2_0000_0000, 64 * MIB, "rw-p", 500, 500),
        ]
        .concat();
        let usage = without_guest(&text, 64 * MIB).unwrap();
        assert_eq!(usage, Usage { private: 21 * 1024, proportional: 21 * 1024 });
    }

    #[test]
    fn a_process_with_less_memory_than_the_guest_has_no_result() {
        assert_eq!(without_guest(&ours(), 512 * MIB), None);
        assert_eq!(without_guest("", MIB), None);
        assert_eq!(without_guest("no-sense\nPss: 1 kB\nfff-0 rw-p\n", MIB), None);
    }

    #[test]
    fn a_file_that_the_guest_uses_in_place_is_guest_memory() {
        let image =
            entry(0x7e00_0000_0000, 64 * MIB, "r--s", 900, 900).replace("[some: name]", "/cache/image.erofs");
        let ring =
            entry(0x7d00_0000_0000, MIB, "rw-s", 3, 3).replace("[some: name]", "anon_inode:[io_uring]");
        let with_both = [ours(), image, ring].concat();
        let usage = |smaps: &str| without_guest(smaps, 64 * MIB).unwrap().private;
        assert_eq!(usage(&with_both), usage(&ours()) + 3 * 1024);
    }
}
