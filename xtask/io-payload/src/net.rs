//! Packets and streams to whoever started the guest, over its network card.

use anyhow::{Context, Result};
use io_payload::{
    GUEST_ADDRESS, HOST_ADDRESS, Operation, PACKET, PACKETS, STREAM_PORT, UDP_PORT, ask, give_address,
};
use std::net::{TcpStream, UdpSocket};
use std::time::Duration;

const CARD: &str = "eth0";

/// The card with its address, a socket for packets and a stream.
pub(crate) struct Card {
    socket: UdpSocket,
    stream: TcpStream,
}

impl Card {
    /// The first card, if there is one.
    pub(crate) fn open() -> Result<Option<Self>> {
        let socket = UdpSocket::bind(("0.0.0.0", UDP_PORT))?;
        if give_address(CARD, GUEST_ADDRESS).is_err() {
            return Ok(None);
        }
        socket.connect((HOST_ADDRESS, UDP_PORT)).context("the host's address cannot be reached")?;
        // What does not come back is an error and no endless wait.
        socket.set_read_timeout(Some(Duration::from_secs(1)))?;
        let stream = TcpStream::connect((HOST_ADDRESS, STREAM_PORT)).context("the host does not listen")?;
        stream.set_nodelay(true)?;
        Ok(Some(Self { socket, stream }))
    }

    /// Does an operation so many times.
    pub(crate) fn repeat(&mut self, operation: Operation, count: u32) -> Result<()> {
        match operation {
            Operation::NetSend1500 => self.send(count),
            Operation::NetReceive1500 => self.receive(count),
            Operation::TcpSend64k | Operation::TcpReceive64k => Ok(ask(&mut self.stream, operation, count)?),
            _ => Ok(()),
        }
    }

    /// Sends so many packets, at most [`PACKETS`] before the host has answered the last of them.
    fn send(&self, count: u32) -> Result<()> {
        let mut packet = [0; PACKET];
        let mut answer = [0; PACKET];
        for number in 1..=count {
            let is_last = number % PACKETS == 0 || number == count;
            packet[0] = u8::from(is_last);
            self.socket.send(&packet)?;
            if is_last {
                self.socket.recv(&mut answer).context("the host did not answer")?;
            }
        }
        Ok(())
    }

    /// Asks for [`PACKETS`] packets at a time.
    fn receive(&self, count: u32) -> Result<()> {
        let mut packet = [0; PACKET];
        let mut left = count;
        while left > 0 {
            let now = left.min(PACKETS);
            self.socket.send(&[2, now.to_le_bytes()[0]])?;
            for _ in 0..now {
                self.socket.recv(&mut packet).context("a packet was lost")?;
            }
            left -= now;
        }
        Ok(())
    }
}
