//! Socket device (section 5.10): stream connections between sockets of the guest and Unix sockets of the host.
//!
//! This module manages the set of connections. [`connection`] implements a connection, and [`host`] the Unix sockets
//! through which connections are made.

mod buffers;
mod connection;
pub(super) mod host;
mod packet;
#[cfg(test)]
mod tests;

use super::backend::{Attach, Backend};
use super::{BackendError, Chain, Device, DeviceError, Event, Queues, Watcher};
use crate::config::devices::Vsock as Config;
use crate::timeline::Instant;
use buffers::{BUF_ALLOC, BUF_ALLOC_SMALL, Batch, LARGE_MAX};
use connection::{Connection, Outcome, Ports, SendResult};
use host::{Listener, PortRequest};
use packet::{HEADER_LEN, HEADER_SIZE, HOST_CID, Header, STREAM, op};
use rustix::event::epoll::EventFlags;
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::unix::net::UnixStream;
use vm_memory::GuestAddress;

const KIND: u32 = 19;
const RX: usize = 0;
const TX: usize = 1;
const EVENTS: usize = 2;
/// Linux fills the whole receive queue with buffers of 4 KiB when it boots, and the event queue with buffers of 4 bytes. With
/// 256 receive buffers that took 0.2 ms longer (exact lab).
const QUEUE_SIZES: &[u16] = &[64, 256, 8];
/// The event `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET` (section 5.10.6.7): the driver closes all connections.
const TRANSPORT_RESET: u32 = 0;
/// Length of an event in bytes.
const EVENT_LEN: u32 = 4;

/// Maximum number of connections, including programs of the host that have not requested a port yet.
const CONNECTIONS_MAX: usize = 1024;
/// Number of queued resets at which the device stops processing packets of the guest until the guest provides receive
/// buffers (section 5.10.6.1 allows this when the other side neglects its queue). Each connection may add one more.
const RESETS_MAX: usize = 256;
/// Maximum number of packets in each direction per call, and of their bytes. When sending, packets longer than those of
/// Linux count as several.
const BUDGET: usize = 256;
const BUDGET_BYTES: usize = 1 << 20;
/// Maximum number of accepted programs per call.
const ACCEPT_BUDGET: usize = 16;

/// Nanoseconds after which accept(2) is retried when the host has no file descriptor or memory.
const RETRY: u64 = 100_000_000;

/// The token of the listening socket among the device's events; those of connections and programs follow.
const LISTENER: u32 = 0;
const LAST_ID: u32 = u32::MAX >> 1;
/// The first host port that is assigned to a program; guests connect to ports below.
const FIRST_PORT: u32 = 1 << 30;
const LAST_PORT: u32 = u32::MAX >> 1;

/// A virtio socket device.
#[derive(Debug)]
pub struct Vsock {
    guest_cid: u64,
    listener: Listener,
    /// Programs of the host that have not requested a port yet, by their token.
    programs: BTreeMap<u32, UnixStream>,
    connections: BTreeMap<u32, Connection>,
    by_ports: BTreeMap<Ports, u32>,
    /// Connections with packets for the guest; each occurs once.
    queue: VecDeque<u32>,
    /// Resets in reply to packets of unknown connections.
    resets: VecDeque<Header>,
    next_id: u32,
    next_port: u32,
    batch: Batch,
    watcher: Option<Watcher>,
    /// Whether the listening socket is not being watched.
    is_deferred: bool,
    /// Time at which it is watched again, after the host had no file descriptor or memory.
    resume_at: Option<Instant>,
    /// Whether the driver has had connections.
    has_peers: bool,
    reset: TransportReset,
}

/// The progress of the reset of connections that another device had, of which this one has continued the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TransportReset {
    /// No reset is necessary, or the driver has closed its connections.
    Done,
    /// The driver is to be told.
    Pending,
    /// The driver has been told. Until it has closed its connections, programs of the host have to wait: theirs would be
    /// closed too.
    Sent,
}

impl Vsock {
    /// Creates the device and its Unix socket at the configured path.
    ///
    /// # Errors
    /// When the path is in use, or the socket cannot be created there.
    #[cfg(any(test, fuzzing))]
    pub fn open(config: &Config) -> Result<Self, BackendError> {
        Ok(Self::with(config, Listener::bind(&config.uds_path)?))
    }

    /// Creates a placeholder, with which a kernel is pre-booted: a device without a reachable Unix socket.
    ///
    /// # Errors
    /// When the process has no file descriptor left.
    pub fn placeholder(config: &Config) -> io::Result<Self> {
        Ok(Self::with(config, Listener::placeholder()?))
    }

