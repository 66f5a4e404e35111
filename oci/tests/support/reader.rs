//! A reader for EROFS filesystems of this crate and of mkfs.erofs, for comparisons of them. It supports compact and
//! extended inodes, and extended attributes that inodes share.

use std::fmt::Write;
use std::fs;
use std::path::Path;

struct Image {
    bytes: Vec<u8>,
    meta: usize,
    shared: usize,
}

struct Inode {
    mode: u16,
    uid: u32,
    gid: u32,
    links: u32,
    seconds: u64,
    nanoseconds: u32,
    rdev: u32,
    content: Vec<u8>,
    xattrs: Vec<(String, Vec<u8>)>,
}

/// Lists a filesystem, with a line for each path: path, mode, owner, group, link count, time, content or device, extended
/// attributes.
pub fn list(path: &Path) -> Vec<String> {
    let bytes = fs::read(path).unwrap();
    let number = |at| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
    assert_eq!(number(1024), 0xe0f5_e1e2);
    assert_eq!(bytes[1036], 12);
    let root = u64::from(u16::from_le_bytes([bytes[1038], bytes[1039]]));
    let image = Image { meta: number(1064) * 4096, shared: number(1068) * 4096, bytes };
    let mut lines = Vec::new();
    image.walk("/", root, &mut lines);
    lines.sort();
    lines
}

/// The line of a path.
pub fn line<'a>(lines: &'a [String], path: &str) -> &'a str {
    let found = lines.iter().find(|line| line.split(' ').next() == Some(path));
    found.unwrap_or_else(|| panic!("no {path} in {lines:#?}"))
}

/// The paths of all lines.
pub fn paths(lines: &[String]) -> Vec<&str> {
    lines.iter().map(|line| line.split(' ').next().unwrap()).collect()
}

impl Image {
    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.bytes[at..at + 2].try_into().unwrap())
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.bytes[at..at + 4].try_into().unwrap())
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.bytes[at..at + 8].try_into().unwrap())
    }

    fn inode(&self, nid: u64) -> Inode {
        let at = self.meta + usize::try_from(nid).unwrap() * 32;
        let format = self.u16(at);
        let is_long = format & 1 == 1;
        let mode = self.u16(at + 4);
        let count = usize::from(self.u16(at + 2));
        let attributes = if count == 0 { 0 } else { 12 + 4 * (count - 1) };
        let place = self.u32(at + 16);
        let (size, uid, gid, seconds, nanoseconds, links, length) = if is_long {
            let id = |field| self.u32(at + field);
            (self.u64(at + 8), id(24), id(28), self.u64(at + 32), id(40), id(44), 64)
        } else {
            let id = |field| u32::from(self.u16(at + field));
            (u64::from(self.u32(at + 8)), id(24), id(26), self.u64(1048), self.u32(1056), id(6), 32)
        };
        let size = usize::try_from(size).unwrap();
        let whole = match format >> 1 {
            0 => size,
            2 => size / 4096 * 4096,
            other => panic!("layout {other}"),
        };
        let start = place as usize * 4096;
        let tail = at + length + attributes;
        let has_content = matches!(mode >> 12, 4 | 8 | 10);
        let mut content = Vec::new();
        if has_content {
            if whole > 0 {
                content.extend_from_slice(&self.bytes[start..start + whole]);
            }
            content.extend_from_slice(&self.bytes[tail..tail + size - whole]);
        }
        Inode {
            mode,
            uid,
            gid,
            links,
            seconds,
            nanoseconds,
            rdev: if has_content { 0 } else { place },
            content,
            xattrs: self.xattrs(at + length, attributes),
        }
    }

    fn xattrs(&self, at: usize, size: usize) -> Vec<(String, Vec<u8>)> {
        let mut found = Vec::new();
        if size > 0 {
            let shared = usize::from(self.bytes[at + 4]);
            let places = (0..shared).map(|number| self.shared + 4 * self.u32(at + 12 + 4 * number) as usize);
            found.extend(places.map(|place| self.xattr(place).0));
            let mut next = at + 12 + 4 * shared;
            while next < at + size {
                let (xattr, length) = self.xattr(next);
                found.push(xattr);
                next += length;
            }
        }
        found.sort();
        found
    }

    fn xattr(&self, at: usize) -> ((String, Vec<u8>), usize) {
        let prefixes =
            ["", "user.", "system.posix_acl_access", "system.posix_acl_default", "trusted.", "", "security."];
        let name_length = usize::from(self.bytes[at]);
        let value_length = usize::from(self.u16(at + 2));
        let name = &self.bytes[at + 4..at + 4 + name_length];
        let value = self.bytes[at + 4 + name_length..][..value_length].to_vec();
        let name = prefixes[usize::from(self.bytes[at + 1])].to_owned() + &String::from_utf8_lossy(name);
        ((name, value), (4 + name_length + value_length).next_multiple_of(4))
    }

    fn walk(&self, path: &str, nid: u64, lines: &mut Vec<String>) {
        let inode = self.inode(nid);
        let is_folder = inode.mode >> 12 == 4;
        let content = match inode.mode >> 12 {
            4 => "folder".to_owned(),
            8 if inode.content.len() > 64 => kindling_oci::Digest::of(&inode.content).to_string(),
            8 | 10 => format!("\"{}\"", inode.content.escape_ascii()),
            _ => format!("device {:#x}", inode.rdev),
        };
        let mut line = format!(
            "{path} {:o} {}:{} {} {}.{} {content}",
            inode.mode,
            inode.uid,
            inode.gid,
            inode.links,
            inode.seconds.cast_signed(),
            inode.nanoseconds
        );
        for (name, value) in &inode.xattrs {
            let _ = write!(line, " {name}=\"{}\"", value.escape_ascii());
        }
        lines.push(line);
        if !is_folder {
            return;
        }
        let mut last: Vec<u8> = Vec::new();
        for block in inode.content.chunks(4096) {
            let count = usize::from(u16::from_le_bytes([block[8], block[9]])) / 12;
            let entry = |number: usize| &block[12 * number..12 * number + 12];
            let name_at = |number| usize::from(u16::from_le_bytes([entry(number)[8], entry(number)[9]]));
            for number in 0..count {
                let end = if number + 1 < count { name_at(number + 1) } else { block.len() };
                let name = &block[name_at(number)..end];
                let name = name.split(|&byte| byte == 0).next().unwrap();
                assert!(name > &last[..], "names are sorted");
                last = name.to_vec();
                let nid = u64::from_le_bytes(entry(number)[..8].try_into().unwrap());
                if name != b"." && name != b".." {
                    let name = name.escape_ascii();
                    let separator = if path == "/" { "" } else { "/" };
                    self.walk(&format!("{path}{separator}{name}"), nid, lines);
                }
            }
        }
    }
}
