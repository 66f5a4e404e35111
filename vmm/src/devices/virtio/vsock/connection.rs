//! A connection: a Unix socket of the host, a socket of the guest, and the pending packets for the guest.
//!
//! No packets are queued for the guest. Pending control packets are represented by a flag each, and data stays in the
//! Unix socket until the guest has a receive chain and credit for it. Data from the guest is written to the Unix socket
//! immediately; only what the socket does not accept is buffered, which the guest's credit limits.

use super::buffers::{Batch, Buffer, DataChain};
use super::packet::{HEADER_LEN, HOST_CID, Header, STREAM, op, shutdown};
use super::{BUDGET, BUDGET_BYTES, RX, next_chain};
use crate::devices::virtio::queue::fill;
use crate::devices::virtio::stream::{is_full, receive, send};
use crate::devices::virtio::{Chain, DeviceError, Queues, Segment, Watcher};
use rustix::event::epoll::EventFlags;
use rustix::net::SendFlags;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

/// Maximum number of chains that one read from the Unix socket fills. Linux provides chains of just under 4 KiB, so
/// that this is about 64 KiB.
const CHAINS_MAX: usize = 16;

/// The two ports that identify a connection, as there is only one guest and one host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Ports {
    pub(super) host: u32,
    pub(super) guest: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The guest has not answered the request yet.
    Requested,
    Established,
    /// The guest has closed the connection, and buffered data remains to be written.
    Draining,
}

/// The state of a connection after an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// The connection is open.
    Open,
    /// The connection has failed, and the guest is to be sent a reset.
    Reset,
    /// The guest has closed the connection; `answer` is whether it expects a reset in reply.
    GuestClosed { answer: bool },
    /// The connection is closed completely.
    Closed,
}

/// The result of an attempt to send packets to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SendResult {
    /// The guest has no receive chain available.
    NoChain,
    /// Number of packets sent, and the state of the connection.
    Sent(usize, Outcome),
}

#[derive(Debug)]
pub(super) struct Connection {
    pub(super) ports: Ports,
    /// Whether the connection is in the queue of those with packets for the guest.
    pub(super) is_queued: bool,
    stream: UnixStream,
    state: State,

    // From the guest to the host.
    buffer: Buffer,
    /// Number of the guest's bytes that were written to the Unix socket (`fwd_cnt`).
    forwarded: u32,
    /// The value of `forwarded` that the guest was sent last.
    reported_forwarded: u32,
    /// The directions that the guest has shut down, in flags of [`shutdown`].
    guest_shutdown: u32,
    /// Whether the Unix socket does not accept data any more; data of the guest is discarded.
    discards_output: bool,
    watches_output: bool,

    // From the host to the guest.
    /// Number of bytes sent to the guest.
    sent: u32,
    guest_buf_alloc: u32,
    guest_fwd_cnt: u32,
    /// Whether the Unix socket may have data.
    is_readable: bool,
    /// Whether the event of the end of the stream may have been consumed, so that a short read does not imply that the
    /// next event reports more.
    may_end: bool,
    /// Whether the Unix socket has reached the end of the stream.
    is_at_end: bool,
    /// Whether the program has closed the Unix socket, or both directions of it have ended.
    is_closed: bool,
    /// Number of chains for the next read.
    next_chains: usize,

    // Pending packets for the guest.
    /// The first packet: [`op::REQUEST`] or [`op::RESPONSE`].
    opening: Option<u16>,
    has_credit_update: bool,
    /// Whether the guest has had credit since the last credit request.
    may_request_credit: bool,
    /// Whether a credit request has not been answered.
    awaits_credit: bool,
    /// Whether the guest sends credit updates without a request.
    updates_credit_unasked: bool,
    reported_shutdown: u32,
}

impl Connection {
    /// A program of the host requests a port of the guest. `buf_alloc` is the size of the buffer for data of the guest.
    pub(super) const fn requested(stream: UnixStream, ports: Ports, buf_alloc: u32) -> Self {
        Self {
            ports,
            is_queued: false,
            stream,
            state: State::Requested,
            buffer: Buffer::new(buf_alloc),
            forwarded: 0,
            reported_forwarded: 0,
            guest_shutdown: 0,
            discards_output: false,
            watches_output: false,
            sent: 0,
            guest_buf_alloc: 0,
            guest_fwd_cnt: 0,
            // The program may have sent data after its request.
            is_readable: true,
            may_end: true,
            is_at_end: false,
            is_closed: false,
            next_chains: 1,
            opening: Some(op::REQUEST),
            has_credit_update: false,
            may_request_credit: true,
            awaits_credit: false,
            updates_credit_unasked: false,
            reported_shutdown: 0,
        }
    }

