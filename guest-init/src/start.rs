//! The entry point: permission for port I/O, the first boot mark, then Rust.
#![expect(unsafe_code, reason = "the first instructions have no caller that could uphold anything")]

use guest_protocol::{BootMark, port};

// The kernel starts a program with its arguments on the stack and everything else undefined
// (System V ABI, AMD64 supplement, section 3.4.1). Init needs none of the arguments: it reads
// /proc/cmdline, which the kernel has not mixed with words meant for itself.
//
// iopl (system call 172) must come first, because writing the mark without it would fault; where
// it is refused, init goes on without ports.
core::arch::global_asm!(
    ".globl _start",
    "_start:",
    "mov eax, 172",
    "mov edi, 3",
    "syscall",
    "mov edi, eax",
    "test eax, eax",
    "jnz 2f",
    "mov dx, {mark_port}",
    "mov al, {mark}",
    "out dx, al",
    "2:",
    "xor ebp, ebp",
    "and rsp, -16",
    "call {enter}",
    "ud2",
    mark_port = const port::BOOT_MARK,
    mark = const BootMark::InitEntered as u8,
    enter = sym enter,
);

extern "C" fn enter(iopl_result: i32) -> ! {
    if iopl_result == 0 {
        crate::machine::allow_ports();
    }
    crate::main()
}
