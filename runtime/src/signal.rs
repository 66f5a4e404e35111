//! Signals that can be sent to guests, by name and number.

use std::os::fd::{AsRawFd, BorrowedFd};

/// Names of the signals for a guest's payload. The front forwards all except SIGKILL, which ends the guest.
const NAMES: [(&str, libc::c_int); 10] = [
    ("HUP", libc::SIGHUP),
    ("INT", libc::SIGINT),
    ("QUIT", libc::SIGQUIT),
    ("USR1", libc::SIGUSR1),
    ("USR2", libc::SIGUSR2),
    ("ALRM", libc::SIGALRM),
    ("TERM", libc::SIGTERM),
    ("CONT", libc::SIGCONT),
    ("WINCH", libc::SIGWINCH),
    ("KILL", libc::SIGKILL),
];

/// The signal with which [`Guest::kill`](crate::Guest::kill) requests a front to end its guest immediately: SIGPWR.
pub const END_GUEST: u8 = 30;

/// The C library's SIGRTMIN and SIGRTMAX. The VMM uses SIGRTMIN itself, to interrupt vCPUs.
const REAL_TIME: (u8, u8) = (34, 64);

/// An invalid signal, or one that cannot be sent to a guest.
#[derive(Debug, thiserror::Error)]
#[error("invalid signal {0:?}: use {names}, or RTMIN+1 to RTMAX",
        names = NAMES.map(|(name, _)| name).join(", "))]
pub struct UnknownSignal(String);

/// Parses a signal: its name, with or without SIG and in any case, or its number. Returns the number.
///
/// # Errors
/// When there is no such signal, or it cannot be sent to a guest.
pub fn parse(text: &str) -> Result<u8, UnknownSignal> {
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let number = match NAMES.iter().find(|(known, _)| *known == name) {
        Some(&(_, number)) => u8::try_from(number).ok(),
        None => real_time(name).or_else(|| text.parse().ok()),
    };
    let is_one =
        |number: &u8| is_real_time(*number) || NAMES.iter().any(|&(_, known)| known == i32::from(*number));
    number.filter(is_one).ok_or_else(|| UnknownSignal(text.to_owned()))
}

/// Returns whether `number` is a real-time signal that can be sent to a guest: RTMIN+1 to RTMAX.
#[must_use]
pub const fn is_real_time(number: u8) -> bool {
    number > REAL_TIME.0 && number <= REAL_TIME.1
}

/// Parses `RTMIN+N` or `RTMAX-N`.
fn real_time(name: &str) -> Option<u8> {
    let distance = |text: &str, sign| match text {
        "" => Some(0),
        text => text.strip_prefix(sign)?.parse::<u8>().ok(),
    };
    match name.strip_prefix("RTMIN") {
        Some(rest) => REAL_TIME.0.checked_add(distance(rest, '+')?),
        None => REAL_TIME.1.checked_sub(distance(name.strip_prefix("RTMAX")?, '-')?),
    }
}

/// Sends a signal to the process of a pidfd. No effect if the process has ended.
#[expect(unsafe_code, reason = "real-time signals have no safe interface")]
pub(crate) fn send(process: BorrowedFd<'_>, signal: u8) {
    let (signal, nothing) = (libc::c_int::from(signal), std::ptr::null::<libc::siginfo_t>());
    // SAFETY: the descriptor is open, and without details of the signal the kernel reads no memory.
    unsafe { libc::syscall(libc::SYS_pidfd_send_signal, process.as_raw_fd(), signal, nothing, 0) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_names_and_numbers() {
        for text in ["TERM", "sigterm", "SIGTERM", "15"] {
            assert_eq!(parse(text).unwrap(), 15, "{text}");
        }
        assert_eq!(parse("9").unwrap(), 9);
        for (text, number) in
            [("SIGRTMIN+3", 37), ("rtmin+30", 64), ("RTMAX", 64), ("SIGRTMAX-29", 35), ("40", 40)]
        {
            assert_eq!(parse(text).unwrap(), number, "{text}");
        }
        for text in [
            "", "SIG", "STOP", "0", "-15", "SEGV", "RTMIN", "34", "RTMIN+31", "RTMAX-30", "RTMAX-99",
            "RTMIN-1", "65",
        ] {
            parse(text).unwrap_err();
        }
    }
}
