//! Fuzzes the writer of EROFS filesystems: any tree of files becomes a filesystem in which the tree's files are found again, with
//! their lengths.
#![no_main]

#[path = "../common/layout.rs"]
mod layout;

use layout::Layout;
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

/// A file of the root directory.
#[derive(Arbitrary, Debug)]
struct Node {
    name: u16,
    /// Length of the name, so that directories have several blocks.
    padding: u8,
    kind: Kind,
    mode: u16,
    owner: u32,
    seconds: u32,
}

#[derive(Arbitrary, Debug)]
enum Kind {
    File(u16),
    Link(u8),
    Directory,
    Fifo,
}

fuzz_target!(|nodes: Vec<Node>| {
    let mut expected = BTreeMap::new();
    let mut archive = Vec::new();
    for node in &nodes {
        let name = format!("{:05}{}", node.name, "n".repeat(usize::from(node.padding % 90)));
        let (flag, length, link) = match node.kind {
            Kind::File(length) => (b'0', usize::from(length), String::new()),
            Kind::Link(length) => (b'2', 0, "t".repeat(usize::from(length % 99) + 1)),
            Kind::Directory => (b'5', 0, String::new()),
            Kind::Fifo => (b'6', 0, String::new()),
        };
        archive.extend(header(&name, node, flag, length, &link));
        archive.resize(archive.len() + length.next_multiple_of(512), name.as_bytes()[4]);
        expected.insert(name, (flag, if flag == b'2' { link.len() } else { length }));
    }
    archive.extend([0; 1024]);
    let file = Layout::image(&[&archive]).convert().expect("a valid tree");
    let found = root_directory(&file);
    for (name, (flag, length)) in expected {
        let inode = found.get(name.as_bytes()).unwrap_or_else(|| panic!("{name} is missing"));
        let kind = u16::from_le_bytes([inode[4], inode[5]]) & 0o170_000;
        let expected = [(b'0', 0o100_000), (b'2', 0o120_000), (b'5', 0o040_000), (b'6', 0o010_000)];
        assert!(expected.contains(&(flag, kind)), "{name}: {flag} became {kind:o}");
        if flag == b'0' || flag == b'2' {
            assert_eq!(number(&inode[8..16]), length, "{name}");
        }
    }
});

fn header(name: &str, node: &Node, flag: u8, length: usize, link: &str) -> [u8; 512] {
    let mut header = [0; 512];
    let mut put = |at: usize, text: &str| header[at..at + text.len()].copy_from_slice(text.as_bytes());
    put(0, name);
    put(100, &format!("{:07o}", node.mode & 0o7777));
    put(108, &format!("{:07o}", node.owner & 0o777_7777));
    put(116, &format!("{:07o}", node.owner >> 11));
    put(124, &format!("{length:011o}"));
    put(136, &format!("{:011o}", node.seconds));
    put(157, link);
    put(257, "ustar\x0000");
    header[156] = flag;
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|&byte: &u8| u32::from(byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    header
}

fn number(bytes: &[u8]) -> usize {
    bytes.iter().rev().fold(0, |sum, &byte| sum << 8 | usize::from(byte))
}

/// The names in the root directory, and their inodes, as the kernel reads them (fs/erofs/erofs_fs.h): extended inodes of 64
/// bytes, directories in blocks of entries of 12 bytes, followed by the names.
fn root_directory(file: &File) -> BTreeMap<Vec<u8>, [u8; 64]> {
    const BLOCK: usize = 4096;
    let read = |at: usize, bytes: &mut [u8]| file.read_exact_at(bytes, at as u64).unwrap();
    let mut superblock = [0; 128];
    read(1024, &mut superblock);
    assert_eq!(superblock[12], 12, "blocks have 4096 bytes");
    let (root, metadata) = (number(&superblock[14..16]), number(&superblock[40..44]) * BLOCK);
    let inode = |nid: usize| {
        let mut inode = [0; 64];
        read(metadata + nid * 32, &mut inode);
        inode
    };
    let directory = inode(root);
    let format = number(&directory[..2]);
    assert_eq!(format & 1, 1, "an extended inode");
    let layout = format >> 1 & 7;
    assert!(layout == 0 || layout == 2, "plain or with an inline tail");
    let (size, start) = (number(&directory[8..16]), number(&directory[16..20]) * BLOCK);
    // Extended attributes lie between an inode and its tail: a header of 12 bytes and words.
    let attributes = match number(&directory[2..4]) {
        0 => 0,
        count => 12 + (count - 1) * 4,
    };
    let tail = metadata + root * 32 + 64 + attributes;
    let mut found = BTreeMap::new();
    for block in 0..size.div_ceil(BLOCK) {
        let length = (size - block * BLOCK).min(BLOCK);
        let is_inline = layout == 2 && block == size / BLOCK;
        let mut bytes = vec![0; length];
        read(if is_inline { tail } else { start + block * BLOCK }, &mut bytes);
        let count = number(&bytes[8..10]) / 12;
        let offset = |entry: usize| number(&bytes[entry * 12 + 8..entry * 12 + 10]);
        for entry in 0..count {
            let end = if entry + 1 < count { offset(entry + 1) } else { length };
            let name: Vec<_> = bytes[offset(entry)..end].iter().copied().take_while(|&byte| byte != 0).collect();
            found.insert(name, inode(number(&bytes[entry * 12..entry * 12 + 8])));
        }
    }
    found
}
