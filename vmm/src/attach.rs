//! The virtio devices of a machine: built from their backends, and connected to registers, doorbells and interrupts.

use crate::bus::{MemoryBus, lock};
use crate::config::Config;
use crate::devices::virtio::backend::Backend;
use crate::devices::virtio::net::starting::Starting;
use crate::devices::virtio::{
    Device, DeviceIdentity, QUEUE_ADDRESSES, QUEUE_ADDRESSES_LEN, RegisterPages, Transport, Wiring, balloon,
    table,
};
use crate::error::Error;
use crate::kvm::{KvmError, Vm};
use crate::layout::{self, Gsi};
use crate::memory::{GuestMemory, PlacedFile};
use crate::preboot::error::PrebootError;
use crate::preboot::state::State;
use std::sync::{Arc, Mutex};
use vm_memory::GuestAddress;

/// Devices with their backends, not connected to a machine yet.
#[derive(Debug, Default)]
pub(crate) struct DeviceSet {
    /// Names and devices, in the order of the devices' registers.
    devices: Vec<(String, Box<dyn Device>)>,
    /// Files that are guest memory, and their guest-physical addresses.
    files: Vec<PlacedFile>,
    /// Processes that were started for devices, and have to be ready before the guest starts.
    starting: Vec<Starting>,
    /// Changes the balloon's size while the guest runs.
    pub(crate) balloon: Option<balloon::Control>,
}

impl DeviceSet {
    /// Creates the devices of a configuration with their backends, which are in the same order.
    pub(crate) fn new(config: &Config, backends: Vec<Backend>) -> Result<Self, Error> {
        if backends.len() != config.devices.iter().count() {
            return Err(Error::host("find a backend for each device")(
                std::io::ErrorKind::InvalidInput.into(),
            ));
        }
        let mut set = Self::default();
        let mut next = layout::above_ram(config.machine.mem_size_mib * layout::MIB);
        for (config, mut backend) in config.devices.iter().zip(backends) {
            set.starting.extend(backend.take_starting());
            let device = table::kind(config).create(backend, next)?;
            if let Some((start, file)) = device.memory() {
                next = layout::next_section(start, file.size());
                set.files.push((start, file));
            }
            set.balloon = set.balloon.or_else(|| device.balloon());
            set.devices.push((config.name().to_owned(), device));
        }
        Ok(set)
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

    /// Puts the devices in the place of those of a spare machine, which are placeholders with equal properties.
    pub(crate) fn replace(
        self,
        placeholders: &[Arc<Mutex<Transport>>],
        memory: &GuestMemory,
    ) -> Result<(), Error> {
        self.starting.into_iter().try_for_each(Starting::wait)?;
        if self.devices.len() != placeholders.len() {
            return Err(PrebootError::OtherDevices.into());
        }
        for ((_, device), transport) in self.devices.into_iter().zip(placeholders) {
            lock(transport).replace(device).map_err(|_| PrebootError::OtherDevices)?;
        }
        memory.record_files(placeholders.iter().filter_map(|transport| lock(transport).memory()));
        Ok(())
    }

    /// Connects the devices to a machine, and restores their states, if it continues from a pre-booted kernel.
    pub(crate) fn connect(
        self,
        vm: &Vm,
        memory: &GuestMemory,
        bus: &mut MemoryBus,
        state: Option<&State>,
    ) -> Result<Vec<Arc<Mutex<Transport>>>, Error> {
        if self.devices.is_empty() {
            return Ok(Vec::new());
        }
        self.starting.into_iter().try_for_each(Starting::wait)?;
        let states = state.map_or(&[][..], |state| &state.virtio);
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

#[expect(unsafe_code, reason = "gives registers and files to KVM")]
fn map_into_guest(vm: &Vm, pages: &RegisterPages, memory: &GuestMemory) -> Result<(), KvmError> {
    // SAFETY: each transport holds the pages and the memory with its files, and the machine drops its transports
    // after its vCPUs. The layout places the files above RAM, without overlap.
    unsafe {
        vm.map_registers(pages)?;
        vm.map_files(memory)
    }
}
