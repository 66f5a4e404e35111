//! The monitor's end: the program `kindling-vmm`.

use super::channel::Channel;
use super::{Control, ControlError, EVENT_MAX, Event, Failure, REQUEST_MAX, Request, Role, Start};
use crate::boot::BootFiles;
use crate::config::Config;
use crate::config::devices::DeviceConfig;
use crate::devices::virtio::fs::Server;
use crate::devices::virtio::vsock::Listener;
use crate::entry;
use crate::error::{Error, with_causes};
use crate::machine::{Machine, Purpose};
use crate::preboot::capture;
use crate::preboot::error::PrebootError;
use crate::resources::{Backend, Behind, Resources};
use guest_protocol::BootMark;
use rustix::fs::{FlockOperation, fcntl_lock};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};

/// Serves a first request, whose descriptors came with it, to its end.
type Serve = fn(Start, Vec<OwnedFd>, &Channel) -> Result<(), Error>;

/// Serves the front at the other end of a socket: waits for its first request, runs that to its end, and reports how it
/// ended. A front that closes the socket before its first request is no error.
///
/// The machine's memory and KVM's objects are left to the end of the process.
///
/// # Errors
/// When the front sends something that is no request, or is gone before the end.
pub fn serve(socket: UnixStream) -> Result<(), ControlError> {
    let channel = Channel::new(socket);
    let Some((request, descriptors)) = channel.receive::<Request>(REQUEST_MAX)? else { return Ok(()) };
    let (start, serve): (_, Serve) = match request {
        Request::Start(start) => (start, run),
        Request::Preboot(start) => (start, preboot),
        _ => return Err(ControlError::Version),
    };
    if start.version != env!("CARGO_PKG_VERSION") {
        return Err(ControlError::Version);
    }
    match serve(*start, descriptors, &channel) {
        Ok(()) => Ok(()),
        Err(error) => channel.send(&Event::Failed(Failure::of(&error)), EVENT_MAX, &[]),
    }
}

/// Runs a machine.
fn run(start: Start, descriptors: Vec<OwnedFd>, channel: &Channel) -> Result<(), Error> {
    let Start { config, mut timeline, descriptors: roles, .. } = start;
    let Given { resources, _lock } = Given::sort(&config, &roles, descriptors, Behind::Everything)?;
    timeline.reached("monitor has its configuration");
    entry::raise_descriptor_limit();
    let mut machine = Machine::with_resources(&config, resources, timeline, Purpose::Run)?;
    if let Some(refusal) = machine.preboot_refusal() {
        let _ = channel.send(&Event::PrebootRefused(with_causes(refusal)), EVENT_MAX, &[]);
    }
    let control = Control::new(channel, machine.devices.balloon.clone())?;
    let agent = channel.try_clone().map_err(Error::host("duplicate a socket"))?;
    let started = Event::Started(machine.timeline.clone());
    machine.at_mark(BootMark::AgentReady, move || drop(agent.send(&started, EVENT_MAX, &[])));
    machine.control = Some(control);
    let (exit, stopped) = machine.start()?.wait_for_end();
    // A front that is gone has stopped the machine.
    let status = exit.reason.status();
    let _ = channel.send(&Event::Stopped(Box::new(exit)), EVENT_MAX, &[]);
    stopped.control().iter().for_each(|control| control.finish(status));
    stopped.leave_to_kernel();
    Ok(())
}

/// Makes a pre-booted kernel.
fn preboot(start: Start, descriptors: Vec<OwnedFd>, channel: &Channel) -> Result<(), Error> {
    let Start { config, descriptors: roles, .. } = start;
    let Given { mut resources, .. } = Given::sort(&config, &roles, descriptors, Behind::Root)?;
    let file = resources.preboot.take().ok_or_else(|| absent("a file for the pre-booted kernel"))?;
    capture::capture(&config, &resources, &file, &|| Control::new(channel, None))?;
    Ok(channel.send(&Event::Prebooted, EVENT_MAX, &[])?)
}

/// What came with a configuration.
struct Given {
    resources: Resources,
    /// By which others know this process.
    _lock: Option<OwnedFd>,
}

impl Given {
    fn sort(
        config: &Config,
        roles: &[Role],
        descriptors: Vec<OwnedFd>,
        behind: Behind,
    ) -> Result<Self, Error> {
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
        let kernel = kernel.ok_or_else(|| absent("a descriptor of the kernel"))?;
        resources.boot = Some(BootFiles { kernel, initrd });
        // A path of the front means nothing here: what it has not opened is not opened.
        if resources.kvm.is_none() || config.preboot.is_some() != resources.preboot.is_some() {
            return Err(absent("descriptors of KVM and the pre-booted kernel"));
        }
        let mut devices = devices.into_iter();
        for device in config.devices.iter() {
            resources.backends.push(backend(&device, behind, &mut devices)?);
        }
        Ok(Self { resources, _lock: lock })
    }
}

fn backend(
    device: &DeviceConfig<'_>,
    behind: Behind,
    descriptors: &mut impl Iterator<Item = OwnedFd>,
) -> Result<Backend, Error> {
    let mut next = || descriptors.next().ok_or_else(|| absent("a descriptor for each device"));
    Ok(match device {
        DeviceConfig::Root(_) => Backend::File(next()?.into()),
        DeviceConfig::Drive(_) | DeviceConfig::Pmem(_) if behind == Behind::Root => {
            Backend::BlankOf(next()?.into())
        }
        DeviceConfig::Drive(_) | DeviceConfig::Pmem(_) => Backend::File(next()?.into()),
        _ if behind == Behind::Root => Backend::Nothing,
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
            is_preboot: matches!(error, Error::Preboot(PrebootError::Restore { .. })),
            message: with_causes(error),
        }
    }
}
