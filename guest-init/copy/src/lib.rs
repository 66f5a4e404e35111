//! Trees of files as a stream of bytes: both ends of `kindling cp`, of which the guest's is in init and the host's in
//! the command.
//!
//! ```text
//! entry     = kind: u8  length of the name: u8  mode: u16  user: u32  group: u32  nanoseconds: u32  seconds: i64  name
//! file      = entry  chunk*  and a chunk without bytes, whose offset is the file's size
//! link      = entry  chunk, whose bytes are where it leads
//! directory = entry  (file | link | directory)*  and an entry of kind `Leave`
//! chunk     = offset: u64  length: u32  bytes
//! ```
//! All integers are little-endian; the stream is one file, link or directory. A name is one component of a path, so
//! that no stream can name what lies elsewhere: the receiver is always in a directory that it holds open, and never
//! follows a link below where it began; where the sender is a guest, not even at the destination's last component. Both ends keep a buffer of [`CHUNK`] bytes and a descriptor for each directory
//! they are in, of which there are at most [`MAX_DEPTH`], and nothing else.
#![no_std]

extern crate alloc;

mod bytes;
mod entry;
mod failure;
mod receive;
mod send;
#[cfg(test)]
mod tests;

pub use failure::{Failure, What};
pub use receive::{Destination, Sender, receive};
pub use send::{Source, send};

/// The most bytes of a chunk: what a pipe holds.
pub const CHUNK: usize = 64 << 10;

/// Directories in one another. Each is a descriptor, of which a process usually may have 1024.
pub const MAX_DEPTH: usize = 512;
