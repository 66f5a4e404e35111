//! Values of configuration symbols, in the syntax of `.config` files.

use std::fmt;

/// The value of a symbol.
///
/// A symbol that is absent from a `.config` is `n`, so that [`Value::No`] also stands for an absent symbol.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// Disabled: `n`, or `# CONFIG_X is not set`.
    No,
    /// Built as a module: `m`.
    Module,
    /// Built in: `y`.
    Yes,
    /// A decimal number.
    Number(i64),
    /// A hexadecimal number, written with `0x`.
    Hex(u64),
    /// A string, without quotes and escapes.
    Text(String),
}

impl Value {
    /// Parses the text after the `=`. Returns `None` if it is not a value.
    ///
    /// The rules are the kernel's own: no leading zeros in decimal numbers, and no control
    /// characters or unescaped quotes in strings.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "y" => return Some(Self::Yes),
            "m" => return Some(Self::Module),
            "n" => return Some(Self::No),
            _ => {}
        }
        if let Some(quoted) = text.strip_prefix('"') {
            return unquote(quoted.strip_suffix('"')?).map(Self::Text);
        }
        if let Some(digits) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
            // from_str_radix would accept a sign.
            let plain = digits.bytes().all(|b| b.is_ascii_hexdigit());
            return u64::from_str_radix(digits, 16).ok().filter(|_| plain).map(Self::Hex);
        }
        let digits = text.strip_prefix('-').unwrap_or(text);
        let plain = digits.bytes().all(|b| b.is_ascii_digit());
        let leading_zero = digits.len() > 1 && digits.starts_with('0');
        text.parse().ok().filter(|_| plain && !leading_zero).map(Self::Number)
    }

    /// Whether the value is not `n`.
    #[must_use]
    pub fn is_set(&self) -> bool {
        *self != Self::No
    }
}

/// Formats the value as in a `.config`.
impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::No => f.write_str("n"),
            Self::Module => f.write_str("m"),
            Self::Yes => f.write_str("y"),
            Self::Number(number) => write!(f, "{number}"),
            Self::Hex(number) => write!(f, "{number:#x}"),
            Self::Text(text) => {
                let escaped = text.replace('\\', "\\\\").replace('"', "\\\"");
                write!(f, "\"{escaped}\"")
            }
        }
    }
}

/// Removes the escapes of a string. Returns `None` if it contains an unescaped quote or a trailing backslash.
fn unquote(text: &str) -> Option<String> {
    let mut plain = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            '"' => return None,
            '\\' => plain.push(chars.next()?),
            c if c.is_control() && c != '\t' => return None,
            c => plain.push(c),
        }
    }
    Some(plain)
}

/// Removes a leading `CONFIG_`, so that callers may pass either form.
pub(crate) fn bare(symbol: &str) -> &str {
    symbol.strip_prefix("CONFIG_").unwrap_or(symbol)
}

/// Whether this is a valid symbol name (without `CONFIG_`).
pub(crate) fn is_symbol_name(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
}

/// The line of a `.config` that sets a symbol to this value.
pub(crate) fn config_line(symbol: &str, value: &Value) -> String {
    match value {
        Value::No => format!("# CONFIG_{symbol} is not set"),
        value => format!("CONFIG_{symbol}={value}"),
    }
}

/// The symbol of a line `# CONFIG_X is not set`.
pub(crate) fn not_set_symbol(line: &str) -> Option<&str> {
    line.strip_prefix("# CONFIG_")?.strip_suffix(" is not set")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_parsed_as_in_the_kernel() {
        let cases = [
            ("y", Some(Value::Yes)),
            ("n", Some(Value::No)),
            ("m", Some(Value::Module)),
            ("0", Some(Value::Number(0))),
            ("-12", Some(Value::Number(-12))),
            ("0x1f", Some(Value::Hex(31))),
            ("0xffffffffffffffff", Some(Value::Hex(u64::MAX))),
            (r#""""#, Some(Value::Text(String::new()))),
            (r#""a\"b\\c""#, Some(Value::Text(r#"a"b\c"#.into()))),
            ("", None),
            ("Y", None),
            ("007", None),
            ("+7", None),
            ("-", None),
            ("0x", None),
            ("0x+1", None),
            ("0x1ffffffffffffffff", None),
            ("9223372036854775808", None),
            ("\"", None),
            (r#""a"b""#, None),
            (r#""a\""#, None),
            ("\"a\u{7}\"", None),
        ];
        for (text, value) in cases {
            assert_eq!(Value::parse(text), value, "{text}");
        }
    }

    #[test]
    fn writing_undoes_reading() {
        for text in ["y", "m", "n", "-3", "0x1000000", r#""say \"hi\" \\ bye""#] {
            assert_eq!(Value::parse(text).unwrap().to_string(), text);
        }
    }

    #[test]
    fn config_lines() {
        assert_eq!(config_line("NET", &Value::Yes), "CONFIG_NET=y");
        assert_eq!(config_line("NET", &Value::No), "# CONFIG_NET is not set");
        assert_eq!(not_set_symbol("# CONFIG_NET is not set"), Some("NET"));
        assert_eq!(not_set_symbol("# CONFIG_NET is set"), None);
    }
}
