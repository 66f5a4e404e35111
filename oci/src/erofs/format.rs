//! The on-disk structures of erofs_fs.h.

/// Bytes of a block, the size of a page of the guest.
pub(crate) const BLOCK: u64 = 4096;
pub(super) const BLOCK_SIZE: usize = 4096;
const BLOCK_BITS: u8 = 12;

/// Bytes of an extended inode, which has 32-bit owners and its own time, unlike the compact one.
pub(super) const INODE_SIZE: u64 = 64;
/// Bytes of an inode slot. The number of an inode is its offset in slots.
pub(super) const SLOT: u64 = 32;

pub(super) const SUPERBLOCK_OFFSET: u64 = 1024;
const SUPERBLOCK_SIZE: usize = 128;
const MAGIC: u32 = 0xe0f5_e1e2;
/// EROFS_FEATURE_COMPAT_SB_CHKSUM and EROFS_FEATURE_COMPAT_MTIME.
const FEATURES: u32 = 0x1 | 0x2;

/// The fields of the superblock.
#[derive(Debug)]
pub(super) struct Superblock {
    pub(super) root: u16,
    pub(super) inodes: u64,
    pub(super) blocks: u32,
    /// The block that inode numbers are relative to.
    pub(super) meta: u32,
    pub(super) uuid: [u8; 16],
}

impl Superblock {
    pub(super) fn encode(&self) -> [u8; SUPERBLOCK_SIZE] {
        let mut bytes = [0; SUPERBLOCK_SIZE];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &MAGIC.to_le_bytes());
        put(8, &FEATURES.to_le_bytes());
        put(12, &[BLOCK_BITS]);
        put(14, &self.root.to_le_bytes());
        put(16, &self.inodes.to_le_bytes());
        put(36, &self.blocks.to_le_bytes());
        put(40, &self.meta.to_le_bytes());
        put(48, &self.uuid);
        // The checksum covers the rest of the block from the superblock on, which is zero after the superblock.
        let zeros = BLOCK_SIZE - SUPERBLOCK_SIZE - 1024;
        let sum = bytes.iter().copied().chain(std::iter::repeat_n(0, zeros)).fold(u32::MAX, crc32c);
        bytes[4..8].copy_from_slice(&sum.to_le_bytes());
        bytes
    }
}

/// Adds a byte to a CRC-32C.
fn crc32c(sum: u32, byte: u8) -> u32 {
    (0..8).fold(sum ^ u32::from(byte), |sum, _| (sum >> 1) ^ (0x82f6_3b78 & (sum & 1).wrapping_neg()))
}

/// The location of an inode's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum DataLayout {
    /// In consecutive blocks.
    Plain = 0,
    /// As `Plain`, except that the last partial block follows the inode.
    Inline = 2,
}

/// The fields of an inode.
#[derive(Debug)]
pub(super) struct Inode {
    pub(super) layout: DataLayout,
    /// The size of the extended attributes in bytes.
    pub(super) xattrs: u64,
    pub(super) mode: u16,
    pub(super) size: u64,
    /// The first block of the content, or the device number.
    pub(super) block_or_device: u32,
    /// A 32-bit inode number, for 32-bit stat.
    pub(super) ino: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) seconds: i64,
    pub(super) nanoseconds: u32,
    pub(super) links: u32,
}

impl Inode {
    pub(super) fn encode(&self) -> [u8; 64] {
        const EXTENDED: u16 = 1;
        let mut bytes = [0; 64];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &(EXTENDED | (self.layout as u16) << 1).to_le_bytes());
        put(2, &super::xattr::count(self.xattrs).to_le_bytes());
        put(4, &self.mode.to_le_bytes());
        put(8, &self.size.to_le_bytes());
        put(16, &self.block_or_device.to_le_bytes());
        put(20, &self.ino.to_le_bytes());
        put(24, &self.uid.to_le_bytes());
        put(28, &self.gid.to_le_bytes());
        put(32, &self.seconds.to_le_bytes());
        put(40, &self.nanoseconds.to_le_bytes());
        put(44, &self.links.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_crc32c() {
        // The check value of CRC-32C, whose last step is an inversion.
        assert_eq!(!b"123456789".iter().copied().fold(u32::MAX, crc32c), 0xe306_9283);
    }
}
