//! The host resources of a machine, opened: files, sockets, helper processes, /dev/kvm. Nothing is opened by its path
//! afterwards, so that another process can run the machine with the descriptors alone.

use crate::boot::BootFiles;
use crate::config::Config;
use crate::config::devices::DeviceConfig;
use crate::devices::virtio::backend::{Attach, Backend};
use crate::devices::virtio::net::starting::Starting;
use crate::devices::virtio::{BackendError, table};
use crate::error::Error;
use crate::kvm::Hypervisor;
use crate::preboot::error::PrebootError;
use crate::preboot::file;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

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
}

impl Resources {
    /// Opens the backends of a configuration's devices, for a machine in another process.
    ///
    /// # Errors
    /// When the configuration is invalid, or a backend cannot be opened or started.
    pub fn open_devices(config: &Config) -> Result<Self, Error> {
        config.validate()?;
        Self::open(config)
    }

    /// Opens the devices again for a second machine, after the first did not start. Retries for a second, because helper
    /// processes of the first machine, such as a passt with published ports, may still be exiting.
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

    /// Opens the kernel, the initrd, the pre-booted kernel and /dev/kvm, or only the snapshot and /dev/kvm. A pre-booted kernel that cannot be opened is
    /// removed from the configuration, so that the guest boots; the reason is returned, unless the file does not exist.
    ///
    /// # Errors
    /// When the kernel, the initrd, the snapshot or /dev/kvm cannot be opened.
    pub fn open_boot_files(&mut self, config: &mut Config) -> Result<Option<PrebootError>, Error> {
        if let Some(path) = &config.snapshot {
            self.preboot = Some(file::open(path)?);
            self.kvm = Some(Hypervisor::open_descriptor()?);
            return Ok(None);
        }
        self.boot = Some(BootFiles::open(&config.boot_source)?);
        let opened = config.preboot.as_ref().map(|path| file::open(path)).transpose();
        let refusal = opened.map(|file| self.preboot = file).err();
        if self.preboot.is_none() {
            config.preboot = None;
        }
        self.kvm = Some(Hypervisor::open_descriptor()?);
        Ok(refusal.filter(|refusal| !refusal.is_not_found()))
    }

    /// Waits for processes that were started for devices.
    ///
    /// # Errors
    /// When one has failed.
    pub fn wait_for_processes(&mut self) -> Result<(), Error> {
        let mut starting = self.backends.iter_mut().filter_map(Backend::take_starting);
        Ok(starting.try_for_each(Starting::wait)?)
    }

    /// The files of the program, the kernel, the initrd and the pre-booted kernel, duplicated.
    pub(crate) fn files(&self) -> io::Result<Vec<File>> {
        let boot = self.boot.as_ref();
        let kernel = boot.map(|boot| &boot.kernel).into_iter();
        let files = kernel.chain(boot.and_then(|boot| boot.initrd.as_ref())).chain(&self.preboot);
        let program = std::iter::once_with(|| File::open("/proc/self/exe"));
        program.chain(files.map(File::try_clone)).collect()
    }

    /// Duplicates the descriptors, except for the pre-booted kernel's.
    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        let boot = self.boot.as_ref().map(BootFiles::try_clone).transpose()?;
        let kvm = self.kvm.as_ref().map(OwnedFd::try_clone).transpose()?;
        let backends = self.backends.iter().map(Backend::try_clone).collect::<io::Result<_>>()?;
        Ok(Self { kvm, boot, preboot: None, backends })
    }

    /// Duplicates the descriptors for trial guests, which share the disks of a guest, and have no other backend.
    pub(crate) fn for_trials(&self) -> io::Result<Self> {
        let mut copy = self.try_clone()?;
        for backend in &mut copy.backends {
            if matches!(backend, Backend::Link(..) | Backend::Listener(_) | Backend::Folder(_)) {
                *backend = Backend::Nothing;
            }
        }
        Ok(copy)
    }

    /// Replaces the files of all devices by zeroes: a kernel that is pre-booted must not read disk contents that are
    /// different in later guests.
    pub(crate) fn into_placeholders(mut self) -> Self {
        self.backends = self.backends.into_iter().map(Backend::into_placeholder).collect();
        self
    }

    /// Opens the backends that a configuration names for its devices.
    pub(crate) fn open(config: &Config) -> Result<Self, Error> {
        Self::with_backends(config, |device| table::kind(device).open())
    }

    /// Opens backends with which a kernel is pre-booted: an empty root filesystem, zeroes instead of other files, and no other
    /// backend.
    pub(crate) fn open_placeholders(config: &Config) -> Result<Self, Error> {
        Self::with_backends(config, |device| table::kind(device).open_placeholder())
    }

    /// Opens backends for a spare machine: placeholders, except for the root filesystem of a snapshot, which its guest has mounted.
    pub(crate) fn open_for_spare(config: &Config) -> Result<Self, Error> {
        let is_snapshot = config.snapshot.is_some();
        Self::with_backends(config, |device| match device {
            DeviceConfig::RootFilesystem(root) if is_snapshot => root.open(),
            other => table::kind(other).open_placeholder(),
        })
    }

    fn with_backends(
        config: &Config,
        open: impl Fn(DeviceConfig<'_>) -> Result<Backend, BackendError>,
    ) -> Result<Self, Error> {
        let backends = config.devices.iter().map(open);
        Ok(Self { backends: backends.collect::<Result<_, _>>()?, ..Self::default() })
    }
}
