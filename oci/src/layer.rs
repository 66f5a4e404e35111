//! Puts a layer into the tree, and its files' data into the filesystem.

use crate::ahead;
use crate::compression::decompress;
use crate::digest::{Digest, Hashed, drain};
use crate::erofs::{BLOCK, BlockWriter, CopyError};
use crate::registry::BrokenOff;
use crate::tarball::{self, Entry, EntryKind, Tarball};
use crate::tree::{self, Kind, Shown, Tree};
use std::io::{self, Read};
use std::thread;

/// Bytes of all files of an image. Zeroes cost no room, so that the disk alone would not set an end.
pub const MAX_DATA: u64 = 1 << 40;

/// Bytes of all layers of an image when they are uncompressed. A few bytes of Zstandard become as many as one likes,
/// and each has to be read.
pub const MAX_UNPACKED: u64 = 256 << 30;

/// What a layer has to be.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Check {
    /// The blob, as it is stored, has this digest and size.
    Blob(Digest, u64),
    /// The uncompressed archive has this digest.
    Content(Digest),
}

/// A layer cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Its bytes cannot be had.
    #[error("it cannot be read")]
    Read(#[source] io::Error),
    /// It cannot be decompressed.
    #[error("it is damaged or cut off: {0}")]
    Damaged(io::Error),
    /// It is another one.
    #[error("its content has the digest {found}, not {expected}")]
    Digest {
        /// What the image says.
        expected: Digest,
        /// What there is.
        found: Digest,
    },
    /// It is too short or too long.
    #[error("it has {found} bytes, not {expected}")]
    Size {
        /// What the image says.
        expected: u64,
        /// What there is: not more than one byte too much.
        found: u64,
    },
    /// The archive is none.
    #[error(transparent)]
    Archive(tarball::Error),
    /// An entry that no tree can hold.
    #[error(transparent)]
    Tree(#[from] tree::Error),
    /// An entry of an unknown kind.
    #[error("{0}: an entry of the unknown kind {1:?}")]
    Kind(Shown, char),
    /// Too much data.
    #[error("the image's files have more than {max} GiB", max = MAX_DATA >> 30)]
    TooMuchData,
    /// The filesystem could not be written.
    #[error("cannot write the filesystem")]
    Write(#[source] io::Error),
}

impl Error {
    /// Whether another image would not have it: the failure is not this machine's.
    pub(crate) fn is_of_the_image(&self) -> bool {
        !matches!(self, Self::Read(_) | Self::Write(_))
    }
}

/// An error of reading: the system's or the network's, or the decompressor's.
fn read_error(error: io::Error) -> Error {
    let is_broken_off = error.get_ref().is_some_and(|inner| inner.is::<BrokenOff>());
    if error.raw_os_error().is_some() || is_broken_off { Error::Read(error) } else { Error::Damaged(error) }
}

impl From<tarball::Error> for Error {
    fn from(error: tarball::Error) -> Self {
        match error {
            tarball::Error::Read(error) => read_error(error),
            error => Self::Archive(error),
        }
    }
}

/// Adds a layer to the tree and its data to the filesystem.
pub(crate) fn apply(
    blob: impl Read + Send,
    check: Check,
    left: &mut u64,
    tree: &mut Tree,
    data: &mut BlockWriter<'_>,
) -> Result<(), Error> {
    tree.begin_layer();
    match check {
        Check::Blob(expected, size) => {
            // Inflating takes longer than all the rest, and a digest has a thread of its own anyway.
            let (result, blob) = thread::scope(|scope| {
                let (sender, mut content) = ahead::channel();
                let reading = scope.spawn(move || {
                    // One byte more is enough to see that it is too long.
                    let mut blob = Hashed::new(blob.take(size.saturating_add(1)))?;
                    sender.send_all(decompress(&mut blob));
                    Ok(blob)
                });
                let result = unpack(&mut content, left, tree, data).map(drop);
                // Else it waits until the rest is read, where the archive is a bad one.
                drop(content);
                (result, reading.join())
            });
            let blob = blob.unwrap_or_else(|_| Err(io::Error::other("the thread that reads has ended")));
            let blob = blob.map_err(Error::Read)?;
            if let Err(error) = &result
                && !error.is_of_the_image()
            {
                return result;
            }
            // A damaged layer is first of all not the one that the image names.
            let (found, length) = blob.finish().map_err(Error::Read)?;
            if length != size {
                return Err(Error::Size { expected: size, found: length });
            }
            if found != expected {
                return Err(Error::Digest { expected, found });
            }
            result
        }
        Check::Content(expected) => {
            let content = Hashed::new(decompress(blob).map_err(read_error)?).map_err(Error::Read)?;
            let (found, _) = unpack(content, left, tree, data)?.finish().map_err(read_error)?;
            if found == expected { Ok(()) } else { Err(Error::Digest { expected, found }) }
        }
    }
}

/// Reads the archive, and gives the reader back at its end.
fn unpack<R: Read>(
    content: R,
    left: &mut u64,
    tree: &mut Tree,
    data: &mut BlockWriter<'_>,
) -> Result<R, Error> {
    let mut archive = Tarball::new(Budget { inner: content, left });
    while let Some(entry) = archive.next_entry()? {
        let is_pseudo_link = entry.kind == EntryKind::File && tree::is_pseudo_link(&entry.path);
        if is_pseudo_link || !tree.whiteout(&entry.path)? {
            add(entry, &mut archive, tree, data)?;
        }
    }
    let mut rest = archive.into_input();
    drain(&mut rest).map_err(read_error)?;
    Ok(rest.inner)
}

/// A reader that fails where more is read than is left.
#[derive(Debug)]
struct Budget<'a, R> {
    inner: R,
    left: &'a mut u64,
}

impl<R: Read> Read for Budget<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.inner.read(buffer)?;
        let max = MAX_UNPACKED >> 30;
        let failed = || io::Error::other(format!("the image's layers have more than {max} GiB"));
        *self.left = self.left.checked_sub(length as u64).ok_or_else(failed)?;
        Ok(length)
    }
}

