//! Starting guests that belong to the calling program, and end with it.

use crate::environment;
use crate::guest::owner::Owner;
use crate::guest::{Guest, GuestDir};
use crate::image::Image;
use crate::launch::{
    self, Jail, Launch, LaunchError, LaunchOptions, Limits, MachineEnd, StartObserver, Started,
};
use crate::template::Template;
use kindling_vmm::Timeline;
use kindling_vmm::control::{ControlError, Event, Monitor};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Time limit for the start of a guest.
const START_TIMEOUT: Duration = Duration::from_secs(120);

/// A builder for a guest. The guest is started without a command; [`Guest::command`] runs processes in it.
#[derive(Clone, Debug)]
#[must_use = "a guest is started by `start`"]
pub struct GuestBuilder {
    image: Image,
    name: Option<String>,
    options: LaunchOptions,
}

impl Guest {
    /// Constructs a builder for a guest from an image. By default, the guest has 512 MiB of memory, one vCPU and no network;
    /// environment, working directory and user are the image's.
    pub fn builder(image: Image) -> GuestBuilder {
        let options = LaunchOptions {
            image: image.source().to_owned(),
            has_payload: false,
            memory_mib: 512,
            vcpus: 1,
            ..LaunchOptions::default()
        };
        GuestBuilder { image, name: None, options }
    }
}

impl Template {
    /// Returns a builder for a copy. Memory, vCPUs and devices are those of the template; environment, working directory and user
    /// are the image's.
    pub fn guest(&self) -> GuestBuilder {
        let mut builder = Guest::builder(self.image());
        (builder.options.memory_mib, builder.options.vcpus) = (self.memory_mib(), self.vcpus().into());
        builder.options.template = Some(self.clone());
        builder
    }
}

impl GuestBuilder {
    /// Sets the memory in MiB: at least 16, at most what the host has.
    pub const fn memory_mib(mut self, mib: u64) -> Self {
        self.options.memory_mib = mib;
        self
    }

    /// Sets the number of vCPUs, 1 to 16.
    pub const fn vcpus(mut self, count: u64) -> Self {
        self.options.vcpus = count;
        self
    }

    /// Sets the name, by which `kindling ps`, `kindling exec` and [`Guest::open`] find the guest: up to 48 letters, digits,
    /// `.`, `_` and `-`, unique among the user's guests. Defaults to a random name.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Sets the hostname. Defaults to the guest's name.
    pub fn hostname(mut self, name: impl AsRef<OsStr>) -> Self {
        self.options.hostname = Some(name.as_ref().to_owned());
        self
    }