    /// A program of the host has accepted the guest's request.
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

    /// Size of the buffer for data of the guest in bytes.
    pub(super) const fn buf_alloc(&self) -> u32 {
        self.buffer.size()
    }

    /// The events of the Unix socket. Edge-triggered, so that data that waits for the guest does not cause repeated
    /// events.
    pub(super) const EVENTS: EventFlags = EventFlags::IN.union(EventFlags::RDHUP).union(EventFlags::ET);

    // From the guest.

    /// Handles a packet of the guest for this connection; the header of `chain` has been read.
    pub(super) fn handle(
        &mut self,
        id: u32,
        header: &Header,
        chain: &mut Chain,
        watcher: &Watcher,
    ) -> Outcome {
        self.guest_buf_alloc = header.buf_alloc;
        self.guest_fwd_cnt = header.fwd_cnt;
        if header.op == op::CREDIT_UPDATE {
            self.updates_credit_unasked |= !std::mem::take(&mut self.awaits_credit);
        }
        self.may_request_credit |= self.credit() > 0;
        match (header.op, self.state) {
            (op::RST, _) => return Outcome::GuestClosed { answer: false },
            (op::RESPONSE, State::Requested) if self.opening.is_none() => {
                self.state = State::Established;
                let line = format!("OK {}\n", self.ports.host);
                if !self.write(line.as_bytes()) {
                    return Outcome::Reset;
                }
            }
            (_, State::Requested) => return Outcome::Reset,
            (op::RW, _) if self.guest_shutdown & shutdown::SEND == 0 => {
                return self.forward(id, header.len, chain, watcher);
            }
            (op::SHUTDOWN, _) => return self.shut_down(header.flags),
            (op::CREDIT_UPDATE, _) => {}
            (op::CREDIT_REQUEST, _) => self.has_credit_update = true,
            _ => return Outcome::Reset,
        }
        Outcome::Open
    }

    fn forward(&mut self, id: u32, length: u32, chain: &mut Chain, watcher: &Watcher) -> Outcome {
        let length = length as usize;
        if length > self.buffer.space() {
            return Outcome::Reset;
        }
        chain.limit_readable(length);
        let mut written = 0;
        if self.buffer.is_empty() && !self.discards_output {
            match send(&self.stream, chain.readable()) {
                Ok(count) => written = count,
                Err(error) if is_full(&error) => {}
                Err(_) => self.discards_output = true,
            }
        }
        if self.discards_output {
            written = length;
        } else if written < length {
            chain.skip(written);
            if self.buffer.append(chain, length - written).is_err() {
                return Outcome::Reset;
            }
            self.watch_output(id, true, watcher);
        }
        self.forwarded(written);
        Outcome::Open
    }

    fn forwarded(&mut self, count: usize) {
        // The count is modulo 2^32 by the specification.
        #[expect(clippy::cast_possible_truncation, reason = "counts of one call are below 2^32")]
        let count = count as u32;
        self.forwarded = self.forwarded.wrapping_add(count);
        // The update is delayed, and sent early enough that the guest always has at least half of its credit.
        self.has_credit_update |=
            self.forwarded.wrapping_sub(self.reported_forwarded) >= self.buf_alloc() / 2;
    }

    fn shut_down(&mut self, flags: u32) -> Outcome {
        let flags = flags & shutdown::BOTH & !self.guest_shutdown;
        self.guest_shutdown |= flags;
        if self.guest_shutdown == shutdown::BOTH {
            return Outcome::GuestClosed { answer: true };
        }
        // shutdown(2) fails for a socket whose peer is closed, which needs no notification.
        if flags & shutdown::RECEIVE != 0 {
            let _ = self.stream.shutdown(Shutdown::Read);
        }
        if flags & shutdown::SEND != 0 && self.buffer.is_empty() {
            let _ = self.stream.shutdown(Shutdown::Write);
        }
        Outcome::Open
    }

    /// The guest has closed the connection; returns whether buffered data remains to be written.
    pub(super) fn drain(&mut self) -> bool {
        self.state = State::Draining;
        !self.buffer.is_empty()
    }

