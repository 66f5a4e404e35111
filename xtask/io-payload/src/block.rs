//! Reads and writes of a raw disk with direct I/O, which bypasses the guest's page cache.

use anyhow::{Context, Result, ensure};
use io_payload::{DISK_BYTES, Operation};
use io_uring::{IoUring, opcode, types};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};

const SMALL: usize = 4096;
/// [`SMALL`] in the types of io_uring.
const SMALL_U32: u32 = 4096;
const SMALL_I32: i32 = 4096;
const LARGE: usize = 128 * 1024;
const DEPTH: u32 = 32;

/// A buffer with the alignment that direct I/O requires.
#[repr(C, align(4096))]
struct Buffer([u8; LARGE]);

/// The disk, with one buffer whose pages are shared by the requests.
pub(crate) struct Disk {
    file: File,
    buffer: Box<Buffer>,
    ring: IoUring,
    state: u64,
}

impl Disk {
    pub(crate) fn open(path: &str) -> Result<Self> {
        let mut options = File::options();
        options.read(true).write(true).custom_flags(libc::O_DIRECT);
        let file = options.open(path).with_context(|| format!("cannot open {path}"))?;
        let ring = IoUring::new(DEPTH).context("this kernel has no io_uring")?;
        Ok(Self { file, buffer: Box::new(Buffer([0xa5; LARGE])), ring, state: 1 })
    }

    /// Performs an operation `count` times.
    pub(crate) fn repeat(&mut self, operation: Operation, count: u32) -> Result<()> {
        match operation {
            Operation::BlockRead4k | Operation::BlockWrite4k => {
                for _ in 0..count {
                    let offset = self.random_offset();
                    self.single(operation, offset, SMALL)?;
                }
            }
            Operation::BlockRead4kDepth32 | Operation::BlockWrite4kDepth32 => self.deep(operation, count)?,
            Operation::BlockRead128k | Operation::BlockWrite128k => {
                for number in 0..count {
                    self.single(operation, u64::from(number) * LARGE as u64 % DISK_BYTES, LARGE)?;
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn single(&mut self, operation: Operation, offset: u64, length: usize) -> Result<()> {
        let buffer = &mut self.buffer.0[..length];
        match operation {
            Operation::BlockRead4k | Operation::BlockRead128k => self.file.read_exact_at(buffer, offset)?,
            _ => self.file.write_all_at(buffer, offset)?,
        }
        Ok(())
    }

    /// Keeps [`DEPTH`] requests in flight.
    #[expect(unsafe_code, reason = "io_uring takes addresses")]
    fn deep(&mut self, operation: Operation, count: u32) -> Result<()> {
        let descriptor = types::Fd(self.file.as_raw_fd());
        let (mut started, mut finished) = (0, 0);
        while finished < count {
            while started < count && started - finished < DEPTH {
                let offset = self.random_offset();
                let page = (started % DEPTH) as usize * SMALL;
                let page = self.buffer.0[page..page + SMALL].as_mut_ptr();
                let entry = match operation {
                    Operation::BlockRead4kDepth32 => {
                        opcode::Read::new(descriptor, page, SMALL_U32).offset(offset).build()
                    }
                    _ => opcode::Write::new(descriptor, page, SMALL_U32).offset(offset).build(),
                };
                // SAFETY: buffer and file live as long as the ring, which is in `self`. Two requests may read into the
                // same page; its content is never used.
                unsafe { self.ring.submission().push(&entry) }?;
                started += 1;
            }
            self.ring.submit_and_wait(1)?;
            for entry in self.ring.completion() {
                ensure!(entry.result() == SMALL_I32, "an io_uring request returned {}", entry.result());
                finished += 1;
            }
        }
        Ok(())
    }

    /// A random offset of a 4 KiB block, from a linear congruential generator (Knuth's MMIX).
    const fn random_offset(&mut self) -> u64 {
        self.state = self.state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.state >> 33) % (DISK_BYTES / SMALL as u64) * SMALL as u64
    }
}
