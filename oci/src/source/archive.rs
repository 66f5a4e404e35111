//! An image in one file, a tar archive: what it has is found by stepping from header to header.

use crate::compression::{decompress, is_compressed};
use crate::disk;
use crate::error::Error;
use crate::layer::MAX_DATA;
use crate::tarball::{self, EntryKind, Tarball};
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Files of an archive; an image has some for each of its layers.
const MAX_MEMBERS: usize = 100_000;
/// Bytes of a name or link that is one of an image's files: those with digests in them have 80.
const MAX_NAME: usize = 512;
/// Links from one name to the next.
const MAX_LINKS: usize = 8;

/// An archive and what it has.
#[derive(Debug)]
pub(crate) struct Archive {
    file: File,
    members: HashMap<String, Member>,
}

#[derive(Debug)]
enum Member {
    File {
        offset: u64,
        size: u64,
    },
    /// Old versions of docker wrote a layer once, and links to it.
    Link(String),
}

impl Archive {
    pub(super) fn open(mut file: File, path: &Path, scratch: &Path) -> Result<Self, Error> {
        let failed = |source| Error::Read { path: path.into(), source };
        let is_empty = file.metadata().map_err(failed)?.len() == 0;
        let compressed = is_compressed(&file).map_err(failed)?;
        file.rewind().map_err(failed)?;
        if compressed {
            file = unpack(&file, scratch)?;
        }
        let members = members(&mut file).map_err(|error| match error {
            Error::Archive(tarball::Error::Read(source)) => failed(source),
            Error::Archive(tarball::Error::Checksum(0)) => Error::NoImage,
            error => error,
        })?;
        if is_empty {
            return Err(Error::NoImage);
        }
        Ok(Self { file, members })
    }

    /// A file's content.
    pub(super) fn member(&self, name: &str) -> Option<Range<'_>> {
        let mut member = self.members.get(&*normalise(name, ""))?;
        for _ in 0..MAX_LINKS {
            match member {
                Member::File { offset, size } => {
                    return Some(Range { file: &self.file, offset: *offset, left: *size });
                }
                Member::Link(target) => member = self.members.get(target)?,
            }
        }
        None
    }
}

/// The uncompressed content of a file, in a file that has no name.
fn unpack(file: &File, scratch: &Path) -> Result<File, Error> {
    let failed = |source: io::Error| Error::Cache { path: scratch.into(), source };
    let mut unpacked = tempfile::tempfile_in(scratch).map_err(failed)?;
    let archive = |error| Error::Archive(tarball::Error::Read(error));
    let mut content = decompress(file).map_err(archive)?.take(MAX_DATA);
    let mut buffer = vec![0; 256 << 10];
    loop {
        let length = content.read(&mut buffer).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => Error::Archive(tarball::Error::Truncated),
            _ => archive(error),
        })?;
        if length == 0 {
            break;
        }
        disk::check(&unpacked).map_err(failed)?;
        io::Write::write_all(&mut unpacked, &buffer[..length]).map_err(failed)?;
    }
    unpacked.rewind().map_err(failed)?;
    Ok(unpacked)
}

fn members(file: &mut File) -> Result<HashMap<String, Member>, Error> {
    let read = |error| Error::Archive(tarball::Error::Read(error));
    let length = file.metadata().map_err(read)?.len();
    let mut members = HashMap::new();
    let mut archive = Tarball::new(file);
    while let Some(entry) = archive.next_entry().map_err(Error::Archive)? {
        let offset = archive.position();
        if offset.checked_add(entry.size).is_none_or(|end| end > length) {
            return Err(Error::Archive(tarball::Error::Truncated));
        }
        let path = String::from_utf8_lossy(&entry.path);
        let link = String::from_utf8_lossy(&entry.link);
        let member = match entry.kind {
            EntryKind::File => Some(Member::File { offset, size: entry.size }),
            EntryKind::Symlink => {
                let folder = path.rsplit_once('/').map_or("", |(folder, _)| folder);
                Some(Member::Link(normalise(&link, folder)))
            }
            EntryKind::HardLink => Some(Member::Link(normalise(&link, ""))),
            _ => None,
        };
        let is_short = entry.path.len().max(entry.link.len()) <= MAX_NAME;
        if let Some(member) = member.filter(|_| is_short) {
            members.insert(normalise(&path, ""), member);
        }
        if members.len() > MAX_MEMBERS {
            return Err(Error::Members(members.len()));
        }
        archive.seek_to_next().map_err(read)?;
    }
    Ok(members)
}

/// A path without `.` and `..`, as seen from a folder.
fn normalise(path: &str, folder: &str) -> String {
    let mut names: Vec<&str> = Vec::new();
    for name in folder.split('/').chain(path.split('/')) {
        match name {
            "" | "." => {}
            ".." => drop(names.pop()),
            name => names.push(name),
        }
    }
    names.join("/")
}

/// Part of a file.
#[derive(Debug)]
pub(super) struct Range<'a> {
    file: &'a File,
    offset: u64,
    left: u64,
}

impl Read for Range<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wanted = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let length = self.file.read_at(&mut buffer[..wanted], self.offset)?;
        self.offset += length as u64;
        self.left -= length as u64;
        Ok(length)
    }
}
