//! The front's end: it starts the monitor, and hears how its guest does.

use super::channel::Channel;
use super::{ControlError, EVENT_MAX, Event, REQUEST_MAX, Request, Role, Start};
use crate::bus::lock;
use crate::config::{Config, ConfigError};
use crate::devices::virtio::fs::Server;
use crate::devices::virtio::vsock::Listener;
use crate::error::Error;
use crate::resources::{Backend, Resources};
use crate::timeline::Timeline;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How long the rest of a frame may take that has begun.
const FRAME_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a monitor may take to end that was told to.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);
/// The exit status of a monitor whose front does not speak as one does.
const STATUS_FAILURE: i32 = 125;

/// A monitor: the process `kindling-vmm`. Dropping it stops its machine and waits for the process.
#[derive(Debug)]
pub struct Monitor {
    channel: Channel,
    process: Mutex<Child>,
    /// The servers of shared folders, which end with the guest.
    servers: Vec<Server>,
    /// The vsock's socket, for its file.
    listeners: Vec<Listener>,
    /// What it has said already and says once: why it does not continue from its pre-booted kernel, and that its agent is
    /// ready.
    said: [AtomicBool; 2],
}

impl Monitor {
    /// Starts the process, which waits for a machine.
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
            said: [AtomicBool::new(false), AtomicBool::new(false)],
        })
    }

    /// Hands a machine over, with all that is open for it. `lock` is a file that the monitor locks, so that others can
    /// find its process.
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
                Backend::File(file) => add(Role::Device, Some(file.into())),
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
                Backend::Host | Backend::BlankOf(_) | Backend::Nothing => {}
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
        Ok(self.channel.send(&Request::Start(Box::new(start)), REQUEST_MAX, &descriptors)?)
    }

    /// Stops the machine; [`Event::Stopped`] follows. One that has stopped needs no telling.
    pub fn stop(&self) {
        let _ = self.channel.send(&Request::Stop, REQUEST_MAX, &[]);
    }

    /// Changes the size of the guest's balloon, if it has one.
    pub fn set_balloon(&self, mib: u64) {
        let _ = self.channel.send(&Request::SetBalloon(mib), REQUEST_MAX, &[]);
    }

    /// Leaves the process to its own end, for a program that ends now: with the socket the machine stops, if it has not.
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
    /// When the monitor is gone, or what it says is none.
    pub fn next_event(&self) -> Result<Event, ControlError> {
        let event = match self.wait_readable(None)?.then(|| self.channel.receive::<Event>(EVENT_MAX)) {
            Some(Ok(Some((event, _)))) => event,
            Some(Err(error)) if !matches!(error, ControlError::Gone) => return Err(error),
            _ => return Err(self.why_gone()),
        };
        // A hostile monitor could repeat these events without end.
        let number = match event {
            Event::PrebootRefused(_) => Some(0),
            Event::AgentReady => Some(1),
            Event::Stopped(_) | Event::Failed(_) => None,
        };
        match number {
            Some(number) if self.said[number].swap(true, Ordering::Relaxed) => Err(ControlError::Version),
            _ => Ok(event),
        }
    }

    /// Waits for an event until a time; none where nothing came.
    ///
    /// # Errors
    /// As [`Self::next_event`].
    pub fn event_before(&self, until: Instant) -> Result<Option<Event>, ControlError> {
        if self.wait_readable(Some(until))? { self.next_event().map(Some) } else { Ok(None) }
    }

    fn wait_readable(&self, until: Option<Instant>) -> Result<bool, ControlError> {
        wait_readable(self.channel.as_fd(), until).map_err(ControlError::from)
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

/// Waits for a process's end, and kills it where it does not come: a guest may have taken it over. How it ended by itself.
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

/// Waits until a descriptor can be read, or until a time; whether it can.
fn wait_readable(fd: BorrowedFd<'_>, until: Option<Instant>) -> Result<bool, Errno> {
    loop {
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        match poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], left.as_ref()) {
            Err(Errno::INTR) => {}
            result => return result.map(|count| count > 0),
        }
    }
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
