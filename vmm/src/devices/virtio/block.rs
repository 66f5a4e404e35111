//! Block device (section 5.2): a raw file or a block device of the host as a disk.

pub(super) mod file;
#[cfg(test)]
mod tests;

use super::file_io::{Done, FileIo, Job, Operation};
use super::queue::fill;
use super::rate_limiter::RateLimiter;
use super::{Broken, Chain, Device, Event, Left, Queues, Segment, Watcher};
use crate::config::ConfigError;
use crate::config::devices::{CacheType, Drive};
use crate::timeline::Instant;
pub(crate) use file::ForeignLock;
use file::{direct_alignment, length, open_file};
use std::fs::File;
use std::io;
use std::path::PathBuf;

const KIND: u32 = 2;
const QUEUE: usize = 0;
const QUEUE_SIZE: u16 = 256;
/// The token of [`FileIo`] among this device's events.
const FILE: u32 = 0;

/// Feature bits (section 5.2.3).
mod feature {
    pub(super) const SEG_MAX: u64 = 1 << 2;
    pub(super) const READ_ONLY: u64 = 1 << 5;
    pub(super) const BLK_SIZE: u64 = 1 << 6;
    pub(super) const FLUSH: u64 = 1 << 9;
    pub(super) const DISCARD: u64 = 1 << 13;
    pub(super) const WRITE_ZEROES: u64 = 1 << 14;
}

/// Kinds of requests, and how they end (section 5.2.6).
mod request {
    pub(super) const IN: u32 = 0;
    pub(super) const OUT: u32 = 1;
    pub(super) const FLUSH: u32 = 4;
    pub(super) const GET_ID: u32 = 8;
    pub(super) const DISCARD: u32 = 11;
    pub(super) const WRITE_ZEROES: u32 = 13;
    /// Flag of write zeroes: the range may lose its place on the disk.
    pub(super) const UNMAP: u32 = 1;
}

/// How a request ended (section 5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// Bytes of a sector, in which all requests count.
const SECTOR: u64 = 512;
/// Bytes of the answer to [`request::GET_ID`].
const ID_LEN: usize = 20;
/// Chains that are served before others have their turn.
const BUDGET: usize = 64;
/// Bytes of requests after which they have it: copying these takes a tenth of a millisecond. The last request may go
/// beyond by what [`FileIo`] does inline.
const BUDGET_BYTES: u64 = 1 << 20;

/// A disk.
#[derive(Debug)]
pub struct Block {
    io: FileIo,
    sectors: u64,
    /// Bytes of the smallest request that the host can do, a multiple of a sector.
    block_size: u32,
    is_read_only: bool,
    cache_type: CacheType,
    id: [u8; ID_LEN],
    limiter: RateLimiter,
    /// When requests that wait for the limiter can go on.
    resume_at: Option<Instant>,
    /// A request that a vCPU's thread could not do at once.
    deferred: Option<Request>,
    /// Requests that are on their way, by their number.
    in_flight: Vec<Option<Request>>,
    watcher: Option<Watcher>,
    finished: Vec<Done>,
    /// Where the file is.
    path: PathBuf,
    /// The first thing that the host could not do.
    failure: Option<String>,
}

/// A request that was understood.
#[derive(Debug)]
struct Request {
    chain: Chain,
    status: Segment,
    operation: Operation,
    /// Where in the file, in bytes.
    offset: u64,
    /// Bytes of data in guest memory.
    length: u64,
    /// The driver has reset the device since.
    is_forgotten: bool,
}

/// What a chain amounts to.
enum Parsed {
    /// Something to be done with the file.
    Request(Request),
    /// Something that is answered at once; with the bytes of the answer.
    Answer(Chain, Segment, Status, u32),
}

impl Block {
    /// Opens the file of a drive. With [`ForeignLock::Ignored`] others may have it: an image's root filesystem is only
    /// read, and whoever may read its file could lock it, and keep all guests of the image from starting.
    ///
    /// # Errors
    /// When it is missing, in use or nothing that a disk can be.
    pub(crate) fn open_file(drive: &Drive, lock: ForeignLock) -> Result<File, ConfigError> {
        let wrong = |what: String| ConfigError::DriveFile { path: drive.path_on_host.clone(), what };
        open_file(&drive.path_on_host, drive.is_read_only, drive.direct, lock).map_err(wrong)
    }

    /// Opens the file of a drive, and makes the disk.
    ///
    /// # Errors
    /// When it is missing, in use, empty or nothing that a disk can be.
    pub fn open(drive: &Drive) -> Result<Self, ConfigError> {
        Self::new(drive, Self::open_file(drive, ForeignLock::InUse)?)
    }

