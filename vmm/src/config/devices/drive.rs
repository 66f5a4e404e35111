//! Block devices.

use super::limits::RateLimiter;
use super::{Description, DeviceKind};
use crate::config::ConfigError;
use crate::config::null::null_is_default;
use crate::layout::MIB;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// A block device.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Drive {
    /// Name of the drive. The guest reads its first 20 bytes as the serial number.
    pub drive_id: String,
    /// Path of the backing file: a raw image, or a block device.
    #[serde(default, deserialize_with = "null_is_default")]
    pub path_on_host: PathBuf,
    /// Whether this is the root device, which adds `root=` to the kernel command line.
    #[serde(default, deserialize_with = "null_is_default")]
    pub is_root_device: bool,
    /// Whether the guest can only read.
    #[serde(default, deserialize_with = "null_is_default")]
    pub is_read_only: bool,
    /// UUID of the partition that is the root filesystem.
    #[serde(default)]
    pub partuuid: Option<String>,
    /// Whether flushes of the guest make writes durable on the host.
    #[serde(default, deserialize_with = "null_is_default")]
    pub cache_type: CacheType,
    /// Accepted and ignored: requests are served inline if they do not block, and otherwise by io_uring if the host
    /// allows it.
    #[serde(default)]
    pub io_engine: Option<IoEngine>,
    /// Limits of bytes and requests per time; no limit by default.
    #[serde(default)]
    pub rate_limiter: Option<RateLimiter>,
    /// Whether to bypass the host's page cache (`O_DIRECT`).
    #[serde(default, deserialize_with = "null_is_default")]
    pub direct: bool,
    /// Path of the socket of a vhost-user backend, which is not supported.
    #[serde(default)]
    pub socket: Option<PathBuf>,
}

impl Drive {
    /// A writable drive with default values.
    #[must_use]
    pub fn new(drive_id: impl Into<String>, path_on_host: impl Into<PathBuf>) -> Self {
        Self {
            drive_id: drive_id.into(),
            path_on_host: path_on_host.into(),
            is_root_device: false,
            is_read_only: false,
            partuuid: None,
            cache_type: CacheType::default(),
            io_engine: None,
            rate_limiter: None,
            direct: false,
            socket: None,
        }
    }
}

impl DeviceKind for Drive {
    fn describe(&self) -> Description<'_> {
        Description {
            name: &self.drive_id,
            is_named: true,
            letter: if self.is_read_only { 'r' } else { 'd' },
            is_private: false,
            is_root_device: self.is_root_device,
        }
    }

    fn validate(&self, _: u64) -> Result<(), ConfigError> {
        if let Some(socket) = &self.socket {
            return Err(ConfigError::Unsupported {
                field: "drives.socket",
                value: socket.display().to_string(),
                supported: "null, and set path_on_host",
            });
        }
        if self.path_on_host.as_os_str().is_empty() {
            return Err(ConfigError::NoDrivePath(self.drive_id.clone()));
        }
        Ok(())
    }
}

/// The root filesystem of an image.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[non_exhaustive]
pub struct RootFilesystem {
    /// Path of the filesystem's file.
    pub path_on_host: PathBuf,
    /// Limits of bytes and requests per time; no limit by default.
    #[serde(default)]
    pub rate_limiter: Option<RateLimiter>,
    /// How the guest accesses the filesystem.
    #[serde(default)]
    pub access: RootAccess,
}

/// How a guest accesses the root filesystem of its image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub enum RootAccess {
    /// As a disk (virtio block): the guest's kernel copies what it reads into its page cache.
    #[default]
    Disk,
    /// As memory (virtio pmem) in a window of 64 MiB: the guest's programs use the pages of the host's page cache (DAX).
    SmallWindow,
    /// The same, of 512 MiB.
    LargeWindow,
}

impl RootAccess {
    /// Size of the window in bytes. The guest's kernel has page structures for it, a 64th of its size.
    #[must_use]
    pub const fn window(self) -> Option<u64> {
        match self {
            Self::Disk => None,
            Self::SmallWindow => Some(64 * MIB),
            Self::LargeWindow => Some(512 * MIB),
        }
    }

    /// The access for a file of this length, in a guest with this memory, in bytes: the smallest window that has room for it, if
    /// the page structures of the window are small beside the guest's memory.
    #[must_use]
    pub fn for_file(length: u64, memory: u64) -> Self {
        let fits = |access: &Self| access.window().is_some_and(|window| length <= window && window <= memory);
        [Self::SmallWindow, Self::LargeWindow].into_iter().find(fits).unwrap_or_default()
    }
}

impl RootFilesystem {
    /// The root filesystem in this file.
    #[must_use]
    pub fn new(path_on_host: impl Into<PathBuf>) -> Self {
        Self { path_on_host: path_on_host.into(), rate_limiter: None, access: RootAccess::Disk }
    }

    /// The drive that the guest sees with [`RootAccess::Disk`].
    pub(crate) fn drive(&self) -> Drive {
        let rate_limiter = self.rate_limiter;
        Drive { is_read_only: true, rate_limiter, ..Drive::new("root", &self.path_on_host) }
    }
}

impl DeviceKind for RootFilesystem {
    fn describe(&self) -> Description<'_> {
        let letter = match self.access {
            RootAccess::Disk => 'r',
            RootAccess::SmallWindow => 'x',
            RootAccess::LargeWindow => 'y',
        };
        Description { name: "root", is_named: false, letter, is_private: true, is_root_device: false }
    }
}

/// The effect of a flush of the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub enum CacheType {
    /// Completed writes are durable on the host's disk.
    #[default]
    Writeback,
    /// None: a crash of the host can lose writes that the guest has flushed.
    Unsafe,
}

/// Firecracker's I/O engines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub enum IoEngine {
    /// Blocking system calls.
    Sync,
    /// io_uring.
    Async,
}
