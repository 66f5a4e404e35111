//! The guest's configuration: from the VMM, or from the kernel command line under another monitor.

use crate::machine;
use crate::panic::fatal;
use alloc::string::String;
use alloc::vec::Vec;
use core::time::Duration;
use guest_init::{GuestConfig, command_line};
use guest_protocol::config::BootInfo;
use rustix::fs::{Mode, OFlags, open};
use rustix::time::{ClockId, clock_gettime};

/// The configuration, and when it was received.
pub(crate) struct Configuration {
    pub(crate) guest: GuestConfig,
    pub(crate) boot: BootInfo,
    /// The guest's monotonic clock when the configuration was received.
    pub(crate) received: Duration,
}

/// Requests the configuration from the VMM, and reads the kernel command line if there is no VMM of Kindling.
pub(crate) fn read() -> Configuration {
    let (guest, boot) = match machine::read_configuration() {
        Ok(Some(frame)) => GuestConfig::from_frame(&frame)
            .unwrap_or_else(|error| fatal(format_args!("{error}; init and VMM are of different versions"))),
        Ok(None) => {
            let guest = command_line::parse(&kernel_command_line()).unwrap_or_else(|error| {
                fatal(format_args!(
                    "{}={} on the kernel command line is not a number from 0 to 4294967294",
                    error.name,
                    String::from_utf8_lossy(&error.value)
                ))
            });
            (guest, BootInfo::default())
        }
        Err(length) => fatal(format_args!("the VMM announced a configuration of {length} bytes")),
    };
    Configuration { guest, boot, received: now() }
}

/// The guest's monotonic clock.
pub(crate) fn now() -> Duration {
    let time = clock_gettime(ClockId::Monotonic);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}

fn kernel_command_line() -> Vec<u8> {
    // COMMAND_LINE_SIZE of arch/x86/include/asm/setup.h.
    let mut line = alloc::vec![0; 2048];
    let length = open("/proc/cmdline", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .and_then(|file| rustix::io::read(file, &mut line[..]))
        .unwrap_or_else(|error| fatal(format_args!("cannot read /proc/cmdline: {error}")));
    line.truncate(length);
    line
}
