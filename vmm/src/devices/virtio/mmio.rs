//! The virtio-mmio transport: virtio over memory-mapped registers (section 4.2), version 2.
//!
//! The driver reads the registers from the device's [`RegisterPage`]. This module implements the driver's writes.

mod state;
#[cfg(test)]
mod tests;

pub use state::{DeviceIdentity, InFlight, State};

use super::registers as register;
use super::registers::{RegisterPage, SHARED_MEMORY};
use super::{ACKNOWLEDGE_QUEUES, Device, DeviceError, Event, Progress, Queues, Watcher, feature};
use crate::bus::{BusDevice, GuestRequest};
use crate::jail::Jail;
use crate::memory::GuestMemory;
use crate::timeline::Instant;
use serde::{Deserialize, Serialize};
use std::io;
use virtio_queue::QueueT;
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

/// "virt" in ASCII, little endian.
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "KDLG" in ASCII, little endian. Drivers only display it.
const VENDOR: u32 = 0x474c_444b;
/// The value of a register of a queue that does not exist.
const NO_QUEUE: u32 = 0;

/// Bits of the device status (section 2.1).
mod status {
    pub(super) const ACKNOWLEDGE: u32 = 1;
    pub(super) const DRIVER: u32 = 2;
    pub(super) const DRIVER_OK: u32 = 4;
    pub(super) const FEATURES_OK: u32 = 8;
    pub(super) const NEEDS_RESET: u32 = 64;
    pub(super) const FAILED: u32 = 128;
    /// The bits that a driver may set.
    pub(super) const ALL: u32 = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED;
}

/// The token of the doorbell among the device's events.
const DOORBELL: u32 = u32::MAX;

/// The registers that a driver writes during the initialization of the device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Registers {
    status: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
}

/// The progress of the event loop in following the driver. vCPU threads only write registers and serve doorbells of some
/// devices; the event loop does everything that needs further system calls, which the filter of vCPU threads refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// No driver has started the device since the last reset.
    Reset,
    /// The driver has set DRIVER_OK. The event loop is going to activate the device.
    Starting,
    /// The device processes its queues.
    Active,
    /// The device has failed, or the driver resets it. The event loop is going to drop its requests.
    Stopping,
    /// The requests are dropped, and may still access guest memory.
    Stopped,
}

/// A virtio device with its registers.
#[derive(Debug)]
pub struct Transport {
    device: Box<dyn Device>,
    /// The device's name in error messages.
    name: String,
    registers: RegisterPage,
    state: Registers,
    queues: Queues,
    watcher: Option<Watcher>,
    stage: Stage,
    /// Whether a reset is pending: until the event loop has stopped the device, and it accesses no guest memory.
    is_resetting: bool,
    /// The first violation of the specification.
    failure: Option<DeviceError>,
}

/// The connections of a transport to the machine.
#[derive(Debug)]
pub struct Wiring {
    /// The page that the guest reads the registers from.
    pub registers: RegisterPage,
    /// Written to raise the device's interrupt.
    pub interrupt: EventFd,
    /// The doorbell: written by KVM when the driver has new chains, and by the transport to reschedule the device.
    pub doorbell: EventFd,
    /// The guest's memory.
    pub memory: GuestMemory,
}

