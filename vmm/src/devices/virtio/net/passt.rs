//! Networking without root: passt (<https://passt.top>) turns the guest's frames into sockets of the host.
//!
//! Frames go through a stream socket, each behind its length in four big-endian bytes, as QEMU's stream netdev
//! sends them. passt checks no more than that: it leaves no segmentation and no checksums to others.

use super::header::{self, Header};
use super::ports;
use super::{Frame, Link, Room, feature};
use crate::config::devices::{MacAddress, NetworkInterface, PortForward, user_network};
use crate::devices::virtio::Chain;
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, socketpair};
use std::io::{self, Read};
use std::net::Ipv4Addr;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

/// What it can do beside filling in checksums: say that those of its own frames are right.
pub(super) const FEATURES: u64 = feature::GUEST_CSUM;

/// Bytes of the length in front of each frame.
const LENGTH: usize = 4;
/// passt takes no longer frames (`ETH_MAX_MTU` of linux/if_ether.h in `tap_handler_passt` of its tap.c).
const FRAME_MAX: usize = 65_535;
/// Bytes that are read at once: two of the longest frames.
const INPUT_SIZE: usize = 2 * (LENGTH + FRAME_MAX);
/// Bytes of its messages that are read.
const MESSAGES_MAX: u64 = 8192;

/// What is said where there is no passt.
const MISSING: &str = "it needs the program passt, which Debian has in a package of this name";

/// The stream to a passt that runs, or starts.
#[derive(Debug)]
pub(super) struct Passt {
    socket: OwnedFd,
    input: Vec<u8>,
    /// What has been read and not been taken.
    unread: Range<usize>,
    /// Bytes of the frame at its start, if there is a whole one.
    held: Option<usize>,
    output: Vec<u8>,
    /// What has not been sent of the last frame.
    unsent: Range<usize>,
    /// Whether the driver wants to hear that checksums are right.
    tells_checked: bool,
}

/// A passt that starts.
#[derive(Debug)]
pub(crate) struct Starting {
    child: Child,
    forwards: Vec<PortForward>,
}

