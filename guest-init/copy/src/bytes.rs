//! The stream itself: descriptors with a buffer.

use crate::CHUNK;
use alloc::vec;
use alloc::vec::Vec;
use rustix::fd::AsFd;
use rustix::io::{Errno, read, retry_on_intr, write};

/// Bytes on their way out.
pub(crate) struct Writer<F> {
    to: F,
    buffer: Vec<u8>,
    length: usize,
}

impl<F: AsFd> Writer<F> {
    pub(crate) fn new(to: F) -> Self {
        Self { to, buffer: vec![0; CHUNK], length: 0 }
    }

    pub(crate) fn put(&mut self, bytes: &[u8]) -> Result<(), Errno> {
        for part in bytes.chunks(CHUNK) {
            let place = self.room(part.len())?;
            place[..part.len()].copy_from_slice(part);
            self.advance(part.len());
        }
        Ok(())
    }

    /// Free bytes of the buffer, at least so many, to be filled and then counted by [`advance`](Self::advance).
    pub(crate) fn room(&mut self, least: usize) -> Result<&mut [u8], Errno> {
        if CHUNK - self.length < least {
            self.flush()?;
        }
        Ok(&mut self.buffer[self.length..])
    }

    pub(crate) fn advance(&mut self, count: usize) {
        self.length += count;
    }

    pub(crate) fn flush(&mut self) -> Result<(), Errno> {
        let mut rest = &self.buffer[..self.length];
        while !rest.is_empty() {
            let count = retry_on_intr(|| write(&self.to, rest))?;
            rest = &rest[count..];
        }
        self.length = 0;
        Ok(())
    }
}

/// Why there are no more bytes.
pub(crate) enum NoBytes {
    End,
    Error(Errno),
}

/// Bytes that come in.
pub(crate) struct Reader<F> {
    from: F,
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

impl<F: AsFd> Reader<F> {
    pub(crate) fn new(from: F) -> Self {
        Self { from, buffer: vec![0; CHUNK], start: 0, end: 0 }
    }

    /// The next bytes, at least one and at most so many.
    pub(crate) fn some(&mut self, most: usize) -> Result<&[u8], NoBytes> {
        if self.start == self.end {
            let count = retry_on_intr(|| read(&self.from, &mut self.buffer[..])).map_err(NoBytes::Error)?;
            if count == 0 {
                return Err(NoBytes::End);
            }
            (self.start, self.end) = (0, count);
        }
        let start = self.start;
        self.start = self.end.min(start.saturating_add(most));
        Ok(&self.buffer[start..self.start])
    }

    /// Fills all of it.
    pub(crate) fn fill(&mut self, mut place: &mut [u8]) -> Result<(), NoBytes> {
        while !place.is_empty() {
            let bytes = self.some(place.len())?;
            let (filled, rest) = place.split_at_mut(bytes.len());
            filled.copy_from_slice(bytes);
            place = rest;
        }
        Ok(())
    }
}
