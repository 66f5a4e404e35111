//! `kindling run`: a program in a guest of its own, as if it ran here.

pub(crate) mod client;
mod detached;
pub(crate) mod mounts;
pub(crate) mod signals;
pub(crate) mod source;

use crate::devices::DeviceArguments;
use crate::instances::log::Log;
use crate::instances::{Instance, InstanceError, Payload, Record, signal};
use crate::terminal::RawTerminal;
use crate::volumes::{self, VolumeError};
use crate::{STATUS_BAD_REQUEST, STATUS_FAILURE, boot, bytes, complain, report, tell};
use clap::Args;
use client::{Outcome, Streams};
use detached::Starter;
use guest_protocol::BootMark;
use kindling::agent::{AgentError, Process};
use kindling::config::image::Image;
use kindling::config::{Config, ConfigError, Console, GuestConfig, MachineConfig};
use kindling::{Error, Exit, ExitReason, Instant, Machine, StopHandle, Timeline, preboot};
use mounts::{MountError, Source, Wanted};
use source::{Prepared, SourceError};
use std::ffi::OsString;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, OnceLock, mpsc};
use std::thread;
use std::time::Duration;

#[derive(Args, Debug, PartialEq, Eq)]
pub(crate) struct Arguments {
    /// Container image: an OCI layout, an archive of `docker save`, a registry's name; or an EROFS filesystem
    #[arg(value_name = "IMAGE")]
    pub(crate) image: OsString,
    /// Environment entry of the command, NAME=VALUE, or NAME to take its value from here; may be repeated
    #[arg(long, short = 'e', value_name = "NAME[=VALUE]")]
    pub(crate) env: Vec<OsString>,
    /// Working directory of the command
    #[arg(long, short = 'w', value_name = "DIR")]
    pub(crate) workdir: Option<OsString>,
    /// User of the command, and its group
    #[arg(long, short = 'u', value_name = "USER[:GROUP]")]
    pub(crate) user: Option<String>,
    /// Replaces the image's entrypoint
    #[arg(long, value_name = "PROGRAM")]
    pub(crate) entrypoint: Option<OsString>,
    /// Give the command a terminal
    #[arg(long, short = 't')]
    pub(crate) tty: bool,
    /// Accepted and without effect: the command always has this command's input
    #[arg(long, short = 'i')]
    pub(crate) interactive: bool,
    /// Leave the guest to itself when it is ready, and print its name; `kindling logs` has its output
    #[arg(long, short = 'd')]
    pub(crate) detach: bool,
    /// This process is the one that stays with a detached guest
    #[arg(long, hide = true, requires = "detach")]
    pub(crate) stay: bool,
    /// Memory of the guest in MiB
    #[arg(long, short = 'm', value_name = "MIB", default_value_t = Self::default().memory)]
    pub(crate) memory: u64,
    /// Virtual processors of the guest, 1 to 16
    #[arg(long, value_name = "N", default_value_t = Self::default().cpus)]
    pub(crate) cpus: u64,
    /// Kill the guest after this many seconds; exit status 124
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(TIMEOUT_SECONDS))]
    pub(crate) timeout: Option<u64>,
    /// Name of the guest, by which `kindling exec` finds it
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// Hostname of the guest [default: its name]
    #[arg(long, value_name = "NAME")]
    pub(crate) hostname: Option<OsString>,
    /// Leave nothing of a detached guest behind when it ends; one in the foreground leaves nothing anyway
    #[arg(long)]
    pub(crate) rm: bool,
    /// Network: none, user for networking without root, or a tap device
    #[arg(long, value_name = "none|user|TAP", default_value = "none")]
    pub(crate) net: OsString,
    /// A port of the host that leads to one of the guest; takes `--net user`; may be repeated
    #[arg(long, short = 'p', value_name = "HOST:GUEST")]
    pub(crate) publish: Vec<OsString>,
    /// A volume of this name, or a folder of the host, at a path of the guest; :ro only reads; may be repeated
    #[arg(long, short = 'v', value_name = "SOURCE:GUEST[:ro]")]
    pub(crate) volume: Vec<OsString>,
    /// Programs only read the root filesystem; they write to volumes, /dev/shm, /run, /tmp and /var/tmp
    #[arg(long)]
    pub(crate) read_only: bool,
    /// When to ask a registry for an image
    #[arg(long, value_name = "missing|always|never", default_value = "missing",
          value_parser = PULL)]
    pub(crate) pull: String,
    /// Boot the kernel even where it has been booted before
    #[arg(long)]
    pub(crate) cold: bool,
    /// CLOCK_MONOTONIC in nanoseconds when the caller started this command
    #[arg(long, value_name = "NS", hide = true)]
    pub(crate) started_at: Option<u64>,
    /// Print when each step was reached
    #[arg(long)]
    pub(crate) report: bool,
    /// Command instead of the image's
    #[arg(value_name = "COMMAND", trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) command: Vec<OsString>,
}

