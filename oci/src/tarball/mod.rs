//! A sequential reader of tar archives.
//!
//! It accepts the same archives as Go's archive/tar, which docker, containerd and podman use: with another
//! interpretation, data that one reader skips would be files to the other. `header.rs` parses headers, `extensions.rs`
//! the extended headers that precede them.

mod error;
mod extensions;
mod header;
mod sparse;
mod stream;

use crate::tree::{Attributes, Device, Excerpt, Time};
pub use error::Error;
use error::MAX_EXTENSION;
use extensions::{Extensions, InvalidRecord, Pax};
use header::{Header, RECORD};
use sparse::Segment;
use std::io::Read;
pub(crate) use stream::Tarball;

/// The type of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EntryKind {
    File,
    HardLink,
    Symlink,
    CharacterDevice,
    BlockDevice,
    Directory,
    Fifo,
    /// Another type flag.
    Unknown(u8),
}

/// An entry of an archive.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) path: Vec<u8>,
    pub(crate) link: Vec<u8>,
    pub(crate) kind: EntryKind,
    pub(crate) attributes: Attributes,
    pub(crate) device: Device,
    /// The size in bytes, with holes.
    pub(crate) size: u64,
    /// The segments of a sparse file, or one for the whole file. Bytes between them are zero.
    pub(crate) segments: Vec<Segment>,
}

impl<R: Read> Tarball<R> {
    /// Skips the rest of the present entry and returns the next one, or none at the end.
    pub(crate) fn next_entry(&mut self) -> Result<Option<Entry>, Error> {
        let mut extensions = Extensions::default();
        let mut described = None;
        loop {
            let Some(header) = self.header()? else {
                return described.map_or(Ok(None), |at| Err(Error::NoFile(at)));
            };
            let at = self.position() - RECORD as u64;
            match header.kind() {
                b'L' => extensions.path = Some(until_zero(self.extension(&header)?)),
                b'K' => extensions.link = Some(until_zero(self.extension(&header)?)),
                b'x' => extensions.pax = self.pax(&header)?,
                // Global headers are checked and ignored; in practice they have comments only.
                b'g' => {
                    self.pax(&header)?;
                    continue;
                }
                _ => return self.entry(&header, extensions).map(Some),
            }
            described = Some(at);
        }
    }

    fn pax(&mut self, header: &Header) -> Result<Pax, Error> {
        let at = self.position() - RECORD as u64;
        Pax::parse(&self.extension(header)?).map_err(|InvalidRecord(record)| Error::Record(at, record))
    }

    /// Reads the content of an extended header.
    fn extension(&mut self, header: &Header) -> Result<Vec<u8>, Error> {
        let size = header.size().and_then(sparse::size).filter(|&size| size <= MAX_EXTENSION);
        let size = size.ok_or(Error::Extension(self.position() - RECORD as u64))?;
        self.begin_data(size);
        let mut content = vec![0; usize::try_from(size).unwrap_or_default()];
        self.read_exact(&mut content)?;
        Ok(content)
    }

