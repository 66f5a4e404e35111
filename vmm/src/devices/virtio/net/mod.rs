//! Network card (section 5.1): frames between the guest and a tap device or passt of the host.
//!
//! Each direction is in one of a few states: it waits for the driver, for the host, for its rate limiter or for
//! its next turn, and only what it waits for wakes it up.

mod buffers;
mod header;
mod nowhere;
mod passt;
mod ports;
mod receive;
#[cfg(any(test, fuzzing))]
mod sockets;
mod tap;
#[cfg(test)]
mod tests;
mod transmit;

use super::rate_limiter::RateLimiter;
use super::{Broken, Chain, Device, Event, Queues, Segment, Watcher};
use crate::config::ConfigError;
use crate::config::devices::{MacAddress, NetworkInterface};
use crate::timeline::Instant;
use buffers::{Buffers, Frame, Room};
use nowhere::Nowhere;
use passt::Passt;
use receive::Expectation;
use rustix::event::epoll::EventFlags;
use std::fmt;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use tap::Tap;

pub(crate) use passt::Starting;

const KIND: u32 = 1;
const RX: usize = 0;
const TX: usize = 1;
const QUEUE_SIZE: u16 = 256;
/// Frames that are moved in each direction before others have their turn.
const BUDGET: usize = 64;
/// The token of the link among this device's events.
const LINK: u32 = 0;

/// Bytes of the largest frame without its header: the largest IP packet behind an Ethernet header with the number
/// of a VLAN. Section 5.1.6.3.1 asks drivers for about as much room.
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
    /// What a driver may accept only together with `GUEST_CSUM` (section 5.1.3.1).
    pub(super) const GUEST_SEGMENTATION: u64 = GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | GUEST_UFO;
    /// And with `CSUM`.
    pub(super) const HOST_SEGMENTATION: u64 = HOST_TSO4 | HOST_TSO6 | HOST_ECN | HOST_UFO;
}

/// The other end of the card. Everything it does is done at once or fails with `WouldBlock`.
trait Link: Send + fmt::Debug {
    /// Offloads that it can do beside filling in checksums.
    fn features(&self) -> u64;

    /// Works with a driver that has accepted these.
    fn accept(&mut self, features: u64) -> io::Result<()>;

    /// Readable when there is a frame, writable when there is room for one.
    fn fd(&self) -> BorrowedFd<'_>;

    /// Takes the next frame from the host, into guest memory as far as there is room; none where it was of no use.
    fn receive(&mut self, room: &Room) -> io::Result<Option<Frame>>;

    /// The bytes of the frame that were not placed, until it is released.
    fn rest(&self) -> &[u8];

    /// The frame that was taken last is done with.
    fn release(&mut self);

    /// Sends a frame. `WouldBlock` when it has to be sent again, as the whole chain.
    fn send(&mut self, chain: &mut Chain) -> io::Result<()>;

    /// Whether a part of a frame is left to send, when there is room for it.
    fn has_unsent(&self) -> bool {
        false
    }

    /// Sends as much of it as there is room for.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What a direction waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wait {
    /// Buffers or frames of the driver.
    Driver,
    /// The host.
    Link,
    /// Its rate limiter.
    Limiter(Instant),
    /// Its next turn.
    Turn,
}

impl Wait {
    /// Whether it ends with the doorbell.
    const fn is_for_doorbell(self) -> bool {
        matches!(self, Self::Driver | Self::Turn)
    }

    const fn until(self) -> Option<Instant> {
        match self {
            Self::Limiter(until) => Some(until),
            _ => None,
        }
    }
}

/// One direction.
#[derive(Debug)]
struct Direction {
    limiter: RateLimiter,
    wait: Wait,
    /// Frames that went nowhere.
    dropped: u64,
}

impl Direction {
    fn new(limiter: Option<&crate::config::devices::RateLimiter>) -> Self {
        Self { limiter: RateLimiter::new(limiter, Instant::now()), wait: Wait::Driver, dropped: 0 }
    }
}

/// A network card.
#[derive(Debug)]
pub struct Net {
    link: Box<dyn Link>,
    /// Whether the link is still there.
    is_up: bool,
    mac: MacAddress,
    mtu: Option<u16>,
    features: u64,
    rx: Direction,
    tx: Direction,
    /// For frames from the host.
    buffers: Buffers,
    /// The frame that the driver gets next.
    frame: Option<Frame>,
    expectation: Expectation,
    /// Scratch space: where the next frame may go.
    room: Room,
    watcher: Option<Watcher>,
    /// What the link is watched for.
    watched: EventFlags,
}

