//! The link of a card that leads nowhere: nothing comes from it, and what is sent is gone.

use super::{Frame, Link, Room};
use crate::devices::virtio::Chain;
use rustix::event::{EventfdFlags, eventfd};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Nothing, which looks like a link that can do something.
#[derive(Debug)]
pub(super) struct Nowhere {
    features: u64,
    /// Never readable.
    fd: OwnedFd,
}

impl Nowhere {
    /// In the place of a link with these offloads.
    pub(super) fn new(features: u64) -> io::Result<Self> {
        Ok(Self { features, fd: eventfd(0, EventfdFlags::CLOEXEC)? })
    }
}

impl Link for Nowhere {
    fn features(&self) -> u64 {
        self.features
    }

    fn accept(&mut self, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn receive(&mut self, _: &Room) -> io::Result<Option<Frame>> {
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
