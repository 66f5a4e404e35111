//! The header of a tar entry: 512 bytes in the format V7, ustar (with pax), GNU or star.
//!
//! Fields are parsed as by Go's archive/tar, which docker, containerd and podman use: blank numbers are 0, numbers in
//! base 256 may be negative, and only the magic number determines the format.

use std::borrow::Cow;

/// Bytes of a record: headers are one record, and data is padded to whole records.
pub(crate) const RECORD: usize = 512;
/// Segments in the header of a sparse file, and in each further record.
const SEGMENTS: usize = 4;
const MORE_SEGMENTS: usize = 21;
/// Bytes of a segment: offset and length.
const SEGMENT: usize = 24;

/// The header of an entry.
#[derive(Debug)]
pub(crate) struct Header([u8; RECORD]);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    V7,
    Ustar,
    Star,
    Gnu,
}

/// Segments of a sparse file, each an offset and a length, and whether a record with more of them follows.
pub(crate) type Segments = (Vec<(i128, i128)>, bool);

impl Header {
    /// A header, or none if its checksum is wrong.
    pub(crate) fn new(bytes: [u8; RECORD]) -> Option<Self> {
        let header = Self(bytes);
        // The checksum field itself counts as spaces. Some programs add signed bytes.
        let others = || header.0[..148].iter().chain(&header.0[156..]);
        let unsigned = others().map(|&byte| i128::from(byte)).sum::<i128>() + 8 * 32;
        let signed = others().map(|&byte| i128::from(byte.cast_signed())).sum::<i128>() + 8 * 32;
        let sum = octal(header.field(148, 8))?;
        (sum == unsigned || sum == signed).then_some(header)
    }

    fn field(&self, at: usize, length: usize) -> &[u8] {
        &self.0[at..at + length]
    }

    fn format(&self) -> Format {
        match (self.field(257, 6), self.field(263, 2), self.field(508, 4)) {
            (b"ustar\0", _, b"tar\0") => Format::Star,
            (b"ustar\0", _, _) => Format::Ustar,
            (b"ustar ", b" \0", _) => Format::Gnu,
            _ => Format::V7,
        }
    }

    /// The type flag of the entry.
    pub(crate) const fn kind(&self) -> u8 {
        self.0[156]
    }

    /// The path, with the prefix if the format has one.
    pub(crate) fn path(&self) -> Cow<'_, [u8]> {
        let name = until_zero(self.field(0, 100));
        let prefix = match self.format() {
            Format::Ustar => until_zero(self.field(345, 155)),
            Format::Star => until_zero(self.field(345, 131)),
            Format::Gnu => self.gnu_prefix(),
            Format::V7 => b"",
        };
        if prefix.is_empty() { Cow::Borrowed(name) } else { [prefix, b"/", name].concat().into() }
    }

    /// The prefix in a header with GNU's magic number, whose format has times at its place.
    ///
    /// Go's archive/tar before 1.8 wrote such headers, and layers of that age have them. As in Go since then, the field is
    /// a prefix if the times are invalid and the text is ASCII.
    fn gnu_prefix(&self) -> &[u8] {
        let is_time = |field| number(field).is_some_and(|time| i64::try_from(time).is_ok());
        let prefix = until_zero(self.field(345, 155));
        let has_times = is_time(self.field(345, 12)) && is_time(self.field(357, 12));
        if has_times || !prefix.is_ascii() { b"" } else { prefix }
    }

    pub(crate) fn link(&self) -> &[u8] {
        until_zero(self.field(157, 100))
    }

    pub(crate) fn mode(&self) -> Option<i128> {
        number(self.field(100, 8))
    }

    pub(crate) fn uid(&self) -> Option<i128> {
        number(self.field(108, 8))
    }

    pub(crate) fn gid(&self) -> Option<i128> {
        number(self.field(116, 8))
    }

    pub(crate) fn size(&self) -> Option<i128> {
        number(self.field(124, 12))
    }

    pub(crate) fn mtime(&self) -> Option<i128> {
        number(self.field(136, 12))
    }

    /// The major device number, which V7 does not have.
    pub(crate) fn major(&self) -> Option<i128> {
        if self.format() == Format::V7 { Some(0) } else { number(self.field(329, 8)) }
    }

    /// The minor device number, which V7 does not have.
    pub(crate) fn minor(&self) -> Option<i128> {
        if self.format() == Format::V7 { Some(0) } else { number(self.field(337, 8)) }
    }

    /// The part of a GNU sparse map that is in the header, and the size of the file with its holes.
    pub(crate) fn sparse(&self) -> Option<(Segments, i128)> {
        let size = number(self.field(483, 12))?;
        let segments = segments(self.field(386, SEGMENTS * SEGMENT + 1))?;
        (self.format() == Format::Gnu).then_some((segments, size))
    }
}

/// The segments in a further record of a GNU sparse map.
pub(crate) fn more_segments(record: &[u8; RECORD]) -> Option<Segments> {
    segments(&record[..=MORE_SEGMENTS * SEGMENT])
}

