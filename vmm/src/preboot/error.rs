//! Errors of pre-booted kernels.

use crate::devices::virtio;
use std::io;
use std::path::PathBuf;

/// Why a pre-booted kernel cannot be used or created.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PrebootError {
    /// The file cannot be opened or read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The host's error.
        source: io::Error,
    },
    /// The file is not a pre-booted kernel, or it is damaged.
    #[error("{} is neither a pre-booted kernel nor a snapshot: {what}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong with the file.
        what: String,
    },
    /// The file was made for another configuration or host.
    #[error("{} was made {made}", path.display())]
    Mismatch {
        /// The file.
        path: PathBuf,
        /// What the file was made for, as the end of the message.
        made: &'static str,
    },
    /// The kernel or initrd does not belong to an image.
    #[error("only the kernel and root filesystem of an image can be pre-booted")]
    NotAnImage,
    /// The file cannot be written.
    #[error("cannot write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The host's error.
        source: io::Error,
    },
    /// The guest ended before it reached init.
    #[error("the guest did not reach init: {0}; `kindling boot --cold` shows its console")]
    Ended(String),
    /// The guest ended before its snapshot was taken.
    #[error("the guest ended before the snapshot was taken: {0}")]
    NotFrozen(String),
    /// The machine cannot be captured in the state in which it stopped.
    #[error("cannot save the state of the guest: {0}")]
    NotCapturable(&'static str),
    /// A device has requests in flight, which the devices of later guests could not complete.
    #[error("cannot save the state of the guest")]
    Device(#[from] virtio::InFlight),
    /// A trial guest that continued from the new file failed.
    #[error("a guest that was started from the new pre-booted kernel failed: {0}; rebuild the image")]
    Trial(String),
    /// A spare machine was made for other devices, or another size.
    #[error("the spare machine was made for another configuration")]
    OtherDevices,
    /// KVM or the host rejects the saved state.
    #[error("cannot restore {}", path.display())]
    Restore {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl PrebootError {
    /// Whether the file does not exist.
    pub(crate) fn is_not_found(&self) -> bool {
        matches!(self, Self::Read { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}
