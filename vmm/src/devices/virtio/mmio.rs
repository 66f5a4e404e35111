//! The transport: virtio over memory-mapped registers (section 4.2), version 2.
//!
//! What a driver reads stands in the device's [`RegisterPage`]. Here is what its writes do.

mod state;
#[cfg(test)]
mod tests;

pub use state::{InFlight, Shape, State};

use super::registers as register;
use super::registers::{RegisterPage, SHARED_MEMORY};
use super::{ACKNOWLEDGE_QUEUES, Broken, Device, Event, Left, Queues, Watcher, feature};
use crate::bus::{BusDevice, GuestRequest};
use crate::memory::GuestMemory;
use crate::timeline::Instant;
use serde::{Deserialize, Serialize};
use std::io;
use virtio_queue::QueueT;
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

/// "virt".
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "KDLG": the driver shows it and does nothing with it.
const VENDOR: u32 = 0x474c_444b;
/// A register that holds no value.
const NOTHING: u32 = 0;

/// Bits of the device status (section 2.1).
mod status {
    pub(super) const ACKNOWLEDGE: u32 = 1;
    pub(super) const DRIVER: u32 = 2;
    pub(super) const DRIVER_OK: u32 = 4;
    pub(super) const FEATURES_OK: u32 = 8;
    pub(super) const NEEDS_RESET: u32 = 64;
    pub(super) const FAILED: u32 = 128;
    /// All that a driver may set.
    pub(super) const ALL: u32 = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED;
}

/// The token of the doorbell among the events of a device.
const DOORBELL: u32 = u32::MAX;

/// The registers that a driver sets before the device works.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Registers {
    status: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
}

/// A device behind its registers.
#[derive(Debug)]
pub struct Transport {
    device: Box<dyn Device>,
    /// What it is called in messages.
    name: String,
    registers: RegisterPage,
    state: Registers,
    queues: Queues,
    watcher: Option<Watcher>,
    /// The driver has begun a reset, and the device still touches guest memory.
    is_resetting: bool,
    /// Why the device broke first.
    failure: Option<Broken>,
}

/// What a transport is connected to.
#[derive(Debug)]
pub struct Wiring {
    /// The device's registers.
    pub registers: RegisterPage,
    /// Written to raise the device's interrupt.
    pub interrupt: EventFd,
    /// Written when the driver has new chains: by KVM, or by the transport what a vCPU's thread has left.
    pub doorbell: EventFd,
    /// The guest's memory.
    pub memory: GuestMemory,
}

impl Transport {
    /// A device after a reset.
    #[must_use]
    pub fn new(device: Box<dyn Device>, name: String, wiring: Wiring) -> Self {
        let Wiring { registers, interrupt, doorbell, memory } = wiring;
        let queues = Queues::new(device.queue_sizes(), memory, registers.clone(), interrupt, doorbell);
        let this = Self {
            device,
            name,
            registers,
            state: Registers::default(),
            queues,
            watcher: None,
            is_resetting: false,
            failure: None,
        };
        this.show_identity();
        this.show_selected();
        this
    }

    /// Connects the device to the event loop.
    ///
    /// # Errors
    /// When the host has no memory left.
    pub fn watch(&mut self, watcher: Watcher) -> io::Result<()> {
        let doorbell = crate::poll::borrow(self.queues.doorbell());
        watcher.add(doorbell, DOORBELL, rustix::event::epoll::EventFlags::IN)?;
        self.watcher = Some(watcher);
        // A device that was restored goes on.
        if self.is_working()
            && let Err(reason) = self.activate()
        {
            self.fail(reason);
        }
        Ok(())
    }

    /// An event of the loop, by its token.
    pub fn serve(&mut self, token: u32, flags: rustix::event::epoll::EventFlags) {
        let event = if token == DOORBELL {
            // The counter only has to be reset.
            let _ = self.queues.doorbell().read();
            Event::Doorbell
        } else {
            Event::Ready(token, flags)
        };
        self.pass(event);
    }

    /// The moment of [`Self::deadline`] has come.
    pub fn serve_deadline(&mut self) {
        self.pass(Event::Deadline);
    }

    /// The machine has ended.
    pub fn end(&mut self) {
        self.device.end();
    }

