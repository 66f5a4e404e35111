//! Reads a tar archive front to back: what stands in front of each file, then its data.
//!
//! The `tar` crate knows the header's fields. What the extended headers say is read here, since their records are
//! counted, not ended by a newline (a capability has any bytes), and since none may be as large as it likes.

use crate::sparse::{self, Segment};
use crate::tree::{Attributes, Device, Shown, Time, Xattr};
use std::io::{self, Read};
use tar::{EntryType, Header};

pub(crate) const RECORD: u64 = 512;

/// Bytes of an extended header. A file's attributes and two paths need 80 KiB.
const MAX_EXTENSION: u64 = 1 << 20;
/// Extended headers in a row: one of each kind is right.
const MAX_EXTENSIONS: usize = 8;

/// An archive cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Whoever reads the bytes failed.
    #[error(transparent)]
    Read(#[from] io::Error),
    /// The end is missing.
    #[error("the archive ends in the middle of a file")]
    Truncated,
    /// Not a tar archive, or a damaged one.
    #[error("byte {0} begins no file: not a tar archive, or a damaged one")]
    Checksum(u64),
    /// A field of a header.
    #[error("{0}: {1} in its header is not a number that it can be")]
    Number(Shown, &'static str),
    /// Extended headers.
    #[error("byte {0}: an extended header that is damaged, has more than {max} KiB, or is one too many", max = MAX_EXTENSION >> 10)]
    Extension(u64),
    /// A map of a sparse file.
    #[error("{0}: the map of its holes is damaged")]
    Sparse(Shown),
}

/// A file's description.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) path: Vec<u8>,
    pub(crate) link: Vec<u8>,
    pub(crate) entry_type: EntryType,
    pub(crate) attributes: Attributes,
    pub(crate) device: Device,
    /// Bytes, with the holes.
    pub(crate) size: u64,
    /// Where the data belongs; what lies between is zero.
    pub(crate) segments: Vec<Segment>,
}

/// An archive that is being read.
#[derive(Debug)]
pub(crate) struct Tarball<R> {
    input: R,
    position: u64,
    /// Where the next header is.
    next: u64,
    /// Where the data ends.
    data_end: u64,
}

impl<R: Read> Tarball<R> {
    pub(crate) const fn new(input: R) -> Self {
        Self { input, position: 0, next: 0, data_end: 0 }
    }

    /// Where in the archive the reader is: behind `next_entry` where its data begins.
    pub(crate) const fn position(&self) -> u64 {
        self.position
    }

    pub(crate) const fn input(&mut self) -> &mut R {
        &mut self.input
    }

    pub(crate) fn into_input(self) -> R {
        self.input
    }

    /// Someone has moved the input to where the next header is.
    pub(crate) const fn skipped(&mut self) {
        self.position = self.next;
    }

    /// Bytes from here to the next header.
    pub(crate) const fn to_next(&self) -> u64 {
        self.next - self.position
    }

    /// The next file, past what is left of the one before; none at the end.
    pub(crate) fn next_entry(&mut self) -> Result<Option<Entry>, Error> {
        let mut extensions = Extensions::default();
        for _ in 0..=MAX_EXTENSIONS {
            let Some(header) = self.header()? else { return Ok(None) };
            let at = self.position - RECORD;
            match header.entry_type() {
                EntryType::GNULongName => extensions.path = Some(until_zero(self.extension()?)),
                EntryType::GNULongLink => extensions.link = Some(until_zero(self.extension()?)),
                EntryType::XHeader => {
                    let records = self.extension()?;
                    extensions.take(&records).ok_or(Error::Extension(at))?;
                }
                // What is said of all files is a comment in practice.
                EntryType::XGlobalHeader => drop(self.extension()?),
                _ => return self.entry(&header, extensions).map(Some),
            }
        }
        Err(Error::Extension(self.position))
    }

