//! The arguments of `kindling run`.

use super::{command, is_option, number, once, switch, text, value};
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
            "--workdir" | "-w" => once(&mut parsed.workdir, value(words.next())?)?,
            "--user" | "-u" => once(&mut parsed.user, text(words.next())?)?,
            "--entrypoint" => once(&mut parsed.entrypoint, value(words.next())?)?,
            "--tty" | "-t" => switch(&mut parsed.tty)?,
            "--interactive" | "-i" => switch(&mut parsed.interactive)?,
            "--detach" | "-d" => switch(&mut parsed.detach)?,
            "--memory" | "-m" => once(&mut memory, number(words.next())?)?,
            "--cpus" => once(&mut cpus, number(words.next())?)?,
            "--timeout" => {
                let seconds = number(words.next()).filter(|seconds| TIMEOUT_SECONDS.contains(seconds))?;
                once(&mut parsed.timeout, seconds)?;
            }
            "--name" => once(&mut parsed.name, text(words.next())?)?,
            "--hostname" => once(&mut parsed.hostname, value(words.next())?)?,
            "--rm" => switch(&mut parsed.rm)?,
            "--net" => once(&mut parsed.net, value(words.next())?)?,
            "--publish" | "-p" => parsed.publish.push(value(words.next())?),
            "--read-only" => switch(&mut parsed.read_only)?,
            "--volume" | "-v" => parsed.volume.push(value(words.next())?),
            "--pull" => {
                let when = text(words.next()).filter(|when| PULL.contains(&when.as_str()))?;
                once(&mut pull, when)?;
            }
            "--cold" => switch(&mut parsed.cold)?,
            "--stay" => switch(&mut parsed.stay)?,
            "--started-at" => once(&mut parsed.started_at, number(words.next())?)?,
            "--report" => switch(&mut parsed.report)?,
            _ => return None,
        }
    }
    if parsed.stay && !parsed.detach {
        return None;
    }
    parsed.command = command(words)?;
    parsed.memory = memory.unwrap_or(parsed.memory);
    parsed.cpus = cpus.unwrap_or(parsed.cpus);
    parsed.pull = pull.unwrap_or(parsed.pull);
    Some(parsed)
}

#[cfg(test)]
mod tests {
    use crate::plain::parse;
    use crate::plain::tests::{by_clap, is_plain, knows_every_option, line};
    use proptest::prelude::*;
    use std::ffi::OsString;

    #[test]
    fn a_line_with_everything_needs_no_clap() {
        is_plain(
            "kindling run -e A=1 --env B --workdir / -u a:b --entrypoint e -t -i -m 64 --cpus 2 --timeout 5 --name n \
             --hostname h --rm --net user -p 1:2 --publish 3:4 -v a:/b --read-only --pull never --cold --report --started-at 5 image sh -c -e",
        );
        is_plain("kindling run image");
        is_plain("kindling run image -- sh -c -- -e");
    }

    #[test]
    fn every_option_is_known() {
        knows_every_option("run", "", " image true", &["stay", "pull", "detach"]);
        for option in ["-d", "--detach", "-d --stay", "--pull always"] {
            is_plain(&format!("kindling run {option} image"));
        }
    }

    #[test]
    fn what_is_unusual_is_left_to_clap() {
        for text in [
            "kindling run",
            "kindling run --help",
            "kindling run -t -t image",
            "kindling run --name=a image",
            "kindling run -ti image",
            "kindling run --timeout 0 image",
            "kindling run --pull often image",
            "kindling run --memory 512m image",
            "kindling run --network user image",
            "kindling run --stay image",
            "kindling run -- image",
            "kindling run image -e",
            "kindling run image sh -- -c",
        ] {
            assert_eq!(parse(line(text)), None, "{text}");
        }
    }

    proptest! {
        /// Whatever is accepted here, clap accepts and understands in the same way.
        #[test]
        fn clap_agrees(words in prop::collection::vec(prop::sample::select(vec![
            "--env", "-e", "--env-file", "--workdir", "-w", "--user", "-u", "--entrypoint", "--tty", "-t", "-i", "-d", "--stay", "-m",
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
