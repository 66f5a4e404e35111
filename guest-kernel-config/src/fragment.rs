//! Fragments: parts of a kernel configuration for one purpose each, with a reason on each line.
//!
//! ```text
//! # Disks.
//! CONFIG_BLOCK=y              # The block layer.
//! CONFIG_VIRTIO_BLK=y         # The guest's disks.
//! ```
//!
//! The fragments in this crate must have a reason on every line, so that each symbol's cost in boot time stays
//! justified. A user's fragment may omit reasons, and may be an excerpt of a `.config`.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use thiserror::Error;

use crate::value::{Value, is_symbol_name, not_set_symbol};

/// Maximum size of a fragment: three times the largest `.config` of a distribution.
pub const MAX_FRAGMENT_BYTES: usize = 1 << 20;

/// Why a fragment was refused.
#[derive(Debug, Error)]
pub enum FragmentError {
    /// The file could not be read.
    #[error("{file}: cannot be read")]
    Read {
        /// The fragment's file.
        file: String,
        /// The error of the system.
        source: io::Error,
    },
    /// The file is larger than [`MAX_FRAGMENT_BYTES`].
    #[error("{file}: larger than {MAX_FRAGMENT_BYTES} bytes, not a configuration fragment")]
    TooBig {
        /// The fragment's file.
        file: String,
    },
    /// A NUL byte or bytes that are not UTF-8.
    #[error("{file}:{line}: not text: contains a NUL or invalid UTF-8")]
    NotText {
        /// The fragment's file.
        file: String,
        /// The line.
        line: usize,
    },
    /// A line that is not a setting, comment or blank line.
    #[error("{file}:{line}: expected CONFIG_NAME=value, not {text:?}")]
    NotASetting {
        /// The fragment's file.
        file: String,
        /// The line.
        line: usize,
        /// The beginning of the line.
        text: String,
    },
    /// A symbol name contains characters other than letters, digits and underscores.
    #[error("{file}:{line}: {symbol:?} is not a symbol name (letters, digits and underscores)")]
    BadSymbol {
        /// The fragment's file.
        file: String,
        /// The line.
        line: usize,
        /// The name.
        symbol: String,
    },
    /// An invalid value.
    #[error("{file}:{line}: CONFIG_{symbol} cannot be {value:?} (y, n, a number, 0x..., or a \"string\")")]
    BadValue {
        /// The fragment's file.
        file: String,
        /// The line.
        line: usize,
        /// The symbol.
        symbol: String,
        /// The beginning of the value.
        value: String,
    },
    /// A string without its closing quote.
    #[error("{file}:{line}: the string of CONFIG_{symbol} has no closing quote")]
    OpenQuote {
        /// The fragment's file.
        file: String,
        /// The line.
        line: usize,
        /// The symbol.
        symbol: String,
    },
    /// The value `m`.
    #[error("{file}:{line}: CONFIG_{symbol}=m: this kernel has no modules; write y")]
    Module {
        /// The fragment's file.
        file: String,
        /// The line.
        line: usize,
        /// The symbol.
        symbol: String,
    },
    /// A line of a shipped fragment without a reason.
    #[error("{file}:{line}: CONFIG_{symbol} has no reason; write CONFIG_{symbol}={value}  # why")]
    MissingReason {
        /// The fragment's file.
        file: String,
        /// The line.
        line: usize,
        /// The symbol.
        symbol: String,
        /// The requested value.
        value: Value,
    },
    /// A symbol that the fragment sets twice.
    #[error("{file}:{line}: CONFIG_{symbol} is already set on line {first}")]
    Duplicate {
        /// The fragment's file.
        file: String,
        /// The second line.
        line: usize,
        /// The symbol.
        symbol: String,
        /// The first line.
        first: usize,
    },
    /// No shipped fragment has this name.
    #[error("no such fragment: {name:?} (available: {known})")]
    Unknown {
        /// The name.
        name: String,
        /// The names of the shipped fragments.
        known: String,
    },
}

/// Origin of a fragment, which determines whether it must have reasons, and which fragments it overrides: later
/// variants override earlier ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    /// Part of this crate and of every kernel: each line has a reason, and fragments must not conflict.
    Default,
    /// Part of this crate, for kernels that request it. As above, but overrides default fragments.
    Optional,
    /// From a user: reasons are optional, and it overrides shipped fragments.
    User,
}

