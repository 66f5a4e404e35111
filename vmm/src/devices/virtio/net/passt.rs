//! User-mode networking: passt (<https://passt.top>) translates between the guest's frames and sockets of the host,
//! without root.
//!
//! Frames are transferred over a stream socket, each after its length in four big-endian bytes, which is the protocol
//! of QEMU's stream netdev. The frames have no virtio header, so that passt supports neither segmentation nor checksum
//! offload.

use super::header::{self, Header};
use super::ports;
use super::starting::Starting;
use super::{Frame, FrameSpace, Link, feature};
use crate::config::devices::{MacAddress, NetworkInterface, user_network};
use crate::devices::virtio::Chain;
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, socketpair};
use std::io;
use std::net::Ipv4Addr;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

/// Offload features: the device reports that the checksums of passt's frames are valid.
pub(super) const FEATURES: u64 = feature::GUEST_CSUM;

/// Bytes of the length prefix of each frame.
const LENGTH: usize = 4;
/// Maximum frame length of passt (`ETH_MAX_MTU` of linux/if_ether.h in `tap_handler_passt` of its tap.c).
const FRAME_MAX: usize = 65_535;
/// Bytes per read: two of the longest frames.
const INPUT_SIZE: usize = 2 * (LENGTH + FRAME_MAX);

/// The error message when passt is not installed.
const MISSING: &str = "the program passt is not installed; Debian has it in the package passt";

/// The stream to a running or starting passt.
#[derive(Debug)]
pub(super) struct Passt {
    socket: OwnedFd,
    input: Vec<u8>,
    /// The range of `input` that has not been processed.
    unread: Range<usize>,
    /// Length of the complete frame at the start of that range, if there is one.
    held: Option<usize>,
    output: Vec<u8>,
    /// The range of `output` that has not been sent.
    unsent: Range<usize>,
    /// Whether the driver has accepted `GUEST_CSUM`.
    reports_checked: bool,
}

impl Passt {
    /// Starts passt for a network device.
    ///
    /// # Errors
    /// When passt is not installed or does not start, or one of the ports is in use.
    pub(super) fn start(interface: &NetworkInterface) -> Result<(OwnedFd, Starting), String> {
        interface.forwards.iter().try_for_each(ports::check_free)?;
        let (ours, peer) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
            .map_err(|error| format!("cannot create a socket: {error}"))?;
        let mut command = Command::new(trusted_path::program("passt").ok_or(MISSING)?);
        command.args(arguments(interface)).args(["--fd", &peer.as_raw_fd().to_string()]);
        // The environment may have secrets, and passt handles whatever the guest sends.
        command.env_clear().stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        inherit(&mut command, peer.as_raw_fd());
        let child = command.spawn().map_err(|error| format!("cannot start passt: {error}"))?;
        let mut passt = Self::connected(ours);
        passt.announce(interface.mac()).map_err(|error| format!("cannot send to passt: {error}"))?;
        Ok((passt.socket, Starting::new(child, interface.forwards.clone())))
    }

    /// Uses a stream to a peer that implements passt's protocol.
    pub(super) const fn connected(socket: OwnedFd) -> Self {
        Self {
            socket,
            input: Vec::new(),
            unread: 0..0,
            held: None,
            output: Vec::new(),
            unsent: 0..0,
            reports_checked: false,
        }
    }

    /// Announces the guest's MAC address. passt learns it from the guest's first frame, and broadcasts until then. A
    /// guest ignores broadcast TCP segments, so that a guest that only listens would be unreachable.
    pub(super) fn announce(&mut self, mac: MacAddress) -> io::Result<()> {
        let frame = announcement(mac, user_network::ADDRESS);
        self.output = [&u32::try_from(frame.len()).unwrap_or(0).to_be_bytes()[..], &frame].concat();
        self.unsent = 0..self.output.len();
        self.flush()
    }

    /// Updates `held` with the next complete frame in `input`.
    fn find_frame(&mut self) -> io::Result<()> {
        let Some((length, rest)) = self.input[self.unread.clone()].split_first_chunk() else { return Ok(()) };
        let length = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
        // After an invalid length the position of the next frame is unknown.
        if !(header::ETHERNET..=FRAME_MAX).contains(&length) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        if rest.len() >= length {
            self.held = Some(length);
        }
        Ok(())
    }
}

