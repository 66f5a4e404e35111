//! All that a guest and its VMM agree on, in one crate without dependencies that both link.
//!
//! A guest talks to the VMM over a few I/O ports ([`port`]): it marks the stages of its boot
//! ([`BootMark`]), asks for its configuration ([`frame`]) and ends with its exit status
//! ([`ExitStatus`]). The same init also boots under other monitors, whose unassigned ports may return
//! anything: it recognizes this VMM by the response to a challenge ([`handshake`]).
#![no_std]

pub mod agent;
pub mod frame;
pub mod handshake;
pub mod terminal;

/// The I/O ports of the VMM. QEMU's and Firecracker's machines leave this range unassigned.
pub mod port {
    /// One byte written: the guest reached the stage with that [`BootMark`](super::BootMark).
    pub const BOOT_MARK: u16 = 0x550;
    /// Bytes written, one or several at once: the kernel's log, where the configuration asks for it ([`Item::KernelLog`](super::frame::Item::KernelLog)).
    pub const KERNEL_LOG: u16 = 0x551;
    /// Four bytes written: the guest ends with that [`ExitStatus`](super::ExitStatus).
    pub const EXIT: u16 = 0x554;
    /// Four bytes written: a nonce. The VMM makes the configuration frame anew.
    pub const CONFIG_REQUEST: u16 = 0x558;
    /// Each byte read is the next one of the [`response`](super::handshake::response) to the nonce and of the
    /// configuration frame behind it, and zero after its end.
    pub const CONFIG_DATA: u16 = 0x55c;
}

/// The kernel command line of an image for which nobody chose another.
///
/// - `console=ttyS0`: messages and the payload's streams on the serial port.
/// - `quiet`: each character on the serial port is a VM exit, so only warnings are printed.
/// - `reboot=k panic=-1`: a panic resets the machine at once over the port that the VMM watches.
/// - `tsc=reliable no_timer_check`: the clocks are the host's; nothing needs to be verified.
/// - `noreplace-smp`: with one vCPU the kernel would take the lock prefixes out of its own code,
///   which costs 3 ms of boot (exact lab).
/// - `swiotlb=noforce`: no device needs bounce buffers, for which a guest with memory above 4 GiB
///   would set 64 MiB aside.
/// - `8250.nr_uarts=1`: one serial port exists, four would be probed.
/// - `percpu_alloc=page`: per-CPU areas are pages of 4 KiB. The kernel's own choice is to take 2 MiB,
///   clear them, use 170 KiB and give the rest back: 0.8 ms of boot (exact lab).
/// - `cpuhp.parallel=0`: processors are started one after the other. Started together they spin until
///   it is their turn, which takes time from whoever they share a host processor with, the one that
///   starts them for instance: a guest with four vCPUs is at init 18 to 31 ms sooner (exact lab).
pub const DEFAULT_COMMAND_LINE: &str = "console=ttyS0 quiet reboot=k panic=-1 tsc=reliable \
    no_timer_check noreplace-smp swiotlb=noforce 8250.nr_uarts=1 percpu_alloc=page cpuhp.parallel=0";

/// A stage that a guest announces by writing its number to [`port::BOOT_MARK`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum BootMark {
    /// The first instructions of init.
    InitEntered = 0x10,
    /// /proc, /sys, /dev, /run and /tmp are mounted.
    FilesystemsMounted = 0x11,
    /// The hostname is set and the loopback interface is up.
    SystemReady = 0x12,
    /// Init has its configuration.
    Configured = 0x13,
    /// The image's root filesystem is entered, where it is a disk.
    RootEntered = 0x16,
    /// The payload's process exists and is about to be executed.
    PayloadStarted = 0x14,
    /// The payload's process has ended.
    PayloadEnded = 0x15,
    /// The agent takes connections.
    AgentReady = 0x17,
}

impl BootMark {
    /// Every mark, in the order of a boot.
    pub const ALL: [Self; 8] = [
        Self::InitEntered,
        Self::FilesystemsMounted,
        Self::SystemReady,
        Self::Configured,
        Self::RootEntered,
        Self::AgentReady,
        Self::PayloadStarted,
        Self::PayloadEnded,
    ];

    /// The mark with this number, if there is one.
    #[must_use]
    pub fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|&mark| mark as u8 == byte)
    }

    /// What a report calls the stage.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::InitEntered => "init: first instruction",
            Self::FilesystemsMounted => "init: filesystems mounted",
            Self::SystemReady => "init: hostname and loopback set",
            Self::Configured => "init: configuration read",
            Self::RootEntered => "init: root filesystem entered",
            Self::PayloadStarted => "payload started",
            Self::PayloadEnded => "payload ended",
            Self::AgentReady => "init: agent takes connections",
        }
    }
}

/// How a guest ended, as init writes it to [`port::EXIT`].
///
/// Bits 0 to 7 are the exit code and bits 8 to 15 say what ended; the rest is zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitStatus {
    /// The payload ended with this code, which is 128 + signal when a signal killed it, 127 when
    /// it was not found and 126 when it may not be executed.
    Payload(u8),
    /// Init itself failed and said why on the console.
    InitPanic,
}

impl ExitStatus {
    const INIT_PANIC: u32 = 0x0100;

    /// The number that stands for this status on the port.
    #[must_use]
    pub const fn to_raw(self) -> u32 {
        match self {
            Self::Payload(code) => code as u32,
            Self::InitPanic => Self::INIT_PANIC,
        }
    }

    /// The status that this number stands for, if it is one.
    #[must_use]
    pub const fn from_raw(raw: u32) -> Option<Self> {
        match raw {
            0..=0xff => Some(Self::Payload(raw.to_le_bytes()[0])),
            Self::INIT_PANIC => Some(Self::InitPanic),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_status_survives_the_port() {
        for code in 0..=255 {
            let status = ExitStatus::Payload(code);
            assert_eq!(ExitStatus::from_raw(status.to_raw()), Some(status));
        }
        assert_eq!(ExitStatus::from_raw(0x100), Some(ExitStatus::InitPanic));
        for raw in [0x101, 0x1ff, 0x200, 0x1_0000, u32::MAX] {
            assert_eq!(ExitStatus::from_raw(raw), None, "{raw:#x}");
        }
    }

    #[test]
    fn boot_marks_have_their_own_numbers() {
        for mark in BootMark::ALL {
            assert_eq!(BootMark::from_byte(mark as u8), Some(mark));
        }
        assert_eq!(BootMark::from_byte(0), None);
        assert_eq!(BootMark::from_byte(0xff), None);
    }

    #[test]
    fn the_default_command_line_fits_every_kernel() {
        // COMMAND_LINE_SIZE of arch/x86/include/asm/setup.h is 2048 with the terminating NUL.
        assert!(DEFAULT_COMMAND_LINE.len() < 2048);
    }
}
