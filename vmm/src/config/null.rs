//! Fields of configuration files that accept null.

use serde::{Deserialize, Deserializer};

/// Deserializes null as the default value.
pub(super) fn null_is_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    // Formats for the exchange between processes contain every field.
    if deserializer.is_human_readable() {
        Option::deserialize(deserializer).map(Option::unwrap_or_default)
    } else {
        T::deserialize(deserializer)
    }
}
