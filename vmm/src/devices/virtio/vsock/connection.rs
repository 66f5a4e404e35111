//! One connection: a Unix socket of the host, a socket of the guest, and what each still has to be told.
//!
//! Nothing is queued for the guest. What it has to be told is a state, a flag each, and data waits in the Unix
//! socket until the guest has a chain and room for it. What the guest sends goes to the Unix socket at once; only
//! what that does not take is kept, which is bounded by the credit that the guest was given.

use super::buffers::{Batch, Buffer, Receiver};
use super::packet::{HEADER_LEN, HOST_CID, Header, STREAM, op, shutdown};
use super::{BUDGET, BUDGET_BYTES, RX, next_chain};
use crate::devices::virtio::queue::fill;
use crate::devices::virtio::stream::{receive, send};
use crate::devices::virtio::{Broken, Chain, Queues, Segment, Watcher};
use rustix::event::epoll::EventFlags;
use rustix::net::SendFlags;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

/// Chains that one read from the Unix socket fills at most. Linux gives chains of less than 4 KiB, so that this is
/// about 64 KiB.
const CHAINS_MAX: usize = 16;

/// The two ports that name a connection, as there is only one guest and one host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Ports {
    pub(super) host: u32,
    pub(super) guest: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The guest has not answered yet.
    Requested,
    Established,
    /// The guest is done with it, and what it sent before is still to be written.
    Draining,
}

/// What an event made of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum After {
    /// It goes on.
    Open,
    /// It cannot go on, which the guest is to be told.
    Reset,
    /// The guest is done with it, and is to be told that the host is as well, where it asks.
    GuestEnded { answer: bool },
    /// Nothing is left of it.
    Gone,
}

/// What became of a turn to send the guest something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// The guest has no chain for it.
    NoChain,
    /// So many packets were sent.
    Sent(usize, After),
}

#[derive(Debug)]
pub(super) struct Connection {
    pub(super) ports: Ports,
    /// Whether it waits for its turn to send something.
    pub(super) is_queued: bool,
    stream: UnixStream,
    state: State,

    // From the guest to the host.
    buffer: Buffer,
    /// Bytes of the guest that were written on (`fwd_cnt`).
    forwarded: u32,
    /// What the guest knows of them.
    told_forwarded: u32,
    /// What the guest takes no more, or sends no more, in flags of [`shutdown`].
    guest_shutdown: u32,
    /// Nobody reads what is written into the Unix socket.
    is_deaf: bool,
    watches_output: bool,

    // From the host to the guest.
    /// Bytes that were sent to the guest.
    sent: u32,
    guest_buf_alloc: u32,
    guest_fwd_cnt: u32,
    /// The Unix socket may have something to read.
    is_readable: bool,
    /// The event of the Unix socket's end may have come already, so that a read that finds less than it has room for
    /// is not the last one.
    may_end: bool,
    /// The Unix socket has reached its end.
    is_at_end: bool,
    /// The program has closed the Unix socket, or both directions of it have ended.
    is_closed: bool,
    /// Chains that the next read is to fill.
    appetite: usize,

    // What the guest has to be told.
    /// The first packet: [`op::REQUEST`] or [`op::RESPONSE`].
    opening: Option<u16>,
    owes_credit: bool,
    /// The guest had room since it was asked for some.
    may_ask: bool,
    /// It was asked and has not answered.
    awaits_credit: bool,
    /// It has told of room without being asked.
    offers_credit: bool,
    told_shutdown: u32,
}

impl Connection {
    /// A program of the host asks for a port of the guest. So many bytes are kept for the program at most.
    pub(super) const fn requested(stream: UnixStream, ports: Ports, buf_alloc: u32) -> Self {
        Self {
            ports,
            is_queued: false,
            stream,
            state: State::Requested,
            buffer: Buffer::new(buf_alloc),
            forwarded: 0,
            told_forwarded: 0,
            guest_shutdown: 0,
            is_deaf: false,
            watches_output: false,
            sent: 0,
            guest_buf_alloc: 0,
            guest_fwd_cnt: 0,
            // It may have sent something behind its request.
            is_readable: true,
            may_end: true,
            is_at_end: false,
            is_closed: false,
            appetite: 1,
            opening: Some(op::REQUEST),
            owes_credit: false,
            may_ask: true,
            awaits_credit: false,
            offers_credit: false,
            told_shutdown: 0,
        }
    }