    /// The disk of an open file.
    ///
    /// # Errors
    /// When the file is empty, or its end lies in the middle of a block.
    pub(crate) fn new(drive: &Drive, file: File) -> Result<Self, ConfigError> {
        let wrong = |what: String| ConfigError::DriveFile { path: drive.path_on_host.clone(), what };
        let length = length(&file).map_err(|error| wrong(error.to_string()))?;
        if length == 0 {
            return Err(wrong("it is empty".into()));
        }
        let block_size = if drive.direct { direct_alignment(&file) } else { 512 };
        if length % u64::from(block_size) != 0 {
            return Err(wrong(format!("its {length} bytes are not a multiple of {block_size}")));
        }
        let mut id = [0; ID_LEN];
        for (to, from) in id.iter_mut().zip(drive.drive_id.bytes()) {
            *to = from;
        }
        Ok(Self {
            io: FileIo::new(file, QUEUE_SIZE),
            sectors: length / SECTOR,
            block_size,
            is_read_only: drive.is_read_only,
            cache_type: drive.cache_type,
            id,
            limiter: RateLimiter::new(drive.rate_limiter.as_ref(), Instant::now()),
            resume_at: None,
            deferred: None,
            in_flight: Vec::new(),
            watcher: None,
            finished: Vec::new(),
            path: drive.path_on_host.clone(),
            failure: None,
        })
    }

    /// The same disk with nothing on it, for a kernel that is booted once for many disks.
    ///
    /// # Errors
    /// When the host has no memory left.
    pub fn blank(mut self) -> io::Result<Self> {
        let file = File::from(rustix::fs::memfd_create("blank disk", rustix::fs::MemfdFlags::CLOEXEC)?);
        file.set_len(self.sectors * SECTOR)?;
        self.io = FileIo::new(file, QUEUE_SIZE);
        Ok(self)
    }

    fn serve_queue(&mut self, at_once: bool, queues: &mut Queues) -> Result<Left, Broken> {
        self.resume_at = None;
        let result = self.serve_chains(at_once, queues);
        queues.notify(QUEUE)?;
        result
    }

    /// With `at_once` it stops before a request for which the host would have to wait.
    fn serve_chains(&mut self, at_once: bool, queues: &mut Queues) -> Result<Left, Broken> {
        let mut total = 0;
        for _ in 0..BUDGET {
            let Some(chain) = queues.pop(QUEUE)? else {
                if queues.rearm(QUEUE)? {
                    continue;
                }
                return Ok(Left::Nothing);
            };
            let bytes = chain.readable_len().max(chain.writable_len());
            if let Err(until) = self.limiter.take(bytes) {
                queues.put_back(QUEUE, chain);
                self.resume_at = Some(until);
                // The event loop has to learn of the time.
                return Ok(Left::Something);
            }
            match self.parse(chain)? {
                Parsed::Answer(chain, status, result, written) => {
                    fill(status, &[result as u8]);
                    queues.complete(QUEUE, chain, written + 1)?;
                }
                Parsed::Request(request) => {
                    if let Some(request) = self.attempt(request, queues)? {
                        if at_once {
                            self.deferred = Some(request);
                            return Ok(Left::Something);
                        }
                        self.submit(request, queues)?;
                    }
                }
            }
            total += bytes;
            if total >= BUDGET_BYTES {
                break;
            }
        }
        Ok(Left::Something)
    }

