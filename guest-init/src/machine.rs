//! The VMM as init sees it: three ports, and ways to end where there are none.
#![expect(unsafe_code, reason = "port I/O")]

use core::sync::atomic::{AtomicBool, Ordering};
use guest_protocol::frame::MAX_FRAME;
use guest_protocol::{BootMark, ExitStatus, port};
use rustix::system::{RebootCommand, reboot};
use x86_64::instructions::port::Port;

use alloc::vec;
use alloc::vec::Vec;

static PORTS: AtomicBool = AtomicBool::new(false);

/// Records that the kernel lets this process use I/O ports.
pub(crate) fn allow_ports() {
    PORTS.store(true, Ordering::Relaxed);
}

/// Whether this process may use I/O ports.
pub(crate) fn has_ports() -> bool {
    PORTS.load(Ordering::Relaxed)
}

/// Tells the VMM that a stage is reached.
pub(crate) fn mark(stage: BootMark) {
    if has_ports() {
        // SAFETY: the kernel permits port I/O, and this port exists for this byte or not at all.
        unsafe { Port::new(port::BOOT_MARK).write(stage as u8) }
    }
}

/// The VMM's configuration frame, or `None` where no VMM answers.
///
/// # Errors
/// The length that the VMM announced, when it is more than a frame can have.
pub(crate) fn read_configuration() -> Result<Option<Vec<u8>>, u32> {
    if !has_ports() {
        return Ok(None);
    }
    // SAFETY: as in `mark`.
    let length: u32 = unsafe { Port::new(port::CONFIG_LENGTH).read() };
    if length == port::NOBODY {
        return Ok(None);
    }
    let size = usize::try_from(length).unwrap_or(usize::MAX);
    if size > MAX_FRAME {
        return Err(length);
    }
    let mut frame = vec![0; size];
    // SAFETY: the buffer has `size` bytes, the kernel permits port I/O and the direction flag is
    // clear. One string instruction costs one exit per page instead of one per byte.
    unsafe {
        core::arch::asm!("rep insb", in("dx") port::CONFIG_DATA, inout("rdi") frame.as_mut_ptr() => _,
                         inout("rcx") size => _, options(nostack, preserves_flags));
    }
    Ok(Some(frame))
}

/// Sends the kernel's log to the VMM, four bytes with each exit. A string instruction (`rep outsb`)
/// leaves with each single byte, and guests whose KVM emulated some thousand of them in a row hung.
pub(crate) fn send_kernel_log(text: &[u8]) {
    if !has_ports() {
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
    if has_ports() {
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
