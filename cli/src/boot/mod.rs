//! `kindling boot`: runs a virtual machine in this process.

mod signals;

use crate::command_line::{Argument, Command, Opt, Store, after_dashes, flag, in_range, option, store_as};
use crate::devices::{DeviceArguments, DeviceOptions};
use crate::terminal::RawTerminal;
use crate::{STATUS_FAILURE, bytes, print_error, print_launch_error, print_stderr, report};
use kindling::launch::LaunchError;
use kindling::vmm::config::image::Image;
use kindling::vmm::config::{
    self, BootSource, Config, ConfigError, Console, FileConfig, GuestConfig, MachineConfig, ProfileConfig,
};
use kindling::vmm::function_marks;
use kindling::vmm::{Error, Exit, ExitReason, Instant, Machine, Timeline};
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

/// The value of `--console` for standard input and output.
const STDIO: &str = "stdio";

#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Arguments {
    image: Option<PathBuf>,
    kernel: Option<PathBuf>,
    config_file: Option<PathBuf>,
    initrd: Option<PathBuf>,
    cmdline: Option<String>,
    memory: Option<u64>,
    vcpus: Option<u64>,
    /// By default, that of the configuration file, or the standard streams.
    console: Option<PathBuf>,
    devices: DeviceArguments,
    env: Vec<OsString>,
    workdir: Option<OsString>,
    user: Option<(u32, u32)>,
    hostname: Option<OsString>,
    verify: bool,
    cold: bool,
    report: bool,
    report_json: Option<PathBuf>,
    profile: Option<PathBuf>,
    sample: Option<u64>,
    profile_functions: Option<PathBuf>,
    started_at: Option<u64>,
    command: Vec<OsString>,
}

impl AsMut<DeviceArguments> for Arguments {
    fn as_mut(&mut self) -> &mut DeviceArguments {
        &mut self.devices
    }
}

pub(crate) const COMMAND: Command<Arguments> =
    Command::new("boot", "Boot a kernel in a microVM, in the foreground", run)
        .options(OPTIONS)
        .more_options(DeviceOptions::TABLE)
        .arguments(ARGUMENTS)
        .check(check);

#[rustfmt::skip]
const OPTIONS: &[Opt<Arguments>] = &[
    option("", "image", "DIR", |all, word| all.image.store(word),
        "Image: a directory made by `cargo xtask build-image`"),
    option("", "kernel", "FILE", |all, word| all.kernel.store(word),
        "Kernel: an uncompressed vmlinux or a bzImage"),
    option("", "config-file", "FILE", |all, word| all.config_file.store(word),
        "Configuration file of Firecracker (JSON), with boot source, machine and devices"),
    option("", "initrd", "FILE", |all, word| all.initrd.store(word),
        "Initramfs [default: the root filesystem of the image, or the initramfs of the configuration file]"),
    option("", "cmdline", "TEXT", |all, word| all.cmdline.store(word),
        "Kernel command line [default: that of the image or of the configuration file]"),
    option("", "memory", "MIB", |all, word| all.memory.store(word),
        "Memory in MiB [default: 128]"),
    option("", "vcpus", "N", |all, word| all.vcpus.store(word),
        "Number of vCPUs, 1 to 16 [default: 1]"),
    option("", "console", "stdio|null|FILE", |all, word| all.console.store(word),
        "Serial console: stdio, null, or a file, which keeps the last 8 to 16 MiB of output [default: that of \
         the configuration file, or stdio]"),
    option("e", "env", "NAME=VALUE", |all, word| all.env.store(word),
        "Set an environment variable of the command (repeatable)"),
    option("w", "workdir", "DIR", |all, word| all.workdir.store(word),
        "Working directory of the command"),
    option("u", "user", "UID[:GID]", |all, word| store_as(&mut all.user, word, |text| parse_user(text).map(Some)),
        "User and group of the command, as numbers [default group: the number of the user]"),
    option("", "hostname", "NAME", |all, word| all.hostname.store(word),
        "Hostname of the guest"),
    flag("", "verify", |all| all.verify = true,
        "Verify the digests of the image's files before the boot"),
    flag("", "cold", |all| all.cold = true,
        "Boot the kernel even if there is a pre-booted one"),
    flag("", "report", |all| all.report = true,
        "Print the times of the boot's steps on standard error at the end"),
    option("", "report-json", "FILE", |all, word| all.report_json.store(word),
        "Write the report to a file, as JSON"),
    option("", "profile", "FILE", |all, word| all.profile.store(word),
        "Profile the boot, and write a file with the report, every exit and the kernel's log, as JSON"),
    option("", "sample", "US", |all, word| store_as(&mut all.sample, word, |text| in_range(SAMPLE_US)(text).map(Some)),
        "With --profile: sample the guest's instruction pointer at this interval, in microseconds"),
    option("", "profile-functions", "FILE", |all, word| all.profile_functions.store(word),
        "With --profile: record the first calls of kernel functions; the file has a hexadecimal address of \
         the image's System.map on each line"),
    option("", "started-at", "NS", |all, word| all.started_at.store(word),
        "Start of the report's times: CLOCK_MONOTONIC in nanoseconds [default: the start of kindling]"),
];

