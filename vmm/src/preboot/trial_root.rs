//! The root filesystem of trial guests: a directory with one program.
//!
//! The file of a pre-booted kernel serves all later guests of its size, whatever their image. If trial guests mounted the
//! image that is about to run, its author could attack a guest that decides what is in that file.
//!
//! Init creates the directories that it mounts over, as for an image without them, so that the pages that it writes then are
//! copied in advance too.

use std::fs::File;
use std::io::{self, Write};

/// Size of a block, and of the filesystem's metadata, in bytes.
const BLOCK: usize = BLOCK_LEN as usize;
const BLOCK_LEN: u32 = 4096;
/// Path of the program. It reads one byte of each page of its file, writes to some more pages, and ends with status 0: like a
/// program of an image, it makes the guest read its disk, and use memory.
pub(super) const PROGRAM: &str = "/trial";
/// Size of the program's file in bytes, in the order of magnitude of a static busybox: a guest reads ahead, and fills its
/// page cache.
const PROGRAM_LEN: u32 = 3 << 19;
/// Memory that the program writes to, in bytes.
const PROGRAM_MEMORY: u32 = 128 << 10;
/// Addresses of the program's file and of that memory.
const PROGRAM_START: u32 = 0x40_0000;
const MEMORY_START: u32 = 0x80_0000;
/// Size of the disk in bytes: the metadata and the program.
const DISK: u64 = BLOCK as u64 + PROGRAM_LEN as u64;
/// Place of the superblock in bytes (`EROFS_SUPER_OFFSET` in fs/erofs/erofs_fs.h).
const SUPERBLOCK: usize = 1024;
const MAGIC: u32 = 0xe0f5_e1e2;
/// Place of the root directory's inode in bytes: the first one after the superblock.
const ROOT: usize = SUPERBLOCK + 128;
/// The number of the inode: its place, in units of 32 bytes.
const ROOT_NUMBER: u8 = 36;
/// Place and number of the program's inode, behind the directory.
const FILE: usize = ROOT + 4 * 32;
const FILE_NUMBER: u8 = ROOT_NUMBER + 4;
/// A directory whose entries follow its inode (`EROFS_INODE_FLAT_INLINE`).
const FLAT_INLINE: u8 = 2 << 1;
const DIRECTORY_MODE: u16 = 0o040_755;
const FILE_MODE: u16 = 0o100_755;
/// The types of a file and of a directory in an entry (`EROFS_FT_REG_FILE`, `EROFS_FT_DIR`).
const FILE_TYPE: u8 = 1;
const DIRECTORY_TYPE: u8 = 2;
/// Length of a directory entry in bytes, without the name.
const ENTRY: usize = ENTRY_LEN as usize;
const ENTRY_LEN: u8 = 12;
/// The names of the directory, in their order.
const NAMES: &[u8; NAMES_LEN as usize] = b"...trial";
const NAMES_LEN: u8 = 8;
/// Length of the directory in bytes: the entries `.`, `..` and `trial`.
const DIRECTORY_LEN: u8 = 3 * ENTRY_LEN + NAMES_LEN;

/// A file in memory with the filesystem (EROFS), which all guest kernels support.
///
/// # Errors
/// When the host has no descriptor or memory left.
pub(crate) fn file() -> io::Result<File> {
    let mut file = File::from(rustix::fs::memfd_create("trial root", rustix::fs::MemfdFlags::CLOEXEC)?);
    file.write_all(&filesystem())?;
    file.write_all(&program())?;
    file.set_len(DISK)?;
    Ok(file)
}

