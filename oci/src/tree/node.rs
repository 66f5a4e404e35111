//! The nodes of the tree: files of all types and their attributes.

use std::collections::BTreeMap;

/// The index of a node in the tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeId(pub(super) u32);

impl NodeId {
    /// The root directory.
    pub const ROOT: Self = Self(0);

    pub(crate) const fn index(self) -> usize {
        self.0 as usize
    }
}

/// A time since the Unix epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Time {
    /// Whole seconds.
    pub seconds: i64,
    /// Nanoseconds to add.
    pub nanoseconds: u32,
}

impl Time {
    /// Clamps a time to what the filesystem can hold.
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
    /// The full name, such as `user.colour`.
    pub name: Box<[u8]>,
    /// The value.
    pub value: Box<[u8]>,
}

/// The attributes of a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    /// The lower twelve bits of the mode.
    pub permissions: u16,
    /// The owner.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// The time of the last modification.
    pub mtime: Time,
    /// The extended attributes, in any order.
    pub xattrs: Vec<Xattr>,
}

/// The number of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    /// The major number, 12 bits.
    pub major: u32,
    /// The minor number, 20 bits.
    pub minor: u32,
}

impl Device {
    /// The encoding in inodes (`new_encode_dev` in linux/kdev_t.h).
    pub(crate) const fn encode(self) -> u32 {
        (self.minor & 0xff) | ((self.major & 0xfff) << 8) | ((self.minor & 0xf_ff00) << 12)
    }
}

/// The type of a file and its content.
#[derive(Debug)]
pub enum Kind {
    /// A directory.
    Directory(Directory),
    /// A regular file.
    File {
        /// The offset of the data in the image.
        start: u64,
        /// The length of the data.
        size: u64,
    },
    /// A symbolic link and its target.
    Symlink(Box<[u8]>),
    /// A character device.
    CharacterDevice(Device),
    /// A block device.
    BlockDevice(Device),
    /// A named pipe.
    Fifo,
}

/// A directory.
#[derive(Debug)]
pub struct Directory {
    pub(super) parent: NodeId,
    pub(super) names: BTreeMap<Box<[u8]>, DirEntry>,
    /// The last layer that hid the entries of the layers below it.
    pub(super) cleared: u32,
}

/// A directory entry: a node and the last layer that set or kept it.
#[derive(Clone, Copy, Debug)]
pub(super) struct DirEntry {
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

/// A file of any type.
#[derive(Debug)]
pub struct Node {
    /// Owner, permissions, time and extended attributes.
    pub attributes: Attributes,
    /// The type and the content.
    pub kind: Kind,
    /// The link count, counted as in Linux for directories. Zero if the file was replaced or deleted.
    pub links: u32,
}

/// A directory that no layer has an entry for, only files below it.
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
