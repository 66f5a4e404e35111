//! The virtio devices of a machine: built from their backends, and connected to registers, doorbells and interrupts.

use crate::boot::BootFiles;
use crate::bus::MemoryBus;
use crate::config::devices::{DeviceConfig, Drive};
use crate::config::{Config, ConfigError};
use crate::devices::virtio::balloon::{self, Balloon};
use crate::devices::virtio::block::Block;
use crate::devices::virtio::entropy::Entropy;
use crate::devices::virtio::fs::SharedFolder;
use crate::devices::virtio::net::{self, Net};
use crate::devices::virtio::pmem::Pmem;
use crate::devices::virtio::vsock::Vsock;
use crate::devices::virtio::{
    Device, DeviceIdentity, QUEUE_ADDRESSES, QUEUE_ADDRESSES_LEN, RegisterPages, State, Transport, Wiring,
};
use crate::error::Error;
use crate::kvm::{KvmError, Vm};
use crate::layout::{self, Gsi};
use crate::memory::{GuestMemory, PlacedFile};
use crate::resources::{Backend, Resources};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use vm_memory::GuestAddress;

/// Devices with their backends, not connected to a machine yet, and the other host resources of the machine.
#[derive(Debug, Default)]
pub(crate) struct DeviceSet {
    /// Names and devices, in the order of the devices' registers.
    devices: Vec<(String, Box<dyn Device>)>,
    /// Files that are guest memory, and their guest-physical addresses.
    files: Vec<PlacedFile>,
    /// Processes that were started for network cards, and have to be ready before the guest starts.
    starting: Vec<net::Starting>,
    /// Changes the balloon's size while the guest runs.
    pub(crate) balloon: Option<balloon::Control>,
    /// Kernel and initrd, if they are open already.
    pub(crate) boot: Option<BootFiles>,
    /// /dev/kvm, if it is open already.
    pub(crate) kvm: Option<OwnedFd>,
}

impl DeviceSet {
    /// Builds the devices of a configuration with their backends.
    pub(crate) fn new(config: &Config, resources: Resources) -> Result<Self, Error> {
        let Resources { kvm, boot, backends, starting, .. } = resources;
        let mut device_set = Self { kvm, boot, starting, ..Self::default() };
        let mut next = layout::above_ram(config.machine.mem_size_mib * layout::MIB);
        for (config, backend) in config.devices.iter().zip(backends) {
            let name = config.name().to_owned();
            let host = |what| Error::host(what);
            match (config, backend) {
                (DeviceConfig::Drive(drive), backend) => device_set.add(name, disk(drive, backend)?),
                (DeviceConfig::Root(drive), backend) => device_set.add(name, disk(&drive, backend)?),
                (DeviceConfig::Network(card), Backend::Link(link)) => {
                    device_set.add(name, Net::with_link(card, link));
                }
                (DeviceConfig::Network(card), _) => {
                    device_set.add(
                        name,
                        Net::placeholder(card).map_err(host("create a placeholder network card"))?,
                    );
                }
                (DeviceConfig::Vsock(vsock), Backend::Listener(listener)) => {
                    device_set.add(name, Vsock::with(vsock, listener));
                }
                (DeviceConfig::Vsock(vsock), _) => {
                    device_set.add(name, Vsock::placeholder(vsock).map_err(host("create a socket"))?);
                }
                (DeviceConfig::Entropy(entropy), Backend::Host) => {
                    device_set.add(name, Entropy::new(entropy))
                }
                (DeviceConfig::Entropy(entropy), _) => {
                    device_set.add(name, Entropy::new(entropy).placeholder())
                }
                (DeviceConfig::Balloon(balloon), backend) => {
                    let device = Balloon::new(balloon).map_err(host("create an eventfd"))?;
                    device_set.balloon = Some(device.control());
                    let is_placeholder = !matches!(backend, Backend::Host);
                    device_set.add(name, if is_placeholder { device.placeholder() } else { device });
                }
                (DeviceConfig::Pmem(pmem), backend) => {
                    let (file, is_placeholder) = backend.into_file().ok_or_else(missing_file)?;
                    let mut device = Pmem::new(pmem, file, next)?;
                    if is_placeholder {
                        device = device.placeholder().map_err(host("create a placeholder pmem device"))?;
                    }
                    let (start, file) = device.memory();
                    next = layout::next_section(start, file.size());
                    device_set.files.push((start, file));
                    device_set.add(name, device);
                }
                (DeviceConfig::Folder(folder), Backend::Folder(server)) => {
                    device_set.add(name, SharedFolder::with(&folder.tag, Some(server)));
                }
                (DeviceConfig::Folder(folder), _) => {
                    device_set.add(name, SharedFolder::with(&folder.tag, None))
                }
            }
        }
        Ok(device_set)
    }

