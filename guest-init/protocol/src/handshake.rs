//! The handshake with which init distinguishes this VMM from a monitor without a device at its ports.
//!
//! The value of an unassigned port depends on the monitor: all ones, zeroes, the content of the monitor's buffer after
//! the last access, or anything else. Init therefore writes a nonce, and the response contains a 64-bit checksum of the
//! nonce and the frame's length. Constants and repetitions of the nonce have the wrong checksum, and random bytes have
//! the right one with a probability of 2^-64. The handshake is no authentication: any monitor can implement it.
//!
//! ```text
//! response = length of the frame: u32  checksum: u64
//! ```
//! Both integers are little-endian.

/// Length of a response in bytes.
pub const RESPONSE_LEN: usize = 12;

/// Two random odd numbers: multiplication by an odd number is invertible and spreads each bit of the input.
const FACTORS: [u64; 2] = [0x93c4_67e3_7db0_c7a5, 0xd1b5_4a32_d192_ed03];
/// Makes the checksum of a zero nonce and a zero length nonzero.
const OFFSET: u64 = u64::from_le_bytes(*b"KINDLING");

/// Encodes the VMM's response to a nonce, which precedes a frame of `length` bytes.
#[must_use]
pub fn response(nonce: u32, length: u32) -> [u8; RESPONSE_LEN] {
    let mut bytes = [0; RESPONSE_LEN];
    bytes[..4].copy_from_slice(&length.to_le_bytes());
    bytes[4..].copy_from_slice(&checksum(nonce, length).to_le_bytes());
    bytes
}

/// Checks the response at the start of `bytes`. Returns the length of the frame and the bytes after the response, or
/// `None` if it is not the response to this nonce.
#[must_use]
pub fn accept(nonce: u32, bytes: &[u8]) -> Option<(u32, &[u8])> {
    let (found, rest) = bytes.split_first_chunk::<RESPONSE_LEN>()?;
    let (length, _) = found.split_first_chunk()?;
    let length = u32::from_le_bytes(*length);
    (*found == response(nonce, length)).then_some((length, rest))
}

const fn checksum(nonce: u32, length: u32) -> u64 {
    let mut checksum = ((nonce as u64) << 32 | length as u64) ^ OFFSET;
    checksum = checksum.wrapping_mul(FACTORS[0]);
    checksum ^= checksum >> 32;
    checksum.wrapping_mul(FACTORS[1])
}

#[cfg(test)]
mod tests {
    extern crate std;

    use super::*;

    const NONCES: [u32; 6] = [0, 1, 0x1234_5678, 0x8000_0000, u32::MAX - 1, u32::MAX];

    #[test]
    fn the_response_to_a_nonce_is_accepted_for_that_nonce_alone() {
        for nonce in NONCES {
            for length in [0, 1, 12, 300, u32::MAX] {
                let mut bytes = [0x55; RESPONSE_LEN + 3];
                bytes[..RESPONSE_LEN].copy_from_slice(&response(nonce, length));
                assert_eq!(accept(nonce, &bytes), Some((length, &[0x55; 3][..])));
                assert_eq!(accept(nonce ^ 1, &bytes), None);
                assert_eq!(accept(nonce, &bytes[..RESPONSE_LEN - 1]), None);
                for bit in 0..RESPONSE_LEN * 8 {
                    let mut damaged = bytes;
                    damaged[bit / 8] ^= 1 << (bit % 8);
                    assert_eq!(accept(nonce, &damaged), None, "bit {bit} of {nonce:#x}, {length}");
                }
            }
        }
    }

    #[test]
    fn values_of_unassigned_ports_are_not_accepted() {
        for nonce in NONCES {
            for byte in 0..=u8::MAX {
                assert_eq!(accept(nonce, &[byte; 512]), None, "{byte:#x} for {nonce:#x}");
            }
            // The value of the last access: unchanged, inverted, byte-swapped and incremented.
            for word in [nonce, !nonce, nonce.swap_bytes(), nonce.wrapping_add(1)] {
                let repeated = [word.to_le_bytes(); 8].concat();
                let then_zeroes = [&word.to_le_bytes()[..], &[0; 28]].concat();
                let then_ones = [&word.to_le_bytes()[..], &[0xff; 28]].concat();
                for bytes in [repeated, then_zeroes, then_ones] {
                    assert_eq!(accept(nonce, &bytes), None, "{bytes:x?} for {nonce:#x}");
                }
            }
        }
    }

    #[test]
    fn random_bytes_are_not_accepted() {
        let mut state = 1_u64;
        for round in 0..100_000_u32 {
            let mut bytes = [0; 16];
            for half in bytes.chunks_exact_mut(8) {
                // xorshift64
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                half.copy_from_slice(&state.to_le_bytes());
            }
            assert_eq!(accept(round.wrapping_mul(0x9e37_79b9), &bytes), None, "{bytes:x?}");
        }
    }
}
