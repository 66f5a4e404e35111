//! Directories: blocks of entries, sorted by name within and across blocks for the kernel's binary search.

use super::format::{BLOCK, BLOCK_SIZE};

/// Bytes of an entry without its name: inode number (8), offset of the name (2), file type (1), reserved (1).
const ENTRY: usize = 12;

/// A directory entry.
#[derive(Debug)]
pub(super) struct Entry<'a> {
    pub(super) name: &'a [u8],
    pub(super) nid: u64,
    pub(super) file_type: u8,
}

/// The size of a directory with names of these lengths, in order.
pub(super) fn size(lengths: impl Iterator<Item = usize>) -> u64 {
    let (mut whole, mut used) = (0, 0);
    for length in lengths {
        if used + ENTRY + length > BLOCK_SIZE {
            whole += BLOCK;
            used = 0;
        }
        used += ENTRY + length;
    }
    whole + used as u64
}

/// Encodes a directory. Each block has its entries first and then their names.
pub(super) fn encode(entries: &[Entry<'_>]) -> Vec<u8> {
    let mut content = Vec::new();
    let mut rest = entries;
    while !rest.is_empty() {
        let mut used = 0;
        let count = rest
            .iter()
            .take_while(|entry| {
                used += ENTRY + entry.name.len();
                used <= BLOCK_SIZE
            })
            .count();
        let (block, later) = rest.split_at(count);
        let mut name_at = ENTRY * count;
        for entry in block {
            content.extend_from_slice(&entry.nid.to_le_bytes());
            // Smaller than a block.
            content.extend_from_slice(&u16::try_from(name_at).unwrap_or_default().to_le_bytes());
            content.extend_from_slice(&[entry.file_type, 0]);
            name_at += entry.name.len();
        }
        for entry in block {
            content.extend_from_slice(entry.name);
        }
        if !later.is_empty() {
            content.resize(content.len().next_multiple_of(BLOCK_SIZE), 0);
        }
        rest = later;
    }
    content
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_size_agrees_with_the_encoding(lengths in prop::collection::vec(1_usize..256, 1..400)) {
            let names: Vec<Vec<u8>> = lengths.iter().map(|&length| vec![b'n'; length]).collect();
            let entries: Vec<_> = names.iter().map(|name| Entry { name, nid: 7, file_type: 1 }).collect();
            prop_assert_eq!(encode(&entries).len() as u64, size(lengths.into_iter()));
        }
    }

    #[test]
    fn blocks_have_the_kernels_format() {
        let entries =
            [Entry { name: b".", nid: 2, file_type: 2 }, Entry { name: b"ab", nid: 0x0102, file_type: 1 }];
        let content = encode(&entries);
        assert_eq!(content[..12], [2, 0, 0, 0, 0, 0, 0, 0, 24, 0, 2, 0]);
        assert_eq!(content[12..24], [2, 1, 0, 0, 0, 0, 0, 0, 25, 0, 1, 0]);
        assert_eq!(content[24..], *b".ab");
    }
}
