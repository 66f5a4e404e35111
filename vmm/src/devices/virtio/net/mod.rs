//! Network card (section 5.1): frames between the guest and a tap device or passt of the host.
//!
//! Each direction is in one of a few states: it waits for the driver, for the host, for its rate limiter or for
//! its next turn, and only what it waits for wakes it up. A frame from the host goes straight into the driver's
//! buffers where these have room for any frame, and by way of a buffer of the link's where they have not.

mod header;
mod nowhere;
mod passt;
#[cfg(any(test, fuzzing))]
mod sockets;
mod tap;
#[cfg(test)]
mod tests;

use super::rate_limiter::RateLimiter;
use super::vectored::SEGMENTS_MAX;
use super::{Broken, Chain, Device, Event, Queues, Segment, Watcher};
use crate::config::ConfigError;
use crate::config::devices::{MacAddress, NetworkInterface};
use crate::timeline::Instant;
use header::Header;
use nowhere::Nowhere;
use passt::Passt;
use rustix::event::epoll::EventFlags;
use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
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

    /// Takes the next frame from the host, into guest memory if all frames fit there. None is held.
    fn receive(&mut self, room: &[Segment]) -> io::Result<Received>;

    /// The frame that it holds until it is released.
    fn held(&self) -> Option<(Header, &[u8])>;

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

/// What became of a frame from the host.
#[derive(Debug)]
enum Received {
    /// It lies in guest memory behind the place for its header, and has so many bytes.
    Straight(Header, usize),
    /// The link holds it.
    Held,
    /// It was of no use.
    Dropped,
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

/// Buffers of the driver that were taken, in order.
#[derive(Debug, Default)]
struct Buffers {
    /// Those that have no frame yet.
    chains: VecDeque<Chain>,
    /// Bytes that they have room for.
    room: u64,
    /// Those that have, with the bytes of it; empty but for a moment.
    full: Vec<(Chain, u32)>,
}

impl Buffers {
    fn push(&mut self, chain: Chain) {
        self.room += chain.writable_len();
        self.chains.push_back(chain);
    }

    /// Puts a frame into the first buffers, which have room for it. Without `bytes` it lies there already.
    fn fill(&mut self, mut header: Header, length: usize, bytes: Option<&[u8]>) -> Result<(), Broken> {
        let mut left = (header::LENGTH + length) as u64;
        let mut room = 0;
        let is_needed = |chain: &&Chain| {
            let is_needed = room < left;
            room += chain.writable_len();
            is_needed
        };
        let count = self.chains.iter().take_while(is_needed).count();
        header.set_buffers(u16::try_from(count).unwrap_or(u16::MAX));
        let mut header = &header.0[..];
        let mut rest = bytes.unwrap_or_default();
        for mut chain in self.chains.drain(..count) {
            let room = chain.writable_len();
            self.room -= room;
            let taken = room.min(left);
            left -= taken;
            chain.write(header)?;
            let count = usize::try_from(taken).unwrap_or(usize::MAX) - header.len();
            let (part, others) = rest.split_at(count.min(rest.len()));
            chain.write(part)?;
            (header, rest) = (&[], others);
            self.full.push((chain, u32::try_from(taken).unwrap_or(u32::MAX)));
        }
        Ok(())
    }

    fn clear(&mut self) {
        *self = Self::default();
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
    buffers: Buffers,
    /// Scratch space: where the next frame may go.
    segments: Vec<Segment>,
    watcher: Option<Watcher>,
    /// What the link is watched for.
    watched: EventFlags,
}

impl Net {
    /// Attaches to the tap device of an interface, or starts passt.
    ///
    /// # Errors
    /// What is wrong with it, and what to do.
    pub(crate) fn open(interface: &NetworkInterface) -> Result<(Self, Option<Starting>), ConfigError> {
        let wrong = |what| ConfigError::InterfaceDevice { name: interface.host_dev_name.clone(), what };
        if interface.is_user() {
            let (passt, starting) = Passt::start(interface).map_err(wrong)?;
            return Ok((Self::new(Box::new(passt), interface), Some(starting)));
        }
        let tap = Tap::open(&interface.host_dev_name).map_err(wrong)?;
        Ok((Self::new(Box::new(tap), interface), None))
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
            segments: Vec::new(),
            watcher: None,
            watched: EventFlags::empty(),
        }
    }

    const fn has(&self, feature: u64) -> bool {
        self.features & feature != 0
    }

    /// Moves frames to the driver until it has to wait.
    fn receive(&mut self, queues: &mut Queues) -> Result<(), Broken> {
        self.rx.wait = self.receive_frames(queues)?;
        queues.notify(RX)
    }

    fn receive_frames(&mut self, queues: &mut Queues) -> Result<Wait, Broken> {
        for _ in 0..BUDGET {
            if self.link.held().is_some() && !self.deliver_held(queues)? {
                return Ok(Wait::Driver);
            }
            if !self.is_up {
                return Ok(Wait::Driver);
            }
            if let Err(until) = self.rx.limiter.ready() {
                return Ok(Wait::Limiter(until));
            }
            if !self.gather(FRAME_MAX, queues)? && self.buffers.chains.is_empty() {
                if queues.rearm(RX)? {
                    continue;
                }
                return Ok(Wait::Driver);
            }
            self.list_room();
            match self.link.receive(&self.segments) {
                Ok(Received::Straight(header, length)) => {
                    self.rx.limiter.charge(length as u64);
                    self.deliver_straight(header, length, queues)?;
                }
                Ok(Received::Held) => {
                    let length = self.link.held().map_or(0, |(_, frame)| frame.len());
                    self.rx.limiter.charge(length as u64);
                }
                Ok(Received::Dropped) => self.rx.dropped += 1,
                Err(error) if is_to_be_repeated(&error) => return Ok(Wait::Link),
                Err(_) => self.disconnect(queues),
            }
        }
        queues.yield_turn();
        Ok(Wait::Turn)
    }