impl Origin {
    /// All origins, in the order in which they override each other.
    pub const ALL: [Self; 3] = [Self::Default, Self::Optional, Self::User];
}

/// One line of a fragment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    /// The symbol, without `CONFIG_`.
    pub symbol: String,
    /// The requested value; never [`Value::Module`].
    pub value: Value,
    /// The reason, which a user's fragment may omit.
    pub reason: Option<String>,
    /// The line, counted from 1.
    pub line: usize,
}

/// A parsed fragment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fragment {
    /// The name of a shipped fragment, or the path of a user's.
    pub name: String,
    /// Origin of the fragment.
    pub origin: Origin,
    /// The comment at the beginning, without `#`: the purpose of the fragment.
    pub header: String,
    /// The settings, in the order of the file.
    pub symbols: Vec<Setting>,
}

impl Fragment {
    /// Parses the bytes of a fragment.
    ///
    /// # Errors
    ///
    /// The first invalid line.
    pub fn parse(name: &str, bytes: &[u8], origin: Origin) -> Result<Self, FragmentError> {
        let mut fragment = Self { name: name.to_owned(), origin, header: String::new(), symbols: Vec::new() };
        let file = fragment.file();
        if bytes.len() > MAX_FRAGMENT_BYTES {
            return Err(FragmentError::TooBig { file });
        }
        let text = text_of(bytes).map_err(|line| FragmentError::NotText { file: file.clone(), line })?;

        let mut first_lines = HashMap::new();
        for (index, line) in text.lines().enumerate() {
            let line_parser = LineParser { file: &file, line: index + 1 };
            let Some(setting) = line_parser.parse(line.trim())? else {
                if fragment.symbols.is_empty() {
                    fragment.add_to_header(line);
                }
                continue;
            };
            line_parser.check(&setting, origin)?;
            if let Some(first) = first_lines.insert(setting.symbol.clone(), setting.line) {
                let Setting { symbol, line, .. } = setting;
                return Err(FragmentError::Duplicate { file, line, symbol, first });
            }
            fragment.symbols.push(setting);
        }
        Ok(fragment)
    }

    /// Reads a user's fragment from a file; its name is the path.
    ///
    /// # Errors
    ///
    /// As [`Fragment::parse`], and when the file cannot be read.
    pub fn read(path: &Path) -> Result<Self, FragmentError> {
        let name = path.display().to_string();
        let mut bytes = Vec::new();
        // One byte more than the limit, so that `parse` detects files over the limit.
        let limit = MAX_FRAGMENT_BYTES as u64 + 1;
        File::open(path)
            .and_then(|file| file.take(limit).read_to_end(&mut bytes))
            .map_err(|source| FragmentError::Read { file: name.clone(), source })?;
        Self::parse(&name, &bytes, Origin::User)
    }

    /// File name for messages: `base.config`, or the path of a user's fragment.
    #[must_use]
    pub fn file(&self) -> String {
        match self.origin {
            Origin::Default | Origin::Optional => format!("{}.config", self.name),
            Origin::User => self.name.clone(),
        }
    }

    fn add_to_header(&mut self, line: &str) {
        let Some(comment) = line.trim().strip_prefix('#') else { return };
        if !self.header.is_empty() {
            self.header.push('\n');
        }
        self.header.push_str(comment.trim());
    }
}

/// Decodes the bytes as text. The error is the number of the first line that is not text.
fn text_of(bytes: &[u8]) -> Result<&str, usize> {
    let line_at = |offset: usize| 1 + bytes[..offset].iter().filter(|&&b| b == b'\n').count();
    if let Some(offset) = bytes.iter().position(|&b| b == 0) {
        return Err(line_at(offset));
    }
    std::str::from_utf8(bytes).map_err(|error| line_at(error.valid_up_to()))
}

/// Parser of one line, with its location for errors.
struct LineParser<'a> {
    file: &'a str,
    line: usize,
}

