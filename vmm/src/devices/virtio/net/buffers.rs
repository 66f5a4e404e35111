//! The driver's buffers for frames from the host, and the frame on its way into them.

use super::header::{self, Header};
use super::{Broken, Chain, Queues, RX, Segment};
use crate::devices::virtio::vectored::SEGMENTS_MAX;
use std::collections::VecDeque;

/// Where a frame may go in guest memory, behind the place of its header.
#[derive(Debug, Default)]
pub(super) struct Room {
    pub(super) segments: Vec<Segment>,
    /// Bytes of all of them.
    pub(super) length: usize,
}

/// A frame from the host that the driver has not got yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Frame {
    pub(super) header: Header,
    /// Bytes of it that lie in the room that was offered; the link has the rest.
    pub(super) placed: usize,
}

/// Buffers of the driver that were taken, in order.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    /// Those that have no frame yet, or a part of the next one.
    chains: VecDeque<Chain>,
    /// Bytes that they have room for.
    length: u64,
    /// Whether a frame may be in several of them.
    pub(super) are_merged: bool,
    /// Those that have a whole one, with the bytes of it; empty but for a moment.
    full: Vec<(Chain, u32)>,
}

impl Buffers {
    pub(super) fn count(&self) -> usize {
        self.chains.len()
    }

    /// Bytes of the longest frame that fits, with its header.
    pub(super) fn longest(&self) -> u64 {
        if self.are_merged { self.length } else { self.chains.front().map_or(0, Chain::writable_len) }
    }

    /// Takes buffers until a frame of so many bytes fits; `false` when the driver has too few. Without merging it has
    /// one, whatever its size.
    pub(super) fn gather(&mut self, length: usize, queues: &mut Queues) -> Result<bool, Broken> {
        let wanted = (header::LENGTH + length) as u64;
        while if self.are_merged { self.length < wanted } else { self.chains.is_empty() } {
            let Some(chain) = queues.pop(RX)? else { return Ok(false) };
            let room = chain.writable_len();
            if room < header::LENGTH as u64 {
                return Err(Broken::because("a buffer has no room for a packet's header"));
            }
            self.length += room;
            self.chains.push_back(chain);
        }
        Ok(true)
    }

    /// Lists where the next frame may go, up to so many bytes, or a few more that the last buffer has.
    pub(super) fn list(&self, length: usize, room: &mut Room) {
        room.segments.clear();
        room.length = 0;
        let count = if self.are_merged { self.chains.len() } else { 1 };
        let mut header = header::LENGTH;
        for segment in self.chains.iter().take(count).flat_map(Chain::writable) {
            // What moves a frame adds a header and a place for the rest.
            if room.length >= length || room.segments.len() + 2 >= SEGMENTS_MAX {
                return;
            }
            let mut segment = *segment;
            let skipped = header.min(segment.len());
            segment.skip(skipped);
            header -= skipped;
            if !segment.is_empty() {
                room.length = room.length.saturating_add(segment.len());
                room.segments.push(segment);
            }
        }
    }

    /// Gives the first buffers to the driver, which have room for it, with a frame of which they have a part.
    pub(super) fn deliver(&mut self, frame: Frame, rest: &[u8], queues: &mut Queues) -> Result<(), Broken> {
        let Frame { mut header, mut placed } = frame;
        let mut rest = rest;
        let mut left = (header::LENGTH + placed + rest.len()) as u64;
        let (mut count, mut room) = (0, 0);
        while room < left && count < self.chains.len() {
            room += self.chains[count].writable_len();
            count += 1;
        }
        header.set_buffers(u16::try_from(count).unwrap_or(u16::MAX));
        let mut header = &header.0[..];
        for _ in 0..count {
            let Some(mut chain) = self.chains.pop_front() else { break };
            let room = chain.writable_len();
            self.length -= room;
            let taken = room.min(left);
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
        queues.complete_together(RX, self.full.drain(..))
    }

    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }
}