impl Net {
    /// Attaches to the tap device of an interface, or starts passt: the descriptor of the card's other end.
    ///
    /// # Errors
    /// What is wrong with it, and what to do.
    pub(crate) fn open_link(
        interface: &NetworkInterface,
    ) -> Result<(OwnedFd, Option<Starting>), ConfigError> {
        let wrong = |what| ConfigError::InterfaceDevice { name: interface.host_dev_name.clone(), what };
        if interface.is_user() {
            let (socket, starting) = Passt::start(interface).map_err(wrong)?;
            return Ok((socket, Some(starting)));
        }
        Ok((Tap::open(&interface.host_dev_name).map_err(wrong)?, None))
    }

    /// The card with this other end.
    pub(crate) fn with_link(interface: &NetworkInterface, link: OwnedFd) -> Self {
        let link: Box<dyn Link> = if interface.is_user() {
            Box::new(Passt::connected(link))
        } else {
            Box::new(Tap::attached(link))
        };
        Self::new(link, interface)
    }

    /// A card that leads nowhere, for a kernel that is booted once for many guests: to its driver it is the same.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub(crate) fn blank(interface: &NetworkInterface) -> io::Result<Self> {
        let features = if interface.is_user() { passt::FEATURES } else { tap::features() };
        Ok(Self::new(Box::new(Nowhere::new(features)?), interface))
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
            expectation: Expectation::default(),
            room: Room::default(),
            watcher: None,
            watched: EventFlags::empty(),
        }
    }

    /// The link has gone: the tap device was removed, or passt ended. The driver sees a card without its cable.
    fn disconnect(&mut self, queues: &mut Queues) {
        if !self.is_up {
            return;
        }
        self.is_up = false;
        self.unwatch();
        queues.set_configuration(&self.configuration());
        // What waits for the link would wait for ever.
        if self.tx.wait == Wait::Link {
            self.tx.wait = Wait::Turn;
            queues.yield_turn();
        }
    }

    /// Watches the link for exactly what somebody waits for.
    fn watch(&mut self) -> Result<(), Broken> {
        let Some(watcher) = self.watcher.as_ref().filter(|_| self.is_up) else { return Ok(()) };
        let mut wanted = EventFlags::empty();
        wanted.set(EventFlags::IN, self.rx.wait == Wait::Link);
        wanted.set(EventFlags::OUT, self.tx.wait == Wait::Link || self.link.has_unsent());
        if wanted == self.watched {
            return Ok(());
        }
        // Not masked but removed: a link that has gone is reported even where nothing is asked for.
        let result = match (self.watched.is_empty(), wanted.is_empty()) {
            (true, _) => watcher.add(self.link.fd(), LINK, wanted),
            (false, false) => watcher.modify(self.link.fd(), LINK, wanted),
            (false, true) => {
                watcher.remove(self.link.fd());
                Ok(())
            }
        };
        self.watched = wanted;
        result.map_err(|error| Broken::because(format!("the host cannot watch the link: {error}")))
    }

    fn unwatch(&mut self) {
        if let Some(watcher) = self.watcher.as_ref().filter(|_| !self.watched.is_empty()) {
            watcher.remove(self.link.fd());
        }
        self.watched = EventFlags::empty();
    }
}

fn is_to_be_repeated(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

/// Whether a link that failed so when it was written is not there any more.
fn is_end(error: &io::Error) -> bool {
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
        // struct virtio_net_config (section 5.1.4): address, status, pairs of queues, MTU.
        let mut bytes = self.mac.0.to_vec();
        bytes.extend(u16::from(self.is_up).to_le_bytes());
        bytes.extend(1_u16.to_le_bytes());
        bytes.extend(self.mtu.unwrap_or(0).to_le_bytes());
        bytes
    }

    fn activate(&mut self, features: u64, queues: &mut Queues, watcher: &Watcher) -> Result<(), Broken> {
        let has = |feature| features & feature != 0;
        if has(feature::GUEST_SEGMENTATION) && !has(feature::GUEST_CSUM)
            || has(feature::HOST_SEGMENTATION) && !has(feature::CSUM)
        {
            return Err(Broken::because("segmentation was accepted without checksums"));
        }
        match self.link.accept(features) {
            Ok(()) => {}
            // It went before the guest came.
            Err(error) if is_end(&error) => self.disconnect(queues),
            Err(error) => {
                return Err(Broken::because(format!("the link refused the driver's features: {error}")));
            }
        }
        self.features = features;
        self.buffers.are_merged = has(feature::MRG_RXBUF);
        self.watcher = Some(watcher.clone());
        Ok(())
    }

    fn serve(&mut self, event: Event, queues: &mut Queues) -> Result<(), Broken> {
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
            // From now on the host does for the guest what its driver does not say that it can.
            let _ = self.link.accept(0);
        }
    }
}