#[rustfmt::skip]
const ARGUMENTS: &[Argument<Arguments>] = &[
    after_dashes("COMMAND", |all, word| all.command.store(word),
        "Command and arguments [default: the command of the image, or a greeting]"),
];

/// Values of `--sample` in microseconds.
const SAMPLE_US: std::ops::RangeInclusive<u64> = 1..=1_000_000;

/// Checks which options are given together.
fn check(arguments: &Arguments) -> Result<(), String> {
    let Arguments { image, kernel, config_file, verify, profile, sample, profile_functions, .. } = arguments;
    let sources = [image, kernel, config_file].into_iter().flatten().count();
    let error = match () {
        () if sources == 0 => "what to boot is missing: --image, --kernel or --config-file",
        () if sources > 1 => "--image, --kernel and --config-file exclude each other",
        () if *verify && image.is_none() => "--verify needs --image, whose digests it checks",
        () if profile.is_none() && sample.is_some() => "--sample needs --profile",
        () if profile.is_none() && profile_functions.is_some() => "--profile-functions needs --profile",
        () => return Ok(()),
    };
    Err(error.to_owned())
}

fn parse_user(text: &str) -> Result<(u32, u32), String> {
    let number = |text: &str| {
        text.parse::<u32>().map_err(|_| format!("{text:?} is not a number from 0 to 4294967295"))
    };
    match text.split_once(':') {
        Some((user, group)) => Ok((number(user)?, number(group)?)),
        None => number(text).map(|user| (user, user)),
    }
}

/// Boots, waits for the end, and reports. Returns the exit status.
fn run(arguments: &Arguments, entered: Instant) -> u8 {
    let start = arguments.started_at.map_or(entered, Instant);
    let mut timeline = Timeline::starting_at(start);
    timeline.reached_at("command entered", entered);
    match boot(arguments, timeline) {
        Ok(exit) => finish(arguments, &exit),
        Err(error) => {
            print_launch_error(&error);
            crate::status(error.is_user_error())
        }
    }
}

fn boot(arguments: &Arguments, timeline: Timeline) -> Result<Exit, LaunchError> {
    let FileConfig { config, warnings } = arguments.config()?;
    if config.devices.vsock.is_some() {
        kindling::entry::raise_descriptor_limit();
    }
    let machine = Machine::new(&config, timeline)?;
    if let Some(refusal) = machine.preboot_refusal() {
        print_error(refusal);
        let MachineConfig { vcpu_count, mem_size_mib } = config.machine;
        print_stderr(&format!(
            "kindling: booting without it; `kindling preboot --image ... --vcpus {vcpu_count} --memory \
             {mem_size_mib}`, with the same devices, makes a new one\n"
        ));
    }
    for warning in &warnings {
        print_stderr(&format!("kindling: {}\n", report::printable(warning)));
    }
    let running = machine.start()?;
    let stop = running.stop_handle()?;
    signals::stop_on_termination(stop)
        .map_err(|source| Error::Host { what: "install signal handlers", source })?;
    let terminal = (config.console == Console::Stdio).then(RawTerminal::enter).flatten();
    signals::explain_bus_errors(running.backing_files());
    let (exit, remains) = running.wait_for_end();
    drop(terminal);
    remains.leave_to_kernel();
    Ok(exit)
}

fn finish(arguments: &Arguments, exit: &Exit) -> u8 {
    print_stderr(&report::device_failures(exit));
    if exit.reason.is_failure() {
        print_stderr(&report::failure(exit));
    }
    if arguments.report {
        print_stderr(&report::timeline(exit));
    }
    let files = [
        (&arguments.report_json, report::json as fn(&Exit) -> String),
        (&arguments.profile, report::profile),
    ];
    for (path, text) in files.into_iter().filter_map(|(path, text)| Some((path.as_ref()?, text))) {
        if let Err(error) = std::fs::write(path, text(exit)) {
            let line = format!("kindling: cannot write {}: {error}", path.display());
            print_stderr(&(report::printable(&line) + "\n"));
            return STATUS_FAILURE;
        }
    }
    match (&exit.reason, signals::received()) {
        (ExitReason::Stopped, Some(signal)) => 128_u8.saturating_add(signal),
        (reason, _) => reason.status(),
    }
}

