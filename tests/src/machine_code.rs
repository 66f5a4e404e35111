//! Tiny guests in machine code, for behaviour that Linux never shows.

use guest_protocol::port;
use std::io::Write;

const ADDRESS: u64 = 0x10_0000;

/// A kernel file with this code as its only segment, which runs in 64-bit mode at 1 MiB.
///
/// # Panics
/// When the file cannot be written.
#[must_use]
pub fn kernel(code: &[u8]) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().expect("cannot make a file");
    file.write_all(&elf(code)).expect("cannot write the kernel");
    file
}

/// An ELF file (System V ABI) with one segment: a header of 64 bytes and a program header of 56.
#[must_use]
pub fn elf(code: &[u8]) -> Vec<u8> {
    let mut bytes = b"\x7fELF\x02\x01\x01".to_vec();
    bytes.resize(16, 0);
    bytes.extend(2_u16.to_le_bytes()); // executable
    bytes.extend(62_u16.to_le_bytes()); // x86-64
    bytes.extend(1_u32.to_le_bytes());
    bytes.extend(ADDRESS.to_le_bytes()); // entry
    bytes.extend(64_u64.to_le_bytes()); // program headers
    bytes.extend(0_u64.to_le_bytes());
    bytes.extend(0_u32.to_le_bytes());
    for half in [64_u16, 56, 1, 0, 0, 0] {
        bytes.extend(half.to_le_bytes());
    }
    let size = code.len() as u64;
    bytes.extend(1_u32.to_le_bytes()); // load
    bytes.extend(7_u32.to_le_bytes());
    for value in [4096, ADDRESS, ADDRESS, size, size, 4096] {
        bytes.extend(value.to_le_bytes());
    }
    bytes.resize(4096, 0);
    bytes.extend(code);
    bytes
}

/// `mov eax, status; mov dx, EXIT; out dx, eax`: ends the guest.
#[must_use]
pub fn exit(status: u32) -> Vec<u8> {
    let mut code = vec![0xb8];
    code.extend(status.to_le_bytes());
    code.extend([0x66, 0xba]);
    code.extend(port::EXIT.to_le_bytes());
    code.push(0xef);
    code
}

/// `jmp $`: an infinite loop.
pub const INFINITE_LOOP: [u8; 2] = [0xeb, 0xfe];
