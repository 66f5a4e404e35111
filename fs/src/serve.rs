//! The stream of requests: each gets its reply, one after the other, but for locks that have to be waited for.

use crate::folder::{Folder, LockRequest};
use crate::waiting::{Unique, Waiting};
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

/// Bytes that a message can have: 1 MiB of data and what goes with it, as the library has it.
const MESSAGE_MAX: usize = (1 << 20) + 4096;
/// Bytes of a request's header: `struct fuse_in_header` of linux/fuse.h.
const REQUEST_HEADER: usize = 40;
/// Bytes of a reply's header: `struct fuse_out_header`.
const REPLY_HEADER: u32 = 16;
/// `FUSE_TMPFILE`, which the library does not know. Its message is that of `FUSE_CREATE`.
const TMPFILE: u32 = 51;

const SETLKW: u32 = Opcode::Setlkw as u32;
const INTERRUPT: u32 = Opcode::Interrupt as u32;
const INIT: u32 = Opcode::Init as u32;
const DESTROY: u32 = Opcode::Destroy as u32;

/// Serves a folder until the socket ends.
pub(crate) fn serve(socket: &File, folder: Folder, reply: &mut Reply) -> io::Result<()> {
    let folder = Arc::new(folder);
    let mut service =
        Service { server: Server::new(Arc::clone(&folder)), folder, socket, waiting: Waiting::new() };
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

/// Bytes of the next request, as soon as they are known. The device sees to it that they are right.
fn next_length(bytes: &[u8]) -> io::Result<Option<usize>> {
    let Some(length) = bytes.first_chunk() else { return Ok(None) };
    let length = usize::try_from(u32::from_le_bytes(*length)).unwrap_or(usize::MAX);
    if !(REQUEST_HEADER..=MESSAGE_MAX).contains(&length) {
        return Err(io::Error::other(format!("a request says that it has {length} bytes")));
    }
    Ok(Some(length))
}

/// Where replies are put together. The library writes each at once, and a signal that stops this process may cut what
/// is written to a socket; of a file in memory all is written.
pub(crate) struct Reply {
    file: File,
    /// What the library reads into; it has the whole of a reply with data, its length in front.
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

    /// The bytes; none where there is no reply.
    fn bytes(&mut self) -> io::Result<&[u8]> {
        let in_buffer = u32::from_le_bytes([self.buffer[0], self.buffer[1], self.buffer[2], self.buffer[3]]);
        let length = match usize::try_from(in_buffer) {
            Ok(length @ 1..) => length,
            _ => {
                let length = usize::try_from(self.file.stream_position()?).unwrap_or(usize::MAX);
                let place =
                    self.buffer.get_mut(..length).ok_or_else(|| io::Error::other("a reply is too long"))?;
                self.file.read_exact_at(place, 0)?;
                length
            }
        };
        self.buffer.get(..length).ok_or_else(|| io::Error::other("a reply is too long"))
    }
}

/// What serves one guest.
struct Service<'a> {
    server: Server<Arc<Folder>>,
    folder: Arc<Folder>,
    socket: &'a File,
    waiting: Waiting,
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
                    |request| self.waiting.lock(folder, unique, request),
                ) {
                    Some(result) => self.answer(unique, &result),
                    None => Ok(()),
                }
            }
            INTERRUPT => {
                // struct fuse_interrupt_in: the number of the request. The interruption itself has no reply.
                let interrupted =
                    if request.len() < REQUEST_HEADER + 8 { 0 } else { long(request, REQUEST_HEADER) };
                if self.waiting.interrupt(interrupted) { self.interrupted(interrupted) } else { Ok(()) }
            }
            opcode => {
                if opcode == TMPFILE {
                    as_create(request);
                }
                if opcode == INIT || opcode == DESTROY {
                    // They are of a driver that is gone.
                    self.waiting
                        .interrupt_all()
                        .into_iter()
                        .try_for_each(|unique| self.interrupted(unique))?;
                }
                self.pass_on(request, unique, reply)
            }
        }
    }

    /// Lets the library serve a request.
    fn pass_on(&self, request: &mut [u8], unique: Unique, reply: &mut Reply) -> io::Result<()> {
        reply.clear()?;
        let reader = Reader::<()>::from_fuse_buffer(FuseBuf::new(request)).map_err(io::Error::other)?;
        let writer =
            FuseDevWriter::new(reply.file.as_raw_fd(), &mut reply.buffer).map_err(io::Error::other)?;
        if self.server.handle_message(reader, Writer::FuseDev(writer), None, None).is_err() {
            // It makes no sense. What there is of a reply is none.
            return self.answer(unique, &Err(io::Error::from_raw_os_error(libc::EINVAL)));
        }
        let mut socket = self.socket;
        socket.write_all(reply.bytes()?)
    }

    /// Replies without data.
    fn answer(&self, unique: Unique, result: &io::Result<()>) -> io::Result<()> {
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
        self.answer(unique, &Err(io::Error::from_raw_os_error(libc::EINTR)))
    }

    fn retry_locks(&mut self) -> io::Result<()> {
        let answers = self.waiting.retry(&self.folder);
        answers.iter().try_for_each(|(unique, result)| self.answer(*unique, result))
    }

    /// Waits for a request, but no longer than until a lock is to be tried for again; whether there is one.
    fn is_readable(&mut self) -> io::Result<bool> {
        if self.waiting.is_empty() {
            // The read waits.
            return Ok(true);
        }
        match poll(&mut [PollFd::new(self.socket, PollFlags::IN)], Some(&self.waiting.pause())) {
            Ok(count) => Ok(count > 0),
            Err(rustix::io::Errno::INTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

/// The lock that a message asks for: `struct fuse_lk_in` behind the header.
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

/// Makes the creation of a file without a name one that the library knows: its flags say what it is.
fn as_create(request: &mut [u8]) {
    request[4..8].copy_from_slice(&(Opcode::Create as u32).to_le_bytes());
    if request.len() >= REQUEST_HEADER + 4 {
        let flags = word(request, REQUEST_HEADER) | libc::O_TMPFILE.cast_unsigned();
        request[REQUEST_HEADER..REQUEST_HEADER + 4].copy_from_slice(&flags.to_le_bytes());
    }
}

/// Numbers of a message, at places that every caller knows to be within it.
fn word(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from(word(bytes, at)) | u64::from(word(bytes, at + 4)) << 32
}
