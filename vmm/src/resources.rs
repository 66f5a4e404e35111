//! The host resources of a machine, opened: files, sockets, helper processes, /dev/kvm. Nothing is opened by its path
//! afterwards, so that another process can run the machine with the descriptors alone.

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
use std::time::{Duration, Instant};

/// Which backends the devices of a configuration get.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Backing {
    /// Those that the configuration names.
    Configured,
    /// The image's root filesystem, zeroes instead of other files, and no other backend: pre-booting a kernel neither
    /// reads nor changes a user's disks and networks.
    Placeholder,
}

/// The host's side of a device.
#[derive(Debug)]
pub(crate) enum Backend {
    /// The host itself: its random number generator or its memory.
    Host,
    /// The file of a disk or of a pmem device.
    File(File),
    /// Zeroes instead of this file, of the same size.
    Placeholder(File),
    /// The host's end of a network card's link.
    Link(OwnedFd),
    /// The listening Unix socket of a vsock device.
    Listener(Listener),
    /// The server of a shared folder.
    Folder(Server),
    /// No backend: the device is a placeholder.
    Nothing,
}

impl Backend {
    fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Host => Self::Host,
            Self::File(file) => Self::File(file.try_clone()?),
            Self::Placeholder(file) => Self::Placeholder(file.try_clone()?),
            Self::Link(link) => Self::Link(link.try_clone()?),
            Self::Listener(listener) => Self::Listener(listener.try_clone()?),
            Self::Folder(server) => {
                let [socket, messages] = server.descriptors()?;
                Self::Folder(Server::from_descriptors(socket.into(), messages))
            }
            Self::Nothing => Self::Nothing,
        })
    }

    fn into_placeholder(self) -> Self {
        match self {
            Self::File(file) => Self::Placeholder(file),
            other => other,
        }
    }

    /// The file of the backend, if it has one, and whether the device shows zeroes instead of its contents.
    pub(crate) fn into_file(self) -> Option<(File, bool)> {
        match self {
            Self::File(file) => Some((file, false)),
            Self::Placeholder(file) => Some((file, true)),
            _ => None,
        }
    }
}

/// The host resources of a machine, opened.
#[derive(Debug, Default)]
pub struct Resources {
    /// /dev/kvm; if absent, the machine opens it.
    pub(crate) kvm: Option<OwnedFd>,
    /// Kernel and initrd; if absent, the machine opens them.
    pub(crate) boot: Option<BootFiles>,
    /// The file of the pre-booted kernel; if absent, the machine opens the one that its configuration names.
    pub(crate) preboot: Option<File>,
    /// Backends of the devices, in the order of the devices' registers.
    pub(crate) backends: Vec<Backend>,
    /// Processes that were started for devices, and have to be ready before the guest starts.
    pub(crate) starting: Vec<Starting>,
}

impl Resources {
    /// Opens the backends of a configuration's devices, for a machine in another process.
    ///
    /// # Errors
    /// When the configuration is invalid, or a backend cannot be opened or started.
    pub fn open_devices(config: &Config) -> Result<Self, Error> {
        config.validate()?;
        Self::open(config, Backing::Configured)
    }

    /// Opens the devices again for a second machine, after the first did not start. What was started for that one, such as
    /// a passt with published ports, may take a moment to end.
    ///
    /// # Errors
    /// Those of [`Self::open_devices`], if they last.
    pub fn reopen_devices(config: &Config) -> Result<Self, Error> {
        const INTERVAL: Duration = Duration::from_millis(10);
        let until = Instant::now() + Duration::from_secs(1);
        loop {
            match Self::open_devices(config) {
                Err(_) if Instant::now() < until => std::thread::sleep(INTERVAL),
                result => return result,
            }
        }
    }

    /// Opens the kernel, the initrd, the pre-booted kernel and /dev/kvm. A pre-booted kernel that cannot be opened is
    /// removed from the configuration, so that the guest boots; the reason is returned, unless the file does not exist.
    ///
    /// # Errors
    /// When the kernel, the initrd or /dev/kvm cannot be opened.
    pub fn open_boot_files(&mut self, config: &mut Config) -> Result<Option<PrebootError>, Error> {
        self.boot = Some(BootFiles::open(&config.boot_source)?);
        let opened = config.preboot.as_ref().map(|path| file::open(path)).transpose();
        let refusal = opened.map(|file| self.preboot = file).err();
        if self.preboot.is_none() {
            config.preboot = None;
        }
        self.kvm = Some(Hypervisor::open_descriptor()?);
        Ok(refusal.filter(|refusal| !refusal.is_not_found()))
    }

    /// Duplicates the descriptors, except for the pre-booted kernel's; the started processes are not included either.
    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        let boot = self.boot.as_ref().map(BootFiles::try_clone).transpose()?;
        let kvm = self.kvm.as_ref().map(OwnedFd::try_clone).transpose()?;
        let backends = self.backends.iter().map(Backend::try_clone).collect::<io::Result<_>>()?;
        Ok(Self { kvm, boot, preboot: None, backends, starting: Vec::new() })
    }

    /// Replaces the files of all devices by zeroes: a kernel that is pre-booted must not read disk contents that are
    /// different in later guests.
    pub(crate) fn into_placeholders(mut self) -> Self {
        self.backends = self.backends.into_iter().map(Backend::into_placeholder).collect();
        self
    }

    /// Opens the backends of a configuration's devices.
    pub(crate) fn open(config: &Config, backing: Backing) -> Result<Self, Error> {
        let mut this = Self::default();
        for device in config.devices.iter() {
            let backend = this.backend(&device, backing)?;
            this.backends.push(backend);
        }
        Ok(this)
    }

    fn backend(&mut self, device: &DeviceConfig<'_>, backing: Backing) -> Result<Backend, Error> {
        let is_placeholder = backing == Backing::Placeholder;
        Ok(match device {
            // The file's contents are not used, so that another process's lock on it does not matter.
            DeviceConfig::Drive(drive) if is_placeholder => {
                Backend::Placeholder(Block::open_file(drive, ForeignLock::Ignored)?)
            }
            DeviceConfig::Drive(drive) => Backend::File(Block::open_file(drive, ForeignLock::InUse)?),
            DeviceConfig::Root(drive) => Backend::File(Block::open_file(drive, ForeignLock::Ignored)?),
            DeviceConfig::Pmem(pmem) if is_placeholder => Backend::Placeholder(Pmem::open_file(pmem)?),
            DeviceConfig::Pmem(pmem) => Backend::File(Pmem::open_file(pmem)?),
            _ if is_placeholder => Backend::Nothing,
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
