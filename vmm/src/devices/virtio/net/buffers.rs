//! The driver's receive buffers, and the frame that is copied into them.

use super::header::{self, Header};
use super::{Chain, DeviceError, Queues, RX, Segment};
use crate::devices::virtio::vectored::SEGMENTS_MAX;
use std::collections::VecDeque;

/// Where a frame may be placed in guest memory, after the space for its header.
#[derive(Debug, Default)]
pub(super) struct FrameSpace {
    pub(super) segments: Vec<Segment>,
    /// Total length of the segments in bytes.
    pub(super) length: usize,
}

/// A frame from the host that has not been delivered to the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Frame {
    pub(super) header: Header,
    /// Number of bytes that have been placed in guest memory; the link holds the rest.
    pub(super) placed: usize,
}

/// The receive buffers that were popped, in order.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    /// Buffers without a frame, or with a part of the next one.
    chains: VecDeque<Chain>,
    /// Total length of these buffers in bytes.
    length: u64,
    /// Whether a frame may span several buffers (`VIRTIO_NET_F_MRG_RXBUF`).
    pub(super) are_merged: bool,
    /// Buffers with a complete frame and their used lengths; empty except during [`Self::deliver`].
    full: Vec<(Chain, u32)>,
}

impl Buffers {
    pub(super) fn count(&self) -> usize {
        self.chains.len()
    }

    /// Length of the longest frame that fits, including its header.
    pub(super) fn max_frame(&self) -> u64 {
        if self.are_merged { self.length } else { self.chains.front().map_or(0, Chain::writable_len) }
    }

    /// Pops buffers until a frame of `length` bytes fits; `false` when the driver has not provided enough. Without
    /// merged buffers one buffer is popped, whatever its size.
    pub(super) fn gather(&mut self, length: usize, queues: &mut Queues) -> Result<bool, DeviceError> {
        let wanted = (header::LENGTH + length) as u64;
        while if self.are_merged { self.length < wanted } else { self.chains.is_empty() } {
            let Some(chain) = queues.pop(RX)? else { return Ok(false) };
            let space = chain.writable_len();
            if space < header::LENGTH as u64 {
                return Err(DeviceError::new("a buffer has no room for a packet's header"));
            }
            self.length += space;
            self.chains.push_back(chain);
        }
        Ok(true)
    }

    /// Lists where the next frame may be placed, up to `length` bytes, or somewhat more if the last buffer is longer.
    pub(super) fn list(&self, length: usize, space: &mut FrameSpace) {
        space.segments.clear();
        space.length = 0;
        let count = if self.are_merged { self.chains.len() } else { 1 };
        let mut header = header::LENGTH;
        for segment in self.chains.iter().take(count).flat_map(Chain::writable) {
            // A transfer adds segments for the header and for the rest.
            if space.length >= length || space.segments.len() + 2 >= SEGMENTS_MAX {
                return;
            }
            let mut segment = *segment;
            let skipped = header.min(segment.len());
            segment.skip(skipped);
            header -= skipped;
            if !segment.is_empty() {
                space.length = space.length.saturating_add(segment.len());
                space.segments.push(segment);
            }
        }
    }

    /// Completes the first buffers with a frame, a part of which has already been placed there. The buffers are long
    /// enough.
    pub(super) fn deliver(
        &mut self,
        frame: Frame,
        rest: &[u8],
        queues: &mut Queues,
    ) -> Result<(), DeviceError> {
        let Frame { mut header, mut placed } = frame;
        let mut rest = rest;
        let mut left = (header::LENGTH + placed + rest.len()) as u64;
        let (mut count, mut space) = (0, 0);
        while space < left && count < self.chains.len() {
            space += self.chains[count].writable_len();
            count += 1;
        }
        header.set_buffers(u16::try_from(count).unwrap_or(u16::MAX));
        let mut header = &header.0[..];
        for _ in 0..count {
            let Some(mut chain) = self.chains.pop_front() else { break };
            let space = chain.writable_len();
            self.length -= space;
            let taken = space.min(left);
            left -= taken;
            chain.write(header)?;
            let length = usize::try_from(taken).unwrap_or(usize::MAX) - header.len();
            header = &[];
            let skipped = placed.min(length);
            placed -= skipped;
            if skipped < length {
                chain.skip_writable(skipped);
                let (part, others) = rest.split_at((length - skipped).min(rest.len()));
                chain.write(part)?;
                rest = others;
            }
            self.full.push((chain, u32::try_from(taken).unwrap_or(u32::MAX)));
        }
        queues.complete_all(RX, self.full.drain(..))
    }

    /// Makes the buffers available again, the last first.
    pub(super) fn give_back(&mut self, queues: &mut Queues) {
        while let Some(chain) = self.chains.pop_back() {
            queues.undo_pop(RX, chain);
        }
        self.length = 0;
    }

    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }
}