impl LineParser<'_> {
    /// Parses the setting on this line. Returns `None` for a comment or a blank line.
    fn parse(&self, text: &str) -> Result<Option<Setting>, FragmentError> {
        if let Some(symbol) = not_set_symbol(text) {
            return self.setting(symbol, Value::No, "").map(Some);
        }
        if text.is_empty() || text.starts_with('#') {
            return Ok(None);
        }
        let Some((symbol, rest)) = text.strip_prefix("CONFIG_").and_then(|t| t.split_once('=')) else {
            return Err(FragmentError::NotASetting {
                file: self.file.to_owned(),
                line: self.line,
                text: excerpt(text),
            });
        };
        let Some(end) = value_length(rest) else {
            return Err(FragmentError::OpenQuote {
                file: self.file.to_owned(),
                line: self.line,
                symbol: excerpt(symbol),
            });
        };
        let (value, rest) = rest.split_at(end);
        let comment = rest.trim_start();
        // Only a comment may follow a value, separated by white space.
        let separated = rest.is_empty() || (rest != comment && comment.starts_with('#'));
        match Value::parse(value).filter(|_| separated) {
            Some(value) => self.setting(symbol, value, comment).map(Some),
            None => Err(FragmentError::BadValue {
                file: self.file.to_owned(),
                line: self.line,
                symbol: excerpt(symbol),
                value: excerpt(&format!("{value}{rest}")),
            }),
        }
    }

    fn setting(&self, symbol: &str, value: Value, comment: &str) -> Result<Setting, FragmentError> {
        if !is_symbol_name(symbol) {
            return Err(FragmentError::BadSymbol {
                file: self.file.to_owned(),
                line: self.line,
                symbol: excerpt(symbol),
            });
        }
        let reason = comment.trim_start_matches('#').trim();
        Ok(Setting {
            symbol: symbol.to_owned(),
            value,
            reason: (!reason.is_empty()).then(|| reason.to_owned()),
            line: self.line,
        })
    }

    /// Checks rules beyond the syntax.
    fn check(&self, setting: &Setting, origin: Origin) -> Result<(), FragmentError> {
        let (file, line) = (self.file.to_owned(), self.line);
        let symbol = setting.symbol.clone();
        if setting.value == Value::Module {
            return Err(FragmentError::Module { file, line, symbol });
        }
        if origin != Origin::User && setting.reason.is_none() {
            let value = setting.value.clone();
            return Err(FragmentError::MissingReason { file, line, symbol, value });
        }
        Ok(())
    }
}

/// Length of the value at the start of `text`. Returns `None` if the closing quote is missing.
fn value_length(text: &str) -> Option<usize> {
    if !text.starts_with('"') {
        return Some(text.find(char::is_whitespace).unwrap_or(text.len()));
    }
    let mut escaped = false;
    for (index, byte) in text.bytes().enumerate().skip(1) {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => return Some(index + 1),
            _ => {}
        }
    }
    None
}