impl Starting {
    /// Waits until it runs: its first process ends when the one that stays is ready.
    ///
    /// # Errors
    /// What it says is wrong.
    pub(crate) fn wait(mut self) -> Result<(), String> {
        let status = self.child.wait().map_err(|error| format!("passt: {error}"))?;
        if status.success() {
            return self.forwards.iter().try_for_each(ports::check_taken);
        }
        let mut messages = Vec::new();
        if let Some(stream) = self.child.stderr.take() {
            // What cannot be read is missing from the message.
            let _ = stream.take(MESSAGES_MAX).read_to_end(&mut messages);
        }
        Err(reason(&String::from_utf8_lossy(&messages))
            .unwrap_or_else(|| format!("passt ended with {status}")))
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        // Where it was waited for, it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The last thing that passt said about its work.
fn reason(messages: &str) -> Option<String> {
    // It also logs to where there is no log, and says who it becomes.
    let is_noise = |line: &str| line.starts_with("Failed to send ") || line.starts_with("Don't run as root");
    let line = messages.lines().map(str::trim).rfind(|line| !line.is_empty() && !is_noise(line))?;
    Some(format!("passt says: {line}"))
}

impl Passt {
    /// Starts passt for a card.
    ///
    /// # Errors
    /// What is missing on the host, or in use.
    pub(super) fn start(interface: &NetworkInterface) -> Result<(OwnedFd, Starting), String> {
        interface.forwards.iter().try_for_each(ports::check_free)?;
        let (ours, its) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
            .map_err(|error| format!("the host gave no socket: {error}"))?;
        let mut command = Command::new(trusted_path::program("passt").ok_or(MISSING)?);
        command.args(arguments(interface)).args(["--fd", &its.as_raw_fd().to_string()]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        inherit(&mut command, its.as_raw_fd());
        let child = command.spawn().map_err(|error| format!("passt cannot be started: {error}"))?;
        let mut passt = Self::connected(ours);
        passt
            .announce(interface.mac())
            .map_err(|error| format!("passt cannot be told of the guest: {error}"))?;
        Ok((passt.socket, Starting { child, forwards: interface.forwards.clone() }))
    }

    /// A stream to something that speaks like passt.
    pub(super) const fn connected(socket: OwnedFd) -> Self {
        Self {
            socket,
            input: Vec::new(),
            unread: 0..0,
            held: None,
            output: Vec::new(),
            unsent: 0..0,
            tells_checked: false,
        }
    }

    /// Says which card the guest has. passt reads it in the guest's first frame, and until then sends to everybody,
    /// from whom no guest takes a TCP segment: a guest that only listens could never be reached.
    pub(super) fn announce(&mut self, mac: MacAddress) -> io::Result<()> {
        let frame = announcement(mac, user_network::ADDRESS);
        self.output = [&u32::try_from(frame.len()).unwrap_or(0).to_be_bytes()[..], &frame].concat();
        self.unsent = 0..self.output.len();
        self.flush()
    }

    /// Finds the next whole frame in what was read.
    fn find_frame(&mut self) -> io::Result<()> {
        let Some((length, rest)) = self.input[self.unread.clone()].split_first_chunk() else { return Ok(()) };
        let length = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
        // Where one length is wrong, all that follow would be.
        if !(header::ETHERNET..=FRAME_MAX).contains(&length) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        if rest.len() >= length {
            self.held = Some(length);
        }
        Ok(())
    }
}

/// An ARP announcement (RFC 826, and RFC 5227, section 2.3): it asks for the sender's own address, so nobody answers.
fn announcement(mac: MacAddress, address: Ipv4Addr) -> Vec<u8> {
    /// Of Ethernet and IPv4, with addresses of six and four bytes.
    const REQUEST: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 1];
    let (mac, address) = (&mac.0[..], &address.octets()[..]);
    [&[0xff; 6], mac, &[8, 6], &REQUEST, mac, address, &[0; 6], address].concat()
}

/// The command line of passt, but for its socket.
fn arguments(interface: &NetworkInterface) -> Vec<String> {
    let mtu = interface.mtu.unwrap_or(user_network::MTU).to_string();
    let [address, gateway, nameserver] =
        [user_network::ADDRESS, user_network::GATEWAY, user_network::NAMESERVER]
            .map(|address| address.to_string());
    let prefix = user_network::PREFIX.to_string();
    let mut arguments: Vec<String> = [
        &["--quiet", "--address", &address, "--netmask", &prefix, "--gateway", &gateway],
        // The guest gets at no service that listens on the host's loopback alone.
        &["--no-map-gw", "--dns-forward", &nameserver, "--mtu", &mtu][..],
    ]
    .concat()
    .into_iter()
    .map(str::to_owned)
    .collect();
    arguments.extend(ports::arguments(&interface.forwards));
    arguments
}

/// Leaves a descriptor open in a program that is started.
#[expect(unsafe_code, reason = "code between fork and exec")]
fn inherit(command: &mut Command, fd: i32) {
    use rustix::io::{FdFlags, fcntl_setfd};
    // SAFETY: the closure makes one system call and neither allocates nor locks; the descriptor is open, because
    // the caller keeps it until the program has been started.
    unsafe {
        command.pre_exec(move || Ok(fcntl_setfd(BorrowedFd::borrow_raw(fd), FdFlags::empty())?));
    }
}

impl Link for Passt {
    fn features(&self) -> u64 {
        FEATURES
    }

    fn accept(&mut self, features: u64) -> io::Result<()> {
        self.tells_checked = features & feature::GUEST_CSUM != 0;
        self.input.resize(INPUT_SIZE, 0);
        self.output.resize(LENGTH + FRAME_MAX, 0);
        Ok(())
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn receive(&mut self, _: &Room) -> io::Result<Option<Frame>> {
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
        // passt computed the checksums a moment ago, and nothing changed the frame on its way here.
        Ok(Some(Frame { header: Header::checked(self.tells_checked), placed: 0 }))
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
            // A peer that has gone is an error here and not a signal.
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
