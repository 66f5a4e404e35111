//! A fast parser for the common forms of command lines.
//!
//! Clap builds a description of every option of every command before it parses the first argument, which takes longer
//! than KVM takes to create a VM. This parser recognizes unambiguous command lines only: each option by its full name or
//! its letter, with its value in the next argument. For all others it returns `None`, and clap parses the command line and
//! prints help and errors.

mod boot;
mod exec;
mod run;

use crate::Command;
use std::ffi::{OsStr, OsString};
use std::str::FromStr;

/// Parses a command line. Returns `None` for one that clap must parse.
pub(crate) fn parse(line: impl IntoIterator<Item = OsString>) -> Option<Command> {
    let mut words = line.into_iter().collect::<Vec<_>>().into_iter();
    words.next();
    Some(match words.next()?.to_str()? {
        "boot" => Command::Boot(Box::new(boot::parse(words)?)),
        "run" => Command::Run(Box::new(run::parse(words)?)),
        "stay" if words.len() == 0 => Command::Stay,
        "exec" => Command::Exec(exec::parse(words)?),
        _ => return None,
    })
}

/// The value of an option, unless it is empty or may be an option itself.
fn value(word: Option<OsString>) -> Option<OsString> {
    word.filter(|word| !word.is_empty() && !is_option(word))
}

fn is_option(word: &OsStr) -> bool {
    word.as_encoded_bytes().starts_with(b"-")
}

fn text(word: Option<OsString>) -> Option<String> {
    value(word)?.into_string().ok()
}

fn number(word: Option<OsString>) -> Option<u64> {
    let word = text(word)?;
    // Clap decides whether a sign is accepted.
    word.bytes().all(|byte| byte.is_ascii_digit()).then(|| u64::from_str(&word).ok())?
}

/// The words of a command, which may follow a `--`. Returns `None` if clap may interpret one of them.
fn command(mut words: impl Iterator<Item = OsString>) -> Option<Vec<OsString>> {
    let Some(first) = words.next() else { return Some(Vec::new()) };
    if first == "--" {
        return Some(words.collect());
    }
    let words: Vec<_> = std::iter::once(first).chain(words).collect();
    (!is_option(words.first()?) && !words.iter().any(|word| word == "--")).then_some(words)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    /// Parses a command line by clap. Returns `None` if clap rejects it.
    pub(super) fn by_clap(line: &[OsString]) -> Option<Command> {
        Some(crate::Arguments::try_parse_from(line).ok()?.command)
    }

    pub(super) fn line(text: &str) -> Vec<OsString> {
        text.split(' ').map(OsString::from).collect()
    }

    /// Asserts that both parsers accept a command line, with the same result.
    pub(super) fn is_fast(text: &str) {
        let line = line(text);
        assert!(parse(line.clone()).is_some(), "{text}");
        assert_eq!(parse(line.clone()), by_clap(&line), "{text}");
    }

    /// Asserts that this parser recognizes every option of a command except `unusual`. A new option fails this test until
    /// it is added here.
    pub(super) fn knows_every_option(command: &str, before: &str, after: &str, unusual: &[&str]) {
        use clap::CommandFactory;
        let all = crate::Arguments::command();
        for option in all.find_subcommand(command).unwrap().get_arguments() {
            let Some(name) = option.get_long().filter(|name| !unusual.contains(name)) else { continue };
            let value = if option.get_action().takes_values() { " 1" } else { "" };
            is_fast(&format!("kindling {command}{before} --{name}{value}{after}"));
            if let Some(letter) = option.get_short() {
                is_fast(&format!("kindling {command}{before} -{letter}{value}{after}"));
            }
        }
    }

    #[test]
    fn other_commands_are_parsed_by_clap() {
        for text in ["kindling", "kindling doctor", "kindling --help", "kindling Run image"] {
            assert_eq!(parse(line(text)), None, "{text}");
        }
    }
}
