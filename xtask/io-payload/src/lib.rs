//! What the payload of `cargo xtask bench --scenario io` and whoever starts it agree on.
//!
//! The payload's first argument is how often it does each operation, and a second one, [`REPORTS`], says that its
//! balloon gives free memory back. It does the operations for whose device it finds, and then says on one line for each of them its name and the nanoseconds of all repetitions on the guest's clock, and at
//! last [`END`]. At the beginning and end of the repetitions it writes to [`MARK_PORT`], which no monitor
//! answers, but which KVM's tracepoints show.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsRawFd;

/// The port of a PC's power-on codes.
pub const MARK_PORT: u16 = 0x80;
/// Written there when an operation has been repeated; its number is written before.
pub const DONE: u8 = 0xff;
/// What the payload says at the end.
pub const END: &str = "all operations are done";
/// The argument of a guest whose kernel names free memory to its host, of which a program learns nothing otherwise.
pub const REPORTS: &str = "reports";
/// Bytes of the disk that it reads and overwrites.
pub const DISK_BYTES: u64 = 32 << 20;

/// The host's end of the guest's network.
pub const HOST_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 1);
/// The guest's address there.
pub const GUEST_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 2);
/// Where both take packets.
pub const UDP_PORT: u16 = 7001;
/// Where the host takes TCP streams.
pub const STREAM_PORT: u16 = 7002;
/// Where the host takes vsock streams.
pub const VSOCK_PORT: u32 = 7003;
/// Bytes of a packet's data: with the headers of IP and UDP they are 1500.
pub const PACKET: usize = 1472;
/// Packets that may be on their way.
pub const PACKETS: u32 = 32;
/// Bytes of a piece of a stream.
const PIECE: usize = 64 << 10;
/// Bytes of a message that is sent back.
const MESSAGE: usize = 64;

/// The guest's side of a stream's operation: says which and how often, and does it.
///
/// # Errors
/// When the stream breaks.
pub fn ask(stream: &mut (impl Read + Write), operation: Operation, count: u32) -> io::Result<()> {
    let mut request = [0; 8];
    request[0] = operation as u8;
    request[4..].copy_from_slice(&count.to_le_bytes());
    stream.write_all(&request)?;
    let mut buffer = vec![0; PIECE];
    for _ in 0..count {
        match operation {
            Operation::TcpSend64k | Operation::VsockSend64k => stream.write_all(&buffer)?,
            Operation::TcpReceive64k | Operation::VsockReceive64k => stream.read_exact(&mut buffer)?,
            _ => {
                stream.write_all(&buffer[..MESSAGE])?;
                stream.read_exact(&mut buffer[..MESSAGE])?;
            }
        }
    }
    // What was sent has arrived when the host says so.
    stream.read_exact(&mut buffer[..1])
}

/// The host's side of one operation; `false` at the end of the stream.
///
/// # Errors
/// When the stream breaks, or asks for something else.
pub fn answer(stream: &mut (impl Read + Write)) -> io::Result<bool> {
    let mut request = [0; 8];
    match stream.read_exact(&mut request) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
        result => result?,
    }
    let [number, _, _, _, a, b, c, d] = request;
    let operation = Operation::from_number(number).ok_or(io::ErrorKind::InvalidData)?;
    let mut buffer = vec![0; PIECE];
    for _ in 0..u32::from_le_bytes([a, b, c, d]) {
        match operation {
            Operation::TcpSend64k | Operation::VsockSend64k => stream.read_exact(&mut buffer)?,
            Operation::TcpReceive64k | Operation::VsockReceive64k => stream.write_all(&buffer)?,
            _ => {
                stream.read_exact(&mut buffer[..MESSAGE])?;
                stream.write_all(&buffer[..MESSAGE])?;
            }
        }
    }
    stream.write_all(&[1])?;
    Ok(true)
}