    /// When the device wants to be called at the latest.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.is_working().then(|| self.device.deadline()).flatten()
    }

    /// What the driver did wrong, or else what failed on the host's side, if anything did.
    #[must_use]
    pub fn failure(&self) -> Option<String> {
        let of_driver = self.failure.as_ref().map(|reason| {
            format!("a device stopped because its driver broke a rule of virtio: {}: {reason}", self.name)
        });
        of_driver.or_else(|| Some(format!("{}: {}", self.name, self.device.failure()?)))
    }

    fn pass(&mut self, event: Event) {
        if !self.is_working() {
            // Nobody waits for the answer, but the event would come again and again.
            self.device.is_at_rest();
        } else if let Err(reason) = self.device.serve(event, &mut self.queues) {
            self.fail(reason);
        }
    }

    /// The driver has new chains, and its vCPU waits until this returns.
    fn ring(&mut self) {
        // KVM passes the doorbell of other devices on by itself, and without KVM somebody has to.
        if !self.device.serves_at_once() {
            self.queues.yield_turn();
        } else if self.is_working() {
            match self.device.serve_at_once(&mut self.queues) {
                Ok(Left::Nothing) => {}
                Ok(Left::Something) => self.queues.yield_turn(),
                Err(reason) => self.fail(reason),
            }
        }
    }

    const fn is_working(&self) -> bool {
        self.state.status & (status::DRIVER_OK | status::NEEDS_RESET) == status::DRIVER_OK
    }

    fn fail(&mut self, reason: Broken) {
        self.device.reset();
        self.set_status(self.state.status | status::NEEDS_RESET);
        self.queues.interrupt_for_configuration();
        self.failure.get_or_insert(reason);
    }

    fn set_status(&mut self, status: u32) {
        self.state.status = status;
        self.registers.set(register::STATUS, status);
    }

    /// Registers that do not change while the device is what it is.
    fn show_identity(&self) {
        self.registers.set(register::MAGIC, MAGIC);
        self.registers.set(register::VERSION, VERSION);
        self.registers.set(register::DEVICE_ID, self.device.kind());
        self.registers.set(register::VENDOR_ID, VENDOR);
        for offset in SHARED_MEMORY.step_by(4) {
            self.registers.set(offset, u32::MAX);
        }
        self.registers.set_configuration(&self.device.configuration());
    }

    /// Registers whose value depends on a selection.
    fn show_selected(&self) {
        self.registers
            .set(register::DEVICE_FEATURES, half(self.offered(), self.state.device_features_select));
        let queue = self.selected_queue().and_then(|queue| self.queues.queues.get(queue));
        let size = queue.map_or(NOTHING, |queue| queue.max_size().into());
        self.registers.set(register::QUEUE_SIZE_MAX, size);
        self.registers.set(register::QUEUE_READY, queue.is_some_and(QueueT::ready).into());
    }

    fn offered(&self) -> u64 {
        self.device.features() | feature::VERSION_1 | feature::EVENT_IDX | feature::INDIRECT_DESC
    }

    fn selected_queue(&self) -> Option<usize> {
        usize::try_from(self.state.queue_select).ok().filter(|&queue| queue < self.queues.queues.len())
    }

    /// The register at an offset is written.
    fn write_register(&mut self, offset: usize, value: u32) {
        let state = &mut self.state;
        match offset {
            register::DEVICE_FEATURES_SELECT => state.device_features_select = value,
            register::DRIVER_FEATURES_SELECT => state.driver_features_select = value,
            register::DRIVER_FEATURES => self.accept_features(value),
            register::QUEUE_SELECT => state.queue_select = value,
            register::STATUS => self.write_status(value),
            register::ACKNOWLEDGE_OFFSET => {
                if value & register::CONFIGURATION_CHANGED != 0 && self.state.status != 0 {
                    self.registers.set(register::INTERRUPT_STATUS, ACKNOWLEDGE_QUEUES);
                }
            }
            register::DOORBELL_OFFSET => {
                self.ring();
                // Nothing that a selection shows has changed.
                return;
            }
            _ => self.write_queue(offset, value),
        }
        self.show_selected();
    }

    /// Features can be chosen until the driver says that it has done so.
    fn accept_features(&mut self, value: u32) {
        if self.state.status & status::FEATURES_OK != 0 {
            return;
        }
        let value = u64::from(value);
        match self.state.driver_features_select {
            0 => self.state.driver_features = self.state.driver_features & !0xffff_ffff | value,
            1 => self.state.driver_features = self.state.driver_features & 0xffff_ffff | value << 32,
            _ => {}
        }
    }

    /// A queue can be set up while the driver has chosen its features and is not ready yet.
    fn write_queue(&mut self, offset: usize, value: u32) {
        let stage = status::FEATURES_OK | status::DRIVER_OK | status::NEEDS_RESET;
        if self.state.status & stage != status::FEATURES_OK {
            return;
        }
        let Some(queue) = self.selected_queue() else { return };
        let queue = &mut self.queues.queues[queue];
        if offset == register::QUEUE_READY {
            queue.set_ready(value == 1);
        }
        if queue.ready() {
            return;
        }
        // What is out of range or not aligned is refused by the queue, which keeps what it had.
        match offset {
            register::QUEUE_SIZE => {
                let _ = u16::try_from(value).map(|size| queue.try_set_size(size));
            }
            _ if offset & !4 == register::QUEUE_DESCRIPTORS => {
                let _ = queue.try_set_desc_table_address(joined(queue.desc_table(), offset, value));
            }
            _ if offset & !4 == register::QUEUE_DRIVER => {
                let _ = queue.try_set_avail_ring_address(joined(queue.avail_ring(), offset, value));
            }
            _ if offset & !4 == register::QUEUE_DEVICE => {
                let _ = queue.try_set_used_ring_address(joined(queue.used_ring(), offset, value));
            }
            _ => {}
        }
    }

    fn write_status(&mut self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        let old = self.state.status;
        // A driver sets bits one after the other and takes none back but by a reset.
        let mut new = old | value & status::ALL;
        let risen = new & !old;
        if risen & status::FEATURES_OK != 0 && !self.features_fit() {
            new &= !status::FEATURES_OK;
        }
        if risen & status::DRIVER_OK != 0 && new & status::FEATURES_OK == 0 {
            new &= !status::DRIVER_OK;
        }
        self.set_status(new);
        // What was broken before it was ready stays broken.
        if new & !old & status::DRIVER_OK != 0
            && self.is_working()
            && let Err(reason) = self.activate()
        {
            self.fail(reason);
        }
    }

    fn features_fit(&self) -> bool {
        let chosen = self.state.driver_features;
        chosen & !self.offered() == 0 && chosen & feature::VERSION_1 != 0
    }

    fn activate(&mut self) -> Result<(), Broken> {
        let features = self.state.driver_features;
        self.queues.activate(features & feature::EVENT_IDX != 0)?;
        // Used chains are the only reason for an interrupt but for changes of the configuration.
        let status = self.registers.get(register::INTERRUPT_STATUS);
        self.registers.set(register::INTERRUPT_STATUS, status | ACKNOWLEDGE_QUEUES);
        let Some(watcher) = &self.watcher else {
            return Err(Broken::because("the machine does not run yet"));
        };
        self.device.activate(features, &mut self.queues, watcher)?;
        // Chains may have come before the driver said that it is ready.
        self.queues.yield_turn();
        Ok(())
    }

    /// Linux takes a device to be reset when its write is done (`vm_reset` in drivers/virtio/virtio_mmio.c), so that the
    /// write waits for a device that still touches the driver's memory. Nobody waits with it: not for the device's
    /// lock either.
    fn reset(&mut self) {
        self.device.reset();
        self.queues.reset();
        self.state = Registers::default();
        self.is_resetting = !self.device.is_at_rest();
        if self.is_resetting {
            return;
        }
        self.registers.set(register::INTERRUPT_STATUS, 0);
        self.set_status(0);
        self.registers.set_configuration(&self.device.configuration());
    }

    /// Chains that the device was given and has not given back.
    #[cfg(any(test, fuzzing))]
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.queues.in_flight()
    }
}

