//! The root filesystem of trial guests: an empty directory.
//!
//! The file of a pre-booted kernel serves all later guests of its size, whatever their image. If trial guests mounted the
//! image that is about to run, its author could attack a guest that decides what is in that file.
//!
//! Init creates the directories that it mounts over, as for an image without them, so that the pages that it writes then are
//! copied in advance too.

use std::fs::File;
use std::io::{self, Write};

/// Size of a block, and of the filesystem, in bytes.
const BLOCK: usize = 4096;
/// Size of the disk in bytes: large enough that a guest reads ahead as much as of an image's disk, and so writes to the same
/// pages.
const DISK: u64 = 1 << 20;
/// Place of the superblock in bytes (`EROFS_SUPER_OFFSET` in fs/erofs/erofs_fs.h).
const SUPERBLOCK: usize = 1024;
const MAGIC: u32 = 0xe0f5_e1e2;
/// Place of the root directory's inode in bytes: the first one after the superblock.
const ROOT: usize = SUPERBLOCK + 128;
/// The number of the inode: its place, in units of 32 bytes.
const ROOT_NUMBER: u8 = 36;
/// A directory whose entries follow its inode (`EROFS_INODE_FLAT_INLINE`).
const FLAT_INLINE: u8 = 2 << 1;
const DIRECTORY_MODE: u16 = 0o040_755;
/// The type of a directory in an entry (`EROFS_FT_DIR`).
const DIRECTORY_TYPE: u8 = 2;
/// Length of a directory entry in bytes, without the name.
const ENTRY: usize = 12;
/// Length of the directory in bytes: the entries `.` and `..`.
const DIRECTORY_LEN: u8 = 2 * 12 + 3;

/// A file in memory with the filesystem (EROFS), which all guest kernels support.
///
/// # Errors
/// When the host has no descriptor or memory left.
pub(crate) fn file() -> io::Result<File> {
    let mut file = File::from(rustix::fs::memfd_create("trial root", rustix::fs::MemfdFlags::CLOEXEC)?);
    file.write_all(&filesystem())?;
    file.set_len(DISK)?;
    Ok(file)
}

fn filesystem() -> [u8; BLOCK] {
    let mut bytes = [0; BLOCK];
    // Without checksums and compression.
    let superblock = &mut bytes[SUPERBLOCK..];
    superblock[..4].copy_from_slice(&MAGIC.to_le_bytes());
    // The logarithm of the block size, the root directory, and the numbers of inodes and blocks.
    (superblock[12], superblock[14], superblock[16], superblock[36]) = (12, ROOT_NUMBER, 1, 1);
    let inode = &mut bytes[ROOT..];
    inode[0] = FLAT_INLINE;
    inode[4..6].copy_from_slice(&DIRECTORY_MODE.to_le_bytes());
    // The numbers of links and of bytes.
    (inode[6], inode[8]) = (2, DIRECTORY_LEN);
    // Each entry: number of the inode, place of the name, and type. The names follow.
    let entries = &mut inode[32..];
    (entries[0], entries[8], entries[10]) = (ROOT_NUMBER, 2 * 12, DIRECTORY_TYPE);
    (entries[ENTRY], entries[ENTRY + 8], entries[ENTRY + 10]) = (ROOT_NUMBER, 2 * 12 + 1, DIRECTORY_TYPE);
    entries[2 * ENTRY..2 * ENTRY + 3].copy_from_slice(b"...");
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fsck_finds_no_fault() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("root.erofs");
        std::fs::write(&path, filesystem()).unwrap();
        let output = std::process::Command::new("fsck.erofs").arg("--extract").arg(&path).output();
        let output = output.expect("fsck.erofs of erofs-utils, which `cargo xtask test` installs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}
