//! A reader whose bytes come from another thread, which is some chunks ahead.

use std::io::{self, Read};
use std::sync::mpsc::{self, Receiver, SyncSender};

/// Bytes that are passed on at once.
const CHUNK: usize = 256 << 10;
/// Chunks that wait to be read.
const WAITING: usize = 4;

/// Where the other thread puts what it reads.
#[derive(Debug)]
pub(crate) struct Sender(SyncSender<io::Result<Vec<u8>>>);

/// What comes from there, in order; an error ends it.
#[derive(Debug)]
pub(crate) struct Ahead {
    chunks: Receiver<io::Result<Vec<u8>>>,
    chunk: Vec<u8>,
    /// What has been read of it.
    position: usize,
}

/// Both ends.
pub(crate) fn channel() -> (Sender, Ahead) {
    let (sender, chunks) = mpsc::sync_channel(WAITING);
    (Sender(sender), Ahead { chunks, chunk: Vec::new(), position: 0 })
}

impl Sender {
    /// Reads to the end, or until nobody wants more. An error is passed on.
    pub(crate) fn send_all(&self, reader: io::Result<impl Read>) {
        let mut reader = match reader {
            Ok(reader) => reader,
            Err(error) => return drop(self.0.send(Err(error))),
        };
        loop {
            let mut chunk = Vec::with_capacity(CHUNK);
            let result = reader.by_ref().take(CHUNK as u64).read_to_end(&mut chunk);
            // What came before an error is read before it.
            let is_last = chunk.is_empty() || self.0.send(Ok(chunk)).is_err();
            match result {
                Err(error) => return drop(self.0.send(Err(error))),
                Ok(_) if is_last => return,
                Ok(_) => {}
            }
        }
    }
}

impl Read for Ahead {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.position == self.chunk.len() {
            // The sender's end is that of the bytes.
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

    /// Bytes, then an error.
    struct Broken(usize);

    impl Read for Broken {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let length = buffer.len().min(self.0);
            self.0 -= length;
            if length == 0 { Err(io::Error::other("broken")) } else { Ok(length) }
        }
    }

    #[test]
    fn bytes_come_in_order() {
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
    fn an_error_comes_after_what_was_before_it() {
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
    fn who_is_not_listened_to_ends() {
        thread::scope(|scope| {
            let (sender, ahead) = channel();
            scope.spawn(|| { sender }.send_all(Ok(io::repeat(1))));
            drop(ahead);
        });
    }
}