/// Parses segments up to the first empty one, and the flag after them.
fn segments(bytes: &[u8]) -> Option<Segments> {
    let (last, segments) = bytes.split_last()?;
    let (segments, _) = segments.as_chunks::<SEGMENT>();
    let used = segments.iter().take_while(|segment| segment[0] != 0);
    let used = used.map(|segment| Some((number(&segment[..12])?, number(&segment[12..])?)));
    Some((used.collect::<Option<_>>()?, *last != 0))
}

fn until_zero(bytes: &[u8]) -> &[u8] {
    bytes.split(|&byte| byte == 0).next().unwrap_or_default()
}

/// Parses a number: octal digits or, if the first bit is set, a two's complement in base 256. The second bit is the
/// sign, since the first one only marks the encoding.
fn number(field: &[u8]) -> Option<i128> {
    let Some((&first, rest)) = field.split_first().filter(|(first, _)| **first & 0x80 != 0) else {
        return octal(field);
    };
    let top = i128::from(first & 0x7f) - if first & 0x40 == 0 { 0 } else { 0x80 };
    Some(rest.iter().fold(top, |sum, &byte| sum << 8 | i128::from(byte)))
}

/// Parses octal digits, surrounded by spaces and NUL bytes. A blank field is 0.
fn octal(field: &[u8]) -> Option<i128> {
    let is_blank = |byte: &u8| matches!(byte, b' ' | 0);
    let start = field.iter().position(|byte| !is_blank(byte)).unwrap_or(field.len());
    let digits = field[start..].split(|byte| is_blank(byte)).next().unwrap_or_default();
    let rest = &field[start + digits.len()..];
    // Bytes after a NUL byte are not part of the field.
    if !until_zero(rest).iter().all(is_blank) {
        return None;
    }
    digits.iter().try_fold(0, |sum, &digit| match digit {
        b'0'..=b'7' => Some(sum << 3 | i128::from(digit - b'0')),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_octal_or_base_256() {
        let is = |field: &[u8], expected| assert_eq!(number(field), expected, "{}", field.escape_ascii());
        for (field, expected) in [
            (&b"0000644\0"[..], 0o644),
            (b"   644 \0", 0o644),
            (b"\0\x00644\0 \0", 0o644),
            (b"644\0junk", 0o644),
            (b"77777777", 0o77_777_777),
            (b"\0\0\0\0\0\0\0\0", 0),
            (b"        ", 0),
            (b"", 0),
            (b"\x80\0\0\0\0\0\x01\x02", 258),
            (b"\xff\xff\xff\xff\xff\xff\xff\xfe", -2),
            // A clear sign bit, and numbers that exceed 64 bits.
            (b"\xbf\xff\xff\xff\xff\xff\xff\xfe", (1 << 62) - 2),
            (b"\xff\xff\xff\xff\x80\0\0\0\0\0\0\0", i128::from(i64::MIN)),
            (b"\xff\xff\xff\xff\x7f\0\0\0\0\0\0\0", i128::from(i64::MIN) - (1 << 56)),
            (b"\x80\0\0\0\x80\0\0\0\0\0\0\0", 1 << 63),
        ] {
            is(field, Some(expected));
        }
        for wrong in [&b"648"[..], b"-1", b"+1", b"0x1", b"6 4", b"64 junk", b"abc"] {
            is(wrong, None);
        }
    }

    fn header(magic: &[u8], prefix: &[u8], trailer: &[u8]) -> Header {
        let mut bytes = [0; RECORD];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, b"name");
        put(257, magic);
        put(329, b"1\0");
        put(345, prefix);
        put(512 - trailer.len(), trailer);
        Header(bytes)
    }

    #[test]
    fn the_magic_number_determines_the_fields() {
        let prefix = |length| ["p".repeat(length).as_bytes(), b"/name"].concat();
        for (magic, trailer, path, major) in [
            (&b"ustar\x0000"[..], &b""[..], prefix(155), 1),
            (b"ustar\0  ", b"", prefix(155), 1),
            (b"ustar\x0000", b"tar\0", prefix(131), 1),
            (b"ustar  \0", b"", prefix(155), 1),
            (b"ustar 00", b"", b"name".to_vec(), 0),
            (b"", b"", b"name".to_vec(), 0),
        ] {
            let header = header(magic, &[b'p'; 155], trailer);
            assert_eq!((&*header.path(), header.major()), (&*path, Some(major)), "{}", magic.escape_ascii());
        }
    }

    #[test]
    fn a_prefix_after_gnus_magic_number_is_told_from_times() {
        let time = b"14330000000\0";
        let overflow = [b"\x80\0\0\0\x80".as_slice(), &[0; 7]].concat();
        for (prefix, path) in [
            (&b"usr/share"[..], "usr/share/name"),
            // The first twelve bytes are blank or a number, but not the following ones.
            (b"            usr", "            usr/name"),
            (b"12345670123\0usr", "12345670123/name"),
            (b"755", "name"),
            (b"", "name"),
            (time, "name"),
            (&[&time[..], time].concat(), "name"),
            (&[&[0; 12][..], time].concat(), "name"),
            (&[&[0; 12][..], b"usr"].concat(), "name"),
            (b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xfe", "name"),
            (&overflow, "name"),
            ("dé".as_bytes(), "name"),
        ] {
            let header = header(b"ustar  \0", prefix, b"");
            assert_eq!(&*header.path(), path.as_bytes(), "{}", prefix.escape_ascii());
        }
    }
}
