//! File system device (section 5.11): a folder of the host, served by a separate process.
//!
//! The device only transports FUSE messages (linux/fuse.h): each request is sent to the process over a socket, and each
//! reply is received from it, directly from and to guest memory. The device interprets only the headers: the length of
//! a message, and the request that a reply belongs to. The process has no other access to the guest.
//!
//! The device replaces the request numbers (`unique`) by its own, so that each reply is assigned correctly, even if a
//! driver uses a number twice or was restarted in the meantime.

mod device;
mod host_folder;
pub(super) mod server;
#[cfg(test)]
mod tests;

pub use server::Server;

use super::queue::fill;
use super::stream::{receive, send};
use super::{Chain, DeviceError, Progress, Queues, Segment, Watcher};
use rustix::event::epoll::EventFlags;
use std::collections::BTreeMap;
use std::ops::Range;

const KIND: u32 = 26;
/// The queue of FUSE_FORGET and FUSE_INTERRUPT requests, which have priority over other requests.
const HIPRIO: usize = 0;
const REQUESTS: usize = 1;
/// Linux limits the pages of a request to the number of descriptors in the queue, minus four for headers
/// (`virtio_fs_get_tree` in fs/fuse/virtio_fs.c), and FUSE limits them to 256.
const QUEUE_SIZES: &[u16] = &[64, 256];

/// Bytes of the tag in the configuration space (section 5.11.4).
const TAG_MAX: usize = 36;

/// Bytes of a request header: `struct fuse_in_header`.
const REQUEST_HEADER: usize = 40;
/// Bytes of a reply header: `struct fuse_out_header`.
const REPLY_HEADER: usize = 16;
/// Maximum length of a message in bytes: 1 MiB of data and its headers, which is the limit of the server's library.
const MESSAGE_MAX: usize = (1 << 20) + 4096;
/// `FUSE_INTERRUPT`: the driver requests an immediate reply to another request, whose number is in the body.
const INTERRUPT: u32 = 36;
/// Bytes of a `FUSE_INTERRUPT` request: a header and `struct fuse_interrupt_in`.
const INTERRUPT_LEN: usize = REQUEST_HEADER + 8;
/// `FUSE_FORGET` and `FUSE_BATCH_FORGET`, which have no reply.
const WITHOUT_REPLY: [u32; 2] = [2, 42];
/// The error of all replies after the server has ended: EIO.
const ERROR: i32 = -libc::EIO;

/// Maximum number of requests, or replies, per call, and of their bytes.
const BUDGET: usize = 256;
const BUDGET_BYTES: usize = 1 << 20;
/// Bytes per receive: most replies are shorter. The rest of a longer reply is received directly into guest memory.
const BUFFER: usize = 4096;

/// The token of the server's socket among the device's events.
const SERVER: u32 = 0;

/// A virtio file system device.
#[derive(Debug)]
pub struct SharedFolder {
    tag: String,
    /// The server process; `None` for a placeholder, or after the server has ended.
    server: Option<Server>,
    /// Why the server has ended, until the event loop disconnects it.
    ended: Option<ServerError>,
    /// Why the server has ended.
    failure: Option<String>,
    /// Requests that have been sent to the server, by the device's number. Each occupies a descriptor, so that there
    /// are no more of them than the queues have descriptors.
    pending: BTreeMap<u64, PendingRequest>,
    /// The device's number of the next request.
    next: u64,
    /// The part of the last request that the socket has not accepted yet.
    unsent: Vec<u8>,
    incoming: ReplyStream,
    watcher: Option<Watcher>,
    /// The events that the server's socket is watched for.
    watched: EventFlags,
    /// Segments of the current message; kept to reuse the memory.
    segments: Vec<Segment>,
}

/// A request that waits for its reply.
#[derive(Debug)]
struct PendingRequest {
    queue: usize,
    chain: Chain,
    /// The destination of the reply header, which is written last.
    header: Segment,
    /// The driver's number of the request.
    unique: [u8; 8],
}

/// The state of the stream of replies.
#[derive(Debug)]
struct ReplyStream {
    buffer: Vec<u8>,
    /// The range of `buffer` that has not been processed.
    unread: Range<usize>,
    /// Number of bytes of the current reply that have not been received.
    missing: usize,
    /// The request of the current reply, with the reply header; `None` when the driver has been reset since.
    target: Option<(PendingRequest, [u8; REPLY_HEADER])>,
}

impl ReplyStream {
    fn take(&mut self, count: usize) -> &[u8] {
        let count = count.min(self.unread.len());
        let taken = self.unread.start..self.unread.start + count;
        self.unread.start = taken.end;
        &self.buffer[taken]
    }
}

