//! The result of a machine.

use crate::kvm::{ExitCounts, Registers};
use crate::memory::BackingFile;
use crate::profile::Profile;
use crate::timeline::Timeline;
use serde::{Deserialize, Serialize};

/// Why a machine ended.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[non_exhaustive]
pub enum ExitReason {
    /// The payload exited with this code. A payload that is killed by a signal has code 128 plus the signal number.
    Payload(u8),
    /// Init failed. The reason is on the console.
    InitPanic,
    /// The guest's kernel panicked.
    GuestPanic,
    /// The guest reset the machine without a kernel panic and without an exit status.
    Reset,
    /// The guest's processor shut down after a triple fault.
    TripleFault,
    /// KVM reported `KVM_EXIT_INTERNAL_ERROR`.
    KvmInternalError {
        /// KVM's suberror; 1 (`KVM_INTERNAL_ERROR_EMULATION`) is an instruction that KVM cannot emulate.
        suberror: u32,
    },
    /// The VMM or the host's KVM failed; the text is the error with its causes.
    VmmFailure(String),
    /// A file that is mapped as guest memory was truncated.
    MemoryLost {
        /// The path of the file at the time of the failure.
        path: String,
    },
    /// The machine was stopped from outside.
    Stopped,
    /// The user typed Ctrl-A x at the terminal.
    TerminalEscape,
}

impl ExitReason {
    /// The exit status of the `kindling` command for this reason.
    ///
    /// The code of a payload is passed unchanged, so that a code of 119 to 123 is ambiguous; the message on standard
    /// error is not.
    #[must_use]
    pub const fn status(&self) -> u8 {
        match self {
            Self::Payload(code) => *code,
            Self::TerminalEscape => 0,
            Self::Reset => 119,
            Self::InitPanic => 120,
            Self::KvmInternalError { .. } => 121,
            Self::TripleFault => 122,
            Self::GuestPanic => 123,
            Self::VmmFailure(_) | Self::MemoryLost { .. } => 125,
            // 128 + SIGTERM; the caller uses another value if it knows the signal.
            Self::Stopped => 143,
        }
    }

    /// Whether the machine failed, in contrast to its payload.
    #[must_use]
    pub const fn is_failure(&self) -> bool {
        !matches!(self, Self::Payload(_) | Self::Stopped | Self::TerminalEscape)
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
                write!(f, "KVM cannot emulate an instruction (internal error 1)")
            }
            Self::KvmInternalError { suberror } => write!(f, "KVM failed with internal error {suberror}"),
            Self::VmmFailure(what) => write!(f, "{what}"),
            Self::MemoryLost { path } => write!(f, "{path}{}", BackingFile::TRUNCATED_MESSAGE),
            Self::Stopped => write!(f, "the machine was stopped"),
            Self::TerminalEscape => write!(f, "Ctrl-A x was typed at the terminal"),
        }
    }
}

impl Exit {
    /// The result of a machine of which only the reason is known.
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

/// The result of a machine, with everything that a report needs.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[non_exhaustive]
pub struct Exit {
    /// Why the machine ended.
    pub reason: ExitReason,
    /// When the steps of the boot completed, including the guest's boot marks.
    pub timeline: Timeline,
    /// Number of VM exits to user space of all vCPUs, by kind.
    pub exits: ExitCounts,
    /// Number of accesses to unclaimed I/O ports.
    pub unclaimed_ports: u64,
    /// One sentence per device that has failed: its driver violated the specification, or its backend failed.
    pub device_failures: Vec<String>,
    /// The last lines of console output, oldest first.
    pub console_tail: Vec<String>,
    /// Registers of the vCPU that failed; `None` unless one did.
    pub registers: Option<Registers>,
    /// The profile of the boot, if one was configured. It is not sent to another process.
    #[serde(skip)]
    pub profile: Option<Profile>,
}
