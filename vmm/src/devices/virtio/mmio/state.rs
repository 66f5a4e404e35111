//! The saved state of a device, for a machine that continues from a pre-booted kernel.

use super::{Registers, Transport, status};
use crate::devices::virtio::{Device, DeviceError};
use serde::{Deserialize, Serialize};
use virtio_queue::QueueT;
use vm_memory::GuestAddress;

/// The properties of a device that a driver relies on after its initialization. A device can replace another one under
/// an initialized driver if these properties are equal.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceIdentity {
    kind: u32,
    features: u64,
    static_configuration: Vec<u8>,
}

/// The state of a device, except for its type-specific content: the driver's settings and the queues.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The properties that a device must have to be restored from this state.
    pub identity: DeviceIdentity,
    /// The configuration space that the driver has read.
    configuration: Vec<u8>,
    /// [`Device::peers`].
    peers: Option<u32>,
    registers: Registers,
    queues: Vec<QueueState>,
}

/// A device whose state cannot be saved, because its driver waits for requests.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the device {device} has {requests} requests in flight")]
pub struct InFlight {
    /// The device's name in error messages.
    pub device: String,
    /// Number of requests in flight. A pending reset counts as one.
    pub requests: usize,
}

/// Why a device cannot be replaced by another.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReplaceError {
    /// Requests of the device are in flight.
    #[error(transparent)]
    InFlight(#[from] InFlight),
    /// The other's memory cannot be moved.
    #[error("the memory of the device cannot be replaced")]
    Memory(#[source] std::io::Error),
    /// The other is of another kind, or has other features.
    #[error("the device {0} cannot be replaced by a different one")]
    Different(String),
}

/// One queue, with the positions of device and driver in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct QueueState {
    size: u16,
    is_ready: bool,
    descriptors: u64,
    driver: u64,
    device: u64,
    next_available: u16,
    next_used: u16,
}

impl Transport {
    /// The properties of `device` that a driver relies on after its initialization.
    #[must_use]
    pub fn identity(device: &dyn Device) -> DeviceIdentity {
        DeviceIdentity {
            kind: device.kind(),
            features: device.features(),
            static_configuration: device.static_configuration(),
        }
    }

    /// Number of requests in flight. The requests that a pending reset waits for, which are not in the queues any more, count as
    /// one.
    pub(crate) fn requests(&self) -> usize {
        self.queues.in_flight().max(self.is_resetting.into())
    }

    /// Makes chains available again that the device has popped to use them later. It processes nothing afterwards: its state is
    /// saved.
    pub(crate) fn give_back(&mut self) {
        self.device.give_back(&mut self.queues);
    }

    #[cfg(test)]
    pub(crate) fn has_peers(&self) -> bool {
        self.device.peers().is_some()
    }

    /// Saves the state of the device.
    ///
    /// # Errors
    /// When requests are in flight: the saved state does not contain them.
    pub fn state(&self) -> Result<State, InFlight> {
        let requests = self.requests();
        if requests > 0 {
            return Err(InFlight { device: self.name.clone(), requests });
        }
        let queue = |(number, queue): (usize, &virtio_queue::Queue)| {
            let (next_available, next_used) = self.queues.position(number);
            QueueState {
                size: queue.size(),
                is_ready: queue.ready(),
                descriptors: queue.desc_table(),
                driver: queue.avail_ring(),
                device: queue.used_ring(),
                next_available,
                next_used,
            }
        };
        Ok(State {
            identity: Self::identity(self.device.as_ref()),
            configuration: self.device.configuration(),
            peers: self.device.peers(),
            registers: self.state.clone(),
            queues: self.queues.queues.iter().enumerate().map(queue).collect(),
        })
    }

    /// Replaces the device by one with equal properties, before this is connected to the event loop: the driver continues with
    /// the new one.
    ///
    /// # Errors
    /// When the properties differ, or requests are in flight.
    pub fn replace(&mut self, mut device: Box<dyn Device>) -> Result<(), ReplaceError> {
        let state = self.state()?;
        if Self::identity(device.as_ref()) != state.identity {
            return Err(ReplaceError::Different(self.name.clone()));
        }
        if let Some(memory) = self.device.memory() {
            device.move_memory(&memory).map_err(ReplaceError::Memory)?;
        }
        self.device = device;
        self.restore(&state);
        Ok(())
    }

    /// Restores the state of a device with equal properties. The device continues when it is connected to the event
    /// loop. A state that no driver can produce fails the device; so do rings outside of guest memory, when the device
    /// is activated.
    pub fn restore(&mut self, state: &State) {
        self.state = state.registers.clone();
        let chosen = self.state.status & (status::FEATURES_OK | status::DRIVER_OK);
        let mut is_possible = chosen == 0 || chosen != status::DRIVER_OK && self.features_fit();
        for (queue, state) in self.queues.queues.iter_mut().zip(&state.queues) {
            is_possible &= queue.try_set_size(state.size).is_ok()
                && queue.try_set_desc_table_address(GuestAddress(state.descriptors)).is_ok()
                && queue.try_set_avail_ring_address(GuestAddress(state.driver)).is_ok()
                && queue.try_set_used_ring_address(GuestAddress(state.device)).is_ok()
                // Requests in flight are not part of the state ([`Self::state`]).
                && state.next_available == state.next_used;
            queue.set_next_avail(state.next_available);
            queue.set_next_used(state.next_used);
            queue.set_ready(state.is_ready);
        }
        self.set_status(self.state.status);
        self.update_selected_registers();
        self.device.restore_configuration(&state.configuration);
        if let Some(next) = state.peers {
            self.device.lose_peers(next);
        }
        self.registers.set_configuration(&self.device.configuration());
        if self.device.configuration() != state.configuration {
            self.queues.interrupt_for_configuration();
        }
        if !is_possible {
            self.fail(DeviceError::new("it was left as no driver can leave it"));
        }
    }
}