    fn entry(&mut self, header: &Header, extensions: Extensions) -> Result<Entry, Error> {
        let Extensions { pax, path, link } = extensions;
        let given = |name: Option<Vec<u8>>| name.filter(|name| !name.is_empty());
        let path = given(path).or(pax.path).unwrap_or_else(|| header.path().into_owned());
        let number = |name| Error::Number(Excerpt::new(&path), name);
        let size = pax.size.or_else(|| header.size());
        let kind = EntryKind::of(header.kind(), &path, size);
        let size = if kind.has_data() { size.and_then(sparse::size) } else { Some(0) };
        let size = size.and_then(|size| self.begin_data(size).map(|()| size));
        let size = size.ok_or_else(|| number("size"))?;
        let mode = header.mode().ok_or_else(|| number("mode"))?;
        let attributes = Attributes {
            permissions: u16::try_from(mode & 0o7777).unwrap_or_default(),
            uid: pax.uid.or_else(|| header.uid()).and_then(owner).ok_or_else(|| number("owner"))?,
            gid: pax.gid.or_else(|| header.gid()).and_then(owner).ok_or_else(|| number("group"))?,
            mtime: match pax.mtime {
                Some(time) => time,
                None => Time::clamped(header.mtime().ok_or_else(|| number("modification time"))?, 0),
            },
            xattrs: pax.xattrs,
        };
        let mut device = Device { major: 0, minor: 0 };
        if matches!(kind, EntryKind::CharacterDevice | EntryKind::BlockDevice) {
            let part = |value: Option<i128>, bits: u32, name| {
                let value = value.and_then(|value| u32::try_from(value).ok());
                value.filter(|value| value >> bits == 0).ok_or_else(|| number(name))
            };
            device.major = part(header.major(), 12, "major device number")?;
            device.minor = part(header.minor(), 20, "minor device number")?;
        }
        let link = given(link).or(pax.link).unwrap_or_else(|| header.link().to_vec());
        let segments = vec![Segment { offset: 0, length: size }];
        let entry = Entry { path, link, kind, attributes, device, size, segments };
        self.sparse(header, pax.sparse, entry)
    }

    /// Adds the size and the segments of a sparse file to its entry.
    fn sparse(
        &mut self,
        header: &Header,
        extension: Option<sparse::Extension>,
        mut entry: Entry,
    ) -> Result<Entry, Error> {
        let map = match extension {
            _ if header.kind() == b'S' => sparse::old_gnu(header, self)?,
            Some(extension) => extension.resolve(&entry.path, self)?,
            None => return Ok(entry),
        };
        entry.path = map.name.unwrap_or(entry.path);
        let stored = self.remaining();
        if entry.kind != EntryKind::File || !sparse::is_sound(&map.segments, map.size, stored) {
            return Err(Error::Sparse(Excerpt::new(&entry.path)));
        }
        (entry.size, entry.segments) = (map.size, map.segments);
        Ok(entry)
    }
}

impl EntryKind {
    /// The type of a type flag. Before POSIX.1-1988, a directory was a file whose name ends with a slash.
    fn of(byte: u8, path: &[u8], size: Option<i128>) -> Self {
        let has_slash = path.ends_with(b"/");
        match byte {
            0 if has_slash => Self::Directory,
            b'0' if has_slash && size == Some(0) => Self::Directory,
            // The last two are contiguous files and GNU sparse files.
            0 | b'0' | b'7' | b'S' => Self::File,
            b'1' => Self::HardLink,
            b'2' => Self::Symlink,
            b'3' => Self::CharacterDevice,
            b'4' => Self::BlockDevice,
            b'5' => Self::Directory,
            b'6' => Self::Fifo,
            other => Self::Unknown(other),
        }
    }

    /// Links, directories, devices and pipes have no data, whatever size is in the header.
    const fn has_data(self) -> bool {
        matches!(self, Self::File | Self::Unknown(_))
    }
}

/// A UID or GID as chown takes it: -2 is 4294967294. -1 does not change the owner, so the file stays root's.
fn owner(number: i128) -> Option<u32> {
    let id = i64::try_from(number).ok()?;
    let id = u32::try_from(id).ok().or_else(|| i32::try_from(id).ok().map(i32::cast_unsigned))?;
    Some(if id == u32::MAX { 0 } else { id })
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
    fn owners_are_those_of_chown() {
        for (number, id) in [
            (0, Some(0)),
            (i128::from(u32::MAX) - 1, Some(u32::MAX - 1)),
            (i128::from(u32::MAX), Some(0)),
            (-1, Some(0)),
            (-2, Some(u32::MAX - 1)),
            (i128::from(i32::MIN), Some(1 << 31)),
            (i128::from(i32::MIN) - 1, None),
            (1 << 32, None),
            (1 << 40, None),
        ] {
            assert_eq!(owner(number), id, "{number}");
        }
    }
}