/// The result of one step of receiving replies.
#[derive(Debug, PartialEq, Eq)]
enum ReceiveStep {
    /// The next step is possible.
    Continue,
    /// A reply is complete.
    Reply,
    /// Nothing is available at the moment.
    Drained,
}

/// Why the server is not usable any more: it has ended, or violated the protocol.
type ServerError = String;

impl SharedFolder {
    /// Creates a device with this server, or without one as a placeholder, with which a kernel is pre-booted.
    #[must_use]
    pub fn with(tag: &str, server: Option<Server>) -> Self {
        let incoming = ReplyStream { buffer: vec![0; BUFFER], unread: 0..0, missing: 0, target: None };
        Self {
            tag: tag.to_owned(),
            server,
            ended: None,
            failure: None,
            pending: BTreeMap::new(),
            next: 1,
            unsent: Vec::new(),
            incoming,
            watcher: None,
            watched: EventFlags::empty(),
            segments: Vec::new(),
        }
    }

    // From the guest.

    /// Takes requests of both queues until they are empty or the server's socket is full.
    fn take_requests(&mut self, queues: &mut Queues) -> Result<Progress, DeviceError> {
        let (mut requests, mut bytes) = (0, 0);
        for queue in [HIPRIO, REQUESTS] {
            while queues.is_ready(queue) {
                if !self.unsent.is_empty() || self.ended.is_some() {
                    // An event reports when the socket accepts more.
                    return Ok(Progress::Done);
                }
                if requests >= BUDGET || bytes >= BUDGET_BYTES {
                    return Ok(Progress::Pending);
                }
                match queues.pop(queue)? {
                    Some(chain) => bytes += self.take_request(queue, chain, queues)?,
                    None if queues.enable_notification(queue)? => {}
                    None => break,
                }
                requests += 1;
            }
        }
        Ok(Progress::Done)
    }

    /// Takes one request; returns its length in bytes.
    fn take_request(
        &mut self,
        queue: usize,
        mut chain: Chain,
        queues: &mut Queues,
    ) -> Result<usize, DeviceError> {
        let length = usize::try_from(chain.readable_len()).unwrap_or(usize::MAX);
        if length > MESSAGE_MAX {
            return Err(DeviceError::new(format!(
                "a request has {length} bytes; FUSE has none of that size"
            )));
        }
        let mut header = [0; REQUEST_HEADER];
        chain.read(&mut header)?;
        let opcode = u32::from_le_bytes(field(&header, 4));
        let unique = field(&header, 8);
        if opcode == INTERRUPT {
            self.interrupt(header, chain, queue, queues)?;
            return Ok(length);
        }
        let id = self.next;
        self.next += 1;
        // The length of the chain, whatever the driver's header contains: the next message in the stream starts there.
        header[..4].copy_from_slice(&u32::try_from(length).unwrap_or(0).to_le_bytes());
        header[8..16].copy_from_slice(&id.to_le_bytes());
        let reply = if WITHOUT_REPLY.contains(&opcode) {
            None
        } else {
            let space = || DeviceError::new("a request has no room for its reply's header in one piece");
            Some(chain.split_front(REPLY_HEADER).ok_or_else(space)?)
        };
        self.send(&mut header, &mut chain);
        match reply {
            None => queues.complete(queue, chain, 0)?,
            Some(header) if self.server.is_none() => {
                fail_request(PendingRequest { queue, chain, header, unique }, queues)?;
            }
            Some(header) => drop(self.pending.insert(id, PendingRequest { queue, chain, header, unique })),
        }
        Ok(length)
    }

    /// Forwards a `FUSE_INTERRUPT` with the device's number of the request that is interrupted. It has no reply.
    fn interrupt(
        &mut self,
        header: [u8; REQUEST_HEADER],
        mut chain: Chain,
        queue: usize,
        queues: &mut Queues,
    ) -> Result<(), DeviceError> {
        let mut message = [0; INTERRUPT_LEN];
        message[..REQUEST_HEADER].copy_from_slice(&header);
        if chain.readable_len() == 8 {
            chain.read(&mut message[REQUEST_HEADER..])?;
            let unique: [u8; 8] = field(&message, REQUEST_HEADER);
            let request = self.pending.iter().find(|(_, pending)| pending.unique == unique);
            if let Some((id, _)) = request {
                message[REQUEST_HEADER..].copy_from_slice(&id.to_le_bytes());
                message[..4].copy_from_slice(&u32::try_from(INTERRUPT_LEN).unwrap_or(0).to_le_bytes());
                // No reply refers to this request itself.
                message[8..16].fill(0);
                self.send(&mut message, &mut chain);
            }
        }
        queues.complete(queue, chain, 0)
    }

