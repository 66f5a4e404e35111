//! The arguments of `kindling run`.

use crate::command_line::{Argument, Command, Opt, Store, flag, in_range, option, optional, rest, store_as};
use crate::process::{ProcessArguments, ProcessOptions};
use kindling::launch::{Jail, Limits, OnRefusal, Strictness};
use kindling::size;
use std::ffi::OsString;
use std::ops::RangeInclusive;
use std::path::{Component, Path, PathBuf};

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Arguments {
    /// With a template, the first word of the command; empty without a command.
    pub(crate) image: OsString,
    pub(crate) template: Option<String>,
    /// The directory of a snapshot, with `kindling restore`; then there is no command.
    pub(crate) snapshot: Option<PathBuf>,
    pub(crate) process: ProcessArguments,
    pub(crate) entrypoint: Option<OsString>,
    pub(crate) detach: bool,
    /// Whether this process is the front of a detached guest.
    pub(crate) stay: bool,
    /// In MiB.
    pub(crate) memory: Option<u64>,
    pub(crate) cpus: Option<u64>,
    pub(crate) limits: Limits,
    pub(crate) cgroup_parent: Option<PathBuf>,
    /// In seconds.
    pub(crate) timeout: Option<u64>,
    pub(crate) name: Option<String>,
    pub(crate) hostname: Option<OsString>,
    pub(crate) rm: bool,
    pub(crate) net: Option<OsString>,
    pub(crate) publish: Vec<OsString>,
    pub(crate) volume: Vec<OsString>,
    pub(crate) read_only: bool,
    pub(crate) pull: String,
    pub(crate) cold: bool,
    pub(crate) spare: bool,
    pub(crate) jail: Jail,
    /// `CLOCK_MONOTONIC` in nanoseconds when the caller started this command.
    pub(crate) started_at: Option<u64>,
    pub(crate) report: bool,
    pub(crate) command: Vec<OsString>,
}

pub(crate) const COMMAND: Command<Arguments> =
    Command::new("run", "Run a command in a new microVM", super::run)
        .options(ProcessOptions::TABLE)
        .more_options(OPTIONS)
        .arguments(ARGUMENTS)
        .check(check);

impl AsMut<ProcessArguments> for Arguments {
    fn as_mut(&mut self) -> &mut ProcessArguments {
        &mut self.process
    }
}

impl Arguments {
    /// Stores the value of `--cpus`.
    fn store_cpus(&mut self, word: OsString) -> Result<(), String> {
        let mut value = (0, None);
        store_as(&mut value, word, processors)?;
        (self.cpus, self.limits.cpu_millis) = (Some(value.0), value.1);
        Ok(())
    }

    /// The command, whose first word is in the place of the image if there is a template.
    pub(crate) fn command(&self) -> Vec<OsString> {
        let first = self.template.iter().map(|_| &self.image).filter(|word| !word.is_empty());
        first.chain(&self.command).cloned().collect()
    }
}

