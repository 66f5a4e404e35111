//! From the words on a stack to the calls that led to an instruction.
//!
//! The kernel has neither frame pointers nor unwinding tables in its image. A word of a stack is a
//! return address when it follows a call instruction; it is not left over from an earlier call when
//! its function is the one that the caller before it called. Going from the outermost word inwards,
//! nearly every false one is told by that; a call through a pointer can lead anywhere, and there a
//! false one may pass.

use super::kernel_image::{Call, KernelImage};

/// The functions that called one another, the outermost first, without the innermost one.
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
            Call::Anywhere => None,
        };
    }
    frames
}

#[cfg(test)]
mod tests {
    use super::super::kernel_image::tests::{TEXT, kernel};
    use super::*;

    /// `outer` calls `middle` at 0 and `other` at 5; `middle` calls through a register at 32;
    /// `inner` and `other` call nothing.
    fn image() -> KernelImage {
        let mut code = vec![0x90; 128];
        code[..5].copy_from_slice(&[0xe8, 27, 0, 0, 0]);
        code[5..10].copy_from_slice(&[0xe8, 86, 0, 0, 0]);
        code[32..34].copy_from_slice(&[0xff, 0xd0]);
        kernel(&code, &[("outer", 0), ("middle", 32), ("inner", 64), ("other", 96)], "")
    }

    #[test]
    fn only_words_that_fit_the_call_before_them_are_frames() {
        let image = image();
        // Innermost first, as the VMM records them.
        assert_eq!(callers(&image, &[TEXT + 34, TEXT + 5]), ["outer", "middle"]);
        // Left over: `middle` was called and not `outer` again; no call ends at 70.
        assert_eq!(callers(&image, &[TEXT + 34, TEXT + 70, TEXT + 10, TEXT + 5]), ["outer", "middle"]);
        // `outer` called `other`, so that `middle` cannot be what runs.
        assert_eq!(callers(&image, &[TEXT + 34, TEXT + 10]), ["outer"]);
        // Behind a call through a pointer anything may follow.
        assert_eq!(callers(&image, &[TEXT + 5, TEXT + 34]), ["middle", "outer"]);
        assert!(callers(&image, &[]).is_empty());
        assert!(callers(&image, &[0, u64::MAX, TEXT]).is_empty());
    }
}