    fn header(&mut self) -> Result<Option<Header>, Error> {
        self.skip(self.to_next())?;
        let mut header = Header::new_old();
        let bytes = header.as_mut_bytes();
        let mut filled = 0;
        while filled < bytes.len() {
            match self.input.read(&mut bytes[filled..]) {
                Ok(0) if filled == 0 => return Ok(None),
                Ok(0) => return Err(Error::Truncated),
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        let at = self.position;
        self.position += RECORD;
        if *bytes == [0; 512] {
            return Ok(None);
        }
        // The sum counts its own field as spaces; some programs added signed bytes.
        let others = || bytes[..148].iter().chain(&bytes[156..]);
        let unsigned = others().map(|&byte| i64::from(byte)).sum::<i64>() + 8 * 32;
        let signed = others().map(|&byte| i64::from(byte.cast_signed())).sum::<i64>() + 8 * 32;
        let said = header.cksum().ok().map(i64::from);
        if said != Some(unsigned) && said != Some(signed) {
            return Err(Error::Checksum(at));
        }
        self.set_size(header.entry_size().map_err(|_| Error::Checksum(at))?).ok_or(Error::Checksum(at))?;
        Ok(Some(header))
    }

    /// The data from here on has so many bytes.
    fn set_size(&mut self, size: u64) -> Option<()> {
        self.data_end = self.position.checked_add(size)?;
        self.next = self.data_end.checked_next_multiple_of(RECORD)?;
        Some(())
    }

    fn extension(&mut self) -> Result<Vec<u8>, Error> {
        let size = self.data_end - self.position;
        if size > MAX_EXTENSION {
            return Err(Error::Extension(self.position - RECORD));
        }
        let mut content = vec![0; usize::try_from(size).unwrap_or_default()];
        self.read_exact(&mut content)?;
        Ok(content)
    }

    fn entry(&mut self, header: &Header, extensions: Extensions) -> Result<Entry, Error> {
        let path = extensions.path.unwrap_or_else(|| header.path_bytes().into_owned());
        let number = |name| Error::Number(Shown::new(&path), name);
        if let Some(size) = extensions.size {
            self.set_size(size).ok_or_else(|| number("the size"))?;
        }
        let owner = |extended: Option<u64>, plain: io::Result<u64>, name| {
            let id = extended.map_or(plain, Ok).ok().and_then(|id| u32::try_from(id).ok());
            id.ok_or_else(|| number(name))
        };
        let uid = owner(extensions.uid, header.uid(), "the owner")?;
        let gid = owner(extensions.gid, header.gid(), "the group")?;
        let mtime = match extensions.mtime {
            Some(time) => time,
            None => Time { seconds: mtime(header).ok_or_else(|| number("the time"))?, nanoseconds: 0 },
        };
        let mode = header.mode().map_err(|_| number("the mode"))?;
        let mut entry_type = header.entry_type();
        if matches!(entry_type, EntryType::Regular) && path.ends_with(b"/") {
            entry_type = EntryType::Directory;
        }
        let mut device = Device { major: 0, minor: 0 };
        if matches!(entry_type, EntryType::Char | EntryType::Block) {
            let part = |value: io::Result<Option<u32>>, bits: u32, name| {
                value.ok().flatten().filter(|value: &u32| value >> bits == 0).ok_or_else(|| number(name))
            };
            device.major = part(header.device_major(), 12, "the device's major number")?;
            device.minor = part(header.device_minor(), 20, "the device's minor number")?;
        }
        let link = extensions.link.or_else(|| header.link_name_bytes().map(Into::into)).unwrap_or_default();
        let stored = self.data_end - self.position;
        let mut entry = Entry {
            link,
            entry_type,
            attributes: Attributes {
                permissions: u16::try_from(mode & 0o7777).unwrap_or_default(),
                uid,
                gid,
                mtime,
                xattrs: extensions.xattrs,
            },
            device,
            size: stored,
            segments: vec![Segment { offset: 0, length: stored }],
            path,
        };
        let map = if entry_type.is_gnu_sparse() {
            entry.entry_type = EntryType::Regular;
            Some(sparse::old_gnu(header, self)?)
        } else {
            extensions.sparse.map(|map| map.resolve(self)).transpose()?
        };
        if let Some(map) = map {
            if let Some(name) = map.name {
                entry.path = name;
            }
            let stored = self.data_end - self.position;
            if !sparse::is_sound(&map.segments, map.size, stored) {
                return Err(Error::Sparse(Shown::new(&entry.path)));
            }
            (entry.size, entry.segments) = (map.size, map.segments);
        }
        Ok(entry)
    }

    /// Reads over bytes.
    fn skip(&mut self, length: u64) -> Result<(), Error> {
        let skipped = io::copy(&mut self.input.by_ref().take(length), &mut io::sink())?;
        self.position += skipped;
        if skipped < length { Err(Error::Truncated) } else { Ok(()) }
    }

    /// A record in front of the data, which is part of no file (maps of sparse files).
    pub(crate) fn record_between(&mut self) -> Result<[u8; 512], Error> {
        self.data_end = self.data_end.saturating_add(RECORD);
        self.next = self.next.saturating_add(RECORD);
        let mut record = [0; 512];
        self.read_exact(&mut record)?;
        Ok(record)
    }

    /// Bytes of the data.
    pub(crate) fn read_exact(&mut self, buffer: &mut [u8]) -> Result<(), Error> {
        if buffer.len() as u64 > self.data_end - self.position {
            return Err(Error::Truncated);
        }
        self.input.read_exact(buffer).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => Error::Truncated,
            _ => error.into(),
        })?;
        self.position += buffer.len() as u64;
        Ok(())
    }
}

/// The file's data.
impl<R: Read> Read for Tarball<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.data_end - self.position;
        let wanted = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let count = self.input.read(&mut buffer[..wanted])?;
        self.position += count as u64;
        Ok(count)
    }
}

