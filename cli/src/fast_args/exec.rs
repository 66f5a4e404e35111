//! The arguments of `kindling exec`.

use super::{command, is_option, text, value};
use crate::exec::Arguments;
use std::ffi::OsString;

pub(super) fn parse(mut words: impl Iterator<Item = OsString>) -> Option<Arguments> {
    let mut parsed = Arguments::default();
    loop {
        let word = words.next()?;
        if !is_option(&word) {
            parsed.name = word.into_string().ok().filter(|name| !name.is_empty())?;
            break;
        }
        match word.to_str()? {
            "--env" | "-e" => parsed.env.push(value(words.next())?),
            "--env-file" => parsed.env_file.push(value(words.next())?.into()),
            "--workdir" | "-w" => parsed.workdir = Some(value(words.next())?),
            "--user" | "-u" => parsed.user = Some(text(words.next())?),
            "--tty" | "-t" => parsed.tty = true,
            "--interactive" | "-i" => parsed.interactive = true,
            _ => return None,
        }
    }
    parsed.command = command(words)?;
    (!parsed.command.is_empty()).then_some(parsed)
}

#[cfg(test)]
mod tests {
    use crate::fast_args::parse;
    use crate::fast_args::tests::{by_clap, is_fast, knows_every_option, line};
    use proptest::prelude::*;
    use std::ffi::OsString;

    #[test]
    fn ordinary_lines_are_parsed_without_clap() {
        is_fast("kindling exec -e A=1 --env B --workdir / -u a:b -t -i name sh -c -e");
        is_fast("kindling exec -t -t -w /a -w /b -u a -u b name true");
        is_fast("kindling exec name true");
        is_fast("kindling exec name -- true -- -e");
        knows_every_option("exec", "", " name true", &[]);
    }

    #[test]
    fn unusual_command_lines_are_parsed_by_clap() {
        for text in [
            "kindling exec",
            "kindling exec --help",
            "kindling exec name",
            "kindling exec name -e",
            "kindling exec name --",
        ] {
            assert_eq!(parse(line(text)), None, "{text}");
        }
    }

    proptest! {
        /// Clap accepts every command line that this parser accepts, with the same result.
        #[test]
        fn clap_agrees(words in prop::collection::vec(prop::sample::select(vec![
            "--env", "-e", "--env-file", "--workdir", "-w", "--user", "-u", "--tty", "-t", "-i", "--", "1", "a", "a", "b=c", "-", "-1",
            "", "é", "exec", "help", "--name=a", "-ti", "-ea",
        ]), 0..6)) {
            let line: Vec<OsString> = ["kindling", "exec"].into_iter().chain(words).map(OsString::from).collect();
            if let Some(parsed) = parse(line.clone()) {
                prop_assert_eq!(Some(parsed), by_clap(&line));
            }
        }
    }
}
