//! A complete `.config`, as `make olddefconfig` writes it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use thiserror::Error;

use crate::fragment::excerpt;
use crate::value::{Value, bare, is_symbol_name, not_set_symbol};

/// Maximum size of a `.config`; a distribution's has 300 KiB.
pub const MAX_CONFIG_BYTES: usize = 4 << 20;

/// Why a `.config` was refused.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("{file}: cannot be read")]
    Read {
        /// The file.
        file: String,
        /// The error of the system.
        source: io::Error,
    },
    /// The file is larger than [`MAX_CONFIG_BYTES`].
    #[error("{file}: larger than {MAX_CONFIG_BYTES} bytes, not a .config")]
    TooBig {
        /// The file.
        file: String,
    },
    /// A line that is not valid in a `.config`.
    #[error("{file}:{line}: expected CONFIG_NAME=value, not {text:?}")]
    BadLine {
        /// The file.
        file: String,
        /// Number of the line.
        line: usize,
        /// The beginning of the line.
        text: String,
    },
}

/// The values of all symbols that a `.config` sets.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KernelConfig {
    /// Only symbols that are not `n`: a kernel build treats absent symbols as `n`.
    values: BTreeMap<String, Value>,
}

impl KernelConfig {
    /// Parses a `.config`. If a symbol occurs twice, the last line counts, as in the kernel's parser.
    ///
    /// # Errors
    ///
    /// The first line that is neither a comment nor a setting.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        Self::parse_file(".config", text)
    }

    fn parse_file(file: &str, text: &str) -> Result<Self, ConfigError> {
        if text.len() > MAX_CONFIG_BYTES {
            return Err(ConfigError::TooBig { file: file.to_owned() });
        }
        let mut config = Self::default();
        for (index, line) in text.lines().enumerate() {
            let line = line.trim();
            if let Some(symbol) = not_set_symbol(line) {
                config.values.remove(symbol);
            } else if !line.is_empty() && !line.starts_with('#') {
                let (symbol, value) = parse_setting(line).ok_or_else(|| ConfigError::BadLine {
                    file: file.to_owned(),
                    line: index + 1,
                    text: excerpt(line),
                })?;
                config.set(symbol, value);
            }
        }
        Ok(config)
    }

    /// Reads a `.config` from a file.
    ///
    /// # Errors
    ///
    /// As [`KernelConfig::parse`], and when the file cannot be read or is not UTF-8.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let name = path.display().to_string();
        let mut text = String::new();
        // One byte more than the limit, so that `parse` detects files over the limit.
        File::open(path)
            .and_then(|file| file.take(MAX_CONFIG_BYTES as u64 + 1).read_to_string(&mut text))
            .map_err(|source| ConfigError::Read { file: name.clone(), source })?;
        Self::parse_file(&name, &text)
    }

    /// The value of a symbol (with or without `CONFIG_`); [`Value::No`] if it is not set.
    #[must_use]
    pub fn value(&self, symbol: &str) -> &Value {
        self.values.get(bare(symbol)).unwrap_or(&Value::No)
    }

    /// The symbols that are set, sorted, with their values.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.values.iter().map(|(symbol, value)| (symbol.as_str(), value))
    }

    fn set(&mut self, symbol: &str, value: Value) {
        if value.is_set() {
            self.values.insert(symbol.to_owned(), value);
        } else {
            self.values.remove(symbol);
        }
    }
}

fn parse_setting(line: &str) -> Option<(&str, Value)> {
    let (symbol, value) = line.strip_prefix("CONFIG_")?.split_once('=')?;
    // The kernel writes a hexadecimal default as in its Kconfig file, which may omit the 0x.
    let value = Value::parse(value).or_else(|| Value::parse(&format!("0x{value}")))?;
    is_symbol_name(symbol).then_some((symbol, value))
}

