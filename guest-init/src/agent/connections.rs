//! Closes the TCP connections of frozen processes to other hosts, before the machine is saved: a copy has another network, where
//! the other ends do not exist. The processes read the end of the stream, in the copy.

use crate::files;
use alloc::vec::Vec;
use rustix::fd::OwnedFd;
use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::net::sockopt::socket_type;
use rustix::net::{Shutdown, SocketAddrAny, SocketAddrV4, SocketAddrV6, SocketType, getpeername, shutdown};
use rustix::path::DecInt;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

const INIT: i32 = 1;

/// Closes the connections of all processes but init. A process or descriptor that cannot be accessed keeps its connections.
pub(super) fn close_all() {
    for process in numbers_in(b"/proc").unwrap_or_default().into_iter().filter(|&number| number != INIT) {
        let path = [b"/proc/".as_slice(), DecInt::new(process).as_bytes(), b"/fd"].concat();
        let descriptors = numbers_in(&path).unwrap_or_default();
        // Threads of the kernel have none.
        let pidfd = Pid::from_raw(process)
            .filter(|_| !descriptors.is_empty())
            .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        for descriptor in pidfd.iter().flat_map(|_| &descriptors) {
            let of_process =
                pidfd.as_ref().map(|pidfd| pidfd_getfd(pidfd, *descriptor, PidfdGetfdFlags::empty()));
            if let Some(Ok(socket)) = of_process
                && is_connected_elsewhere(&socket)
            {
                let _ = shutdown(&socket, Shutdown::Both);
            }
        }
    }
}

/// Whether this is a TCP socket that is connected to another host.
fn is_connected_elsewhere(socket: &OwnedFd) -> bool {
    if socket_type(socket) != Ok(SocketType::STREAM) {
        return false;
    }
    let Ok(Some(peer)) = getpeername(socket) else { return false };
    let v4 = SocketAddrV4::try_from(SocketAddrAny::clone(&peer)).map(|address| address.ip().is_loopback());
    let v6 = SocketAddrV6::try_from(peer).map(|address| {
        let ip = address.ip();
        ip.is_loopback() || ip.to_ipv4_mapped().is_some_and(|ip| ip.is_loopback())
    });
    matches!((v4, v6), (Ok(false), _) | (_, Ok(false)))
}

/// The entries of a directory that are numbers.
fn numbers_in(path: &[u8]) -> Result<Vec<i32>, Errno> {
    let mut numbers = Vec::new();
    files::each_entry(&files::open_directory(CWD, path)?, &mut |entry| {
        numbers.extend(files::number(entry.file_name().to_bytes()));
        Ok(())
    })?;
    Ok(numbers)
}
