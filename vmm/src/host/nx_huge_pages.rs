//! KVM's mitigation of the iTLB multihit erratum, and its thread.
//!
//! On affected processors KVM maps guest code in 4 KiB pages, and a thread of each VM recovers the huge pages after a
//! while. KVM creates this thread on every processor unless `nx_huge_pages` is `never`. Up to Linux 6.12 the thread was
//! moved between cgroups on creation, which is most of the time that creating a VM took there.

use super::kernel::Version;
use super::{Finding, Sources, cgroup, quoted};

const NAME: &str = "nx_huge_pages";
const PARAMETER: &str = "/sys/module/kvm/parameters/nx_huge_pages";
const ERRATUM: &str = "/sys/devices/system/cpu/vulnerabilities/itlb_multihit";
/// Linux 6.5 introduced the value `never`.
const FIRST_WITH_NEVER: Version = Version::new(6, 5, 0);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Processor {
    Affected,
    NotAffected,
    Unknown,
}

/// The effect of the mitigation on the creation of a VM.
pub(super) fn nx_huge_pages(sources: &Sources) -> Finding {
    let value = match sources.read(PARAMETER) {
        Ok(value) => value,
        Err(error) => {
            let meaning = "KVM's mitigation of the iTLB multihit erratum can slow the creation of a VM; \
                           whether it does here cannot be told.";
            let advice = "look again when the kvm module is loaded";
            return Finding::unknown(NAME, error.to_string(), meaning, advice);
        }
    };
    let (erratum, processor) = match sources.read(ERRATUM) {
        Ok(text) if text == "Not affected" => {
            ("a processor that is not affected".into(), Processor::NotAffected)
        }
        Ok(text) if !text.is_empty() => (quoted(&text), Processor::Affected),
        _ => ("a processor that does not say whether it is affected".to_owned(), Processor::Unknown),
    };
    let fact = format!("{}, on {erratum}", quoted(&value).trim_matches('"'));
    match value.as_str() {
        "never" if processor == Processor::Affected => unprotected(fact),
        "never" => Finding::good(NAME, fact, "VMs are created without the thread that recovers huge pages."),
        "N" if processor == Processor::Affected => unprotected(fact),
        "Y" if processor == Processor::NotAffected => Finding::improvable(
            NAME,
            fact,
            "Guest code is mapped in 4 KiB pages, although this processor does not need it.",
            format!("`echo auto | sudo tee {PARAMETER}`"),
        ),
        "N" | "Y" => thread(sources, fact, processor),
        _ => {
            let fact = format!("{PARAMETER} says {}", quoted(&value));
            let meaning = "This is not one of the known values of this parameter: Y, N and never.";
            Finding::unknown(NAME, fact, meaning, "see `modinfo kvm` for what this kernel means by it")
        }
    }
}

fn unprotected(fact: String) -> Finding {
    Finding::bad(
        NAME,
        fact,
        "This processor has the iTLB multihit erratum and KVM does not work around it: a guest can stop \
         the whole host.",
        "remove `nx_huge_pages` and `mitigations=off` from the kernel command line and from \
         /etc/modprobe.d, and load KVM again",
    )
}

/// The cost of the thread, if the mitigation itself is configured correctly.
fn thread(sources: &Sources, fact: String, processor: Processor) -> Finding {
    let kernel = Version::of(sources);
    if kernel.is_some_and(Version::recovers_huge_pages_cheaply) {
        let meaning = "This kernel makes the thread that recovers huge pages cheaply.";
        return Finding::good(NAME, fact, meaning);
    }
    if cgroup::has_favordynmods(sources) {
        let meaning = "Creating a VM makes a thread that recovers huge pages and moves it into the VMM's cgroups, \
                       which favordynmods makes quick.";
        return Finding::good(NAME, fact, meaning);
    }
    let meaning = "Creating a VM makes a thread that recovers huge pages and moves it into the VMM's cgroups, \
                   which takes long (reported: 20 to 40 ms; 39 ms became 2.9 ms without it).";
    let advice = if processor == Processor::NotAffected {
        let mut advice = format!(
            "while no VM runs, `echo never | sudo tee {PARAMETER}`; to keep it, \
             `echo options kvm nx_huge_pages=never | sudo tee /etc/modprobe.d/kvm-nx-huge-pages.conf`"
        );
        if kernel.is_none_or(|kernel| kernel < FIRST_WITH_NEVER) {
            advice += "; kernels before 6.5 may refuse the value, then favordynmods helps (see cgroup)";
        }
        advice
    } else {
        "this processor needs the thread, so make the move quick: favordynmods (see cgroup), or a kernel \
         from 6.12.2 on"
            .into()
    };
    Finding::improvable(NAME, fact, meaning, advice)
}
