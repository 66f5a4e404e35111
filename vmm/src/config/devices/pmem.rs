//! Persistent memory devices.

use super::limits::RateLimiter;
use super::{DeviceKind, DeviceName};
use crate::config::ConfigError;
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
    fn name(&self) -> DeviceName<'_> {
        DeviceName::Chosen(&self.id)
    }

    fn letter(&self) -> char {
        'm'
    }

    fn is_private(&self) -> bool {
        false
    }

    fn is_root_device(&self) -> bool {
        self.root_device
    }

    fn validate(&self, _: u64) -> Result<(), ConfigError> {
        Ok(())
    }
}