/// Half of a register of 64 bits, which a driver selects: 0 is the lower, 1 the upper, and there are no more.
const fn half(value: u64, select: u32) -> u32 {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    match select {
        0 => u32::from_le_bytes([a, b, c, d]),
        1 => u32::from_le_bytes([e, f, g, h]),
        _ => 0,
    }
}

/// An address of which one half is written: the upper one has the offset four bytes on.
fn joined(address: u64, offset: usize, value: u32) -> GuestAddress {
    let value = u64::from(value);
    GuestAddress(if offset & 4 == 0 {
        address & !0xffff_ffff | value
    } else {
        address & 0xffff_ffff | value << 32
    })
}

impl BusDevice for Transport {
    fn read(&mut self, offset: u16, data: &mut [u8]) {
        // The guest reads the page itself, unless KVM cannot map what must not be written.
        self.registers.read(offset.into(), data);
    }

    fn write(&mut self, offset: u16, data: &[u8]) -> Option<GuestRequest> {
        let offset = usize::from(offset);
        // While a reset waits, the device still touches memory for the driver that was there before. Another vCPU
        // must not start it for a new one meanwhile.
        if self.is_resetting && (offset != register::STATUS || data != [0; 4]) {
            return None;
        }
        if let Some(offset) = offset.checked_sub(register::CONFIGURATION) {
            if self.is_working() {
                self.device.write_configuration(offset, data);
                self.registers.set_configuration(&self.device.configuration());
            }
            return None;
        }
        // Registers are written whole (section 4.2.2.2); what is written otherwise is ignored.
        if let Ok(value) = <[u8; 4]>::try_from(data)
            && offset % 4 == 0
        {
            let value = u32::from_le_bytes(value);
            self.write_register(offset, value);
            return self.is_resetting.then_some(GuestRequest::Again);
        }
        None
    }
}
