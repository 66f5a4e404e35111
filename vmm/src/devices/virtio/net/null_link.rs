//! A link that is not connected: it receives nothing, and discards what is sent.

use super::{Frame, FrameSpace, Link};
use crate::devices::virtio::Chain;
use rustix::event::{EventfdFlags, eventfd};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// A link that is not connected.
#[derive(Debug)]
pub(super) struct NullLink {
    features: u64,
    /// A descriptor that is never readable.
    fd: OwnedFd,
}

impl NullLink {
    /// Creates a link that reports these offload features.
    pub(super) fn new(features: u64) -> io::Result<Self> {
        Ok(Self { features, fd: eventfd(0, EventfdFlags::CLOEXEC)? })
    }
}

impl Link for NullLink {
    fn features(&self) -> u64 {
        self.features
    }

    fn accept(&mut self, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn receive(&mut self, _: &FrameSpace) -> io::Result<Option<Frame>> {
        Err(io::ErrorKind::WouldBlock.into())
    }

    fn rest(&self) -> &[u8] {
        &[]
    }

    fn release(&mut self) {}

    fn send(&mut self, _: &mut Chain) -> io::Result<()> {
        Ok(())
    }
}
