//! What data passes through: chains of the guest that one read fills, and what a Unix socket has not taken yet.

use super::packet::HEADER_SIZE;
use super::{CONNECTIONS_MAX, RX};
use crate::devices::virtio::{Broken, Chain, Queues, Segment};

/// Bytes of the guest that are kept for a Unix socket that takes no more, and which the guest is told of.
pub(super) const BUF_ALLOC: u32 = 128 << 10;
/// The same for connections beyond [`LARGE_MAX`].
pub(super) const BUF_ALLOC_SMALL: u32 = 8 << 10;
/// Connections at a time that are given [`BUF_ALLOC`]. What a guest is promised cannot be taken back, so that it is
/// promised no more than may be kept.
pub(super) const LARGE_MAX: usize = 64;
/// Bytes that are kept for all connections together: those whose Unix sockets nobody reads, also after the guest
/// has closed them.
pub(super) const KEPT_MAX: usize =
    LARGE_MAX * BUF_ALLOC as usize + (CONNECTIONS_MAX - LARGE_MAX) * BUF_ALLOC_SMALL as usize;
const _: () = assert!(KEPT_MAX <= 16 << 20, "docs/vsock.md says so");

/// Chains of the guest that one read fills.
#[derive(Debug, Default)]
pub(super) struct Batch {
    pub(super) chains: Vec<Receiver>,
    /// All their room, one after the other.
    pub(super) pieces: Vec<Segment>,
}

/// A chain of the guest that is to have data.
#[derive(Debug)]
pub(super) struct Receiver {
    pub(super) chain: Chain,
    /// Where its header goes.
    pub(super) header: Segment,
    /// Bytes of data that it may have.
    pub(super) room: usize,
}

impl Batch {
    /// Takes up to so many chains with room for so many bytes; the room that they have.
    pub(super) fn gather(
        &mut self,
        queues: &mut Queues,
        first: Chain,
        chains: usize,
        credit: usize,
    ) -> Result<usize, Broken> {
        self.pieces.clear();
        let mut room = 0;
        let mut next = Some(first);
        while let Some(mut chain) = next {
            let header = chain
                .split_front(HEADER_SIZE)
                .filter(|_| chain.writable_len() > 0)
                .ok_or_else(|| Broken::because("a chain has no room for a header in one piece and data"))?;
            chain.limit_writable(credit - room);
            let own = chain.writable().iter().map(Segment::len).sum();
            room += own;
            self.pieces.extend(chain.writable());
            self.chains.push(Receiver { chain, header, room: own });
            let is_enough = self.chains.len() == chains || room == credit;
            next = if is_enough { None } else { queues.pop(RX)? };
        }
        Ok(room)
    }

    /// Puts back the chains that so many bytes do not reach.
    pub(super) fn put_back_behind(&mut self, bytes: usize, queues: &mut Queues) {
        let mut rooms = 0;
        let reached = self.chains.iter().take_while(|receiver| {
            let is_reached = rooms < bytes;
            rooms += receiver.room;
            is_reached
        });
        let reached = reached.count();
        while self.chains.len() > reached {
            if let Some(receiver) = self.chains.pop() {
                queues.put_back(RX, receiver.chain);
            }
        }
    }
}

/// Bytes of the guest that a Unix socket has not taken yet.
#[derive(Debug)]
pub(super) struct Buffer {
    /// How many there can be.
    size: u32,
    bytes: Vec<u8>,
    /// Where those start that are still to be written.
    start: usize,
}

impl Buffer {
    pub(super) const fn new(size: u32) -> Self {
        Self { size, bytes: Vec::new(), start: 0 }
    }

    pub(super) const fn size(&self) -> u32 {
        self.size
    }

    pub(super) const fn len(&self) -> usize {
        self.bytes.len() - self.start
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[self.start..]
    }

    /// How many more it takes.
    pub(super) const fn room(&self) -> usize {
        self.size as usize - self.len()
    }

    /// Takes the next bytes of a chain, for which there is room.
    pub(super) fn append(&mut self, chain: &mut Chain, count: usize) -> Result<(), Broken> {
        if self.bytes.capacity() == 0 {
            self.bytes.reserve_exact(self.size as usize);
        }
        if self.bytes.len() + count > self.size as usize {
            self.bytes.drain(..self.start);
            self.start = 0;
        }
        let old = self.bytes.len();
        self.bytes.resize(old + count, 0);
        chain.read(&mut self.bytes[old..])
    }

    /// Leaves out bytes that were written. One that is empty takes no memory.
    pub(super) fn consume(&mut self, count: usize) {
        self.start += count;
        if self.is_empty() {
            *self = Self::new(self.size);
        }
    }
}
