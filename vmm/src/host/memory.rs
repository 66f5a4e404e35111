//! Memory for guests, and its page size.
//!
//! A guest's kernel accesses most of its memory for the first time, and each first access is a page fault in KVM. With
//! pages of 2 MiB there are 512 times fewer faults.

use super::{Finding, Sources, cgroup, quoted};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
/// Enough for one guest of the default size of 128 MiB and its VMM.
const TOO_LITTLE: u64 = 256 * MIB;
const LITTLE: u64 = 1024 * MIB;

/// Formats bytes with a unit.
fn size(bytes: u64) -> String {
    let mib = bytes / MIB;
    if mib < 1024 { format!("{mib} MiB") } else { format!("{}.{} GiB", mib / 1024, mib % 1024 * 10 / 1024) }
}

/// The amount of memory for guests.
pub(super) fn memory(sources: &Sources) -> Finding {
    const NAME: &str = "memory";
    const NOT_TOLD: &str = "How many guests have room cannot be told.";
    const LOOK: &str = "see `free -m`";
    let text = match sources.read("/proc/meminfo") {
        Ok(text) => text,
        Err(error) => return Finding::unknown(NAME, error.to_string(), NOT_TOLD, LOOK),
    };
    let bytes = |key: &str| -> Option<u64> {
        let value = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
        value.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(KIB)
    };
    let (Some(total), Some(available)) = (bytes("MemTotal"), bytes("MemAvailable")) else {
        return Finding::unknown(NAME, "/proc/meminfo has no MemTotal and MemAvailable", NOT_TOLD, LOOK);
    };
    let mut fact = format!("{} available of {}", size(available), size(total));
    let limit = cgroup::memory_limit(sources).filter(|limit| *limit < total);
    if let Some(limit) = limit {
        fact += &format!(", and {} allowed by a cgroup", size(limit));
    }
    let usable = limit.map_or(available, |limit| limit.min(available));
    let more = if limit.is_some_and(|limit| limit < available) {
        "raise the limit (`memory.max` of the cgroup, or the memory limit of the container or pod), or give \
         guests less with `--memory`"
    } else {
        "free memory, or give guests less with `--memory`"
    };
    if usable < TOO_LITTLE {
        return Finding::bad(NAME, fact, "This is hardly enough for one guest.", more);
    }
    if usable < LITTLE {
        return Finding::improvable(NAME, fact, "This is enough for a few small guests.", more);
    }
    // In mode 2 the kernel ignores MAP_NORESERVE.
    if sources.number("/proc/sys/vm/overcommit_memory") == Ok(2) {
        return Finding::improvable(
            NAME,
            fact + ", overcommitting is off",
            "All of a guest's memory counts from its start, so fewer guests have room than the memory they \
             use would allow.",
            "`sudo sysctl vm.overcommit_memory=0`",
        );
    }
    Finding::good(
        NAME,
        fact,
        "A guest takes memory from the host when it first touches it, so guests have room for more than \
         their sizes add up to.",
    )
}

/// Reserved huge pages.
pub(super) fn hugepages(sources: &Sources) -> Finding {
    const NAME: &str = "hugepages";
    const SETTING: &str =
        "`sudo sysctl vm.nr_hugepages=512` sets 1 GiB aside, which nothing else can use then";
    let number = |file: &str| sources.number(&format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{file}"));
    let counts = number("nr_hugepages").and_then(|all| Ok((all, number("free_hugepages")?)));
    let (all, free) = match counts {
        Ok(counts) => counts,
        Err(why) => {
            let meaning = "Whether memory is set aside in 2 MiB pages cannot be told.";
            return Finding::unknown(NAME, why, meaning, "see `grep -i huge /proc/meminfo`");
        }
    };
    // Pages that are reserved by a mapping count as free until they are accessed.
    let free = free.saturating_sub(number("resv_hugepages").unwrap_or(0));
    let reported = "guest kernels were reported to boot in 32 to 56 % less time in such memory";
    if all == 0 {
        return Finding::improvable(
            NAME,
            "no 2 MiB pages are set aside",
            format!("Guests cannot have memory of reserved huge pages; {reported}."),
            format!("{SETTING}; with transparent huge pages (see thp) it is less urgent"),
        );
    }
    let fact =
        format!("{free} of {all} reserved 2 MiB pages are free ({})", size(free.saturating_mul(2 * MIB)));
    if free == 0 {
        let meaning = "All memory set aside in huge pages is in use.";
        return Finding::improvable(NAME, fact, meaning, format!("raise their number: {SETTING}"));
    }
    Finding::good(NAME, fact, format!("Guests can have memory of reserved huge pages; {reported}."))
}

/// The word in brackets in one of the kernel's lists of choices.
fn chosen(text: &str) -> Option<&str> {
    text.split_whitespace().find_map(|word| word.strip_prefix('[')?.strip_suffix(']'))
}

/// Huge pages that the kernel finds by itself.
pub(super) fn thp(sources: &Sources) -> Finding {
    const NAME: &str = "thp";
    const DIRECTORY: &str = "/sys/kernel/mm/transparent_hugepage";
    let all_sizes = format!("{DIRECTORY}/enabled");
    // Since Linux 6.8 each size has its own setting, which usually inherits the common one.
    let one_size = format!("{DIRECTORY}/hugepages-2048kB/enabled");
    let own = sources.read(&one_size).ok().filter(|text| chosen(text).is_some_and(|word| word != "inherit"));
    let (path, text) = match own {
        Some(text) => (one_size, Ok(text)),
        None => (all_sizes.clone(), sources.read(&all_sizes)),
    };
    let not_told = "Whether guest memory can come in 2 MiB pages without being set aside cannot be told.";
    let look = format!("see `cat {path}`");
    let text = match text {
        Ok(text) => text,
        Err(error) => return Finding::unknown(NAME, error.to_string(), not_told, look),
    };
    let reported = "guest kernels were reported to boot in 20 % less time with them, nested in 50 %";
    match chosen(&text) {
        Some("always") => Finding::good(
            NAME,
            "transparent huge pages: always",
            format!("Guest memory comes in 2 MiB pages where it can; {reported}."),
        ),
        Some("madvise") => Finding::good(
            NAME,
            "transparent huge pages: madvise",
            format!("Guest memory comes in 2 MiB pages where the VMM asks for them; {reported}."),
        ),
        Some("never") => Finding::improvable(
            NAME,
            "transparent huge pages: never",
            format!("Guest memory comes in 4 KiB pages unless huge ones are set aside; {reported}."),
            format!(
                "`echo madvise | sudo tee {path}`, and to keep it boot with `transparent_hugepage=madvise`"
            ),
        ),
        _ => Finding::unknown(NAME, format!("{path} says {}", quoted(&text)), not_told, look),
    }
}

#[cfg(test)]
mod tests {
    use super::{MIB, chosen, size};

    #[test]
    fn sizes_are_rounded_down() {
        for (bytes, text) in [
            (0, "0 MiB"),
            (MIB - 1, "0 MiB"),
            (1023 * MIB, "1023 MiB"),
            (1024 * MIB, "1.0 GiB"),
            (1535 * MIB, "1.4 GiB"),
            (24_684_092 * 1024, "23.5 GiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn the_selected_value_is_in_brackets() {
        assert_eq!(chosen("always [madvise] never"), Some("madvise"));
        assert_eq!(chosen("always madvise never"), None);
        assert_eq!(chosen("[always"), None);
    }
}
