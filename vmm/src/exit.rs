//! How a machine ended.

use crate::kvm::{ExitCounts, Registers};
use crate::memory::BackingFile;
use crate::profile::Profile;
use crate::timeline::Timeline;
use serde::{Deserialize, Serialize};

/// Why a machine ended.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[non_exhaustive]
pub enum ExitReason {
    /// The payload ended with this code.
    Payload(u8),
    /// Init failed; it said why on the console.
    InitPanic,
    /// The guest's kernel panicked.
    GuestPanic,
    /// The guest reset the machine without a panic and without an exit status.
    Reset,
    /// The guest's processor shut down.
    TripleFault,
    /// KVM could not go on.
    KvmInternalError {
        /// KVM's suberror; 1 is an instruction that it cannot emulate.
        suberror: u32,
    },
    /// This program or the host's KVM failed.
    VmmFailure(String),
    /// A file that is guest memory became shorter.
    MemoryLost {
        /// Its path, as the host had it then.
        path: String,
    },
    /// Somebody stopped the machine.
    Stopped,
    /// The person at the terminal left with Ctrl-A x.
    Left,
}

impl ExitReason {
    /// The exit status of the `kindling` command for this reason.
    ///
    /// A payload's own code passes unchanged, so a payload that ends with 119 to 123 looks like
    /// one of the others; the message on standard error tells them apart.
    #[must_use]
    pub const fn status(&self) -> u8 {
        match self {
            Self::Payload(code) => *code,
            Self::Left => 0,
            Self::Reset => 119,
            Self::InitPanic => 120,
            Self::KvmInternalError { .. } => 121,
            Self::TripleFault => 122,
            Self::GuestPanic => 123,
            Self::VmmFailure(_) | Self::MemoryLost { .. } => 125,
            // 128 + SIGTERM, unless the caller knows which signal it was.
            Self::Stopped => 143,
        }
    }

    /// Whether something went wrong that is not the payload's affair.
    #[must_use]
    pub const fn is_failure(&self) -> bool {
        !matches!(self, Self::Payload(_) | Self::Stopped | Self::Left)
    }
}

impl std::fmt::Display for ExitReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Payload(code) => write!(f, "the payload ended with status {code}"),
            Self::InitPanic => write!(f, "init failed"),
            Self::GuestPanic => write!(f, "the guest's kernel panicked"),
            Self::Reset => write!(f, "the guest reset the machine before its payload had ended"),
            Self::TripleFault => write!(f, "the guest's processor shut down after a triple fault"),
            Self::KvmInternalError { suberror: 1 } => {
                write!(f, "KVM met an instruction that it cannot emulate (internal error 1)")
            }
            Self::KvmInternalError { suberror } => write!(f, "KVM failed with internal error {suberror}"),
            Self::VmmFailure(what) => write!(f, "{what}"),
            Self::MemoryLost { path } => write!(f, "{path}{}", BackingFile::MADE_SHORTER),
            Self::Stopped => write!(f, "the machine was stopped"),
            Self::Left => write!(f, "the terminal left the machine"),
        }
    }
}

impl Exit {
    /// The end of a machine of which nothing else is known.
    #[must_use]
    pub fn new(reason: ExitReason, timeline: Timeline) -> Self {
        Self {
            reason,
            timeline,
            exits: ExitCounts::default(),
            unclaimed_ports: 0,
            device_failures: Vec::new(),
            console_tail: Vec::new(),
            registers: None,
            profile: None,
        }
    }
}

/// What is left of a machine.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Exit {
    /// Why it ended.
    pub reason: ExitReason,
    /// When each step was reached, the guest's marks among them.
    pub timeline: Timeline,
    /// Exits of all vCPUs to this program.
    pub exits: ExitCounts,
    /// Accesses to I/O ports that no device has.
    pub unclaimed_ports: u64,
    /// A sentence for each device that stopped because its driver broke a rule, or that has nobody behind it any more.
    pub device_failures: Vec<String>,
    /// The last lines of console output.
    pub console_tail: Vec<String>,
    /// Registers of the vCPU that failed, if one did.
    pub registers: Option<Registers>,
    /// The records of a boot that was profiled; they stay in the process that made them.
    #[serde(skip)]
    pub profile: Option<Profile>,
}
