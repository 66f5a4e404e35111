//! The virtio devices of a machine: from what the host has behind them to registers, doorbells and interrupts.

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

/// Devices with what is behind them, in the order of their registers, and what else of the host the machine needs.
#[derive(Debug, Default)]
pub(crate) struct Opened {
    devices: Vec<(String, Box<dyn Device>)>,
    /// Files that the guest has as memory, and where.
    files: Vec<PlacedFile>,
    /// Programs that were started for them, and have to run before the guest does.
    starting: Vec<net::Starting>,
    /// What the balloon is changed with while the guest runs.
    pub(crate) balloon: Option<balloon::Control>,
    /// Kernel and initrd, where they are open already.
    pub(crate) boot: Option<BootFiles>,
    /// /dev/kvm, where it is open already.
    pub(crate) kvm: Option<OwnedFd>,
}

impl Opened {
    /// Makes the devices of a configuration from what is behind each.
    pub(crate) fn new(config: &Config, resources: Resources) -> Result<Self, Error> {
        let Resources { kvm, boot, backends, starting, .. } = resources;
        let mut opened = Self { kvm, boot, starting, ..Self::default() };
        let mut next = layout::above_ram(config.machine.mem_size_mib * layout::MIB);
        for (config, backend) in config.devices.iter().zip(backends) {
            let name = config.name().to_owned();
            let host = |what| Error::host(what);
            match (config, backend) {
                (DeviceConfig::Drive(drive), backend) => opened.add(name, disk(drive, backend)?),
                (DeviceConfig::Root(drive), backend) => opened.add(name, disk(&drive, backend)?),
                (DeviceConfig::Network(card), Backend::Link(link)) => {
                    opened.add(name, Net::with_link(card, link));
                }
                (DeviceConfig::Network(card), _) => {
                    opened.add(name, Net::placeholder(card).map_err(host("make a blank network card"))?);
                }
                (DeviceConfig::Vsock(vsock), Backend::Listener(listener)) => {
                    opened.add(name, Vsock::with(vsock, listener));
                }
                (DeviceConfig::Vsock(vsock), _) => {
                    opened.add(name, Vsock::placeholder(vsock).map_err(host("make a socket"))?);
                }
                (DeviceConfig::Entropy(entropy), Backend::Host) => opened.add(name, Entropy::new(entropy)),
                (DeviceConfig::Entropy(entropy), _) => opened.add(name, Entropy::new(entropy).placeholder()),
                (DeviceConfig::Balloon(balloon), backend) => {
                    let device = Balloon::new(balloon).map_err(host("make an eventfd"))?;
                    opened.balloon = Some(device.control());
                    let is_blank = !matches!(backend, Backend::Host);
                    opened.add(name, if is_blank { device.placeholder() } else { device });
                }
                (DeviceConfig::Pmem(pmem), backend) => {
                    let (file, is_blank) = backend.into_file().ok_or_else(nothing_behind)?;
                    let mut device = Pmem::new(pmem, file, next)?;
                    if is_blank {
                        device = device.placeholder().map_err(host("make blank memory"))?;
                    }
                    let (start, file) = device.memory();
                    next = layout::next_section(start, file.size());
                    opened.files.push((start, file));
                    opened.add(name, device);
                }
                (DeviceConfig::Folder(folder), Backend::Folder(server)) => {
                    opened.add(name, SharedFolder::with(&folder.tag, Some(server)));
                }
                (DeviceConfig::Folder(folder), _) => opened.add(name, SharedFolder::with(&folder.tag, None)),
            }
        }
        Ok(opened)
    }

    fn add(&mut self, name: String, device: impl Device + 'static) {
        self.devices.push((name, Box::new(device)));
    }

    /// Interrupt lines that lead to a device: the serial port's, and theirs.
    pub(crate) fn lines(&self) -> Vec<Gsi> {
        let virtio = (0..self.devices.len()).map(|number| layout::virtio_device(number).1);
        [layout::SERIAL_GSI].into_iter().chain(virtio).collect()
    }

    /// How many there are.
    pub(crate) const fn count(&self) -> usize {
        self.devices.len()
    }

    /// What drivers take for granted of them.
    pub(crate) fn identities(&self) -> impl Iterator<Item = DeviceIdentity> {
        self.devices.iter().map(|(_, device)| Transport::identity(device.as_ref()))
    }

    /// Connects them to the machine. They go on from where others were left, if there are states.
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
        show(vm, &pages, &memory)?;
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
                // The addresses of a queue matter when it becomes ready.
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
    let (file, is_blank) = backend.into_file().ok_or_else(nothing_behind)?;
    let device = Block::new(drive, file)?;
    if is_blank { device.placeholder().map_err(Error::host("make a blank disk")) } else { Ok(device) }
}

fn nothing_behind() -> Error {
    Error::host("give a device its file")(io::ErrorKind::NotFound.into())
}

#[expect(unsafe_code, reason = "gives registers and files to KVM")]
fn show(vm: &Vm, pages: &RegisterPages, memory: &GuestMemory) -> Result<(), KvmError> {
    // SAFETY: each transport holds the pages and the memory with its files, and the machine drops its transports
    // after its vCPUs. The layout puts files behind RAM and each other.
    unsafe {
        vm.map_registers(pages)?;
        vm.map_files(memory)
    }
}
