//! Errors of building, starting and running a machine.

use crate::boot::BootError;
use crate::config::ConfigError;
use crate::control::channel::ControlError;
use crate::devices::virtio::BackendError;
use crate::function_marks::MarkError;
use crate::jail::JailError;
use crate::kvm::KvmError;
use crate::memory::MemoryError;
use crate::preboot::error::PrebootError;
use std::io;
use std::path::PathBuf;

/// An error and its sources, on one line.
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
    /// The configuration is invalid.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The host's side of a device cannot be used.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// The kernel or initrd cannot be booted.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The functions to record cannot be marked.
    #[error(transparent)]
    Mark(#[from] MarkError),
    /// KVM is not available, or one of its calls failed.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Guest memory could not be allocated or mapped.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A kernel cannot be pre-booted.
    #[error(transparent)]
    Preboot(#[from] PrebootError),
    /// The host lacks a layer of the monitor's jail.
    #[error(transparent)]
    Jail(#[from] JailError),
    /// The communication between the front and its monitor failed.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The console's file cannot be created.
    #[error("cannot write the console to {}", path.display())]
    Console {
        /// The file.
        path: PathBuf,
        /// The host's error.
        source: io::Error,
    },
    /// A system call failed: the host is out of descriptors or threads, for example.
    #[error("cannot {what}")]
    Host {
        /// The failed operation, as a verb phrase.
        what: &'static str,
        /// The host's error.
        source: io::Error,
    },
}

impl Error {
    /// Whether the user can fix the error: with another configuration, or by making KVM available.
    #[must_use]
    pub const fn is_user_error(&self) -> bool {
        !matches!(
            self,
            Self::Host { .. }
                | Self::Backend(BackendError::Host { .. })
                | Self::Control(_)
                | Self::Kvm(KvmError::Ioctl { .. } | KvmError::Open(_))
        )
    }

    pub(crate) const fn host(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Host { what, source }
    }
}
