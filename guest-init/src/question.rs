//! The one question init asks: what shall I run?

use crate::machine;
use crate::voice::give_up;
use alloc::string::String;
use alloc::vec::Vec;
use core::time::Duration;
use guest_init::payload_spec::PayloadSpec;
use rustix::fs::{Mode, OFlags, open};
use rustix::time::{ClockId, clock_gettime};

/// The answer, and when it came.
pub(crate) struct Answer {
    /// What to run, and how.
    pub(crate) spec: PayloadSpec,
    /// The guest's monotonic clock at the answer.
    pub(crate) received: Duration,
}

/// Asks the VMM, and reads the kernel command line where none answers.
pub(crate) fn ask() -> Answer {
    let spec = match machine::read_configuration() {
        Ok(Some(frame)) => PayloadSpec::from_frame(&frame)
            .unwrap_or_else(|error| give_up(format_args!("{error}; init and VMM are of different versions"))),
        Ok(None) => PayloadSpec::from_command_line(&command_line()).unwrap_or_else(|error| {
            give_up(format_args!(
                "{}={} on the kernel command line is not a number from 0 to 4294967294",
                error.name,
                String::from_utf8_lossy(&error.value)
            ))
        }),
        Err(length) => give_up(format_args!("the VMM announced a configuration of {length} bytes")),
    };
    Answer { spec, received: now() }
}

/// The guest's monotonic clock.
pub(crate) fn now() -> Duration {
    let time = clock_gettime(ClockId::Monotonic);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}

fn command_line() -> Vec<u8> {
    // COMMAND_LINE_SIZE of arch/x86/include/asm/setup.h.
    let mut line = alloc::vec![0; 2048];
    let length = open("/proc/cmdline", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .and_then(|file| rustix::io::read(file, &mut line[..]))
        .unwrap_or_else(|error| give_up(format_args!("cannot read /proc/cmdline: {error}")));
    line.truncate(length);
    line
}
