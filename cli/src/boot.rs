//! `kindling boot`: runs a virtual machine in this process.

use crate::devices::DeviceArguments;
use crate::terminal::RawTerminal;
use crate::{
    STATUS_BAD_REQUEST, STATUS_FAILURE, bytes, print_error, print_machine_error, print_stderr, report,
    signals,
};
use clap::{ArgGroup, Args};
use kindling::vmm::config::image::Image;
use kindling::vmm::config::{
    self, BootSource, Config, ConfigError, Console, FileConfig, GuestConfig, MachineConfig, ProfileConfig,
};
use kindling::vmm::function_marks;
use kindling::vmm::{Error, Exit, ExitReason, Instant, Machine, Timeline};
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

/// The default of `--console`: standard input and output.
pub(crate) const STDIO: &str = "stdio";

#[derive(Args, Debug, Default, PartialEq, Eq)]
#[command(group(ArgGroup::new("what").required(true).args(["image", "kernel", "config_file"])))]
pub(crate) struct Arguments {
    /// Image: a directory made by `cargo xtask build-image`
    #[arg(long, value_name = "DIR")]
    pub(crate) image: Option<PathBuf>,
    /// Kernel: an uncompressed vmlinux or a bzImage
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: Option<PathBuf>,
    /// Configuration file of Firecracker (JSON), with boot source, machine and devices
    #[arg(long, value_name = "FILE")]
    pub(crate) config_file: Option<PathBuf>,
    /// Initramfs [default: the root filesystem of the image, or the initramfs of the configuration file]
    #[arg(long, value_name = "FILE")]
    pub(crate) initrd: Option<PathBuf>,
    /// Kernel command line [default: that of the image or of the configuration file]
    #[arg(long, value_name = "TEXT")]
    pub(crate) cmdline: Option<String>,
    /// Memory in MiB [default: 128]
    #[arg(long, value_name = "MIB")]
    pub(crate) memory: Option<u64>,
    /// Number of vCPUs, 1 to 16 [default: 1]
    #[arg(long, value_name = "N")]
    pub(crate) vcpus: Option<u64>,
    /// Serial console: stdio, null, or a file, which keeps the last 8 to 16 MiB of output
    #[arg(long, value_name = "stdio|null|FILE", default_value = STDIO)]
    pub(crate) console: PathBuf,
    #[command(flatten)]
    pub(crate) devices: DeviceArguments,
    /// Set an environment variable of the command (repeatable)
    #[arg(long, short = 'e', value_name = "NAME=VALUE")]
    pub(crate) env: Vec<OsString>,
    /// Working directory of the command
    #[arg(long, short = 'w', value_name = "DIR")]
    pub(crate) workdir: Option<OsString>,
    /// User and group of the command, as numbers [default group: the number of the user]
    #[arg(long, short = 'u', value_name = "UID[:GID]", value_parser = parse_user)]
    pub(crate) user: Option<(u32, u32)>,
    /// Hostname of the guest
    #[arg(long, value_name = "NAME")]
    pub(crate) hostname: Option<OsString>,
    /// Verify the digests of the image's files before the boot
    #[arg(long, conflicts_with_all = ["kernel", "config_file"])]
    pub(crate) verify: bool,
    /// Boot the kernel even if there is a pre-booted one
    #[arg(long)]
    pub(crate) cold: bool,
    /// Print the times of the boot's steps on standard error at the end
    #[arg(long)]
    pub(crate) report: bool,
    /// Write the report to a file, as JSON
    #[arg(long, value_name = "FILE")]
    pub(crate) report_json: Option<PathBuf>,
    /// Profile the boot, and write a file with the report, every exit and the kernel's log, as JSON
    #[arg(long, value_name = "FILE")]
    pub(crate) profile: Option<PathBuf>,
    /// With --profile: sample the guest's instruction pointer at this interval, in microseconds
    #[arg(long, value_name = "US", requires = "profile",
          value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub(crate) sample: Option<u64>,
    /// With --profile: record the first calls of kernel functions; the file has a hexadecimal address of the image's
    /// System.map on each line
    #[arg(long, value_name = "FILE", requires = "profile")]
    pub(crate) profile_functions: Option<PathBuf>,
    /// Start of the report's times: CLOCK_MONOTONIC in nanoseconds [default: the start of kindling]
    #[arg(long, value_name = "NS")]
    pub(crate) started_at: Option<u64>,
    /// Command and arguments [default: the command of the image, or a greeting]
    #[arg(last = true, value_name = "COMMAND")]
    pub(crate) command: Vec<OsString>,
}

pub(crate) fn parse_user(text: &str) -> Result<(u32, u32), String> {
    let number = |text: &str| {
        text.parse::<u32>().map_err(|_| format!("{text:?} is not a number from 0 to 4294967295"))
    };
    match text.split_once(':') {
        Some((user, group)) => Ok((number(user)?, number(group)?)),
        None => number(text).map(|user| (user, user)),
    }
}

/// Boots, waits for the end, and reports. Returns the exit status.
pub(crate) fn run(arguments: &Arguments, entered: Instant) -> u8 {
    let start = arguments.started_at.map_or(entered, Instant);
    let mut timeline = Timeline::starting_at(start);
    timeline.reached_at("command entered", entered);
    match boot(arguments, timeline) {
        Ok(exit) => finish(arguments, &exit),
        Err(error) => {
            print_machine_error(&error);
            if error.is_user_error() { STATUS_BAD_REQUEST } else { STATUS_FAILURE }
        }
    }
}

fn boot(arguments: &Arguments, timeline: Timeline) -> Result<Exit, Error> {
    let FileConfig { config, warnings } = arguments.config()?;
    if config.devices.vsock.is_some() {
        kindling::vmm::entry::raise_descriptor_limit();
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
    fn config(&self) -> Result<FileConfig, ConfigError> {
        let FileConfig { mut config, warnings } = self.base()?;
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
        self.devices.add_to(&mut config.devices)?;
        // A pre-booted kernel has another root filesystem and command line in its memory, and is a copy of the image's
        // files that --verify does not check.
        let is_cold = self.cold || self.verify || self.initrd.is_some() || self.cmdline.is_some();
        if let Some(image) = self.image.as_ref().filter(|_| !is_cold) {
            config.preboot = Some(Image::preboot_path(image, &config.machine, &config.devices));
        }
        config.console = match self.console.to_str() {
            Some(STDIO) => Console::Stdio,
            Some("null") => Console::Null,
            _ => Console::File(self.console.clone()),
        };
        config.guest = self.guest(config.guest);
        if self.profile.is_some() {
            let list = self.profile_functions.as_deref().map(function_marks::functions_from_file);
            config.profile = Some(ProfileConfig {
                sample_interval: self.sample.map(Duration::from_micros),
                functions: list.transpose()?.unwrap_or_default(),
            });
        }
        Ok(FileConfig { config, warnings })
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