    /// Creates the device with the socket through which programs of the host connect.
    fn with(config: &Config, listener: Listener) -> Self {
        Self {
            guest_cid: config.guest_cid.into(),
            listener,
            programs: BTreeMap::new(),
            connections: BTreeMap::new(),
            by_ports: BTreeMap::new(),
            queue: VecDeque::new(),
            resets: VecDeque::new(),
            next_id: LISTENER + 1,
            next_port: FIRST_PORT,
            batch: Batch::default(),
            watcher: None,
            is_deferred: false,
            resume_at: None,
            has_peers: false,
            reset: TransportReset::Done,
        }
    }

    fn is_full(&self) -> bool {
        self.connections.len() + self.programs.len() >= CONNECTIONS_MAX
    }

    /// The buffer size of the next connection.
    fn buf_alloc(&self) -> u32 {
        let large = self.connections.values().filter(|connection| connection.buf_alloc() == BUF_ALLOC);
        if large.count() < LARGE_MAX { BUF_ALLOC } else { BUF_ALLOC_SMALL }
    }

    /// A token that no connection and no program uses.
    fn take_id(&mut self) -> u32 {
        loop {
            let id = self.next_id;
            self.next_id = if id == LAST_ID { LISTENER + 1 } else { id + 1 };
            if !self.connections.contains_key(&id) && !self.programs.contains_key(&id) {
                return id;
            }
        }
    }

    /// A free host port for a connection to this port of the guest.
    fn take_ports(&mut self, guest: u32) -> Ports {
        loop {
            let host = self.next_port;
            self.next_port = if host == LAST_PORT { FIRST_PORT } else { host + 1 };
            let ports = Ports { host, guest };
            if !self.by_ports.contains_key(&ports) {
                return ports;
            }
        }
    }

    // From the host.

    fn accept(&mut self) {
        let Some(watcher) = self.watcher.clone() else { return };
        for _ in 0..ACCEPT_BUDGET {
            match self.listener.accept() {
                Ok(Some(socket)) if !self.is_full() => {
                    let id = self.take_id();
                    if watcher.add(&socket, id, Connection::EVENTS).is_ok() {
                        self.programs.insert(id, socket);
                    }
                }
                // Dropping the socket closes it, which the program sees as a refused connection.
                Ok(Some(_)) => {}
                Ok(None) => return,
                Err(error) => {
                    // The program stays in the backlog, and the level-triggered event would repeat forever.
                    watcher.remove(&self.listener);
                    self.is_deferred = true;
                    if host::is_temporary(&error) {
                        self.resume_at = Some(retry_time());
                    }
                    return;
                }
            }
        }
    }

    /// Handles an event of the socket of a program or connection.
    fn serve_socket(&mut self, id: u32, flags: EventFlags) {
        let Some(watcher) = &self.watcher else { return };
        if let Some(connection) = self.connections.get_mut(&id) {
            let outcome = connection.serve(id, flags, watcher);
            return self.apply_outcome(id, outcome);
        }
        let Some(socket) = self.programs.get(&id) else { return };
        let asked = host::read_request(socket);
        // After the end of the stream the line will not be completed.
        if asked == PortRequest::Incomplete && !flags.intersects(EventFlags::RDHUP | EventFlags::HUP) {
            return;
        }
        let Some(socket) = self.programs.remove(&id) else { return };
        match asked {
            PortRequest::Port(port) => {
                let ports = self.take_ports(port);
                self.insert(id, Connection::requested(socket, ports, self.buf_alloc()));
            }
            _ => self.resume_accept(),
        }
    }

    /// Watches the listening socket again, because a file descriptor may have become free.
    fn resume_accept(&mut self) {
        let is_possible = self.is_deferred && self.reset == TransportReset::Done;
        if let Some(watcher) = self.watcher.as_ref().filter(|_| is_possible) {
            self.is_deferred = watcher.add(&self.listener, LISTENER, EventFlags::IN).is_err();
            self.resume_at = self.is_deferred.then(retry_time);
        }
    }

    // From the guest.

    /// Processes packets of the guest.
    fn take_packets(&mut self, queues: &mut Queues) -> Result<(), DeviceError> {
        let mut bytes = 0;
        for _ in 0..BUDGET {
            if bytes >= BUDGET_BYTES {
                break;
            }
            if self.resets.len() >= RESETS_MAX {
                return Ok(());
            }
            let Some(mut chain) = queues.pop(TX)? else {
                if queues.enable_notification(TX)? {
                    continue;
                }
                return Ok(());
            };
            let mut header = [0; HEADER_SIZE];
            chain.read(&mut header)?;
            let header = Header::from_bytes(&header);
            if u64::from(header.len) > chain.readable_len() {
                return Err(DeviceError::new("a packet is longer than its chain"));
            }
            bytes += header.len as usize;
            self.take_packet(&header, &mut chain);
            queues.complete(TX, chain, 0)?;
        }
        queues.reschedule();
        Ok(())
    }