#[rustfmt::skip]
const OPTIONS: &[Opt<Arguments>] = &[
    option("", "template", "NAME", |all, word| all.template.store(word),
        "Run the command in a copy of a template of `kindling template create`, instead of a guest from an image"),
    option("", "entrypoint", "PROGRAM", |all, word| all.entrypoint.store(word),
        "Override the entrypoint of the image"),
    flag("d", "detach", |all| all.detach = true,
        "Run in the background, and print the name of the guest; `kindling logs` prints its output"),
    option("m", "memory", "MIB", |all, word| store_as(&mut all.memory, word, |text| mebibytes(text).map(Some)),
        "Memory in MiB, or with the suffix m or g: 512, 512m, 2g [default: 512]"),
    option("", "cpus", "N", |all, word| all.store_cpus(word),
        "Number of vCPUs, 1 to 16, or with a fraction such as 1.5: that much processor time, by a cgroup [default: 1]"),
    option("", "cgroup-parent", "CGROUP", |all, word| store_as(&mut all.cgroup_parent, word, cgroup),
        "Give the guest's monitor a cgroup in this one, with limits of memory and threads"),
    option("", "pids-limit", "N", |all, word| store_as(&mut all.limits.processes, word, some_in(PROCESSES)),
        "Maximum number of processes and threads in the guest"),
    option("", "disk-bps", "BYTES", |all, word| store_as(&mut all.limits.disk_bandwidth, word, rate),
        "Maximum of bytes per second from and to each disk, or with the suffix k, m or g: 10m"),
    option("", "disk-iops", "N", |all, word| store_as(&mut all.limits.disk_operations, word, some_in(RATES)),
        "Maximum of requests per second to each disk"),
    option("", "net-bps", "BYTES", |all, word| store_as(&mut all.limits.network_bandwidth, word, rate),
        "Maximum of bytes per second that the guest sends, and that it receives"),
    option("", "timeout", "SECONDS", |all, word| store_as(&mut all.timeout, word, some_in(TIMEOUT_SECONDS)),
        "Kill the guest after this time, with exit status 124"),
    option("", "name", "NAME", |all, word| all.name.store(word),
        "Name of the guest, for `kindling exec` and others [default: random]"),
    option("", "hostname", "NAME", |all, word| all.hostname.store(word),
        "Hostname of the guest [default: the name of the guest]"),
    flag("", "rm", |all| all.rm = true,
        "Remove a detached guest when it ends; a guest in the foreground is always removed"),
    option("", "net", "none|user|TAP", |all, word| all.net.store(word),
        "Network: none, user (through passt, without root), or a tap device [default: none]"),
    option("", "network", "", |all, word| all.net.store(word), ""),
    option("p", "publish", "[[ADDRESS:][HOST]:]GUEST[/tcp|/udp]", |all, word| all.publish.store(word),
        "Publish a port of the guest on the host, by --net user; without HOST, on any free port (repeatable)"),
    option("v", "volume", "SOURCE:GUEST[:ro]", |all, word| all.volume.store(word),
        "Mount a volume, or a directory of the host, at a path in the guest (repeatable)"),
    flag("", "read-only", |all| all.read_only = true,
        "Mount the root filesystem read-only; volumes, shared directories, /dev/shm, /run, /tmp and \
         /var/tmp stay writable"),
    option("", "pull", "missing|always|never", |all, word| store_as(&mut all.pull, word, pull),
        "When to pull the image from its registry [default: missing]"),
    option("", "jail", "require|full|best-effort|off", |all, word| store_as(&mut all.jail.strictness, word, strictness),
        "Fail if the host lacks a layer of the monitor's jail, add namespaces and an empty root directory, skip \
         what the host lacks, or use no jail [default: fail if the host lacks what every supported kernel has]"),
    option("", "seccomp", "end|log", |all, word| store_as(&mut all.jail.on_refusal, word, on_refusal),
        "What happens if the monitor executes a system call that its jail refuses: end the guest, or let the kernel log \
         the call [default: end]"),
    flag("", "cold", |all| all.cold = true,
        "Boot the kernel even if there is a pre-booted one"),
    flag("", "spare", |all| all.spare = true,
        "Use a machine that was started ahead, if there is one, and start another for the next command; also with \
         KINDLING_SPARE=1"),
    option("", "started-at", "NS", |all, word| all.started_at.store(word), ""),
    flag("", "report", |all| all.report = true,
        "Print the times of the steps on standard error at the end"),
];

#[rustfmt::skip]
const ARGUMENTS: &[Argument<Arguments>] = &[
    optional("IMAGE", |all, word| all.image.store(word),
        "Image: a name of a registry, the path of a `docker save` archive or an OCI layout, or an EROFS \
         file; left out with --template"),
    rest("COMMAND", |all, word| all.command.store(word),
        "Command and arguments [default: the image's]"),
];

/// The arguments of a command line without options.
impl Default for Arguments {
    fn default() -> Self {
        Self {
            image: OsString::new(),
            template: None,
            snapshot: None,
            process: ProcessArguments::default(),
            entrypoint: None,
            detach: false,
            stay: false,
            memory: None,
            cpus: None,
            limits: Limits::default(),
            cgroup_parent: None,
            timeout: None,
            name: None,
            hostname: None,
            rm: false,
            net: None,
            publish: Vec::new(),
            volume: Vec::new(),
            read_only: false,
            pull: PULL[0].to_owned(),
            cold: false,
            spare: false,
            jail: Jail::default(),
            started_at: None,
            report: false,
            command: Vec::new(),
        }
    }
}

fn check(arguments: &Arguments) -> Result<(), String> {
    match &arguments.template {
        None if arguments.image.is_empty() => Err("IMAGE is missing".to_owned()),
        Some(_) if arguments.memory.is_some() || arguments.cpus.is_some() => {
            Err("--memory and --cpus are those of the template".to_owned())
        }
        _ => Ok(()),
    }
}

/// Values of `--pull`; the first is the default.
const PULL: [&str; 3] = ["missing", "always", "never"];
/// Values of `--timeout` in seconds: up to a year.
pub(super) const TIMEOUT_SECONDS: RangeInclusive<u64> = 1..=31_536_000;
/// Values of `--pids-limit`: up to the number of processes that Linux can have (`PID_MAX_LIMIT` in linux/threads.h).
const PROCESSES: RangeInclusive<u64> = 1..=4_194_304;
/// Rates per second, of bytes or requests.
const RATES: RangeInclusive<u64> = 1..=1 << 40;

