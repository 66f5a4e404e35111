//! Network device (section 5.1): Ethernet frames between the guest and a tap device or passt on the host.
//!
//! Each direction is in one of a few states: it waits for the driver, for the host, for its rate limiter or for its
//! next call, and only the matching event resumes it.

mod buffers;
mod header;
mod null_link;
mod passt;
mod ports;
mod receive;
#[cfg(any(test, fuzzing))]
mod sockets;
pub(crate) mod starting;
mod tap;
#[cfg(test)]
mod tests;
mod transmit;

use super::backend::{Attach, Backend};
use super::rate_limiter::RateLimiter;
use super::{BackendError, Chain, Device, DeviceError, Event, Queues, Segment, Watcher};
use crate::config::devices::{MacAddress, NetworkInterface};
use crate::timeline::Instant;
use buffers::{Buffers, Frame, FrameSpace};
use null_link::NullLink;
use passt::Passt;
use receive::SizeHint;
use rustix::event::epoll::EventFlags;
use starting::unusable;
use std::fmt;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use tap::Tap;
use vm_memory::GuestAddress;

const KIND: u32 = 1;
const RX: usize = 0;
const TX: usize = 1;
const QUEUE_SIZE: u16 = 256;
/// Maximum number of frames per direction and call.
const BUDGET: usize = 64;
/// The token of the link among the device's events.
const LINK: u32 = 0;

/// Maximum length of a frame without the virtio header, in bytes: the largest IP packet with an Ethernet header and a
/// VLAN tag. Section 5.1.6.3.1 requires receive buffers of about this size.
const FRAME_MAX: usize = 65_535 + header::ETHERNET + 4;

/// Feature bits (section 5.1.3).
mod feature {
    pub(super) const CSUM: u64 = 1 << 0;
    pub(super) const GUEST_CSUM: u64 = 1 << 1;
    pub(super) const MTU: u64 = 1 << 3;
    pub(super) const MAC: u64 = 1 << 5;
    pub(super) const GUEST_TSO4: u64 = 1 << 7;
    pub(super) const GUEST_TSO6: u64 = 1 << 8;
    pub(super) const GUEST_ECN: u64 = 1 << 9;
    pub(super) const GUEST_UFO: u64 = 1 << 10;
    pub(super) const HOST_TSO4: u64 = 1 << 11;
    pub(super) const HOST_TSO6: u64 = 1 << 12;
    pub(super) const HOST_ECN: u64 = 1 << 13;
    pub(super) const HOST_UFO: u64 = 1 << 14;
    pub(super) const MRG_RXBUF: u64 = 1 << 15;
    pub(super) const STATUS: u64 = 1 << 16;
    /// Features that require `GUEST_CSUM` (section 5.1.3.1).
    pub(super) const GUEST_SEGMENTATION: u64 = GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | GUEST_UFO;
    /// Features that require `CSUM`.
    pub(super) const HOST_SEGMENTATION: u64 = HOST_TSO4 | HOST_TSO6 | HOST_ECN | HOST_UFO;
}

/// The host's end of the device. All operations are non-blocking and fail with `WouldBlock` instead of waiting.
trait Link: Send + fmt::Debug {
    /// Supported offload features, in addition to the computation of checksums.
    fn features(&self) -> u64;

    /// Applies the features that the driver has accepted.
    fn accept(&mut self, features: u64) -> io::Result<()>;

    /// A descriptor that is readable when a frame is available, and writable when a frame can be sent.
    fn fd(&self) -> BorrowedFd<'_>;

    /// Receives the next frame from the host into guest memory, as far as `space` allows; `None` when the frame was
    /// invalid and is dropped.
    fn receive(&mut self, space: &FrameSpace) -> io::Result<Option<Frame>>;

    /// The bytes of the received frame that did not fit, valid until the frame is released.
    fn rest(&self) -> &[u8];

    /// Releases the frame that was received last.
    fn release(&mut self);

    /// Sends a frame. After `WouldBlock` the complete chain has to be sent again.
    fn send(&mut self, chain: &mut Chain) -> io::Result<()>;

    /// Whether a part of the last frame has not been sent yet.
    fn has_unsent(&self) -> bool {
        false
    }

    /// Sends as much of that part as the host accepts.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The event that a direction waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wait {
    /// Buffers or frames from the driver.
    Driver,
    /// The host.
    Link,
    /// The rate limiter.
    Limiter(Instant),
    /// The next call, after the events of other devices.
    Rescheduled,
}

