//! Limits of the tree, and the errors of entries that it cannot hold.

use std::fmt::{self, Display, Formatter};

/// Maximum length of a name (NAME_MAX), and of a path or link target (PATH_MAX), in bytes.
pub(super) const MAX_NAME: usize = 255;
pub(super) const MAX_PATH: usize = 4096;
/// Maximum number of symbolic links that are followed in a path (MAXSYMLINKS in Linux).
pub(super) const MAX_LINKS: usize = 40;
/// Maximum size of a file's extended attributes, in bytes; Linux lists no more.
pub(super) const MAX_ATTRIBUTES: u64 = 64 << 10;
/// Estimated memory in bytes: of a file, of each of its names besides the bytes of the name (which exist twice while
/// the filesystem is written), of a directory's map, and of an extended attribute.
pub(super) const NODE_COST: usize = 200;
pub(super) const NAME_COST: usize = 160;
pub(super) const DIRECTORY_COST: usize = 320;
pub(super) const ATTRIBUTE_COST: usize = 128;
/// Maximum memory for all names, link targets and attributes, in bytes.
pub(super) const MAX_METADATA: usize = 1 << 30;
/// Maximum number of names that are looked up to resolve the paths of all layers. Large distributions need a hundredth
/// of that; chains of symbolic links multiply it.
pub(super) const MAX_LOOKUPS: usize = 50_000_000;

/// Why the tree cannot hold an entry.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The paths exceed `MAX_LOOKUPS`.
    #[error("{0}: resolving the paths of the image's layers takes more than {max} million lookups", max = MAX_LOOKUPS / 1_000_000)]
    TooManyLookups(Excerpt),
    /// Names and attributes exceed `MAX_METADATA`.
    #[error("the names and attributes of the image's files take more than {max} MiB of memory", max = MAX_METADATA >> 20)]
    TooMuchMetadata,
    /// A name or path that is too long.
    #[error("{0}: the name is longer than {MAX_NAME} bytes, or the path than {MAX_PATH}")]
    LongName(Excerpt),
    /// A name or link target with a NUL byte.
    #[error("{0}: the name contains a NUL byte")]
    ZeroByte(Excerpt),
    /// A symbolic link whose target is empty or too long.
    #[error("{0}: the target of the symbolic link has {1} bytes; it must have 1 to {max}", max = MAX_PATH - 1)]
    LinkTarget(Excerpt, usize),
    /// A path with too many symbolic links.
    #[error("{0}: more than {MAX_LINKS} symbolic links in the path")]
    TooManyLinks(Excerpt),
    /// A component of the path is not a directory.
    #[error("{0}: a component of the path is not a directory")]
    NotADirectory(Excerpt),
    /// The root would be replaced by another file.
    #[error("{0}: the root must be a directory")]
    Root(Excerpt),
    /// A hard link to a missing file or to a directory.
    #[error("{0}: a hard link to {1}, which is not a file of the image")]
    HardLink(Excerpt, Excerpt),
    /// A file below a whiteout.
    #[error("{0}: a component of the path is a whiteout, which only hides a file of lower layers")]
    BelowWhiteout(Excerpt),
    /// A whiteout of no name, `.` or `..`.
    #[error("{0}: a whiteout without a file name")]
    Whiteout(Excerpt),
    /// Extended attributes exceed `MAX_ATTRIBUTES`, or a value 64 KiB.
    #[error("{0}: its extended attributes are larger than {max} KiB", max = MAX_ATTRIBUTES >> 10)]
    LongAttributes(Excerpt),
}

/// The beginning of a name or record, escaped for messages.
#[derive(Debug)]
pub struct Excerpt(Box<[u8]>);

impl Excerpt {
    pub(crate) fn new(name: &[u8]) -> Self {
        const MAX_LEN: usize = 200;
        Self(name[..name.len().min(MAX_LEN)].into())
    }
}

impl Display for Excerpt {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}", self.0.escape_ascii())
    }
}
