//! Buffers for data: a batch of receive chains of the guest that one read fills, and the bytes that a Unix socket has
//! not accepted yet.

use super::packet::HEADER_SIZE;
use super::{CONNECTIONS_MAX, RX};
use crate::devices::virtio::{Chain, DeviceError, Queues, Segment};

/// Size of the buffer for data that a Unix socket does not accept, in bytes, which is the credit of the guest
/// (`buf_alloc`).
pub(super) const BUF_ALLOC: u32 = 128 << 10;
/// The same for connections beyond [`LARGE_MAX`].
pub(super) const BUF_ALLOC_SMALL: u32 = 8 << 10;
/// Maximum number of connections with [`BUF_ALLOC`]. Credit cannot be withdrawn, so that the total of all credit is
/// limited.
pub(super) const LARGE_MAX: usize = 64;
/// Maximum number of buffered bytes of all connections, including those that the guest has closed.
pub(super) const KEPT_MAX: usize =
    LARGE_MAX * BUF_ALLOC as usize + (CONNECTIONS_MAX - LARGE_MAX) * BUF_ALLOC_SMALL as usize;
const _: () = assert!(KEPT_MAX <= 16 << 20, "docs/vsock.md says so");

/// Receive chains of the guest that one read fills.
#[derive(Debug, Default)]
pub(super) struct Batch {
    pub(super) chains: Vec<DataChain>,
    /// The space of all chains in their order.
    pub(super) segments: Vec<Segment>,
}

/// A receive chain of the guest.
#[derive(Debug)]
pub(super) struct DataChain {
    pub(super) chain: Chain,
    /// The destination of the packet header.
    pub(super) header: Segment,
    /// Space for data in bytes.
    pub(super) space: usize,
}

impl Batch {
    /// Pops up to `chains` chains with up to `credit` bytes of space in total; returns their space.
    pub(super) fn gather(
        &mut self,
        queues: &mut Queues,
        first: Chain,
        chains: usize,
        credit: usize,
    ) -> Result<usize, DeviceError> {
        self.segments.clear();
        let mut space = 0;
        let mut next = Some(first);
        while let Some(mut chain) = next {
            let header = chain
                .split_front(HEADER_SIZE)
                .filter(|_| chain.writable_len() > 0)
                .ok_or_else(|| DeviceError::new("a chain has no room for a header in one piece and data"))?;
            chain.limit_writable(credit - space);
            let own = chain.writable().iter().map(Segment::len).sum();
            space += own;
            self.segments.extend(chain.writable());
            self.chains.push(DataChain { chain, header, space: own });
            let is_enough = self.chains.len() == chains || space == credit;
            next = if is_enough { None } else { queues.pop(RX)? };
        }
        Ok(space)
    }

    /// Returns the chains to the queue that a read of `bytes` bytes has not reached.
    pub(super) fn return_unused(&mut self, bytes: usize, queues: &mut Queues) {
        let mut rooms = 0;
        let reached = self.chains.iter().take_while(|receiver| {
            let is_reached = rooms < bytes;
            rooms += receiver.space;
            is_reached
        });
        let reached = reached.count();
        while self.chains.len() > reached {
            if let Some(receiver) = self.chains.pop() {
                queues.undo_pop(RX, receiver.chain);
            }
        }
    }
}

/// Bytes of the guest that a Unix socket has not accepted yet.
#[derive(Debug)]
pub(super) struct Buffer {
    /// Maximum number of bytes.
    size: u32,
    bytes: Vec<u8>,
    /// Offset of the first byte that has not been written.
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

    /// Free space in bytes.
    pub(super) const fn space(&self) -> usize {
        self.size as usize - self.len()
    }

    /// Appends the next bytes of a chain. The caller has checked that there is space.
    pub(super) fn append(&mut self, chain: &mut Chain, count: usize) -> Result<(), DeviceError> {
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

    /// Removes written bytes. An empty buffer occupies no memory.
    pub(super) fn consume(&mut self, count: usize) {
        self.start += count;
        if self.is_empty() {
            *self = Self::new(self.size);
        }
    }
}