    /// Takes buffers until a frame of so many bytes fits; `false` when the driver has too few.
    fn gather(&mut self, length: usize, queues: &mut Queues) -> Result<bool, Broken> {
        while !self.has_room(length) {
            let Some(chain) = queues.pop(RX)? else { return Ok(false) };
            if chain.writable_len() < header::LENGTH as u64 {
                return Err(Broken::because("a buffer has no room for a packet's header"));
            }
            self.buffers.push(chain);
        }
        Ok(true)
    }

    /// Whether the buffers that were taken are enough for a frame. Without merging it has one, whatever its size.
    fn has_room(&self, length: usize) -> bool {
        if self.has(feature::MRG_RXBUF) {
            self.buffers.room >= (header::LENGTH + length) as u64
        } else {
            !self.buffers.chains.is_empty()
        }
    }

    /// Lists where the next frame may go, behind its header.
    fn list_room(&mut self) {
        self.segments.clear();
        let count = if self.has(feature::MRG_RXBUF) { self.buffers.chains.len() } else { 1 };
        let mut header = header::LENGTH;
        let mut room = 0_usize;
        for segment in self.buffers.chains.iter().take(count).flat_map(Chain::writable) {
            if room >= FRAME_MAX || self.segments.len() >= SEGMENTS_MAX {
                return;
            }
            let mut segment = *segment;
            let skipped = header.min(segment.len());
            segment.skip(skipped);
            header -= skipped;
            room = room.saturating_add(segment.len());
            if !segment.is_empty() {
                self.segments.push(segment);
            }
        }
    }

    /// Gives a frame to the driver that is in its memory already.
    fn deliver_straight(&mut self, header: Header, length: usize, queues: &mut Queues) -> Result<(), Broken> {
        let Some(header) = header.for_driver(self.features) else {
            self.rx.dropped += 1;
            return Ok(());
        };
        self.buffers.fill(header, length, None)?;
        queues.complete_together(RX, self.buffers.full.drain(..))
    }

    /// Gives the frame to the driver that the link holds, or drops it; `false` when that has to wait for buffers.
    fn deliver_held(&mut self, queues: &mut Queues) -> Result<bool, Broken> {
        let length = self.link.held().map_or(0, |(_, frame)| frame.len());
        while !self.gather(length, queues)? {
            // Where the driver has given all that it can, more will not come.
            if self.buffers.chains.len() >= queues.size(RX) {
                break;
            }
            if !queues.rearm(RX)? {
                return Ok(false);
            }
        }
        let merges = self.has(feature::MRG_RXBUF);
        let first = self.buffers.chains.front().map_or(0, Chain::writable_len);
        let room = if merges { self.buffers.room } else { first };
        let frame =
            self.link.held().and_then(|(header, frame)| Some((header.for_driver(self.features)?, frame)));
        match frame {
            Some((header, frame)) if room >= (header::LENGTH + length) as u64 => {
                self.buffers.fill(header, length, Some(frame))?;
            }
            _ => self.rx.dropped += 1,
        }
        self.link.release();
        queues.complete_together(RX, self.buffers.full.drain(..))?;
        Ok(true)
    }

    /// Moves frames to the host until it has to wait.
    fn transmit(&mut self, queues: &mut Queues) -> Result<(), Broken> {
        self.tx.wait = self.transmit_frames(queues)?;
        queues.notify(TX)
    }

    fn transmit_frames(&mut self, queues: &mut Queues) -> Result<Wait, Broken> {
        for _ in 0..BUDGET {
            let Some(mut chain) = queues.pop(TX)? else {
                if queues.rearm(TX)? {
                    continue;
                }
                return Ok(Wait::Driver);
            };
            if let Err(until) = self.tx.limiter.ready() {
                queues.put_back(TX, chain);
                return Ok(Wait::Limiter(until));
            }
            let length = chain.readable_len().saturating_sub(header::LENGTH as u64);
            match self.send(&mut chain, length) {
                Err(error) if is_to_be_repeated(&error) => {
                    queues.put_back(TX, chain);
                    return Ok(Wait::Link);
                }
                Ok(()) => {}
                Err(error) => {
                    self.tx.dropped += 1;
                    if is_end(&error) {
                        self.disconnect(queues);
                    }
                }
            }
            self.tx.limiter.charge(length);
            queues.complete(TX, chain, 0)?;
        }
        queues.yield_turn();
        Ok(Wait::Turn)
    }

    fn send(&mut self, chain: &mut Chain, length: u64) -> io::Result<()> {
        if !self.is_up {
            return Err(io::ErrorKind::NotConnected.into());
        }
        if !(header::ETHERNET as u64..=FRAME_MAX as u64).contains(&length) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.link.send(chain)
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
        self.segments.clear();
        (self.rx.wait, self.tx.wait) = (Wait::Driver, Wait::Driver);
        if self.watcher.take().is_some() {
            // From now on the host does for the guest what its driver does not say that it can.
            let _ = self.link.accept(0);
        }
    }
}
