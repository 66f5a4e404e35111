//! A tap device (Documentation/networking/tuntap.rst): the other end of the guest's card is an interface of the
//! host. Frames come and go with the guest's own headers, so that checksums and segmentation are left to whoever
//! needs them.
#![expect(unsafe_code, reason = "ioctls, and reads and writes of guest memory")]

use super::header::{self, Header};
use super::{FRAME_MAX, Frame, Link, Room, feature};
use crate::devices::virtio::vectored;
use crate::devices::virtio::{Chain, Segment};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::ioctl::{Opcode, Setter, ioctl};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Bytes of an interface's name, with a NUL behind it (`IFNAMSIZ` in linux/if.h).
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

/// Features of the card, and what the tap may do with frames for a driver that has accepted them.
const OFFLOADS: [(u64, usize); 5] = [
    (feature::GUEST_CSUM, TUN_F_CSUM),
    (feature::GUEST_TSO4, TUN_F_TSO4),
    (feature::GUEST_TSO6, TUN_F_TSO6),
    (feature::GUEST_ECN, TUN_F_TSO_ECN),
    (feature::GUEST_UFO, TUN_F_UFO),
];

/// Offloads of every tap.
pub(super) fn features() -> u64 {
    let to_host = feature::HOST_TSO4 | feature::HOST_TSO6 | feature::HOST_ECN | feature::HOST_UFO;
    OFFLOADS.iter().fold(to_host, |all, (feature, _)| all | feature)
}

/// An attached tap device.
#[derive(Debug)]
pub(super) struct Tap {
    fd: OwnedFd,
    header: Header,
    /// For what finds no room in guest memory; made when it is needed.
    buffer: Vec<u8>,
    /// Bytes of the frame that are in it.
    rest: usize,
    /// Scratch space: where the next frame goes.
    segments: Vec<Segment>,
}

/// `struct ifreq` of linux/if.h as TUNSETIFF takes it.
#[repr(C)]
struct Request {
    name: [u8; NAME_SIZE],
    flags: u16,
    padding: [u8; 22],
}

impl Tap {
    /// Attaches to a tap device that exists.
    ///
    /// # Errors
    /// What is wrong, and what to do.
    pub(super) fn open(name: &str) -> Result<OwnedFd, String> {
        if name.is_empty() || name.len() >= NAME_SIZE {
            return Err(format!("the name of an interface has 1 to {} bytes", NAME_SIZE - 1));
        }
        if name.bytes().any(|byte| byte == 0 || byte == b'/' || byte.is_ascii_whitespace()) || name == ".." {
            return Err("no interface can have this name".into());
        }
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let fd = rustix::fs::open(DEVICE, flags, Mode::empty()).map_err(|error| match error {
            Errno::NOENT | Errno::NODEV | Errno::NXIO => {
                format!("the host has no {DEVICE}; `modprobe tun` may make it")
            }
            Errno::ACCESS | Errno::PERM => format!("{DEVICE} may not be opened by this user"),
            error => format!("{DEVICE}: {error}"),
        })?;
        // The kernel would make one that ends with this process and leads nowhere.
        let make = format!("`ip tuntap add {name} mode tap user $USER` and `ip link set {name} up` make one");
        if rustix::net::netdevice::name_to_index(&fd_for_names()?, name).is_err() {
            return Err(format!("the host has no such interface; {make}"));
        }
        let mut request =
            Request { name: [0; NAME_SIZE], flags: IFF_TAP | IFF_NO_PI | IFF_VNET_HDR, padding: [0; 22] };
        request.name[..name.len()].copy_from_slice(name.as_bytes());
        // SAFETY: TUNSETIFF reads and writes a struct ifreq, which Request lays out in full size.
        let result = unsafe { ioctl(&fd, rustix::ioctl::Updater::<TUNSETIFF, _>::new(&mut request)) };
        result.map_err(|error| match error {
            Errno::BUSY => "another program uses it".to_owned(),
            Errno::PERM => format!("it belongs to another user; {make}"),
            Errno::INVAL => format!("it is not a tap device, or one of several queues; {make}"),
            error => error.to_string(),
        })?;
        let length = i32::try_from(header::LENGTH).unwrap_or(0);
        // SAFETY: TUNSETVNETHDRSZ reads an int.
        unsafe { ioctl(&fd, Setter::<TUNSETVNETHDRSZ, _>::new(length)) }
            .map_err(|error| format!("it takes no headers of {length} bytes: {error}"))?;
        Ok(fd)
    }

    /// Of a descriptor that moves a frame with each read and write.
    pub(super) const fn attached(fd: OwnedFd) -> Self {
        Self { fd, header: Header([0; header::LENGTH]), buffer: Vec::new(), rest: 0, segments: Vec::new() }
    }

    fn set_offload(&self, offload: usize) -> io::Result<()> {
        // SAFETY: TUNSETOFFLOAD takes a number.
        Ok(unsafe { ioctl(&self.fd, rustix::ioctl::IntegerSetter::<TUNSETOFFLOAD>::new_usize(offload)) }?)
    }
}

/// Any socket can be asked for interfaces.
fn fd_for_names() -> Result<OwnedFd, String> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
    socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
        .map_err(|error| format!("the host gave no socket: {error}"))
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

    fn receive(&mut self, room: &Room) -> io::Result<Option<Frame>> {
        if self.buffer.is_empty() {
            // One byte more than the longest frame: what fills it was cut off.
            self.buffer = vec![0; FRAME_MAX + 1];
        }
        self.segments.clear();
        self.segments.push(Segment::own(&mut self.header.0));
        self.segments.extend_from_slice(&room.segments);
        self.segments.push(Segment::own(&mut self.buffer));
        // SAFETY: header and buffer are ours; the rest was checked to lie in guest memory when its chains were made,
        // and the device holds that memory. The guest may use it meanwhile, which the kernel copes with.
        let result = unsafe { vectored::read(self.fd.as_fd(), &self.segments) };
        let length = match result {
            // The kernel had a frame that it cannot describe (`tun_put_user` in drivers/net/tun.c).
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => None,
            result => result?.checked_sub(header::LENGTH).filter(|length| *length <= FRAME_MAX),
        };
        let Some(length) = length else { return Ok(None) };
        let placed = length.min(room.length);
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
        // The tap checks the header as it checks those of any program.
        // SAFETY: the segments were checked to lie in guest memory when the chain was made, and the device holds
        // that memory.
        unsafe { vectored::write(self.fd.as_fd(), chain.readable()) }.map(drop)
    }
}
