//! Packets and streams between guest and host over the network card.

use anyhow::{Context, Result};
use io_payload::{
    GUEST_ADDRESS, HOST_ADDRESS, Operation, PACKET_LEN, PACKETS_IN_FLIGHT, STREAM_PORT, UDP_PORT, run_stream,
    set_address,
};
use std::net::{TcpStream, UdpSocket};
use std::time::Duration;

const INTERFACE: &str = "eth0";

/// The network card with its address: a UDP socket and a TCP stream.
pub(crate) struct NetCard {
    socket: UdpSocket,
    stream: TcpStream,
}

impl NetCard {
    /// Opens the first network card, if there is one.
    pub(crate) fn open() -> Result<Option<Self>> {
        let socket = UdpSocket::bind(("0.0.0.0", UDP_PORT))?;
        if set_address(INTERFACE, GUEST_ADDRESS).is_err() {
            return Ok(None);
        }
        socket.connect((HOST_ADDRESS, UDP_PORT)).context("cannot reach the host's address")?;
        // A lost packet is an error, not an endless wait.
        socket.set_read_timeout(Some(Duration::from_secs(1)))?;
        let stream = TcpStream::connect((HOST_ADDRESS, STREAM_PORT)).context("cannot connect to the host")?;
        stream.set_nodelay(true)?;
        Ok(Some(Self { socket, stream }))
    }

    /// Performs an operation `count` times.
    pub(crate) fn repeat(&mut self, operation: Operation, count: u32) -> Result<()> {
        match operation {
            Operation::NetSend1500 => self.send(count),
            Operation::NetReceive1500 => self.receive(count),
            Operation::TcpSend64k | Operation::TcpReceive64k => {
                Ok(run_stream(&mut self.stream, operation, count)?)
            }
            _ => Ok(()),
        }
    }

    /// Sends `count` packets. The host confirms the last of each [`PACKETS_IN_FLIGHT`].
    fn send(&self, count: u32) -> Result<()> {
        let mut packet = [0; PACKET_LEN];
        let mut answer = [0; PACKET_LEN];
        for number in 1..=count {
            let is_last = number % PACKETS_IN_FLIGHT == 0 || number == count;
            packet[0] = u8::from(is_last);
            self.socket.send(&packet)?;
            if is_last {
                self.socket.recv(&mut answer).context("the host did not answer")?;
            }
        }
        Ok(())
    }

    /// Receives `count` packets, requested in batches of [`PACKETS_IN_FLIGHT`].
    fn receive(&self, count: u32) -> Result<()> {
        let mut packet = [0; PACKET_LEN];
        let mut left = count;
        while left > 0 {
            let now = left.min(PACKETS_IN_FLIGHT);
            self.socket.send(&[2, now.to_le_bytes()[0]])?;
            for _ in 0..now {
                self.socket.recv(&mut packet).context("a packet was lost")?;
            }
            left -= now;
        }
        Ok(())
    }
}
