//! Selects where guests run: on this machine or in the lab.

use kindling_vmm::probe::{Probe, probe};
use std::path::PathBuf;

/// The workspace's root.
pub(crate) fn workspace() -> PathBuf {
    let here = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    here.parent().map_or_else(|| here.clone(), PathBuf::from)
}

/// Where guests run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Host {
    /// This machine's own KVM.
    Hardware,
    /// The emulated machine.
    Lab,
}

impl Host {
    /// The name of the host in files.
    pub(crate) const fn kind(self) -> &'static str {
        match self {
            Self::Hardware => "hardware",
            Self::Lab => "exact-lab",
        }
    }

    /// The meaning of times on the host.
    pub(crate) const fn meaning(self) -> &'static str {
        match self {
            Self::Hardware => "real time, with this machine's KVM",
            Self::Lab => {
                "the exact lab, which counts instructions: one is one nanosecond; no caches, TLB misses, exit costs"
            }
        }
    }

    /// Selects the host, and prints the choice and its reason on one line. `exact` forces the exact lab; `counted`
    /// means that a lab counts instructions in any case.
    pub(crate) fn choose(exact: bool, counted: bool) -> Self {
        if exact {
            println!(
                "host: the exact lab (emulated KVM, one instruction = one nanosecond), because of --exact"
            );
            return Self::Lab;
        }
        let found = probe();
        let why = match found {
            Probe::Hardware { loop_time, .. } => {
                println!("host: this machine's KVM (a million loop iterations in {loop_time:.1?})");
                return Self::Hardware;
            }
            Probe::Software { failed_on } => format!("/dev/kvm here is a software KVM: {failed_on}"),
            Probe::NoPermission => "this user has no permission to open /dev/kvm".to_owned(),
            Probe::Absent => "/dev/kvm does not exist".to_owned(),
            Probe::Broken(error) => format!("/dev/kvm does not work: {error}"),
        };
        let kind = if counted { "the exact lab" } else { "the lab" };
        println!("host: {kind} (emulated KVM), because {why}");
        Self::Lab
    }
}
