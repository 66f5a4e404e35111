//! From the configuration of a drive, or of the root filesystem, to its file and its device.

use super::Block;
use super::file::ForeignLock;
use crate::config::devices::{Drive, RootFilesystem};
use crate::devices::virtio::backend::{Attach, Backend, Contents};
use crate::devices::virtio::pmem::Pmem;
use crate::devices::virtio::{BackendError, Device};
use crate::preboot::trial_root;
use std::fs::File;
use vm_memory::GuestAddress;

/// The error of a file that cannot be a drive.
pub(super) fn unusable(drive: &Drive, why: String) -> BackendError {
    BackendError::unusable(format!("{} cannot be a drive", drive.path_on_host.display()), why)
}

impl Attach for Drive {
    fn open(&self) -> Result<Backend, BackendError> {
        Ok(Backend::File(Block::open_file(self, ForeignLock::InUse)?, Contents::Shown))
    }

    fn open_placeholder(&self) -> Result<Backend, BackendError> {
        // The file's contents are not used, so that another process's lock on it does not matter.
        Ok(Backend::File(Block::open_file(self, ForeignLock::Ignored)?, Contents::Zeroes))
    }

    fn create(&self, backend: Backend, _: GuestAddress) -> Result<Box<dyn Device>, BackendError> {
        match backend {
            Backend::File(file, Contents::Shown) => Ok(Box::new(Block::new(self, file)?)),
            Backend::File(file, Contents::Zeroes) => {
                let device = Block::new(self, file)?.placeholder();
                Ok(Box::new(device.map_err(BackendError::host("create a placeholder disk"))?))
            }
            other => Err(other.mismatch()),
        }
    }
}

impl Attach for RootFilesystem {
    fn open(&self) -> Result<Backend, BackendError> {
        Ok(self.backend(Block::open_file(&self.drive(), ForeignLock::Ignored)?))
    }

    fn open_placeholder(&self) -> Result<Backend, BackendError> {
        // The image has to be usable, but the guest gets an empty filesystem instead.
        self.open()?;
        let file =
            trial_root::file().map_err(BackendError::host("create the root filesystem of trial guests"))?;
        Ok(self.backend(file))
    }

    fn create(&self, backend: Backend, memory: GuestAddress) -> Result<Box<dyn Device>, BackendError> {
        let Some(window) = self.access.window() else { return self.drive().create(backend, memory) };
        let (file, contents) = match backend {
            Backend::Memory(file, contents) => (file, contents),
            other => return Err(other.mismatch()),
        };
        let device = Pmem::in_window(&self.path_on_host, file, window, memory)?;
        match contents {
            Contents::Shown => Ok(Box::new(device)),
            Contents::Zeroes => {
                let device = device.placeholder();
                Ok(Box::new(device.map_err(BackendError::host("create a placeholder root filesystem"))?))
            }
        }
    }
}

impl RootFilesystem {
    fn backend(&self, file: File) -> Backend {
        match self.access.window() {
            None => Backend::File(file, Contents::Shown),
            Some(_) => Backend::Memory(file, Contents::Shown),
        }
    }
}
