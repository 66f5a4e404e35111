//! The front's end: it starts the monitor, sends requests and receives events.

mod events;

use super::channel::Channel;
use super::{ControlError, Event, REQUEST_MAX, Request, Role, Start, Statistics};
use crate::bus::lock;
use crate::config::{Config, ConfigError};
use crate::devices::virtio::fs::Server;
use crate::devices::virtio::vsock::Listener;
use crate::error::Error;
use crate::kvm::Hypervisor;
use crate::layout;
use crate::poll::wait_readable;
use crate::preboot::error::PrebootError;
use crate::preboot::place::Place;
use crate::preboot::{capture, verified};
use crate::resources::{Backend, Behind, Resources};
use crate::timeline::Timeline;
use events::Events;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Time for the rest of a frame whose first byte has arrived.
const FRAME_TIMEOUT: Duration = Duration::from_secs(1);
/// Time for a monitor to end after its socket was closed.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);
/// Exit status of a monitor that received something that is no request.
const STATUS_FAILURE: i32 = 125;

/// A monitor: the process `kindling-vmm`. Dropping it stops its machine and waits for the process.
#[derive(Debug)]
pub struct Monitor {
    channel: Channel,
    process: Mutex<Child>,
    /// The servers of shared folders, which end with the guest.
    servers: Vec<Server>,
    /// The vsock's socket, whose file is removed with it.
    listeners: Vec<Listener>,
    events: Mutex<Events>,
}

impl Monitor {
    /// Starts the process, which waits for its first request.
    ///
    /// # Errors
    /// When the host refuses it.
    pub fn spawn(program: &Path) -> io::Result<Self> {
        let (ours, its) = UnixStream::pair()?;
        let process = Command::new(program)
            .stdin(OwnedFd::from(its))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .env_clear()
            .current_dir("/")
            .spawn()?;
        let channel = Channel::new(ours);
        channel.limit(FRAME_TIMEOUT)?;
        Ok(Self {
            channel,
            process: Mutex::new(process),
            servers: Vec::new(),
            listeners: Vec::new(),
            events: Mutex::default(),
        })
    }

    /// Starts a machine with all that is open for it. `lock` is a file that the monitor locks, so that others can find
    /// its process. [`Event::Started`], [`Event::Stopped`] or [`Event::Failed`] follows.
    ///
    /// # Errors
    /// When a program that was started for the machine fails, the host refuses something, or the monitor is gone.
    pub fn start(
        &mut self,
        config: &Config,
        resources: Resources,
        lock: Option<OwnedFd>,
        timeline: Timeline,
    ) -> Result<(), Error> {
        self.hand_over(config, resources, lock, timeline, Request::Start)
    }

    /// Pre-boots a kernel for the machines of a configuration, and lets guests try it. The console, the payload and the
    /// contents of the disks are not used. The kernel and the initrd are compared with their image's digests first, and
    /// what was compared is booted. [`Event::Prebooted`] or [`Event::Failed`] follows.
    ///
    /// # Errors
    /// When the kernel or the initrd is not the one that its image names, a file cannot be opened or made, or the
    /// monitor is gone.
    pub fn start_preboot(&mut self, config: &Config, path: &Path) -> Result<PrebootDraft, Error> {
        config.validate()?;
        let config = capture::configuration(config, path);
        let digests = config.boot_source.image_digests.as_ref().ok_or(PrebootError::NotAnImage)?;
        // A kernel or initrd is never larger than the memory that it is loaded into.
        let max = config.machine.mem_size_mib.saturating_mul(layout::MIB);
        let boot = verified::read(&config.boot_source, digests, max)?;
        let failed = |source| PrebootError::Write { path: path.into(), source };
        let place = Place::of(path).map_err(failed)?;
        let file = place.file_without_a_name().map_err(failed)?;
        let copy = file.try_clone().map_err(failed)?;
        let kvm = Some(Hypervisor::open_descriptor()?);
        let resources = Resources::open(&config, Behind::Root)?;
        let resources = Resources { kvm, boot: Some(boot), preboot: Some(copy), ..resources };
        let timeline = Timeline::starting_at(crate::timeline::Instant::now());
        self.hand_over(&config, resources, None, timeline, Request::Preboot)?;
        Ok(PrebootDraft { place, file, path: path.into() })
    }