    /// Sets an environment variable of all processes in the guest.
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.options.env.push(environment::entry(name.as_ref(), value.as_ref()));
        self
    }

    /// Adds a network card: `user` for networking without root, through passt, or the name of a tap device, with the options
    /// of [`network::interface`](crate::network::interface).
    pub fn network(mut self, network: impl AsRef<OsStr>) -> Self {
        self.options.network = Some(network.as_ref().to_owned());
        self
    }

    /// Publishes a port of the guest at a port of the host, with the syntax of `docker run -p`:
    /// `[[ADDRESS:][HOST]:]GUEST[/tcp|/udp]`. Without HOST a free port is assigned, which [`Guest::record`] has. Without
    /// [`network`](Self::network), the network is `user`.
    pub fn publish(mut self, ports: impl Into<OsString>) -> Self {
        self.options.publish.push(ports.into());
        self
    }

    /// Mounts a volume or a folder of the host at a path of the guest, with the syntax of `docker run -v`: `NAME:/GUEST` or
    /// `/HOST:/GUEST`, followed by `:ro` for a read-only mount. A missing volume is created.
    pub fn volume(mut self, volume: impl Into<OsString>) -> Self {
        self.options.volumes.push(volume.into());
        self
    }

    /// Sets limits beyond memory and vCPUs. The default is [`Limits::default`]: unlimited.
    pub const fn limits(mut self, limits: Limits) -> Self {
        self.options.limits = limits;
        self
    }

    /// Sets the directory of an existing cgroup in which the monitor gets one of its own, with limits of memory and threads.
    pub fn cgroup_parent(mut self, directory: impl Into<PathBuf>) -> Self {
        self.options.cgroup_parent = Some(directory.into());
        self
    }

    /// Sets the jail of the monitor. The default is [`Jail::default`].
    pub const fn jail(mut self, jail: Jail) -> Self {
        self.options.jail = jail;
        self
    }

    /// Mounts the root filesystem read-only. Volumes, shared folders, /dev/shm, /run, /tmp and /var/tmp stay writable.
    pub const fn read_only(mut self) -> Self {
        self.options.is_root_read_only = true;
        self
    }

    /// Gives the guest a spare monitor if there is one, and leaves another for the next guest of the same size and devices. A
    /// spare is a process that has started a machine up to the point where it needs to know its guest; one that is not used
    /// ends after ten minutes.
    pub const fn uses_spares(mut self) -> Self {
        self.options.uses_spares = true;
        self
    }

    /// Starts the guest, and returns when it accepts processes. The first guest of its size on a host boots its kernel, which
    /// takes a second or two; later ones continue from the pre-booted kernel.
    ///
    /// # Errors
    /// When an option is invalid, the kernel is missing, the host cannot run guests, or the guest is not ready within two
    /// minutes.
    pub fn start(self) -> Result<Guest, LaunchError> {
        self.start_with(None)
    }

    /// Starts the guest of a template, whose snapshot is written to a file.
    pub(crate) fn start_for_snapshot(mut self, file: File) -> Result<Guest, LaunchError> {
        self.options.uses_spares = false;
        self.options.forbid_in_template()?;
        self.start_with(Some(file))
    }

    fn start_with(self, snapshot: Option<File>) -> Result<Guest, LaunchError> {
        // The monitor starts while this process prepares the guest.
        let monitor = (!self.options.uses_spares).then(launch::spawn_monitor).transpose()?;
        let directory = GuestDir::create_embedded(self.name.as_deref())?;
        let started = start_in(&directory, monitor, &self.image, &self.options, snapshot);
        match started.and_then(|started| Ok((started, Guest::open(directory.name())?))) {
            Ok(((monitor, timeline), guest)) => {
                let owner = Owner { monitor, directory: Some(directory), timeline };
                Ok(Guest { owner: Some(owner), ..guest })
            }
            Err(error) => {
                directory.remove();
                Err(error)
            }
        }
    }
}

/// Starts a guest in its monitor. Returns the monitor, and the times of the steps.
fn start_in(
    directory: &GuestDir,
    monitor: Option<Monitor>,
    image: &Image,
    options: &LaunchOptions,
    snapshot: Option<File>,
) -> Result<(Option<Monitor>, Timeline), LaunchError> {
    let timeline = Timeline::starting_at(kindling_vmm::Instant::now());
    let mut launch = Launch::new(options, directory, image.prepared())?;
    launch.snapshot = snapshot;
    let silent = |_: &str| {};
    let mut limit = TimeLimit::new();
    launch.preboot(&silent, |monitor| limit.next_event(monitor))?;
    let monitor = monitor.map_or_else(|| launch.new_monitor(), Ok)?;
    let started = launch.start(monitor, &timeline, &silent, &mut limit)?;
    if let Some(spare) = launch.next_spare() {
        spare.start();
    }
    match started {
        Started::Running(timeline) => Ok((launch.monitor, timeline)),
        Started::Ended(MachineEnd::Stopped(exit)) => Err(LaunchError::Ended(exit.reason.to_string())),
        Started::Ended(MachineEnd::Lost(_)) if limit.is_over => {
            let seconds = START_TIMEOUT.as_secs();
            Err(LaunchError::Ended(format!("its agent did not respond within {seconds} s")))
        }
        Started::Ended(MachineEnd::Lost(error)) => Err(kindling_vmm::Error::from(error).into()),
    }
}

/// Waits for events of a monitor, up to [`START_TIMEOUT`].
struct TimeLimit {
    until: Instant,
    is_over: bool,
}

impl TimeLimit {
    fn new() -> Self {
        Self { until: Instant::now() + START_TIMEOUT, is_over: false }
    }
}

impl StartObserver for TimeLimit {
    fn starting(&mut self, _: &Monitor) -> Result<(), LaunchError> {
        *self = Self::new();
        Ok(())
    }

    fn next_event(&mut self, monitor: &Monitor) -> Result<Event, ControlError> {
        let event = monitor.event_before(self.until)?;
        self.is_over = event.is_none();
        event.ok_or(ControlError::Timeout)
    }
}
