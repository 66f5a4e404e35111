//! File system device (section 5.11): a folder of the host, served by a process of its own.
//!
//! The device only carries FUSE messages (linux/fuse.h): each request goes to that process through a socket, and each
//! reply comes back through it, from and into the guest's own memory. It knows of a message no more than its header:
//! how long it is, and which reply is for which request. The process sees nothing else of the guest.
//!
//! Requests have numbers of the device's own on their way, so that no reply can go astray: neither when a guest uses a
//! number twice, nor when its driver has started over in the meantime.

mod device;
mod host_folder;
mod server;
#[cfg(test)]
mod tests;

pub use server::Server;

use super::queue::fill;
use super::stream::{receive, send};
use super::{Broken, Chain, Left, Queues, Segment, Watcher};
use rustix::event::epoll::EventFlags;
use std::collections::BTreeMap;
use std::ops::Range;

const KIND: u32 = 26;
/// Where the driver says what it has forgotten, past all other requests.
const HIPRIO: usize = 0;
const REQUESTS: usize = 1;
/// Linux makes no request of more pages than the queue has descriptors, less four for headers
/// (`virtio_fs_get_tree` in fs/fuse/virtio_fs.c), and the largest that FUSE knows has 256.
const QUEUE_SIZES: &[u16] = &[64, 256];

/// Bytes of the tag in the configuration space (section 5.11.4).
const TAG_MAX: usize = 36;

/// Bytes of a request's header: `struct fuse_in_header`.
const REQUEST_HEADER: usize = 40;
/// Bytes of a reply's header: `struct fuse_out_header`.
const REPLY_HEADER: usize = 16;
/// Bytes that a message can have: 1 MiB of data and what goes with it, as the server's library has it.
const MESSAGE_MAX: usize = (1 << 20) + 4096;
/// `FUSE_INTERRUPT`: the driver wants the reply to a request now, whatever it is. It names the request by its number.
const INTERRUPT: u32 = 36;
/// Bytes of an interruption: a header and `struct fuse_interrupt_in`.
const INTERRUPTION: usize = REQUEST_HEADER + 8;
/// `FUSE_FORGET` and `FUSE_BATCH_FORGET`, which have no reply.
const WITHOUT_REPLY: [u32; 2] = [2, 42];
/// What a request is answered where there is no server: EIO.
const ERROR: i32 = -libc::EIO;

/// Requests, or replies, before others have their turn, and their bytes.
const BUDGET: usize = 256;
const BYTES_PER_TURN: usize = 1 << 20;
/// Bytes that are received at once: most replies are shorter. What is longer goes from the socket to the guest.
const BUFFER: usize = 4096;

/// The token of the server's socket.
const SERVER: u32 = 0;

/// A folder of the host.
#[derive(Debug)]
pub struct SharedFolder {
    tag: String,
    /// The process behind it, as long as there is one.
    server: Option<Server>,
    /// Why there is none any more.
    failure: Option<String>,
    /// No more than the queues have descriptors: the ring sees to it.
    waiting: BTreeMap<u64, Waiting>,
    /// The number of the next request.
    next: u64,
    /// What the socket has not taken of the last request.
    unsent: Vec<u8>,
    incoming: Incoming,
    watcher: Option<Watcher>,
    /// Pieces of a message.
    pieces: Vec<Segment>,
}

/// A request without its reply.
#[derive(Debug)]
struct Waiting {
    queue: usize,
    chain: Chain,
    /// Where the header of the reply goes, when all else is there.
    header: Segment,
    /// The driver's number of it.
    unique: [u8; 8],
}

/// The stream of replies.
#[derive(Debug)]
struct Incoming {
    buffer: Vec<u8>,
    /// What has been received and not been taken.
    unread: Range<usize>,
    /// Bytes of the present reply that are missing.
    missing: usize,
    /// The request that it is for, with its header; none where its driver has started over.
    target: Option<(Waiting, [u8; REPLY_HEADER])>,
}

impl Incoming {
    fn take(&mut self, count: usize) -> &[u8] {
        let count = count.min(self.unread.len());
        let taken = self.unread.start..self.unread.start + count;
        self.unread.start = taken.end;
        &self.buffer[taken]
    }
}