    // From the host.

    /// Handles an event of the Unix socket.
    pub(super) fn serve(&mut self, id: u32, flags: EventFlags, watcher: &Watcher) -> Outcome {
        if flags.intersects(EventFlags::HUP | EventFlags::ERR) {
            self.is_closed = true;
            self.discard_output();
        }
        self.is_readable |= flags.intersects(EventFlags::IN | EventFlags::RDHUP | EventFlags::HUP);
        self.may_end |= flags.intersects(EventFlags::RDHUP | EventFlags::HUP);
        if flags.intersects(EventFlags::OUT) {
            self.flush(id, watcher);
        }
        if self.state == State::Draining && self.buffer.is_empty() { Outcome::Closed } else { Outcome::Open }
    }

    fn flush(&mut self, id: u32, watcher: &Watcher) {
        while !self.buffer.is_empty() {
            let bytes = self.buffer.bytes();
            let count =
                match rustix::net::send(&self.stream, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                    Ok(count) => count,
                    Err(rustix::io::Errno::INTR) => continue,
                    Err(error) if is_full(&error.into()) => {
                        // Without memory there is space in the socket, so that the event must be requested again.
                        let _ = watcher.modify(&self.stream, id, Self::EVENTS | EventFlags::OUT);
                        return;
                    }
                    Err(_) => return self.discard_output(),
                };
            self.buffer.consume(count);
            self.forwarded(count);
        }
        self.watch_output(id, false, watcher);
        if self.guest_shutdown & shutdown::SEND != 0 {
            let _ = self.stream.shutdown(Shutdown::Write);
        }
    }

    /// Discards all data of the guest from now on.
    fn discard_output(&mut self) {
        self.discards_output = true;
        let lost = self.buffer.len();
        self.buffer.consume(lost);
        self.forwarded(lost);
    }

