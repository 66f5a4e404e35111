//! The entry point: requests the permission for port I/O, writes the first boot mark and calls Rust.
#![expect(unsafe_code, reason = "assembly of the entry point, which the kernel jumps to")]

use guest_protocol::{BootMark, port};

// The kernel starts a program with its arguments on the stack and all other registers undefined
// (System V ABI, AMD64 supplement, section 3.4.1). Init ignores the arguments and reads /proc/cmdline,
// because the kernel mixes unknown kernel parameters into the arguments.
//
// iopl (system call 172) must come first, because writing the mark without it would fault. If it fails, init continues
// without ports.
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