/// A symbol whose value differs between two configurations.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// The symbol, without `CONFIG_`.
    pub symbol: String,
    /// Its value in the first configuration.
    pub before: Value,
    /// Its value in the second.
    pub after: Value,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CONFIG_{}: {} -> {}", self.symbol, self.before, self.after)
    }
}

/// The symbols that differ between two configurations, sorted.
#[must_use]
pub fn diff(before: &KernelConfig, after: &KernelConfig) -> Vec<Difference> {
    let symbols: BTreeSet<&String> = before.values.keys().chain(after.values.keys()).collect();
    symbols
        .into_iter()
        .filter(|symbol| before.value(symbol) != after.value(symbol))
        .map(|symbol| Difference {
            symbol: symbol.clone(),
            before: before.value(symbol).clone(),
            after: after.value(symbol).clone(),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
#
# Linux/x86 6.12 Kernel Configuration
#
CONFIG_CC_VERSION_TEXT=\"gcc (Debian 12.2.0) 12.2.0\"
CONFIG_64BIT=y
# CONFIG_NET is not set
CONFIG_NR_CPUS=16
CONFIG_PHYSICAL_START=0x1000000
CONFIG_RADIO_GEMTEK_PORT=34c
";

    #[test]
    fn values_are_looked_up_with_or_without_the_prefix() {
        let config = KernelConfig::parse(TEXT).unwrap();
        assert_eq!(config.value("64BIT"), &Value::Yes);
        assert_eq!(config.value("CONFIG_NR_CPUS"), &Value::Number(16));
        assert_eq!(config.value("PHYSICAL_START"), &Value::Hex(0x100_0000));
        assert_eq!(config.value("RADIO_GEMTEK_PORT"), &Value::Hex(0x34c));
        assert_eq!(config.value("NET"), &Value::No);
        assert_eq!(config.value("UNKNOWN"), &Value::No);
        assert_eq!(config.iter().count(), 5);
    }

    #[test]
    fn the_last_line_counts() {
        let config = KernelConfig::parse("CONFIG_A=y\nCONFIG_B=y\n# CONFIG_A is not set\nCONFIG_B=n\n");
        assert_eq!(config.unwrap(), KernelConfig::default());
    }

    #[test]
    fn errors_name_invalid_lines() {
        for line in ["CONFIG_A", "CONFIG_A=", "CONFIG_A=yes", "A=y", "CONFIG_A B=y", "CONFIG_A=\"x"] {
            let error = KernelConfig::parse(&format!("CONFIG_OK=y\n{line}\n")).unwrap_err();
            assert_eq!(error.to_string(), format!(".config:2: expected CONFIG_NAME=value, not {line:?}"));
        }
        let big = "#".repeat(MAX_CONFIG_BYTES + 1);
        assert!(matches!(KernelConfig::parse(&big), Err(ConfigError::TooBig { .. })));
    }

    #[test]
    fn errors_name_files() {
        let error = KernelConfig::read(Path::new("/nonexistent/.config")).unwrap_err();
        assert_eq!(error.to_string(), "/nonexistent/.config: cannot be read");
        // A fragment is not a .config, because its lines have comments after the values.
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fragments/block.config");
        let message = KernelConfig::read(&path).unwrap_err().to_string();
        assert!(message.starts_with(&format!("{}:2: expected", path.display())), "{message}");
    }

    #[test]
    fn differences_are_sorted_and_absent_symbols_are_n() {
        let before = KernelConfig::parse("CONFIG_C=y\nCONFIG_A=1\nCONFIG_SAME=y\n").unwrap();
        let after = KernelConfig::parse("CONFIG_B=m\nCONFIG_A=2\n# CONFIG_D is not set\nCONFIG_SAME=y\n");
        let lines: Vec<_> = diff(&before, &after.unwrap()).iter().map(ToString::to_string).collect();
        assert_eq!(lines, ["CONFIG_A: 1 -> 2", "CONFIG_B: n -> m", "CONFIG_C: y -> n"]);
    }
}