    /// Writes a line to a socket whose buffer has space for it. Returns whether it was written.
    fn write(&self, line: &[u8]) -> bool {
        let sent = rustix::net::send(&self.stream, line, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
        sent == Ok(line.len())
    }

    fn watch_output(&mut self, id: u32, wanted: bool, watcher: &Watcher) {
        if self.watches_output != wanted {
            let more = if wanted { EventFlags::OUT } else { EventFlags::empty() };
            // This fails only for a descriptor that is not watched.
            let _ = watcher.modify(&self.stream, id, Self::EVENTS | more);
            self.watches_output = wanted;
        }
    }

    // To the guest.

    /// Whether a packet for the guest is pending.
    pub(super) fn has_packets(&self) -> bool {
        self.opening.is_some()
            || self.has_credit_update && self.state == State::Established
            || self.unreported_shutdown() != 0
            || self.can_read() && (self.credit() > 0 || self.should_request_credit())
    }

    fn can_read(&self) -> bool {
        self.is_readable
            && !self.is_at_end
            && self.state == State::Established
            && self.guest_shutdown & shutdown::RECEIVE == 0
    }

    /// The number of bytes that the guest has space for. A guest that reports a wrong value harms only itself.
    const fn credit(&self) -> u32 {
        self.guest_buf_alloc.saturating_sub(self.sent.wrapping_sub(self.guest_fwd_cnt))
    }

    /// Whether to request credit from a guest without space. Not from a guest that sends updates without a request: it
    /// would answer every request immediately with the little space that its program has freed since.
    const fn should_request_credit(&self) -> bool {
        self.may_request_credit && !self.updates_credit_unasked
    }

    /// The directions that have ended on the host and have not been reported to the guest.
    fn unreported_shutdown(&self) -> u32 {
        if self.state != State::Established {
            return 0;
        }
        let is_at_end = self.is_at_end || self.is_closed && self.guest_shutdown & shutdown::RECEIVE != 0;
        let send = if is_at_end { shutdown::SEND } else { 0 };
        let receive = if self.discards_output { shutdown::RECEIVE } else { 0 };
        (send | receive) & !self.reported_shutdown
    }

    /// Sends the next pending packets to the guest.
    pub(super) fn send_next(
        &mut self,
        queues: &mut Queues,
        guest_cid: u64,
        batch: &mut Batch,
    ) -> Result<SendResult, DeviceError> {
        let Some(chain) = next_chain(queues)? else { return Ok(SendResult::NoChain) };
        if let Some(opening) = self.opening.take() {
            return self.send_control(queues, chain, guest_cid, opening, 0);
        }
        if self.can_read() {
            if self.credit() > 0 {
                match self.send_data(queues, chain, guest_cid, batch) {
                    Err(Unsent::Nothing) => return self.send_next(queues, guest_cid, batch),
                    Err(Unsent::Failed) => return Ok(SendResult::Sent(0, Outcome::Reset)),
                    Err(Unsent::DeviceError(error)) => return Err(error),
                    Ok(count) => return Ok(SendResult::Sent(count, Outcome::Open)),
                }
            }
            if self.should_request_credit() {
                (self.may_request_credit, self.awaits_credit) = (false, true);
                return self.send_control(queues, chain, guest_cid, op::CREDIT_REQUEST, 0);
            }
        }
        let ended = self.unreported_shutdown();
        if ended != 0 {
            self.reported_shutdown |= ended;
            return self.send_control(queues, chain, guest_cid, op::SHUTDOWN, self.reported_shutdown);
        }
        if self.has_credit_update {
            return self.send_control(queues, chain, guest_cid, op::CREDIT_UPDATE, 0);
        }
        queues.undo_pop(RX, chain);
        Ok(SendResult::Sent(0, Outcome::Open))
    }

    fn send_control(
        &mut self,
        queues: &mut Queues,
        mut chain: Chain,
        guest_cid: u64,
        op: u16,
        flags: u32,
    ) -> Result<SendResult, DeviceError> {
        chain.write(&self.header(guest_cid, op, flags, 0).to_bytes())?;
        queues.complete(RX, chain, HEADER_LEN)?;
        // After a shutdown of both directions no packets follow.
        let is_over = self.reported_shutdown == shutdown::BOTH;
        Ok(SendResult::Sent(1, if is_over { Outcome::Closed } else { Outcome::Open }))
    }

    /// A header with the current credit of the guest.
    const fn header(&mut self, guest_cid: u64, op: u16, flags: u32, len: u32) -> Header {
        self.reported_forwarded = self.forwarded;
        self.has_credit_update = false;
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

    /// Reads from the Unix socket into as many chains as it is likely to fill; returns the number of packets as the
    /// budget counts them.
    fn send_data(
        &mut self,
        queues: &mut Queues,
        first: Chain,
        guest_cid: u64,
        batch: &mut Batch,
    ) -> Result<usize, Unsent> {
        // A program that writes as fast as this reads could otherwise keep one read busy for the complete credit.
        let credit = (self.credit() as usize).min(BUDGET_BYTES);
        let space = batch.gather(queues, first, self.next_chains, credit)?;
        let mut left = match self.receive(space, &batch.segments) {
            Ok(bytes) => bytes,
            Err(unsent) => {
                batch.return_unused(0, queues);
                return Err(unsent);
            }
        };
        batch.return_unused(left, queues);
        let packets = batch.chains.len().max(left / (BUDGET_BYTES / BUDGET));
        for DataChain { chain, header, space } in batch.chains.drain(..) {
            #[expect(clippy::cast_possible_truncation, reason = "one read gives less than 2^31 bytes")]
            let bytes = left.min(space) as u32;
            left -= bytes as usize;
            self.sent = self.sent.wrapping_add(bytes);
            fill(header, &self.header(guest_cid, op::RW, 0, bytes).to_bytes());
            queues.complete(RX, chain, HEADER_LEN + bytes)?;
        }
        Ok(packets)
    }

    /// Reads into segments with `space` bytes in total; returns the number of bytes, at least 1.
    fn receive(&mut self, space: usize, segments: &[Segment]) -> Result<usize, Unsent> {
        match receive(&self.stream, segments) {
            Ok(received) => {
                let is_full = received.bytes == space;
                self.is_readable = is_full || self.may_end || received.had_descriptors;
                self.next_chains = if is_full { CHAINS_MAX.min(self.next_chains * 2) } else { 1 };
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

/// The reason why no data was sent to the guest.
enum Unsent {
    /// No data is available.
    Nothing,
    /// The Unix socket failed: its program has closed it without reading all data.
    Failed,
    /// The driver violated the specification.
    DeviceError(DeviceError),
}

impl From<DeviceError> for Unsent {
    fn from(error: DeviceError) -> Self {
        Self::DeviceError(error)
    }
}
