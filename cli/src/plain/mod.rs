//! Command lines as programs write them.
//!
//! Clap builds a description of every option of every command in memory before it looks at the first argument. That
//! takes longer than KVM takes to create a VM. So what is beyond doubt is read here: each option
//! by its full name or its letter, with its value in the next argument. For all else this says nothing, and clap
//! answers: it has the help and every message.

mod boot;
mod exec;
mod run;

use crate::Command;
use std::ffi::{OsStr, OsString};
use std::str::FromStr;

/// The command that a line asks for, or `None` where clap has to look at it.
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

/// What follows an option, unless it is empty or may be meant as an option itself.
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
    // A sign in front is for clap to judge.
    word.bytes().all(|byte| byte.is_ascii_digit()).then(|| u64::from_str(&word).ok())?
}

/// All words of a command, which may follow a `--`; nothing where some of them may mean something to clap.
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

    /// What clap makes of a command line, if it accepts it.
    pub(super) fn by_clap(line: &[OsString]) -> Option<Command> {
        Some(crate::Arguments::try_parse_from(line).ok()?.command)
    }

    pub(super) fn line(text: &str) -> Vec<OsString> {
        text.split(' ').map(OsString::from).collect()
    }

    /// Clap accepts what is accepted here, and understands the same.
    pub(super) fn is_plain(text: &str) {
        let line = line(text);
        assert!(parse(line.clone()).is_some(), "{text}");
        assert_eq!(parse(line.clone()), by_clap(&line), "{text}");
    }

    /// Every option of a command but those named is read here. An option that is added is read by clap alone until
    /// somebody adds it here.
    pub(super) fn knows_every_option(command: &str, before: &str, after: &str, unusual: &[&str]) {
        use clap::CommandFactory;
        let all = crate::Arguments::command();
        for option in all.find_subcommand(command).unwrap().get_arguments() {
            let Some(name) = option.get_long().filter(|name| !unusual.contains(name)) else { continue };
            let value = if option.get_action().takes_values() { " 1" } else { "" };
            is_plain(&format!("kindling {command}{before} --{name}{value}{after}"));
            if let Some(letter) = option.get_short() {
                is_plain(&format!("kindling {command}{before} -{letter}{value}{after}"));
            }
        }
    }

    #[test]
    fn other_commands_are_left_to_clap() {
        for text in ["kindling", "kindling doctor", "kindling --help", "kindling Run image"] {
            assert_eq!(parse(line(text)), None, "{text}");
        }
    }
}