impl Arguments {
    /// The configuration of the machine.
    fn config(&self) -> Result<FileConfig, LaunchError> {
        let FileConfig { mut config, warnings: mut messages } = self.base()?;
        if let Some(path) = &self.initrd {
            config.boot_source.initrd_path = Some(path.clone());
            config.boot_source.image_digests = None;
            config.devices.root = None;
        }
        if let Some(line) = &self.cmdline {
            config.boot_source.boot_args.clone_from(line);
        }
        if let Some(mib) = self.memory {
            config.machine.mem_size_mib = mib;
        }
        if let Some(count) = self.vcpus {
            config.machine.vcpu_count = u8::try_from(count).map_err(|_| ConfigError::VcpuCount(count))?;
        }
        let assigned = self.devices.add_to(&mut config.devices)?;
        messages.extend(assigned.iter().map(|forward| format!("published {forward}")));
        // A pre-booted kernel has another root filesystem and command line in its memory, and is a copy of the image's
        // files that --verify does not check.
        let is_cold = self.cold || self.verify || self.initrd.is_some() || self.cmdline.is_some();
        if let Some(image) = self.image.as_ref().filter(|_| !is_cold) {
            config.preboot = Some(Image::preboot_path(image, &config.machine, &config.devices));
        }
        if let Some(console) = &self.console {
            config.console = match console.to_str() {
                Some(STDIO) => Console::Stdio,
                Some("null") => Console::Null,
                _ => Console::File(console.clone()),
            };
        }
        config.guest = self.guest(config.guest);
        if self.profile.is_some() {
            let list = self.profile_functions.as_deref().map(function_marks::functions_from_file);
            config.profile = Some(ProfileConfig {
                sample_interval: self.sample.map(Duration::from_micros),
                functions: list.transpose()?.unwrap_or_default(),
            });
        }
        Ok(FileConfig { config, warnings: messages })
    }

    /// The configuration of the image, the configuration file or the kernel, without the other arguments.
    fn base(&self) -> Result<FileConfig, ConfigError> {
        if let Some(path) = &self.config_file {
            return config::from_json_file(path);
        }
        let config = match (&self.image, &self.kernel) {
            (Some(directory), _) => {
                let image = Image::open(directory)?;
                if self.verify {
                    image.verify(directory)?;
                }
                image.config(directory)
            }
            (None, kernel) => Config::new(BootSource::kernel(kernel.clone().unwrap_or_default())),
        };
        Ok(FileConfig { config, warnings: Vec::new() })
    }

    /// The configuration for init: that of the image, overridden by the arguments.
    fn guest(&self, mut guest: GuestConfig) -> GuestConfig {
        if !self.command.is_empty() {
            guest.arguments = self.command.iter().map(bytes).collect();
        }
        for entry in self.env.iter().map(bytes) {
            let name = entry.split_inclusive(|&byte| byte == b'=').next().unwrap_or_default();
            guest.environment.retain(|given| !given.starts_with(name));
            guest.environment.push(entry);
        }
        guest.working_directory = self.workdir.as_ref().map(bytes).or(guest.working_directory);
        guest.hostname = self.hostname.as_ref().map(bytes);
        if let Some((user_id, group_id)) = self.user {
            (guest.user_id, guest.group_id, guest.groups) = (user_id, group_id, Vec::new());
        }
        guest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Arguments, String> {
        COMMAND.parse(line.split_terminator(' ').map(OsString::from)).map_err(|stop| stop.to_string())
    }

    #[test]
    fn every_option_is_stored() {
        let strings = |line: &str| line.split(' ').map(OsString::from).collect();
        let devices = DeviceArguments {
            drive: strings("d e:ro"),
            net: strings("t user"),
            publish: strings("1:2 3:4"),
            vsock: Some("v".into()),
            entropy: true,
            balloon: Some(5),
            pmem: strings("m"),
        };
        let expected = Arguments {
            image: Some("i".into()),
            initrd: Some("r".into()),
            cmdline: Some("quiet".into()),
            memory: Some(64),
            vcpus: Some(2),
            console: Some("null".into()),
            devices,
            env: strings("A=1 B=2"),
            workdir: Some("/".into()),
            user: Some((5, 6)),
            hostname: Some("h".into()),
            verify: true,
            cold: true,
            report: true,
            report_json: Some("j".into()),
            profile: Some("p".into()),
            sample: Some(100),
            profile_functions: Some("f".into()),
            started_at: Some(7),
            command: strings("sh -c --image"),
            ..Arguments::default()
        };
        let line = "--image i --initrd r --cmdline quiet --memory 64 --vcpus 2 --console null --env A=1 -e B=2 --drive d \
                    --drive e:ro --net t --net user -p 1:2 --publish 3:4 --vsock v --entropy --balloon 5 --pmem m \
                    --workdir / -u 5:6 --hostname h --verify --cold --report --report-json j --profile p --sample 100 \
                    --profile-functions f --started-at 7 -- sh -c --image";
        assert_eq!(parse(line), Ok(expected));
    }

    #[test]
    fn options_that_belong_together_are_checked() {
        for (line, message) in [
            ("", "what to boot is missing: --image, --kernel or --config-file"),
            ("--image i --kernel k", "--image, --kernel and --config-file exclude each other"),
            ("--kernel k --verify", "--verify needs --image, whose digests it checks"),
            ("--kernel k --sample 5", "--sample needs --profile"),
            ("--kernel k --profile-functions f", "--profile-functions needs --profile"),
            ("--kernel k --user x", "--user \"x\": \"x\" is not a number from 0 to 4294967295"),
            ("--kernel k --profile p --sample 0", "--sample \"0\": expected a number from 1 to 1000000"),
            ("--kernel k word", "unexpected argument \"word\""),
        ] {
            assert_eq!(parse(line), Err(message.to_owned()), "{line}");
        }
        assert_eq!(parse("--kernel k"), Ok(Arguments { kernel: Some("k".into()), ..Arguments::default() }));
    }
}
