//! Socket device (section 5.10): streams between sockets of the guest and Unix sockets of the host.
//!
//! Here is who is connected with whom; [`connection`] is what happens on a connection and [`host`] how programs of
//! the host come to one.

mod buffers;
mod connection;
mod host;
mod packet;
#[cfg(test)]
mod tests;

use super::{Broken, Chain, Device, Event, Queues, Watcher};
use crate::config::ConfigError;
use crate::config::devices::Vsock as Config;
use crate::timeline::Instant;
use buffers::{BUF_ALLOC, BUF_ALLOC_SMALL, Batch, LARGE_MAX};
use connection::{After, Connection, Ports, Turn};
use host::Asked;
pub(crate) use host::Listener;
use packet::{HEADER_LEN, HEADER_SIZE, HOST_CID, Header, STREAM, op};
use rustix::event::epoll::EventFlags;
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::unix::net::UnixStream;

const KIND: u32 = 19;
const RX: usize = 0;
const TX: usize = 1;
/// Linux fills the whole receive queue with chains of 4 KiB of its memory when it boots, and the queue of events,
/// which nothing is sent on yet, with as many of 8 bytes. With 256 receive chains that took 0.2 ms longer (exact lab).
const QUEUE_SIZES: &[u16] = &[64, 256, 8];

/// Connections at a time, with programs of the host that have not asked for a port yet.
const CONNECTIONS_MAX: usize = 1024;
/// Answers that wait for the guest to have a chain for them. With as many no packet of the guest is looked at
/// (section 5.10.6.1: this stops a side that neglects its queue). Each connection may add one.
const RESETS_MAX: usize = 256;
/// Packets in either direction before others have their turn, and their bytes. Sending counts packets that are longer
/// than Linux's as several.
const BUDGET: usize = 256;
const BUDGET_BYTES: usize = 1 << 20;
/// Programs that are accepted before others have their turn.
const ACCEPT_BUDGET: usize = 16;

/// Nanoseconds after which a host is asked again that had no descriptor or memory left.
const RETRY: u64 = 100_000_000;

/// The token of the listening socket; those of connections and programs follow.
const LISTENER: u32 = 0;
const LAST_ID: u32 = u32::MAX >> 1;
/// The first port of the host that is given to a program; those below are ones that guests ask for.
const FIRST_PORT: u32 = 1 << 30;
const LAST_PORT: u32 = u32::MAX >> 1;

/// The socket device.
#[derive(Debug)]
pub struct Vsock {
    guest_cid: u64,
    listener: Listener,
    /// Programs of the host that have not asked for a port yet.
    programs: BTreeMap<u32, UnixStream>,
    connections: BTreeMap<u32, Connection>,
    by_ports: BTreeMap<Ports, u32>,
    /// Connections that have something to send to the guest, each once.
    queue: VecDeque<u32>,
    /// Answers to packets of connections that there are not.
    resets: VecDeque<Header>,
    next_id: u32,
    next_port: u32,
    batch: Batch,
    watcher: Option<Watcher>,
    /// The listening socket is not watched.
    is_deferred: bool,
    /// When it is watched again, where the host had no descriptor or memory left.
    resume_at: Option<Instant>,
}

impl Vsock {
    /// Makes the socket of a configuration.
    ///
    /// # Errors
    /// When its path is taken or cannot be had.
    pub fn open(config: &Config) -> Result<Self, ConfigError> {
        Ok(Self::with(config, Listener::bind(&config.uds_path)?))
    }

    /// The same device with nobody at the other end, for a kernel that is booted once for many.
    ///
    /// # Errors
    /// When the host has no sockets left.
    pub fn blank(config: &Config) -> io::Result<Self> {
        Ok(Self::with(config, Listener::nowhere()?))
    }

