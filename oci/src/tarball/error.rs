//! The error of the archive reader.

use crate::tree::Excerpt;
use std::io;

/// Maximum size of an extended header, in bytes. Extended attributes and two paths of a file need 80 KiB.
pub(super) const MAX_EXTENSION: u64 = 1 << 20;

/// Why an archive cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The input cannot be read.
    #[error(transparent)]
    Read(#[from] io::Error),
    /// The archive is truncated.
    #[error("the archive ends in the middle of a file")]
    Truncated,
    /// The checksum of a header is wrong.
    #[error("byte {0}: no valid header; not a tar archive, or a damaged one")]
    Checksum(u64),
    /// A single record of zeroes, followed by something else. The end of an archive has two of them.
    #[error(
        "byte {0}: a single record of zeroes in the middle of the archive, which is damaged or malformed"
    )]
    LoneZeroes(u64),
    /// A number in a header is invalid.
    #[error("{0}: invalid {1} in its header")]
    Number(Excerpt, &'static str),
    /// An extended header that is too large.
    #[error("byte {0}: an extended header is larger than {max} KiB", max = MAX_EXTENSION >> 10)]
    Extension(u64),
    /// An extended header at the end of the archive.
    #[error("byte {0}: an extended header at the end of the archive, without the file that it describes")]
    NoFile(u64),
    /// A record of an extended header is invalid.
    #[error("byte {0}: invalid record in an extended header: {1}")]
    Record(u64, Excerpt),
    /// The map of a sparse file is invalid.
    #[error("{0}: invalid map of a sparse file")]
    Sparse(Excerpt),
}
