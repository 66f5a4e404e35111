//! The request loop. Each request is answered before the next one is read, except for requests that wait for a lock.

use crate::folder::{Folder, LockRequest};
use crate::pending_locks::{PendingLocks, Unique};
use fuse_backend_rs::abi::fuse_abi::Opcode;
use fuse_backend_rs::api::filesystem::FileLock;
use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::transport::{FuseBuf, FuseDevWriter, Reader, Writer};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// Maximum size of a message in bytes: 1 MiB of data and the headers, as in the library.
const MESSAGE_MAX: usize = (1 << 20) + 4096;
/// Bytes of a request header, `struct fuse_in_header` in linux/fuse.h.
const REQUEST_HEADER: usize = 40;
/// Bytes of a reply header, `struct fuse_out_header`.
const REPLY_HEADER: u32 = 16;
/// `FUSE_TMPFILE`, which the library does not support. Its message has the format of `FUSE_CREATE`.
const TMPFILE: u32 = 51;

const SETLKW: u32 = Opcode::Setlkw as u32;
const INTERRUPT: u32 = Opcode::Interrupt as u32;
const INIT: u32 = Opcode::Init as u32;
const DESTROY: u32 = Opcode::Destroy as u32;

/// Serves a folder until the socket is closed.
pub(crate) fn serve(socket: &File, folder: Folder, reply: &mut Reply) -> io::Result<()> {
    let folder = Arc::new(folder);
    let mut service = Service {
        server: Server::new(Arc::clone(&folder)),
        folder,
        socket,
        pending_locks: PendingLocks::new(),
    };
    let mut input = vec![0; MESSAGE_MAX];
    let mut unread = 0..0;
    loop {
        let length = next_length(&input[unread.clone()])?;
        if let Some(length) = length.filter(|length| *length <= unread.len()) {
            let request = &mut input[unread.start..unread.start + length];
            unread.start += length;
            service.handle(request, reply)?;
            continue;
        }
        input.copy_within(unread.clone(), 0);
        unread = 0..unread.len();
        service.retry_locks()?;
        if !service.is_readable()? {
            continue;
        }
        match (&mut &*socket).read(&mut input[unread.end..])? {
            0 => return Ok(()),
            count => unread.end += count,
        }
    }
}

/// The length of the next request, or none if the length field has not been read yet. The virtio-fs device checks that
/// it is the length of the message.
fn next_length(bytes: &[u8]) -> io::Result<Option<usize>> {
    let Some(length) = bytes.first_chunk() else { return Ok(None) };
    let length = usize::try_from(u32::from_le_bytes(*length)).unwrap_or(usize::MAX);
    if !(REQUEST_HEADER..=MESSAGE_MAX).contains(&length) {
        return Err(io::Error::other(format!("a request has the invalid length {length}")));
    }
    Ok(Some(length))
}

/// A buffer for replies. The library writes a reply with a single system call. On a socket, a signal that stops this
/// process may cut that short; a memfd always takes the whole reply.
pub(crate) struct Reply {
    file: File,
    /// The library's buffer. A reply with data is in it completely, beginning with its length.
    buffer: Vec<u8>,
}

impl Reply {
    pub(crate) fn new() -> io::Result<Self> {
        let file = memfd_create("reply", MemfdFlags::CLOEXEC)?;
        Ok(Self { file: file.into(), buffer: vec![0; MESSAGE_MAX] })
    }

    fn clear(&mut self) -> io::Result<()> {
        self.buffer[..4].fill(0);
        self.file.rewind()
    }

    /// The bytes of the reply, empty if there is none.
    fn bytes(&mut self) -> io::Result<&[u8]> {
        let in_buffer = u32::from_le_bytes([self.buffer[0], self.buffer[1], self.buffer[2], self.buffer[3]]);
        let length = match usize::try_from(in_buffer) {
            Ok(length @ 1..) => length,
            _ => {
                let length = usize::try_from(self.file.stream_position()?).unwrap_or(usize::MAX);
                let reply =
                    self.buffer.get_mut(..length).ok_or_else(|| io::Error::other("a reply is too long"))?;
                self.file.read_exact_at(reply, 0)?;
                length
            }
        };
        self.buffer.get(..length).ok_or_else(|| io::Error::other("a reply is too long"))
    }
}

/// The state of the request loop.
struct Service<'a> {
    server: Server<Arc<Folder>>,
    folder: Arc<Folder>,
    socket: &'a File,
    pending_locks: PendingLocks,
}

