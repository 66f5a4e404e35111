//! A reader whose bytes come from another thread, which reads ahead by some chunks.

use std::io::{self, Read};
use std::sync::mpsc::{self, Receiver, SyncSender};

/// Bytes of a chunk.
const CHUNK: usize = 256 << 10;
/// Chunks that are read ahead.
const QUEUE_LEN: usize = 4;

/// The end of the channel that the reading thread writes to.
#[derive(Debug)]
pub(crate) struct Sender(SyncSender<io::Result<Vec<u8>>>);

/// The end of the channel that is read; an error of the other thread ends it.
#[derive(Debug)]
pub(crate) struct ReadAhead {
    chunks: Receiver<io::Result<Vec<u8>>>,
    chunk: Vec<u8>,
    /// The number of bytes of the chunk that have been read.
    position: usize,
}

/// Creates a channel and returns both its ends.
pub(crate) fn channel() -> (Sender, ReadAhead) {
    let (sender, chunks) = mpsc::sync_channel(QUEUE_LEN);
    (Sender(sender), ReadAhead { chunks, chunk: Vec::new(), position: 0 })
}

impl Sender {
    /// Sends all bytes of a reader, until the receiver is dropped. An error of the reader is sent, too.
    pub(crate) fn send_all(&self, reader: io::Result<impl Read>) {
        let mut reader = match reader {
            Ok(reader) => reader,
            Err(error) => return drop(self.0.send(Err(error))),
        };
        loop {
            let mut chunk = Vec::with_capacity(CHUNK);
            let result = reader.by_ref().take(CHUNK as u64).read_to_end(&mut chunk);
            // The bytes before an error are sent before it.
            let is_last = chunk.is_empty() || self.0.send(Ok(chunk)).is_err();
            match result {
                Err(error) => return drop(self.0.send(Err(error))),
                Ok(_) if is_last => return,
                Ok(_) => {}
            }
        }
    }
}

impl Read for ReadAhead {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.position == self.chunk.len() {
            // The end of file, when the sender is dropped.
            let Ok(chunk) = self.chunks.recv() else { return Ok(0) };
            (self.chunk, self.position) = (chunk?, 0);
        }
        let length = (&self.chunk[self.position..]).read(buffer)?;
        self.position += length;
        Ok(length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    /// A reader of so many bytes, and then of an error.
    struct Broken(usize);

    impl Read for Broken {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let length = buffer.len().min(self.0);
            self.0 -= length;
            if length == 0 { Err(io::Error::other("broken")) } else { Ok(length) }
        }
    }

    #[test]
    fn bytes_are_read_in_order() {
        let bytes: Vec<u8> = (0..=255).cycle().take(10 * CHUNK + 7).collect();
        thread::scope(|scope| {
            let (sender, mut ahead) = channel();
            scope.spawn(|| { sender }.send_all(Ok(&bytes[..])));
            let mut read = Vec::new();
            ahead.read_to_end(&mut read).unwrap();
            assert!(read == bytes);
        });
    }

    #[test]
    fn an_error_is_read_after_the_bytes_before_it() {
        for reader in [Ok(Broken(CHUNK + 5)), Ok(Broken(0)), Err(io::Error::other("broken"))] {
            let expected = reader.as_ref().map_or(0, |reader| reader.0);
            thread::scope(|scope| {
                let (sender, mut ahead) = channel();
                scope.spawn(|| { sender }.send_all(reader));
                let mut read = Vec::new();
                let error = ahead.read_to_end(&mut read).unwrap_err();
                assert_eq!((read.len(), error.to_string().as_str()), (expected, "broken"));
                assert_eq!(ahead.read(&mut [0]).unwrap(), 0);
            });
        }
    }

    #[test]
    fn the_sender_ends_when_the_reader_is_dropped() {
        thread::scope(|scope| {
            let (sender, ahead) = channel();
            scope.spawn(|| { sender }.send_all(Ok(io::repeat(1))));
            drop(ahead);
        });
    }
}
