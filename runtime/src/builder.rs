//! Guests of a program: started by it, asked to run processes, and gone when it is.

use crate::environment;
use crate::guest::owner::Owner;
use crate::guest::{Guest, GuestDir};
use crate::image::Image;
use crate::launch::{self, LaunchError, LaunchOptions, Plan};
use kindling_vmm::control::{ControlError, Event, Monitor};
use kindling_vmm::{Instant, Resources, Timeline};
use std::ffi::{OsStr, OsString};
use std::time::Duration;

/// How long a guest may take to be ready.
const START_TIMEOUT: Duration = Duration::from_secs(120);

/// A guest to be started. It runs nothing by itself: [`Guest::command`] asks it to.
#[derive(Clone, Debug)]
#[must_use = "a guest is started by `start`"]
pub struct GuestBuilder {
    image: Image,
    name: Option<String>,
    options: LaunchOptions,
}

impl Guest {
    /// A guest with the root filesystem, the environment, the working directory and the user of an image, 512 MiB of
    /// memory, one vCPU and no network.
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

impl GuestBuilder {
    /// Memory in MiB: at least 16, at most what the host has.
    pub const fn memory_mib(mut self, mib: u64) -> Self {
        self.options.memory_mib = mib;
        self
    }

    /// Virtual processors, 1 to 16.
    pub const fn vcpus(mut self, count: u64) -> Self {
        self.options.vcpus = count;
        self
    }

    /// Name by which `kindling ps`, `kindling exec` and [`Guest::open`] find it, up to 48 characters, unique for the
    /// user; one that no other guest has where none is given.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Hostname, instead of the guest's name.
    pub fn hostname(mut self, name: impl AsRef<OsStr>) -> Self {
        self.options.hostname = Some(name.as_ref().to_owned());
        self
    }

    /// Sets an entry of the environment of all processes.
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.options.env.push(environment::entry(name.as_ref(), value.as_ref()));
        self
    }

    /// A network card: `user` for networking without root, through passt, or the name of a tap device.
    pub fn network(mut self, network: impl AsRef<OsStr>) -> Self {
        self.options.network = Some(network.as_ref().to_owned());
        self
    }

    /// A port of the host that leads to one of the guest, as `docker run -p` takes it: `[ADDRESS:]HOST:GUEST[/tcp|/udp]`.
    pub fn publish(mut self, ports: impl Into<OsString>) -> Self {
        self.options.publish.push(ports.into());
        self
    }

    /// A volume or a folder of the host at a path of the guest, as `docker run -v` takes it: `NAME:/GUEST` or
    /// `/HOST:/GUEST`, with `:ro` behind it where the guest only reads. A volume that is missing is made.
    pub fn volume(mut self, volume: impl Into<OsString>) -> Self {
        self.options.volumes.push(volume.into());
        self
    }

    /// Programs only read the root filesystem; they write to volumes, shared folders, /dev/shm, /run, /tmp and /var/tmp.
    pub const fn read_only(mut self) -> Self {
        self.options.is_root_read_only = true;
        self
    }

    /// Starts the guest, and returns when it can be asked to run processes. The first guest of its size on a host boots
    /// its kernel, which takes a second or two; later ones go on from there.
    ///
    /// # Errors
    /// When the image, the kernel, an option or the host stands in the way.
    pub fn start(self) -> Result<Guest, LaunchError> {
        let mut monitor = launch::spawn_monitor()?;
        let directory = GuestDir::create(self.name.as_deref())?;
        let mut result = start_in(&directory, &mut monitor, &self.image, &self.options);
        if let Err(LaunchError::Monitor(failure)) = &result
            && failure.is_restore_error
        {
            // What the host refuses of a pre-booted kernel must not prevent a boot.
            drop(monitor);
            monitor = launch::spawn_monitor()?;
            let options = LaunchOptions { is_cold: true, ..self.options };
            result = start_in(&directory, &mut monitor, &self.image, &options);
        }
        match result.and_then(|timeline| Ok((timeline, Guest::open(directory.name())?))) {
            Ok((timeline, guest)) => {
                let owner = Owner { monitor: Some(monitor), directory: Some(directory), timeline };
                Ok(Guest { owner: Some(owner), ..guest })
            }
            Err(error) => {
                drop(monitor);
                directory.remove();
                Err(error)
            }
        }
    }
}

/// Starts a guest in its folder and its monitor; when each step was reached.
fn start_in(
    directory: &GuestDir,
    monitor: &mut Monitor,
    image: &Image,
    options: &LaunchOptions,
) -> Result<Timeline, LaunchError> {
    let timeline = Timeline::starting_at(Instant::now());
    let Plan { mut config, record } = options.plan(directory, image.prepared())?;
    let mut resources = Resources::open_devices(&config)?;
    directory.write(&record)?;
    let until = std::time::Instant::now() + START_TIMEOUT;
    // A kernel that cannot be pre-booted boots.
    let next = |monitor: &Monitor| monitor.event_before(until)?.ok_or(ControlError::Timeout);
    let _ = launch::make_preboot(&config, next)?;
    let _ = resources.open_boot_files(&mut config)?;
    monitor.start(&config, resources, Some(directory.monitor_lock()?), timeline)?;
    loop {
        match monitor.event_before(until).map_err(kindling_vmm::Error::from)? {
            Some(Event::Started(timeline)) => return Ok(timeline),
            Some(Event::Stopped(exit)) => return Err(LaunchError::Ended(exit.reason.to_string())),
            Some(Event::Failed(failure)) => return Err(LaunchError::Monitor(failure)),
            Some(_) => {}
            None => {
                let seconds = START_TIMEOUT.as_secs();
                return Err(LaunchError::Ended(format!("its agent was not ready within {seconds} s")));
            }
        }
    }
}
