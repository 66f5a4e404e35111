//! The stream of requests: each gets its reply, one after the other.

use crate::folder::Folder;
use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::transport::{FuseBuf, FuseDevWriter, Reader, Writer};
use rustix::fs::{MemfdFlags, memfd_create};
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

/// Bytes that a message can have: 1 MiB of data and what goes with it, as the library has it.
const MESSAGE_MAX: usize = (1 << 20) + 4096;
/// Bytes of a request's header: `struct fuse_in_header` of linux/fuse.h.
const REQUEST_HEADER: usize = 40;
/// Bytes of a reply's header: `struct fuse_out_header`.
const REPLY_HEADER: u32 = 16;

/// Serves a folder until the socket ends.
pub(crate) fn serve(socket: &File, folder: Folder, reply: &mut Reply) -> io::Result<()> {
    let server = Server::new(folder);
    let mut input = vec![0; MESSAGE_MAX];
    let mut unread = 0..0;
    loop {
        let length = next_length(&input[unread.clone()])?;
        if let Some(length) = length.filter(|length| *length <= unread.len()) {
            let request = &mut input[unread.start..unread.start + length];
            unread.start += length;
            handle(&server, socket, request, reply)?;
            continue;
        }
        input.copy_within(unread.clone(), 0);
        unread = 0..unread.len();
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

fn handle(server: &Server<Folder>, socket: &File, request: &mut [u8], reply: &mut Reply) -> io::Result<()> {
    let unique = request[8..16].to_vec();
    reply.clear()?;
    let reader = Reader::<()>::from_fuse_buffer(FuseBuf::new(request)).map_err(io::Error::other)?;
    let writer = FuseDevWriter::new(reply.file.as_raw_fd(), &mut reply.buffer).map_err(io::Error::other)?;
    let mut socket = socket;
    if server.handle_message(reader, Writer::FuseDev(writer), None, None).is_err() {
        // It makes no sense. What there is of a reply is none.
        let error = -libc::EINVAL;
        return socket.write_all(&[&REPLY_HEADER.to_le_bytes()[..], &error.to_le_bytes(), &unique].concat());
    }
    socket.write_all(reply.bytes()?)
}
