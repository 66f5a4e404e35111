//! The virtio devices of a machine: from the files and sockets of a configuration to registers, doorbells and
//! interrupts.

use crate::bus::MemoryBus;
use crate::config::{Config, ConfigError};
use crate::devices::virtio::balloon::{self, Balloon};
use crate::devices::virtio::block::Block;
use crate::devices::virtio::entropy::Entropy;
use crate::devices::virtio::fs::SharedFolder;
use crate::devices::virtio::net::{self, Net};
use crate::devices::virtio::pmem::Pmem;
use crate::devices::virtio::vsock::Vsock;
use crate::devices::virtio::{
    Device, QUEUE_ADDRESSES, QUEUE_ADDRESSES_LEN, RegisterPages, Shape, State, Transport, Wiring,
};
use crate::kvm::{KvmError, Vm};
use crate::layout::{self, Gsi};
use crate::machine::Error;
use crate::memory::{GuestMemory, PlacedFile};
use std::sync::{Arc, Mutex};
use vm_memory::GuestAddress;

/// Devices whose files are open, in the order of their registers.
#[derive(Debug, Default)]
pub(crate) struct Opened {
    devices: Vec<(String, Box<dyn Device>)>,
    /// Files that the guest has as memory, and where.
    files: Vec<PlacedFile>,
    /// Programs that were started for them, and have to run before the guest does.
    starting: Vec<net::Starting>,
    /// What the balloon is changed with while the guest runs.
    pub(crate) balloon: Option<balloon::Control>,
}

/// What is behind devices that are opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Behind {
    /// What the configuration names.
    Everything,
    /// The image's root filesystem.
    Root,
    Nothing,
}

impl Opened {
    /// Opens what the devices of a configuration need.
    pub(crate) fn new(config: &Config) -> Result<Self, Error> {
        Self::open(config, Behind::Everything)
    }

    /// The same with nothing behind them: what a kernel reads of its devices while it boots, it would believe of all
    /// others.
    pub(crate) fn blank(config: &Config) -> Result<Self, Error> {
        Self::open(config, Behind::Nothing)
    }

    /// The same with the image's root filesystem, for a guest that tries a kernel out: nobody's disks and networks are
    /// to notice.
    pub(crate) fn trial(config: &Config) -> Result<Self, Error> {
        Self::open(config, Behind::Root)
    }

    fn open(config: &Config, behind: Behind) -> Result<Self, Error> {
        let devices = &config.devices;
        let mut opened = Self::default();
        let is_blank = behind != Behind::Everything;
        for (number, drive) in devices.disks().enumerate() {
            // The root filesystem comes behind the drives.
            let is_root = number == devices.drives.len();
            let mut device = if is_root { Block::open_root(&drive)? } else { Block::open(&drive)? };
            if is_blank && !(is_root && behind == Behind::Root) {
                device = device.blank().map_err(Error::host("make a blank disk"))?;
            }
            opened.add(&drive.drive_id, device);
        }
        for interface in &devices.network_interfaces {
            let device = if is_blank {
                Net::blank(interface).map_err(Error::host("make a blank network card"))?
            } else {
                let (device, starting) = Net::open(interface)?;
                opened.starting.extend(starting);
                device
            };
            opened.add(&interface.iface_id, device);
        }
        if let Some(vsock) = &devices.vsock {
            let device = if is_blank {
                Vsock::blank(vsock).map_err(Error::host("make a socket"))?
            } else {
                Vsock::open(vsock)?
            };
            opened.add("vsock", device);
        }
        if let Some(entropy) = &devices.entropy {
            let device = Entropy::new(entropy);
            opened.add("entropy", if is_blank { device.blank() } else { device });
        }
        if let Some(balloon) = &devices.balloon {
            let device = Balloon::new(balloon).map_err(Error::host("make an eventfd"))?;
            opened.balloon = Some(device.control());
            opened.add("balloon", if is_blank { device.blank() } else { device });
        }
        let mut next = layout::behind_ram(config.machine.mem_size_mib * layout::MIB);
        for pmem in &devices.pmem {
            let mut device = Pmem::open(pmem, next)?;
            if is_blank {
                device = device.blank().map_err(Error::host("make blank memory"))?;
            }
            let (start, file) = device.memory();
            next = layout::behind(start, file.size());
            opened.files.push((start, file));
            opened.add(&pmem.id, device);
        }
        for folder in &devices.shared_folders {
            let device = if is_blank { SharedFolder::blank(folder) } else { SharedFolder::open(folder)? };
            opened.add(&folder.tag, device);
        }
        Ok(opened)
    }

    fn add(&mut self, name: &str, device: impl Device + 'static) {
        self.devices.push((name.to_owned(), Box::new(device)));
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
    pub(crate) fn shapes(&self) -> impl Iterator<Item = Shape> {
        self.devices.iter().map(|(_, device)| Transport::shape(device.as_ref()))
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
                doorbell: vm.doorbell(start, device.serves_at_once())?,
                memory: memory.clone(),
            };
            let mut transport = Transport::new(device, name, wiring);
            if let Some(state) = states.get(number) {
                transport.restore(state);
            } else {
                // The addresses of a queue matter when it becomes ready.
                vm.collect_writes(GuestAddress(start.0 + QUEUE_ADDRESSES), QUEUE_ADDRESSES_LEN);
            }
            let transport = Arc::new(Mutex::new(transport));
            bus.claim(start.0..=start.0 + layout::PAGE_SIZE - 1, transport.clone());
            connected.push(transport);
        }
        Ok(connected)
    }
}

#[expect(unsafe_code, reason = "gives registers and files to KVM")]
fn show(vm: &Vm, pages: &RegisterPages, memory: &GuestMemory) -> Result<(), KvmError> {
    // SAFETY: each transport holds the pages and the memory with its files, and the machine drops its transports
    // after its vCPUs. The layout puts files behind RAM and each other.
    unsafe {
        vm.show_registers(pages)?;
        vm.show_files(memory)
    }
}
