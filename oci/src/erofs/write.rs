//! Writes the metadata of a tree after the data of the files: first every inode is assigned a position, then all are
//! written.

use super::BlockWriter;
use super::directory::{self, Entry};
use super::format::{BLOCK, DataLayout, INODE_SIZE, Inode, SLOT, SUPERBLOCK_OFFSET, Superblock};
use super::xattr;
use crate::tree::{Kind, Node, NodeId, Tree};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Why a filesystem cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Block numbers exceed 32 bits.
    #[error("the image has {0} bytes, more than the 16 TiB of the largest filesystem")]
    TooLarge(u64),
    /// The file cannot be written.
    #[error("cannot write the filesystem")]
    Write(#[source] io::Error),
}

/// The position of an inode and its content.
#[derive(Clone, Copy, Debug)]
struct InodePosition {
    /// The offset from the first block of inodes. No inode is at 0, since readers of directories take the inode number
    /// 0 for a deleted entry.
    at: u64,
    /// The size of a directory or link in bytes.
    content: u64,
    layout: DataLayout,
    /// The first block of the content, relative to the first block of all directories and links.
    block: u64,
}

const UNPLACED: InodePosition = InodePosition { at: 0, content: 0, layout: DataLayout::Plain, block: 0 };

impl InodePosition {
    const fn nid(self) -> u64 {
        self.at / SLOT
    }
}

/// Writes the metadata of the tree from `data_end` on, and the superblock. Returns the size of the filesystem.
pub(crate) fn write(tree: &Tree, file: &File, data_end: u64, uuid: [u8; 16]) -> Result<u64, Error> {
    let plan = Plan::of(tree);
    let inodes_at = data_end + plan.blocks * BLOCK;
    let end = (inodes_at + plan.end).next_multiple_of(BLOCK);
    let block = |at: u64| u32::try_from(at / BLOCK).map_err(|_| Error::TooLarge(end));
    let superblock = Superblock {
        root: u16::try_from(plan.position(NodeId::ROOT).nid()).map_err(|_| Error::TooLarge(end))?,
        inodes: plan.order.len() as u64,
        blocks: block(end)?,
        meta: block(inodes_at)?,
        uuid,
    };
    plan.write(tree, file, data_end, inodes_at)
        .and_then(|()| file.write_all_at(&superblock.encode(), SUPERBLOCK_OFFSET))
        .and_then(|()| file.set_len(end))
        .map_err(Error::Write)?;
    Ok(end)
}

#[derive(Debug)]
struct Plan {
    positions: Vec<InodePosition>,
    /// The inodes in the order of the file, with the children of a directory next to each other.
    order: Vec<NodeId>,
    /// The size of all inodes in bytes.
    end: u64,
    /// The number of blocks of directories and links.
    blocks: u64,
}

impl Plan {
    fn of(tree: &Tree) -> Self {
        let mut plan =
            Self { positions: vec![UNPLACED; tree.len()], order: Vec::new(), end: INODE_SIZE, blocks: 0 };
        plan.add(NodeId::ROOT, tree.node(NodeId::ROOT));
        let mut folders = vec![NodeId::ROOT];
        while let Some(folder) = folders.pop() {
            for (_, id) in tree.children(folder) {
                let node = tree.node(id);
                if plan.position(id).at == 0 {
                    plan.add(id, node);
                    if matches!(node.kind, Kind::Directory(_)) {
                        folders.push(id);
                    }
                }
            }
        }
        plan
    }

    fn position(&self, id: NodeId) -> InodePosition {
        self.positions[id.index()]
    }

    fn add(&mut self, id: NodeId, node: &Node) {
        let content = match &node.kind {
            Kind::Directory(folder) => directory::size(with_dots(folder.names()).map(<[u8]>::len)),
            Kind::Symlink(target) => target.len() as u64,
            _ => 0,
        };
        let body = INODE_SIZE + xattr::size(&node.attributes.xattrs);
        let tail = content % BLOCK;
        // The kernel requires that the tail after the inode does not cross a block boundary.
        let is_inline = tail > 0 && body + tail <= BLOCK;
        let mut at = self.end.next_multiple_of(INODE_SIZE);
        if is_inline && (at + body) / BLOCK != (at + body + tail - 1) / BLOCK {
            at = at.next_multiple_of(BLOCK);
        }
        let (layout, inline, blocks) = if is_inline {
            (DataLayout::Inline, tail, content / BLOCK)
        } else {
            (DataLayout::Plain, 0, content.div_ceil(BLOCK))
        };
        self.positions[id.index()] = InodePosition { at, content, layout, block: self.blocks };
        self.order.push(id);
        self.end = at + body + inline;
        self.blocks += blocks;
    }