fn filesystem() -> [u8; BLOCK] {
    let mut bytes = [0; BLOCK];
    // Without checksums and compression.
    let superblock = &mut bytes[SUPERBLOCK..];
    superblock[..4].copy_from_slice(&MAGIC.to_le_bytes());
    // The logarithm of the block size, the root directory, and the numbers of inodes and blocks.
    (superblock[12], superblock[14], superblock[16]) = (12, ROOT_NUMBER, 2);
    superblock[36..40].copy_from_slice(&u32::to_le_bytes(1 + PROGRAM_LEN.div_ceil(BLOCK_LEN)));
    let inode = &mut bytes[ROOT..];
    inode[0] = FLAT_INLINE;
    inode[4..6].copy_from_slice(&DIRECTORY_MODE.to_le_bytes());
    // The numbers of links and of bytes.
    (inode[6], inode[8]) = (2, DIRECTORY_LEN);
    // Each entry: number of the inode, place of the name, and type. The names follow.
    let entries = &mut inode[32..];
    let all =
        [(ROOT_NUMBER, 0, DIRECTORY_TYPE), (ROOT_NUMBER, 1, DIRECTORY_TYPE), (FILE_NUMBER, 3, FILE_TYPE)];
    for (entry, (inode, name, kind)) in entries.chunks_exact_mut(ENTRY).zip(all) {
        (entry[0], entry[8], entry[10]) = (inode, 3 * ENTRY_LEN + name, kind);
    }
    entries[3 * ENTRY..3 * ENTRY + NAMES.len()].copy_from_slice(NAMES);
    // The data of the file is in the blocks from the second on (`EROFS_INODE_FLAT_PLAIN`).
    let inode = &mut bytes[FILE..];
    inode[4..6].copy_from_slice(&FILE_MODE.to_le_bytes());
    (inode[6], inode[16]) = (1, 1);
    inode[8..12].copy_from_slice(&PROGRAM_LEN.to_le_bytes());
    bytes
}

/// The beginning of the program's file; the rest is zeroes.
fn program() -> Vec<u8> {
    const HEADER: u32 = 64;
    const SEGMENT: u32 = 56;
    const ENTRY_POINT: u32 = PROGRAM_START + HEADER + 2 * SEGMENT;
    const PAGE: [u8; 4] = BLOCK_LEN.to_le_bytes();
    let end = |start: u32, length: u32| (start + length).to_le_bytes();
    // For each page: `mov al, [rsi]` or `mov [rsi], al`; `add esi, PAGE`; `cmp esi, end`; `jb` to the first.
    let touch = |start: u32, length: u32, access: [u8; 2]| {
        [
            &[0xbe][..],
            &start.to_le_bytes(),
            &access,
            &[0x81, 0xc6],
            &PAGE,
            &[0x81, 0xfe],
            &end(start, length),
            &[0x72, 0xf0],
        ]
        .concat()
    };
    let read = touch(PROGRAM_START, PROGRAM_LEN, [0x8a, 0x06]);
    let write = touch(MEMORY_START, PROGRAM_MEMORY, [0x88, 0x06]);
    // `xor edi, edi`; `mov eax, 60`; `syscall`: exit(0).
    let exit = [0x31, 0xff, 0xb8, 60, 0, 0, 0, 0x0f, 0x05];
    let long = |value: u32| u64::from(value).to_le_bytes();
    let short = u16::to_le_bytes;
    // PT_LOAD, and the flags of a segment that can be read and executed, or read and written (elf(5)).
    let segment = |flags: u32, start: u32, in_file: u32, in_memory: u32| {
        let kind = [1_u32.to_le_bytes(), flags.to_le_bytes()].concat();
        [&kind[..], &long(0), &long(start), &long(start), &long(in_file), &long(in_memory), &long(BLOCK_LEN)]
            .concat()
    };
    [
        // A static executable for x86-64.
        &b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0"[..],
        &long(ENTRY_POINT),
        &long(HEADER),
        &long(0),
        &0_u32.to_le_bytes(),
        &[short(64), short(56), short(2), short(0), short(0), short(0)].concat(),
        &segment(5, PROGRAM_START, PROGRAM_LEN, PROGRAM_LEN),
        &segment(6, MEMORY_START, 0, PROGRAM_MEMORY),
        &read,
        &write,
        &exit,
    ]
    .concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Seek;

    #[test]
    fn fsck_finds_no_fault() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("root.erofs");
        let mut root = file().unwrap();
        root.rewind().unwrap();
        io::copy(&mut root, &mut File::create(&path).unwrap()).unwrap();
        let output = std::process::Command::new("fsck.erofs").arg("--extract").arg(&path).output();
        let output = output.expect("fsck.erofs of erofs-utils, which `cargo xtask test` installs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}
