//! Extended attributes, which are stored after their inode.

use crate::tree::Xattr;

const HEADER: u64 = 12;
const ENTRY: u64 = 4;

/// Name prefixes, which are stored as a number. Other names cannot be stored. The names of access control lists consist
/// of the prefix only.
const PREFIXES: [(&[u8], u8); 5] = [
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"user.", 1),
    (b"trusted.", 4),
    (b"security.", 6),
];

/// Splits a name into the number of its prefix and the rest.
fn split(name: &[u8]) -> Option<(u8, &[u8])> {
    PREFIXES.iter().find_map(|(prefix, number)| {
        let rest = name.strip_prefix(*prefix)?;
        (rest.is_empty() == prefix.starts_with(b"system.") && rest.len() <= 255).then_some((*number, rest))
    })
}

/// Whether EROFS can store an attribute of this name.
pub(crate) fn is_known(name: &[u8]) -> bool {
    split(name).is_some()
}

/// The encoded size of attributes in bytes.
pub(crate) fn size(xattrs: &[Xattr]) -> u64 {
    let entries = xattrs.iter().filter_map(|xattr| {
        let (_, rest) = split(&xattr.name)?;
        Some((ENTRY + (rest.len() + xattr.value.len()) as u64).next_multiple_of(ENTRY))
    });
    if xattrs.is_empty() { 0 } else { HEADER + entries.sum::<u64>() }
}

/// The encoding of their size in the inode.
pub(super) fn count(size: u64) -> u16 {
    if size == 0 { 0 } else { u16::try_from((size - HEADER) / ENTRY + 1).unwrap_or(u16::MAX) }
}

/// Encodes attributes: a header of zeroes, since none are shared with other inodes, and each attribute padded to 4
/// bytes.
pub(super) fn encode(xattrs: &[Xattr]) -> Vec<u8> {
    let mut bytes = Vec::new();
    if !xattrs.is_empty() {
        bytes.resize(12, 0);
    }
    for xattr in xattrs {
        if let Some((number, rest)) = split(&xattr.name) {
            // The tree does not accept longer ones.
            bytes.extend_from_slice(&[u8::try_from(rest.len()).unwrap_or_default(), number]);
            bytes.extend_from_slice(&u16::try_from(xattr.value.len()).unwrap_or_default().to_le_bytes());
            bytes.extend_from_slice(rest);
            bytes.extend_from_slice(&xattr.value);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_split_as_the_kernel_joins_them() {
        assert_eq!(split(b"user.colour"), Some((1, &b"colour"[..])));
        assert_eq!(split(b"security.capability"), Some((6, &b"capability"[..])));
        assert_eq!(split(b"system.posix_acl_access"), Some((2, &b""[..])));
        for unknown in
            [&b"system.posix_acl_accessory"[..], b"user.", b"btrfs.compression", b"system.nfs4_acl", b""]
        {
            assert_eq!(split(unknown), None);
        }
        assert!(!is_known(&[b"user.".as_slice(), &[b'n'; 256]].concat()));
    }

    #[test]
    fn attributes_have_the_calculated_size() {
        let xattr = |name: &[u8], value: &[u8]| Xattr { name: name.into(), value: value.into() };
        let xattrs = [xattr(b"user.a", b"blue\0"), xattr(b"system.posix_acl_default", b"1234")];
        let bytes = encode(&xattrs);
        assert_eq!(bytes.len() as u64, size(&xattrs));
        assert_eq!(bytes[12..], *b"\x01\x01\x05\0ablue\0\0\0\0\x03\x04\x001234");
        assert_eq!(count(size(&xattrs)), 6);
        assert_eq!((size(&[]), count(0), encode(&[]).len()), (0, 0, 0));
    }
}
