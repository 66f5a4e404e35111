//! The errors of pre-booted kernels.

use crate::devices::virtio;
use std::io;
use std::path::PathBuf;

/// Why there is no pre-booted kernel to continue from, or none could be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PrebootError {
    /// A file that cannot be opened or read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// A file that is not what it should be.
    #[error("{} is not a pre-booted kernel: {what}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A file that was made for another configuration.
    #[error("{} was made {made}", path.display())]
    Other {
        /// The file.
        path: PathBuf,
        /// For what it was made.
        made: &'static str,
    },
    /// A kernel or initrd that does not come from an image.
    #[error("only the kernel and root filesystem of an image can be pre-booted")]
    NotAnImage,
    /// The file cannot be written.
    #[error("cannot write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// The guest did not get as far as init.
    #[error("the guest did not reach init: {0}; `kindling boot --cold` shows more")]
    Ended(String),
    /// The machine cannot be written down where it stopped.
    #[error("the guest stopped where it cannot be kept: {0}")]
    NotKeepable(&'static str),
    /// A device has begun what those of later guests would know nothing of.
    #[error("the guest stopped where it cannot be kept")]
    Device(#[from] virtio::InFlight),
    /// A guest that continued from the new file did not end well.
    #[error("a guest that continued from it did not end as it should: {0}; build the image anew")]
    Trial(String),
    /// This host does not take what the file says of a machine.
    #[error("{} cannot be continued from", path.display())]
    Restore {
        /// The file.
        path: PathBuf,
        /// What stands in the way.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl PrebootError {
    /// Whether there is no such file.
    pub(crate) fn is_absent(&self) -> bool {
        matches!(self, Self::Read { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}
