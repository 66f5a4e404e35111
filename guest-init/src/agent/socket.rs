//! vsock's listener. rustix has no addresses of this family.
#![expect(unsafe_code, reason = "an address of a family that rustix does not know")]

use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::addr::{SocketAddrArg, SocketAddrLen, SocketAddrOpaque};
use rustix::net::{AddressFamily, SocketFlags, SocketType, accept_with, bind, socket_with};

/// Connections that the kernel accepts on its own.
const BACKLOG: i32 = 128;

/// `struct sockaddr_vm` of linux/vm_sockets.h.
#[repr(C)]
struct Address {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    flags: u8,
    zero: [u8; 3],
}

// SAFETY: the pointer is to a whole sockaddr_vm, whose size is said, for as long as the call lasts.
unsafe impl SocketAddrArg for Address {
    unsafe fn with_sockaddr<R>(&self, call: impl FnOnce(*const SocketAddrOpaque, SocketAddrLen) -> R) -> R {
        call((&raw const *self).cast(), 16)
    }
}

const FLAGS: SocketFlags = SocketFlags::CLOEXEC.union(SocketFlags::NONBLOCK);

/// Listens on a port, whoever connects: only the host can.
pub(super) fn listen(port: u32) -> Result<OwnedFd, Errno> {
    const AF_VSOCK: u16 = 40;
    const ANY: u32 = u32::MAX;
    let socket = socket_with(AddressFamily::from_raw(AF_VSOCK), SocketType::STREAM, FLAGS, None)?;
    bind(&socket, &Address { family: AF_VSOCK, reserved: 0, port, cid: ANY, flags: 0, zero: [0; 3] })?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// The next connection.
pub(super) fn accept(listener: &OwnedFd) -> Result<OwnedFd, Errno> {
    accept_with(listener, FLAGS)
}