    fn parse(&self, mut chain: Chain) -> Result<Parsed, Broken> {
        let mut header = [0; 16];
        chain.read(&mut header)?;
        let status = chain.split_writable(1)?;
        let [kind, _, sector_low, sector_high] = words(header);
        let offset = byte_offset(sector_low, sector_high);
        let answer = |chain, result| Ok(Parsed::Answer(chain, status, result, 0));
        let (operation, offset, length) = match kind {
            request::IN => (Operation::Read, offset, chain.writable_len()),
            request::OUT => (Operation::Write, offset, chain.readable_len()),
            request::FLUSH if self.cache_type == CacheType::Unsafe => return answer(chain, Status::Ok),
            request::FLUSH => (Operation::Flush, Some(0), 0),
            request::GET_ID => {
                let room = usize::try_from(chain.writable_len()).unwrap_or(usize::MAX).min(ID_LEN);
                chain.write(&self.id[..room])?;
                let written = u32::try_from(room).unwrap_or(0);
                return Ok(Parsed::Answer(chain, status, Status::Ok, written));
            }
            request::DISCARD | request::WRITE_ZEROES => {
                let mut range = [0; 16];
                // More than one range is more than was offered.
                if chain.readable_len() != 16 {
                    return answer(chain, Status::IoError);
                }
                chain.read(&mut range)?;
                let [sector_low, sector_high, count, flags] = words(range);
                let offset = byte_offset(sector_low, sector_high);
                let bytes = u64::from(count) * SECTOR;
                let operation = match (kind, flags) {
                    (request::DISCARD, 0) | (request::WRITE_ZEROES, request::UNMAP) => {
                        Operation::PunchHole(bytes)
                    }
                    (request::WRITE_ZEROES, 0) => self.io.zero(bytes),
                    _ => return answer(chain, Status::Unsupported),
                };
                if bytes == 0 || !self.has(offset, bytes) {
                    return answer(chain, Status::IoError);
                }
                (operation, offset, 0)
            }
            _ => return answer(chain, Status::Unsupported),
        };
        let changes = !matches!(operation, Operation::Read | Operation::Flush);
        let is_possible = self.has(offset, length)
            && length.is_multiple_of(SECTOR)
            && (length > 0 || !matches!(operation, Operation::Read | Operation::Write))
            && !(changes && self.is_read_only);
        let Some(offset) = offset.filter(|_| is_possible) else { return answer(chain, Status::IoError) };
        Ok(Parsed::Request(Request { chain, status, operation, offset, length, is_forgotten: false }))
    }

    /// Whether the disk has these bytes.
    fn has(&self, offset: Option<u64>, length: u64) -> bool {
        let end = offset.and_then(|offset| offset.checked_add(length));
        end.is_some_and(|end| end <= self.sectors * SECTOR)
    }

    /// Does a request if the host can do it at once, and otherwise gives it back.
    fn attempt(&mut self, request: Request, queues: &mut Queues) -> Result<Option<Request>, Broken> {
        match self.io.attempt(&request.job()) {
            Some(Ok(moved)) if moved == request.length => finish(request, Status::Ok, queues)?,
            Some(Err(error)) => {
                let status = self.judge(request.operation, &error);
                finish(request, status, queues)?;
            }
            // A part is done anew with the rest: it may have ended where the host would have had to wait.
            Some(Ok(_)) | None => return Ok(Some(request)),
        }
        Ok(None)
    }

    fn submit(&mut self, request: Request, queues: &mut Queues) -> Result<(), Broken> {
        let slot = self.in_flight.iter().position(Option::is_none).unwrap_or(self.in_flight.len());
        let (Some(watcher), Ok(number)) = (&self.watcher, u32::try_from(slot)) else {
            return finish(request, Status::IoError, queues);
        };
        if self.io.submit(number, request.job(), FILE, watcher).is_err() {
            return finish(request, Status::IoError, queues);
        }
        if slot == self.in_flight.len() {
            self.in_flight.push(None);
        }
        self.in_flight[slot] = Some(request);
        Ok(())
    }

    /// The request of this number, which has come back.
    fn take(&mut self, number: u32) -> Option<Request> {
        self.in_flight.get_mut(usize::try_from(number).ok()?)?.take()
    }

    /// What a request is answered that the host could not do.
    fn judge(&mut self, operation: Operation, error: &io::Error) -> Status {
        if let Some(libc::EOPNOTSUPP | libc::ENOSYS) = error.raw_os_error() {
            return Status::Unsupported;
        }
        let what = if operation == Operation::Read { "reading" } else { "writing" };
        self.failure.get_or_insert_with(|| format!("{what} {} failed: {error}", self.path.display()));
        Status::IoError
    }

    fn take_finished(&mut self, queues: &mut Queues) -> Result<(), Broken> {
        let mut finished = std::mem::take(&mut self.finished);
        self.io.finished(&mut finished);
        for (number, result) in finished.drain(..) {
            let Some(request) = self.take(number).filter(|request| !request.is_forgotten) else { continue };
            let status = match result {
                Ok(moved) if moved == request.length => Status::Ok,
                // The disk's file has become shorter, or a signal came in between.
                Ok(_) => Status::IoError,
                Err(error) => self.judge(request.operation, &error),
            };
            finish(request, status, queues)?;
        }
        self.finished = finished;
        queues.notify(QUEUE)
    }
}

impl Request {
    #[expect(unsafe_code, reason = "hands guest memory to the host")]
    fn job(&self) -> Job {
        let segments = match self.operation {
            Operation::Read => self.chain.writable(),
            Operation::Write => self.chain.readable(),
            _ => &[],
        };
        // SAFETY: a request that is submitted is kept in `in_flight`, which moves neither the vector of the
        // chain's segments nor guest memory, until it comes back or the file has been drained.
        unsafe { Job::new(self.operation, self.offset, segments) }
    }
}

