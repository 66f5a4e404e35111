//! The arguments of `kindling boot` where they are as programs write them.
//!
//! Clap builds a description of every option in memory before it looks at the first argument. That
//! takes 0.2 ms, as long as KVM takes to create a VM. So what is beyond doubt is read here: each option
//! by its full name, once, with its value in the next argument. For all else this says nothing, and clap
//! answers: it has the help and every message.

use crate::boot::{Arguments, STDIO};
use std::ffi::{OsStr, OsString};
use std::str::FromStr;

/// The arguments of `boot`, or `None` where clap has to look at them.
pub(crate) fn parse(arguments: impl IntoIterator<Item = OsString>) -> Option<Arguments> {
    let mut words = arguments.into_iter().skip(1);
    if words.next()? != "boot" {
        return None;
    }
    let mut parsed = Arguments::default();
    let mut console = None;
    while let Some(word) = words.next() {
        match word.to_str()? {
            "--image" => once(&mut parsed.image, value(words.next())?.into())?,
            "--kernel" => once(&mut parsed.kernel, value(words.next())?.into())?,
            "--config-file" => once(&mut parsed.config_file, value(words.next())?.into())?,
            "--initrd" => once(&mut parsed.initrd, value(words.next())?.into())?,
            "--cmdline" => once(&mut parsed.cmdline, value(words.next())?.into_string().ok()?)?,
            "--memory" => once(&mut parsed.memory, number(words.next())?)?,
            "--vcpus" => once(&mut parsed.vcpus, number(words.next())?)?,
            "--console" => once(&mut console, value(words.next())?.into())?,
            "--drive" => parsed.devices.drive.push(value(words.next())?),
            "--net" => parsed.devices.net.push(value(words.next())?),
            "--publish" | "-p" => parsed.devices.publish.push(value(words.next())?),
            "--vsock" => once(&mut parsed.devices.vsock, value(words.next())?)?,
            "--entropy" if !parsed.devices.entropy => parsed.devices.entropy = true,
            "--balloon" => once(&mut parsed.devices.balloon, number(words.next())?)?,
            "--pmem" => parsed.devices.pmem.push(value(words.next())?),
            "--env" | "-e" => parsed.env.push(value(words.next())?),
            "--workdir" | "-w" => once(&mut parsed.workdir, value(words.next())?)?,
            "--hostname" => once(&mut parsed.hostname, value(words.next())?)?,
            "--cold" if !parsed.cold => parsed.cold = true,
            "--report" if !parsed.report => parsed.report = true,
            "--report-json" => once(&mut parsed.report_json, value(words.next())?.into())?,
            "--started-at" => once(&mut parsed.started_at, number(words.next())?)?,
            "--" => {
                parsed.command = words.collect();
                break;
            }
            _ => return None,
        }
    }
    let sources = [&parsed.image, &parsed.kernel, &parsed.config_file];
    if sources.into_iter().flatten().count() != 1 {
        return None;
    }
    parsed.console = console.unwrap_or_else(|| STDIO.into());
    Some(parsed)
}

/// What follows an option, unless it is empty or may be meant as an option itself.
fn value(word: Option<OsString>) -> Option<OsString> {
    word.filter(|word| !word.is_empty() && !OsStr::as_encoded_bytes(word).starts_with(b"-"))
}

fn number(word: Option<OsString>) -> Option<u64> {
    let word = value(word)?.into_string().ok()?;
    // A sign in front is for clap to judge.
    word.bytes().all(|byte| byte.is_ascii_digit()).then(|| u64::from_str(&word).ok())?
}

/// Fills an option that was not given before.
fn once<T>(option: &mut Option<T>, value: T) -> Option<()> {
    option.is_none().then(|| *option = Some(value))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Command;
    use clap::{CommandFactory, Parser};
    use proptest::prelude::*;

    /// What clap makes of a command line, if it accepts it.
    fn by_clap(line: &[OsString]) -> Option<Arguments> {
        match crate::Arguments::try_parse_from(line).ok()?.command {
            Command::Boot(arguments) => Some(*arguments),
            _ => None,
        }
    }

    fn line(text: &str) -> Vec<OsString> {
        text.split(' ').map(OsString::from).collect()
    }

    #[test]
    fn a_line_with_everything_needs_no_clap() {
        let line = line(
            "kindling boot --image i --initrd r --cmdline quiet --memory 64 --vcpus 2 --console null --env A=1 \
             -e B=2 --drive d --drive e:ro --net t --net user -p 1:2 --publish 3:4 --vsock v --entropy --balloon 5 \
             --pmem m --workdir / --hostname h --cold --report --report-json j --started-at 5 -- sh -c --image",
        );
        assert!(parse(line.clone()).is_some());
        assert_eq!(parse(line.clone()), by_clap(&line));
    }

    /// An option that is added is read by clap alone until somebody adds it here. Those that are named
    /// cost nobody anything, because whoever gives them does not count microseconds.
    #[test]
    fn every_option_of_an_ordinary_boot_is_known() {
        let command = crate::Arguments::command();
        let boot = command.find_subcommand("boot").unwrap();
        for option in boot.get_arguments().filter_map(clap::Arg::get_long) {
            if ["user", "verify", "profile", "profile-functions", "sample"].contains(&option) {
                continue;
            }
            let source = match option {
                "image" | "kernel" | "config-file" => "",
                _ => " --image i",
            };
            let value = if ["report", "cold", "entropy"].contains(&option) { "" } else { " 1" };
            let line = line(&format!("kindling boot{source} --{option}{value}"));
            assert!(parse(line.clone()).is_some(), "--{option}");
            assert_eq!(parse(line.clone()), by_clap(&line), "--{option}");
        }
    }

    #[test]
    fn what_is_unusual_is_left_to_clap() {
        for text in [
            "kindling",
            "kindling boot",
            "kindling doctor",
            "kindling boot --help",
            "kindling boot --image",
            "kindling boot --image --report",
            "kindling boot --image a --image b",
            "kindling boot --image a --kernel b",
            "kindling boot --image=a",
            "kindling boot --image a --memory +5",
            "kindling boot --image a --memory 99999999999999999999",
            "kindling boot --image a word",
            "kindling boot --image a --report --report",
            "kindling boot --image a --console ",
        ] {
            assert_eq!(parse(line(text)), None, "{text}");
        }
    }

    proptest! {
        /// Whatever is accepted here, clap accepts and understands in the same way.
        #[test]
        fn clap_agrees(words in prop::collection::vec(prop::sample::select(vec![
            "--image", "--kernel", "--config-file", "--initrd", "--cmdline", "--memory", "--vcpus", "--console",
            "--env", "-e", "--workdir", "-w", "--hostname", "--cold", "--report", "--report-json", "--started-at", "--",
            "--drive", "--net", "-p", "--entropy", "--balloon", "--user", "-u", "--verify", "--profile", "--sample", "1", "007", "a", "a", "b=c", "-", "-1", "", "é",
            "boot", "help", "--image=a", "-ea",
        ]), 0..8)) {
            let line: Vec<OsString> =
                ["kindling", "boot", "--image", "i"].into_iter().chain(words).map(OsString::from).collect();
            if let Some(parsed) = parse(line.clone()) {
                prop_assert_eq!(Some(parsed), by_clap(&line));
            }
        }
    }
}