/// Parses a number within a range, for an optional value.
pub(super) fn some_in(range: RangeInclusive<u64>) -> impl FnOnce(&str) -> Result<Option<u64>, String> {
    move |text| in_range(range)(text).map(Some)
}

/// Parses the value of `--cpus`. Returns the number of vCPUs, and with a fraction, thousandths of a processor.
fn processors(text: &str) -> Result<(u64, Option<u64>), &'static str> {
    const FORM: &str = "expected a number of vCPUs such as 2, or of processors such as 0.5 or 1.25";
    let number = |text: &str| in_range(0..=u64::MAX)(text).map_err(|_| FORM);
    let Some((whole, fraction)) = text.split_once('.') else { return Ok((number(text)?, None)) };
    if fraction.is_empty() || fraction.len() > 3 {
        return Err(FORM);
    }
    let whole = if whole.is_empty() { 0 } else { number(whole)? };
    let thousandths = number(&format!("{fraction:0<3}"))?;
    let millis = whole.checked_mul(1000).and_then(|millis| millis.checked_add(thousandths)).ok_or(FORM)?;
    if millis == 0 { Err(FORM) } else { Ok((millis.div_ceil(1000), Some(millis))) }
}

/// Parses the value of `--cgroup-parent`: a directory below /sys/fs/cgroup, or the path of a cgroup.
fn cgroup(text: &str) -> Result<Option<PathBuf>, &'static str> {
    const HIERARCHY: &str = "/sys/fs/cgroup";
    let path = Path::new(text);
    if text.is_empty() || path.components().any(|part| part == Component::ParentDir) {
        return Err("expected the path of a cgroup, such as user.slice/guests");
    }
    let path = path.strip_prefix(HIERARCHY).or_else(|_| path.strip_prefix("/")).unwrap_or(path);
    Ok(Some(Path::new(HIERARCHY).join(path)))
}

/// Parses a rate in bytes per second.
fn rate(text: &str) -> Result<Option<u64>, &'static str> {
    size::parse(text, &size::BYTES[..4])
        .filter(|bytes| RATES.contains(bytes))
        .map(Some)
        .ok_or("expected bytes per second, such as 500k, 10m or 1g")
}

/// Parses the value of `--pull`.
fn pull(text: &str) -> Result<String, &'static str> {
    if PULL.contains(&text) { Ok(text.to_owned()) } else { Err("expected missing, always or never") }
}

/// Parses the value of `--jail`.
pub(super) fn strictness(text: &str) -> Result<Strictness, &'static str> {
    match text {
        "require" => Ok(Strictness::Require),
        "full" => Ok(Strictness::Full),
        "best-effort" => Ok(Strictness::BestEffort),
        "off" => Ok(Strictness::Off),
        _ => Err("expected require, full, best-effort or off"),
    }
}

/// Parses the value of `--seccomp`.
pub(super) fn on_refusal(text: &str) -> Result<OnRefusal, &'static str> {
    match text {
        "end" => Ok(OnRefusal::End),
        "log" => Ok(OnRefusal::Log),
        _ => Err("expected end or log"),
    }
}

/// Parses the value of `--memory`. Returns MiB.
pub(crate) fn mebibytes(text: &str) -> Result<u64, &'static str> {
    const SUFFIXES: &[(&str, u64)] = &[("", 1), ("m", 1), ("g", 1 << 10)];
    size::parse(text, SUFFIXES).ok_or(MEMORY_FORM)
}

