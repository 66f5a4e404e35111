//! Signals by their names, as `kill` has them.

use std::os::fd::{AsRawFd, BorrowedFd};

/// What a guest's payload can be told from outside: a VMM passes on these, and dies of the last.
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

/// The C library's first and last real-time signal. The first is the VMM's own, which interrupts vCPUs with it.
const REAL_TIME: (u8, u8) = (34, 64);

/// No signal that a guest can be sent.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no signal that a guest can be sent: {names}, RTMIN+1 to RTMAX",
        names = NAMES.map(|(name, _)| name).join(", "))]
pub struct UnknownSignal(String);

/// The number of a signal by its name, with or without SIG, or by its number.
///
/// # Errors
/// When a guest cannot be sent it.
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

/// Whether it is a real-time signal that a guest can be sent: RTMIN+1 to RTMAX.
#[must_use]
pub const fn is_real_time(number: u8) -> bool {
    number > REAL_TIME.0 && number <= REAL_TIME.1
}

/// RTMIN+N or RTMAX-N.
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

/// Sends a signal, also one of those that have no name, to the process behind a pidfd. One that has ended needs none.
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