impl Service<'_> {
    fn handle(&mut self, request: &mut [u8], reply: &mut Reply) -> io::Result<()> {
        let unique = long(request, 8);
        match word(request, 4) {
            SETLKW => {
                let result = lock_request(request);
                let folder = &self.folder;
                match result.map_or_else(
                    |error| Some(Err(error)),
                    |request| self.pending_locks.lock(folder, unique, request),
                ) {
                    Some(result) => self.reply_status(unique, &result),
                    None => Ok(()),
                }
            }
            INTERRUPT => {
                // struct fuse_interrupt_in: the id of the request. FUSE_INTERRUPT itself has no reply.
                let interrupted =
                    if request.len() < REQUEST_HEADER + 8 { 0 } else { long(request, REQUEST_HEADER) };
                if self.pending_locks.interrupt(interrupted) { self.interrupted(interrupted) } else { Ok(()) }
            }
            opcode => {
                if opcode == TMPFILE {
                    as_create(request);
                }
                if opcode == INIT || opcode == DESTROY {
                    // The pending requests are from an earlier mount.
                    self.pending_locks
                        .interrupt_all()
                        .into_iter()
                        .try_for_each(|unique| self.interrupted(unique))?;
                }
                self.dispatch(request, unique, reply)
            }
        }
    }

    /// Handles a request with the library.
    fn dispatch(&self, request: &mut [u8], unique: Unique, reply: &mut Reply) -> io::Result<()> {
        reply.clear()?;
        let reader = Reader::<()>::from_fuse_buffer(FuseBuf::new(request)).map_err(io::Error::other)?;
        let writer =
            FuseDevWriter::new(reply.file.as_raw_fd(), &mut reply.buffer).map_err(io::Error::other)?;
        if self.server.handle_message(reader, Writer::FuseDev(writer), None, None).is_err() {
            // The request is malformed, and an incomplete reply is discarded.
            return self.reply_status(unique, &Err(io::Error::from_raw_os_error(libc::EINVAL)));
        }
        let mut socket = self.socket;
        socket.write_all(reply.bytes()?)
    }

    /// Sends a reply without data.
    fn reply_status(&self, unique: Unique, result: &io::Result<()>) -> io::Result<()> {
        let error = match result {
            Ok(()) => 0,
            Err(error) => -error.raw_os_error().unwrap_or(libc::EIO),
        };
        let mut socket = self.socket;
        socket.write_all(
            &[&REPLY_HEADER.to_le_bytes()[..], &error.to_le_bytes(), &unique.to_le_bytes()].concat(),
        )
    }

    fn interrupted(&self, unique: Unique) -> io::Result<()> {
        self.reply_status(unique, &Err(io::Error::from_raw_os_error(libc::EINTR)))
    }

    fn retry_locks(&mut self) -> io::Result<()> {
        let answers = self.pending_locks.retry(&self.folder);
        answers.iter().try_for_each(|(unique, result)| self.reply_status(*unique, result))
    }

    /// Waits until there is a request or pending locks are due for a retry; returns whether there is a request.
    fn is_readable(&mut self) -> io::Result<bool> {
        if self.pending_locks.is_empty() {
            // The read blocks.
            return Ok(true);
        }
        match poll(&mut [PollFd::new(self.socket, PollFlags::IN)], Some(&self.pending_locks.next_delay())) {
            Ok(count) => Ok(count > 0),
            Err(rustix::io::Errno::INTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

/// Decodes a lock request: `struct fuse_lk_in` after the header.
fn lock_request(request: &[u8]) -> io::Result<LockRequest> {
    const LENGTH: usize = 48;
    let body = request.get(REQUEST_HEADER..).filter(|body| body.len() >= LENGTH);
    let body = body.ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
    let lock = FileLock {
        start: long(body, 16),
        end: long(body, 24),
        lock_type: word(body, 32),
        pid: word(body, 36),
    };
    LockRequest::new(long(request, 16), long(body, 0), long(body, 8), &lock, word(body, 40))
}

/// Converts FUSE_TMPFILE to FUSE_CREATE with the flag O_TMPFILE.
fn as_create(request: &mut [u8]) {
    request[4..8].copy_from_slice(&(Opcode::Create as u32).to_le_bytes());
    if request.len() >= REQUEST_HEADER + 4 {
        let flags = word(request, REQUEST_HEADER) | libc::O_TMPFILE.cast_unsigned();
        request[REQUEST_HEADER..REQUEST_HEADER + 4].copy_from_slice(&flags.to_le_bytes());
    }
}

/// Reads a 32-bit number of a message. The caller guarantees that it is within the message.
fn word(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

/// Reads a 64-bit number of a message.
fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from(word(bytes, at)) | u64::from(word(bytes, at + 4)) << 32
}