const MEMORY_FORM: &str = "expected a number of MiB, or a number with the suffix m or g";

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Arguments, String> {
        COMMAND.parse(line.split(' ').map(OsString::from)).map_err(|stop| stop.to_string())
    }

    #[test]
    fn every_option_is_stored() {
        let strings = |line: &str| line.split(' ').map(OsString::from).collect();
        let expected = Arguments {
            image: "image".into(),
            template: None,
            snapshot: None,
            process: ProcessArguments {
                env: strings("A=1 B"),
                env_file: vec!["f".into()],
                workdir: Some("/".into()),
                user: Some("a:b".into()),
                tty: true,
                interactive: true,
            },
            entrypoint: Some("e".into()),
            detach: true,
            stay: false,
            memory: Some(64),
            cpus: Some(2),
            limits: Limits {
                processes: Some(9),
                disk_bandwidth: Some(10 << 20),
                disk_operations: Some(200),
                network_bandwidth: Some(3 << 10),
                cpu_millis: Some(1250),
            },
            cgroup_parent: Some("/sys/fs/cgroup/a/b".into()),
            timeout: Some(5),
            name: Some("n".into()),
            hostname: Some("h".into()),
            rm: true,
            net: Some("user".into()),
            publish: strings("1:2 3:4"),
            volume: strings("a:/b"),
            read_only: true,
            pull: "never".into(),
            jail: Jail::OFF,
            cold: true,
            spare: true,
            started_at: Some(7),
            report: true,
            command: strings("sh -c -e"),
        };
        let line = "-e A=1 --env B --env-file f --workdir / -u a:b --entrypoint e -tid -m 64m --cpus 1.25 --cgroup-parent /a/b --timeout 5 --pids-limit 9 \
                    --disk-bps 10m --disk-iops 200 --net-bps 3k \
                    --name n --hostname h --rm --network tap --net user -p 1:2 --publish 3:4 -v a:/b --read-only \
                    --pull never --jail off --seccomp end --cold --spare --started-at 7 --report image sh -c -e";
        assert_eq!(parse(&line.split_whitespace().collect::<Vec<_>>().join(" ")), Ok(expected));
        assert_eq!(parse("image"), Ok(Arguments { image: "image".into(), ..Arguments::default() }));
    }

    #[test]
    fn a_template_determines_image_and_machine() {
        let copy = parse("--template t sh -c -e").unwrap();
        assert_eq!(copy.template.as_deref(), Some("t"));
        assert_eq!(copy.command(), ["sh", "-c", "-e"]);
        assert!(parse("--template t").unwrap().command().is_empty());
        assert_eq!(parse("image sh").unwrap().command(), ["sh"]);
        let machine = Err("--memory and --cpus are those of the template".to_owned());
        assert_eq!(parse("--template t -m 64m"), machine);
        assert_eq!(parse("--template t --cpus 2"), machine);
        assert_eq!(parse("--rm"), Err("IMAGE is missing".to_owned()));
    }

    #[test]
    fn values_outside_their_range_are_refused() {
        for (line, message) in [
            ("--timeout 0 image", "--timeout \"0\": expected a number from 1 to 31536000"),
            ("--pull now image", "--pull \"now\": expected missing, always or never"),
            ("-m 1k image", "-m \"1k\": expected a number of MiB, or a number with the suffix m or g"),
            ("--pids-limit 0 image", "--pids-limit \"0\": expected a number from 1 to 4194304"),
            ("--disk-bps 0 image", "--disk-bps \"0\": expected bytes per second, such as 500k, 10m or 1g"),
            ("--disk-bps m image", "--disk-bps \"m\": expected bytes per second, such as 500k, 10m or 1g"),
            (
                "--net-bps 99999g image",
                "--net-bps \"99999g\": expected bytes per second, such as 500k, 10m or 1g",
            ),
            ("--disk-iops 1k image", "--disk-iops \"1k\": expected a number from 1 to 1099511627776"),
            ("--env-file= image", "--env-file \"\": a path is not empty"),
        ] {
            assert_eq!(parse(line), Err(message.to_owned()), "{line}");
        }
    }

    #[test]
    fn processors_may_have_a_fraction() {
        for (text, expected) in [
            ("2", (2, None)),
            ("0.5", (1, Some(500))),
            (".25", (1, Some(250))),
            ("1.005", (2, Some(1005))),
            ("2.0", (2, Some(2000))),
        ] {
            assert_eq!(processors(text), Ok(expected), "{text}");
        }
        for text in ["", ".", "1.", "0.0", "-1", "+1", "1.5x", "0.0001", "1e3", "18446744073709551615.5"] {
            assert!(processors(text).is_err(), "{text}");
        }
    }

    #[test]
    fn cgroups_are_paths_in_the_hierarchy() {
        for text in ["a/b", "/a/b", "/sys/fs/cgroup/a/b"] {
            assert_eq!(cgroup(text), Ok(Some("/sys/fs/cgroup/a/b".into())), "{text}");
        }
        assert!(cgroup("").is_err() && cgroup("a/../../b").is_err());
    }

    #[test]
    fn memory_may_have_a_suffix() {
        for (text, mib) in [("512", 512), ("0512m", 512), ("2g", 2048), ("3G", 3072)] {
            assert_eq!(mebibytes(text), Ok(mib), "{text}");
        }
        for text in ["", "m", "+5", "-5", "1.5g", "512mb", "1k", "18446744073709551615g", "5 g", "é"] {
            assert!(mebibytes(text).is_err(), "{text}");
        }
    }
}
