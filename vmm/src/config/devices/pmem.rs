//! Persistent memory devices.

use super::limits::RateLimiter;
use super::{Description, DeviceKind};
use crate::config::null::null_is_default;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// A persistent memory device.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Pmem {
    /// Name of the device.
    pub id: String,
    /// Path of the backing file. The length of a writable file must be a multiple of 2 MiB.
    pub path_on_host: PathBuf,
    /// Whether this is the root device, which adds `root=` to the kernel command line.
    #[serde(default, deserialize_with = "null_is_default")]
    pub root_device: bool,
    /// Whether the guest can only read.
    #[serde(default, deserialize_with = "null_is_default")]
    pub read_only: bool,
    /// Accepted and ignored: flushes are not limited.
    #[serde(default)]
    pub rate_limiter: Option<RateLimiter>,
}

impl DeviceKind for Pmem {
    fn describe(&self) -> Description<'_> {
        Description {
            name: &self.id,
            is_named: true,
            letter: 'm',
            is_private: false,
            is_root_device: self.root_device,
        }
    }
}
