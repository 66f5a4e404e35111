//! Virtio devices (Virtual I/O Device specification, version 1.2), one module per device type.
//!
//! A [`Device`] processes its queues. It does not depend on KVM, on registers or on how the guest discovers it. The
//! [`Transport`] around it implements the registers. It calls the device from the moment at which the driver sets
//! DRIVER_OK until the driver resets the device or violates the specification.

pub(crate) mod backend;
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
pub(crate) mod table;
#[cfg(test)]
mod tests;
mod vectored;
pub mod vsock;

pub use mmio::{DeviceIdentity, InFlight, State, Transport, Wiring};
pub use queue::{Chain, Queues, Segment};
pub use registers::{
    ACKNOWLEDGE, ACKNOWLEDGE_QUEUES, DOORBELL, QUEUE_ADDRESSES, QUEUE_ADDRESSES_LEN, RegisterPage,
    RegisterPages,
};

use crate::jail::Jail;
use crate::memory::PlacedFile;
use crate::timeline::Instant;
use rustix::event::epoll::{self, EventData, EventFlags};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

/// Feature bits of every device (section 6).
pub mod feature {
    /// `VIRTIO_F_INDIRECT_DESC`: a descriptor may point to a table of descriptors.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// `VIRTIO_F_EVENT_IDX`: driver and device publish the ring index at which they need the next notification.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// `VIRTIO_F_VERSION_1`: the device conforms to the standard, not to a draft of it.
    pub const VERSION_1: u64 = 1 << 32;
}

/// An error that stops a device: its driver violated the specification, or the device cannot be activated. The
/// transport sets DEVICE_NEEDS_RESET, and the device processes nothing until the driver resets it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct DeviceError(pub String);

impl DeviceError {
    /// Creates an error with this reason.
    pub fn new(reason: impl Into<String>) -> Self {
        Self(reason.into())
    }
}

/// Why the host's side of a device cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BackendError {
    /// The file, folder, socket or interface that the configuration names is not usable.
    #[error("{what}: {why}")]
    Unusable {
        /// What the device would have been, such as `disk.img cannot be a drive`.
        what: String,
        /// The problem, and its remedy if there is one.
        why: String,
    },
    /// A system call failed: the host is out of descriptors or memory, for example.
    #[error("cannot {what}")]
    Host {
        /// The failed operation, as a verb phrase.
        what: &'static str,
        /// The host's error.
        source: io::Error,
    },
}

impl BackendError {
    pub(crate) fn unusable(what: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Unusable { what: what.into(), why: why.into() }
    }

    pub(crate) const fn host(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Host { what, source }
    }
}

/// An event that a device is called for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The driver may have made chains available, or the device has rescheduled itself.
    Doorbell,
    /// A watched descriptor is ready. The number is the token of [`Watcher::add`].
    Ready(u32, EventFlags),
    /// The time of [`Device::deadline`] has come.
    Deadline,
}

/// Whether chains are left after [`Device::serve_inline`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// All available chains have been processed.
    Done,
    /// Chains are left. The device continues with an [`Event::Doorbell`] on the event loop's thread.
    Pending,
}

/// The device-specific part of a virtio device.
///
/// All methods run while the device is locked. Long operations must run asynchronously and report their completion as
/// an event.
pub trait Device: Send + fmt::Debug {
    /// The device type (section 5).
    fn kind(&self) -> u32;

    /// The maximum size of each queue; each is a power of two.
    fn queue_sizes(&self) -> &'static [u16];

    /// The offered device-specific feature bits, without those in [`feature`].
    fn features(&self) -> u64;

    /// The current content of the configuration space: at most 256 bytes, and always of the same length.
    fn configuration(&self) -> Vec<u8>;

    /// The part of the configuration space that a driver reads only once, when it initializes the device. A device can
    /// replace another one under an initialized driver only if this part is equal; the rest may change.
    fn static_configuration(&self) -> Vec<u8> {
        self.configuration()
    }

    /// Takes over what a driver wrote to the configuration space of the device that this one replaces. `seen` is the
    /// configuration space of that device.
    fn restore_configuration(&mut self, _seen: &[u8]) {}

    /// Where another device that continues from the state of this one goes on to number connections, if the driver may have
    /// connections with programs of the host. Those end.
    fn peers(&self) -> Option<u32> {
        None
    }