    /// The guest's request has reached a program of the host.
    pub(super) fn accepted(stream: UnixStream, request: &Header, buf_alloc: u32) -> Self {
        let ports = Ports { host: request.dst_port, guest: request.src_port };
        Self {
            state: State::Established,
            opening: Some(op::RESPONSE),
            guest_buf_alloc: request.buf_alloc,
            guest_fwd_cnt: request.fwd_cnt,
            ..Self::requested(stream, ports, buf_alloc)
        }
    }

    /// Bytes that are kept for its Unix socket at most.
    pub(super) const fn buf_alloc(&self) -> u32 {
        self.buffer.size()
    }

    /// Events that its socket is watched for. Once each, so that data that has to wait for the guest does not
    /// call again and again.
    pub(super) const EVENTS: EventFlags = EventFlags::IN.union(EventFlags::RDHUP).union(EventFlags::ET);

    // From the guest.

    /// A packet of the guest that is this connection's; `chain` is behind its header.
    pub(super) fn handle(&mut self, id: u32, header: &Header, chain: &mut Chain, watcher: &Watcher) -> After {
        self.guest_buf_alloc = header.buf_alloc;
        self.guest_fwd_cnt = header.fwd_cnt;
        if header.op == op::CREDIT_UPDATE {
            self.offers_credit |= !std::mem::take(&mut self.awaits_credit);
        }
        self.may_ask |= self.credit() > 0;
        match (header.op, self.state) {
            (op::RST, _) => return After::GuestEnded { answer: false },
            (op::RESPONSE, State::Requested) if self.opening.is_none() => {
                self.state = State::Established;
                let line = format!("OK {}\n", self.ports.host);
                self.write(line.as_bytes());
            }
            (_, State::Requested) => return After::Reset,
            (op::RW, _) if self.guest_shutdown & shutdown::SEND == 0 => {
                return self.forward(id, header.len, chain, watcher);
            }
            (op::SHUTDOWN, _) => return self.shut_down(header.flags),
            (op::CREDIT_UPDATE, _) => {}
            (op::CREDIT_REQUEST, _) => self.owes_credit = true,
            _ => return After::Reset,
        }
        After::Open
    }

    fn forward(&mut self, id: u32, length: u32, chain: &mut Chain, watcher: &Watcher) -> After {
        let length = length as usize;
        if length > self.buffer.room() {
            return After::Reset;
        }
        chain.limit_readable(length);
        let mut written = 0;
        if self.buffer.is_empty() && !self.is_deaf {
            match send(&self.stream, chain.readable()) {
                Ok(count) => written = count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => self.is_deaf = true,
            }
        }
        if self.is_deaf {
            written = length;
        } else if written < length {
            chain.skip(written);
            if self.buffer.append(chain, length - written).is_err() {
                return After::Reset;
            }
            self.watch_output(id, true, watcher);
        }
        self.forwarded(written);
        After::Open
    }

    fn forwarded(&mut self, count: usize) {
        // A count modulo 2^32 by the specification.
        #[expect(clippy::cast_possible_truncation, reason = "counts of one call are below 2^32")]
        let count = count as u32;
        self.forwarded = self.forwarded.wrapping_add(count);
        // The guest learns late that bytes were written on, and always has half its credit.
        self.owes_credit |= self.forwarded.wrapping_sub(self.told_forwarded) >= self.buf_alloc() / 2;
    }

    fn shut_down(&mut self, flags: u32) -> After {
        let flags = flags & shutdown::BOTH & !self.guest_shutdown;
        self.guest_shutdown |= flags;
        if self.guest_shutdown == shutdown::BOTH {
            return After::GuestEnded { answer: true };
        }
        // A socket that its other end has closed refuses, and has nothing to be told any more.
        if flags & shutdown::RECEIVE != 0 {
            let _ = self.stream.shutdown(Shutdown::Read);
        }
        if flags & shutdown::SEND != 0 && self.buffer.is_empty() {
            let _ = self.stream.shutdown(Shutdown::Write);
        }
        After::Open
    }

    /// The guest is done with it; whether it has to stay until what the guest sent is written.
    pub(super) fn drain(&mut self) -> bool {
        self.state = State::Draining;
        !self.buffer.is_empty()
    }

    // From the host.