/// An ARP announcement (RFC 826, and RFC 5227, section 2.3): a request for the sender's own address, which is not
/// answered.
fn announcement(mac: MacAddress, address: Ipv4Addr) -> Vec<u8> {
    /// For Ethernet and IPv4, with addresses of six and four bytes.
    const REQUEST: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 1];
    let (mac, address) = (&mac.0[..], &address.octets()[..]);
    [&[0xff; 6], mac, &[8, 6], &REQUEST, mac, address, &[0; 6], address].concat()
}

/// The command line of passt without its socket.
fn arguments(interface: &NetworkInterface) -> Vec<String> {
    let mtu = interface.mtu.unwrap_or(user_network::MTU).to_string();
    let [address, gateway, nameserver] =
        [user_network::ADDRESS, user_network::GATEWAY, user_network::NAMESERVER]
            .map(|address| address.to_string());
    let prefix = user_network::PREFIX.to_string();
    let mut arguments: Vec<String> = [
        &["--quiet", "--address", &address, "--netmask", &prefix, "--gateway", &gateway],
        // Services that listen only on the host's loopback are unreachable for the guest.
        &["--no-map-gw", "--dns-forward", &nameserver, "--mtu", &mtu][..],
    ]
    .concat()
    .into_iter()
    .map(str::to_owned)
    .collect();
    arguments.extend(ports::arguments(&interface.forwards));
    arguments
}

/// Lets a child process inherit a descriptor.
#[expect(unsafe_code, reason = "code between fork and exec")]
fn inherit(command: &mut Command, fd: i32) {
    use rustix::io::{FdFlags, fcntl_setfd};
    // SAFETY: the closure makes one system call and neither allocates nor locks; the descriptor is open, because the
    // caller keeps it until the process has been started.
    unsafe {
        command.pre_exec(move || Ok(fcntl_setfd(BorrowedFd::borrow_raw(fd), FdFlags::empty())?));
    }
}

impl Link for Passt {
    fn features(&self) -> u64 {
        FEATURES
    }

    fn accept(&mut self, features: u64) -> io::Result<()> {
        self.reports_checked = features & feature::GUEST_CSUM != 0;
        self.input.resize(INPUT_SIZE, 0);
        self.output.resize(LENGTH + FRAME_MAX, 0);
        Ok(())
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn receive(&mut self, _: &FrameSpace) -> io::Result<Option<Frame>> {
        self.find_frame()?;
        if self.held.is_none() {
            self.input.copy_within(self.unread.clone(), 0);
            self.unread = 0..self.unread.len();
            let space = &mut self.input[self.unread.end..];
            let (count, _) = rustix::net::recv(&self.socket, space, RecvFlags::DONTWAIT)?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.unread.end += count;
            self.find_frame()?;
        }
        self.held.ok_or(io::ErrorKind::WouldBlock)?;
        // passt has just computed the checksums, and the frame cannot be corrupted on a local socket.
        Ok(Some(Frame { header: Header::checked(self.reports_checked), placed: 0 }))
    }

    fn rest(&self) -> &[u8] {
        let start = self.unread.start + LENGTH;
        self.held.and_then(|length| self.input.get(start..start + length)).unwrap_or_default()
    }

    fn release(&mut self) {
        if let Some(length) = self.held.take() {
            self.unread.start += LENGTH + length;
        }
    }

    fn send(&mut self, chain: &mut Chain) -> io::Result<()> {
        self.flush()?;
        if self.has_unsent() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let wrong = || io::Error::from(io::ErrorKind::InvalidInput);
        let mut header = Header::default();
        chain.read(&mut header.0).map_err(|_| wrong())?;
        let length = usize::try_from(chain.readable_len()).ok();
        let length = length.filter(|length| *length <= FRAME_MAX).ok_or_else(wrong)?;
        let (prefix, frame) = self.output.split_at_mut(LENGTH);
        prefix.copy_from_slice(&u32::try_from(length).unwrap_or(0).to_be_bytes());
        chain.read(&mut frame[..length]).map_err(|_| wrong())?;
        if !header.apply(&mut frame[..length]) {
            return Err(wrong());
        }
        self.unsent = 0..LENGTH + length;
        self.flush()
    }

    fn has_unsent(&self) -> bool {
        !self.unsent.is_empty()
    }

    fn flush(&mut self) -> io::Result<()> {
        while self.has_unsent() {
            // A closed peer causes an error instead of SIGPIPE.
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match rustix::net::send(&self.socket, &self.output[self.unsent.clone()], flags) {
                Ok(count) => self.unsent.start += count,
                Err(Errno::AGAIN) => break,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}
