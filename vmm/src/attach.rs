//! The virtio devices of a machine: from the files and sockets of a configuration to registers, doorbells and
//! interrupts.

use crate::bus::MemoryBus;
use crate::config::Devices;
use crate::devices::virtio::block::Block;
use crate::devices::virtio::vsock::Vsock;
use crate::devices::virtio::{Device, RegisterPages, Shape, State, Transport, Wiring};
use crate::kvm::{KvmError, Vm};
use crate::layout::{self, Gsi};
use crate::machine::Error;
use crate::memory::GuestMemory;
use std::sync::{Arc, Mutex};

/// Devices whose files are open, in the order of their registers.
#[derive(Debug, Default)]
pub(crate) struct Opened(Vec<(String, Box<dyn Device>)>);

impl Opened {
    /// Opens what the devices of a configuration need.
    pub(crate) fn new(config: &Devices) -> Result<Self, Error> {
        Self::open(config, Ok)
    }

    /// The same with nothing on the disks: what a kernel reads of them while it boots, it would believe of all others.
    pub(crate) fn blank(config: &Devices) -> Result<Self, Error> {
        Self::open(config, |block| block.blank().map_err(Error::host("make a blank disk")))
    }

    fn open(config: &Devices, prepare: impl Fn(Block) -> Result<Block, Error>) -> Result<Self, Error> {
        let mut opened = Self::default();
        for drive in &config.drives {
            opened.add(&drive.drive_id, prepare(Block::open(drive)?)?);
        }
        if let Some(vsock) = &config.vsock {
            opened.add("vsock", Vsock::open(vsock)?);
        }
        Ok(opened)
    }

    fn add(&mut self, name: &str, device: impl Device + 'static) {
        self.0.push((name.to_owned(), Box::new(device)));
    }

    /// Interrupt lines that lead to a device: the serial port's, and theirs.
    pub(crate) fn lines(&self) -> Vec<Gsi> {
        let virtio = (0..self.0.len()).map(|number| layout::virtio_device(number).1);
        [layout::SERIAL_GSI].into_iter().chain(virtio).collect()
    }

    /// How many there are.
    pub(crate) const fn count(&self) -> usize {
        self.0.len()
    }

    /// What drivers take for granted of them.
    pub(crate) fn shapes(&self) -> impl Iterator<Item = Shape> {
        self.0.iter().map(|(_, device)| Transport::shape(device.as_ref()))
    }

    /// Connects them to the machine. They go on from where others were left, if there are states.
    pub(crate) fn connect(
        self,
        vm: &Vm,
        memory: &GuestMemory,
        bus: &mut MemoryBus,
        states: &[State],
    ) -> Result<Vec<Arc<Mutex<Transport>>>, Error> {
        if self.0.is_empty() {
            return Ok(Vec::new());
        }
        let pages = RegisterPages::new(self.0.len()).map_err(Error::host("map the registers of devices"))?;
        show(vm, &pages)?;
        let mut connected = Vec::new();
        for (number, (name, device)) in self.0.into_iter().enumerate() {
            let (start, line) = layout::virtio_device(number);
            let wiring = Wiring {
                registers: pages.page(number),
                interrupt: vm.interrupt(line)?,
                doorbell: vm.doorbell(start)?,
                memory: memory.clone(),
            };
            let mut transport = Transport::new(device, name, wiring);
            if let Some(state) = states.get(number) {
                transport.restore(state);
            }
            let transport = Arc::new(Mutex::new(transport));
            bus.claim(start.0..=start.0 + layout::PAGE_SIZE - 1, transport.clone());
            connected.push(transport);
        }
        Ok(connected)
    }
}

#[expect(unsafe_code, reason = "gives the registers to KVM")]
fn show(vm: &Vm, pages: &RegisterPages) -> Result<(), KvmError> {
    // SAFETY: each transport holds the pages, and the machine drops its transports after its vCPUs.
    unsafe { vm.show_registers(pages) }
}