    /// Its socket is ready.
    pub(super) fn serve(&mut self, id: u32, flags: EventFlags, watcher: &Watcher) -> After {
        if flags.intersects(EventFlags::HUP | EventFlags::ERR) {
            self.is_closed = true;
            self.lose_reader();
        }
        self.is_readable |= flags.intersects(EventFlags::IN | EventFlags::RDHUP | EventFlags::HUP);
        self.may_end |= flags.intersects(EventFlags::RDHUP | EventFlags::HUP);
        if flags.intersects(EventFlags::OUT) {
            self.flush(id, watcher);
        }
        if self.state == State::Draining && self.buffer.is_empty() { After::Gone } else { After::Open }
    }

    fn flush(&mut self, id: u32, watcher: &Watcher) {
        while !self.buffer.is_empty() {
            let bytes = self.buffer.bytes();
            let count =
                match rustix::net::send(&self.stream, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                    Ok(count) => count,
                    Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => return,
                    Err(_) => return self.lose_reader(),
                };
            self.buffer.consume(count);
            self.forwarded(count);
        }
        self.watch_output(id, false, watcher);
        if self.guest_shutdown & shutdown::SEND != 0 {
            let _ = self.stream.shutdown(Shutdown::Write);
        }
    }

    /// What the guest sends goes nowhere from now on.
    fn lose_reader(&mut self) {
        self.is_deaf = true;
        let lost = self.buffer.len();
        self.buffer.consume(lost);
        self.forwarded(lost);
    }

