//! The errors of guests.

use kindling_vmm::control::ControlError;
use std::io;
use std::path::PathBuf;

/// An error of a guest.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GuestError {
    /// The name is not valid as the name of a directory and as a hostname.
    #[error(
        "invalid guest name {0:?}: use up to 48 letters, digits, '.', '_' and '-', and start with a letter or digit"
    )]
    Name(String),
    /// A guest of this name exists.
    #[error("a guest named {name} exists already{}",
            if *is_alive { String::new() } else { format!(", but has ended; `kindling rm {name}` removes it") })]
    Taken {
        /// The name.
        name: String,
        /// Whether the guest runs.
        is_alive: bool,
    },
    /// No guest has this name.
    #[error("no guest named {0}; `kindling ps -a` lists all guests")]
    Unknown(String),
    /// The guest runs, and the operation needs one that has ended.
    #[error("the guest {0} is running; stop it with `kindling stop {0}`, or use `kindling rm -f {0}`")]
    Runs(String),
    /// The processes of the guest cannot be identified from the calling process.
    #[error(
        "the guest {0} runs in another PID namespace, or under another version of kindling; use the kindling that started it"
    )]
    Elsewhere(String),
    /// Another process started the guest, and only that process can perform the operation.
    #[error("another process started the guest {0}, and only that process can do this")]
    NotOwned(String),
    /// The guest's monitor does not respond, or has ended.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The guest belongs to a program that embeds the library, and has no command that could receive signals.
    #[error("the guest {0} belongs to a program, and has no command to signal; `kindling kill {0}` ends it")]
    Embedded(String),
    /// The guest was started in the foreground, without a log.
    #[error(
        "the output of the guest {0} went to the `kindling run` that started it; `kindling run -d` keeps a log"
    )]
    NoLog(String),
    /// The guest has ended, and its exit status is unknown.
    #[error("the exit status of the guest {0} is unknown: {1}")]
    NoStatus(String, &'static str),
    /// The guest has ended, and the operation needs a running one.
    #[error("the guest {0} has ended; `kindling rm {0}` removes it")]
    Ended(String),
    /// The guest is paused, and the operation needs its response.
    #[error("the guest {0} is paused; `kindling resume {0}` lets it continue")]
    Paused(String),
    /// Other users can change the directory of guests.
    #[error(
        "cannot use the directory of guests; set XDG_RUNTIME_DIR to a directory that only you can change"
    )]
    NotOurs(#[source] trusted_path::Error),
    /// An operation on a file or process of the host failed.
    #[error("cannot {what} {}", path.display())]
    Host {
        /// The operation.
        what: &'static str,
        /// Path of the file, or the directory of the guest.
        path: PathBuf,
        /// The host's error.
        source: io::Error,
    },
}

impl GuestError {
    /// Returns whether the request is at fault, rather than the host.
    #[must_use]
    pub const fn is_user_error(&self) -> bool {
        !matches!(self, Self::Host { .. } | Self::NoStatus(..) | Self::Control(_))
    }
}