    fn take_packet(&mut self, header: &Header, chain: &mut Chain) {
        let Some(watcher) = &self.watcher else { return };
        if header.src_cid != self.guest_cid {
            // A reply would be addressed to another guest.
            return;
        }
        let ports = Ports { host: header.dst_port, guest: header.src_port };
        let is_ours = header.dst_cid == HOST_CID && header.kind == STREAM;
        let id = self.by_ports.get(&ports).copied().filter(|_| is_ours);
        if let Some((id, connection)) = id.and_then(|id| Some((id, self.connections.get_mut(&id)?))) {
            let outcome = connection.handle(id, header, chain, watcher);
            return self.apply_outcome(id, outcome);
        }
        if header.op != op::REQUEST || !is_ours || !self.connect(header) {
            self.refuse(header);
        }
    }

    /// Connects the guest to a program of the host; `false` when none listens.
    fn connect(&mut self, request: &Header) -> bool {
        if self.is_full() {
            return false;
        }
        let (Some(watcher), Ok(socket)) = (self.watcher.clone(), self.listener.connect(request.dst_port))
        else {
            return false;
        };
        let id = self.take_id();
        if watcher.add(&socket, id, Connection::EVENTS).is_err() {
            return false;
        }
        self.insert(id, Connection::accepted(socket, request, self.buf_alloc()));
        true
    }

    /// Replies with a reset; a reset itself gets no reply.
    fn refuse(&mut self, header: &Header) {
        if header.op != op::RST {
            self.resets.push_back(header.reset());
        }
    }

    // To the guest.

    /// Tells the driver to close the connections of an earlier device, and waits until it has done so.
    fn reset_connections(&mut self, queues: &mut Queues) -> Result<(), DeviceError> {
        if self.reset == TransportReset::Pending {
            let mut chains = Vec::new();
            while let Some(chain) = queues.pop(EVENTS)? {
                chains.push((chain, 0));
            }
            if let Some((chain, written)) = chains.first_mut() {
                chain.write(&TRANSPORT_RESET.to_le_bytes())?;
                *written = EVENT_LEN;
                // Linux ignores the empty ones. It makes each available again after it has handled those before it
                // (`virtio_transport_event_work` in net/vmw_vsock/virtio_transport.c).
                queues.complete_all(EVENTS, chains)?;
                queues.notify(EVENTS)?;
                self.reset = TransportReset::Sent;
            }
        }
        match (queues.enable_notification(EVENTS)?, self.reset) {
            (true, TransportReset::Sent) => {
                self.reset = TransportReset::Done;
                self.resume_accept();
            }
            (true, _) => queues.reschedule(),
            (false, _) => {}
        }
        Ok(())
    }

    /// Sends pending packets to the guest.
    fn send_packets(&mut self, queues: &mut Queues) -> Result<(), DeviceError> {
        let mut sent = 0;
        while sent < BUDGET {
            if let Some(reset) = self.resets.front() {
                let Some(mut chain) = next_chain(queues)? else { return Ok(()) };
                chain.write(&reset.to_bytes())?;
                queues.complete(RX, chain, HEADER_LEN)?;
                self.resets.pop_front();
                sent += 1;
                continue;
            }
            let Some(&id) = self.queue.front() else { return Ok(()) };
            let Some(connection) = self.connections.get_mut(&id) else {
                self.queue.pop_front();
                continue;
            };
            match connection.send_next(queues, self.guest_cid, &mut self.batch)? {
                SendResult::NoChain => return Ok(()),
                SendResult::Sent(packets, outcome) => {
                    sent += packets.max(1);
                    connection.is_queued = false;
                    self.queue.pop_front();
                    self.apply_outcome(id, outcome);
                }
            }
        }
        queues.reschedule();
        Ok(())
    }

    // Both directions.

    fn insert(&mut self, id: u32, connection: Connection) {
        self.has_peers = true;
        self.by_ports.insert(connection.ports, id);
        self.connections.insert(id, connection);
        self.apply_outcome(id, Outcome::Open);
    }

