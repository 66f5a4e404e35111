//! Reconstructs call chains from stack words.
//!
//! The kernel image has neither frame pointers nor unwind tables. A stack word is taken for a return address if it
//! follows a call instruction. It is taken for current, rather than left over from an earlier call, if it lies in the
//! function that the preceding (outer) frame calls. The scan from the outermost word inwards thus rejects nearly all
//! stale words. After an indirect call any function is possible, so that a stale word may be accepted there.

use super::kernel_image::{Call, KernelImage};

/// The callers of the innermost function, outermost first.
pub(super) fn callers<'a>(kernel: &'a KernelImage, words: &[u64]) -> Vec<&'a str> {
    let mut frames: Vec<&str> = Vec::new();
    let mut expected = None;
    for &word in words.iter().rev() {
        let Some(call) = kernel.call_before(word) else { continue };
        let Some(function) = kernel.symbols.function(word) else { continue };
        if expected.is_some_and(|expected| expected != function) {
            continue;
        }
        frames.push(function);
        expected = match call {
            Call::To(address) => kernel.symbols.function(address),
            Call::Indirect => None,
        };
    }
    frames
}

#[cfg(test)]
mod tests {
    use super::super::kernel_image::tests::{TEXT, kernel};
    use super::*;

    /// `outer` calls `middle` at 0 and `other` at 5; `middle` makes an indirect call at 32; `inner` and `other` make no
    /// calls.
    fn image() -> KernelImage {
        let mut code = vec![0x90; 128];
        code[..5].copy_from_slice(&[0xe8, 27, 0, 0, 0]);
        code[5..10].copy_from_slice(&[0xe8, 86, 0, 0, 0]);
        code[32..34].copy_from_slice(&[0xff, 0xd0]);
        kernel(&code, &[("outer", 0), ("middle", 32), ("inner", 64), ("other", 96)], "")
    }

    #[test]
    fn only_words_that_match_the_call_of_the_outer_frame_are_frames() {
        let image = image();
        // Innermost first, as the VMM records them.
        assert_eq!(callers(&image, &[TEXT + 34, TEXT + 5]), ["outer", "middle"]);
        // Stale: `middle` was called and not `outer` again; no call ends at 70.
        assert_eq!(callers(&image, &[TEXT + 34, TEXT + 70, TEXT + 10, TEXT + 5]), ["outer", "middle"]);
        // `outer` called `other`, so that `middle` cannot be what runs.
        assert_eq!(callers(&image, &[TEXT + 34, TEXT + 10]), ["outer"]);
        // After an indirect call any function may follow.
        assert_eq!(callers(&image, &[TEXT + 5, TEXT + 34]), ["middle", "outer"]);
        assert!(callers(&image, &[]).is_empty());
        assert!(callers(&image, &[0, u64::MAX, TEXT]).is_empty());
    }
}
