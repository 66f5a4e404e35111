//! The host side of the guests' network and vsock operations.

use anyhow::{Context, Result, ensure};
use io_payload::{HOST_ADDRESS, PACKET_LEN, STREAM_PORT, UDP_PORT, VSOCK_PORT, serve_stream, set_address};
use std::fs::File;
use std::io;
use std::net::{TcpListener, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::thread;

/// The tap device, which all guests use one after the other.
const TAP: &str = "kindling-bench";

/// The peers that this host can provide.
#[derive(Debug, Default)]
pub(crate) struct Peers {
    /// The name of the tap device.
    pub(crate) tap: Option<String>,
    /// The path of the Unix socket for monitors that connect vsock to one; other monitors use the kernel's vsock.
    pub(crate) vsock: Option<PathBuf>,
}

impl Peers {
    /// Sets up the peers. The reason why one cannot be set up is added to `omitted`.
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

/// Creates a tap device, serves it, and returns its name.
///
/// # Errors
/// When the user lacks CAP_NET_ADMIN.
fn network() -> Result<String> {
    make_tap().with_context(|| format!("cannot create the tap device {TAP}"))?;
    set_address(TAP, HOST_ADDRESS).with_context(|| format!("cannot set the address of {TAP}"))?;
    let socket = UdpSocket::bind((HOST_ADDRESS, UDP_PORT))?;
    let listener = TcpListener::bind((HOST_ADDRESS, STREAM_PORT))?;
    thread::spawn(move || exchange_packets(&socket));
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let _ = stream.set_nodelay(true);
            // A guest that ends early is reported elsewhere.
            while serve_stream(&mut stream).unwrap_or(false) {}
        }
    });
    Ok(TAP.to_owned())
}

/// Answers a packet that begins with 1, and sends as many packets as the second byte of a packet that begins with 2.
fn exchange_packets(socket: &UdpSocket) {
    let mut packet = [0; PACKET_LEN];
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

/// Serves vsock for monitors that connect it to Unix sockets; returns the path to pass to them.
fn vsock(folder: &Path) -> Result<PathBuf> {
    let path = folder.join("vsock");
    // The socket of a vsock port is the path with `_PORT` appended.
    let listener = UnixListener::bind(format!("{}_{VSOCK_PORT}", path.display()))?;
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            while serve_stream(&mut stream).unwrap_or(false) {}
        }
    });
    Ok(path)
}

/// Serves vsock for monitors that use the kernel's vhost-vsock.
///
/// # Errors
/// When the kernel has no vsock.
#[expect(unsafe_code, reason = "std has no vsock")]
fn kernel_vsock() -> Result<()> {
    // SAFETY: the calls read a structure of the given size, and only `listener` owns the descriptor.
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
            // SAFETY: accept may be called without an address, and only `stream` owns the descriptor.
            let mut stream = unsafe {
                let stream = libc::accept(listener.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut());
                if stream < 0 {
                    return;
                }
                File::from_raw_fd(stream)
            };
            while serve_stream(&mut stream).unwrap_or(false) {}
        }
    });
    Ok(())
}

/// Creates a persistent tap device; the constants are from linux/if_tun.h.
#[expect(unsafe_code, reason = "ioctls of tap devices")]
fn make_tap() -> io::Result<()> {
    const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
    const TUNSETPERSIST: libc::c_ulong = 0x4004_54cb;
    /// A tap device without packet information, with virtio headers.
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
