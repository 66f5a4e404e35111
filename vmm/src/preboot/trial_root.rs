//! The root filesystem of trial guests: directories without files.
//!
//! The file of a pre-booted kernel serves all later guests of its size, whatever their image. If trial guests mounted the
//! image that is about to run, its author could attack a guest that decides what is in that file.

use std::fs::File;
use std::io::{self, Write};

/// The directories in the root that images have, and that init mounts over.
const DIRECTORIES: [&str; 6] = ["dev", "etc", "proc", "run", "sys", "tmp"];

/// Size of a block, and of the filesystem, in bytes.
const BLOCK: usize = 4096;
/// Place of the superblock in bytes (`EROFS_SUPER_OFFSET` in fs/erofs/erofs_fs.h).
const SUPERBLOCK: usize = 1024;
const MAGIC: u32 = 0xe0f5_e1e2;
/// Inodes are in slots of this size in bytes, and have the numbers of their slots.
const SLOT: usize = 32;
/// Slot of the root directory: the first one after the superblock.
const ROOT: usize = (SUPERBLOCK + 128) / SLOT;
/// Slots of another directory: its inode, and its two entries.
const DIRECTORY_SLOTS: usize = 2;
/// Slots of the root directory.
const ROOT_SLOTS: usize = 6;
/// Length of a directory entry in bytes, without the name.
const ENTRY: usize = 12;

/// A file in memory with the filesystem (EROFS), which all guest kernels support.
///
/// # Errors
/// When the host has no descriptor or memory left.
pub(crate) fn file() -> io::Result<File> {
    let mut file = File::from(rustix::fs::memfd_create("trial root", rustix::fs::MemfdFlags::CLOEXEC)?);
    file.write_all(&filesystem())?;
    Ok(file)
}

fn filesystem() -> [u8; BLOCK] {
    let mut bytes = [0; BLOCK];
    let superblock = &mut bytes[SUPERBLOCK..];
    put(superblock, 0, &MAGIC.to_le_bytes());
    // Without checksums and compression: logarithm of the block size, root directory, number of inodes and of blocks.
    superblock[12] = u8::try_from(BLOCK.trailing_zeros()).unwrap_or_default();
    put(superblock, 14, &number::<2>(ROOT));
    put(superblock, 16, &number::<8>(1 + DIRECTORIES.len()));
    put(superblock, 36, &number::<4>(1));
    let slots = |index: usize| ROOT + ROOT_SLOTS + index * DIRECTORY_SLOTS;
    let children = DIRECTORIES.iter().enumerate().map(|(index, name)| (*name, slots(index)));
    directory(&mut bytes, ROOT, ROOT, &children.collect::<Vec<_>>());
    for index in 0..DIRECTORIES.len() {
        directory(&mut bytes, slots(index), ROOT, &[]);
    }
    bytes
}

/// Writes a directory whose entries follow its inode (`EROFS_INODE_FLAT_INLINE`).
fn directory(bytes: &mut [u8], slot: usize, parent: usize, children: &[(&str, usize)]) {
    const FLAT_INLINE: u8 = 2 << 1;
    const MODE: u16 = 0o040_755;
    const FILE_TYPE: u8 = 2;
    // Sorted by name, as the kernel searches them.
    let entries = [(".", slot), ("..", parent)].into_iter().chain(children.iter().copied());
    let entries: Vec<_> = entries.collect();
    let names = entries.len() * ENTRY;
    let size = names + entries.iter().map(|(name, _)| name.len()).sum::<usize>();
    let inode = &mut bytes[slot * SLOT..];
    inode[0] = FLAT_INLINE;
    put(inode, 4, &MODE.to_le_bytes());
    put(inode, 6, &number::<2>(2 + children.len()));
    put(inode, 8, &number::<4>(size));
    put(inode, 20, &number::<4>(slot));
    let content = &mut inode[SLOT..];
    let mut name_at = names;
    for (index, (name, child)) in entries.into_iter().enumerate() {
        let entry = index * ENTRY;
        put(content, entry, &number::<8>(child));
        put(content, entry + 8, &number::<2>(name_at));
        content[entry + 10] = FILE_TYPE;
        put(content, name_at, name.as_bytes());
        name_at += name.len();
    }
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// The first bytes of a number, little endian.
fn number<const LEN: usize>(value: usize) -> [u8; LEN] {
    let bytes = value.to_le_bytes();
    std::array::from_fn(|index| bytes[index])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_do_not_overlap() {
        // The root's inode and entries, and those of another directory.
        let root = SLOT + (2 + DIRECTORIES.len()) * ENTRY + 3 + DIRECTORIES.concat().len();
        assert!(root <= ROOT_SLOTS * SLOT, "{root}");
        assert!(SLOT + 2 * ENTRY + 3 <= DIRECTORY_SLOTS * SLOT);
        assert!((ROOT + ROOT_SLOTS + DIRECTORIES.len() * DIRECTORY_SLOTS) * SLOT <= BLOCK);
        assert!(DIRECTORIES.is_sorted());
    }

    #[test]
    fn fsck_finds_no_fault() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("root.erofs");
        std::fs::write(&path, filesystem()).unwrap();
        match std::process::Command::new("fsck.erofs").arg("--extract").arg(&path).output() {
            Ok(output) => assert!(
                output.status.success(),
                "{}{}",
                String::from_utf8_lossy(&output.stdout),
                String::from_utf8_lossy(&output.stderr)
            ),
            // The kernels of trial guests mount it in the tests of guests.
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::NotFound),
        }
    }
}