impl Transport {
    /// Creates a transport with a device in its reset state. `name` is used in error messages.
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
            stage: Stage::Reset,
            is_resetting: false,
            failure: None,
        };
        this.set_constant_registers();
        this.update_selected_registers();
        this
    }

    /// Connects the device to the event loop. A device with a restored state starts to process its queues.
    ///
    /// # Errors
    /// When the host is out of memory.
    pub fn watch(&mut self, watcher: Watcher) -> io::Result<()> {
        let doorbell = crate::poll::borrow(self.queues.doorbell());
        watcher.add(doorbell, DOORBELL, rustix::event::epoll::EventFlags::IN)?;
        self.watcher = Some(watcher);
        // A device with a restored state continues here. Chains may be available already.
        if self.has_started() {
            self.activate();
            self.queues.reschedule();
        }
        Ok(())
    }

    /// Opens the resources that the device would otherwise open on first use, before `jail` forbids it.
    ///
    /// # Errors
    /// When the host has no thread or descriptor left.
    pub fn prepare(&mut self, jail: Jail) -> io::Result<()> {
        self.watcher.as_ref().map_or(Ok(()), |watcher| self.device.prepare(watcher, jail))
    }

    /// Handles an event of the event loop. `token` identifies the descriptor: the doorbell, or one of the device's own.
    pub fn serve(&mut self, token: u32, flags: rustix::event::epoll::EventFlags) {
        let event = if token == DOORBELL {
            // The read only resets the counter.
            let _ = self.queues.doorbell().read();
            Event::Doorbell
        } else {
            Event::Ready(token, flags)
        };
        self.pass(event);
    }

    /// Handles the expiry of [`Self::deadline`].
    pub fn serve_deadline(&mut self) {
        self.pass(Event::Deadline);
    }

    /// The device's memory and its guest-physical address, if it has some.
    #[must_use]
    pub fn memory(&self) -> Option<crate::memory::PlacedFile> {
        self.device.memory()
    }

    /// The machine has ended: the device removes what it created on the host.
    pub fn end(&mut self) {
        self.device.end();
    }

    /// The device's deadline; `None` when the device has none or is not active.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        (self.stage == Stage::Active).then(|| self.device.deadline()).flatten()
    }

    /// The first violation of the specification by the driver, or else the first error on the host's side.
    #[must_use]
    pub fn failure(&self) -> Option<String> {
        let of_driver = self.failure.as_ref().map(|reason| {
            format!(
                "device {} stopped because its driver violated the virtio specification: {reason}",
                self.name
            )
        });
        of_driver.or_else(|| Some(format!("{}: {}", self.name, self.device.failure()?)))
    }

    fn pass(&mut self, event: Event) {
        if self.stage == Stage::Starting {
            self.activate();
        }
        match self.stage {
            Stage::Active => {
                if let Err(reason) = self.device.serve(event, &mut self.queues) {
                    self.fail(reason);
                }
            }
            Stage::Stopping => {
                self.device.reset();
                self.stage = Stage::Stopped;
            }
            _ => {}
        }
        if self.stage != Stage::Active {
            // Consumes the event, which would otherwise repeat forever.
            let is_quiescent = self.device.is_quiescent();
            if is_quiescent && self.is_resetting && self.stage == Stage::Stopped {
                self.finish_reset();
            }
        }
    }

    /// The driver has written the doorbell register. Its vCPU waits until this returns.
    fn ring(&mut self) {
        // KVM handles the doorbell of the other devices (ioeventfd); their doorbell arrives here only without KVM, in
        // tests.
        if self.stage != Stage::Active || !self.device.serves_inline() {
            self.queues.reschedule();
        } else {
            match self.device.serve_inline(&mut self.queues) {
                Ok(Progress::Done) => {}
                Ok(Progress::Pending) => self.queues.reschedule(),
                Err(reason) => self.fail(reason),
            }
        }
    }

    /// Whether the driver has started the device, and it has not failed.
    const fn has_started(&self) -> bool {
        self.state.status & (status::DRIVER_OK | status::NEEDS_RESET) == status::DRIVER_OK
    }

    fn fail(&mut self, reason: DeviceError) {
        self.stage = Stage::Stopping;
        self.queues.reschedule();
        self.set_status(self.state.status | status::NEEDS_RESET);
        self.queues.interrupt_for_configuration();
        self.failure.get_or_insert(reason);
    }

    fn set_status(&mut self, status: u32) {
        self.state.status = status;
        self.registers.set(register::STATUS, status);
    }

    /// Sets the registers that never change.
    fn set_constant_registers(&self) {
        self.registers.set(register::MAGIC, MAGIC);
        self.registers.set(register::VERSION, VERSION);
        self.registers.set(register::DEVICE_ID, self.device.kind());
        self.registers.set(register::VENDOR_ID, VENDOR);
        for offset in SHARED_MEMORY.step_by(4) {
            self.registers.set(offset, u32::MAX);
        }
        self.registers.set_configuration(&self.device.configuration());
    }

    /// Sets the registers that depend on a selector register.
    fn update_selected_registers(&self) {
        self.registers
            .set(register::DEVICE_FEATURES, half(self.offered(), self.state.device_features_select));
        let queue = self.selected_queue().and_then(|queue| self.queues.queues.get(queue));
        let size = queue.map_or(NO_QUEUE, |queue| queue.max_size().into());
        self.registers.set(register::QUEUE_SIZE_MAX, size);
        self.registers.set(register::QUEUE_READY, queue.is_some_and(QueueT::ready).into());
    }

    fn offered(&self) -> u64 {
        self.device.features() | feature::VERSION_1 | feature::EVENT_IDX | feature::INDIRECT_DESC
    }

    fn selected_queue(&self) -> Option<usize> {
        usize::try_from(self.state.queue_select).ok().filter(|&queue| queue < self.queues.queues.len())
    }

    /// Handles a write to the register at this offset.
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
                // The doorbell does not change any register that depends on a selector.
                return;
            }
            _ => self.write_queue(offset, value),
        }
        self.update_selected_registers();
    }

    /// The driver accepts features until it sets FEATURES_OK.
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

    /// The driver sets up a queue after FEATURES_OK and before DRIVER_OK.
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
        // The queue refuses a value that is out of range or not aligned, and keeps the previous one.
        match offset {
            register::QUEUE_SIZE => {
                let _ = u16::try_from(value).map(|size| queue.try_set_size(size));
            }
            _ if offset & !4 == register::QUEUE_DESCRIPTORS => {
                let _ = queue.try_set_desc_table_address(with_half(queue.desc_table(), offset, value));
            }
            _ if offset & !4 == register::QUEUE_DRIVER => {
                let _ = queue.try_set_avail_ring_address(with_half(queue.avail_ring(), offset, value));
            }
            _ if offset & !4 == register::QUEUE_DEVICE => {
                let _ = queue.try_set_used_ring_address(with_half(queue.used_ring(), offset, value));
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
        // The driver sets one bit after the other; bits are cleared only by a reset.
        let mut new = old | value & status::ALL;
        let risen = new & !old;
        if risen & status::FEATURES_OK != 0 && !self.features_fit() {
            new &= !status::FEATURES_OK;
        }
        if risen & status::DRIVER_OK != 0 && new & status::FEATURES_OK == 0 {
            new &= !status::DRIVER_OK;
        }
        self.set_status(new);
        // A device that failed before DRIVER_OK stays failed.
        if new & !old & status::DRIVER_OK != 0 && self.has_started() {
            self.stage = Stage::Starting;
            self.queues.reschedule();
        }
    }

    fn features_fit(&self) -> bool {
        let chosen = self.state.driver_features;
        chosen & !self.offered() == 0 && chosen & feature::VERSION_1 != 0
    }

    fn activate(&mut self) {
        self.stage = Stage::Active;
        if let Err(reason) = self.try_activate() {
            self.fail(reason);
        }
    }

    fn try_activate(&mut self) -> Result<(), DeviceError> {
        let features = self.state.driver_features;
        self.queues.activate(features & feature::EVENT_IDX != 0)?;
        // Except for changes of the configuration, used chains are the only reason for an interrupt.
        let status = self.registers.get(register::INTERRUPT_STATUS);
        self.registers.set(register::INTERRUPT_STATUS, status | ACKNOWLEDGE_QUEUES);
        let Some(watcher) = &self.watcher else {
            return Err(DeviceError::new("the machine does not run yet"));
        };
        self.device.activate(features, &mut self.queues, watcher)
    }

    /// Linux considers a device reset when its write returns (`vm_reset` in drivers/virtio/virtio_mmio.c), so that the
    /// write does not return while the device accesses the driver's memory. Only the vCPU waits: the write is retried,
    /// and the lock of the device is not held in between.
    fn reset(&mut self) {
        match self.stage {
            // The event loop has not called the device.
            Stage::Reset | Stage::Starting => return self.finish_reset(),
            Stage::Active => self.stage = Stage::Stopping,
            Stage::Stopping | Stage::Stopped => {}
        }
        self.is_resetting = true;
        self.queues.reschedule();
    }

    fn finish_reset(&mut self) {
        self.is_resetting = false;
        self.stage = Stage::Reset;
        self.queues.reset();
        self.state = Registers::default();
        self.registers.set(register::INTERRUPT_STATUS, 0);
        self.set_status(0);
        self.registers.set_configuration(&self.device.configuration());
        self.update_selected_registers();
    }

    /// Number of chains that were popped and not completed.
    #[cfg(any(test, fuzzing))]
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.queues.in_flight()
    }
}