/// Of a line that names nothing but an image.
impl Default for Arguments {
    fn default() -> Self {
        Self {
            image: OsString::new(),
            env: Vec::new(),
            workdir: None,
            user: None,
            entrypoint: None,
            tty: false,
            interactive: false,
            detach: false,
            stay: false,
            memory: 512,
            cpus: 1,
            timeout: None,
            name: None,
            hostname: None,
            rm: false,
            net: "none".into(),
            publish: Vec::new(),
            volume: Vec::new(),
            read_only: false,
            pull: PULL[0].to_owned(),
            cold: false,
            started_at: None,
            report: false,
            command: Vec::new(),
        }
    }
}

/// When a registry is asked; the first without asking.
pub(crate) const PULL: [&str; 3] = ["missing", "always", "never"];
/// Time limits: up to a year.
pub(crate) const TIMEOUT_SECONDS: std::ops::RangeInclusive<u64> = 1..=31_536_000;

const SIGTERM: u8 = 15;
/// The exit status of a guest that took too long.
const STATUS_TIMEOUT: u8 = 124;
/// Stands in for a signal where the time limit stopped the guest.
const BY_TIMEOUT: u8 = u8::MAX;

/// Why there is no process to wait for.
#[derive(Debug, thiserror::Error)]
enum RunError {
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Instance(#[from] InstanceError),
    #[error(transparent)]
    Machine(#[from] Error),
    #[error(transparent)]
    Mount(#[from] MountError),
    #[error(transparent)]
    Volume(#[from] VolumeError),
    #[error("--volume {}: folders of the host cannot be mounted yet; NAME:GUEST is a volume", .0.display())]
    Folder(PathBuf),
    #[error("the image names no command; write one behind its name")]
    NoCommand,
    #[error("the host refused to {0}")]
    Host(&'static str, #[source] std::io::Error),
}

impl From<ConfigError> for RunError {
    fn from(error: ConfigError) -> Self {
        Self::Machine(error.into())
    }
}

impl RunError {
    const fn status(&self) -> u8 {
        match self {
            Self::Machine(error) if !error.is_users() => STATUS_FAILURE,
            Self::Host(..)
            | Self::Source(SourceError::Failed(_))
            | Self::Instance(InstanceError::Host { .. })
            | Self::Volume(VolumeError::Host { .. }) => STATUS_FAILURE,
            _ => STATUS_BAD_REQUEST,
        }
    }
}

/// Runs the program; the exit status.
pub(crate) fn run(arguments: &Arguments, entered: Instant) -> u8 {
    let start = arguments.started_at.map_or(entered, Instant);
    let mut timeline = Timeline::starting_at(start);
    timeline.reached_at("command entered", entered);
    if arguments.detach && !arguments.stay {
        return detached::start().unwrap_or_else(|error| {
            complain(&error);
            STATUS_FAILURE
        });
    }
    execute(arguments, timeline).unwrap_or_else(|error| {
        complain(&error);
        error.status()
    })
}

fn execute(arguments: &Arguments, mut timeline: Timeline) -> Result<u8, RunError> {
    let prepared = source::prepare(&arguments.image, arguments.user.as_deref(), &arguments.pull)?;
    timeline.reached("root filesystem found");
    let instance = Instance::create(arguments.name.as_deref())?;
    let starter = arguments.stay.then(|| Starter::new(&instance)).transpose();
    let starter = starter.map_err(|error| RunError::Host("make a file", error));
    let result = starter.and_then(|starter| {
        let starter = starter.map(Arc::new);
        let code = start(arguments, &instance, &prepared, starter.clone(), timeline)?;
        Ok((code, starter.is_some_and(|starter| starter.has_gone())))
    });
    match result {
        Ok((code, true)) if !arguments.rm => {
            instance.finish(code)?;
            Ok(code)
        }
        result => {
            instance.remove();
            result.map(|(code, _)| code)
        }
    }
}

/// What the threads of a guest tell each other.
enum Event {
    AgentReady,
    GuestEnded,
}

fn start(
    arguments: &Arguments,
    instance: &Instance,
    prepared: &Prepared,
    starter: Option<Arc<Starter>>,
    timeline: Timeline,
) -> Result<u8, RunError> {
    let wanted = mounts::parse_all(&arguments.volume)?;
    // Before any thread is started, and before there is something to leave behind.
    let stopped_by = Arc::new(AtomicU8::new(0));
    let stop: Arc<OnceLock<StopHandle>> = Arc::default();
    let (tell, told) = mpsc::channel();
    let give_up = {
        let (stopped_by, stop, tell) = (Arc::clone(&stopped_by), Arc::clone(&stop), tell.clone());
        move |signal| {
            stopped_by.store(signal, Ordering::Release);
            stop.get().map(StopHandle::stop);
            let _ = tell.send(Outcome::GivenUp);
        }
    };
    let signals = signals::receive(arguments.detach, give_up.clone());
    let config = arguments.config(instance, prepared, &wanted)?;
    let streams = match &starter {
        Some(_) => Log::create(instance.folder()).map(Streams::of_log),
        None => Streams::own(),
    };
    let streams = streams.map_err(|error| RunError::Host("open the program's streams", error))?;
    boot::raise_descriptor_limit();
    instance.write(&arguments.record(&config, prepared, &wanted))?;
    if !arguments.cold {
        make_preboot(&config);
    }

    let machine = Machine::new(&config, timeline)?;
    if let Some(refusal) = machine.preboot_refusal() {
        complain(refusal);
    }
    let (sender, events) = mpsc::channel();
    let ready = sender.clone();
    machine.at_mark(BootMark::AgentReady, move || drop(ready.send(Event::AgentReady)));
    let running = machine.start()?;
    let handle = running.stop_handle()?;
    // A signal that came before had nothing to stop yet.
    let handle = stop.get_or_init(|| handle);
    if stopped_by.load(Ordering::Acquire) != 0 {
        handle.stop();
    }
    if let Some(seconds) = arguments.timeout {
        thread::spawn(move || {
            thread::sleep(Duration::from_secs(seconds));
            give_up(BY_TIMEOUT);
        });
    }
    let terminal = (arguments.tty && !arguments.detach).then(RawTerminal::enter).flatten();
    let (name, socket, has_terminal) = (instance.name().to_owned(), instance.socket(), arguments.tty);
    let converse = move || match events.recv() {
        Ok(Event::AgentReady) => {
            let mut process = Process::payload(&socket, has_terminal)?;
            let streams = match starter {
                None => streams,
                Some(starter) if process.wait_for_start()? => {
                    starter.let_go(&name);
                    streams
                }
                // There will be nobody who reads a log; what init has to say is for whoever waits.
                Some(_) => Streams::complaints().map_err(|_| AgentError::Lost)?,
            };
            client::serve(process, streams, &signals)
        }
        Ok(Event::GuestEnded) | Err(_) => Err(AgentError::Lost),
    };
    thread::spawn(move || tell.send(Outcome::Process(converse())));
    let (exit, remains) = running.wait_for_end();
    let _ = sender.send(Event::GuestEnded);
    let code = client::outcome(&told);
    drop(terminal);
    remains.leave_to_kernel();
    Ok(arguments.finish(&exit, code, stopped_by.load(Ordering::Acquire)))
}

impl Arguments {
    fn config(
        &self,
        instance: &Instance,
        prepared: &Prepared,
        wanted: &[Wanted],
    ) -> Result<Config, RunError> {
        let kernel = source::kernel_image()?;
        let image = Image::open(&kernel)?;
        let mut config = image.config(&kernel);
        let vcpu_count = u8::try_from(self.cpus).map_err(|_| ConfigError::VcpuCount(self.cpus))?;
        config.machine = MachineConfig { vcpu_count, mem_size_mib: self.memory };
        config.console = Console::Null;
        config.devices.root = Some(prepared.rootfs.clone());
        let mut devices = DeviceArguments {
            publish: self.publish.clone(),
            vsock: Some(instance.socket().into()),
            ..DeviceArguments::default()
        };
        match self.net.to_str() {
            Some("none") if self.publish.is_empty() => {}
            Some("none") => devices.net.push("user".into()),
            _ => devices.net.push(self.net.clone()),
        }
        devices.add_to(&mut config.devices)?;
        config.guest = self.guest(instance, prepared)?;
        for wanted in wanted {
            match &wanted.source {
                Source::Volume(name) => {
                    let disk = volumes::for_guest(name, wanted.is_read_only)?;
                    mounts::add_volume(&mut config, disk, wanted);
                }
                Source::Folder(path) => return Err(RunError::Folder(path.clone())),
            }
        }
        config.validate()?;
        if !self.cold {
            config.preboot = preboot_path(&config);
        }
        Ok(config)
    }

    fn guest(&self, instance: &Instance, prepared: &Prepared) -> Result<GuestConfig, RunError> {
        let of_image = &prepared.config;
        let strings = |list: &[String]| list.iter().map(|text| text.clone().into_bytes()).collect::<Vec<_>>();
        let entrypoint = match &self.entrypoint {
            Some(program) if program.is_empty() => Vec::new(),
            Some(program) => vec![bytes(program)],
            None => strings(&of_image.entrypoint),
        };
        let command = if !self.command.is_empty() {
            self.command.iter().map(bytes).collect()
        } else if self.entrypoint.is_some() {
            Vec::new()
        } else {
            strings(&of_image.cmd)
        };
        let arguments = [entrypoint, command].concat();
        if arguments.is_empty() {
            return Err(RunError::NoCommand);
        }
        let mut environment = strings(&of_image.env);
        for entry in &self.env {
            set(&mut environment, entry);
        }
        let name = self.hostname.clone().unwrap_or_else(|| instance.name().into());
        let mut default = |entry: String| {
            let name = entry.split_inclusive('=').next().unwrap_or_default().as_bytes().to_vec();
            if !environment.iter().any(|given| given.starts_with(&name)) {
                environment.push(entry.into_bytes());
            }
        };
        if let Some(home) = &of_image.user.home {
            default(format!("HOME={home}"));
        }
        default(format!("HOSTNAME={}", name.to_string_lossy()));
        if self.tty {
            default(format!("TERM={}", std::env::var("TERM").unwrap_or_else(|_| "xterm".to_owned())));
        }
        let workdir = self.workdir.as_ref().map(bytes);
        let of_image_workdir =
            Some(of_image.working_dir.clone().into_bytes()).filter(|directory| !directory.is_empty());
        Ok(GuestConfig {
            arguments,
            environment,
            working_directory: workdir.or(of_image_workdir),
            hostname: Some(bytes(&name)),
            user_id: of_image.user.uid,
            group_id: of_image.user.gid,
            groups: of_image.user.groups.clone(),
            terminal: self.tty.then(client::new_terminal_size),
            agent: true,
            is_root_read_only: self.read_only,
            ..GuestConfig::default()
        })
    }

    fn record(&self, config: &Config, prepared: &Prepared, wanted: &[Wanted]) -> Record {
        let stop_signal = prepared.config.stop_signal.as_deref().and_then(|name| signal::parse(name).ok());
        let text = |bytes: &Vec<u8>| String::from_utf8_lossy(bytes).into_owned();
        let since_1970 = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Record {
            image: self.image.to_string_lossy().into_owned(),
            command: config.guest.arguments.iter().map(text).collect(),
            payload: Payload {
                environment: config.guest.environment.iter().map(text).collect(),
                working_directory: config.guest.working_directory.as_ref().map(text),
                user: prepared.config.user.clone(),
            },
            pid: std::process::id(),
            started: since_1970.map_or(0, |time| time.as_secs()),
            memory_mib: config.machine.mem_size_mib,
            vcpus: config.machine.vcpu_count,
            stop_signal: stop_signal.unwrap_or(SIGTERM),
            is_kept: self.detach && !self.rm,
            volumes: wanted.iter().filter_map(Wanted::volume).map(str::to_owned).collect(),
            status: None,
        }
    }

    /// Says what went wrong, if something did; the exit status.
    fn finish(&self, exit: &Exit, code: Result<u8, AgentError>, stopped_by: u8) -> u8 {
        tell(&report::device_failures(exit));
        if self.report {
            tell(&report::timeline(exit));
        }
        match (code, &exit.reason) {
            // What the process said counts, whatever the machine did afterwards.
            (Ok(code), _) => code,
            (Err(_), ExitReason::Stopped) if stopped_by == BY_TIMEOUT => {
                let seconds = self.timeout.unwrap_or_default();
                tell(&format!("kindling: killed after {seconds} s, as --timeout says\n"));
                STATUS_TIMEOUT
            }
            (Err(_), ExitReason::Stopped) if stopped_by != 0 => 128_u8.saturating_add(stopped_by),
            (Err(_), ExitReason::Payload(code)) => *code,
            (Err(_), _) => {
                tell(&report::failure(exit));
                STATUS_FAILURE
            }
        }
    }
}

/// Sets an entry of an environment: `NAME=VALUE`, or `NAME` for what it is here, if it is set here.
pub(crate) fn set(environment: &mut Vec<Vec<u8>>, entry: &OsString) {
    let mut text = bytes(entry);
    if !text.contains(&b'=') {
        let Some(value) = std::env::var_os(entry) else { return };
        text.push(b'=');
        text.extend(bytes(&value));
    }
    let name = text.iter().take_while(|&&byte| byte != b'=').count() + 1;
    match environment.iter_mut().find(|given| given.starts_with(&text[..name])) {
        Some(given) => *given = text,
        None => environment.push(text),
    }
}

/// Where the kernel is that was booted before for guests like this one; the same for all root filesystems.
fn preboot_path(config: &Config) -> Option<PathBuf> {
    const ENOUGH: usize = 16;
    let digests = config.boot_source.image_digests.as_ref()?;
    let kernel = source::cache()?.join("kernels").join(digests.get(..ENOUGH)?);
    Some(Image::preboot_path(&kernel, &config.machine, &config.devices))
}

/// Boots the kernel for later guests, where that has not been done. Where it cannot be done this guest boots itself.
fn make_preboot(config: &Config) {
    let Some(path) = config.preboot.as_ref().filter(|path| !path.exists()) else { return };
    let folder = path.parent().unwrap_or(path);
    // Others could change a kernel that they may write to.
    let made = std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .map_err(|error| error.to_string())
        .and_then(|()| preboot::make(config, path).map_err(|error| error.to_string()));
    if let Err(error) = made {
        tell(&format!("kindling: {}; this guest boots its kernel itself\n", report::printable(&error)));
    }
}
