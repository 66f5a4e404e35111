//! SHA-256 digests as images write them: `sha256:` and 64 digits.

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use std::fmt::{self, Debug, Display, Formatter};
use std::io::{self, Read};
use std::mem;
use std::str::FromStr;
use std::sync::mpsc::{self, SyncSender};
use std::thread::{self, JoinHandle};

/// The SHA-256 digest of a blob.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest([u8; 32]);

/// A text that is not a SHA-256 digest.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is not a digest of the form sha256:<64 hexadecimal digits>")]
pub struct InvalidDigest(String);

impl Digest {
    /// The digest of bytes.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    /// The digest's bytes.
    #[must_use]
    pub const fn bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// 64 hexadecimal digits.
    #[must_use]
    pub fn hex(&self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn parse(text: &str) -> Option<Self> {
        let digits = text.strip_prefix("sha256:")?.as_bytes();
        let mut bytes = [0; 32];
        if digits.len() != 2 * bytes.len() {
            return None;
        }
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            let digit = |digit: u8| match digit {
                b'0'..=b'9' => Some(digit - b'0'),
                b'a'..=b'f' => Some(digit - b'a' + 10),
                _ => None,
            };
            *byte = (digit(pair[0])? << 4) | digit(pair[1])?;
        }
        Some(Self(bytes))
    }
}

impl FromStr for Digest {
    type Err = InvalidDigest;

    fn from_str(text: &str) -> Result<Self, InvalidDigest> {
        Self::parse(text).ok_or_else(|| InvalidDigest(text.chars().take(100).collect()))
    }
}

impl TryFrom<String> for Digest {
    type Error = InvalidDigest;

    fn try_from(text: String) -> Result<Self, InvalidDigest> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.to_string()
    }
}

impl Display for Digest {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        write!(formatter, "sha256:{}", self.hex())
    }
}

impl Debug for Digest {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        Display::fmt(self, formatter)
    }
}

/// Bytes that are passed to the hashing thread at a time.
const CHUNK: usize = 256 << 10;
/// Chunks that are queued for the hashing thread.
const QUEUE_LEN: usize = 4;

/// A reader that computes the SHA-256 of the bytes read, in a separate thread: on a processor without SHA instructions,
/// hashing takes longer than all the rest of a conversion.
#[derive(Debug)]
pub(crate) struct HashingReader<R> {
    inner: R,
    pending: Vec<u8>,
    bytes: u64,
    chunks: SyncSender<Vec<u8>>,
    hasher: JoinHandle<Digest>,
}

impl<R: Read> HashingReader<R> {
    pub(crate) fn new(inner: R) -> io::Result<Self> {
        let (chunks, coming) = mpsc::sync_channel(QUEUE_LEN);
        let hasher = thread::Builder::new().spawn(move || {
            let mut hasher = Sha256::new();
            coming.into_iter().for_each(|chunk: Vec<u8>| hasher.update(&chunk));
            Digest(hasher.finalize().into())
        })?;
        Ok(Self { inner, pending: Vec::with_capacity(CHUNK), bytes: 0, chunks, hasher })
    }

    /// Reads to the end and returns the digest and the number of all bytes.
    pub(crate) fn finish(mut self) -> io::Result<(Digest, u64)> {
        drain(&mut self)?;
        let Self { pending, bytes, chunks, hasher, .. } = self;
        chunks.send(pending).map_err(io::Error::other)?;
        // The thread ends when the channel is closed.
        drop(chunks);
        let digest = hasher.join().map_err(|_| io::Error::other("the hashing thread has panicked"))?;
        Ok((digest, bytes))
    }
}

impl<R: Read> Read for HashingReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.inner.read(buffer)?;
        self.bytes += length as u64;
        self.pending.extend_from_slice(&buffer[..length]);
        if self.pending.len() >= CHUNK {
            let chunk = mem::replace(&mut self.pending, Vec::with_capacity(CHUNK));
            self.chunks.send(chunk).map_err(io::Error::other)?;
        }
        Ok(length)
    }
}

/// Reads to the end and discards the bytes.
pub(crate) fn drain(reader: &mut impl Read) -> io::Result<()> {
    let mut buffer = vec![0; 128 << 10];
    loop {
        match reader.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_read_as_they_are_written() {
        // FIPS 180-2, the example "abc".
        let text = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(Digest::of(b"abc").to_string(), text);
        assert_eq!(text.parse::<Digest>().unwrap(), Digest::of(b"abc"));
        for wrong in
            ["", "sha256:", "sha512:00", &text[1..], &text[..70], &text.to_uppercase(), &format!("{text}0")]
        {
            assert!(wrong.parse::<Digest>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_reader_is_hashed() {
        let mut hashed = HashingReader::new(&b"abc"[..]).unwrap();
        hashed.read_exact(&mut [0]).unwrap();
        assert_eq!(hashed.finish().unwrap(), (Digest::of(b"abc"), 3));
        let many: Vec<u8> = (0..=255).cycle().take(20 * CHUNK + 1).collect();
        let mut hashed = HashingReader::new(&many[..]).unwrap();
        hashed.read_exact(&mut vec![0; 3 * CHUNK + 7]).unwrap();
        assert_eq!(hashed.finish().unwrap(), (Digest::of(&many), many.len() as u64));
    }
}
