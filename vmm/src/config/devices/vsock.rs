//! The socket device.

use super::{Description, DeviceKind};
use crate::config::ConfigError;
use serde::{Deserialize, Serialize};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

/// The socket device.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Vsock {
    /// The CID of the guest: 3 to 4294967294.
    pub guest_cid: u32,
    /// Path of the Unix socket at which programs of the host connect to ports of the guest: at most 96 bytes. A
    /// connection of the guest to port N of the host leads to the socket at this path with the suffix `_N`.
    pub uds_path: PathBuf,
    /// Accepted and ignored.
    #[serde(default)]
    pub vsock_id: Option<String>,
}

impl Vsock {
    /// Maximum length of the path in bytes: that of a Unix socket (`sun_path` in unix(7), without its NUL), minus that
    /// of the longest port suffix.
    const PATH_MAX: usize = 107 - "_4294967295".len();
}

impl DeviceKind for Vsock {
    fn describe(&self) -> Description<'_> {
        Description { name: "vsock", is_named: false, letter: 'v', is_private: true, is_root_device: false }
    }

    fn validate(&self, _: u64) -> Result<(), ConfigError> {
        if self.guest_cid < 3 || self.guest_cid == u32::MAX {
            return Err(ConfigError::GuestCid(self.guest_cid));
        }
        let length = self.uds_path.as_os_str().as_bytes().len();
        if length > Self::PATH_MAX {
            return Err(ConfigError::SocketPath { path: self.uds_path.clone(), length });
        }
        Ok(())
    }
}
