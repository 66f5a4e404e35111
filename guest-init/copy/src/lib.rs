//! Trees of files as a stream of bytes: both sides of `kindling cp`. Init contains the guest's side, the command the
//! host's side.
//!
//! ```text
//! entry     = kind: u8  length of the name: u8  mode: u16  user: u32  group: u32  nanoseconds: u32  seconds: i64  name
//! file      = entry  chunk*  and an empty chunk, whose offset is the file's size
//! link      = entry  chunk, which contains the target
//! directory = entry  (file | link | directory)*  and an entry of kind `EndOfDirectory`
//! chunk     = offset: u64  length: u32  bytes
//! ```
//! All integers are little-endian. The stream is one file, symbolic link or directory.
//!
//! A stream cannot write outside the destination: a name is one component of a path, the receiver opens everything
//! relative to a directory that it holds open, and it follows no symbolic link below the destination. If the sender is
//! a guest, it does not follow a link at the destination's last component either, nor one in the destination's path that
//! leads out of the directory in which it stands.
//!
//! Each side holds a buffer of [`CHUNK`] bytes and one descriptor for each directory on the path to the current entry,
//! at most [`MAX_DEPTH`].
#![no_std]

extern crate alloc;

mod bytes;
mod directory;
mod entry;
mod failure;
mod receive;
mod send;
#[cfg(test)]
mod tests;

pub use failure::{Failure, FailureKind};
pub use receive::{Destination, Sender, receive};
pub use send::{Source, send};

/// Maximum length of a chunk in bytes: the capacity of a pipe.
pub const CHUNK: usize = 64 << 10;

/// Maximum depth of nested directories. Each takes a descriptor, and the usual limit of a process is 1024.
pub const MAX_DEPTH: usize = 512;
