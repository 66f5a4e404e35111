//! Reads a tar archive front to back: what stands in front of each file, then its data.
//!
//! It is read as Go's archive/tar reads it (docker, containerd and podman do so), since what one reader skips another
//! one takes for a file. `header.rs` has the fields, `extensions.rs` what stands in front of a header.

mod error;
mod extensions;
mod header;
mod sparse;
mod stream;

use crate::tree::{Attributes, Device, Shown, Time};
pub use error::Error;
use error::MAX_EXTENSION;
use extensions::{Extensions, NoRecord, Pax};
use header::{Header, RECORD};
use sparse::Segment;
use std::io::Read;
pub(crate) use stream::Tarball;

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EntryKind {
    File,
    HardLink,
    Symlink,
    CharacterDevice,
    BlockDevice,
    Directory,
    Fifo,
    /// The byte that says it.
    Unknown(u8),
}

/// A file's description.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) path: Vec<u8>,
    pub(crate) link: Vec<u8>,
    pub(crate) kind: EntryKind,
    pub(crate) attributes: Attributes,
    pub(crate) device: Device,
    /// Bytes, with the holes.
    pub(crate) size: u64,
    /// Where the data belongs; what lies between is zero.
    pub(crate) segments: Vec<Segment>,
}

impl<R: Read> Tarball<R> {
    /// The next file, past what is left of the one before; none at the end.
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
                // What is said of all files is a comment in practice.
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
        Pax::parse(&self.extension(header)?).map_err(|NoRecord(record)| Error::Record(at, record))
    }

    /// The content of an extended header.
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
        let number = |name| Error::Number(Shown::new(&path), name);
        let size = pax.size.or_else(|| header.size());
        let kind = EntryKind::of(header.kind(), &path, size);
        let size = if kind.has_data() { size.and_then(sparse::size) } else { Some(0) };
        let size = size.and_then(|size| self.begin_data(size).map(|()| size));
        let size = size.ok_or_else(|| number("the size"))?;
        let mode = header.mode().ok_or_else(|| number("the mode"))?;
        let attributes = Attributes {
            permissions: u16::try_from(mode & 0o7777).unwrap_or_default(),
            uid: pax.uid.or_else(|| header.uid()).and_then(owner).ok_or_else(|| number("the owner"))?,
            gid: pax.gid.or_else(|| header.gid()).and_then(owner).ok_or_else(|| number("the group"))?,
            mtime: match pax.mtime {
                Some(time) => time,
                None => Time::clamped(header.mtime().ok_or_else(|| number("the time"))?, 0),
            },
            xattrs: pax.xattrs,
        };
        let mut device = Device { major: 0, minor: 0 };
        if matches!(kind, EntryKind::CharacterDevice | EntryKind::BlockDevice) {
            let part = |value: Option<i128>, bits: u32, name| {
                let value = value.and_then(|value| u32::try_from(value).ok());
                value.filter(|value| value >> bits == 0).ok_or_else(|| number(name))
            };
            device.major = part(header.major(), 12, "the device's major number")?;
            device.minor = part(header.minor(), 20, "the device's minor number")?;
        }
        let link = given(link).or(pax.link).unwrap_or_else(|| header.link().to_vec());
        let segments = vec![Segment { offset: 0, length: size }];
        let entry = Entry { path, link, kind, attributes, device, size, segments };
        self.sparse(header, pax.sparse, entry)
    }

    /// An entry with the map of its holes, if it is a sparse file.
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
            return Err(Error::Sparse(Shown::new(&entry.path)));
        }
        (entry.size, entry.segments) = (map.size, map.segments);
        Ok(entry)
    }
}

impl EntryKind {
    /// The kind that a header's byte means. Before 1988 a directory was a file with a slash behind its name.
    fn of(byte: u8, path: &[u8], size: Option<i128>) -> Self {
        let has_slash = path.ends_with(b"/");
        match byte {
            0 if has_slash => Self::Directory,
            b'0' if has_slash && size == Some(0) => Self::Directory,
            // The last two: files that should be in one piece on disk, and GNU's sparse files.
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

    /// Links, directories, devices and pipes have none, whatever size their header says.
    const fn has_data(self) -> bool {
        matches!(self, Self::File | Self::Unknown(_))
    }
}

/// The number of a user or group as chown takes it: -2 is 4294967294, and -1 changes nothing, which leaves the file
/// to root.
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
    fn owners_are_what_chown_makes_of_them() {
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
