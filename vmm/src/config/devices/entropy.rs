//! The entropy device.

use super::limits::RateLimiter;
use super::{Description, DeviceKind};
use serde::{Deserialize, Serialize};

/// The entropy device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
#[non_exhaustive]
pub struct Entropy {
    /// Limits of bytes and requests per time; no limit by default.
    pub rate_limiter: Option<RateLimiter>,
}

impl DeviceKind for Entropy {
    fn describe(&self) -> Description<'_> {
        Description { name: "entropy", is_named: false, letter: 'e', is_private: true, is_root_device: false }
    }
}
