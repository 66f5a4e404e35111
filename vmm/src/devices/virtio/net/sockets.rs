//! Cards whose other end is a socket, for tests and fuzzing.

use super::passt::Passt;
use super::tap::Tap;
use super::{Frame, Link, Net, Room};
use crate::config::devices::NetworkInterface;
use crate::devices::virtio::Chain;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

impl Net {
    /// A card on something that speaks like passt, through a stream that does not block.
    #[must_use]
    pub fn on_stream(socket: OwnedFd, interface: &NetworkInterface) -> Self {
        Self::new(Box::new(Passt::connected(socket)), interface)
    }

    /// A card on a socket that keeps frames apart, as a tap device does.
    #[must_use]
    pub fn on_datagrams(socket: OwnedFd, interface: &NetworkInterface) -> Self {
        Self::new(Box::new(Datagrams(Tap::attached(socket))), interface)
    }
}

/// A tap device but for its ioctl.
#[derive(Debug)]
struct Datagrams(Tap);

impl Link for Datagrams {
    fn features(&self) -> u64 {
        self.0.features()
    }

    fn accept(&mut self, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.0.fd()
    }

    fn receive(&mut self, room: &Room) -> io::Result<Option<Frame>> {
        self.0.receive(room)
    }

    fn rest(&self) -> &[u8] {
        self.0.rest()
    }

    fn release(&mut self) {
        self.0.release();
    }

    fn send(&mut self, chain: &mut Chain) -> io::Result<()> {
        self.0.send(chain)
    }
}
