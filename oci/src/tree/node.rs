//! A file of any kind.

use std::collections::BTreeMap;

/// A file's number in the tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeId(pub(super) u32);

impl NodeId {
    /// The root directory.
    pub const ROOT: Self = Self(0);

    pub(crate) const fn index(self) -> usize {
        self.0 as usize
    }
}

/// A time since 1970.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Time {
    /// Whole seconds.
    pub seconds: i64,
    /// The rest.
    pub nanoseconds: u32,
}

impl Time {
    /// A time that may be beyond what a filesystem holds: then the first or the last that it does.
    pub(crate) fn clamped(seconds: i128, nanoseconds: u32) -> Self {
        match i64::try_from(seconds) {
            Ok(seconds) => Self { seconds, nanoseconds },
            Err(_) => Self { seconds: if seconds < 0 { i64::MIN } else { i64::MAX }, nanoseconds: 0 },
        }
    }
}

/// An extended attribute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Xattr {
    /// `user.colour`
    pub name: Box<[u8]>,
    /// Any bytes.
    pub value: Box<[u8]>,
}

/// What every file has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    /// The mode's lower twelve bits.
    pub permissions: u16,
    /// The owner.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// When the content changed.
    pub mtime: Time,
    /// In any order.
    pub xattrs: Vec<Xattr>,
}

/// A device's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    /// The driver: 12 bits.
    pub major: u32,
    /// The device: 20 bits.
    pub minor: u32,
}

impl Device {
    /// As filesystems write it (`new_encode_dev` of linux/kdev_t.h).
    pub(crate) const fn encode(self) -> u32 {
        (self.minor & 0xff) | ((self.major & 0xfff) << 8) | ((self.minor & 0xf_ff00) << 12)
    }
}

/// What a file is.
#[derive(Debug)]
pub enum Kind {
    /// Names.
    Directory(Directory),
    /// Data, from a byte of the image on.
    File {
        /// Where it begins.
        start: u64,
        /// Its length.
        size: u64,
    },
    /// Another path.
    Symlink(Box<[u8]>),
    /// A device of bytes.
    CharacterDevice(Device),
    /// A device of blocks.
    BlockDevice(Device),
    /// A named pipe.
    Fifo,
}

/// A directory's names.
#[derive(Debug)]
pub struct Directory {
    pub(super) parent: NodeId,
    pub(super) names: BTreeMap<Box<[u8]>, Name>,
    /// The last layer that hid what those below it have here.
    pub(super) cleared: u32,
}

/// A name and the last layer that said something about it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Name {
    pub(super) node: NodeId,
    pub(super) layer: u32,
}

impl Directory {
    const fn below(parent: NodeId) -> Self {
        Self { parent, names: BTreeMap::new(), cleared: 0 }
    }

    pub(crate) const fn parent(&self) -> NodeId {
        self.parent
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &[u8]> {
        self.names.keys().map(|name| &**name)
    }
}

/// A file of any kind.
#[derive(Debug)]
pub struct Node {
    /// Owner, permissions, time.
    pub attributes: Attributes,
    /// What it is.
    pub kind: Kind,
    /// Its names; of a directory, what Linux counts. None where it was replaced or deleted.
    pub links: u32,
}

/// A directory of which no layer says more than its name.
pub(super) fn empty_directory(parent: NodeId) -> Node {
    let attributes = Attributes { permissions: 0o755, ..Attributes::default() };
    Node { attributes, kind: Kind::Directory(Directory::below(parent)), links: 0 }
}

impl Kind {
    /// An empty directory.
    #[must_use]
    pub const fn directory() -> Self {
        Self::Directory(Directory::below(NodeId::ROOT))
    }
}
