//! A writer for EROFS, the read-only filesystem of Linux, without compression (fs/erofs/erofs_fs.h in the kernel).
//!
//! The data of files comes first, in the order of the layers. Each file starts at a block boundary, so that a guest
//! which maps the filesystem as memory (DAX) can use its pages in place. The metadata comes last, when all names are
//! known:
//!
//! ```text
//! block 0      | superblock at byte 1024
//! data         | files, each from the start of a block
//! meta (plain) | whole blocks of directories, long symbolic links
//! meta (inode) | inodes, each followed by its extended attributes and the tail of its directory or link
//! ```

mod blocks;
mod directory;
mod format;
mod write;
mod xattr;

pub(crate) use blocks::{BlockWriter, CopyError};
pub(crate) use format::BLOCK;
pub(crate) use write::{Error, write};
pub(crate) use xattr::{is_known as is_known_attribute, size as attributes_size};
