//! Access to the records of a tar archive: headers and the data between them.

use super::error::Error;
use super::header::{Header, RECORD};
use std::io::{self, Read, Seek};

/// A reader of a tar archive.
#[derive(Debug)]
pub(crate) struct Tarball<R> {
    input: R,
    position: u64,
    /// The offset of the next header.
    next: u64,
    /// The offset of the end of the data, without padding.
    data_end: u64,
}

impl<R: Read> Tarball<R> {
    pub(crate) const fn new(input: R) -> Self {
        Self { input, position: 0, next: 0, data_end: 0 }
    }

    /// The offset of the reader, after `next_entry` that of the entry's data.
    pub(crate) const fn position(&self) -> u64 {
        self.position
    }

    pub(crate) fn into_input(self) -> R {
        self.input
    }

    /// Bytes of the data that have not been read yet.
    pub(super) const fn remaining(&self) -> u64 {
        self.data_end - self.position
    }

    /// Skips to the next header and reads it. Two records of zeroes end the archive, and so does the end of the input,
    /// also after a single record of zeroes and instead of the padding of a file.
    pub(super) fn header(&mut self) -> Result<Option<Header>, Error> {
        let at = self.next;
        if self.skip(self.data_end.saturating_sub(self.position))? > 0 {
            return Err(Error::Truncated);
        }
        self.skip(self.next - self.position)?;
        let Some(record) = self.record()? else { return Ok(None) };
        if record == [0; RECORD] {
            return match self.record()? {
                Some(record) if record != [0; RECORD] => Err(Error::LoneZeroes(at)),
                _ => Ok(None),
            };
        }
        Header::new(record).map(Some).ok_or(Error::Checksum(at))
    }

    /// Reads the next record, or none at the end of the input.
    fn record(&mut self) -> Result<Option<[u8; RECORD]>, Error> {
        let mut record = [0; RECORD];
        let mut filled = 0;
        while filled < RECORD {
            match self.input.read(&mut record[filled..]) {
                Ok(0) if filled == 0 => return Ok(None),
                Ok(0) => return Err(Error::Truncated),
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.position += RECORD as u64;
        (self.data_end, self.next) = (self.position, self.position);
        Ok(Some(record))
    }

    /// Sets the size of the data that follows.
    pub(super) fn begin_data(&mut self, size: u64) -> Option<()> {
        self.data_end = self.position.checked_add(size)?;
        self.next = self.data_end.checked_next_multiple_of(RECORD as u64)?;
        Some(())
    }

    /// Skips bytes, and returns how many of them the input does not have.
    fn skip(&mut self, length: u64) -> Result<u64, Error> {
        let skipped = io::copy(&mut self.input.by_ref().take(length), &mut io::sink())?;
        self.position += skipped;
        Ok(length - skipped)
    }

    /// Reads a record before the data that is not counted in its size: a further record of a sparse map.
    pub(super) fn extra_record(&mut self) -> Result<[u8; RECORD], Error> {
        self.data_end = self.data_end.saturating_add(RECORD as u64);
        self.next = self.next.saturating_add(RECORD as u64);
        let mut record = [0; RECORD];
        self.read_exact(&mut record)?;
        Ok(record)
    }

    /// Reads bytes of the data.
    pub(super) fn read_exact(&mut self, buffer: &mut [u8]) -> Result<(), Error> {
        if buffer.len() as u64 > self.remaining() {
            return Err(Error::Truncated);
        }
        self.input.read_exact(buffer).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => Error::Truncated,
            _ => error.into(),
        })?;
        self.position += buffer.len() as u64;
        Ok(())
    }
}

impl<R: Read + Seek> Tarball<R> {
    /// Seeks over the data to the next header.
    pub(crate) fn seek_to_next(&mut self) -> io::Result<()> {
        self.input.seek_relative(i64::try_from(self.next - self.position).unwrap_or(i64::MAX))?;
        self.position = self.next;
        Ok(())
    }
}

/// Reads the data of the present entry.
impl<R: Read> Read for Tarball<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.remaining();
        let wanted = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let count = self.input.read(&mut buffer[..wanted])?;
        self.position += count as u64;
        Ok(count)
    }
}