/// What became of an attempt to go on with the stream of replies.
#[derive(Debug, PartialEq, Eq)]
enum Progress {
    /// It can go on.
    More,
    /// A reply is complete.
    Reply,
    /// There is nothing to receive at the moment.
    Drained,
}

/// What the server did that none may do, or that it is gone.
type Lost = String;

impl SharedFolder {
    /// With this server, or without a folder, for a kernel that is booted once for many.
    #[must_use]
    pub fn with(tag: &str, server: Option<Server>) -> Self {
        let incoming = Incoming { buffer: vec![0; BUFFER], unread: 0..0, missing: 0, target: None };
        Self {
            tag: tag.to_owned(),
            server,
            failure: None,
            waiting: BTreeMap::new(),
            next: 1,
            unsent: Vec::new(),
            incoming,
            watcher: None,
            pieces: Vec::new(),
        }
    }

    // From the guest.

    /// Takes requests of both queues, until there is none or the server takes no more.
    fn take_requests(&mut self, queues: &mut Queues) -> Result<Left, Broken> {
        let (mut requests, mut bytes) = (0, 0);
        for queue in [HIPRIO, REQUESTS] {
            while queues.is_ready(queue) {
                if !self.unsent.is_empty() {
                    // The socket says when it takes more.
                    return Ok(Left::Nothing);
                }
                if requests >= BUDGET || bytes >= BYTES_PER_TURN {
                    return Ok(Left::Something);
                }
                match queues.pop(queue)? {
                    Some(chain) => bytes += self.take_request(queue, chain, queues)?,
                    None if queues.rearm(queue)? => {}
                    None => break,
                }
                requests += 1;
            }
        }
        Ok(Left::Nothing)
    }