    fn hand_over(
        &mut self,
        config: &Config,
        resources: Resources,
        lock: Option<OwnedFd>,
        timeline: Timeline,
        request: fn(Box<Start>) -> Request,
    ) -> Result<(), Error> {
        let Resources { kvm, boot, preboot, backends, starting } = resources;
        let (mut roles, mut descriptors) = (Vec::new(), Vec::new());
        let mut add = |role, descriptor: Option<OwnedFd>| {
            if let Some(descriptor) = descriptor {
                roles.push(role);
                descriptors.push(descriptor);
            }
        };
        add(Role::Kvm, kvm);
        if let Some(boot) = boot {
            add(Role::Kernel, Some(boot.kernel.into()));
            add(Role::Initrd, boot.initrd.map(Into::into));
        }
        add(Role::Preboot, preboot.map(Into::into));
        add(Role::Lock, lock);
        for backend in backends {
            match backend {
                Backend::File(file) | Backend::BlankOf(file) => add(Role::Device, Some(file.into())),
                Backend::Link(link) => add(Role::Device, Some(link)),
                Backend::Listener(listener) => {
                    let socket = listener.as_fd().try_clone_to_owned();
                    add(Role::Device, Some(socket.map_err(Error::host("duplicate a socket"))?));
                    self.listeners.push(listener);
                }
                Backend::Folder(server) => {
                    let pair = server.descriptors().map_err(Error::host("duplicate a socket"))?;
                    pair.into_iter().for_each(|descriptor| add(Role::Device, Some(descriptor)));
                    self.servers.push(server);
                }
                Backend::Host | Backend::Nothing => {}
            }
        }
        for starting in starting {
            let wrong = |what| ConfigError::InterfaceDevice { name: "user".into(), what };
            starting.wait().map_err(wrong)?;
        }
        let start = Start {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            config: config.clone(),
            timeline,
            descriptors: roles,
        };
        let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        Ok(self.channel.send(&request(Box::new(start)), REQUEST_MAX, &descriptors)?)
    }

    /// Stops the machine; [`Event::Stopped`] follows. A monitor that has ended ignores it.
    pub fn stop(&self) {
        let _ = self.channel.send(&Request::Stop, REQUEST_MAX, &[]);
    }

    /// Changes the size of the guest's balloon, if it has one.
    pub fn set_balloon(&self, mib: u64) {
        let _ = self.channel.send(&Request::SetBalloon(mib), REQUEST_MAX, &[]);
    }

    /// Makes all vCPUs leave the guest and wait, and returns when they do. Devices still serve the host's side:
    /// connections to the guest are accepted, and wait.
    ///
    /// # Errors
    /// When the monitor does not answer until then, or is gone.
    pub fn pause(&self, until: Instant) -> Result<(), ControlError> {
        self.ask(&Request::Pause, until, |event| match event {
            Event::Paused => Ok(()),
            event => Err(event),
        })
    }

    /// Lets paused vCPUs enter the guest again.
    ///
    /// # Errors
    /// As [`Self::pause`].
    pub fn resume(&self, until: Instant) -> Result<(), ControlError> {
        self.ask(&Request::Resume, until, |event| match event {
            Event::Resumed => Ok(()),
            event => Err(event),
        })
    }

    /// Statistics of the machine.
    ///
    /// # Errors
    /// As [`Self::pause`].
    pub fn statistics(&self, until: Instant) -> Result<Statistics, ControlError> {
        self.ask(&Request::Statistics, until, |event| match event {
            Event::Statistics(statistics) => Ok(*statistics),
            event => Err(event),
        })
    }

    /// Leaves the machine running after the end of this process. The monitor keeps `lock` open, a file whose flock(2)
    /// says that the guest runs, and writes the exit status to the beginning of `status`, in decimal digits.
    ///
    /// # Errors
    /// When the monitor is gone.
    pub fn detach(self, lock: BorrowedFd<'_>, status: &File) -> Result<(), ControlError> {
        self.channel.send(&Request::Detach, REQUEST_MAX, &[lock, status.as_fd()])?;
        // The servers of shared folders end with the monitor, and the vsock's socket stays in the guest's folder.
        std::mem::forget(self);
        Ok(())
    }

    /// Leaves the end of the process to itself, for a front that ends now: the machine stops, if it has not, when the
    /// socket is closed.
    pub fn leave(mut self) {
        // The servers of shared folders end with the monitor; their end is not waited for.
        self.listeners.clear();
        std::mem::forget(self);
    }

