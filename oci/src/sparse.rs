//! Sparse files in tar archives: GNU tar's three ways to write down where the data belongs.

use crate::tarball::{Error, Tarball};
use crate::tree::Shown;
use std::io::Read;
use tar::{GnuExtSparseHeader, GnuSparseHeader, Header};

/// Pieces of data in a file; a map of them takes 16 MiB.
const MAX_SEGMENTS: usize = 1 << 20;

/// A piece of data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

/// Where a file's data belongs.
#[derive(Debug)]
pub(crate) struct Map {
    /// The file's own name, where the header has a substitute.
    pub(crate) name: Option<Vec<u8>>,
    pub(crate) size: u64,
    pub(crate) segments: Vec<Segment>,
}

/// Whether pieces follow one another, fit the file and are all that is stored.
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

/// The map that is in the header and, where there are more pieces, in records behind it.
pub(crate) fn old_gnu<R: Read>(header: &Header, input: &mut Tarball<R>) -> Result<Map, Error> {
    let damaged = || Error::Sparse(Shown::new(&header.path_bytes()));
    let gnu = header.as_gnu().ok_or_else(damaged)?;
    let mut segments = Vec::new();
    let add = |segments: &mut Vec<Segment>, pieces: &[GnuSparseHeader]| -> Option<()> {
        for piece in pieces.iter().filter(|piece| !piece.is_empty()) {
            segments.push(Segment { offset: piece.offset().ok()?, length: piece.length().ok()? });
        }
        (segments.len() <= MAX_SEGMENTS).then_some(())
    };
    add(&mut segments, &gnu.sparse).ok_or_else(damaged)?;
    let mut is_extended = gnu.is_extended();
    while is_extended {
        let mut record = GnuExtSparseHeader::new();
        *record.as_mut_bytes() = input.record_between()?;
        add(&mut segments, record.sparse()).ok_or_else(damaged)?;
        is_extended = record.is_extended();
    }
    Ok(Map { name: None, size: gnu.real_size().map_err(|_| damaged())?, segments })
}

/// What an extended header's `GNU.sparse.` records say.
#[derive(Debug, Default)]
pub(crate) struct Extension {
    major: u64,
    name: Option<Vec<u8>>,
    size: Option<u64>,
    numbers: Vec<u64>,
}

impl Extension {
    /// Takes a record, without the prefix of its key.
    pub(crate) fn record(&mut self, key: &[u8], value: &[u8]) -> Option<()> {
        match key {
            b"major" => self.major = number(value)?,
            b"name" => self.name = Some(value.to_vec()),
            b"size" | b"realsize" => self.size = Some(number(value)?),
            // Version 0.0 has a record for each number, 0.1 one for all.
            b"offset" | b"numbytes" => self.numbers.push(number(value)?),
            b"map" if !value.is_empty() => {
                self.numbers = value.split(|&byte| byte == b',').map(number).collect::<Option<_>>()?;
            }
            _ => {}
        }
        Some(())
    }

    /// The map; version 1.0 has it in front of the data: a count and pairs, a line each, padded to a record.
    pub(crate) fn resolve<R: Read>(self, input: &mut Tarball<R>) -> Result<Map, Error> {
        let shown = Shown::new(self.name.as_deref().unwrap_or_default());
        let damaged = move || Error::Sparse(shown);
        let numbers = if self.major == 1 { lines(input)? } else { Some(self.numbers) };
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
    const LONGEST_LINE: usize = 24;
    let mut count = None;
    let mut numbers = Vec::new();
    let mut line = Vec::new();
    loop {
        let mut record = [0; 512];
        input.read_exact(&mut record)?;
        for byte in record {
            if byte != b'\n' {
                line.push(byte);
                if line.len() > LONGEST_LINE {
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

/// A number in decimal digits.
pub(crate) fn number(digits: &[u8]) -> Option<u64> {
    if !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
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
