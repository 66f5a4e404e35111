//! The arguments of `kindling boot`.

use super::{number, text, value};
use crate::boot::{Arguments, STDIO};
use std::ffi::OsString;

pub(super) fn parse(mut words: impl Iterator<Item = OsString>) -> Option<Arguments> {
    let mut parsed = Arguments::default();
    let mut console = None;
    while let Some(word) = words.next() {
        match word.to_str()? {
            "--image" => parsed.image = Some(value(words.next())?.into()),
            "--kernel" => parsed.kernel = Some(value(words.next())?.into()),
            "--config-file" => parsed.config_file = Some(value(words.next())?.into()),
            "--initrd" => parsed.initrd = Some(value(words.next())?.into()),
            "--cmdline" => parsed.cmdline = Some(text(words.next())?),
            "--memory" => parsed.memory = Some(number(words.next())?),
            "--vcpus" => parsed.vcpus = Some(number(words.next())?),
            "--console" => console = Some(value(words.next())?.into()),
            "--drive" => parsed.devices.drive.push(value(words.next())?),
            "--net" => parsed.devices.net.push(value(words.next())?),
            "--publish" | "-p" => parsed.devices.publish.push(value(words.next())?),
            "--vsock" => parsed.devices.vsock = Some(value(words.next())?),
            "--entropy" => parsed.devices.entropy = true,
            "--balloon" => parsed.devices.balloon = Some(number(words.next())?),
            "--pmem" => parsed.devices.pmem.push(value(words.next())?),
            "--env" | "-e" => parsed.env.push(value(words.next())?),
            "--workdir" | "-w" => parsed.workdir = Some(value(words.next())?),
            "--hostname" => parsed.hostname = Some(value(words.next())?),
            "--cold" => parsed.cold = true,
            "--report" => parsed.report = true,
            "--report-json" => parsed.report_json = Some(value(words.next())?.into()),
            "--started-at" => parsed.started_at = Some(number(words.next())?),
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

#[cfg(test)]
mod tests {
    use crate::fast_args::parse;
    use crate::fast_args::tests::{by_clap, is_fast, knows_every_option, line};
    use proptest::prelude::*;
    use std::ffi::OsString;

    #[test]
    fn a_line_with_all_options_is_parsed_without_clap() {
        is_fast(
            "kindling boot --image i --initrd r --cmdline quiet --memory 64 --vcpus 2 --console null --env A=1 \
             -e B=2 --drive d --drive e:ro --net t --net user -p 1:2 --publish 3:4 --vsock v --entropy --balloon 5 \
             --pmem m --workdir / --hostname h --cold --report --report-json j --started-at 5 -- sh -c --image",
        );
    }

    /// The others are rare, and used where the time of the parser does not matter.
    #[test]
    fn every_option_of_an_ordinary_boot_is_known() {
        let unusual = ["user", "verify", "profile", "profile-functions", "sample"];
        let sources = ["image", "kernel", "config-file"];
        knows_every_option("boot", " --image i", "", &[&unusual[..], &sources].concat());
        for source in sources {
            is_fast(&format!("kindling boot --{source} 1"));
        }
    }

    #[test]
    fn the_last_value_of_an_option_wins() {
        is_fast(
            "kindling boot --image a --image b --memory 1 --memory 2 --report --report --console a --console b",
        );
    }

    #[test]
    fn unusual_command_lines_are_parsed_by_clap() {
        for text in [
            "kindling boot",
            "kindling boot --help",
            "kindling boot --image",
            "kindling boot --image --report",
            "kindling boot --image a --kernel b",
            "kindling boot --image=a",
            "kindling boot --image a --memory +5",
            "kindling boot --image a --memory 99999999999999999999",
            "kindling boot --image a word",
            "kindling boot --image a --console ",
        ] {
            assert_eq!(parse(line(text)), None, "{text}");
        }
    }

    proptest! {
        /// Clap accepts every command line that this parser accepts, with the same result.
        #[test]
        fn clap_agrees(words in prop::collection::vec(prop::sample::select(vec![
            "--image", "--kernel", "--config-file", "--initrd", "--cmdline", "--memory", "--vcpus", "--console",
            "--env", "-e", "--workdir", "-w", "--hostname", "--cold", "--report", "--report-json", "--started-at", "--",
            "--drive", "--net", "-p", "--entropy", "--balloon", "--user", "-u", "--verify", "--profile", "--sample",
            "1", "007", "a", "a", "b=c", "-", "-1", "", "é", "boot", "help", "--image=a", "-ea",
        ]), 0..8)) {
            let line: Vec<OsString> =
                ["kindling", "boot", "--image", "i"].into_iter().chain(words).map(OsString::from).collect();
            if let Some(parsed) = parse(line.clone()) {
                prop_assert_eq!(Some(parsed), by_clap(&line));
            }
        }
    }
}