fn add<R: Read>(
    entry: Entry,
    archive: &mut Tarball<R>,
    tree: &mut Tree,
    data: &mut BlockWriter<'_>,
) -> Result<(), Error> {
    let kind = match entry.kind {
        EntryKind::File => Kind::File { start: data.position(), size: entry.size },
        EntryKind::Directory => Kind::directory(),
        EntryKind::Symlink => Kind::Symlink(entry.link.into()),
        EntryKind::CharacterDevice => Kind::CharacterDevice(entry.device),
        EntryKind::BlockDevice => Kind::BlockDevice(entry.device),
        EntryKind::Fifo => Kind::Fifo,
        EntryKind::HardLink => return Ok(tree.link(&entry.path, &entry.link)?),
        EntryKind::Unknown(byte) => return Err(Error::Kind(Shown::new(&entry.path), byte.into())),
    };
    let is_file = matches!(kind, Kind::File { .. });
    tree.insert(&entry.path, entry.attributes, kind)?;
    if is_file {
        let end = data.position().saturating_add(entry.size).saturating_add(BLOCK);
        if end > MAX_DATA {
            return Err(Error::TooMuchData);
        }
        let mut at = 0;
        for segment in entry.segments {
            data.zeros(segment.offset - at).map_err(Error::Write)?;
            data.copy(archive, segment.length).map_err(|error| match error {
                CopyError::Read(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    Error::Archive(tarball::Error::Truncated)
                }
                CopyError::Read(error) => read_error(error),
                CopyError::Write(error) => Error::Write(error),
            })?;
            at = segment.offset + segment.length;
        }
        data.zeros(entry.size - at).map_err(Error::Write)?;
        data.pad().map_err(Error::Write)?;
    }
    Ok(())
}