impl Wait {
    /// Whether a doorbell event resumes the direction.
    const fn is_for_doorbell(self) -> bool {
        matches!(self, Self::Driver | Self::Rescheduled)
    }

    const fn until(self) -> Option<Instant> {
        match self {
            Self::Limiter(until) => Some(until),
            _ => None,
        }
    }
}

/// The state of one direction.
#[derive(Debug)]
struct Direction {
    limiter: RateLimiter,
    wait: Wait,
    /// Number of dropped frames.
    dropped: u64,
}

impl Direction {
    fn new(limiter: Option<&crate::config::devices::RateLimiter>) -> Self {
        Self { limiter: RateLimiter::new(limiter, Instant::now()), wait: Wait::Driver, dropped: 0 }
    }
}

/// A virtio network device.
#[derive(Debug)]
pub struct Net {
    link: Box<dyn Link>,
    /// Whether the link is connected.
    is_up: bool,
    mac: MacAddress,
    mtu: Option<u16>,
    features: u64,
    rx: Direction,
    tx: Direction,
    /// The driver's receive buffers.
    buffers: Buffers,
    /// The received frame that has not been delivered to the driver yet.
    frame: Option<Frame>,
    size_hint: SizeHint,
    /// Where the next frame may be placed; kept to reuse its memory.
    space: FrameSpace,
    watcher: Option<Watcher>,
    /// The events that the link is watched for.
    watched: EventFlags,
}

impl Net {
    /// Creates the device with this link.
    fn with_link(interface: &NetworkInterface, link: OwnedFd) -> Self {
        let link: Box<dyn Link> = if interface.is_user() {
            Box::new(Passt::connected(link))
        } else {
            Box::new(Tap::attached(link))
        };
        Self::new(link, interface)
    }

    /// Creates a placeholder, with which a kernel is pre-booted: a device with a link that is not connected to
    /// anything. The driver sees no difference.
    ///
    /// # Errors
    /// When the process has no file descriptor left.
    fn placeholder(interface: &NetworkInterface) -> io::Result<Self> {
        let features = if interface.is_user() { passt::FEATURES } else { tap::features() };
        Ok(Self::new(Box::new(NullLink::new(features)?), interface))
    }

    fn new(link: Box<dyn Link>, interface: &NetworkInterface) -> Self {
        Self {
            link,
            is_up: true,
            mac: interface.mac(),
            mtu: interface.guest_mtu(),
            features: 0,
            rx: Direction::new(interface.rx_rate_limiter.as_ref()),
            tx: Direction::new(interface.tx_rate_limiter.as_ref()),
            buffers: Buffers::default(),
            frame: None,
            size_hint: SizeHint::default(),
            space: FrameSpace::default(),
            watcher: None,
            watched: EventFlags::empty(),
        }
    }

    /// Handles the end of the link: the tap device was removed, or passt has ended. The driver sees the link status
    /// "down".
    fn disconnect(&mut self, queues: &mut Queues) {
        if !self.is_up {
            return;
        }
        self.is_up = false;
        self.unwatch();
        queues.set_configuration(&self.configuration());
        // The link will cause no more events.
        if self.tx.wait == Wait::Link {
            self.tx.wait = Wait::Rescheduled;
            queues.reschedule();
        }
    }

    /// Watches the link for exactly the events that a direction waits for.
    fn watch(&mut self) -> Result<(), DeviceError> {
        let Some(watcher) = self.watcher.as_ref().filter(|_| self.is_up) else { return Ok(()) };
        let mut wanted = EventFlags::empty();
        wanted.set(EventFlags::IN, self.rx.wait == Wait::Link);
        wanted.set(EventFlags::OUT, self.tx.wait == Wait::Link || self.link.has_unsent());
        if wanted == self.watched {
            return Ok(());
        }
        // Removed, not only masked: epoll reports a hangup even for an empty set of events.
        let result = match (self.watched.is_empty(), wanted.is_empty()) {
            (true, _) => watcher.add(self.link.fd(), LINK, wanted),
            (false, false) => watcher.modify(self.link.fd(), LINK, wanted),
            (false, true) => {
                watcher.remove(self.link.fd());
                Ok(())
            }
        };
        self.watched = wanted;
        result.map_err(|error| DeviceError::new(format!("the host cannot watch the link: {error}")))
    }

