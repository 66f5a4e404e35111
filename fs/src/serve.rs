//! The stream of requests: each gets its reply, one after the other.

use crate::folder::Folder;
use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::transport::{FuseBuf, FuseDevWriter, Reader, Writer};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;

/// Bytes that a message can have: 1 MiB of data and what goes with it, as the library has it.
const MESSAGE_MAX: usize = (1 << 20) + 4096;
/// Bytes of a request's header: `struct fuse_in_header` of linux/fuse.h.
const REQUEST_HEADER: usize = 40;
/// Bytes of a reply's header: `struct fuse_out_header`.
const REPLY_HEADER: u32 = 16;

/// Serves a folder until the socket ends.
pub(crate) fn serve(socket: &File, folder: Folder) -> io::Result<()> {
    let server = Server::new(folder);
    let mut input = vec![0; MESSAGE_MAX];
    let mut output = vec![0; MESSAGE_MAX];
    let mut unread = 0..0;
    loop {
        let length = next_length(&input[unread.clone()])?;
        if let Some(length) = length.filter(|length| *length <= unread.len()) {
            let request = &mut input[unread.start..unread.start + length];
            unread.start += length;
            handle(&server, socket, request, &mut output)?;
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

fn handle(server: &Server<Folder>, socket: &File, request: &mut [u8], output: &mut [u8]) -> io::Result<()> {
    let unique = request[8..16].to_vec();
    let reader = Reader::<()>::from_fuse_buffer(FuseBuf::new(request)).map_err(io::Error::other)?;
    let writer = FuseDevWriter::new(socket.as_raw_fd(), output).map_err(io::Error::other)?;
    if server.handle_message(reader, Writer::FuseDev(writer), None, None).is_err() {
        // It makes no sense. Whether it had a reply is not known; the device passes no second one on.
        let error = -libc::EINVAL;
        let reply = [&REPLY_HEADER.to_le_bytes()[..], &error.to_le_bytes(), &unique].concat();
        return (&mut &*socket).write_all(&reply);
    }
    Ok(())
}
