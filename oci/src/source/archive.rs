//! Image archives: tar files whose entries are indexed by seeking from header to header.

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

/// Maximum number of entries in an archive; an image has a few for each layer.
const MAX_MEMBERS: usize = 100_000;
/// Maximum length of the path or link target of an entry that is indexed, in bytes. Paths of blobs have 80 bytes.
const MAX_NAME: usize = 512;
/// Maximum length of a chain of links.
const MAX_LINKS: usize = 8;

/// An archive and the index of its entries.
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
    /// Old versions of docker wrote links to a layer that several images share.
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
            Error::Archive(tarball::Error::Checksum(0)) => Error::UnknownFormat,
            error => error,
        })?;
        if is_empty {
            return Err(Error::UnknownFormat);
        }
        Ok(Self { file, members })
    }

    /// The content of a file.
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

/// Decompresses a file to an unnamed file.
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
            return Err(Error::TooManyEntries(members.len()));
        }
        archive.seek_to_next().map_err(read)?;
    }
    Ok(members)
}

/// Resolves a path relative to a directory, and removes `.` and `..`.
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

/// A reader of a range of a file.
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
