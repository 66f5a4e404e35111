//! Settings that matter where guests of different owners share a host (`docs/security.md`).

use super::{Finding, Sources};

/// Whether two threads of a processor core run at the same time.
pub(super) fn smt(sources: &Sources) -> Finding {
    const NAME: &str = "smt";
    const ACTIVE: &str = "/sys/devices/system/cpu/smt/active";
    const SHARED: &str =
        "A guest can learn from caches and timing what a guest on the other thread of its core does.";
    match sources.number(ACTIVE) {
        Ok(0) => Finding::good(NAME, "off, or the processor has none", "No two guests share a core."),
        Ok(_) => Finding::improvable(
            NAME,
            "on: two threads share each core",
            SHARED,
            "if guests have different owners, `echo off | sudo tee /sys/devices/system/cpu/smt/control`",
        ),
        Err(why) => Finding::unknown(NAME, why, SHARED, "see `lscpu`, threads per core"),
    }
}

/// Flaws of processors, by their names in /sys, that a guest can use against the host or another guest.
const FLAWS: [&str; 14] = [
    "gather_data_sampling",
    "indirect_target_selection",
    "l1tf",
    "mds",
    "meltdown",
    "mmio_stale_data",
    "reg_file_data_sampling",
    "retbleed",
    "spec_rstack_overflow",
    "spectre_v2",
    "srbds",
    "tsa",
    "tsx_async_abort",
    "vmscape",
];

/// Whether the kernel works around the flaws of the processor.
pub(super) fn mitigations(sources: &Sources) -> Finding {
    const NAME: &str = "mitigations";
    const READ: &str = "A guest may be able to read memory of the host or of another guest.";
    let read = |flaw: &'static str| {
        Some((flaw, sources.read(&format!("/sys/devices/system/cpu/vulnerabilities/{flaw}")).ok()?))
    };
    let known: Vec<_> = FLAWS.into_iter().filter_map(read).collect();
    let open: Vec<_> =
        known.iter().filter(|(_, text)| text.starts_with("Vulnerable")).map(|(flaw, _)| *flaw).collect();
    if known.is_empty() {
        let why = "/sys/devices/system/cpu/vulnerabilities lists no flaw of the processor that is known here";
        Finding::unknown(NAME, why, READ, "see whether the kernel is current")
    } else if open.is_empty() {
        Finding::good(
            NAME,
            format!("{} flaws are mitigated or absent", known.len()),
            "No known flaw of the processor lets a guest read other memory.",
        )
    } else {
        Finding::improvable(
            NAME,
            format!("vulnerable: {}", open.join(", ")),
            READ,
            "remove `mitigations=off` from the kernel's parameters, and update the kernel and the microcode",
        )
    }
}

/// Whether the kernel merges equal pages of different processes.
pub(super) fn ksm(sources: &Sources) -> Finding {
    const NAME: &str = "ksm";
    const RUN: &str = "/sys/kernel/mm/ksm/run";
    const MERGED: &str = "A guest can find out which pages another one has. Guest memory is merged only where a parent of \
                          kindling has asked for it (systemd's MemoryKSM=).";
    match sources.number(RUN) {
        Ok(1) => Finding::improvable(NAME, "on", MERGED, format!("`echo 2 | sudo tee {RUN}`")),
        Ok(_) => Finding::good(NAME, "off", "No page is shared because it is equal."),
        Err(why) => Finding::unknown(NAME, why, MERGED, format!("see {RUN}: 0 or 2 is off")),
    }
}

/// Whether guest memory can be written to a disk.
pub(super) fn swap(sources: &Sources) -> Finding {
    const NAME: &str = "swap";
    const SWAPS: &str = "/proc/swaps";
    const WRITTEN: &str = "Guest memory may be written there, where it stays after the guest.";
    let devices = |text: &str| {
        let names = text.lines().skip(1).filter_map(|line| line.split_whitespace().next());
        names.filter(|name| !name.starts_with("/dev/zram")).map(str::to_owned).collect::<Vec<_>>()
    };
    match sources.read(SWAPS).map(|text| devices(&text)) {
        Ok(devices) if devices.is_empty() => {
            Finding::good(NAME, "none on a disk", "Guest memory is never written to a disk.")
        }
        Ok(devices) => Finding::improvable(
            NAME,
            format!("on {}", super::quoted(&devices.join(" "))),
            WRITTEN,
            "encrypt it, or `sudo swapoff -a`",
        ),
        Err(why) => Finding::unknown(NAME, why.to_string(), WRITTEN, "see `swapon --show`"),
    }
}
