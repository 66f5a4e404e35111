//! The protocol between the payload of `cargo xtask bench --scenario io` and the bench.
//!
//! The payload's first argument is the number of repetitions of each operation. A second argument, [`REPORTS`], selects
//! free page reporting. The payload performs the operations of each device that it finds. It then prints one line per
//! operation, with its name and the nanoseconds of all repetitions on the guest's clock, and finally [`END`]. Before
//! and after the repetitions it writes to [`MARK_PORT`], which no monitor handles but which KVM's tracepoints show.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsRawFd;

/// The port of a PC's power-on codes.
pub const MARK_PORT: u16 = 0x80;
/// The value written to [`MARK_PORT`] after the repetitions of an operation; the operation's number is written before.
pub const DONE: u8 = 0xff;
/// The last line that the payload prints.
pub const END: &str = "all operations are done";
/// The argument that makes the payload measure free page reporting: a program cannot detect whether the guest's balloon
/// has it.
pub const REPORTS: &str = "reports";
/// Bytes of the disk that the payload reads and overwrites.
pub const DISK_BYTES: u64 = 32 << 20;

/// The host's address in the guest's network.
pub const HOST_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 1);
/// The guest's address in that network.
pub const GUEST_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 2);
/// The UDP port on which both sides receive packets.
pub const UDP_PORT: u16 = 7001;
/// The TCP port on which the host listens.
pub const STREAM_PORT: u16 = 7002;
/// The vsock port on which the host listens.
pub const VSOCK_PORT: u32 = 7003;
/// Bytes of a packet's payload; the IP and UDP headers make it 1500.
pub const PACKET_LEN: usize = 1472;
/// Packets that may be in flight.
pub const PACKETS_IN_FLIGHT: u32 = 32;
/// Bytes of one write or read of a stream.
const CHUNK_LEN: usize = 64 << 10;
/// Bytes of an echoed message.
const MESSAGE_LEN: usize = 64;

/// Runs a stream operation on the guest's side: sends the operation and its count to the host, and performs it.
///
/// # Errors
/// When reading or writing the stream fails.
pub fn run_stream(stream: &mut (impl Read + Write), operation: Operation, count: u32) -> io::Result<()> {
    let mut request = [0; 8];
    request[0] = operation as u8;
    request[4..].copy_from_slice(&count.to_le_bytes());
    stream.write_all(&request)?;
    let mut buffer = vec![0; CHUNK_LEN];
    for _ in 0..count {
        match operation {
            Operation::TcpSend64k | Operation::VsockSend64k => stream.write_all(&buffer)?,
            Operation::TcpReceive64k | Operation::VsockReceive64k => stream.read_exact(&mut buffer)?,
            _ => {
                stream.write_all(&buffer[..MESSAGE_LEN])?;
                stream.read_exact(&mut buffer[..MESSAGE_LEN])?;
            }
        }
    }
    // The host confirms that it has received everything.
    stream.read_exact(&mut buffer[..1])
}

/// Serves one operation on the host's side; `false` at the end of the stream.
///
/// # Errors
/// When reading or writing the stream fails, or the request has an unknown operation.
pub fn serve_stream(stream: &mut (impl Read + Write)) -> io::Result<bool> {
    let mut request = [0; 8];
    match stream.read_exact(&mut request) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
        result => result?,
    }
    let [number, _, _, _, a, b, c, d] = request;
    let operation = Operation::from_number(number).ok_or(io::ErrorKind::InvalidData)?;
    let mut buffer = vec![0; CHUNK_LEN];
    for _ in 0..u32::from_le_bytes([a, b, c, d]) {
        match operation {
            Operation::TcpSend64k | Operation::VsockSend64k => stream.read_exact(&mut buffer)?,
            Operation::TcpReceive64k | Operation::VsockReceive64k => stream.write_all(&buffer)?,
            _ => {
                stream.read_exact(&mut buffer[..MESSAGE_LEN])?;
                stream.write_all(&buffer[..MESSAGE_LEN])?;
            }
        }
    }
    stream.write_all(&[1])?;
    Ok(true)
}

/// Assigns a network interface an address with a /24 netmask, and brings it up.
///
/// # Errors
/// When there is no such interface, or the caller lacks CAP_NET_ADMIN.
#[expect(unsafe_code, reason = "ioctls of network interfaces")]
pub fn set_address(interface: &str, address: Ipv4Addr) -> io::Result<()> {
    /// Up and running (IFF_UP, IFF_RUNNING in linux/if.h).
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

/// MiB that the guest reports free at once: half the memory of the smallest guest.
const REPORTED_MIB: u32 = 64;

/// An operation on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Operation {
    /// Reads 4 KiB at a random offset of the disk.
    BlockRead4k,
    /// The same with 32 requests in flight.
    BlockRead4kDepth32,
    /// Writes 4 KiB at a random offset of the disk.
    BlockWrite4k,
    /// The same with 32 requests in flight.
    BlockWrite4kDepth32,
    /// Reads the disk sequentially, 128 KiB at a time.
    BlockRead128k,
    /// Writes the disk sequentially, 128 KiB at a time.
    BlockWrite128k,
    /// Sends a packet of 1500 bytes to the host, which answers every 32nd.
    NetSend1500,
    /// Receives a packet of 1500 bytes from the host, which sends 32 per request.
    NetReceive1500,
    /// Sends 64 KiB over TCP to the host.
    TcpSend64k,
    /// Receives 64 KiB over TCP from the host.
    TcpReceive64k,
    /// Sends 64 bytes to the host over vsock and receives them back.
    VsockRoundTrip64,
    /// Sends 64 KiB over vsock to the host.
    VsockSend64k,
    /// Receives 64 KiB over vsock from the host.
    VsockReceive64k,
    /// Reads 4 KiB from the host's random number generator.
    EntropyRead4k,
    /// Reports 1 MiB of freed guest memory to the host. It has no marks: the guest kernel decides when it runs.
    BalloonReport1m,
}

impl Operation {
    /// All operations, in the order in which the payload performs them.
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

    /// The name in the payload's output and in the bench's rows.
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

    /// The title of a table column.
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

    /// The number of repetitions when 4 KiB operations are repeated `count` times. Longer operations are repeated less
    /// often: as many bytes of them would not make the result more precise.
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

    /// The operation with this number, as written to [`MARK_PORT`].
    #[must_use]
    pub fn from_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|&operation| operation as u8 == number)
    }

    /// The operation with this name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|operation| operation.name() == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_names_of_operations_are_unique() {
        for (number, operation) in (0..).zip(Operation::ALL) {
            assert_eq!(Operation::from_number(number), Some(operation));
            assert_eq!(Operation::from_name(operation.name()), Some(operation));
        }
        assert_eq!(Operation::from_number(DONE), None);
        assert_eq!(Operation::from_name(END), None);
    }

    #[test]
    fn guest_and_host_complete_every_stream_operation() {
        let (mut guest, mut host) = std::os::unix::net::UnixStream::pair().unwrap();
        let server = std::thread::spawn(move || {
            let mut count = 0;
            while serve_stream(&mut host).unwrap() {
                count += 1;
            }
            count
        });
        for operation in [Operation::TcpSend64k, Operation::VsockReceive64k, Operation::VsockRoundTrip64] {
            run_stream(&mut guest, operation, 3).unwrap();
        }
        drop(guest);
        assert_eq!(server.join().unwrap(), 3);
    }
}
