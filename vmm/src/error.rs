//! The errors of the recipe.

use crate::boot::BootError;
use crate::config::ConfigError;
use crate::control::channel::ControlError;
use crate::function_marks::MarkError;
use crate::kvm::KvmError;
use crate::memory::MemoryError;
use crate::preboot::error::PrebootError;
use std::io;
use std::path::PathBuf;

/// An error and what led to it, on one line.
#[must_use]
pub fn with_causes(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        line.push_str(": ");
        line.push_str(&cause.to_string());
        source = cause.source();
    }
    line
}

/// Why a machine could not be built or started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The configuration is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The kernel or initrd cannot be booted.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The functions to record cannot be marked.
    #[error(transparent)]
    Mark(#[from] MarkError),
    /// KVM is missing or refused something.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Guest memory could not be had.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A kernel cannot be pre-booted.
    #[error(transparent)]
    Preboot(#[from] PrebootError),
    /// The front and its monitor do not understand each other.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The console's file cannot be written.
    #[error("cannot write the console to {}", path.display())]
    Console {
        /// The file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// The host has no descriptors, threads or the like left.
    #[error("the host refused to {what}")]
    Host {
        /// What was asked of it.
        what: &'static str,
        /// Its answer.
        source: io::Error,
    },
}

impl Error {
    /// Whether the user can mend this by asking for something else, or by making KVM available.
    #[must_use]
    pub const fn is_users(&self) -> bool {
        !matches!(
            self,
            Self::Host { .. } | Self::Control(_) | Self::Kvm(KvmError::Ioctl { .. } | KvmError::Open(_))
        )
    }

    pub(crate) const fn host(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Host { what, source }
    }
}
