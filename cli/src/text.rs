//! Text in lines of a limited width.

use serde::Serialize;

/// Maximum number of characters of a line.
pub(crate) const WIDTH: usize = 100;

/// Wraps text to lines of at most `width` characters, each indented. A command between backticks stays on one line, so
/// that it can be copied.
pub(crate) fn wrapped(text: &str, indent: usize, width: usize) -> String {
    let mut lines = format!("{:indent$}", "");
    let mut column = indent;
    for word in words(text) {
        let length = word.chars().count();
        if column > indent && column + 1 + length > width {
            lines += &format!("\n{:indent$}", "");
            column = indent;
        } else if column > indent {
            lines.push(' ');
            column += 1;
        }
        lines += word;
        column += length;
    }
    lines
}

/// Formats a structure of strings and numbers, which always serializes, as JSON.
pub(crate) fn json(value: &impl Serialize) -> String {
    serde_json::to_string_pretty(value).unwrap_or_default() + "\n"
}

/// Splits at spaces that are not between backticks.
pub(crate) fn words(text: &str) -> impl Iterator<Item = &str> {
    let mut quoted = false;
    text.split(move |c| {
        quoted ^= c == '`';
        c == ' ' && !quoted
    })
    .filter(|word| !word.is_empty())
}
