//! Why an archive cannot be read.

use crate::tree::Shown;
use std::io;

/// Bytes of an extended header. A file's attributes and two paths need 80 KiB.
pub(super) const MAX_EXTENSION: u64 = 1 << 20;

/// An archive cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The input cannot be read.
    #[error(transparent)]
    Read(#[from] io::Error),
    /// The end is missing.
    #[error("the archive ends in the middle of a file")]
    Truncated,
    /// Not a tar archive, or a damaged one.
    #[error("byte {0} begins no file: not a tar archive, or a damaged one")]
    Checksum(u64),
    /// A record of zeroes, of which an archive has two at its end, with something behind it.
    #[error(
        "byte {0}: a single record of zeroes in the middle of the archive, which is damaged or written wrong"
    )]
    LoneZeroes(u64),
    /// A field of a header.
    #[error("{0}: {1} in its header is not a number that it can be")]
    Number(Shown, &'static str),
    /// An extended header that is too large.
    #[error("byte {0}: an extended header has more than {max} KiB", max = MAX_EXTENSION >> 10)]
    Extension(u64),
    /// An extended header that no file follows.
    #[error("byte {0}: an extended header at the end of the archive, without the file that it describes")]
    NoFile(u64),
    /// A record of an extended header.
    #[error("byte {0}: an extended header's record is damaged, or its value is none that it can have: {1}")]
    Record(u64, Shown),
    /// A map of a sparse file.
    #[error("{0}: the map of its holes is damaged")]
    Sparse(Shown),
}
