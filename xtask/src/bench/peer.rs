//! The host's side of what guests do with their network card and vsock.

use anyhow::{Context, Result, ensure};
use io_payload::{HOST_ADDRESS, PACKET, STREAM_PORT, UDP_PORT, VSOCK_PORT, answer, give_address};
use std::fs::File;
use std::io;
use std::net::{TcpListener, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::thread;

/// The tap device of all guests, one after the other.
const TAP: &str = "kindling-bench";

/// Those that there are, by what a guest's device leads to.
#[derive(Debug, Default)]
pub(crate) struct Peers {
    /// A tap device.
    pub(crate) tap: Option<String>,
    /// A Unix socket, or the kernel's vsock.
    pub(crate) vsock: Option<PathBuf>,
}

impl Peers {
    /// Those that this host can have; why it cannot have the others.
    pub(crate) fn new(folder: &Path, omitted: &mut Vec<String>) -> Self {
        let mut try_to = |what: &str, result: Result<()>| {
            let _ = result.map_err(|error| omitted.push(format!("{what}: {error:#}")));
        };
        let mut peers = Self::default();
        try_to("network cards", network().map(|tap| peers.tap = Some(tap)));
        try_to("vsock", kernel_vsock().and_then(|()| vsock(folder)).map(|path| peers.vsock = Some(path)));
        peers
    }
}

/// Makes a tap device with somebody behind it; its name.
///
/// # Errors
/// Where that takes rights that this user does not have.
fn network() -> Result<String> {
    make_tap().with_context(|| format!("cannot make the tap device {TAP}"))?;
    give_address(TAP, HOST_ADDRESS).with_context(|| format!("cannot give {TAP} its address"))?;
    let socket = UdpSocket::bind((HOST_ADDRESS, UDP_PORT))?;
    let listener = TcpListener::bind((HOST_ADDRESS, STREAM_PORT))?;
    thread::spawn(move || exchange_packets(&socket));
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let _ = stream.set_nodelay(true);
            // A guest that ends in the middle is reported elsewhere.
            while answer(&mut stream).unwrap_or(false) {}
        }
    });
    Ok(TAP.to_owned())
}

/// Answers the packets that begin with a one, and sends as many as those that begin with a two ask for.
fn exchange_packets(socket: &UdpSocket) {
    let mut packet = [0; PACKET];
    while let Ok((_, guest)) = socket.recv_from(&mut packet) {
        let answers = match packet {
            [1, ..] => 1,
            [2, count, ..] => count,
            _ => 0,
        };
        for _ in 0..answers {
            let _ = socket.send_to(&packet, guest);
        }
    }
}

/// Somebody behind the vsock devices of monitors that lead to Unix sockets; the path that these are given.
fn vsock(folder: &Path) -> Result<PathBuf> {
    let path = folder.join("vsock");
    // A guest's port is a socket with its number behind the path.
    let listener = UnixListener::bind(format!("{}_{VSOCK_PORT}", path.display()))?;
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            while answer(&mut stream).unwrap_or(false) {}
        }
    });
    Ok(path)
}

/// Somebody behind the vsock devices that the kernel has for monitors.
///
/// # Errors
/// When the kernel has none.
#[expect(unsafe_code, reason = "std has no vsock")]
fn kernel_vsock() -> Result<()> {
    // SAFETY: the calls read a structure of the size that they are told, and descriptors are nobody else's.
    let listener = unsafe {
        let socket = libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0);
        ensure!(socket >= 0, "no vsock: {}", io::Error::last_os_error());
        let listener = OwnedFd::from_raw_fd(socket);
        let mut address: libc::sockaddr_vm = std::mem::zeroed();
        address.svm_family = libc::AF_VSOCK.try_into()?;
        address.svm_port = VSOCK_PORT;
        address.svm_cid = libc::VMADDR_CID_ANY;
        let size = size_of::<libc::sockaddr_vm>().try_into()?;
        let result = libc::bind(socket, (&raw const address).cast(), size);
        ensure!(result == 0 && libc::listen(socket, 8) == 0, "no vsock: {}", io::Error::last_os_error());
        listener
    };
    thread::spawn(move || {
        loop {
            // SAFETY: nobody wants the other's address, and the descriptor is nobody else's.
            let mut stream = unsafe {
                let stream = libc::accept(listener.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut());
                if stream < 0 {
                    return;
                }
                File::from_raw_fd(stream)
            };
            while answer(&mut stream).unwrap_or(false) {}
        }
    });
    Ok(())
}

/// The numbers are of linux/if_tun.h.
#[expect(unsafe_code, reason = "ioctls of tap devices")]
fn make_tap() -> io::Result<()> {
    const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
    const TUNSETPERSIST: libc::c_ulong = 0x4004_54cb;
    /// A tap without packet information, with virtio headers.
    const FLAGS: u16 = 0x0002 | 0x1000 | 0x4000;
    let tun = File::options().read(true).write(true).open("/dev/net/tun")?;
    let mut request = [0_u8; 40];
    request[..TAP.len()].copy_from_slice(TAP.as_bytes());
    request[16..18].copy_from_slice(&FLAGS.to_le_bytes());
    // SAFETY: TUNSETIFF takes a struct ifreq of 40 bytes, TUNSETPERSIST a number.
    let results = unsafe {
        let device = libc::ioctl(tun.as_raw_fd(), TUNSETIFF, request.as_mut_ptr());
        [device, libc::ioctl(tun.as_raw_fd(), TUNSETPERSIST, 1)]
    };
    if results == [0, 0] { Ok(()) } else { Err(io::Error::last_os_error()) }
}
