//! Platforms of images, and whether this machine can run them, by the rules of containerd.

use serde::Deserialize;
use std::fmt::{self, Display, Formatter};

/// The platform of an image. Missing fields stand for this machine's values.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub(crate) struct Platform {
    #[serde(default)]
    pub(crate) architecture: Option<String>,
    #[serde(default)]
    pub(crate) os: Option<String>,
    /// The microarchitecture level on amd64: v1 to v4.
    #[serde(default)]
    pub(crate) variant: Option<String>,
}

impl Platform {
    fn os(&self) -> String {
        non_empty_or(self.os.as_deref(), "linux")
    }

    fn architecture(&self) -> String {
        match non_empty_or(self.architecture.as_deref(), "amd64") {
            name if matches!(&*name, "x86_64" | "x86-64") => "amd64".to_owned(),
            name => name,
        }
    }

    /// Whether it is the platform `unknown/unknown`, which buildx gives to attestations.
    pub(crate) fn is_unknown(&self) -> bool {
        self.os() == "unknown" || self.architecture() == "unknown"
    }

    /// The microarchitecture level that it needs, if it is for Linux on amd64 and this machine has that level.
    pub(crate) fn level(&self) -> Option<u8> {
        self.level_on(processor_level())
    }

    fn level_on(&self, processor: u8) -> Option<u8> {
        if (&*self.os(), &*self.architecture()) != ("linux", "amd64") {
            return None;
        }
        let variant = non_empty_or(self.variant.as_deref(), "v1");
        let level = variant.strip_prefix('v').unwrap_or(&variant).parse().ok()?;
        (1..=processor).contains(&level).then_some(level)
    }
}

impl Display for Platform {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}", self.os(), self.architecture())?;
        match self.variant.as_deref().filter(|variant| !variant.is_empty()) {
            Some(variant) => write!(formatter, "/{variant}"),
            None => Ok(()),
        }
    }
}

/// A field in lower case, or the default if it is missing or empty.
fn non_empty_or(text: Option<&str>, default: &str) -> String {
    text.filter(|text| !text.is_empty()).unwrap_or(default).to_lowercase()
}

/// The microarchitecture level of this processor, of the four that the x86-64 psABI defines.
fn processor_level() -> u8 {
    macro_rules! has {
        ($($feature:tt),*) => { $(std::arch::is_x86_feature_detected!($feature))&&* };
    }
    let v2 = has!("cmpxchg16b", "popcnt", "sse3", "ssse3", "sse4.1", "sse4.2");
    let v3 = v2 && has!("avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "lzcnt", "movbe", "xsave");
    let v4 = v3 && has!("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl");
    1 + u8::from(v2) + u8::from(v3) + u8::from(v4)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn platform(os: Option<&str>, architecture: Option<&str>, variant: Option<&str>) -> Platform {
        let own = |text: Option<&str>| text.map(str::to_owned);
        Platform { architecture: own(architecture), os: own(os), variant: own(variant) }
    }

    #[test]
    fn missing_fields_of_a_platform_are_this_machines() {
        let level = |os, architecture, variant| platform(os, architecture, variant).level_on(3);
        for (os, architecture) in [
            (Some("linux"), Some("amd64")),
            (Some("Linux"), Some("x86_64")),
            (Some("LINUX"), Some("X86-64")),
            (Some(""), Some("")),
            (None, Some("AMD64")),
            (Some("linux"), None),
            (None, None),
        ] {
            assert_eq!(level(os, architecture, None), Some(1), "{os:?} {architecture:?}");
        }
        for (os, architecture) in
            [("windows", "amd64"), ("linux", "arm64"), ("linux", "386"), ("unknown", "unknown")]
        {
            assert_eq!(level(Some(os), Some(architecture), None), None);
        }
    }

    #[test]
    fn a_variant_needs_a_processor_of_its_level() {
        let level = |variant| platform(None, None, Some(variant)).level_on(3);
        for (variant, expected) in [
            ("", Some(1)),
            ("v1", Some(1)),
            ("1", Some(1)),
            ("V2", Some(2)),
            ("v3", Some(3)),
            ("v4", None),
            ("v0", None),
            ("v8", None),
            ("baseline", None),
        ] {
            assert_eq!(level(variant), expected, "{variant}");
        }
        assert!((1..=4).contains(&processor_level()));
        assert_eq!(platform(Some("Linux"), Some("x86_64"), Some("v4")).to_string(), "linux/amd64/v4");
    }
}
