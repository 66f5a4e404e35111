//! A server process, and the requests of a guest.

use rustix::fs::{Mode, OFlags};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command};

/// The opcodes in linux/fuse.h.
pub(crate) mod op {
    pub(crate) const LOOKUP: u32 = 1;
    pub(crate) const FORGET: u32 = 2;
    pub(crate) const GETATTR: u32 = 3;
    pub(crate) const SETATTR: u32 = 4;
    pub(crate) const READLINK: u32 = 5;
    pub(crate) const SYMLINK: u32 = 6;
    pub(crate) const MKNOD: u32 = 8;
    pub(crate) const MKDIR: u32 = 9;
    pub(crate) const UNLINK: u32 = 10;
    pub(crate) const RMDIR: u32 = 11;
    pub(crate) const RENAME: u32 = 12;
    pub(crate) const LINK: u32 = 13;
    pub(crate) const OPEN: u32 = 14;
    pub(crate) const READ: u32 = 15;
    pub(crate) const WRITE: u32 = 16;
    pub(crate) const STATFS: u32 = 17;
    pub(crate) const SETXATTR: u32 = 21;
    pub(crate) const GETXATTR: u32 = 22;
    pub(crate) const RELEASE: u32 = 18;
    pub(crate) const REMOVEXATTR: u32 = 24;
    pub(crate) const FLUSH: u32 = 25;
    pub(crate) const INIT: u32 = 26;
    pub(crate) const OPENDIR: u32 = 27;
    pub(crate) const READDIR: u32 = 28;
    pub(crate) const GETLK: u32 = 31;
    pub(crate) const SETLK: u32 = 32;
    pub(crate) const SETLKW: u32 = 33;
    pub(crate) const CREATE: u32 = 35;
    pub(crate) const INTERRUPT: u32 = 36;
    pub(crate) const DESTROY: u32 = 38;
    pub(crate) const FALLOCATE: u32 = 43;
    pub(crate) const RENAME2: u32 = 45;
    pub(crate) const TMPFILE: u32 = 51;
}

pub(crate) const ROOT: u64 = 1;
pub(crate) const O_RDWR: u32 = 2;
pub(crate) const O_WRONLY: u32 = 1;

/// A process that serves a folder.
pub(crate) struct Server {
    pub(crate) process: Child,
    socket: UnixStream,
    pub(crate) next: u64,
    /// The thread of the guest in the request header.
    pub(crate) thread: u32,
}

impl Server {
    pub(crate) fn start(folder: &Path, options: &[&str]) -> Self {
        let (socket, server_socket) = UnixStream::pair().unwrap();
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = rustix::fs::open(folder, flags, Mode::empty()).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_kindling-fs"));
        command.args(options).args(["--owner", "0:0"]).stdin(OwnedFd::from(server_socket)).stdout(folder);
        let starts = crate::STARTS.write().unwrap();
        let process = command.spawn().unwrap();
        drop(starts);
        let mut this = Self { process, socket, next: 1, thread: 56 };
        // Version 7.38, 128 KiB of read-ahead, and all features.
        let init = words(&[7, 38, 128 << 10, u32::MAX, u32::MAX, 0]);
        let reply = this.ask(op::INIT, 0, &[&init[..], &[0; 40]].concat()).unwrap();
        assert_eq!(reply[..4], 7_u32.to_le_bytes());
        this
    }

    pub(crate) fn send(&mut self, opcode: u32, inode: u64, body: &[u8]) {
        self.next += 1;
        let mut message = words(&[u32::try_from(40 + body.len()).unwrap(), opcode]);
        message.extend([self.next, inode].map(u64::to_le_bytes).concat());
        // User 12, group 34.
        message.extend(words(&[12, 34, self.thread, 0]));
        message.extend(body);
        self.socket.write_all(&message).unwrap();
    }

    /// The next reply to any request.
    pub(crate) fn receive_any(&mut self) -> (u64, Result<Vec<u8>, i32>) {
        let mut header = [0; 16];
        self.socket.read_exact(&mut header).unwrap();
        let mut body = vec![0; usize::try_from(number(&header, 0)).unwrap() - 16];
        self.socket.read_exact(&mut body).unwrap();
        let result = match i32::from_le_bytes(header[4..8].try_into().unwrap()) {
            0 => Ok(body),
            error => Err(-error),
        };
        (long(&header, 8), result)
    }

    pub(crate) fn receive(&mut self) -> Result<Vec<u8>, i32> {
        let (unique, result) = self.receive_any();
        if unique < self.next {
            // A malformed request may have two replies, of which the device forwards one.
            return self.receive();
        }
        assert_eq!(unique, self.next);
        result
    }

    pub(crate) fn ask(&mut self, opcode: u32, inode: u64, body: &[u8]) -> Result<Vec<u8>, i32> {
        self.send(opcode, inode, body);
        self.receive()
    }

    pub(crate) fn lookup(&mut self, parent: u64, name: &str) -> Result<u64, i32> {
        Ok(long(&self.ask(op::LOOKUP, parent, &text(name))?, 0))
    }

    pub(crate) fn open(&mut self, inode: u64, flags: u32) -> Result<u64, i32> {
        Ok(long(&self.ask(op::OPEN, inode, &words(&[flags, 0]))?, 0))
    }

    pub(crate) fn read(&mut self, inode: u64, handle: u64, offset: u64, size: u32) -> Result<Vec<u8>, i32> {
        let body = [&longs(&[handle, offset])[..], &words(&[size, 0]), &[0; 16]].concat();
        self.ask(op::READ, inode, &body)
    }

    pub(crate) fn write(
        &mut self,
        handle: u64,
        offset: u64,
        bytes: &[u8],
        size: u32,
    ) -> Result<Vec<u8>, i32> {
        let body = [&longs(&[handle, offset])[..], &words(&[size, 0]), &[0; 16], bytes].concat();
        self.ask(op::WRITE, 7, &body)
    }

    pub(crate) fn end(mut self) {
        drop(self.socket);
        assert!(self.process.wait().unwrap().success());
    }
}

pub(crate) fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

pub(crate) fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|long| long.to_le_bytes()).collect()
}

pub(crate) fn text(text: &str) -> Vec<u8> {
    [text.as_bytes(), b"\0"].concat()
}

pub(crate) fn number(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

pub(crate) fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

impl Server {
    pub(crate) fn read_directory(&mut self, handle: u64) -> Vec<String> {
        let body = [&longs(&[handle, 0])[..], &words(&[4096, 0]), &[0; 16]].concat();
        let reply = self.ask(op::READDIR, ROOT, &body).unwrap();
        let (mut names, mut at) = (Vec::new(), 0);
        while at < reply.len() {
            let length = usize::try_from(number(&reply, at + 16)).unwrap();
            names.push(String::from_utf8(reply[at + 24..at + 24 + length].to_vec()).unwrap());
            at += (24 + length).next_multiple_of(8);
        }
        names.sort();
        names
    }
}
