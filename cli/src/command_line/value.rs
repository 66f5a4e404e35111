//! Values of options and arguments.

use std::ffi::OsString;
use std::path::PathBuf;

/// A value that a word of the command line is parsed as.
pub(crate) trait Value: Sized {
    /// Parses a word. The error tells what is expected.
    fn parse(word: OsString) -> Result<Self, String>;
}

impl Value for OsString {
    fn parse(word: OsString) -> Result<Self, String> {
        Ok(word)
    }
}

impl Value for PathBuf {
    fn parse(word: OsString) -> Result<Self, String> {
        if word.is_empty() { Err("a path is not empty".to_owned()) } else { Ok(word.into()) }
    }
}

impl Value for String {
    fn parse(word: OsString) -> Result<Self, String> {
        word.into_string().map_err(|_| "expected text in UTF-8".to_owned())
    }
}

impl Value for u64 {
    fn parse(word: OsString) -> Result<Self, String> {
        // Rust accepts a plus sign, which other programs of this kind do not.
        let text = word.to_str().filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
        text.and_then(|text| text.parse().ok())
            .ok_or_else(|| format!("expected a number from 0 to {}", Self::MAX))
    }
}

/// A place for the value of an option or argument.
pub(crate) trait Store {
    /// Stores a value. The error tells what is expected.
    fn store(&mut self, word: OsString) -> Result<(), String>;
}

impl<V: Value> Store for V {
    fn store(&mut self, word: OsString) -> Result<(), String> {
        *self = V::parse(word)?;
        Ok(())
    }
}

impl<V: Value> Store for Option<V> {
    fn store(&mut self, word: OsString) -> Result<(), String> {
        *self = Some(V::parse(word)?);
        Ok(())
    }
}

impl<V: Value> Store for Vec<V> {
    fn store(&mut self, word: OsString) -> Result<(), String> {
        self.push(V::parse(word)?);
        Ok(())
    }
}

/// Stores a value that a function parses.
pub(crate) fn store_as<V, E: ToString>(
    place: &mut V,
    word: OsString,
    parse: impl FnOnce(&str) -> Result<V, E>,
) -> Result<(), String> {
    *place = parse(&String::parse(word)?).map_err(|error| error.to_string())?;
    Ok(())
}

/// A number within a range.
pub(crate) fn in_range(range: std::ops::RangeInclusive<u64>) -> impl FnOnce(&str) -> Result<u64, String> {
    move |text| {
        let number = u64::parse(text.into()).ok().filter(|number| range.contains(number));
        number.ok_or_else(|| format!("expected a number from {} to {}", range.start(), range.end()))
    }
}
