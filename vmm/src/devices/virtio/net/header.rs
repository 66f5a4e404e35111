//! The header of each packet (section 5.1.6), and the computation of checksums for a driver that leaves them to the
//! device.

use super::feature;

/// Bytes of struct `virtio_net_hdr` with `num_buffers`, which devices of version 1 always use.
pub(super) const LENGTH: usize = 12;
/// Offset of `num_buffers`.
const NUM_BUFFERS: usize = 10;
/// Flag: the checksum has not been computed.
const NEEDS_CSUM: u8 = 1;
/// Flag: the checksums have been validated.
const DATA_VALID: u8 = 2;
// Types of packets that have to be segmented.
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_UDP: u8 = 3;
const GSO_TCPV6: u8 = 4;
/// Flag of a type: with explicit congestion notification.
const GSO_ECN: u8 = 0x80;

/// Bytes of an Ethernet header, the minimum length of a frame.
pub(super) const ETHERNET: usize = 14;

/// The header of a packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header(pub(super) [u8; LENGTH]);

impl Header {
    /// The header of a packet with valid checksums. `has_guest_csum` is whether the driver has accepted `GUEST_CSUM`.
    pub(super) const fn checked(has_guest_csum: bool) -> Self {
        let mut bytes = [0; LENGTH];
        if has_guest_csum {
            bytes[0] = DATA_VALID;
        }
        Self(bytes)
    }

    /// Sets the number of buffers that the packet spans.
    pub(super) const fn set_buffers(&mut self, count: u16) {
        let [low, high] = count.to_le_bytes();
        self.0[NUM_BUFFERS] = low;
        self.0[NUM_BUFFERS + 1] = high;
    }

    /// The header for a driver that has accepted these features; `None` for a packet that it does not support.
    pub(super) const fn for_driver(mut self, features: u64) -> Option<Self> {
        let [flags, kind, ..] = self.0;
        let mut needed = match kind & !GSO_ECN {
            GSO_NONE => 0,
            GSO_TCPV4 => feature::GUEST_TSO4,
            GSO_UDP => feature::GUEST_UFO,
            GSO_TCPV6 => feature::GUEST_TSO6,
            _ => return None,
        };
        if kind & GSO_ECN != 0 {
            needed |= feature::GUEST_ECN;
        }
        if flags & NEEDS_CSUM != 0 {
            needed |= feature::GUEST_CSUM;
        }
        if features & feature::GUEST_CSUM == 0 {
            self.0[0] = 0;
        }
        if features & needed == needed { Some(self) } else { None }
    }

    const fn word(&self, at: usize) -> usize {
        u16::from_le_bytes([self.0[at], self.0[at + 1]]) as usize
    }

    /// Computes the checksum that the header requests; `false` when the header requests something else or is invalid.
    pub(super) fn apply(&self, frame: &mut [u8]) -> bool {
        if self.0[1] != GSO_NONE {
            return false;
        }
        if self.0[0] & NEEDS_CSUM == 0 {
            return true;
        }
        let (start, offset) = (self.word(6), self.word(8));
        let Some(range) = frame.get_mut(start..) else { return false };
        if offset + 2 > range.len() {
            return false;
        }
        // The field contains the sum of the pseudo header, so that it is included. A sum of zero would mean "no
        // checksum" (RFC 768).
        let sum = match !ones_complement_sum(range) {
            0 => u16::MAX,
            sum => sum,
        };
        range[offset..offset + 2].copy_from_slice(&sum.to_be_bytes());
        true
    }
}

/// The RFC 1071 sum of big-endian 16-bit words; an odd last byte is padded with zero.
fn ones_complement_sum(bytes: &[u8]) -> u16 {
    // 32-bit words are summed, eight bytes at a time: the sum of 64 KiB does not overflow 64 bits, and the 16-bit
    // halves can be added at the end.
    let (chunks, rest) = bytes.as_chunks::<4>();
    let mut sum: u64 = chunks.iter().map(|chunk| u64::from(u32::from_be_bytes(*chunk))).sum();
    let mut last = [0; 4];
    last[..rest.len()].copy_from_slice(rest);
    sum += u64::from(u32::from_be_bytes(last));
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The sum exactly as defined by RFC 1071.
    fn slow_sum(bytes: &[u8]) -> u16 {
        let mut sum = 0_u32;
        for pair in bytes.chunks(2) {
            sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        u16::try_from(sum).unwrap()
    }

    fn needing(start: u16, offset: u16) -> Header {
        let mut bytes = [0; LENGTH];
        bytes[0] = 1;
        bytes[6..8].copy_from_slice(&start.to_le_bytes());
        bytes[8..10].copy_from_slice(&offset.to_le_bytes());
        Header(bytes)
    }

    #[test]
    fn the_checksum_is_written_at_the_offset_in_the_header() {
        let mut frame: Vec<u8> = (0..61).collect();
        frame[40..42].copy_from_slice(&[0x12, 0x34]);
        let before = frame.clone();
        assert!(needing(34, 6).apply(&mut frame));
        assert_eq!(slow_sum(&before[34..]), !u16::from_be_bytes([frame[40], frame[41]]));
        frame[40..42].copy_from_slice(&[0x12, 0x34]);
        assert_eq!(frame, before, "nothing else changes");
    }

    #[test]
    fn a_sum_of_zero_is_written_as_all_ones() {
        let mut frame = [0xff, 0xff, 0, 0];
        assert!(needing(0, 2).apply(&mut frame));
        assert_eq!(frame, [0xff, 0xff, 0xff, 0xff]);
    }

    #[test]
    fn offsets_outside_of_the_frame_and_segmentation_are_refused() {
        let mut frame = [0; 20];
        for (start, offset) in [(21, 0), (20, 0), (19, 0), (0, 19), (18, 1), (u16::MAX, u16::MAX)] {
            assert!(!needing(start, offset).apply(&mut frame), "{start} {offset}");
        }
        assert!(needing(18, 0).apply(&mut frame));
        let mut header = Header::default();
        header.0[1] = 1;
        assert!(!header.apply(&mut frame));
    }

    proptest! {
        #[test]
        fn the_fast_sum_equals_the_slow_one(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
            prop_assert_eq!(ones_complement_sum(&bytes), slow_sum(&bytes));
        }
    }
}
