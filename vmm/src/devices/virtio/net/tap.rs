//! A tap device (Documentation/networking/tuntap.rst): the host's end of the device is a network interface. Frames are
//! transferred with the guest's virtio header, so that the final receiver computes checksums and segments only if
//! necessary.
#![expect(unsafe_code, reason = "ioctls, and reads and writes of guest memory")]

use super::header::{self, Header};
use super::{FRAME_MAX, Frame, FrameSpace, Link, feature};
use crate::devices::virtio::vectored;
use crate::devices::virtio::{Chain, Segment};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::ioctl::{Opcode, Setter, ioctl};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Maximum length of an interface name in bytes, including its NUL (`IFNAMSIZ` in linux/if.h).
const NAME_SIZE: usize = 16;
const DEVICE: &str = "/dev/net/tun";

// linux/if_tun.h.
const TUNSETIFF: Opcode = 0x4004_54ca;
const TUNSETOFFLOAD: Opcode = 0x4004_54d0;
const TUNSETVNETHDRSZ: Opcode = 0x4004_54d8;
const IFF_TAP: u16 = 0x0002;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;
const TUN_F_CSUM: usize = 0x01;
const TUN_F_TSO4: usize = 0x02;
const TUN_F_TSO6: usize = 0x04;
const TUN_F_TSO_ECN: usize = 0x08;
const TUN_F_UFO: usize = 0x10;

/// Device features, and the tap offloads that they allow.
const OFFLOADS: [(u64, usize); 5] = [
    (feature::GUEST_CSUM, TUN_F_CSUM),
    (feature::GUEST_TSO4, TUN_F_TSO4),
    (feature::GUEST_TSO6, TUN_F_TSO6),
    (feature::GUEST_ECN, TUN_F_TSO_ECN),
    (feature::GUEST_UFO, TUN_F_UFO),
];

/// Offload features that every tap device supports.
pub(super) fn features() -> u64 {
    let to_host = feature::HOST_TSO4 | feature::HOST_TSO6 | feature::HOST_ECN | feature::HOST_UFO;
    OFFLOADS.iter().fold(to_host, |all, (feature, _)| all | feature)
}

/// An attached tap device.
#[derive(Debug)]
pub(super) struct Tap {
    fd: OwnedFd,
    header: Header,
    /// The part of a frame that does not fit into guest memory; allocated on first use.
    buffer: Vec<u8>,
    /// Number of frame bytes in `buffer`.
    rest: usize,
    /// Segments of the current transfer; kept to reuse the memory.
    segments: Vec<Segment>,
}

/// `struct ifreq` of linux/if.h as used by TUNSETIFF.
#[repr(C)]
struct Request {
    name: [u8; NAME_SIZE],
    flags: u16,
    padding: [u8; 22],
}

impl Tap {
    /// Attaches to an existing tap device.
    ///
    /// # Errors
    /// When the device does not exist or is not usable; the message contains the remedy.
    pub(super) fn open(name: &str) -> Result<OwnedFd, String> {
        if name.is_empty() || name.len() >= NAME_SIZE {
            return Err(format!("an interface name has 1 to {} bytes", NAME_SIZE - 1));
        }
        if name.bytes().any(|byte| byte == 0 || byte == b'/' || byte.is_ascii_whitespace()) || name == ".." {
            return Err("this is not a valid interface name".into());
        }
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let fd = rustix::fs::open(DEVICE, flags, Mode::empty()).map_err(|error| match error {
            Errno::NOENT | Errno::NODEV | Errno::NXIO => {
                format!("{DEVICE} does not exist; `modprobe tun` loads its kernel module")
            }
            Errno::ACCESS | Errno::PERM => format!("no permission to open {DEVICE}"),
            error => format!("{DEVICE}: {error}"),
        })?;
        // TUNSETIFF would otherwise create an interface that exists only as long as this process and is not connected.
        let make =
            format!("create it with `ip tuntap add {name} mode tap user $USER` and `ip link set {name} up`");
        if rustix::net::netdevice::name_to_index(&fd_for_names()?, name).is_err() {
            return Err(format!("no such interface on the host; {make}"));
        }
        let mut request =
            Request { name: [0; NAME_SIZE], flags: IFF_TAP | IFF_NO_PI | IFF_VNET_HDR, padding: [0; 22] };
        request.name[..name.len()].copy_from_slice(name.as_bytes());
        // SAFETY: TUNSETIFF reads and writes a struct ifreq, which Request lays out in full size.
        let result = unsafe { ioctl(&fd, rustix::ioctl::Updater::<TUNSETIFF, _>::new(&mut request)) };
        result.map_err(|error| match error {
            Errno::BUSY => "it is in use by another process".to_owned(),
            Errno::PERM => format!("it belongs to another user; {make}"),
            Errno::INVAL => format!("it is not a tap device, or has several queues; {make}"),
            error => error.to_string(),
        })?;
        let length = i32::try_from(header::LENGTH).unwrap_or(0);
        // SAFETY: TUNSETVNETHDRSZ reads an int.
        unsafe { ioctl(&fd, Setter::<TUNSETVNETHDRSZ, _>::new(length)) }
            .map_err(|error| format!("it does not support headers of {length} bytes: {error}"))?;
        Ok(fd)
    }

