//! The monitor's end: the program `kindling-vmm`.

use super::channel::Channel;
use super::{ControlError, EVENT_MAX, Event, Failure, REQUEST_MAX, Request, Role, Start};
use crate::boot::BootFiles;
use crate::config::Config;
use crate::config::devices::DeviceConfig;
use crate::devices::virtio::balloon;
use crate::devices::virtio::fs::Server;
use crate::devices::virtio::vsock::Listener;
use crate::entry;
use crate::error::{Error, with_causes};
use crate::machine::{Machine, Purpose};
use crate::resources::{Backend, Resources};
use guest_protocol::BootMark;
use rustix::fs::{FlockOperation, fcntl_lock};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

/// What the event loop knows of the front.
#[derive(Debug)]
pub(crate) struct Control {
    channel: Channel,
    balloon: Option<balloon::Control>,
}

impl AsFd for Control {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}

impl Control {
    /// Takes a request that has come; whether the machine goes on. A front that is gone, or does not speak as one does,
    /// stops it.
    pub(crate) fn serve(&self) -> bool {
        match self.channel.receive::<Request>(REQUEST_MAX) {
            Ok(Some((Request::SetBalloon(mib), _))) => {
                if let Some(balloon) = &self.balloon {
                    balloon.set_amount(mib);
                }
                true
            }
            Ok(Some((Request::Start(_) | Request::Stop, _)) | None) | Err(_) => false,
        }
    }
}

/// Serves the front at the other end of a socket: waits for a machine, runs it to its end, and says how it ended. A front
/// that never asks for one is no error.
///
/// The machine's memory and KVM's objects are left to the end of the process.
///
/// # Errors
/// When the front does not speak as one does, or is gone before the end.
pub fn serve(socket: UnixStream) -> Result<(), ControlError> {
    let channel = Channel::new(socket);
    let Some((request, descriptors)) = channel.receive::<Request>(REQUEST_MAX)? else { return Ok(()) };
    let Request::Start(start) = request else { return Err(ControlError::Version) };
    if start.version != env!("CARGO_PKG_VERSION") {
        return Err(ControlError::Version);
    }
    let tell = |event: &Event| channel.send(event, EVENT_MAX, &[]);
    match run(*start, descriptors, &channel) {
        Ok(()) => Ok(()),
        Err(error) => tell(&Event::Failed(Failure::of(&error))),
    }
}

fn run(start: Start, descriptors: Vec<OwnedFd>, channel: &Channel) -> Result<(), Error> {
    let Start { config, mut timeline, descriptors: roles, .. } = start;
    let Given { resources, _lock } = Given::sort(&config, &roles, descriptors)?;
    timeline.reached("monitor has its configuration");
    entry::raise_descriptor_limit();
    let spare = config.preboot.is_some().then(|| resources.try_clone()).transpose();
    let spare = spare.map_err(Error::host("duplicate a descriptor"))?;
    let again = || spare.ok_or_else(|| absent("what the machine needs"));
    let mut machine = Machine::with_resources(&config, resources, again, timeline, Purpose::Run)?;
    if let Some(refusal) = machine.preboot_refusal() {
        let _ = channel.send(&Event::PrebootRefused(with_causes(refusal)), EVENT_MAX, &[]);
    }
    let copy = || channel.try_clone().map_err(Error::host("duplicate a socket"));
    let ready = copy()?;
    machine.at_mark(BootMark::AgentReady, move || drop(ready.send(&Event::AgentReady, EVENT_MAX, &[])));
    machine.control = Some(Control { channel: copy()?, balloon: machine.devices.balloon.clone() });
    let (exit, remains) = machine.start()?.wait_for_end();
    // A front that is gone has stopped the machine.
    let _ = channel.send(&Event::Stopped(Box::new(exit)), EVENT_MAX, &[]);
    remains.leave_to_kernel();
    Ok(())
}

/// What came with a configuration.
struct Given {
    resources: Resources,
    /// By which others know this process.
    _lock: Option<OwnedFd>,
}

impl Given {
    fn sort(config: &Config, roles: &[Role], descriptors: Vec<OwnedFd>) -> Result<Self, Error> {
        if roles.len() != descriptors.len() {
            return Err(absent("as many descriptors as it names"));
        }
        let (mut resources, mut lock, mut devices) = (Resources::default(), None, Vec::new());
        let (mut kernel, mut initrd) = (None, None);
        for (role, descriptor) in roles.iter().zip(descriptors) {
            match role {
                Role::Kvm => resources.kvm = Some(descriptor),
                Role::Kernel => kernel = Some(File::from(descriptor)),
                Role::Initrd => initrd = Some(File::from(descriptor)),
                Role::Preboot => resources.preboot = Some(File::from(descriptor)),
                Role::Lock => {
                    // Without the lock `kindling stats` and `kill` do not find this process; the guest runs all the same.
                    let _ = fcntl_lock(&descriptor, FlockOperation::NonBlockingLockExclusive);
                    lock = Some(descriptor);
                }
                Role::Device => devices.push(descriptor),
            }
        }
        resources.boot = kernel.map(|kernel| BootFiles { kernel, initrd });
        let mut devices = devices.into_iter();
        for device in config.devices.iter() {
            resources.backends.push(backend(&device, &mut devices)?);
        }
        Ok(Self { resources, _lock: lock })
    }
}

fn backend(
    device: &DeviceConfig<'_>,
    descriptors: &mut impl Iterator<Item = OwnedFd>,
) -> Result<Backend, Error> {
    let mut next = || descriptors.next().ok_or_else(|| absent("a descriptor for each device"));
    Ok(match device {
        DeviceConfig::Drive(_) | DeviceConfig::Root(_) | DeviceConfig::Pmem(_) => {
            Backend::File(next()?.into())
        }
        DeviceConfig::Network(_) => Backend::Link(next()?),
        DeviceConfig::Vsock(_) => Backend::Listener(Listener::from_descriptor(UnixListener::from(next()?))),
        DeviceConfig::Folder(_) => Backend::Folder(Server::from_descriptors(next()?.into(), next()?)),
        DeviceConfig::Entropy(_) | DeviceConfig::Balloon(_) => Backend::Host,
    })
}

fn absent(what: &'static str) -> Error {
    Error::host(what)(std::io::ErrorKind::NotFound.into())
}

impl Failure {
    fn of(error: &Error) -> Self {
        Self {
            is_users: error.is_users(),
            is_kvm: matches!(error, Error::Kvm(_)),
            message: with_causes(error),
        }
    }
}