    /// Takes one request; its bytes.
    fn take_request(&mut self, queue: usize, mut chain: Chain, queues: &mut Queues) -> Result<usize, Broken> {
        let length = usize::try_from(chain.readable_len()).unwrap_or(usize::MAX);
        if length > MESSAGE_MAX {
            return Err(Broken::because(format!("a request has {length} bytes; FUSE has none of that size")));
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
        // However long the driver says that it is: the stream's next header is behind what is sent.
        header[..4].copy_from_slice(&u32::try_from(length).unwrap_or(0).to_le_bytes());
        header[8..16].copy_from_slice(&id.to_le_bytes());
        let reply = if WITHOUT_REPLY.contains(&opcode) {
            None
        } else {
            let room = || Broken::because("a request has no room for its reply's header in one piece");
            Some(chain.split_front(REPLY_HEADER).ok_or_else(room)?)
        };
        if let Err(lost) = self.send(&mut header, &mut chain) {
            self.lose(lost, queues)?;
        }
        match reply {
            None => queues.complete(queue, chain, 0)?,
            Some(header) if self.server.is_none() => {
                refuse(Waiting { queue, chain, header, unique }, queues)?;
            }
            Some(header) => drop(self.waiting.insert(id, Waiting { queue, chain, header, unique })),
        }
        Ok(length)
    }

    /// Passes an interruption on, with the server's number of the request. It has no reply.
    fn interrupt(
        &mut self,
        header: [u8; REQUEST_HEADER],
        mut chain: Chain,
        queue: usize,
        queues: &mut Queues,
    ) -> Result<(), Broken> {
        let mut message = [0; INTERRUPTION];
        message[..REQUEST_HEADER].copy_from_slice(&header);
        if chain.readable_len() == 8 {
            chain.read(&mut message[REQUEST_HEADER..])?;
            let unique: [u8; 8] = field(&message, REQUEST_HEADER);
            let request = self.waiting.iter().find(|(_, waiting)| waiting.unique == unique);
            if let Some((id, _)) = request {
                message[REQUEST_HEADER..].copy_from_slice(&id.to_le_bytes());
                message[..4].copy_from_slice(&u32::try_from(INTERRUPTION).unwrap_or(0).to_le_bytes());
                // No reply is to be one to this.
                message[8..16].fill(0);
                if let Err(lost) = self.send(&mut message, &mut chain) {
                    self.lose(lost, queues)?;
                }
            }
        }
        queues.complete(queue, chain, 0)
    }

    /// Sends a request: its head, and what of the chain has not been read. What the socket does not take is kept: the
    /// guest may start over and use the memory for something else, while the server waits for the rest.
    fn send(&mut self, head: &mut [u8], chain: &mut Chain) -> Result<(), Lost> {
        let Some(server) = &self.server else { return Ok(()) };
        self.pieces.clear();
        self.pieces.push(Segment::own(head));
        self.pieces.extend(chain.readable());
        let sent = match send(server.socket(), &self.pieces) {
            Ok(count) => count,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => 0,
            Err(error) => return Err(server_has_ended(&error)),
        };
        chain.skip(sent.saturating_sub(head.len()));
        let left = usize::try_from(chain.readable_len()).unwrap_or(0);
        let head = head.get(sent..).unwrap_or_default();
        if head.len() + left > 0 {
            self.unsent.extend_from_slice(head);
            let start = self.unsent.len();
            self.unsent.resize(start + left, 0);
            // It has as many.
            let _ = chain.read(&mut self.unsent[start..]);
            self.watch();
        }
        Ok(())
    }

    /// Sends what was kept.
    fn flush(&mut self) -> Result<(), Lost> {
        let Some(server) = self.server.as_ref().filter(|_| !self.unsent.is_empty()) else { return Ok(()) };
        match send(server.socket(), &[Segment::own(&mut self.unsent)]) {
            Ok(count) => drop(self.unsent.drain(..count)),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(server_has_ended(&error)),
        }
        if self.unsent.is_empty() {
            // It was large.
            self.unsent = Vec::new();
            self.watch();
        }
        Ok(())
    }

    // From the server.

    /// Passes replies on, until there is none or others are to have their turn: the socket stays ready.
    fn take_replies(&mut self, queues: &mut Queues) -> Result<(), Broken> {
        let (mut replies, mut bytes) = (0, 0);
        // No event tells of what is in the buffer.
        while replies < BUDGET && bytes < BYTES_PER_TURN || !self.incoming.unread.is_empty() {
            match self.receive() {
                Ok(Progress::More) => {}
                Ok(Progress::Reply) => {
                    replies += 1;
                    if let Some((waiting, header)) = self.incoming.target.take() {
                        let length = u32::from_le_bytes(field(&header, 0));
                        bytes += length as usize;
                        fill(waiting.header, &header);
                        queues.complete(waiting.queue, waiting.chain, length)?;
                    }
                }
                Ok(Progress::Drained) => return Ok(()),
                Err(lost) => return self.lose(lost, queues),
            }
        }
        Ok(())
    }

    fn receive(&mut self) -> Result<Progress, Lost> {
        if self.incoming.missing > 0 {
            return self.receive_body();
        }
        if self.incoming.unread.len() >= REPLY_HEADER {
            return self.begin_reply();
        }
        let Incoming { buffer, unread, .. } = &mut self.incoming;
        buffer.copy_within(unread.clone(), 0);
        *unread = 0..unread.len();
        let room = buffer.len() - unread.len();
        let Some(count) = receive_some(self.server.as_ref(), &[Segment::own(&mut buffer[unread.end..])])?
        else {
            return Ok(Progress::Drained);
        };
        unread.end += count;
        // The socket says when there is more than this.
        let is_drained = count < room && unread.len() < REPLY_HEADER;
        Ok(if is_drained { Progress::Drained } else { Progress::More })
    }

    /// Finds out for whom the next reply is.
    fn begin_reply(&mut self) -> Result<Progress, Lost> {
        let mut header = [0; REPLY_HEADER];
        header.copy_from_slice(self.incoming.take(REPLY_HEADER));
        let length = usize::try_from(u32::from_le_bytes(field(&header, 0))).unwrap_or(usize::MAX);
        let id = u64::from_le_bytes(field(&header, 8));
        let body = length.checked_sub(REPLY_HEADER).filter(|_| length <= MESSAGE_MAX);
        let body = body.ok_or_else(|| format!("its server sent a reply of {length} bytes"))?;
        if id == 0 || id >= self.next {
            return Err(format!("its server replied to request {id}, which nobody made"));
        }
        if let Some(mut waiting) = self.waiting.remove(&id) {
            let room = usize::try_from(waiting.chain.writable_len()).unwrap_or(usize::MAX);
            if body > room {
                // It waits again, for the error that all get.
                self.waiting.insert(id, waiting);
                return Err(format!("its server sent {body} bytes where {room} were asked for"));
            }
            waiting.chain.limit_writable(body);
            header[8..].copy_from_slice(&waiting.unique);
            self.incoming.target = Some((waiting, header));
        }
        self.incoming.missing = body;
        Ok(if body == 0 { Progress::Reply } else { Progress::More })
    }

    /// Receives the rest of a reply, first what is in the buffer already.
    fn receive_body(&mut self) -> Result<Progress, Lost> {
        let missing = self.incoming.missing;
        let count = if !self.incoming.unread.is_empty() {
            let count = missing.min(self.incoming.unread.len());
            let start = self.incoming.unread.start;
            self.incoming.unread.start += count;
            if let Some((waiting, _)) = &mut self.incoming.target {
                // There is room for all of it.
                let _ = waiting.chain.write(&self.incoming.buffer[start..start + count]);
            }
            count
        } else if let Some((waiting, _)) = &mut self.incoming.target {
            let Some(count) = receive_some(self.server.as_ref(), waiting.chain.writable())? else {
                return Ok(Progress::Drained);
            };
            waiting.chain.skip_writable(count);
            count
        } else {
            let room = missing.min(BUFFER);
            let nowhere = Segment::own(&mut self.incoming.buffer[..room]);
            let Some(count) = receive_some(self.server.as_ref(), &[nowhere])? else {
                return Ok(Progress::Drained);
            };
            count
        };
        self.incoming.missing -= count;
        Ok(if self.incoming.missing == 0 { Progress::Reply } else { Progress::More })
    }

    // Both.

    /// The server is gone, or is not to be trusted any more: whoever waits for it has an error instead.
    fn lose(&mut self, mut lost: Lost, queues: &mut Queues) -> Result<(), Broken> {
        if let Some(server) = self.server.take() {
            if let Some(watcher) = &self.watcher {
                watcher.remove(server.socket());
            }
            if let Some(words) = server.leave() {
                lost = format!("{lost}; it said: {words}");
            }
        }
        self.failure.get_or_insert(lost);
        self.unsent = Vec::new();
        self.incoming.unread = 0..0;
        self.incoming.missing = 0;
        let begun = self.incoming.target.take().map(|(waiting, _)| waiting);
        for waiting in begun.into_iter().chain(std::mem::take(&mut self.waiting).into_values()) {
            refuse(waiting, queues)?;
        }
        Ok(())
    }

    fn events(&self) -> EventFlags {
        if self.unsent.is_empty() { EventFlags::IN } else { EventFlags::IN | EventFlags::OUT }
    }

    /// Watches the socket for what is wanted of it now.
    fn watch(&self) {
        if let (Some(watcher), Some(server)) = (&self.watcher, &self.server) {
            // It fails only for what is not watched.
            let _ = watcher.modify(server.socket(), SERVER, self.events());
        }
    }
}

/// Answers a request with an error.
fn refuse(waiting: Waiting, queues: &mut Queues) -> Result<(), Broken> {
    const LENGTH: u32 = 16;
    const _: () = assert!(LENGTH as usize == REPLY_HEADER);
    let mut header = [0; REPLY_HEADER];
    header[..4].copy_from_slice(&LENGTH.to_le_bytes());
    header[4..8].copy_from_slice(&ERROR.to_le_bytes());
    header[8..].copy_from_slice(&waiting.unique);
    fill(waiting.header, &header);
    queues.complete(waiting.queue, waiting.chain, LENGTH)
}

/// Receives what there is, if there is something.
fn receive_some(server: Option<&Server>, pieces: &[Segment]) -> Result<Option<usize>, Lost> {
    let Some(server) = server else { return Ok(None) };
    match receive(server.socket(), pieces) {
        Ok(received) if received.bytes == 0 => Err("its server has ended".to_owned()),
        Ok(received) => Ok(Some(received.bytes)),
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(server_has_ended(&error)),
    }
}

fn server_has_ended(error: &std::io::Error) -> Lost {
    format!("its server has ended ({error})")
}

/// Bytes of a header from a place on, which every caller knows to be within it.
fn field<const N: usize>(header: &[u8], at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&header[at..at + N]);
    bytes
}
