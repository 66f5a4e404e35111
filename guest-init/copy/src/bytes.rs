//! Buffered reading and writing of the stream.

use crate::CHUNK;
use alloc::vec;
use alloc::vec::Vec;
use rustix::fd::AsFd;
use rustix::io::{Errno, read, retry_on_intr, write};

/// Buffered writer.
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
            let free = self.free_space(part.len())?;
            free[..part.len()].copy_from_slice(part);
            self.advance(part.len());
        }
        Ok(())
    }

    /// Returns the free space of the buffer, of at least `min` bytes. The caller fills it and calls
    /// [`advance`](Self::advance).
    pub(crate) fn free_space(&mut self, min: usize) -> Result<&mut [u8], Errno> {
        if CHUNK - self.length < min {
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

/// Why a read failed.
pub(crate) enum ReadError {
    EndOfStream,
    Os(Errno),
}

/// Buffered reader.
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

    /// Returns the next bytes: at least one and at most `max`.
    pub(crate) fn some(&mut self, max: usize) -> Result<&[u8], ReadError> {
        if self.start == self.end {
            let count = retry_on_intr(|| read(&self.from, &mut self.buffer[..])).map_err(ReadError::Os)?;
            if count == 0 {
                return Err(ReadError::EndOfStream);
            }
            (self.start, self.end) = (0, count);
        }
        let start = self.start;
        self.start = self.end.min(start.saturating_add(max));
        Ok(&self.buffer[start..self.start])
    }

    /// Fills the buffer completely.
    pub(crate) fn fill(&mut self, mut buffer: &mut [u8]) -> Result<(), ReadError> {
        while !buffer.is_empty() {
            let bytes = self.some(buffer.len())?;
            let (filled, rest) = buffer.split_at_mut(bytes.len());
            filled.copy_from_slice(bytes);
            buffer = rest;
        }
        Ok(())
    }
}