    /// Makes chains available again that the device has popped to use them later, before its state is saved.
    fn give_back(&mut self, _queues: &mut Queues) {}

    /// The device continues from the state of another one that [had connections](Self::peers). It tells the driver when it is
    /// activated.
    fn lose_peers(&mut self, _next: u32) {}

    /// Handles a write of the driver to the configuration space. The default ignores writes, because most devices have
    /// no writable field.
    fn write_configuration(&mut self, _offset: usize, _data: &[u8]) {}

    /// The device's memory and its guest-physical address, if it has some.
    fn memory(&self) -> Option<PlacedFile> {
        None
    }

    /// Moves the device's memory to that of a device which this one replaces.
    ///
    /// # Errors
    /// When the device has no such memory, or the host refuses.
    fn move_memory(&mut self, _to: &PlacedFile) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// A handle that controls the guest's balloon, if the device is one.
    fn balloon(&self) -> Option<balloon::Control> {
        None
    }

    /// The driver has set DRIVER_OK; `features` are the accepted features. Descriptors for [`Event::Ready`] are
    /// registered with `watcher`. Runs on the event loop's thread.
    ///
    /// # Errors
    /// When the device does not work with these features or queues, or when the host refuses a resource.
    fn activate(&mut self, features: u64, queues: &mut Queues, watcher: &Watcher) -> Result<(), DeviceError>;

    /// Processes available chains on the thread of the vCPU that wrote the doorbell register. The vCPU waits, so that slow
    /// requests are left pending. So are requests that need a system call which the filter of vCPU threads refuses. Only
    /// called when [`Self::serves_inline`] returns `true`.
    ///
    /// # Errors
    /// When the driver violated the specification.
    fn serve_inline(&mut self, _queues: &mut Queues) -> Result<Progress, DeviceError> {
        Ok(Progress::Pending)
    }

    /// Opens the resources that the device would otherwise open on first use, before `jail` forbids it.
    ///
    /// # Errors
    /// When the host has no thread or descriptor left.
    fn prepare(&mut self, _watcher: &Watcher, _jail: Jail) -> io::Result<()> {
        Ok(())
    }

    /// Whether doorbells are served by [`Self::serve_inline`] first, which avoids a switch to another thread, instead
    /// of by [`Self::serve`] only.
    fn serves_inline(&self) -> bool {
        false
    }

    /// Processes an event on the event loop's thread.
    ///
    /// # Errors
    /// When the driver violated the specification.
    fn serve(&mut self, event: Event, queues: &mut Queues) -> Result<(), DeviceError>;

    /// The latest time of the next call with [`Event::Deadline`]; `None` without a deadline.
    fn deadline(&self) -> Option<Instant> {
        None
    }

    /// The driver resets the device, or the device has failed: all requests are dropped. Runs on the event loop's thread.
    fn reset(&mut self);

    /// Whether no dropped request accesses guest memory any more. The transport polls this after each event of an
    /// inactive device, and a reset completes only when it is `true`.
    fn is_quiescent(&mut self) -> bool {
        true
    }

    /// The first error on the host's side. The driver got an error as the reply to its request.
    fn failure(&self) -> Option<String> {
        None
    }

    /// The machine has ended: the device removes its files on the host, such as a socket's path. Needed because
    /// devices are not dropped when the process exits with the machine.
    fn end(&mut self) {}
}

/// Registers descriptors of one device with the event loop: readiness is reported as [`Event::Ready`].
#[derive(Clone, Debug)]
pub struct Watcher {
    epoll: Arc<OwnedFd>,
    /// The upper half of the token.
    device: u32,
}

impl Watcher {
    /// Creates a watcher for a device. `device` is the device's number, starting at 1.
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
    /// When the host is out of memory, or epoll does not support the descriptor.
    pub fn add(&self, fd: impl AsFd, token: u32, events: EventFlags) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, fd, self.data(token), events)?)
    }

    /// Changes the events of a watched descriptor.
    ///
    /// # Errors
    /// When the descriptor is not watched.
    pub fn modify(&self, fd: impl AsFd, token: u32, events: EventFlags) -> io::Result<()> {
        Ok(epoll::modify(&self.epoll, fd, self.data(token), events)?)
    }

    /// Stops watching a descriptor.
    pub fn remove(&self, fd: impl AsFd) {
        // This fails only for a descriptor that is not watched.
        let _ = epoll::delete(&self.epoll, fd);
    }
}