/// A header's time: octal digits, or a signed number of 96 bits with the top bit set.
fn mtime(header: &Header) -> Option<i64> {
    let field = header.as_old().mtime;
    if field[0] & 0x80 == 0 {
        return i64::try_from(header.mtime().ok()?).ok();
    }
    let (_, low) = field.split_last_chunk::<8>()?;
    Some(i64::from_be_bytes(*low))
}

/// What extended headers say of the file that follows.
#[derive(Debug, Default)]
struct Extensions {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<Time>,
    xattrs: Vec<Xattr>,
    sparse: Option<sparse::Extension>,
}

impl Extensions {
    /// Takes records of the form `LENGTH KEY=VALUE\n`, where the length counts the whole record.
    fn take(&mut self, mut records: &[u8]) -> Option<()> {
        while !records.is_empty() {
            let space = records.iter().take(20).position(|&byte| byte == b' ')?;
            let length = usize::try_from(sparse::number(&records[..space])?).ok()?;
            let (record, rest) = records.split_at_checked(length)?;
            let record = record.get(space + 1..)?.strip_suffix(b"\n")?;
            let equals = record.iter().position(|&byte| byte == b'=')?;
            self.record(&record[..equals], &record[equals + 1..])?;
            records = rest;
        }
        Some(())
    }

    fn record(&mut self, key: &[u8], value: &[u8]) -> Option<()> {
        let number = || sparse::number(value);
        match key {
            b"path" => self.path = Some(value.to_vec()),
            b"linkpath" => self.link = Some(value.to_vec()),
            b"size" => self.size = Some(number()?),
            b"uid" => self.uid = Some(number()?),
            b"gid" => self.gid = Some(number()?),
            b"mtime" => self.mtime = Some(time(value)?),
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    // An overlay in a guest would take its own marks for an order.
                    if !name.starts_with(b"trusted.overlay.") {
                        self.xattrs.push(Xattr { name: name.into(), value: value.into() });
                    }
                } else if let Some(key) = key.strip_prefix(b"GNU.sparse.") {
                    self.sparse.get_or_insert_default().record(key, value)?;
                }
            }
        }
        Some(())
    }
}

/// `-12.5`: seconds with a fraction.
fn time(value: &[u8]) -> Option<Time> {
    let (is_before, digits) = value.strip_prefix(b"-").map_or((false, value), |digits| (true, digits));
    let mut parts = digits.splitn(2, |&byte| byte == b'.');
    let seconds = i64::try_from(sparse::number(parts.next()?)?).ok()?;
    let fraction = parts.next().unwrap_or_default();
    let mut nanoseconds = 0;
    for place in 0..9 {
        let digit = fraction.get(place).copied().unwrap_or(b'0');
        nanoseconds = nanoseconds * 10 + char::from(digit).to_digit(10)?;
    }
    // Nanoseconds count forwards.
    Some(match (is_before, nanoseconds) {
        (false, _) => Time { seconds, nanoseconds },
        (true, 0) => Time { seconds: -seconds, nanoseconds },
        (true, _) => Time { seconds: -seconds - 1, nanoseconds: 1_000_000_000 - nanoseconds },
    })
}

fn until_zero(mut bytes: Vec<u8>) -> Vec<u8> {
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    bytes.truncate(end);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_fractions_and_may_be_before_1970() {
        let is = |text: &[u8], seconds, nanoseconds| {
            assert_eq!(time(text), Some(Time { seconds, nanoseconds }), "{}", text.escape_ascii());
        };
        is(b"0", 0, 0);
        is(b"1700000000.5", 1_700_000_000, 500_000_000);
        is(b"1.0000000019", 1, 1);
        is(b"-1", -1, 0);
        is(b"-1.25", -2, 750_000_000);
        for wrong in [&b""[..], b"-", b"x", b"1.x", b"1e3", b"99999999999999999999"] {
            assert_eq!(time(wrong), None);
        }
    }

    #[test]
    fn records_are_counted() {
        let mut extensions = Extensions::default();
        extensions.take(b"29 SCHILY.xattr.user.a=1\n2=3\n11 path=ab\n").unwrap();
        assert_eq!(extensions.path.as_deref(), Some(&b"ab"[..]));
        let Xattr { name, value } = &extensions.xattrs[0];
        assert_eq!((&**name, &**value), (&b"user.a"[..], &b"1\n2=3"[..]));
        for wrong in [
            &b"11 path=a\n"[..],
            b"9 path=ab\n",
            b"0 path=ab\n",
            b"99999999999999999999 path=ab\n",
            b"path",
            b"6 abc\n",
        ] {
            assert!(Extensions::default().take(wrong).is_none(), "{}", wrong.escape_ascii());
        }
    }
}