/// Answers a request. What was read counts as written.
fn finish(request: Request, status: Status, queues: &mut Queues) -> Result<(), Broken> {
    fill(request.status, &[status as u8]);
    let read = if request.operation == Operation::Read && status == Status::Ok { request.length } else { 0 };
    queues.complete(QUEUE, request.chain, u32::try_from(read + 1).unwrap_or(u32::MAX))
}

/// Where a sector is, in bytes, by the halves of its number; none where no file is so long.
fn byte_offset(sector_low: u32, sector_high: u32) -> Option<u64> {
    (u64::from(sector_high) << 32 | u64::from(sector_low)).checked_mul(SECTOR)
}

/// Four little-endian numbers.
fn words(bytes: [u8; 16]) -> [u32; 4] {
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = bytes;
    [[a, b, c, d], [e, f, g, h], [i, j, k, l], [m, n, o, p]].map(u32::from_le_bytes)
}

impl Device for Block {
    fn kind(&self) -> u32 {
        KIND
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        let always = feature::SEG_MAX | feature::BLK_SIZE;
        let flush = if self.cache_type == CacheType::Writeback { feature::FLUSH } else { 0 };
        let change =
            if self.is_read_only { feature::READ_ONLY } else { feature::DISCARD | feature::WRITE_ZEROES };
        always | flush | change
    }

    fn configuration(&self) -> Vec<u8> {
        // struct virtio_blk_config (section 5.2.4), up to what this device has.
        let mut bytes = Vec::with_capacity(60);
        bytes.extend(self.sectors.to_le_bytes());
        bytes.extend([0; 4]);
        // Two descriptors are header and status.
        bytes.extend((u32::from(QUEUE_SIZE) - 2).to_le_bytes());
        bytes.extend([0; 4]);
        bytes.extend(self.block_size.to_le_bytes());
        bytes.extend([0; 12]);
        let sectors_max = u32::MAX / 512;
        let alignment = self.block_size / 512;
        // Discards: sectors, ranges, alignment. Then zeroes: sectors, ranges, whether they can unmap.
        bytes.extend([sectors_max, 1, alignment, sectors_max, 1, 1].map(u32::to_le_bytes).concat());
        bytes
    }

    fn identity(&self) -> Vec<u8> {
        // A disk may grow and shrink.
        self.configuration().split_off(size_of_val(&self.sectors))
    }

    fn activate(&mut self, _: u64, _: &mut Queues, watcher: &Watcher) -> Result<(), Broken> {
        self.watcher = Some(watcher.clone());
        Ok(())
    }

    fn failure(&self) -> Option<String> {
        self.failure.clone()
    }

    fn serves_at_once(&self) -> bool {
        self.io.can_be_quick()
    }

    fn serve_at_once(&mut self, queues: &mut Queues) -> Result<Left, Broken> {
        // Where the host had to wait a moment ago, it will have to wait again.
        if self.resume_at.is_some() || self.deferred.is_some() || self.io.is_busy() {
            return Ok(Left::Something);
        }
        self.serve_queue(true, queues)
    }

    fn serve(&mut self, event: Event, queues: &mut Queues) -> Result<(), Broken> {
        match event {
            Event::Doorbell if self.resume_at.is_some() => Ok(()),
            Event::Doorbell | Event::Deadline => {
                if let Some(request) = self.deferred.take() {
                    self.submit(request, queues)?;
                }
                let is_unfinished =
                    self.serve_queue(false, queues)? == Left::Something && self.resume_at.is_none();
                if self.io.is_held_up() || is_unfinished {
                    queues.yield_turn();
                }
                Ok(())
            }
            Event::Ready(..) => self.take_finished(queues),
        }
    }

    fn deadline(&self) -> Option<Instant> {
        self.resume_at
    }

    fn reset(&mut self) {
        // What is on its way keeps its memory until it comes back.
        self.in_flight.iter_mut().flatten().for_each(|request| request.is_forgotten = true);
        self.deferred = None;
        self.resume_at = None;
    }

    fn is_at_rest(&mut self) -> bool {
        self.io.is_held_up();
        let mut finished = std::mem::take(&mut self.finished);
        self.io.finished(&mut finished);
        for (number, _) in finished.drain(..) {
            self.take(number);
        }
        self.finished = finished;
        !self.io.is_busy()
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // The requests must not go before what uses their memory.
        self.io.drain();
    }
}
