//! How init tells this VMM from a monitor that has no device at its ports.
//!
//! What an unassigned port returns is the monitor's choice: all ones, zeroes, whatever the last access left in
//! its buffer, or anything else. So init writes a nonce, and the response holds a seal of 64 bits over that nonce and
//! the frame's length. No constant and no repetition of the nonce is such a seal, and random bytes are with a
//! probability of 2^-64. It proves no identity: a monitor that wants to be taken for this VMM can be.
//!
//! ```text
//! response = length of the frame: u32  seal: u64
//! ```
//! Both integers are little-endian.

/// Bytes of a response.
pub const RESPONSE_LEN: usize = 12;

/// Two odd numbers of random bits: multiplication by them is invertible and spreads each bit of the input.
const FACTORS: [u64; 2] = [0x93c4_67e3_7db0_c7a5, 0xd1b5_4a32_d192_ed03];
/// Keeps a nonce and a length of zero from having a seal of zero.
const OFFSET: u64 = u64::from_le_bytes(*b"KINDLING");

/// The VMM's response to a nonce, before a frame of `length` bytes.
#[must_use]
pub fn response(nonce: u32, length: u32) -> [u8; RESPONSE_LEN] {
    let mut bytes = [0; RESPONSE_LEN];
    bytes[..4].copy_from_slice(&length.to_le_bytes());
    bytes[4..].copy_from_slice(&seal(nonce, length).to_le_bytes());
    bytes
}

/// The length of the frame and the bytes behind the response, or `None` where `bytes` do not begin with the
/// response to this nonce.
#[must_use]
pub fn accept(nonce: u32, bytes: &[u8]) -> Option<(u32, &[u8])> {
    let (found, rest) = bytes.split_first_chunk::<RESPONSE_LEN>()?;
    let (length, _) = found.split_first_chunk()?;
    let length = u32::from_le_bytes(*length);
    (*found == response(nonce, length)).then_some((length, rest))
}

const fn seal(nonce: u32, length: u32) -> u64 {
    let mut seal = ((nonce as u64) << 32 | length as u64) ^ OFFSET;
    seal = seal.wrapping_mul(FACTORS[0]);
    seal ^= seal >> 32;
    seal.wrapping_mul(FACTORS[1])
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
    fn what_unassigned_ports_return_is_not_accepted() {
        for nonce in NONCES {
            for byte in 0..=u8::MAX {
                assert_eq!(accept(nonce, &[byte; 512]), None, "{byte:#x} for {nonce:#x}");
            }
            // The value of the last access, as it is, inverted, and in the other order.
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