    /// Uses a descriptor that transfers one frame per read and write.
    pub(super) const fn attached(fd: OwnedFd) -> Self {
        Self { fd, header: Header([0; header::LENGTH]), buffer: Vec::new(), rest: 0, segments: Vec::new() }
    }

    fn set_offload(&self, offload: usize) -> io::Result<()> {
        // SAFETY: TUNSETOFFLOAD takes a number.
        Ok(unsafe { ioctl(&self.fd, rustix::ioctl::IntegerSetter::<TUNSETOFFLOAD>::new_usize(offload)) }?)
    }
}

/// A socket for the query of interfaces; any kind of socket works.
fn fd_for_names() -> Result<OwnedFd, String> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
    socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
        .map_err(|error| format!("cannot create a socket: {error}"))
}

impl Link for Tap {
    fn features(&self) -> u64 {
        features()
    }

    fn accept(&mut self, features: u64) -> io::Result<()> {
        let accepted = OFFLOADS.iter().filter(|(feature, _)| features & feature != 0);
        self.set_offload(accepted.fold(0, |all, (_, flag)| all | flag))
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn receive(&mut self, space: &FrameSpace) -> io::Result<Option<Frame>> {
        if self.buffer.is_empty() {
            // One byte more than the longest frame: a read that fills it was truncated.
            self.buffer = vec![0; FRAME_MAX + 1];
        }
        self.segments.clear();
        self.segments.push(Segment::host(&mut self.header.0));
        self.segments.extend_from_slice(&space.segments);
        self.segments.push(Segment::host(&mut self.buffer));
        // SAFETY: header and buffer are owned; the other segments were checked to lie in guest memory when their chains
        // were popped, and the device keeps that memory mapped. The guest may access it concurrently, which the kernel
        // tolerates.
        let result = unsafe { vectored::read(self.fd.as_fd(), &self.segments) };
        let length = match result {
            // The kernel has dropped a frame that it cannot describe (`tun_put_user` in drivers/net/tun.c).
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => None,
            result => result?.checked_sub(header::LENGTH).filter(|length| *length <= FRAME_MAX),
        };
        let Some(length) = length else { return Ok(None) };
        let placed = length.min(space.length);
        self.rest = length - placed;
        Ok(Some(Frame { header: self.header, placed }))
    }

    fn rest(&self) -> &[u8] {
        &self.buffer[..self.rest]
    }

    fn release(&mut self) {
        self.rest = 0;
    }

    fn send(&mut self, chain: &mut Chain) -> io::Result<()> {
        // The tap driver validates the header, as it does for any process.
        // SAFETY: the segments were checked to lie in guest memory when the chain was popped, and the device keeps that
        // memory mapped.
        unsafe { vectored::write(self.fd.as_fd(), chain.readable()) }.map(drop)
    }
}