    /// Sends a request: its head, and the unread part of the chain. What the socket does not accept is copied, because
    /// the driver may be reset and reuse the memory while the server waits for the rest.
    fn send(&mut self, head: &mut [u8], chain: &mut Chain) {
        let Some(server) = &self.server else { return };
        self.segments.clear();
        self.segments.push(Segment::host(head));
        self.segments.extend(chain.readable());
        let sent = match send(server.socket(), &self.segments) {
            Ok(count) => count,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => 0,
            Err(error) => {
                self.ended = Some(server_has_ended(&error));
                return;
            }
        };
        chain.skip(sent.saturating_sub(head.len()));
        let rest = usize::try_from(chain.readable_len()).unwrap_or(0);
        let head = head.get(sent..).unwrap_or_default();
        if head.len() + rest > 0 {
            self.unsent.extend_from_slice(head);
            let start = self.unsent.len();
            self.unsent.resize(start + rest, 0);
            // The chain has this many bytes.
            let _ = chain.read(&mut self.unsent[start..]);
        }
    }

    /// Sends the rest of the last request.
    fn flush(&mut self) {
        let Some(server) = self.server.as_ref().filter(|_| !self.unsent.is_empty()) else { return };
        match send(server.socket(), &[Segment::host(&mut self.unsent)]) {
            Ok(count) => drop(self.unsent.drain(..count)),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => self.ended = Some(server_has_ended(&error)),
        }
        if self.unsent.is_empty() {
            // Frees the memory, which can be large.
            self.unsent = Vec::new();
        }
    }

    // From the server.

    /// Processes replies until none is available or the budget is spent, in which case the socket stays ready.
    fn take_replies(&mut self, queues: &mut Queues) -> Result<(), DeviceError> {
        let (mut replies, mut bytes) = (0, 0);
        // Bytes in the buffer cause no event, so that they are always processed.
        while replies < BUDGET && bytes < BUDGET_BYTES || !self.incoming.unread.is_empty() {
            match self.receive() {
                Ok(ReceiveStep::Continue) => {}
                Ok(ReceiveStep::Reply) => {
                    replies += 1;
                    if let Some((pending, header)) = self.incoming.target.take() {
                        let length = u32::from_le_bytes(field(&header, 0));
                        bytes += length as usize;
                        fill(pending.header, &header);
                        queues.complete(pending.queue, pending.chain, length)?;
                    }
                }
                Ok(ReceiveStep::Drained) => return Ok(()),
                Err(error) => return self.disconnect(error, queues),
            }
        }
        Ok(())
    }

    fn receive(&mut self) -> Result<ReceiveStep, ServerError> {
        if self.incoming.missing > 0 {
            return self.receive_body();
        }
        if self.incoming.unread.len() >= REPLY_HEADER {
            return self.begin_reply();
        }
        let ReplyStream { buffer, unread, .. } = &mut self.incoming;
        buffer.copy_within(unread.clone(), 0);
        *unread = 0..unread.len();
        let space = buffer.len() - unread.len();
        let Some(count) = receive_some(self.server.as_ref(), &[Segment::host(&mut buffer[unread.end..])])?
        else {
            return Ok(ReceiveStep::Drained);
        };
        unread.end += count;
        // An event reports when more is available.
        let is_drained = count < space && unread.len() < REPLY_HEADER;
        Ok(if is_drained { ReceiveStep::Drained } else { ReceiveStep::Continue })
    }

    /// Assigns the next reply to its request.
    fn begin_reply(&mut self) -> Result<ReceiveStep, ServerError> {
        let mut header = [0; REPLY_HEADER];
        header.copy_from_slice(self.incoming.take(REPLY_HEADER));
        let length = usize::try_from(u32::from_le_bytes(field(&header, 0))).unwrap_or(usize::MAX);
        let id = u64::from_le_bytes(field(&header, 8));
        let body = length.checked_sub(REPLY_HEADER).filter(|_| length <= MESSAGE_MAX);
        let body = body.ok_or_else(|| format!("its server sent a reply of {length} bytes"))?;
        if id == 0 || id >= self.next {
            return Err(format!("its server replied to request {id}, which was not made"));
        }
        if let Some(mut pending) = self.pending.remove(&id) {
            let space = usize::try_from(pending.chain.writable_len()).unwrap_or(usize::MAX);
            if body > space {
                // The request is pending again, and gets the error that all pending requests get.
                self.pending.insert(id, pending);
                return Err(format!("its server sent {body} bytes where {space} were asked for"));
            }
            pending.chain.limit_writable(body);
            header[8..].copy_from_slice(&pending.unique);
            self.incoming.target = Some((pending, header));
        }
        self.incoming.missing = body;
        Ok(if body == 0 { ReceiveStep::Reply } else { ReceiveStep::Continue })
    }

