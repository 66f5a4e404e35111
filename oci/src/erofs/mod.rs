//! Writes EROFS, Linux' read-only filesystem, uncompressed (the kernel's fs/erofs/erofs_fs.h).
//!
//! Files come first, as they arrive, each at a block of its own, so that a guest to which the filesystem is memory
//! can use their pages where they are. What describes them comes last, when all names are known:
//!
//! ```text
//! block 0      | superblock at byte 1024
//! data         | files, each from the start of a block
//! meta (plain) | directories' whole blocks, long symbolic links
//! meta (inode) | inodes, each with its extended attributes and the end of its directory or link behind it
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