    /// Applies the result of an event on a connection.
    fn apply_outcome(&mut self, id: u32, outcome: Outcome) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let ports = connection.ports;
        let has_ended = match outcome {
            Outcome::Open => false,
            Outcome::Closed | Outcome::Reset => true,
            Outcome::GuestClosed { .. } => {
                // The ports can be reused from now on.
                self.by_ports.remove(&ports);
                !connection.drain()
            }
        };
        if matches!(outcome, Outcome::Reset | Outcome::GuestClosed { answer: true }) {
            let from_guest = Header {
                src_cid: self.guest_cid,
                dst_cid: HOST_CID,
                src_port: ports.guest,
                dst_port: ports.host,
                kind: STREAM,
                ..Header::default()
            };
            self.resets.push_back(from_guest.reset());
        }
        if has_ended {
            if connection.is_queued {
                self.queue.retain(|&queued| queued != id);
            }
            self.connections.remove(&id);
            if self.by_ports.get(&ports) == Some(&id) {
                self.by_ports.remove(&ports);
            }
            self.resume_accept();
        } else if !connection.is_queued && connection.has_packets() {
            connection.is_queued = true;
            self.queue.push_back(id);
        }
    }
}

/// The time of the next retry.
fn retry_time() -> Instant {
    Instant(Instant::now().0.saturating_add(RETRY))
}

/// The next receive buffer of the guest; without one, enables notifications.
fn next_chain(queues: &mut Queues) -> Result<Option<Chain>, DeviceError> {
    match queues.pop(RX)? {
        None if queues.enable_notification(RX)? => queues.pop(RX),
        other => Ok(other),
    }
}

impl Attach for Config {
    fn open(&self) -> Result<Backend, BackendError> {
        Ok(Backend::Listener(Listener::bind(&self.uds_path)?))
    }

    fn create(&self, backend: Backend, _: GuestAddress) -> Result<Box<dyn Device>, BackendError> {
        match backend {
            Backend::Listener(listener) => Ok(Box::new(Vsock::with(self, listener))),
            Backend::Nothing => {
                let device = Vsock::placeholder(self);
                Ok(Box::new(device.map_err(BackendError::host("create a socket"))?))
            }
            other => Err(other.mismatch()),
        }
    }
}

impl Device for Vsock {
    fn kind(&self) -> u32 {
        KIND
    }

    fn queue_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        // Without VIRTIO_VSOCK_F_SEQPACKET all sockets are streams.
        0
    }

    fn configuration(&self) -> Vec<u8> {
        // struct virtio_vsock_config (section 5.10.4).
        self.guest_cid.to_le_bytes().to_vec()
    }

    fn activate(&mut self, _: u64, queues: &mut Queues, watcher: &Watcher) -> Result<(), DeviceError> {
        self.watcher = Some(watcher.clone());
        if !queues.is_ready(EVENTS) {
            self.reset = TransportReset::Done;
        }
        self.is_deferred = true;
        // Accepts programs that connected before the guest was ready.
        self.resume_accept();
        Ok(())
    }

    fn serve(&mut self, event: Event, queues: &mut Queues) -> Result<(), DeviceError> {
        match event {
            Event::Ready(LISTENER, _) => self.accept(),
            Event::Ready(id, flags) => self.serve_socket(id, flags),
            Event::Doorbell => {
                if self.reset != TransportReset::Done {
                    self.reset_connections(queues)?;
                }
                self.take_packets(queues)?;
            }
            Event::Deadline => self.resume_accept(),
        }
        let was_blocked = self.resets.len() >= RESETS_MAX;
        self.send_packets(queues)?;
        if was_blocked && self.resets.len() < RESETS_MAX {
            queues.reschedule();
        }
        queues.notify(TX)?;
        queues.notify(RX)
    }

    fn peers(&self) -> Option<u32> {
        (self.has_peers || self.reset != TransportReset::Done).then_some(self.next_port)
    }

    fn lose_peers(&mut self, next: u32) {
        self.reset = TransportReset::Pending;
        // The driver may take a while to close a connection, and would reset another one with its ports meanwhile.
        self.next_port = next.clamp(FIRST_PORT, LAST_PORT);
    }

    fn deadline(&self) -> Option<Instant> {
        self.resume_at
    }

    fn reset(&mut self) {
        (self.resume_at, self.has_peers, self.reset) = (None, false, TransportReset::Done);
        if let Some(watcher) = self.watcher.take() {
            watcher.remove(&self.listener);
        }
        self.programs.clear();
        self.connections.clear();
        self.by_ports.clear();
        self.queue.clear();
        self.resets.clear();
        // It contains chains if one of them has failed the device.
        self.batch = Batch::default();
    }

    fn end(&mut self) {
        self.reset();
        self.listener.close();
    }
}
