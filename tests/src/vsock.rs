//! vsock sockets of a guest, and streams with a verifiable pattern.
#![expect(unsafe_code, reason = "std has no vsock")]

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// The CID of the host (section 5.10.4 of virtio 1.2).
const HOST_CID: u32 = 2;

fn address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: an all-zero sockaddr_vm is valid.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::sa_family_t::try_from(libc::AF_VSOCK).unwrap_or(0);
    address.svm_cid = cid;
    address.svm_port = port;
    address
}

fn socket() -> io::Result<OwnedFd> {
    // SAFETY: socket does not access memory, and only the result owns the descriptor.
    unsafe {
        match libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) {
            -1 => Err(io::Error::last_os_error()),
            fd => Ok(OwnedFd::from_raw_fd(fd)),
        }
    }
}

fn check_result(result: i32) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[expect(clippy::cast_possible_truncation, reason = "an address has 16 bytes")]
const ADDRESS_SIZE: u32 = size_of::<libc::sockaddr_vm>() as u32;

/// A vsock stream.
#[derive(Debug)]
pub struct Stream(File);

impl Stream {
    /// Connects to a port of the host.
    ///
    /// # Errors
    /// When the connection is refused.
    pub fn connect(port: u32) -> io::Result<Self> {
        let socket = socket()?;
        let address = address(HOST_CID, port);
        // SAFETY: the address is valid and has this size.
        check_result(unsafe {
            libc::connect(socket.as_raw_fd(), (&raw const address).cast(), ADDRESS_SIZE)
        })?;
        Ok(Self(socket.into()))
    }
}

impl Read for Stream {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.0.read(bytes)
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Shuts down one direction; `how` is a constant of shutdown(2).
///
/// # Errors
/// When the stream is not connected.
pub fn shut_down(stream: &Stream, how: i32) -> io::Result<()> {
    // SAFETY: shutdown does not access memory.
    check_result(unsafe { libc::shutdown(stream.0.as_raw_fd(), how) })
}

/// A listening socket of the guest.
#[derive(Debug)]
pub struct Listener(OwnedFd);

impl Listener {
    /// Listens on a port.
    ///
    /// # Errors
    /// When the port is in use.
    pub fn bind(port: u32) -> io::Result<Self> {
        let socket = socket()?;
        let address = address(libc::VMADDR_CID_ANY, port);
        // SAFETY: the address is valid and has this size; listen does not access memory.
        unsafe {
            check_result(libc::bind(socket.as_raw_fd(), (&raw const address).cast(), ADDRESS_SIZE))?;
            check_result(libc::listen(socket.as_raw_fd(), 1024))?;
        }
        Ok(Self(socket))
    }

    /// Waits for a connection.
    ///
    /// # Errors
    /// When accept fails.
    pub fn accept(&self) -> io::Result<Stream> {
        // SAFETY: accept may be called without an address, and only the result owns the descriptor.
        unsafe {
            match libc::accept(self.0.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut()) {
                -1 => Err(io::Error::last_os_error()),
                fd => Ok(Stream(OwnedFd::from_raw_fd(fd).into())),
            }
        }
    }
}

/// A pattern of 64-bit words that do not repeat: multiples of an odd constant.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pattern(u64);

const CHUNK: usize = 64 << 10;

impl Pattern {
    fn fill(&mut self, bytes: &mut [u8]) {
        for word in bytes.chunks_exact_mut(8) {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            word.copy_from_slice(&self.0.to_le_bytes());
        }
    }

    /// Writes `bytes` bytes, a multiple of 64 KiB.
    ///
    /// # Errors
    /// When writing fails.
    pub fn write_to(&mut self, target: &mut impl Write, bytes: u64) -> io::Result<()> {
        let mut chunk = vec![0; CHUNK];
        for _ in 0..bytes / CHUNK as u64 {
            self.fill(&mut chunk);
            target.write_all(&chunk)?;
        }
        Ok(())
    }
}

/// Reads `bytes` bytes of a [`Pattern`], a multiple of 64 KiB, and the end of the stream.
///
/// # Errors
/// When the content or the length differs.
pub fn check(source: &mut impl Read, bytes: u64) -> io::Result<()> {
    let mut pattern = Pattern::default();
    let (mut got, mut expected) = (vec![0; CHUNK], vec![0; CHUNK]);
    for number in 0..bytes / CHUNK as u64 {
        source.read_exact(&mut got)?;
        pattern.fill(&mut expected);
        if got != expected {
            return Err(io::Error::other(format!("unexpected bytes in block {number}")));
        }
    }
    match source.read(&mut got)? {
        0 => Ok(()),
        _ => Err(io::Error::other("more bytes than were sent")),
    }
}
