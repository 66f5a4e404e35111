//! The I/O ports of the VMM, and the end of the machine, also under a monitor without these ports.
#![expect(unsafe_code, reason = "port I/O")]

use crate::console;
use core::sync::atomic::{AtomicBool, Ordering};
use guest_protocol::frame::MAX_FRAME;
use guest_protocol::{BootMark, ExitStatus, handshake, port};
use rustix::system::{RebootCommand, reboot};
use x86_64::instructions::port::Port;

use alloc::vec;
use alloc::vec::Vec;

static PORTS: AtomicBool = AtomicBool::new(false);
/// Whether the monitor failed the handshake. Before the handshake, init assumes that the ports are the VMM's.
static FOREIGN: AtomicBool = AtomicBool::new(false);

/// Records that the kernel lets this process use I/O ports.
pub(crate) fn allow_ports() {
    PORTS.store(true, Ordering::Relaxed);
}

/// Whether this process may use I/O ports.
pub(crate) fn has_ports() -> bool {
    PORTS.load(Ordering::Relaxed)
}

/// Whether init may write to the VMM's ports: a foreign monitor may have another device there.
fn has_vmm() -> bool {
    has_ports() && !FOREIGN.load(Ordering::Relaxed)
}

/// Reports to the VMM that the guest reached a stage.
pub(crate) fn mark(stage: BootMark) {
    if has_vmm() {
        // SAFETY: the kernel permits port I/O, and this port takes this byte or is unassigned.
        unsafe { Port::new(port::BOOT_MARK).write(stage as u8) }
    }
}

/// Bytes of the first read, which contains the response and all of most frames.
const FIRST_READ: usize = 512;

/// Aligned to its size, so that it does not cross a page boundary and KVM fills it with one exit.
#[repr(align(512))]
struct FirstRead([u8; FIRST_READ]);

/// Reads the VMM's configuration frame. Returns `None` under a monitor that fails the handshake.
///
/// # Errors
/// The length that the VMM announced, when it exceeds [`MAX_FRAME`].
pub(crate) fn read_configuration() -> Result<Option<Vec<u8>>, u32> {
    if !has_ports() {
        return Ok(None);
    }
    let mut first = FirstRead([0; FIRST_READ]);
    // SAFETY: reading the time stamp counter affects nothing.
    let time = unsafe { core::arch::x86_64::_rdtsc() };
    // The low half differs at each start.
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

/// Fills `bytes` with the next bytes of the configuration.
fn read_data(bytes: &mut [u8]) {
    if bytes.is_empty() {
        return;
    }
    // The pages have to be present: KVM takes bytes from the device before it stores them, and a page fault in between
    // would lose them. A value other than zero makes sure that the pages are written.
    bytes.fill(0xff);
    // SAFETY: the buffer has as many bytes as the instructions write, the kernel permits port I/O and the direction
    // flag is clear. A string instruction costs one exit per page, and KVM's emulation some hundred instructions per
    // repetition; words of four bytes need fewer repetitions.
    unsafe {
        core::arch::asm!("rep insd", "mov ecx, {rest:e}", "rep insb", rest = in(reg) bytes.len() % 4,
                         in("dx") port::CONFIG_DATA, inout("rdi") bytes.as_mut_ptr() => _,
                         inout("rcx") bytes.len() / 4 => _, options(nostack, preserves_flags));
    }
}

/// Sends the kernel's log to the VMM, four bytes per exit. A string instruction (`rep outsb`) exits for each byte, and
/// guests whose KVM emulated some thousand repetitions in a row hung.
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

/// Drops the permission for port I/O of this process, so that payloads do not inherit it.
pub(crate) fn drop_ports() {
    crate::syscall::drop_port_permission();
    PORTS.store(false, Ordering::Relaxed);
}

/// Ends the virtual machine. If no VMM takes the exit status, the machine restarts, which ends it under every monitor
/// that is configured not to reboot.
pub(crate) fn end(status: ExitStatus) -> ! {
    rustix::fs::sync();
    console::drain();
    if has_vmm() {
        // SAFETY: as in `mark`.
        unsafe { Port::new(port::EXIT).write(status.to_raw()) }
    }
    // Not reached under Kindling: its VMM stops the guest at that write.
    match status {
        ExitStatus::Payload(code) => console::print(format_args!("init: exit status {code}\n")),
        ExitStatus::InitPanic => {}
    }
    let _ = reboot(RebootCommand::Restart);
    loop {
        rustix::thread::sched_yield();
    }
}
