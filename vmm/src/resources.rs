//! What a machine needs of the host, open: files, sockets, other programs, /dev/kvm. After this nothing is opened by its
//! path, so that another process can go on from here.

use crate::boot::BootFiles;
use crate::config::Config;
use crate::config::devices::DeviceConfig;
use crate::devices::virtio::block::{Block, ForeignLock};
use crate::devices::virtio::fs::Server;
use crate::devices::virtio::net::{Net, Starting};
use crate::devices::virtio::pmem::Pmem;
use crate::devices::virtio::vsock::Listener;
use crate::error::Error;
use crate::kvm::Hypervisor;
use crate::preboot::error::PrebootError;
use crate::preboot::file;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

/// What is behind devices that are opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Behind {
    /// What the configuration names.
    Everything,
    /// The image's root filesystem, zeroes for other files and nothing else: a pre-booted kernel is made without a trace
    /// in a user's disks and networks.
    Root,
}

/// What is behind a device.
#[derive(Debug)]
pub(crate) enum Backend {
    /// The host itself: its random numbers, its memory.
    Host,
    /// The file of a disk or of memory.
    File(File),
    /// Zeroes, as many as this file has bytes.
    BlankOf(File),
    /// A network card's other end.
    Link(OwnedFd),
    /// A vsock's socket.
    Listener(Listener),
    /// The server of a folder.
    Folder(Server),
    /// Nothing.
    Nothing,
}

impl Backend {
    fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Host => Self::Host,
            Self::File(file) => Self::File(file.try_clone()?),
            Self::BlankOf(file) => Self::BlankOf(file.try_clone()?),
            Self::Link(link) => Self::Link(link.try_clone()?),
            Self::Listener(listener) => Self::Listener(listener.try_clone()?),
            Self::Folder(server) => {
                let [socket, messages] = server.descriptors()?;
                Self::Folder(Server::from_descriptors(socket.into(), messages))
            }
            Self::Nothing => Self::Nothing,
        })
    }

    fn into_blank(self) -> Self {
        match self {
            Self::File(file) => Self::BlankOf(file),
            other => other,
        }
    }

    /// Its file, and whether the device has only zeroes.
    pub(crate) fn into_file(self) -> Option<(File, bool)> {
        match self {
            Self::File(file) => Some((file, false)),
            Self::BlankOf(file) => Some((file, true)),
            _ => None,
        }
    }
}

/// What a machine needs of the host, open.
#[derive(Debug, Default)]
pub struct Resources {
    /// /dev/kvm; opened late where it is not here.
    pub(crate) kvm: Option<OwnedFd>,
    /// Kernel and initrd; opened late where they are not here.
    pub(crate) boot: Option<BootFiles>,
    /// The pre-booted kernel; opened late where it is not here.
    pub(crate) preboot: Option<File>,
    /// Behind the devices, in the order of their registers.
    pub(crate) backends: Vec<Backend>,
    /// Programs that were started for devices, and have to run before the guest does.
    pub(crate) starting: Vec<Starting>,
}

impl Resources {
    /// Opens what is behind the devices of a configuration, for a machine of another process.
    ///
    /// # Errors
    /// When the configuration is wrong, or something cannot be opened or started.
    pub fn of_devices(config: &Config) -> Result<Self, Error> {
        config.validate()?;
        Self::open(config, Behind::Everything)
    }

    /// Opens the rest: the kernel, the pre-booted kernel and KVM. A pre-booted kernel that cannot be opened is removed
    /// from the configuration, so that the guest boots; the result is why, unless it does not exist.
    ///
    /// # Errors
    /// When something else cannot be opened.
    pub fn open_rest(&mut self, config: &mut Config) -> Result<Option<PrebootError>, Error> {
        self.boot = Some(BootFiles::open(&config.boot_source)?);
        let opened = config.preboot.as_ref().map(|path| file::open(path)).transpose();
        let refusal = opened.map(|file| self.preboot = file).err();
        if self.preboot.is_none() {
            config.preboot = None;
        }
        self.kvm = Some(Hypervisor::open_descriptor()?);
        Ok(refusal.filter(|refusal| !refusal.is_absent()))
    }

    /// Another set of the same descriptors, without the pre-booted kernel and the started programs.
    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        let boot = self.boot.as_ref().map(BootFiles::try_clone).transpose()?;
        let kvm = self.kvm.as_ref().map(OwnedFd::try_clone).transpose()?;
        let backends = self.backends.iter().map(Backend::try_clone).collect::<io::Result<_>>()?;
        Ok(Self { kvm, boot, preboot: None, backends, starting: Vec::new() })
    }

    /// The same with zeroes for all files: a kernel that boots must read nothing of its disks that would be different for
    /// later guests.
    pub(crate) fn blank(mut self) -> Self {
        self.backends = self.backends.into_iter().map(Backend::into_blank).collect();
        self
    }

    /// Opens what is behind the devices of a configuration.
    pub(crate) fn open(config: &Config, behind: Behind) -> Result<Self, Error> {
        let mut this = Self::default();
        for device in config.devices.iter() {
            let backend = this.backend(&device, behind)?;
            this.backends.push(backend);
        }
        Ok(this)
    }

    fn backend(&mut self, device: &DeviceConfig<'_>, behind: Behind) -> Result<Backend, Error> {
        let is_blank = behind == Behind::Root;
        Ok(match device {
            // Whoever has the file meanwhile is not disturbed by zeroes.
            DeviceConfig::Drive(drive) if is_blank => {
                Backend::BlankOf(Block::open_file(drive, ForeignLock::Ignored)?)
            }
            DeviceConfig::Drive(drive) => Backend::File(Block::open_file(drive, ForeignLock::InUse)?),
            DeviceConfig::Root(drive) => Backend::File(Block::open_file(drive, ForeignLock::Ignored)?),
            DeviceConfig::Pmem(pmem) if is_blank => Backend::BlankOf(Pmem::open_file(pmem)?),
            DeviceConfig::Pmem(pmem) => Backend::File(Pmem::open_file(pmem)?),
            _ if is_blank => Backend::Nothing,
            DeviceConfig::Network(interface) => {
                let (link, starting) = Net::open_link(interface)?;
                self.starting.extend(starting);
                Backend::Link(link)
            }
            DeviceConfig::Vsock(vsock) => Backend::Listener(Listener::bind(&vsock.uds_path)?),
            DeviceConfig::Entropy(_) | DeviceConfig::Balloon(_) => Backend::Host,
            DeviceConfig::Folder(folder) => Backend::Folder(Server::start(folder)?),
        })
    }
}