    /// The device with the socket at which programs of the host ask for ports.
    pub(crate) fn with(config: &Config, listener: Listener) -> Self {
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
        }
    }

    fn is_full(&self) -> bool {
        self.connections.len() + self.programs.len() >= CONNECTIONS_MAX
    }

    /// Bytes that are kept for the next connection at most.
    fn buf_alloc(&self) -> u32 {
        let large = self.connections.values().filter(|connection| connection.buf_alloc() == BUF_ALLOC);
        if large.count() < LARGE_MAX { BUF_ALLOC } else { BUF_ALLOC_SMALL }
    }

    /// A number that no connection and no program has.
    fn take_id(&mut self) -> u32 {
        loop {
            let id = self.next_id;
            self.next_id = if id == LAST_ID { LISTENER + 1 } else { id + 1 };
            if !self.connections.contains_key(&id) && !self.programs.contains_key(&id) {
                return id;
            }
        }
    }

    /// A port of the host that has no connection to this port of the guest.
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
                // Closing it tells its program that there is no connection.
                Ok(Some(_)) => {}
                Ok(None) => return,
                Err(error) => {
                    // The program waits, and the event would come again at once and for ever.
                    watcher.remove(&self.listener);
                    self.is_deferred = true;
                    if host::is_short(&error) {
                        self.resume_at = Some(later());
                    }
                    return;
                }
            }
        }
    }

    /// A program of the host has something to say, or a connection of its can go on.
    fn serve_socket(&mut self, id: u32, flags: EventFlags) {
        let Some(watcher) = &self.watcher else { return };
        if let Some(connection) = self.connections.get_mut(&id) {
            let after = connection.serve(id, flags, watcher);
            return self.settle(id, after);
        }
        let Some(socket) = self.programs.get(&id) else { return };
        let asked = host::read_request(socket);
        // One that has stopped sending will not complete its line.
        if asked == Asked::NotYet && !flags.intersects(EventFlags::RDHUP | EventFlags::HUP) {
            return;
        }
        let Some(socket) = self.programs.remove(&id) else { return };
        match asked {
            Asked::Port(port) => {
                let ports = self.take_ports(port);
                self.insert(id, Connection::requested(socket, ports, self.buf_alloc()));
            }
            _ => self.accept_again(),
        }
    }

    /// A descriptor has become free, or may have.
    fn accept_again(&mut self) {
        if let Some(watcher) = self.watcher.as_ref().filter(|_| self.is_deferred) {
            self.is_deferred = watcher.add(&self.listener, LISTENER, EventFlags::IN).is_err();
            self.resume_at = self.is_deferred.then(later);
        }
    }

    // From the guest.

    /// Takes packets of the guest.
    fn take_packets(&mut self, queues: &mut Queues) -> Result<(), Broken> {
        let mut bytes = 0;
        for _ in 0..BUDGET {
            if bytes >= BUDGET_BYTES {
                break;
            }
            if self.resets.len() >= RESETS_MAX {
                return Ok(());
            }
            let Some(mut chain) = queues.pop(TX)? else {
                if queues.rearm(TX)? {
                    continue;
                }
                return Ok(());
            };
            let mut header = [0; HEADER_SIZE];
            chain.read(&mut header)?;
            let header = Header::from_bytes(&header);
            if u64::from(header.len) > chain.readable_len() {
                return Err(Broken::because("a packet is longer than its chain"));
            }
            bytes += header.len as usize;
            self.take_packet(&header, &mut chain);
            queues.complete(TX, chain, 0)?;
        }
        queues.yield_turn();
        Ok(())
    }

    fn take_packet(&mut self, header: &Header, chain: &mut Chain) {
        let Some(watcher) = &self.watcher else { return };
        if header.src_cid != self.guest_cid {
            // An answer would have to go to somebody else.
            return;
        }
        let ports = Ports { host: header.dst_port, guest: header.src_port };
        let is_ours = header.dst_cid == HOST_CID && header.kind == STREAM;
        let id = self.by_ports.get(&ports).copied().filter(|_| is_ours);
        if let Some((id, connection)) = id.and_then(|id| Some((id, self.connections.get_mut(&id)?))) {
            let after = connection.handle(id, header, chain, watcher);
            return self.settle(id, after);
        }
        if header.op != op::REQUEST || !is_ours || !self.connect(header) {
            self.refuse(header);
        }
    }

    /// Connects the guest with a program of the host, if one listens.
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

    /// Answers that there is no such connection; an answer itself has none.
    fn refuse(&mut self, header: &Header) {
        if header.op != op::RST {
            self.resets.push_back(header.reset());
        }
    }

    // To the guest.

    /// Sends the guest what there is for it.
    fn send_packets(&mut self, queues: &mut Queues) -> Result<(), Broken> {
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
                Turn::NoChain => return Ok(()),
                Turn::Sent(packets, after) => {
                    sent += packets.max(1);
                    connection.is_queued = false;
                    self.queue.pop_front();
                    self.settle(id, after);
                }
            }
        }
        queues.yield_turn();
        Ok(())
    }

    // Both.

    fn insert(&mut self, id: u32, connection: Connection) {
        self.by_ports.insert(connection.ports, id);
        self.connections.insert(id, connection);
        self.settle(id, After::Open);
    }

    /// Draws the consequences of what happened on a connection.
    fn settle(&mut self, id: u32, after: After) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let ports = connection.ports;
        let has_ended = match after {
            After::Open => false,
            After::Gone | After::Reset => true,
            After::GuestEnded { .. } => {
                // Its ports are free for another one from now on.
                self.by_ports.remove(&ports);
                !connection.drain()
            }
        };
        if matches!(after, After::Reset | After::GuestEnded { answer: true }) {
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
            self.accept_again();
        } else if !connection.is_queued && connection.wants_turn() {
            connection.is_queued = true;
            self.queue.push_back(id);
        }
    }
}

/// When the host is asked again.
fn later() -> Instant {
    Instant(Instant::now().0.saturating_add(RETRY))
}

/// The next chain for a packet to the guest. Where there is none, the guest rings when it has made some.
fn next_chain(queues: &mut Queues) -> Result<Option<Chain>, Broken> {
    match queues.pop(RX)? {
        None if queues.rearm(RX)? => queues.pop(RX),
        other => Ok(other),
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

    fn activate(&mut self, _: u64, _: &mut Queues, watcher: &Watcher) -> Result<(), Broken> {
        self.watcher = Some(watcher.clone());
        self.is_deferred = true;
        // Programs that came before the guest was ready are waiting.
        self.accept_again();
        Ok(())
    }

    fn serve(&mut self, event: Event, queues: &mut Queues) -> Result<(), Broken> {
        match event {
            Event::Ready(LISTENER, _) => self.accept(),
            Event::Ready(id, flags) => self.serve_socket(id, flags),
            Event::Doorbell => self.take_packets(queues)?,
            Event::Deadline => self.accept_again(),
        }
        let was_held_up = self.resets.len() >= RESETS_MAX;
        self.send_packets(queues)?;
        if was_held_up && self.resets.len() < RESETS_MAX {
            queues.yield_turn();
        }
        queues.notify(TX)?;
        queues.notify(RX)
    }

    fn deadline(&self) -> Option<Instant> {
        self.resume_at
    }

    fn reset(&mut self) {
        self.resume_at = None;
        if let Some(watcher) = self.watcher.take() {
            watcher.remove(&self.listener);
        }
        self.programs.clear();
        self.connections.clear();
        self.by_ports.clear();
        self.queue.clear();
        self.resets.clear();
        // It holds chains where one of them broke the device.
        self.batch = Batch::default();
    }

    fn end(&mut self) {
        self.reset();
        self.listener.close();
    }
}