/// One half of a 64-bit register by its selector: 0 is the lower half, 1 the upper half; there are no others.
const fn half(value: u64, select: u32) -> u32 {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    match select {
        0 => u32::from_le_bytes([a, b, c, d]),
        1 => u32::from_le_bytes([e, f, g, h]),
        _ => 0,
    }
}

/// Replaces one half of an address. The register of the upper half is four bytes after that of the lower half.
fn with_half(address: u64, offset: usize, value: u32) -> GuestAddress {
    let value = u64::from(value);
    GuestAddress(if offset & 4 == 0 {
        address & !0xffff_ffff | value
    } else {
        address & 0xffff_ffff | value << 32
    })
}

impl BusDevice for Transport {
    fn read(&mut self, offset: u16, data: &mut [u8]) {
        // The guest reads the page directly, unless KVM cannot map read-only memory.
        self.registers.read(offset.into(), data);
    }

    fn write(&mut self, offset: u16, data: &[u8]) -> Option<GuestRequest> {
        let offset = usize::from(offset);
        // While a reset is pending, the device still accesses memory for the previous driver. Another vCPU must not
        // start the device for a new driver in the meantime.
        if self.is_resetting && (offset != register::STATUS || data != [0; 4]) {
            return None;
        }
        if let Some(offset) = offset.checked_sub(register::CONFIGURATION) {
            if self.has_started() {
                self.device.write_configuration(offset, data);
                self.registers.set_configuration(&self.device.configuration());
            }
            return None;
        }
        // Registers are accessed as aligned 32-bit words (section 4.2.2.2); other writes are ignored.
        if let Ok(value) = <[u8; 4]>::try_from(data)
            && offset % 4 == 0
        {
            let value = u32::from_le_bytes(value);
            self.write_register(offset, value);
            return self.is_resetting.then_some(GuestRequest::Retry);
        }
        None
    }
}