    fn unwatch(&mut self) {
        if let Some(watcher) = self.watcher.as_ref().filter(|_| !self.watched.is_empty()) {
            watcher.remove(self.link.fd());
        }
        self.watched = EventFlags::empty();
    }
}

impl Attach for NetworkInterface {
    /// Attaches to a tap device, or starts passt.
    fn open(&self) -> Result<Backend, BackendError> {
        let wrong = |why| unusable(&self.host_dev_name, why);
        if self.is_user() {
            let (socket, starting) = Passt::start(self).map_err(wrong)?;
            return Ok(Backend::Link(socket, Some(starting)));
        }
        Ok(Backend::Link(Tap::open(&self.host_dev_name).map_err(wrong)?, None))
    }

    fn create(&self, backend: Backend, _: GuestAddress) -> Result<Box<dyn Device>, BackendError> {
        match backend {
            Backend::Link(link, _) => Ok(Box::new(Net::with_link(self, link))),
            Backend::Nothing => {
                let device = Net::placeholder(self);
                Ok(Box::new(device.map_err(BackendError::host("create a placeholder network card"))?))
            }
            other => Err(other.mismatch()),
        }
    }
}

fn is_retryable(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

/// Whether this error of the link means that its other end does not exist any more.
fn is_disconnected(error: &io::Error) -> bool {
    let is_removed_tap = error.raw_os_error() == Some(libc::EBADFD);
    is_removed_tap || matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset)
}

impl Device for Net {
    fn kind(&self) -> u32 {
        KIND
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE, QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        let always = feature::MAC | feature::STATUS | feature::MRG_RXBUF | feature::CSUM;
        always | self.link.features() | if self.mtu.is_some() { feature::MTU } else { 0 }
    }

    fn configuration(&self) -> Vec<u8> {
        // struct virtio_net_config (section 5.1.4): mac, status, max_virtqueue_pairs, mtu.
        let mut bytes = self.mac.0.to_vec();
        bytes.extend(u16::from(self.is_up).to_le_bytes());
        bytes.extend(1_u16.to_le_bytes());
        bytes.extend(self.mtu.unwrap_or(0).to_le_bytes());
        bytes
    }

    fn give_back(&mut self, queues: &mut Queues) {
        // A frame that has not been delivered is lost, as frames may be.
        if self.frame.take().is_some() {
            self.link.release();
        }
        self.buffers.give_back(queues);
    }

    fn activate(&mut self, features: u64, queues: &mut Queues, watcher: &Watcher) -> Result<(), DeviceError> {
        let has = |feature| features & feature != 0;
        if has(feature::GUEST_SEGMENTATION) && !has(feature::GUEST_CSUM)
            || has(feature::HOST_SEGMENTATION) && !has(feature::CSUM)
        {
            return Err(DeviceError::new("segmentation was accepted without checksums"));
        }
        match self.link.accept(features) {
            Ok(()) => {}
            // The link ended before the driver started.
            Err(error) if is_disconnected(&error) => self.disconnect(queues),
            Err(error) => {
                return Err(DeviceError::new(format!("the link refused the driver's features: {error}")));
            }
        }
        self.features = features;
        self.buffers.are_merged = has(feature::MRG_RXBUF);
        self.watcher = Some(watcher.clone());
        Ok(())
    }

    fn serve(&mut self, event: Event, queues: &mut Queues) -> Result<(), DeviceError> {
        let is_for = |wait: Wait| match event {
            Event::Doorbell => wait.is_for_doorbell(),
            Event::Ready(..) => wait == Wait::Link,
            Event::Deadline => wait.until().is_some(),
        };
        if matches!(event, Event::Ready(..)) && self.link.flush().is_err() {
            self.disconnect(queues);
        }
        if is_for(self.tx.wait) {
            self.transmit(queues)?;
        }
        if is_for(self.rx.wait) {
            self.receive(queues)?;
        }
        self.watch()
    }

    fn deadline(&self) -> Option<Instant> {
        self.rx.wait.until().into_iter().chain(self.tx.wait.until()).min()
    }

    fn reset(&mut self) {
        self.unwatch();
        self.buffers.clear();
        self.frame = None;
        self.link.release();
        (self.rx.wait, self.tx.wait) = (Wait::Driver, Wait::Driver);
        if self.watcher.take().is_some() {
            // Until the next driver accepts offloads, the host performs them in software.
            let _ = self.link.accept(0);
        }
    }
}
