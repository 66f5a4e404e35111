//! A sequential, buffered writer that leaves holes for blocks of zeroes.

use super::format::{BLOCK, BLOCK_SIZE};
use crate::disk;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

const BUFFER: usize = 256 * BLOCK_SIZE;

/// A sequential writer to a new file, whose holes read as zeroes.
#[derive(Debug)]
pub(crate) struct BlockWriter<'a> {
    file: &'a File,
    /// The file offset of the buffer, a multiple of the block size.
    offset: u64,
    buffer: Box<[u8]>,
    used: usize,
}

/// An error of a copy: of its source or of the file.
#[derive(Debug)]
pub(crate) enum CopyError {
    Read(io::Error),
    Write(io::Error),
}

impl<'a> BlockWriter<'a> {
    /// Starts at an offset, which is a multiple of the block size.
    pub(crate) fn new(file: &'a File, offset: u64) -> Self {
        debug_assert_eq!(offset % BLOCK, 0);
        Self { file, offset, buffer: vec![0; BUFFER].into(), used: 0 }
    }

    /// The offset of the next byte.
    pub(crate) const fn position(&self) -> u64 {
        self.offset + self.used as u64
    }

    /// Copies exactly `length` bytes.
    pub(crate) fn copy(&mut self, from: &mut impl Read, mut length: u64) -> Result<(), CopyError> {
        while length > 0 {
            let free = self.free().map_err(CopyError::Write)?;
            let wanted = free.len().min(usize::try_from(length).unwrap_or(usize::MAX));
            match from.read(&mut free[..wanted]) {
                Ok(0) => return Err(CopyError::Read(io::ErrorKind::UnexpectedEof.into())),
                Ok(count) => {
                    self.used += count;
                    length -= count as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(CopyError::Read(error)),
            }
        }
        Ok(())
    }

    /// Writes bytes.
    pub(crate) fn push(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let free = self.free()?;
            let (now, later) = bytes.split_at(free.len().min(bytes.len()));
            free[..now.len()].copy_from_slice(now);
            self.used += now.len();
            bytes = later;
        }
        Ok(())
    }

    /// Writes zeroes; whole blocks become a hole.
    pub(crate) fn zeros(&mut self, length: u64) -> io::Result<()> {
        let head = length.min(self.position().next_multiple_of(BLOCK) - self.position());
        self.few_zeros(head)?;
        let blocks = (length - head) / BLOCK * BLOCK;
        if blocks > 0 {
            self.flush()?;
            self.offset += blocks;
        }
        self.few_zeros(length - head - blocks)
    }

    /// Writes zeroes, at most a block.
    fn few_zeros(&mut self, length: u64) -> io::Result<()> {
        let zeros = [0; BLOCK_SIZE];
        self.push(&zeros[..usize::try_from(length).unwrap_or(BLOCK_SIZE)])
    }

    /// Writes zeroes up to the next block boundary.
    pub(crate) fn pad(&mut self) -> io::Result<()> {
        self.zeros(self.position().next_multiple_of(BLOCK) - self.position())
    }

    /// Pads the last block, flushes the buffer and returns the offset of the end.
    pub(crate) fn finish(mut self) -> io::Result<u64> {
        self.pad()?;
        self.flush()?;
        Ok(self.offset)
    }

    /// The free part of the buffer, which is flushed if it is full.
    fn free(&mut self) -> io::Result<&mut [u8]> {
        if self.used == BUFFER {
            self.flush()?;
        }
        Ok(&mut self.buffer[self.used..])
    }

    /// Writes the buffer, which holds whole blocks, except for blocks of zeroes.
    fn flush(&mut self) -> io::Result<()> {
        let (blocks, _) = self.buffer[..self.used].as_chunks::<BLOCK_SIZE>();
        let is_zero = |block: &[u8; BLOCK_SIZE]| *block == [0; BLOCK_SIZE];
        let mut at = self.offset;
        for run in blocks.chunk_by(|a, b| is_zero(a) == is_zero(b)) {
            let bytes = run.as_flattened();
            if !is_zero(&run[0]) {
                disk::check(self.file)?;
                self.file.write_all_at(bytes, at)?;
            }
            at += bytes.len() as u64;
        }
        self.offset += self.used as u64;
        self.used = 0;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn bytes_are_written_and_zeroes_take_no_disk_space() {
        let file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let mut expected = Vec::new();
        let mut writer = BlockWriter::new(&file, 0);
        let data: Vec<u8> = (1..=255).cycle().take(3 * BUFFER + 77).collect();
        writer.copy(&mut &data[..], data.len() as u64).unwrap();
        expected.extend_from_slice(&data);
        writer.zeros(5).unwrap();
        expected.resize(expected.len() + 5, 0);
        writer.zeros(1 << 30).unwrap();
        writer.push(b"end").unwrap();
        let end = writer.position();
        assert_eq!(end, expected.len() as u64 + (1 << 30) + 3);
        assert_eq!(writer.finish().unwrap(), end.next_multiple_of(BLOCK));
        let mut found = vec![0; expected.len()];
        file.read_exact_at(&mut found, 0).unwrap();
        assert!(found == expected);
        let mut last = [0; 3];
        file.read_exact_at(&mut last, end - 3).unwrap();
        assert_eq!(&last, b"end");
        assert!(file.metadata().unwrap().blocks() * 512 < 4 << 20);
    }

    #[test]
    fn read_and_write_errors_are_distinct() {
        let file = tempfile::tempfile().unwrap();
        let mut writer = BlockWriter::new(&file, 0);
        assert!(matches!(writer.copy(&mut &b"abc"[..], 4), Err(CopyError::Read(_))));
        let file = File::open("/dev/null").unwrap();
        let mut writer = BlockWriter::new(&file, 0);
        let mut endless = io::repeat(1);
        assert!(matches!(writer.copy(&mut endless, 2 * BUFFER as u64), Err(CopyError::Write(_))));
    }
}
