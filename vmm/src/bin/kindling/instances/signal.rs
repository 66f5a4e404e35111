//! Signals by their names, as `kill` has them.

use rustix::process::Signal;

/// What a guest's payload can be told from outside: a VMM passes on these, and dies of the last.
const NAMES: [(&str, Signal); 10] = [
    ("HUP", Signal::HUP),
    ("INT", Signal::INT),
    ("QUIT", Signal::QUIT),
    ("USR1", Signal::USR1),
    ("USR2", Signal::USR2),
    ("ALRM", Signal::ALARM),
    ("TERM", Signal::TERM),
    ("CONT", Signal::CONT),
    ("WINCH", Signal::WINCH),
    ("KILL", Signal::KILL),
];

/// No signal that a guest can be sent.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no signal that a guest can be sent: {names}", names = NAMES.map(|(name, _)| name).join(", "))]
pub(crate) struct UnknownSignal(String);

/// A signal of a name with or without SIG, or of a number.
pub(crate) fn parse(text: &str) -> Result<Signal, UnknownSignal> {
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let is_it = |(known, signal): &&(&str, Signal)| *known == name || Ok(signal.as_raw()) == text.parse();
    NAMES.iter().find(is_it).map(|&(_, signal)| signal).ok_or_else(|| UnknownSignal(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_names_and_numbers() {
        for text in ["TERM", "sigterm", "SIGTERM", "15"] {
            assert_eq!(parse(text).unwrap(), Signal::TERM, "{text}");
        }
        assert_eq!(parse("9").unwrap(), Signal::KILL);
        for text in ["", "SIG", "STOP", "0", "-15", "SEGV"] {
            parse(text).unwrap_err();
        }
    }
}
