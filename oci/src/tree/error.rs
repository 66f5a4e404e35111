//! What a tree cannot hold.

use std::fmt::{self, Display, Formatter};

/// Bytes of a name (NAME_MAX), of a path in a layer, and of a link's target (PATH_MAX).
pub(super) const MAX_NAME: usize = 255;
pub(super) const MAX_PATH: usize = 4096;
/// Symbolic links on the way to a name, as in Linux.
pub(super) const MAX_LINKS: usize = 40;
/// Bytes of a file's extended attributes; Linux lists no more.
pub(super) const MAX_ATTRIBUTES: u64 = 64 << 10;
/// Bytes of memory that a file takes, and each of its names beside the name's own bytes, which are there twice while
/// the filesystem is written. Beside a file, a directory has the nodes of its map, an attribute its list.
pub(super) const NODE_COST: usize = 200;
pub(super) const NAME_COST: usize = 160;
pub(super) const DIRECTORY_COST: usize = 320;
pub(super) const ATTRIBUTE_COST: usize = 128;
/// Memory for all names, link targets and attributes.
pub(super) const MAX_METADATA: usize = 1 << 30;
/// Names of directories and links that lead to the names of an image's layers. Large distributions have a hundredth
/// of it; links to links multiply it.
pub(super) const MAX_STEPS: usize = 50_000_000;

/// A tree cannot take an entry.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Links to links, for every name.
    #[error("{0}: the names of the image's layers lead over more than {max} million directories and links", max = MAX_STEPS / 1_000_000)]
    TooManySteps(Shown),
    /// Too much of everything.
    #[error("names and attributes of the image's files take more than {max} MiB", max = MAX_METADATA >> 20)]
    TooMuchMetadata,
    /// A name no filesystem holds.
    #[error("{0}: the name is longer than {MAX_NAME} bytes, or the path than {MAX_PATH}")]
    LongName(Shown),
    /// A name with a byte that no name has.
    #[error("{0}: the name has a zero byte")]
    ZeroByte(Shown),
    /// A symbolic link that leads nowhere, or is too long.
    #[error("{0}: the symbolic link's target has {1} bytes; 1 to {max} are possible", max = MAX_PATH - 1)]
    LinkTarget(Shown, usize),
    /// Links to links.
    #[error("{0}: more than {MAX_LINKS} symbolic links lead to it")]
    TooManyLinks(Shown),
    /// A file where a directory has to be.
    #[error("{0}: it would be below something that is not a directory")]
    NotADirectory(Shown),
    /// The root can only be a directory.
    #[error("{0}: the root is a directory")]
    Root(Shown),
    /// A further name of what is not there.
    #[error("{0}: a hard link to {1}, which is not a file of the image")]
    HardLink(Shown, Shown),
    /// A file in a directory that is a whiteout.
    #[error("{0}: it would be below a whiteout, a name that only hides what lower layers have")]
    BelowWhiteout(Shown),
    /// A whiteout that names nothing, or its directory.
    #[error("{0}: a whiteout that names no file")]
    Whiteout(Shown),
    /// Attributes beyond what Linux shows.
    #[error("{0}: its extended attributes have more than {max} KiB", max = MAX_ATTRIBUTES >> 10)]
    LongAttributes(Shown),
}

/// A name, readable, and cut where it is long.
#[derive(Debug)]
pub struct Shown(Box<[u8]>);

impl Shown {
    pub(crate) fn new(name: &[u8]) -> Self {
        const LONGEST: usize = 200;
        Self(name[..name.len().min(LONGEST)].into())
    }
}

impl Display for Shown {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}", self.0.escape_ascii())
    }
}
