//! The page faults and exits of a guest, from the tracepoints of KVM.

use super::memory::{Map, Use};
use crate::bench::trace;
use kindling_vmm::Instant;
use kindling_vmm::preboot::SavedMemory;
use std::collections::{BTreeMap, HashSet};

/// What the host does for the first access of a guest to a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    /// Maps a page of the saved memory, which the guest reads.
    Mapped,
    /// Copies a page of the saved memory, which the guest writes.
    Copied,
    /// Maps a page that was copied in advance.
    CopiedBefore,
    /// Copies a page of the saved memory because the processor has walked page tables in it: it counts as a write.
    PageTable,
    /// Maps a new page of zeroes, which the guest writes.
    Zero,
    /// Maps a page into which a device has written.
    Filled,
    /// Passes an access to the registers of a device on.
    Registers,
}

impl Kind {
    pub(super) const ALL: [Self; 7] = [
        Self::Mapped,
        Self::Copied,
        Self::CopiedBefore,
        Self::PageTable,
        Self::Zero,
        Self::Filled,
        Self::Registers,
    ];

    pub(super) const fn title(self) -> &'static str {
        match self {
            Self::Mapped => "mapped",
            Self::Copied => "copied",
            Self::CopiedBefore => "copied before",
            Self::PageTable => "page table",
            Self::Zero => "zero",
            Self::Filled => "filled",
            Self::Registers => "registers",
        }
    }
}

/// A page fault on guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) at: Instant,
    pub(super) kind: Kind,
    pub(super) what: Use,
}

/// An exit of the guest to KVM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Exit {
    pub(super) at: Instant,
    pub(super) reason: String,
}

/// Bits of the error code of a fault (`PFERR_*` in arch/x86/include/asm/kvm_host.h): a write, and an access to the guest's
/// page tables by the processor.
const WRITE: u64 = 1 << 1;
const GUEST_PAGE: u64 = 1 << 33;

/// Evaluates a trace.
pub(super) fn evaluate(
    text: &str,
    memory: &SavedMemory,
    map: &Map,
    is_spare: bool,
) -> (Vec<Fault>, Vec<Exit>) {
    let (mut faults, mut exits) = (Vec::new(), Vec::new());
    let mut seen = HashSet::new();
    for (name, at, rest) in text.lines().filter_map(trace::split) {
        match name {
            "kvm_page_fault" => {
                let (Some(address), Some(code)) = (number(rest, "address "), number(rest, "error_code "))
                else {
                    continue;
                };
                let what = map.at(address);
                let kind = if what == Use::Device {
                    Kind::Registers
                } else {
                    let is_first = seen.insert(address >> 12);
                    let is_copied = memory.is_copied_in_advance(address, is_spare);
                    kind(memory.page(address).is_some(), is_copied, code, is_first)
                };
                faults.push(Fault { at, kind, what });
            }
            "kvm_exit" => exits.extend(reason(rest).map(|reason| Exit { at, reason })),
            _ => {}
        }
    }
    (faults, exits)
}

fn kind(is_saved: bool, is_copied: bool, code: u64, is_first: bool) -> Kind {
    let is_write = code & WRITE != 0;
    match is_saved {
        _ if is_copied => Kind::CopiedBefore,
        true if code & GUEST_PAGE != 0 => Kind::PageTable,
        true if is_write => Kind::Copied,
        true => Kind::Mapped,
        // A kernel reads no page that was never written.
        false if is_first && !is_write => Kind::Filled,
        false => Kind::Zero,
    }
}

/// The hexadecimal number behind a word.
fn number(text: &str, word: &str) -> Option<u64> {
    let (_, rest) = text.split_once(word)?;
    u64::from_str_radix(rest.split_whitespace().next()?.trim_start_matches("0x"), 16).ok()
}

/// The reason of an exit: `vcpu 0 reason npf rip 0x...`.
fn reason(text: &str) -> Option<String> {
    let (_, rest) = text.split_once("reason ")?;
    Some(rest.split_once(" rip ")?.0.trim().to_lowercase())
}

/// The number of exits for each reason, the most frequent first.
pub(super) fn by_reason(exits: &[Exit]) -> Vec<(&str, usize)> {
    let mut counts = BTreeMap::new();
    for exit in exits {
        *counts.entry(exit.reason.as_str()).or_insert(0) += 1;
    }
    let mut counts: Vec<_> = counts.into_iter().collect();
    counts.sort_by_key(|&(reason, count)| (std::cmp::Reverse(count), reason));
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_and_reasons_are_read_from_lines() {
        let fault = "vcpu 0 rip 0xffffffff8100a address 0x0000000001c0f000 error_code 0x200000006";
        assert_eq!(
            (number(fault, "address "), number(fault, "error_code ")),
            (Some(0x1c0_f000), Some(0x2_0000_0006))
        );
        assert_eq!(number("address zero", "address "), None);
        let exit = "vcpu 0 reason EXIT_NPF rip 0x10 info1 0x0 info2 0x0";
        assert_eq!(reason(exit).as_deref(), Some("exit_npf"));
        let exit = |reason: &str| Exit { at: Instant(0), reason: reason.to_owned() };
        assert_eq!(by_reason(&[exit("a"), exit("b"), exit("b")]), [("b", 2), ("a", 1)]);
    }
}
