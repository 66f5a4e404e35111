//! The arguments of `kindling run`.

use super::{command, is_option, number, text, value};
use crate::run::{Arguments, PULL, TIMEOUT_SECONDS};
use std::ffi::OsString;

pub(super) fn parse(mut words: impl Iterator<Item = OsString>) -> Option<Arguments> {
    let mut parsed = Arguments::default();
    let (mut memory, mut cpus, mut pull) = (None, None, None);
    loop {
        let word = words.next()?;
        if !is_option(&word) {
            parsed.image = Some(word).filter(|image| !image.is_empty())?;
            break;
        }
        match word.to_str()? {
            "--env" | "-e" => parsed.env.push(value(words.next())?),
            "--env-file" => parsed.env_file.push(value(words.next())?.into()),
            "--workdir" | "-w" => parsed.workdir = Some(value(words.next())?),
            "--user" | "-u" => parsed.user = Some(text(words.next())?),
            "--entrypoint" => parsed.entrypoint = Some(value(words.next())?),
            "--tty" | "-t" => parsed.tty = true,
            "--interactive" | "-i" => parsed.interactive = true,
            "--detach" | "-d" => parsed.detach = true,
            "--memory" | "-m" => memory = Some(number(words.next())?),
            "--cpus" => cpus = Some(number(words.next())?),
            "--timeout" => {
                let seconds = number(words.next()).filter(|seconds| TIMEOUT_SECONDS.contains(seconds))?;
                parsed.timeout = Some(seconds);
            }
            "--name" => parsed.name = Some(text(words.next())?),
            "--hostname" => parsed.hostname = Some(value(words.next())?),
            "--rm" => parsed.rm = true,
            "--net" => parsed.net = Some(value(words.next())?),
            "--publish" | "-p" => parsed.publish.push(value(words.next())?),
            "--read-only" => parsed.read_only = true,
            "--volume" | "-v" => parsed.volume.push(value(words.next())?),
            "--pull" => {
                let when = text(words.next()).filter(|when| PULL.contains(&when.as_str()))?;
                pull = Some(when);
            }
            "--cold" => parsed.cold = true,
            "--started-at" => parsed.started_at = Some(number(words.next())?),
            "--report" => parsed.report = true,
            _ => return None,
        }
    }
    parsed.command = command(words)?;
    parsed.memory = memory.unwrap_or(parsed.memory);
    parsed.cpus = cpus.unwrap_or(parsed.cpus);
    parsed.pull = pull.unwrap_or(parsed.pull);
    Some(parsed)
}

#[cfg(test)]
mod tests {
    use crate::fast_args::parse;
    use crate::fast_args::tests::{by_clap, is_fast, knows_every_option, line};
    use proptest::prelude::*;
    use std::ffi::OsString;

    #[test]
    fn a_line_with_all_options_is_parsed_without_clap() {
        is_fast(
            "kindling run -e A=1 --env B --workdir / -u a:b --entrypoint e -t -i -m 64 --cpus 2 --timeout 5 --name n \
             --hostname h --rm --net user -p 1:2 --publish 3:4 -v a:/b --read-only --pull never --cold --report --started-at 5 image sh -c -e",
        );
        is_fast("kindling run image");
        is_fast("kindling run image -- sh -c -- -e");
    }

    #[test]
    fn every_option_is_known() {
        knows_every_option("run", "", " image true", &["pull"]);
        for option in [
            "--pull always",
            "-t -t -d -d",
            "-m 64 -m 65 --name a --name b -w / -w /b --pull never --pull always",
        ] {
            is_fast(&format!("kindling run {option} image"));
        }
    }

    #[test]
    fn unusual_command_lines_are_parsed_by_clap() {
        for text in [
            "kindling run",
            "kindling run --help",
            "kindling run --name=a image",
            "kindling run -ti image",
            "kindling run --timeout 0 image",
            "kindling run --pull often image",
            "kindling run --memory 512m image",
            "kindling run --network user image",
            "kindling stay image",
            "kindling run -- image",
            "kindling run image -e",
            "kindling run image sh -- -c",
        ] {
            assert_eq!(parse(line(text)), None, "{text}");
        }
    }

    proptest! {
        /// Clap accepts every command line that this parser accepts, with the same result.
        #[test]
        fn clap_agrees(words in prop::collection::vec(prop::sample::select(vec![
            "--env", "-e", "--env-file", "--workdir", "-w", "--user", "-u", "--entrypoint", "--tty", "-t", "-i", "-d", "-m",
            "--memory", "--cpus", "--timeout", "--name", "--hostname", "--rm", "--net", "-p", "--pull", "never", "--cold",
            "--started-at", "--report", "--", "1", "007", "a", "a", "b=c", "-", "-1", "", "é", "run", "help",
            "--name=a", "-ti", "-ea",
        ]), 0..8)) {
            let line: Vec<OsString> = ["kindling", "run"].into_iter().chain(words).map(OsString::from).collect();
            if let Some(parsed) = parse(line.clone()) {
                prop_assert_eq!(Some(parsed), by_clap(&line));
            }
        }
    }
}