    /// Writes a line into a socket that has room for it.
    fn write(&mut self, line: &[u8]) {
        let sent = rustix::net::send(&self.stream, line, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
        self.is_deaf |= sent != Ok(line.len());
    }

    fn watch_output(&mut self, id: u32, wanted: bool, watcher: &Watcher) {
        if self.watches_output != wanted {
            let more = if wanted { EventFlags::OUT } else { EventFlags::empty() };
            // It is being watched.
            let _ = watcher.modify(&self.stream, id, Self::EVENTS | more);
            self.watches_output = wanted;
        }
    }

    // To the guest.

    /// Whether there is something to send to the guest.
    pub(super) fn wants_turn(&self) -> bool {
        self.opening.is_some()
            || self.owes_credit && self.state == State::Established
            || self.shutdown_to_tell() != 0
            || self.can_read() && (self.credit() > 0 || self.has_to_ask())
    }

    fn can_read(&self) -> bool {
        self.is_readable
            && !self.is_at_end
            && self.state == State::Established
            && self.guest_shutdown & shutdown::RECEIVE == 0
    }

    /// Bytes that the guest has room for. What it says about that can hurt nobody but itself.
    const fn credit(&self) -> u32 {
        self.guest_buf_alloc.saturating_sub(self.sent.wrapping_sub(self.guest_fwd_cnt))
    }

    /// Whether the guest, which has no room left, is to be asked for some. A guest that tells of room by itself is
    /// not: it would answer at once, as often as it is asked, with what little its program has read meanwhile.
    const fn has_to_ask(&self) -> bool {
        self.may_ask && !self.offers_credit
    }

    /// What has ended on the host's side and the guest does not know.
    fn shutdown_to_tell(&self) -> u32 {
        if self.state != State::Established {
            return 0;
        }
        let is_at_end = self.is_at_end || self.is_closed && self.guest_shutdown & shutdown::RECEIVE != 0;
        let send = if is_at_end { shutdown::SEND } else { 0 };
        let receive = if self.is_deaf { shutdown::RECEIVE } else { 0 };
        (send | receive) & !self.told_shutdown
    }

    /// Sends the guest what is due next.
    pub(super) fn send_next(
        &mut self,
        queues: &mut Queues,
        guest_cid: u64,
        batch: &mut Batch,
    ) -> Result<Turn, Broken> {
        let Some(chain) = next_chain(queues)? else { return Ok(Turn::NoChain) };
        if let Some(opening) = self.opening.take() {
            return self.send_control(queues, chain, guest_cid, opening, 0);
        }
        if self.can_read() {
            if self.credit() > 0 {
                match self.send_data(queues, chain, guest_cid, batch) {
                    Err(Unsent::Nothing) => return self.send_next(queues, guest_cid, batch),
                    Err(Unsent::Failed) => return Ok(Turn::Sent(0, After::Reset)),
                    Err(Unsent::Broken(broken)) => return Err(broken),
                    Ok(count) => return Ok(Turn::Sent(count, After::Open)),
                }
            }
            if self.has_to_ask() {
                (self.may_ask, self.awaits_credit) = (false, true);
                return self.send_control(queues, chain, guest_cid, op::CREDIT_REQUEST, 0);
            }
        }
        let news = self.shutdown_to_tell();
        if news != 0 {
            self.told_shutdown |= news;
            return self.send_control(queues, chain, guest_cid, op::SHUTDOWN, self.told_shutdown);
        }
        if self.owes_credit {
            return self.send_control(queues, chain, guest_cid, op::CREDIT_UPDATE, 0);
        }
        queues.put_back(RX, chain);
        Ok(Turn::Sent(0, After::Open))
    }

    fn send_control(
        &mut self,
        queues: &mut Queues,
        mut chain: Chain,
        guest_cid: u64,
        op: u16,
        flags: u32,
    ) -> Result<Turn, Broken> {
        chain.write(&self.header(guest_cid, op, flags, 0).to_bytes())?;
        queues.complete(RX, chain, HEADER_LEN)?;
        // Who neither sends nor takes anything has nothing to say either.
        let is_over = self.told_shutdown == shutdown::BOTH;
        Ok(Turn::Sent(1, if is_over { After::Gone } else { After::Open }))
    }

    /// A header that tells the guest of its credit.
    const fn header(&mut self, guest_cid: u64, op: u16, flags: u32, len: u32) -> Header {
        self.told_forwarded = self.forwarded;
        self.owes_credit = false;
        Header {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: self.ports.host,
            dst_port: self.ports.guest,
            len,
            kind: STREAM,
            op,
            flags,
            buf_alloc: self.buf_alloc(),
            fwd_cnt: self.forwarded,
        }
    }

    /// Reads from the Unix socket into as many chains as it is likely to fill; the number of packets, as the budget
    /// counts them.
    fn send_data(
        &mut self,
        queues: &mut Queues,
        first: Chain,
        guest_cid: u64,
        batch: &mut Batch,
    ) -> Result<usize, Unsent> {
        // A program that writes as fast as this reads would keep one read going for as long as there is room.
        let credit = (self.credit() as usize).min(BUDGET_BYTES);
        let room = batch.gather(queues, first, self.appetite, credit)?;
        let mut left = match self.receive(room, &batch.pieces) {
            Ok(bytes) => bytes,
            Err(unsent) => {
                batch.put_back_behind(0, queues);
                return Err(unsent);
            }
        };
        batch.put_back_behind(left, queues);
        let packets = batch.chains.len().max(left / (BUDGET_BYTES / BUDGET));
        for Receiver { chain, header, room } in batch.chains.drain(..) {
            #[expect(clippy::cast_possible_truncation, reason = "one read gives less than 2^31 bytes")]
            let bytes = left.min(room) as u32;
            left -= bytes as usize;
            self.sent = self.sent.wrapping_add(bytes);
            fill(header, &self.header(guest_cid, op::RW, 0, bytes).to_bytes());
            queues.complete(RX, chain, HEADER_LEN + bytes)?;
        }
        Ok(packets)
    }

    /// Reads into pieces with this room; never no bytes.
    fn receive(&mut self, room: usize, pieces: &[Segment]) -> Result<usize, Unsent> {
        match receive(&self.stream, pieces) {
            Ok(received) => {
                let is_full = received.bytes == room;
                self.is_readable = is_full || self.may_end || received.had_descriptors;
                self.appetite = if is_full { CHAINS_MAX.min(self.appetite * 2) } else { 1 };
                self.is_at_end = received.bytes == 0;
                if self.is_at_end { Err(Unsent::Nothing) } else { Ok(received.bytes) }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                (self.is_readable, self.may_end) = (false, false);
                Err(Unsent::Nothing)
            }
            Err(_) => Err(Unsent::Failed),
        }
    }
}

/// Why no data was sent to the guest.
enum Unsent {
    /// There is none.
    Nothing,
    /// The Unix socket failed: its program left without reading all that it was sent.
    Failed,
    /// The driver broke a rule.
    Broken(Broken),
}

impl From<Broken> for Unsent {
    fn from(broken: Broken) -> Self {
        Self::Broken(broken)
    }
}