/// Truncates a text of any length for a message.
pub(crate) fn excerpt(text: &str) -> String {
    const MAX_CHARS: usize = 60;
    match text.char_indices().nth(MAX_CHARS) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shipped(text: &str) -> Result<Fragment, FragmentError> {
        Fragment::parse("test", text.as_bytes(), Origin::Default)
    }

    fn user(text: &str) -> Result<Fragment, FragmentError> {
        Fragment::parse("my.config", text.as_bytes(), Origin::User)
    }

    #[test]
    fn a_shipped_fragment() {
        let fragment = shipped(concat!(
            "# Disks,\n# and more.\n",
            "CONFIG_BLOCK=y      # The block layer.\n",
            "\n# Between.\n",
            "CONFIG_NAME=\"a # b\" # A hash in a string is no comment.\r\n",
        ))
        .unwrap();
        assert_eq!(fragment.header, "Disks,\nand more.");
        assert_eq!(fragment.file(), "test.config");
        let expected = [
            ("BLOCK", Value::Yes, "The block layer.", 3),
            ("NAME", Value::Text("a # b".into()), "A hash in a string is no comment.", 6),
        ]
        .map(|(symbol, value, reason, line)| Setting {
            symbol: symbol.into(),
            value,
            reason: Some(reason.into()),
            line,
        });
        assert_eq!(fragment.symbols, expected);
    }

    #[test]
    fn a_users_fragment_may_be_an_excerpt_of_a_config() {
        let fragment = user("CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=0x10\n").unwrap();
        let read: Vec<_> =
            fragment.symbols.iter().map(|s| (s.symbol.as_str(), &s.value, &s.reason)).collect();
        assert_eq!(
            read,
            [("A", &Value::Yes, &None), ("B", &Value::No, &None), ("C", &Value::Hex(16), &None)]
        );
        assert_eq!(fragment.file(), "my.config");
    }

    #[test]
    fn errors_name_file_line_and_reason() {
        let cases = [
            ("\nCONFIG_A=y\n", "test.config:2: CONFIG_A has no reason; write CONFIG_A=y  # why"),
            ("CONFIG_A=y #  \n", "test.config:1: CONFIG_A has no reason; write CONFIG_A=y  # why"),
            ("# CONFIG_A is not set\n", "test.config:1: CONFIG_A has no reason; write CONFIG_A=n  # why"),
            ("CONFIG_A=y # a\nCONFIG_A=y # b\n", "test.config:2: CONFIG_A is already set on line 1"),
            (
                "CONFIG_A-B=y # a\n",
                "test.config:1: \"A-B\" is not a symbol name (letters, digits and underscores)",
            ),
            ("CONFIG_=y # a\n", "test.config:1: \"\" is not a symbol name (letters, digits and underscores)"),
            (
                "# CONFIG_A B is not set\n",
                "test.config:1: \"A B\" is not a symbol name (letters, digits and underscores)",
            ),
            (
                "CONFIG_A=yes # a\n",
                "test.config:1: CONFIG_A cannot be \"yes # a\" \
                 (y, n, a number, 0x..., or a \"string\")",
            ),
            (
                "CONFIG_A=y# a\n",
                "test.config:1: CONFIG_A cannot be \"y# a\" \
                 (y, n, a number, 0x..., or a \"string\")",
            ),
            (
                "CONFIG_A=\"b\"c # a\n",
                "test.config:1: CONFIG_A cannot be \"\\\"b\\\"c # a\" \
                 (y, n, a number, 0x..., or a \"string\")",
            ),
            (
                "CONFIG_A= # a\n",
                "test.config:1: CONFIG_A cannot be \" # a\" \
                 (y, n, a number, 0x..., or a \"string\")",
            ),
            ("CONFIG_A=\"b # a\n", "test.config:1: the string of CONFIG_A has no closing quote"),
            ("CONFIG_A=m # a\n", "test.config:1: CONFIG_A=m: this kernel has no modules; write y"),
            ("BLOCK=y # a\n", "test.config:1: expected CONFIG_NAME=value, not \"BLOCK=y # a\""),
            ("CONFIG_A # a\n", "test.config:1: expected CONFIG_NAME=value, not \"CONFIG_A # a\""),
            ("\n# \0\n", "test.config:2: not text: contains a NUL or invalid UTF-8"),
        ];
        for (text, message) in cases {
            assert_eq!(shipped(text).unwrap_err().to_string(), message, "{text:?}");
        }
    }

    #[test]
    fn bytes_that_are_not_text_and_files_that_are_too_big() {
        let bytes = b"# one\n# two\n# \xff\n";
        let error = Fragment::parse("x", bytes, Origin::User).unwrap_err();
        assert!(matches!(error, FragmentError::NotText { line: 3, .. }), "{error}");

        let big = vec![b'#'; MAX_FRAGMENT_BYTES];
        assert!(Fragment::parse("x", &big, Origin::User).is_ok());
        let error = Fragment::parse("x", &[&big[..], b"#"].concat(), Origin::User).unwrap_err();
        assert!(matches!(error, FragmentError::TooBig { .. }), "{error}");
    }

    #[test]
    fn long_lines_are_cut_in_messages() {
        let message = user(&"é".repeat(1000)).unwrap_err().to_string();
        assert!(message.len() < 250, "{message}");
    }

    #[test]
    fn a_file_is_a_users_fragment() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fragments/block.config");
        let fragment = Fragment::read(&path).unwrap();
        assert_eq!((fragment.origin, fragment.file()), (Origin::User, path.display().to_string()));
        assert_eq!(fragment.symbols[0].symbol, "BLOCK");
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = Fragment::read(Path::new("/nonexistent/my.config")).unwrap_err();
        assert_eq!(error.to_string(), "/nonexistent/my.config: cannot be read");
    }
}
