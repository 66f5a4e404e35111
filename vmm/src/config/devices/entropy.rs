//! The entropy device.

use super::limits::RateLimiter;
use super::{DeviceKind, DeviceName};
use crate::config::ConfigError;
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
    fn name(&self) -> DeviceName<'_> {
        DeviceName::Fixed("entropy")
    }

    fn letter(&self) -> char {
        'e'
    }

    fn is_private(&self) -> bool {
        true
    }

    fn validate(&self, _: u64) -> Result<(), ConfigError> {
        Ok(())
    }
}