/// Gives a network interface an address in a network of 256, and switches it on.
///
/// # Errors
/// When there is no such interface, or this user may not.
#[expect(unsafe_code, reason = "ioctls of network interfaces")]
pub fn give_address(interface: &str, address: Ipv4Addr) -> io::Result<()> {
    /// Switched on and running (IFF_UP, IFF_RUNNING in linux/if.h).
    const UP: u16 = 0x41;
    let socket = UdpSocket::bind(("0.0.0.0", 0))?;
    // struct sockaddr_in: family, port, address.
    let sockaddr = |address: Ipv4Addr| {
        let [a, b, c, d] = address.octets();
        let [low, high] = u16::try_from(libc::AF_INET).unwrap_or(0).to_le_bytes();
        [low, high, 0, 0, a, b, c, d]
    };
    for (code, value) in [
        (libc::SIOCSIFADDR, &sockaddr(address)[..]),
        (libc::SIOCSIFNETMASK, &sockaddr(Ipv4Addr::new(255, 255, 255, 0))),
        (libc::SIOCSIFFLAGS, &UP.to_le_bytes()),
    ] {
        // struct ifreq: 16 bytes of name, then a value.
        let mut request = [0_u8; 40];
        let name = interface.as_bytes().get(..15).unwrap_or(interface.as_bytes());
        request[..name.len()].copy_from_slice(name);
        request[16..16 + value.len()].copy_from_slice(value);
        // SAFETY: these ioctls read a struct ifreq of 40 bytes.
        if unsafe { libc::ioctl(socket.as_raw_fd(), code, request.as_ptr()) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// MiB that a guest gives back at once, half of what the smallest guest has.
const REPORTED_MIB: u32 = 64;

/// What is done with a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Operation {
    /// 4 KiB of the disk, anywhere.
    BlockRead4k,
    /// The same, 32 at a time.
    BlockRead4kDepth32,
    /// 4 KiB to the disk, anywhere.
    BlockWrite4k,
    /// The same, 32 at a time.
    BlockWrite4kDepth32,
    /// 128 KiB of the disk, one after the other.
    BlockRead128k,
    /// 128 KiB to the disk, one after the other.
    BlockWrite128k,
    /// A packet of 1500 bytes to the host, of which every 32nd is answered.
    NetSend1500,
    /// A packet of 1500 bytes from the host, which sends 32 when it is asked.
    NetReceive1500,
    /// 64 KiB of a TCP stream to the host.
    TcpSend64k,
    /// 64 KiB of a TCP stream from the host.
    TcpReceive64k,
    /// 64 bytes to the host and back, over vsock.
    VsockRoundTrip64,
    /// 64 KiB of a vsock stream to the host.
    VsockSend64k,
    /// 64 KiB of a vsock stream from the host.
    VsockReceive64k,
    /// 4 KiB of the host's random numbers.
    EntropyRead4k,
    /// 1 MiB of memory that the guest used before and does not need any more, given back to the host. It has no
    /// marks: the guest's kernel does it when it likes.
    BalloonReport1m,
}

impl Operation {
    /// All of them, in the order in which they are done.
    pub const ALL: [Self; 15] = [
        Self::BlockRead4k,
        Self::BlockRead4kDepth32,
        Self::BlockWrite4k,
        Self::BlockWrite4kDepth32,
        Self::BlockRead128k,
        Self::BlockWrite128k,
        Self::NetSend1500,
        Self::NetReceive1500,
        Self::TcpSend64k,
        Self::TcpReceive64k,
        Self::VsockRoundTrip64,
        Self::VsockSend64k,
        Self::VsockReceive64k,
        Self::EntropyRead4k,
        Self::BalloonReport1m,
    ];

    /// What the payload and the bench's rows call it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::BlockRead4k => "block_read_4k",
            Self::BlockRead4kDepth32 => "block_read_4k_depth_32",
            Self::BlockWrite4k => "block_write_4k",
            Self::BlockWrite4kDepth32 => "block_write_4k_depth_32",
            Self::BlockRead128k => "block_read_128k",
            Self::BlockWrite128k => "block_write_128k",
            Self::NetSend1500 => "net_send_1500",
            Self::NetReceive1500 => "net_receive_1500",
            Self::TcpSend64k => "tcp_send_64k",
            Self::TcpReceive64k => "tcp_receive_64k",
            Self::VsockRoundTrip64 => "vsock_round_trip_64",
            Self::VsockSend64k => "vsock_send_64k",
            Self::VsockReceive64k => "vsock_receive_64k",
            Self::EntropyRead4k => "entropy_read_4k",
            Self::BalloonReport1m => "balloon_report_1m",
        }
    }

    /// What a table's column is called.
    #[must_use]
    pub const fn title(self) -> &'static str {
        match self {
            Self::BlockRead4k => "read 4k",
            Self::BlockRead4kDepth32 => "read 4k x32",
            Self::BlockWrite4k => "write 4k",
            Self::BlockWrite4kDepth32 => "write 4k x32",
            Self::BlockRead128k => "read 128k",
            Self::BlockWrite128k => "write 128k",
            Self::NetSend1500 => "send 1500",
            Self::NetReceive1500 => "receive 1500",
            Self::TcpSend64k => "TCP out 64k",
            Self::TcpReceive64k => "TCP in 64k",
            Self::VsockRoundTrip64 => "vsock echo 64",
            Self::VsockSend64k => "vsock out 64k",
            Self::VsockReceive64k => "vsock in 64k",
            Self::EntropyRead4k => "random 4k",
            Self::BalloonReport1m => "give back 1m",
        }
    }

    /// How often it is done where 4 KiB are asked for so often: as many bytes of longer ones say no more.
    #[must_use]
    pub const fn repetitions(self, count: u32) -> u32 {
        match self {
            Self::BlockRead128k
            | Self::BlockWrite128k
            | Self::TcpSend64k
            | Self::TcpReceive64k
            | Self::VsockSend64k
            | Self::VsockReceive64k
            | Self::EntropyRead4k => count.div_ceil(8),
            Self::BalloonReport1m => REPORTED_MIB,
            _ => count,
        }
    }

    /// The operation with this number, as it is written to [`MARK_PORT`].
    #[must_use]
    pub fn from_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|&operation| operation as u8 == number)
    }

    /// The operation of this name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|operation| operation.name() == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_have_numbers_and_names_of_their_own() {
        for (number, operation) in (0..).zip(Operation::ALL) {
            assert_eq!(Operation::from_number(number), Some(operation));
            assert_eq!(Operation::from_name(operation.name()), Some(operation));
        }
        assert_eq!(Operation::from_number(DONE), None);
        assert_eq!(Operation::from_name(END), None);
    }

    #[test]
    fn both_sides_of_a_stream_agree() {
        let (mut guest, mut host) = std::os::unix::net::UnixStream::pair().unwrap();
        let server = std::thread::spawn(move || {
            let mut count = 0;
            while answer(&mut host).unwrap() {
                count += 1;
            }
            count
        });
        for operation in [Operation::TcpSend64k, Operation::VsockReceive64k, Operation::VsockRoundTrip64] {
            ask(&mut guest, operation, 3).unwrap();
        }
        drop(guest);
        assert_eq!(server.join().unwrap(), 3);
    }
}
