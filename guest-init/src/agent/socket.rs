//! The vsock listener. rustix has no vsock addresses.
#![expect(unsafe_code, reason = "a socket address that rustix does not support")]

use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::addr::{SocketAddrArg, SocketAddrLen, SocketAddrOpaque};
use rustix::net::{AddressFamily, SocketFlags, SocketType, accept_with, bind, socket_with};

/// Maximum number of connections that the kernel queues before they are accepted.
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

// SAFETY: the pointer is to a complete sockaddr_vm of the given size, which lives for the duration of the call.
unsafe impl SocketAddrArg for Address {
    unsafe fn with_sockaddr<R>(&self, call: impl FnOnce(*const SocketAddrOpaque, SocketAddrLen) -> R) -> R {
        call((&raw const *self).cast(), 16)
    }
}

const FLAGS: SocketFlags = SocketFlags::CLOEXEC.union(SocketFlags::NONBLOCK);

/// Listens on a port for any CID: only the host can connect.
pub(super) fn listen(port: u32) -> Result<OwnedFd, Errno> {
    const AF_VSOCK: u16 = 40;
    const ANY: u32 = u32::MAX;
    let socket = socket_with(AddressFamily::from_raw(AF_VSOCK), SocketType::STREAM, FLAGS, None)?;
    bind(&socket, &Address { family: AF_VSOCK, reserved: 0, port, cid: ANY, flags: 0, zero: [0; 3] })?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// Accepts the next connection.
pub(super) fn accept(listener: &OwnedFd) -> Result<OwnedFd, Errno> {
    accept_with(listener, FLAGS)
}
