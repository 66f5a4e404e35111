//! Shared folders.

use super::{Description, DeviceKind};
use crate::config::ConfigError;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Maximum length of a tag in bytes (section 5.11.4 of the virtio specification).
const TAG_MAX: usize = 36;

/// A folder of the host that is shared with the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedFolder {
    /// The tag by which the guest mounts the folder: at most 36 bytes.
    pub tag: String,
    /// Path of the folder on the host.
    pub path: PathBuf,
    /// Whether the guest can only read.
    pub read_only: bool,
    /// The guest's user and group id of files that belong to this process's user and group.
    pub owner: (u32, u32),
}

impl DeviceKind for SharedFolder {
    fn describe(&self) -> Description<'_> {
        Description { name: &self.tag, is_named: true, letter: 'f', is_private: false, is_root_device: false }
    }

    fn validate(&self, _: u64) -> Result<(), ConfigError> {
        if self.tag.len() > TAG_MAX {
            return Err(ConfigError::DeviceId(self.tag.clone()));
        }
        Ok(())
    }
}
