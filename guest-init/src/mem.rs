//! The memory functions of a C library, which compiled Rust code calls.
//!
//! Copies and fills are one string instruction each. x86 processors execute them at full speed (ERMS), and none of the
//! callers is so hot that their start-up cost matters.
#![expect(unsafe_code, reason = "these are the C functions of the same names")]

use core::arch::asm;

/// C's memcpy.
///
/// # Safety
/// `source` is readable and `target` writable for `count` bytes, and they do not overlap.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(target: *mut u8, source: *const u8, count: usize) -> *mut u8 {
    // SAFETY: the caller promises both ranges; the direction flag is clear by the ABI.
    unsafe {
        asm!("rep movsb", inout("rcx") count => _, inout("rdi") target => _,
             inout("rsi") source => _, options(nostack, preserves_flags));
    }
    target
}

/// C's memmove.
///
/// # Safety
/// `source` is readable and `target` writable for `count` bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(target: *mut u8, source: *const u8, count: usize) -> *mut u8 {
    if target.addr().wrapping_sub(source.addr()) >= count {
        // SAFETY: the target does not start inside the source, so copying forwards is right.
        return unsafe { memcpy(target, source, count) };
    }
    // SAFETY: the ranges are the caller's; copying backwards reads each byte before it is
    // overwritten, and the direction flag is restored.
    unsafe {
        asm!("std", "rep movsb", "cld", inout("rcx") count => _,
             inout("rdi") target.wrapping_add(count).wrapping_sub(1) => _,
             inout("rsi") source.wrapping_add(count).wrapping_sub(1) => _, options(nostack));
    }
    target
}

/// C's memset.
///
/// # Safety
/// `target` is writable for `count` bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(target: *mut u8, value: i32, count: usize) -> *mut u8 {
    // SAFETY: the caller promises the range; the direction flag is clear by the ABI.
    unsafe {
        asm!("rep stosb", inout("rcx") count => _, inout("rdi") target => _,
             in("al") value.to_le_bytes()[0], options(nostack, preserves_flags));
    }
    target
}

/// C's memcmp.
///
/// # Safety
/// `left` and `right` are readable for `count` bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(left: *const u8, right: *const u8, count: usize) -> i32 {
    let mut difference = 0;
    let mut index = 0;
    while index < count && difference == 0 {
        // SAFETY: `index` is below `count`, for which the caller promises both ranges. Volatile
        // reads keep the compiler from recognising the loop as a call of this very function.
        let (l, r) = unsafe { (left.add(index).read_volatile(), right.add(index).read_volatile()) };
        difference = i32::from(l) - i32::from(r);
        index += 1;
    }
    difference
}

/// BSD's bcmp, which LLVM prefers where only equality matters.
///
/// # Safety
/// As for [`memcmp`].
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(left: *const u8, right: *const u8, count: usize) -> i32 {
    // SAFETY: the same promises are passed on.
    unsafe { memcmp(left, right, count) }
}

/// C's strlen.
///
/// # Safety
/// `text` points to bytes that end with a NUL.
#[unsafe(no_mangle)]
unsafe extern "C" fn strlen(text: *const u8) -> usize {
    let mut length = 0;
    // SAFETY: every byte up to and with the NUL is readable; volatile as in memcmp.
    while unsafe { text.add(length).read_volatile() } != 0 {
        length += 1;
    }
    length
}
