//! The front's end: it starts the monitor, and hears how its guest does.

use super::channel::Channel;
use super::{ControlError, EVENT_MAX, Event, REQUEST_MAX, Request, Role, Start};
use crate::config::{Config, ConfigError};
use crate::devices::virtio::fs::Server;
use crate::devices::virtio::vsock::Listener;
use crate::error::Error;
use crate::resources::{Backend, Resources};
use crate::timeline::Timeline;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

/// A monitor: the process `kindling-vmm`. Dropping it stops its machine and waits for the process.
#[derive(Debug)]
pub struct Monitor {
    channel: Channel,
    process: Child,
    /// The servers of shared folders, which end with the guest.
    servers: Vec<Server>,
    /// The vsock's socket, for its file.
    listeners: Vec<Listener>,
    /// Whether it has said why it does not continue from its pre-booted kernel.
    has_refused: AtomicBool,
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
        Ok(Self {
            channel: Channel::new(ours),
            process,
            servers: Vec::new(),
            listeners: Vec::new(),
            has_refused: AtomicBool::new(false),
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
        // The servers end with the monitor, and nobody waits for them.
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
        match self.channel.receive::<Event>(EVENT_MAX)? {
            // One that repeats itself would have it printed again and again.
            Some((Event::PrebootRefused(_), _)) if self.has_refused.swap(true, Ordering::Relaxed) => {
                Err(ControlError::Version)
            }
            Some((event, _)) => Ok(event),
            None => Err(ControlError::Gone),
        }
    }

    /// The number of the process.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.process.id()
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
        let _ = self.process.wait();
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
