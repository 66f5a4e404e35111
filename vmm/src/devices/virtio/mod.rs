//! Virtio devices (Virtual I/O Device specification, version 1.2), one file per kind.
//!
//! A [`Device`] is what it does with its queues; it knows neither KVM nor registers nor how it is
//! announced. The [`Transport`] around it has the registers, and decides when the device may work: from
//! the moment at which a driver has said that it is ready until the driver resets it or it breaks.

pub mod balloon;
pub mod block;
#[cfg(any(test, fuzzing))]
pub mod driver;
pub mod entropy;
mod file_io;
pub mod fs;
mod mmio;
pub mod net;
pub mod pmem;
mod queue;
mod rate_limiter;
mod registers;
mod ring;
mod stream;
#[cfg(test)]
mod tests;
mod vectored;
pub mod vsock;

pub use mmio::{InFlight, Shape, State, Transport, Wiring};
pub use queue::{Chain, Queues, Segment};
pub use registers::{
    ACKNOWLEDGE, ACKNOWLEDGE_QUEUES, DOORBELL, QUEUE_ADDRESSES, QUEUE_ADDRESSES_LEN, RegisterPage,
    RegisterPages,
};

use crate::timeline::Instant;
use rustix::event::epoll::{self, EventData, EventFlags};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

/// Feature bits of every device (section 6).
pub mod feature {
    /// Chains may name a table of descriptors.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// Both sides say from which element on they want to hear of the other.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// The device is one of the standard and not of the drafts before it.
    pub const VERSION_1: u64 = 1 << 32;
}

/// Why a device cannot go on: its driver did what no driver may. Until the driver resets it, it rests.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Broken(pub String);

impl Broken {
    /// For this reason.
    pub fn because(what: impl Into<String>) -> Self {
        Self(what.into())
    }
}

/// What a device is called for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The driver may have made chains available.
    Doorbell,
    /// A descriptor that the device watches is ready; the number is the device's own for it.
    Ready(u32, EventFlags),
    /// The moment of [`Device::deadline`] has come.
    Deadline,
}

/// Whether a device that worked on a vCPU's thread wants to go on elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// All chains are done.
    Nothing,
    /// What is left comes back as [`Event::Doorbell`].
    Something,
}

/// What a device does with its queues.
///
/// All of it runs with the device locked: what can take time has to go on elsewhere and come back as an event.
pub trait Device: Send + fmt::Debug {
    /// The number of its kind (section 5).
    fn kind(&self) -> u32;

    /// The largest size of each queue, a power of two.
    fn queue_sizes(&self) -> &'static [u16];

    /// Features that it offers beside those of every device.
    fn features(&self) -> u64;

    /// Its configuration space as it is now; at most 256 bytes, and always as many.
    fn configuration(&self) -> Vec<u8>;

    /// What of the configuration space a driver reads once, when it starts. A device can take the place of another
    /// one under a driver that has started only where this is the same; all else it may change.
    fn identity(&self) -> Vec<u8> {
        self.configuration()
    }

    /// The device takes the place of one whose driver has seen this configuration space: what a driver wrote there is
    /// to be kept.
    fn restore_configuration(&mut self, _seen: &[u8]) {}

    /// The driver writes into the configuration space; most devices have nothing to write.
    fn write_configuration(&mut self, _offset: usize, _data: &[u8]) {}

    /// The driver is ready, and has accepted these of the features.
    ///
    /// # Errors
    /// When the device cannot work like that.
    fn activate(&mut self, features: u64, queues: &mut Queues, watcher: &Watcher) -> Result<(), Broken>;

    /// Works on the thread of the vCPU that rang the doorbell, which waits: what takes time is left. Only devices
    /// for which [`Self::serves_at_once`] holds are asked.
    ///
    /// # Errors
    /// When the driver broke a rule.
    fn serve_at_once(&mut self, _queues: &mut Queues) -> Result<Left, Broken> {
        Ok(Left::Something)
    }

    /// Whether the doorbell is for [`Self::serve_at_once`], which saves the change to another thread, instead of
    /// for [`Self::serve`] alone.
    fn serves_at_once(&self) -> bool {
        false
    }

    /// Works.
    ///
    /// # Errors
    /// When the driver broke a rule.
    fn serve(&mut self, event: Event, queues: &mut Queues) -> Result<(), Broken>;

    /// When it wants to be called at the latest.
    fn deadline(&self) -> Option<Instant> {
        None
    }

    /// The driver starts over: what was asked for before is forgotten.
    fn reset(&mut self);

    /// Whether nothing that was forgotten touches guest memory any more. A device that does not work is asked after each
    /// of its events, and by who resets it until it is so.
    fn is_at_rest(&mut self) -> bool {
        true
    }

    /// What went wrong first on the host's side, if something did: the driver had an error for an answer.
    fn failure(&self) -> Option<String> {
        None
    }

    /// The machine has ended: what others on this host can see of the device goes away. Whoever ends with the
    /// machine drops no device.
    fn end(&mut self) {}
}

/// Lets a device watch descriptors: what is ready comes back as [`Event::Ready`].
#[derive(Clone, Debug)]
pub struct Watcher {
    epoll: Arc<OwnedFd>,
    /// The upper half of the token.
    device: u32,
}

impl Watcher {
    /// Of the device with this number, counted from one.
    #[must_use]
    pub const fn new(epoll: Arc<OwnedFd>, device: u32) -> Self {
        Self { epoll, device }
    }

    fn data(&self, token: u32) -> EventData {
        EventData::new_u64(u64::from(self.device) << 32 | u64::from(token))
    }

    /// Watches a descriptor for these events.
    ///
    /// # Errors
    /// When the host has no memory left, or the descriptor cannot be watched.
    pub fn add(&self, fd: impl AsFd, token: u32, events: EventFlags) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, fd, self.data(token), events)?)
    }

    /// Watches it for other events.
    ///
    /// # Errors
    /// When it is not watched.
    pub fn modify(&self, fd: impl AsFd, token: u32, events: EventFlags) -> io::Result<()> {
        Ok(epoll::modify(&self.epoll, fd, self.data(token), events)?)
    }

    /// Watches it no longer.
    pub fn remove(&self, fd: impl AsFd) {
        // It fails only for what is not watched.
        let _ = epoll::delete(&self.epoll, fd);
    }
}