    fn add(&mut self, name: String, device: impl Device + 'static) {
        self.devices.push((name, Box::new(device)));
    }

    /// The interrupt lines in use: the serial port's and the virtio devices'.
    pub(crate) fn lines(&self) -> Vec<Gsi> {
        let virtio = (0..self.devices.len()).map(|number| layout::virtio_device(number).1);
        [layout::SERIAL_GSI].into_iter().chain(virtio).collect()
    }

    /// The number of virtio devices.
    pub(crate) const fn count(&self) -> usize {
        self.devices.len()
    }

    /// The properties of the devices that a driver reads once and relies on afterwards.
    pub(crate) fn identities(&self) -> impl Iterator<Item = DeviceIdentity> {
        self.devices.iter().map(|(_, device)| Transport::identity(device.as_ref()))
    }

    /// Connects the devices to a machine, and restores their states, if there are any: those of the devices of a
    /// pre-booted kernel.
    pub(crate) fn connect(
        self,
        vm: &Vm,
        memory: &GuestMemory,
        bus: &mut MemoryBus,
        states: &[State],
    ) -> Result<Vec<Arc<Mutex<Transport>>>, Error> {
        if self.devices.is_empty() {
            return Ok(Vec::new());
        }
        for starting in self.starting {
            let wrong = |what| ConfigError::InterfaceDevice { name: "user".into(), what };
            starting.wait().map_err(wrong)?;
        }
        let pages =
            RegisterPages::new(self.devices.len()).map_err(Error::host("map the registers of devices"))?;
        let memory = memory.with_files(self.files);
        map_into_guest(vm, &pages, &memory)?;
        let mut connected = Vec::new();
        for (number, (name, device)) in self.devices.into_iter().enumerate() {
            let (start, line) = layout::virtio_device(number);
            let wiring = Wiring {
                registers: pages.page(number),
                interrupt: vm.interrupt(line)?,
                doorbell: vm.doorbell(start, device.serves_inline())?,
                memory: memory.clone(),
            };
            let mut transport = Transport::new(device, name, wiring);
            if let Some(state) = states.get(number) {
                transport.restore(state);
            } else {
                // The device uses the addresses of a queue only once the driver marks the queue as ready.
                vm.coalesce_writes(GuestAddress(start.0 + QUEUE_ADDRESSES), QUEUE_ADDRESSES_LEN);
            }
            let transport = Arc::new(Mutex::new(transport));
            bus.claim(start.0..=start.0 + layout::PAGE_SIZE - 1, transport.clone());
            connected.push(transport);
        }
        Ok(connected)
    }
}

fn disk(drive: &Drive, backend: Backend) -> Result<Block, Error> {
    let (file, is_placeholder) = backend.into_file().ok_or_else(missing_file)?;
    let device = Block::new(drive, file)?;
    if is_placeholder {
        device.placeholder().map_err(Error::host("create a placeholder disk"))
    } else {
        Ok(device)
    }
}

fn missing_file() -> Error {
    Error::host("find the file of a device")(io::ErrorKind::NotFound.into())
}

#[expect(unsafe_code, reason = "gives registers and files to KVM")]
fn map_into_guest(vm: &Vm, pages: &RegisterPages, memory: &GuestMemory) -> Result<(), KvmError> {
    // SAFETY: each transport holds the pages and the memory with its files, and the machine drops its transports
    // after its vCPUs. The layout places the files above RAM, without overlap.
    unsafe {
        vm.map_registers(pages)?;
        vm.map_files(memory)
    }
}
