//! Decompression of layers and archives. The format is detected by the first bytes, since media types are often wrong.

use bzip2::bufread::MultiBzDecoder;
use flate2::bufread::MultiGzDecoder;
use lzma_rust2::XzReader;
use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};
use std::io::{self, BufRead, BufReader, Read};

const BUFFER: usize = 256 << 10;
/// Bytes that are needed to detect the format.
const MAGIC: usize = 10;
/// The largest window of Zstandard or dictionary of xz, in bytes: enough for `zstd --ultra --long=29` and
/// `xz --lzma2=dict=512MiB`.
const MAX_WINDOW: u32 = 512 << 20;
/// Memory of the xz decoder besides its dictionary, in KiB; it needs a tenth of that.
const XZ_OVERHEAD: u32 = 1024;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Plain,
    Gzip,
    Zstd,
    Xz,
    Bzip2,
}

impl Format {
    fn of(start: &[u8]) -> Self {
        match start {
            [0x1f, 0x8b, ..] => Self::Gzip,
            // A frame, or a skippable frame, such as the first of podman's zstd:chunked.
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Self::Zstd,
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Self::Xz,
            // With the magic number of a block or of the end of the stream: "BZh" and a digit could also begin a file
            // name in a tar archive.
            [b'B', b'Z', b'h', b'1'..=b'9', 0x31, 0x41, 0x59, 0x26, 0x53, 0x59]
            | [b'B', b'Z', b'h', b'1'..=b'9', 0x17, 0x72, 0x45, 0x38, 0x50, 0x90] => Self::Bzip2,
            _ => Self::Plain,
        }
    }
}

/// Whether a blob has a compression format that `decompress` supports.
pub(crate) fn is_compressed(mut blob: impl Read) -> io::Result<bool> {
    Ok(Format::of(&start(&mut blob)?) != Format::Plain)
}

/// The first bytes, which a single read might return only in part.
fn start(blob: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut start = Vec::with_capacity(MAGIC);
    blob.by_ref().take(MAGIC as u64).read_to_end(&mut start)?;
    Ok(start)
}

/// The uncompressed bytes of a blob.
pub(crate) fn decompress<'a>(mut blob: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let start = start(&mut blob)?;
    let format = Format::of(&start);
    let blob = BufReader::with_capacity(BUFFER, io::Cursor::new(start).chain(blob));
    Ok(match format {
        Format::Plain => Box::new(blob),
        Format::Gzip => buffered(MultiGzDecoder::new(blob)),
        Format::Zstd => buffered(Zstd::new(blob)),
        Format::Xz => buffered(Xz(XzReader::new_mem_limit(blob, true, (MAX_WINDOW >> 10) + XZ_OVERHEAD))),
        Format::Bzip2 => buffered(MultiBzDecoder::new(blob)),
    })
}

fn buffered<'a>(content: impl Read + 'a) -> Box<dyn Read + 'a> {
    Box::new(BufReader::with_capacity(BUFFER, content))
}

/// An xz decoder that names the limit of its memory.
struct Xz<R: Read>(XzReader<R>);

impl<R: Read> Read for Xz<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer).map_err(|error| match error.kind() {
            io::ErrorKind::OutOfMemory => {
                io::Error::other(format!("the dictionary of xz is larger than {} MiB", MAX_WINDOW >> 20))
            }
            _ => error,
        })
    }
}

/// A decoder for concatenated Zstandard frames.
struct Zstd<R> {
    input: R,
    decoder: FrameDecoder,
}

impl<R: BufRead> Zstd<R> {
    fn new(input: R) -> Self {
        let mut decoder = FrameDecoder::new();
        decoder.set_max_window_size(MAX_WINDOW.into());
        Self { input, decoder }
    }

    /// Begins the next frame that is not skippable; false at the end of the input.
    fn next_frame(&mut self) -> io::Result<bool> {
        while !self.input.fill_buf()?.is_empty() {
            match self.decoder.init(&mut self.input) {
                Ok(()) => return Ok(true),
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame {
                    length,
                    ..
                })) => {
                    let length = u64::from(length);
                    if io::copy(&mut self.input.by_ref().take(length), &mut io::sink())? < length {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
                Err(error) => return Err(io::Error::other(error)),
            }
        }
        Ok(false)
    }
}

impl<R: BufRead> Read for Zstd<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.decoder.can_collect() == 0 {
            if self.decoder.is_finished() {
                if !self.next_frame()? {
                    return Ok(0);
                }
            } else {
                let some = BlockDecodingStrategy::UptoBlocks(1);
                self.decoder.decode_blocks(&mut self.input, some).map_err(io::Error::other)?;
            }
        }
        self.decoder.read(buffer)
    }
}
