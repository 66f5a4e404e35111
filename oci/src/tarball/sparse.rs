//! Sparse files in tar archives, in the formats of GNU tar.

use super::error::Error;
use super::header::{Header, RECORD, Segments, more_segments};
use super::stream::Tarball;
use crate::tree::Excerpt;
use std::io::Read;

/// Maximum number of segments in a file, whose map takes 16 MiB.
const MAX_SEGMENTS: usize = 1 << 20;

/// A part of a file that has data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

/// The map of a sparse file.
#[derive(Debug)]
pub(crate) struct Map {
    /// The name of the file, if the header has a placeholder.
    pub(crate) name: Option<Vec<u8>>,
    pub(crate) size: u64,
    pub(crate) segments: Vec<Segment>,
}

/// Whether segments are in order, fit the size of the file, and have as many bytes as are stored.
pub(crate) fn is_sound(segments: &[Segment], size: u64, stored: u64) -> bool {
    let mut end = 0;
    let mut sum = 0_u64;
    for segment in segments {
        if segment.offset < end {
            return false;
        }
        let (Some(after), Some(total)) =
            (segment.offset.checked_add(segment.length), sum.checked_add(segment.length))
        else {
            return false;
        };
        (end, sum) = (after, total);
    }
    end <= size && sum == stored
}

/// Reads the map of the old GNU format, in the header and further records.
pub(crate) fn old_gnu<R: Read>(header: &Header, input: &mut Tarball<R>) -> Result<Map, Error> {
    let damaged = || Error::Sparse(Excerpt::new(&header.path()));
    let mut segments = Vec::new();
    let mut add = |(found, is_extended): Segments| -> Option<bool> {
        for (offset, length) in found {
            segments.push(Segment { offset: size(offset)?, length: size(length)? });
        }
        (segments.len() <= MAX_SEGMENTS).then_some(is_extended)
    };
    let (found, real_size) = header.sparse().ok_or_else(damaged)?;
    let mut is_extended = add(found).ok_or_else(damaged)?;
    while is_extended {
        let found = more_segments(&input.extra_record()?);
        is_extended = found.and_then(&mut add).ok_or_else(damaged)?;
    }
    Ok(Map { name: None, size: size(real_size).ok_or_else(damaged)?, segments })
}

/// Converts a number to a size or an offset, which are not negative and have 63 bits.
pub(crate) fn size(number: i128) -> Option<u64> {
    i64::try_from(number).ok()?.try_into().ok()
}

/// The `GNU.sparse.` records of an extended header.
#[derive(Debug, Default)]
pub(crate) struct Extension {
    major: u64,
    minor: u64,
    name: Option<Vec<u8>>,
    size: Option<u64>,
    numbers: Vec<u64>,
}

impl Extension {
    /// Adds a record, whose key is without the prefix.
    pub(crate) fn record(&mut self, key: &[u8], value: &[u8]) -> Option<()> {
        match key {
            b"major" => self.major = number(value)?,
            b"minor" => self.minor = number(value)?,
            b"name" => self.name = Some(value.to_vec()),
            b"size" | b"realsize" => self.size = Some(number(value)?),
            // Version 0.0 has a record for each number, version 0.1 one record for all.
            b"offset" if self.numbers.len().is_multiple_of(2) => self.numbers.push(number(value)?),
            b"numbytes" if !self.numbers.len().is_multiple_of(2) => self.numbers.push(number(value)?),
            b"offset" | b"numbytes" => return None,
            b"map" => self.numbers = value.split(|&byte| byte == b',').map(number).collect::<Option<_>>()?,
            _ => {}
        }
        Some(())
    }

    /// Returns the map. Version 1.0 has it before the data: a count and pairs of numbers, each on a line, padded to
    /// whole records.
    pub(crate) fn resolve<R: Read>(self, path: &[u8], input: &mut Tarball<R>) -> Result<Map, Error> {
        let shown = Excerpt::new(self.name.as_deref().unwrap_or(path));
        let damaged = move || Error::Sparse(shown);
        let numbers = match (self.major, self.minor) {
            (1, 0) => lines(input)?,
            (0, 0 | 1) => Some(self.numbers),
            _ => None,
        };
        let Some(((numbers, rest), size)) = numbers.as_deref().map(<[u64]>::as_chunks::<2>).zip(self.size)
        else {
            return Err(damaged());
        };
        if !rest.is_empty() {
            return Err(damaged());
        }
        let segments = numbers.iter().map(|&[offset, length]| Segment { offset, length }).collect();
        Ok(Map { name: self.name, size, segments })
    }
}

fn lines<R: Read>(input: &mut Tarball<R>) -> Result<Option<Vec<u64>>, Error> {
    const MAX_LINE_LEN: usize = 24;
    let mut count = None;
    let mut numbers = Vec::new();
    let mut line = Vec::new();
    loop {
        let mut record = [0; RECORD];
        input.read_exact(&mut record)?;
        for byte in record {
            if byte != b'\n' {
                line.push(byte);
                if line.len() > MAX_LINE_LEN {
                    return Ok(None);
                }
                continue;
            }
            let Some(number) = number(&line) else { return Ok(None) };
            line.clear();
            match count {
                None if number > MAX_SEGMENTS as u64 => return Ok(None),
                None => count = Some(2 * number),
                Some(_) => numbers.push(number),
            }
            if count == Some(numbers.len() as u64) {
                return Ok(Some(numbers));
            }
        }
    }
}

/// Parses a size or an offset in decimal digits.
fn number(digits: &[u8]) -> Option<u64> {
    size(decimal(digits)?)
}

/// Parses decimal digits with an optional sign, and clamps to 128 bits.
pub(crate) fn decimal(text: &[u8]) -> Option<i128> {
    let (sign, digits) = match text {
        [b'-', digits @ ..] => (-1, digits),
        [b'+', digits @ ..] | digits => (1, digits),
    };
    if digits.is_empty() {
        return None;
    }
    let number = digits.iter().try_fold(0_i128, |sum, digit| {
        let digit = digit.is_ascii_digit().then(|| i128::from(digit - b'0'))?;
        Some(sum.saturating_mul(10).saturating_add(digit))
    })?;
    Some(sign * number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_are_checked() {
        let segment = |offset, length| Segment { offset, length };
        assert!(is_sound(&[segment(10, 5), segment(20, 0)], 20, 5));
        assert!(is_sound(&[], 1 << 40, 0));
        assert!(!is_sound(&[segment(10, 5), segment(14, 1)], 20, 6));
        assert!(!is_sound(&[segment(10, 5)], 14, 5));
        assert!(!is_sound(&[segment(10, 5)], 20, 6));
        assert!(!is_sound(&[segment(u64::MAX, 2)], u64::MAX, 2));
    }
}
