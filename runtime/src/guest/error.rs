//! The errors of guests.

use kindling_vmm::control::ControlError;
use std::io;
use std::path::PathBuf;

/// Why there is no such guest, or none can be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GuestError {
    /// A name that a folder or a hostname cannot have.
    #[error(
        "{0:?} is no name for a guest: letters, digits, '.', '_' and '-', at most 48, and the first a letter or digit"
    )]
    Name(String),
    /// A guest of this name exists.
    #[error("there is a guest named {name} already{}",
            if *is_alive { String::new() } else { format!(", which has ended; `kindling rm {name}` forgets it") })]
    Taken {
        /// The name.
        name: String,
        /// Whether it runs.
        is_alive: bool,
    },
    /// No guest has this name.
    #[error("there is no guest named {0}; `kindling ps -a` lists them")]
    Unknown(String),
    /// The guest runs, and should not.
    #[error("the guest {0} runs; `kindling stop {0}` ends it, and `kindling rm -f {0}` does not ask it")]
    Runs(String),
    /// Nothing says to this process which processes are its own.
    #[error(
        "the guest {0} runs in another PID namespace, or another version of kindling runs it; use that one's kindling"
    )]
    Elsewhere(String),
    /// A guest that another process started.
    #[error("another process started the guest {0}, and only that process can do this")]
    NotOwned(String),
    /// The guest's monitor does not answer, or is gone.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The guest of another program.
    #[error("the guest {0} belongs to a program, which gets no signals for it; `kindling kill {0}` ends it")]
    Embedded(String),
    /// A guest in the foreground.
    #[error("the output of the guest {0} went to the `kindling run` that started it; with -d it is kept")]
    NoLog(String),
    /// The guest is gone, and nobody knows how it ended.
    #[error("nothing says how the guest {0} ended: {1}")]
    NoStatus(String, &'static str),
    /// The guest does not run any more.
    #[error("the guest {0} has ended; `kindling rm {0}` forgets it")]
    Ended(String),
    /// Others can change the folder.
    #[error("the folder of guests cannot be used; set XDG_RUNTIME_DIR to a folder of yours")]
    NotOurs(#[source] trusted_path::Error),
    /// The host refused something.
    #[error("cannot {what} {}", path.display())]
    Host {
        /// What was tried.
        what: &'static str,
        /// With what.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
}

impl GuestError {
    /// Whether asking for something else can help, rather than the host.
    #[must_use]
    pub const fn is_users(&self) -> bool {
        !matches!(self, Self::Host { .. } | Self::NoStatus(..) | Self::Control(_))
    }
}
