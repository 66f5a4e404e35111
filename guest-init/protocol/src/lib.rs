//! The interface between a guest and its VMM: one crate, which both link, without dependencies by default.
//!
//! A guest communicates with the VMM over a few I/O ports ([`port`]): it marks the stages of its boot ([`BootMark`]),
//! requests its configuration ([`config`], encoded as a [`frame`]) and ends with its exit status ([`ExitStatus`]). The
//! same init also boots under other monitors, whose unassigned ports may return anything: it detects this VMM by a
//! challenge and response ([`handshake`]).
#![no_std]

extern crate alloc;

pub mod agent;
pub mod config;
pub mod frame;
pub mod handshake;
pub mod terminal;

/// The I/O ports of the VMM. QEMU's and Firecracker's machines leave this range unassigned.
pub mod port {
    /// Write, one byte: the guest reached the stage with this [`BootMark`](super::BootMark).
    pub const BOOT_MARK: u16 = 0x550;
    /// Write, one or several bytes: the kernel's log, if [`BootInfo::kernel_log`](super::config::BootInfo::kernel_log)
    /// is set.
    pub const KERNEL_LOG: u16 = 0x551;
    /// Write, four bytes: the guest ends with this [`ExitStatus`](super::ExitStatus).
    pub const EXIT: u16 = 0x554;
    /// Write, four bytes: a nonce. The VMM encodes a new configuration frame.
    pub const CONFIG_REQUEST: u16 = 0x558;
    /// Read: the next bytes of the [`response`](super::handshake::response) to the nonce, which is followed by the
    /// configuration frame, then by zeroes.
    pub const CONFIG_DATA: u16 = 0x55c;
}

/// The default kernel command line.
///
/// - `console=ttyS0`: messages and the payload's streams on the serial port.
/// - `quiet`: prints only warnings, because each character on the serial port is a VM exit.
/// - `reboot=k panic=-1`: a panic resets the machine immediately, over the port that the VMM watches.
/// - `tsc=reliable no_timer_check`: skips checks of the clocks, which are the host's.
/// - `noreplace-smp`: with one vCPU, the kernel would patch the lock prefixes out of its own code, which costs 3 ms of
///   boot (exact lab).
/// - `swiotlb=noforce`: no device needs bounce buffers, for which a guest with memory above 4 GiB would reserve 64 MiB.
/// - `8250.nr_uarts=1`: one serial port exists; the kernel would probe four.
/// - `percpu_alloc=page`: per-CPU areas are allocated in pages of 4 KiB. By default, the kernel allocates 2 MiB, clears
///   them, uses 170 KiB and frees the rest: 0.8 ms of boot (exact lab).
/// - `cpuhp.parallel=0`: starts processors one after the other. Processors that start in parallel spin while they wait
///   for each other, which takes time from the threads that share a host processor with them, for example the vCPU that
///   starts them: a guest with four vCPUs reaches init 18 to 31 ms earlier (exact lab).
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
    /// Init has received and applied its configuration.
    Configured = 0x13,
    /// Init has entered the image's root filesystem, if that is a disk.
    RootEntered = 0x16,
    /// Init starts the payload.
    PayloadStarted = 0x14,
    /// The payload's process has ended.
    PayloadEnded = 0x15,
    /// The agent accepts connections.
    AgentReady = 0x17,
    /// All processes are frozen: the machine can be saved as a snapshot, and its copies continue here.
    Frozen = 0x18,
}

impl BootMark {
    /// Every mark, in the order of a boot.
    pub const ALL: [Self; 9] = [
        Self::InitEntered,
        Self::FilesystemsMounted,
        Self::SystemReady,
        Self::Configured,
        Self::RootEntered,
        Self::AgentReady,
        Self::PayloadStarted,
        Self::PayloadEnded,
        Self::Frozen,
    ];

    /// The mark with this number, if it is valid.
    #[must_use]
    pub fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|&mark| mark as u8 == byte)
    }

    /// The name of the stage in reports.
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
            Self::Frozen => "init: processes frozen",
        }
    }
}

/// How a guest ended, as init writes it to [`port::EXIT`].
///
/// Bits 0 to 7 are the exit code, bits 8 to 15 are 0 for the payload and 1 for init, and the other bits are zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitStatus {
    /// The payload ended with this code: 128 + signal if a signal killed it, 127 if it was not found and 126 if it
    /// could not be executed.
    Payload(u8),
    /// Init itself failed, and printed the reason on the console.
    InitPanic,
}

impl ExitStatus {
    const INIT_PANIC: u32 = 0x0100;

    /// Encodes the status for the port.
    #[must_use]
    pub const fn to_raw(self) -> u32 {
        match self {
            Self::Payload(code) => code as u32,
            Self::InitPanic => Self::INIT_PANIC,
        }
    }

    /// Decodes the status. Returns `None` if the number is invalid.
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
    fn boot_marks_have_distinct_numbers() {
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
