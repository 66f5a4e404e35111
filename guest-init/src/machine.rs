//! The VMM as init sees it: its ports, and ways to end under a monitor that has none of them.
#![expect(unsafe_code, reason = "port I/O")]

use core::sync::atomic::{AtomicBool, Ordering};
use guest_protocol::frame::MAX_FRAME;
use guest_protocol::{BootMark, ExitStatus, handshake, port};
use rustix::system::{RebootCommand, reboot};
use x86_64::instructions::port::Port;

use alloc::vec;
use alloc::vec::Vec;

static PORTS: AtomicBool = AtomicBool::new(false);
/// Whether the monitor failed the handshake. Until then the ports are taken for this VMM's.
static FOREIGN: AtomicBool = AtomicBool::new(false);

/// Records that the kernel lets this process use I/O ports.
pub(crate) fn allow_ports() {
    PORTS.store(true, Ordering::Relaxed);
}

/// Whether this process may use I/O ports.
pub(crate) fn has_ports() -> bool {
    PORTS.load(Ordering::Relaxed)
}

/// Whether writes to the VMM's ports are permitted: a foreign monitor may have another device there.
fn has_vmm() -> bool {
    has_ports() && !FOREIGN.load(Ordering::Relaxed)
}

/// Tells the VMM that a stage is reached.
pub(crate) fn mark(stage: BootMark) {
    if has_vmm() {
        // SAFETY: the kernel permits port I/O, and this port exists for this byte or not at all.
        unsafe { Port::new(port::BOOT_MARK).write(stage as u8) }
    }
}

/// Bytes of the first read, which has the response and most frames whole.
const FIRST_READ: usize = 512;

/// Aligned to its size, so that it lies in one page and KVM fills it with one exit.
#[repr(align(512))]
struct FirstRead([u8; FIRST_READ]);

/// The VMM's configuration frame, or `None` under a monitor that fails the handshake.
///
/// # Errors
/// The length that the VMM announced, when it is more than a frame can have.
pub(crate) fn read_configuration() -> Result<Option<Vec<u8>>, u32> {
    if !has_ports() {
        return Ok(None);
    }
    let mut first = FirstRead([0; FIRST_READ]);
    // SAFETY: reading the time stamp counter affects nothing.
    let time = unsafe { core::arch::x86_64::_rdtsc() };
    // Its low half differs at each start.
    let [a, b, c, d, ..] = time.to_le_bytes();
    let nonce = u32::from_le_bytes([a, b, c, d]);
    // SAFETY: as in `mark`.
    unsafe { Port::new(port::CONFIG_REQUEST).write(nonce) }
    read_data(&mut first.0);
    let Some((length, start)) = handshake::accept(nonce, &first.0) else {
        FOREIGN.store(true, Ordering::Relaxed);
        return Ok(None);
    };
    let size = usize::try_from(length).unwrap_or(usize::MAX);
    if size > MAX_FRAME {
        return Err(length);
    }
    let mut frame = vec![0; size];
    let (head, rest) = frame.split_at_mut(size.min(start.len()));
    head.copy_from_slice(&start[..head.len()]);
    read_data(rest);
    Ok(Some(frame))
}

/// Fills `bytes` with the next ones of the configuration.
fn read_data(bytes: &mut [u8]) {
    if bytes.is_empty() {
        return;
    }
    // The pages have to be there: KVM takes bytes from the device before it stores them, and a page fault in between
    // would lose them. What is not zero is written in any case.
    bytes.fill(0xff);
    // SAFETY: the buffer has as many bytes as the instructions write, the kernel permits port I/O and the direction
    // flag is clear. A string instruction costs an exit for a page, and KVM's emulation some hundred instructions for
    // each repetition, of which words of four bytes need fewer.
    unsafe {
        core::arch::asm!("rep insd", "mov ecx, {rest:e}", "rep insb", rest = in(reg) bytes.len() % 4,
                         in("dx") port::CONFIG_DATA, inout("rdi") bytes.as_mut_ptr() => _,
                         inout("rcx") bytes.len() / 4 => _, options(nostack, preserves_flags));
    }
}

/// Sends the kernel's log to the VMM, four bytes with each exit. A string instruction (`rep outsb`)
/// leaves with each single byte, and guests whose KVM emulated some thousand of them in a row hung.
pub(crate) fn send_kernel_log(text: &[u8]) {
    if !has_vmm() {
        return;
    }
    let (words, rest) = text.as_chunks();
    for word in words {
        // SAFETY: as in `mark`.
        unsafe { Port::new(port::KERNEL_LOG).write(u32::from_le_bytes(*word)) }
    }
    for byte in rest {
        // SAFETY: as in `mark`.
        unsafe { Port::new(port::KERNEL_LOG).write(*byte) }
    }
}

/// Takes the permission for port I/O away from this process; payloads do not inherit it.
pub(crate) fn drop_ports() {
    crate::syscall::drop_port_permission();
    PORTS.store(false, Ordering::Relaxed);
}

/// Ends the virtual machine. Where no VMM takes the exit status, the machine restarts, which ends
/// it under every monitor that was told not to reboot.
pub(crate) fn end(status: ExitStatus) -> ! {
    rustix::fs::sync();
    crate::voice::drain();
    if has_vmm() {
        // SAFETY: as in `mark`.
        unsafe { Port::new(port::EXIT).write(status.to_raw()) }
    }
    // Only where the VMM did not stop at that write is there anything to say or left to do.
    match status {
        ExitStatus::Payload(code) => crate::voice::say(format_args!("init: exit status {code}\n")),
        ExitStatus::InitPanic => {}
    }
    let _ = reboot(RebootCommand::Restart);
    loop {
        rustix::thread::sched_yield();
    }
}