    fn write(&self, tree: &Tree, file: &File, blocks_at: u64, inodes_at: u64) -> io::Result<()> {
        let mut plain = BlockWriter::new(file, blocks_at);
        let mut inodes = BlockWriter::new(file, inodes_at);
        for (ordinal, &id) in (1..).zip(&self.order) {
            let (node, position) = (tree.node(id), self.position(id));
            let content = match &node.kind {
                Kind::Directory(folder) => directory::encode(&self.entries(tree, id, folder.parent())),
                Kind::Symlink(target) => target.to_vec(),
                _ => Vec::new(),
            };
            let whole = match position.layout {
                DataLayout::Plain => content.len(),
                DataLayout::Inline => content.len() - content.len() % super::format::BLOCK_SIZE,
            };
            let (blocks, tail) = content.split_at(whole);
            plain.push(blocks)?;
            plain.pad()?;
            inodes.zeros(inodes_at + position.at - inodes.position())?;
            inodes.push(&inode(node, position, ordinal, blocks_at).encode())?;
            inodes.push(&xattr::encode(&node.attributes.xattrs))?;
            inodes.push(tail)?;
        }
        plain.finish()?;
        inodes.finish()?;
        Ok(())
    }

    /// The sorted entries of a directory, with `.` and `..`.
    fn entries<'a>(&self, tree: &'a Tree, folder: NodeId, parent: NodeId) -> Vec<Entry<'a>> {
        let dots: [(&[u8], NodeId); 2] = [(b".", folder), (b"..", parent)];
        let mut entries: Vec<_> = tree
            .children(folder)
            .chain(dots)
            .map(|(name, id)| Entry {
                name,
                nid: self.position(id).nid(),
                file_type: file_type(&tree.node(id).kind),
            })
            .collect();
        entries.sort_unstable_by_key(|entry| entry.name);
        entries
    }
}

/// Merges `.` and `..` into the sorted names of a directory.
fn with_dots<'a>(names: impl Iterator<Item = &'a [u8]>) -> impl Iterator<Item = &'a [u8]> {
    let mut names = names.peekable();
    let mut dots = [&b"."[..], b".."].into_iter().peekable();
    std::iter::from_fn(move || match (names.peek(), dots.peek()) {
        (Some(name), Some(dot)) if name < dot => names.next(),
        (_, Some(_)) => dots.next(),
        _ => names.next(),
    })
}

fn inode(node: &Node, position: InodePosition, ordinal: u32, blocks_at: u64) -> Inode {
    let first_block = |at: u64| u32::try_from(at / BLOCK).unwrap_or(u32::MAX);
    let (size, at) = match node.kind {
        Kind::File { size: 0, .. } => (0, 0),
        Kind::File { start, size } => (size, first_block(start)),
        Kind::Directory(_) | Kind::Symlink(_) => {
            (position.content, first_block(blocks_at + position.block * BLOCK))
        }
        Kind::CharacterDevice(number) | Kind::BlockDevice(number) => (0, number.encode()),
        Kind::Fifo => (0, 0),
    };
    let attributes = &node.attributes;
    Inode {
        layout: position.layout,
        xattrs: xattr::size(&attributes.xattrs),
        mode: format_bits(&node.kind) | attributes.permissions,
        size,
        block_or_device: at,
        ino: ordinal,
        uid: attributes.uid,
        gid: attributes.gid,
        seconds: attributes.mtime.seconds,
        nanoseconds: attributes.mtime.nanoseconds,
        links: node.links,
    }
}

/// The file type bits of a mode (S_IFMT in stat.h).
const fn format_bits(kind: &Kind) -> u16 {
    match kind {
        Kind::Fifo => 0o010_000,
        Kind::CharacterDevice(_) => 0o020_000,
        Kind::Directory(_) => 0o040_000,
        Kind::BlockDevice(_) => 0o060_000,
        Kind::File { .. } => 0o100_000,
        Kind::Symlink(_) => 0o120_000,
    }
}

/// The file type in a directory entry (EROFS_FT_*).
const fn file_type(kind: &Kind) -> u8 {
    match kind {
        Kind::File { .. } => 1,
        Kind::Directory(_) => 2,
        Kind::CharacterDevice(_) => 3,
        Kind::BlockDevice(_) => 4,
        Kind::Fifo => 5,
        Kind::Symlink(_) => 7,
    }
}
