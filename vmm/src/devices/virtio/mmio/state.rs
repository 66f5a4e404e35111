//! A device as its driver left it, for a machine that goes on from there.

use super::{Registers, Transport, status};
use crate::devices::virtio::{Broken, Device};
use serde::{Deserialize, Serialize};
use virtio_queue::QueueT;
use vm_memory::GuestAddress;

/// What a driver takes for granted of a device from its start on. A device of the same shape can take its place.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    kind: u32,
    features: u64,
    identity: Vec<u8>,
}

/// A device as its driver left it: what it has set, and where the queues are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Which devices can go on from here.
    pub shape: Shape,
    /// The configuration space that the driver has seen.
    configuration: Vec<u8>,
    registers: Registers,
    queues: Vec<QueueState>,
}

/// A device that cannot be written down, because its driver waits for requests.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the device {device} has {requests} requests in flight")]
pub struct InFlight {
    /// What it is called.
    pub device: String,
    /// How many.
    pub requests: usize,
}

/// One queue, with where device and driver are in it.
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
    /// What a driver takes for granted of this device.
    #[must_use]
    pub fn shape(device: &dyn Device) -> Shape {
        Shape { kind: device.kind(), features: device.features(), identity: device.identity() }
    }

    /// The device as its driver has left it.
    ///
    /// # Errors
    /// When it is at work: whoever goes on from there would know nothing of what it has begun.
    pub fn state(&self) -> Result<State, InFlight> {
        // What a reset waits for is not in the queues any more.
        let requests = self.queues.in_flight().max(self.is_resetting.into());
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
            shape: Self::shape(self.device.as_ref()),
            configuration: self.device.configuration(),
            registers: self.state.clone(),
            queues: self.queues.queues.iter().enumerate().map(queue).collect(),
        })
    }

    /// Goes on from where a device of the same shape was left, as soon as it is connected to the event loop. What no
    /// driver can set breaks the device; rings outside memory do so when it begins to work.
    pub fn restore(&mut self, state: &State) {
        self.state = state.registers.clone();
        let chosen = self.state.status & (status::FEATURES_OK | status::DRIVER_OK);
        let mut is_possible = chosen == 0 || chosen != status::DRIVER_OK && self.features_fit();
        for (queue, state) in self.queues.queues.iter_mut().zip(&state.queues) {
            is_possible &= queue.try_set_size(state.size).is_ok()
                && queue.try_set_desc_table_address(GuestAddress(state.descriptors)).is_ok()
                && queue.try_set_avail_ring_address(GuestAddress(state.driver)).is_ok()
                && queue.try_set_used_ring_address(GuestAddress(state.device)).is_ok()
                // What was in flight is unknown here ([`Self::state`]).
                && state.next_available == state.next_used;
            queue.set_next_avail(state.next_available);
            queue.set_next_used(state.next_used);
            queue.set_ready(state.is_ready);
        }
        self.set_status(self.state.status);
        self.show_selected();
        self.device.restore_configuration(&state.configuration);
        self.registers.set_configuration(&self.device.configuration());
        if self.device.configuration() != state.configuration {
            self.queues.interrupt_for_configuration();
        }
        if !is_possible {
            self.fail(Broken::because("it was left as no driver can leave it"));
        }
    }
}
