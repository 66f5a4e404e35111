//! Network devices whose link is a socket, for tests and fuzzing.

use super::passt::Passt;
use super::tap::Tap;
use super::{Frame, FrameSpace, Link, Net};
use crate::config::devices::NetworkInterface;
use crate::devices::virtio::Chain;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

impl Net {
    /// A device with a non-blocking stream to a peer that implements passt's protocol.
    #[must_use]
    pub fn on_stream(socket: OwnedFd, interface: &NetworkInterface) -> Self {
        Self::new(Box::new(Passt::connected(socket)), interface)
    }

    /// A device with a socket that preserves frame boundaries, as a tap device does.
    #[must_use]
    pub fn on_datagrams(socket: OwnedFd, interface: &NetworkInterface) -> Self {
        Self::new(Box::new(Datagrams(Tap::attached(socket))), interface)
    }
}

/// A tap device without its ioctls.
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

    fn receive(&mut self, space: &FrameSpace) -> io::Result<Option<Frame>> {
        self.0.receive(space)
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
