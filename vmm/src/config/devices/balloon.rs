//! The memory balloon device.

use super::{Description, DeviceKind};
use crate::config::ConfigError;
use crate::config::null::null_is_default;
use serde::{Deserialize, Serialize};

/// The memory balloon device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Balloon {
    /// Initial target size in MiB, less than the guest's memory.
    #[serde(deserialize_with = "null_is_default")]
    pub amount_mib: u64,
    /// Whether the guest may deflate the balloon when it runs out of memory.
    #[serde(deserialize_with = "null_is_default")]
    pub deflate_on_oom: bool,
    /// Interval of the guest's memory statistics in seconds; 0 disables them.
    #[serde(deserialize_with = "null_is_default")]
    pub stats_polling_interval_s: u16,
    /// Whether the guest reports free pages, which are then returned to the host.
    #[serde(deserialize_with = "null_is_default")]
    pub free_page_reporting: bool,
    /// Accepted and ignored: free page hinting serves live migration.
    #[serde(deserialize_with = "null_is_default")]
    pub free_page_hinting: bool,
}

impl DeviceKind for Balloon {
    fn describe(&self) -> Description<'_> {
        Description { name: "balloon", is_named: false, letter: 'b', is_private: true, is_root_device: false }
    }

    fn validate(&self, memory: u64) -> Result<(), ConfigError> {
        if self.amount_mib >= memory {
            return Err(ConfigError::BalloonTooLarge { asked: self.amount_mib, memory });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Devices;

    #[test]
    fn invalid_balloons_are_refused() {
        let check = |balloon| {
            let devices = Devices { balloon: Some(balloon), ..Devices::default() };
            devices.validate(128).map_err(|error| error.to_string())
        };
        assert_eq!(check(Balloon { amount_mib: 127, ..Balloon::default() }), Ok(()));
        for (balloon, expected) in [
            (Balloon { amount_mib: 128, ..Balloon::default() }, "a balloon of 128 MiB is too large"),
            (Balloon { amount_mib: u64::MAX, ..Balloon::default() }, "is too large for a guest of 128 MiB"),
        ] {
            let message = check(balloon).unwrap_err();
            assert!(message.contains(expected), "{message:?} should say {expected:?}");
        }
    }
}
