//! Numbers with a unit, as users write them.

/// The suffixes of bytes, in binary multiples.
pub const BYTES: &[(&str, u64)] = &[("", 1), ("k", 1 << 10), ("m", 1 << 20), ("g", 1 << 30), ("t", 1 << 40)];

/// Parses digits and one of these suffixes, in upper or lower case, and multiplies by its factor. `None` if the text has
/// another form, or the result exceeds 64 bits.
#[must_use]
pub fn parse(text: &str, suffixes: &[(&str, u64)]) -> Option<u64> {
    let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let suffix = &text[digits.len()..];
    let (_, factor) = suffixes.iter().find(|(known, _)| suffix.eq_ignore_ascii_case(known))?;
    // Rust accepts a plus sign, which other programs of this kind do not.
    let number: u64 = digits.parse().ok().filter(|_| digits.bytes().all(|byte| byte.is_ascii_digit()))?;
    number.checked_mul(*factor)
}
