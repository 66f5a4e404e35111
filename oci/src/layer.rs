//! Applies a layer: adds its files to the tree and writes their data to the filesystem.

use crate::compression::decompress;
use crate::digest::{Digest, HashingReader, drain};
use crate::erofs::{BLOCK, BlockWriter, CopyError};
use crate::read_ahead;
use crate::registry::DownloadInterrupted;
use crate::tarball::{self, Entry, EntryKind, Tarball};
use crate::tree::{self, Excerpt, Kind, Tree};
use std::io::{self, Read};
use std::thread;

/// Maximum size of all files of an image, in bytes. Zeroes take no disk space, so the disk alone does not limit it.
pub const MAX_DATA: u64 = 1 << 40;

/// Maximum size of all layers of an image after decompression, in bytes. A few bytes of Zstandard can expand to any
/// number of bytes, all of which have to be read.
pub const MAX_UNPACKED: u64 = 256 << 30;

/// How a layer is verified.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Check {
    /// By the digest and the size of the blob as it is stored.
    Blob(Digest, u64),
    /// By the digest of the uncompressed archive.
    DiffId(Digest),
}

/// Why a layer cannot be applied.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The blob cannot be read.
    #[error("cannot read the layer")]
    Read(#[source] io::Error),
    /// The blob cannot be decompressed.
    #[error("damaged or truncated: {0}")]
    Damaged(io::Error),
    /// The digest differs from the manifest's or the configuration's.
    #[error("the digest is {found}, expected {expected}")]
    Digest {
        /// The digest in the manifest or the configuration.
        expected: Digest,
        /// The digest of the layer.
        found: Digest,
    },
    /// The size differs from the manifest's.
    #[error("the size is {found} bytes, expected {expected}")]
    Size {
        /// The size in the manifest.
        expected: u64,
        /// The size of the blob, of which at most one byte too many is read.
        found: u64,
    },
    /// The archive is damaged.
    #[error(transparent)]
    Archive(tarball::Error),
    /// The filesystem cannot hold an entry.
    #[error(transparent)]
    Tree(#[from] tree::Error),
    /// An entry of an unknown type.
    #[error("{0}: unknown tar entry type {1:?}")]
    Kind(Excerpt, char),
    /// The files exceed `MAX_DATA`.
    #[error("the image's files have more than {max} GiB", max = MAX_DATA >> 30)]
    TooMuchData,
    /// The filesystem cannot be written.
    #[error("cannot write the filesystem")]
    Write(#[source] io::Error),
}

impl Error {
    /// Whether the image is at fault and not this machine or the network.
    pub(crate) fn is_image_error(&self) -> bool {
        !matches!(self, Self::Read(_) | Self::Write(_))
    }
}

/// Tells read errors of the system and the network from those of the decompressor.
fn read_error(error: io::Error) -> Error {
    let is_interrupted = error.get_ref().is_some_and(|inner| inner.is::<DownloadInterrupted>());
    if error.raw_os_error().is_some() || is_interrupted { Error::Read(error) } else { Error::Damaged(error) }
}

impl From<tarball::Error> for Error {
    fn from(error: tarball::Error) -> Self {
        match error {
            tarball::Error::Read(error) => read_error(error),
            error => Self::Archive(error),
        }
    }
}

/// Adds a layer to the tree and its data to the filesystem. `left` is the rest of `MAX_UNPACKED`.
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
            // Decompression takes longer than all the rest, so it has its own thread, as hashing does.
            let (result, blob) = thread::scope(|scope| -> io::Result<_> {
                let (sender, mut content) = read_ahead::channel();
                let reading = thread::Builder::new().spawn_scoped(scope, move || {
                    // One byte more shows that the blob is too long.
                    let mut blob = HashingReader::new(blob.take(size.saturating_add(1)))?;
                    sender.send_all(decompress(&mut blob));
                    Ok(blob)
                })?;
                let result = unpack(&mut content, left, tree, data).map(drop);
                // Otherwise the thread would wait for a reader after an error in the archive.
                drop(content);
                Ok((result, reading.join()))
            })
            .map_err(Error::Read)?;
            let blob =
                blob.unwrap_or_else(|_| Err(io::Error::other("the decompressing thread has panicked")));
            let blob = blob.map_err(Error::Read)?;
            if let Err(error) = &result
                && !error.is_image_error()
            {
                return result;
            }
            // A wrong size or digest is reported before an error in the archive, which is its consequence.
            let (found, length) = blob.finish().map_err(Error::Read)?;
            if length != size {
                return Err(Error::Size { expected: size, found: length });
            }
            if found != expected {
                return Err(Error::Digest { expected, found });
            }
            result
        }
        Check::DiffId(expected) => {
            let content = HashingReader::new(decompress(blob).map_err(read_error)?).map_err(Error::Read)?;
            let (found, _) = unpack(content, left, tree, data)?.finish().map_err(read_error)?;
            if found == expected { Ok(()) } else { Err(Error::Digest { expected, found }) }
        }
    }
}

/// Reads the archive to its end and returns the reader.
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

/// A reader that fails after `left` bytes.
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
        EntryKind::Unknown(byte) => return Err(Error::Kind(Excerpt::new(&entry.path), byte.into())),
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