    /// Receives the rest of a reply, first from the buffer.
    fn receive_body(&mut self) -> Result<ReceiveStep, ServerError> {
        let missing = self.incoming.missing;
        let count = if !self.incoming.unread.is_empty() {
            let count = missing.min(self.incoming.unread.len());
            let start = self.incoming.unread.start;
            self.incoming.unread.start += count;
            if let Some((pending, _)) = &mut self.incoming.target {
                // The length was checked in `begin_reply`.
                let _ = pending.chain.write(&self.incoming.buffer[start..start + count]);
            }
            count
        } else if let Some((pending, _)) = &mut self.incoming.target {
            let Some(count) = receive_some(self.server.as_ref(), pending.chain.writable())? else {
                return Ok(ReceiveStep::Drained);
            };
            pending.chain.skip_writable(count);
            count
        } else {
            let space = missing.min(BUFFER);
            let discarded = Segment::host(&mut self.incoming.buffer[..space]);
            let Some(count) = receive_some(self.server.as_ref(), &[discarded])? else {
                return Ok(ReceiveStep::Drained);
            };
            count
        };
        self.incoming.missing -= count;
        Ok(if self.incoming.missing == 0 { ReceiveStep::Reply } else { ReceiveStep::Continue })
    }

    // Both directions.

    /// Disconnects the server after an error: all pending requests get an error reply.
    fn disconnect(&mut self, mut error: ServerError, queues: &mut Queues) -> Result<(), DeviceError> {
        if let Some(server) = self.server.take() {
            if let Some(watcher) = &self.watcher {
                watcher.remove(server.socket());
            }
            if let Some(message) = server.stop() {
                error = format!("{error}; its last message: {message}");
            }
        }
        self.failure.get_or_insert(error);
        self.ended = None;
        self.unsent = Vec::new();
        self.incoming.unread = 0..0;
        self.incoming.missing = 0;
        let current = self.incoming.target.take().map(|(pending, _)| pending);
        for pending in current.into_iter().chain(std::mem::take(&mut self.pending).into_values()) {
            fail_request(pending, queues)?;
        }
        Ok(())
    }

    fn events(&self) -> EventFlags {
        if self.unsent.is_empty() { EventFlags::IN } else { EventFlags::IN | EventFlags::OUT }
    }

    /// Updates the events that the socket is watched for.
    fn watch(&mut self) {
        let wanted = self.events();
        if let (Some(watcher), Some(server)) = (&self.watcher, &self.server)
            && self.watched != wanted
        {
            // This fails only for a descriptor that is not watched.
            let _ = watcher.modify(server.socket(), SERVER, wanted);
            self.watched = wanted;
        }
    }
}

/// Completes a request with an error.
fn fail_request(pending: PendingRequest, queues: &mut Queues) -> Result<(), DeviceError> {
    const LENGTH: u32 = 16;
    const _: () = assert!(LENGTH as usize == REPLY_HEADER);
    let mut header = [0; REPLY_HEADER];
    header[..4].copy_from_slice(&LENGTH.to_le_bytes());
    header[4..8].copy_from_slice(&ERROR.to_le_bytes());
    header[8..].copy_from_slice(&pending.unique);
    fill(pending.header, &header);
    queues.complete(pending.queue, pending.chain, LENGTH)
}

/// The error of a server that has closed its socket.
const SERVER_HAS_ENDED: &str = "its server has ended";

/// Receives the available bytes; `None` when there are none.
fn receive_some(server: Option<&Server>, segments: &[Segment]) -> Result<Option<usize>, ServerError> {
    let Some(server) = server else { return Ok(None) };
    match receive(server.socket(), segments) {
        Ok(received) if received.bytes == 0 => Err(SERVER_HAS_ENDED.to_owned()),
        Ok(received) => Ok(Some(received.bytes)),
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(server_has_ended(&error)),
    }
}

fn server_has_ended(error: &std::io::Error) -> ServerError {
    match error.kind() {
        // The server had not read all requests (`unix_release_sock` in net/unix/af_unix.c).
        std::io::ErrorKind::ConnectionReset | std::io::ErrorKind::BrokenPipe => SERVER_HAS_ENDED.to_owned(),
        _ => format!("{SERVER_HAS_ENDED} ({error})"),
    }
}

/// N bytes of a header; the caller guarantees that they are inside of it.
fn field<const N: usize>(header: &[u8], at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&header[at..at + N]);
    bytes
}