    /// A handle that stops the machine from another thread.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn stopper(&self) -> io::Result<Stopper> {
        self.channel.try_clone().map(Stopper)
    }

    /// Waits for the next event; readable is [`AsFd`].
    ///
    /// # Errors
    /// When the monitor is gone, or sends something that is no event.
    pub fn next_event(&self) -> Result<Event, ControlError> {
        let mut events = lock(&self.events);
        match events.kept() {
            Some(event) => Ok(event),
            None => self.receive(&mut events),
        }
    }

    /// Waits for an event until a time; none where none arrived.
    ///
    /// # Errors
    /// As [`Self::next_event`].
    pub fn event_before(&self, until: Instant) -> Result<Option<Event>, ControlError> {
        let is_there = lock(&self.events).has_kept() || wait_readable(self.channel.as_fd(), Some(until))?;
        if is_there { self.next_event().map(Some) } else { Ok(None) }
    }

    /// Sends a request and waits for its answer. Other events are kept for [`Self::next_event`].
    fn ask<T>(
        &self,
        request: &Request,
        until: Instant,
        answer: impl Fn(Event) -> Result<T, Event>,
    ) -> Result<T, ControlError> {
        let mut events = lock(&self.events);
        events.ask();
        self.channel.send(request, REQUEST_MAX, &[])?;
        while wait_readable(self.channel.as_fd(), Some(until))? {
            match answer(self.receive(&mut events)?) {
                Ok(answer) => return Ok(answer),
                // The answer to an earlier request, which was not waited for that long.
                Err(Event::Paused | Event::Resumed | Event::Statistics(_)) => {}
                Err(event) => {
                    let is_last = matches!(event, Event::Stopped(_) | Event::Failed(_));
                    events.keep(event);
                    if is_last {
                        return Err(ControlError::Ended);
                    }
                }
            }
        }
        Err(ControlError::Silent)
    }

    fn receive(&self, events: &mut Events) -> Result<Event, ControlError> {
        wait_readable(self.channel.as_fd(), None)?;
        match events.receive(&self.channel) {
            Err(ControlError::Gone) => Err(self.why_gone()),
            result => result,
        }
    }

    /// How the process ended that has closed its socket.
    fn why_gone(&self) -> ControlError {
        let mut process = lock(&self.process);
        match wait_or_kill(&mut process) {
            Some(status) if status.code() == Some(STATUS_FAILURE) => ControlError::Version,
            Some(status) => status.signal().map_or(ControlError::Gone, ControlError::Killed),
            None => ControlError::Stuck,
        }
    }
}

impl AsFd for Monitor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        self.stop();
        self.listeners.clear();
        let _ = self.channel.shut_down();
        wait_or_kill(&mut lock(&self.process));
    }
}

/// Waits for a process's end, and kills a process that does not end: its guest may have taken it over. The status of one
/// that ended by itself.
fn wait_or_kill(process: &mut Child) -> Option<ExitStatus> {
    let has_ended = pidfd_open(Pid::from_child(process), PidfdFlags::empty())
        .and_then(|fd| wait_readable(fd.as_fd(), Some(Instant::now() + STOP_TIMEOUT)))
        .unwrap_or(true);
    if !has_ended {
        let _ = process.kill();
    }
    let status = process.wait().ok();
    status.filter(|_| has_ended)
}

/// Stops a monitor's machine.
#[derive(Debug)]
pub struct Stopper(Channel);

impl Stopper {
    /// As [`Monitor::stop`].
    pub fn stop(&self) {
        let _ = self.0.send(&Request::Stop, REQUEST_MAX, &[]);
    }
}

/// A pre-booted kernel that a monitor writes. Its file has no name, and is gone with this, until it is published.
#[must_use = "the file appears with `publish`"]
#[derive(Debug)]
pub struct PrebootDraft {
    place: Place,
    file: File,
    path: PathBuf,
}

impl PrebootDraft {
    /// Gives the file its name, whole and synced, after [`Event::Prebooted`].
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn publish(self) -> Result<(), Error> {
        let failed = |source| PrebootError::Write { path: self.path.clone(), source };
        Ok(self.place.publish(&self.file).map_err(failed)?)
    }
}
