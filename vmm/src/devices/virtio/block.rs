//! Block device (section 5.2): a regular file or a block device of the host as a raw disk.

mod attach;
pub(super) mod file;
#[cfg(test)]
mod tests;

use super::file_io::{Completion, FileIo, Job, Operation};
use super::queue::fill;
use super::rate_limiter::RateLimiter;
use super::{BackendError, Chain, Device, DeviceError, Event, Progress, Queues, Segment, Watcher};
use crate::config::devices::{CacheType, Drive};
use crate::jail::Jail;
use crate::timeline::Instant;
use attach::unusable;
use file::{ForeignLock, direct_alignment, length, open_file};
use std::fs::File;
use std::io;
use std::path::PathBuf;

const KIND: u32 = 2;
const QUEUE: usize = 0;
const QUEUE_SIZE: u16 = 256;
/// The token of [`FileIo`] among the device's events.
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

/// Request types (section 5.2.6).
mod request {
    pub(super) const IN: u32 = 0;
    pub(super) const OUT: u32 = 1;
    pub(super) const FLUSH: u32 = 4;
    pub(super) const GET_ID: u32 = 8;
    pub(super) const DISCARD: u32 = 11;
    pub(super) const WRITE_ZEROES: u32 = 13;
    /// Flag of a write-zeroes request: the device may deallocate the range.
    pub(super) const UNMAP: u32 = 1;
}

/// Request status (section 5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// Bytes per sector, the unit of all requests.
const SECTOR: u64 = 512;
/// Capacity of a placeholder: 1 PiB.
const PLACEHOLDER_SECTORS: u64 = 1 << 41;
/// Bytes of the reply to [`request::GET_ID`].
const ID_LEN: usize = 20;
/// Maximum number of chains per call.
const BUDGET: usize = 64;
/// Bytes of requests after which a call ends: copying them takes a tenth of a millisecond. The last request may exceed
/// the limit by the maximum that [`FileIo`] transfers inline.
const BUDGET_BYTES: u64 = 1 << 20;

/// A virtio block device.
#[derive(Debug)]
pub struct Block {
    io: FileIo,
    sectors: u64,
    /// The logical block size: the smallest request that the host supports, in bytes, a multiple of the sector size.
    block_size: u32,
    is_read_only: bool,
    cache_type: CacheType,
    id: [u8; ID_LEN],
    limiter: RateLimiter,
    /// Time at which the rate limiter admits the next request; `None` when no request waits for it.
    resume_at: Option<Instant>,
    /// A request that would have blocked the vCPU's thread; the event loop's thread submits it.
    deferred: Option<Request>,
    /// Requests that have been submitted, indexed by their number.
    in_flight: Vec<Option<Request>>,
    watcher: Option<Watcher>,
    finished: Vec<Completion>,
    /// Path of the file, for error messages.
    path: PathBuf,
    /// The first I/O error of the host.
    failure: Option<String>,
}

/// A valid request.
#[derive(Debug)]
struct Request {
    chain: Chain,
    status: Segment,
    operation: Operation,
    /// Offset in the file in bytes.
    offset: u64,
    /// Bytes of data in guest memory.
    length: u64,
    /// The driver has reset the device in the meantime.
    is_dropped: bool,
}

/// A parsed chain.
enum Parsed {
    /// A request that accesses the file.
    Request(Request),
    /// A request that is completed without access to the file: chain, status segment, status, and the length of the
    /// reply in bytes.
    Reply(Chain, Segment, Status, u32),
}

impl Block {
    /// Opens the file of a drive. [`ForeignLock::Ignored`] allows a file that another process has locked. It is used
    /// for the root filesystem of an image: that is only read, and any process that may read the file could lock it and
    /// so keep all guests of the image from starting.
    ///
    /// # Errors
    /// When the file does not exist, is in use, or is neither a regular file nor a block device.
    fn open_file(drive: &Drive, lock: ForeignLock) -> Result<File, BackendError> {
        open_file(&drive.path_on_host, drive.is_read_only, drive.direct, lock)
            .map_err(|why| unusable(drive, why))
    }

    /// Opens the file of a drive and creates the device.
    ///
    /// # Errors
    /// When the file does not exist, is in use, is empty, or is neither a regular file nor a block device.
    #[cfg(any(test, fuzzing))]
    pub fn open(drive: &Drive) -> Result<Self, BackendError> {
        Self::new(drive, Self::open_file(drive, ForeignLock::InUse)?)
    }

    /// Creates the device for an open file.
    ///
    /// # Errors
    /// When the file is empty, or its length is not a multiple of the logical block size.
    fn new(drive: &Drive, file: File) -> Result<Self, BackendError> {
        let wrong = |why: String| unusable(drive, why);
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

    /// Makes the device a placeholder, with which a kernel is pre-booted: replaces the file by a sparse memory file of
    /// the same size, and reports a larger capacity than any disk has. A guest that continues from the kernel learns the
    /// capacity of its own disk soon, but not before its first access: Linux reads zeroes beyond the capacity that it knows
    /// (`block_read_full_folio` in fs/buffer.c).
    ///
    /// # Errors
    /// When the host is out of memory.
    pub fn placeholder(mut self) -> io::Result<Self> {
        let file = File::from(rustix::fs::memfd_create("placeholder disk", rustix::fs::MemfdFlags::CLOEXEC)?);
        file.set_len(self.sectors * SECTOR)?;
        self.io = FileIo::new(file, QUEUE_SIZE);
        self.sectors = PLACEHOLDER_SECTORS;
        Ok(self)
    }

    fn serve_queue(&mut self, inline: bool, queues: &mut Queues) -> Result<Progress, DeviceError> {
        self.resume_at = None;
        let result = self.serve_chains(inline, queues);
        queues.notify(QUEUE)?;
        result
    }

    /// Serves available chains. With `inline` it stops at a request that would block.
    fn serve_chains(&mut self, inline: bool, queues: &mut Queues) -> Result<Progress, DeviceError> {
        let mut total = 0;
        for _ in 0..BUDGET {
            let Some(chain) = queues.pop(QUEUE)? else {
                if queues.enable_notification(QUEUE)? {
                    continue;
                }
                return Ok(Progress::Done);
            };
            let bytes = chain.readable_len().max(chain.writable_len());
            if let Err(until) = self.limiter.take(bytes) {
                queues.undo_pop(QUEUE, chain);
                self.resume_at = Some(until);
                // The event loop has to update its timeout.
                return Ok(Progress::Pending);
            }
            match self.parse(chain)? {
                Parsed::Reply(chain, status, result, written) => {
                    fill(status, &[result as u8]);
                    queues.complete(QUEUE, chain, written + 1)?;
                }
                Parsed::Request(request) => {
                    if let Some(request) = self.try_inline(request, queues)? {
                        if inline {
                            self.deferred = Some(request);
                            return Ok(Progress::Pending);
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
        Ok(Progress::Pending)
    }

    fn parse(&self, mut chain: Chain) -> Result<Parsed, DeviceError> {
        let mut header = [0; 16];
        chain.read(&mut header)?;
        let status = chain.split_writable(1)?;
        let [kind, _, sector_low, sector_high] = words(header);
        let offset = byte_offset(sector_low, sector_high);
        let answer = |chain, result| Ok(Parsed::Reply(chain, status, result, 0));
        let (operation, offset, length) = match kind {
            request::IN => (Operation::Read, offset, chain.writable_len()),
            request::OUT => (Operation::Write, offset, chain.readable_len()),
            request::FLUSH if self.cache_type == CacheType::Unsafe => return answer(chain, Status::Ok),
            request::FLUSH => (Operation::Flush, Some(0), 0),
            request::GET_ID => {
                let room = usize::try_from(chain.writable_len()).unwrap_or(usize::MAX).min(ID_LEN);
                chain.write(&self.id[..room])?;
                let written = u32::try_from(room).unwrap_or(0);
                return Ok(Parsed::Reply(chain, status, Status::Ok, written));
            }
            request::DISCARD | request::WRITE_ZEROES => {
                let mut range = [0; 16];
                // The device offers one range per request.
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
                    (request::WRITE_ZEROES, 0) => Operation::Zero(bytes),
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
        Ok(Parsed::Request(Request { chain, status, operation, offset, length, is_dropped: false }))
    }

    /// Whether a range lies within the disk.
    fn has(&self, offset: Option<u64>, length: u64) -> bool {
        let end = offset.and_then(|offset| offset.checked_add(length));
        end.is_some_and(|end| end <= self.sectors * SECTOR)
    }

    /// Performs a request if it does not block; otherwise returns it.
    fn try_inline(&mut self, request: Request, queues: &mut Queues) -> Result<Option<Request>, DeviceError> {
        match self.io.try_inline(&request.job()) {
            Some(Ok(moved)) if moved == request.length => finish(request, Status::Ok, queues)?,
            Some(Err(error)) => {
                let status = self.record_error(request.operation, &error);
                finish(request, status, queues)?;
            }
            // After a short transfer the whole request is repeated: the transfer may have ended where it would have
            // blocked.
            Some(Ok(_)) | None => return Ok(Some(request)),
        }
        Ok(None)
    }

    fn submit(&mut self, request: Request, queues: &mut Queues) -> Result<(), DeviceError> {
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

    /// Takes the completed request with this number.
    fn take(&mut self, number: u32) -> Option<Request> {
        self.in_flight.get_mut(usize::try_from(number).ok()?)?.take()
    }

    /// The status for an error of the host. Records the first I/O error.
    fn record_error(&mut self, operation: Operation, error: &io::Error) -> Status {
        if let Some(libc::EOPNOTSUPP | libc::ENOSYS) = error.raw_os_error() {
            return Status::Unsupported;
        }
        let what = if operation == Operation::Read { "reading" } else { "writing" };
        self.failure.get_or_insert_with(|| format!("{what} {} failed: {error}", self.path.display()));
        Status::IoError
    }

    fn take_finished(&mut self, queues: &mut Queues) -> Result<(), DeviceError> {
        let mut finished = std::mem::take(&mut self.finished);
        self.io.finished(&mut finished);
        for (number, result) in finished.drain(..) {
            let Some(request) = self.take(number).filter(|request| !request.is_dropped) else { continue };
            let status = match result {
                Ok(moved) if moved == request.length => Status::Ok,
                // The file was truncated, or a signal interrupted the transfer.
                Ok(_) => Status::IoError,
                Err(error) => self.record_error(request.operation, &error),
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
        // SAFETY: a submitted request is kept in `in_flight` until it completes or the file has been drained; it moves
        // neither the vector of the chain's segments nor guest memory.
        unsafe { Job::new(self.operation, self.offset, segments) }
    }
}

/// Completes a request. The data of a read counts as written by the device.
fn finish(request: Request, status: Status, queues: &mut Queues) -> Result<(), DeviceError> {
    fill(request.status, &[status as u8]);
    let read = if request.operation == Operation::Read && status == Status::Ok { request.length } else { 0 };
    queues.complete(QUEUE, request.chain, u32::try_from(read + 1).unwrap_or(u32::MAX))
}

/// The byte offset of a sector from the two halves of its number; `None` when it overflows.
fn byte_offset(sector_low: u32, sector_high: u32) -> Option<u64> {
    (u64::from(sector_high) << 32 | u64::from(sector_low)).checked_mul(SECTOR)
}

/// Splits bytes into four little-endian numbers.
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
        // seg_max: the queue size without the descriptors of header and status.
        bytes.extend((u32::from(QUEUE_SIZE) - 2).to_le_bytes());
        bytes.extend([0; 4]);
        bytes.extend(self.block_size.to_le_bytes());
        bytes.extend([0; 12]);
        let sectors_max = u32::MAX / 512;
        let alignment = self.block_size / 512;
        // Discard: sectors, segments, alignment. Write zeroes: sectors, segments, may_unmap.
        bytes.extend([sectors_max, 1, alignment, sectors_max, 1, 1].map(u32::to_le_bytes).concat());
        bytes
    }

    fn static_configuration(&self) -> Vec<u8> {
        // The capacity may change.
        self.configuration().split_off(size_of_val(&self.sectors))
    }

    fn prepare(&mut self, watcher: &Watcher, jail: Jail) -> io::Result<()> {
        self.io.prepare(FILE, watcher, jail)
    }

    fn activate(&mut self, _: u64, _: &mut Queues, watcher: &Watcher) -> Result<(), DeviceError> {
        self.watcher = Some(watcher.clone());
        Ok(())
    }

    fn failure(&self) -> Option<String> {
        self.failure.clone()
    }

    fn serves_inline(&self) -> bool {
        self.io.supports_inline()
    }

    fn serve_inline(&mut self, queues: &mut Queues) -> Result<Progress, DeviceError> {
        // A request would block now, or the limiter has no tokens.
        if self.resume_at.is_some() || self.deferred.is_some() || self.io.is_busy() {
            return Ok(Progress::Pending);
        }
        self.serve_queue(true, queues)
    }

    fn serve(&mut self, event: Event, queues: &mut Queues) -> Result<(), DeviceError> {
        match event {
            Event::Doorbell if self.resume_at.is_some() => Ok(()),
            Event::Doorbell | Event::Deadline => {
                if let Some(request) = self.deferred.take() {
                    self.submit(request, queues)?;
                }
                let is_unfinished =
                    self.serve_queue(false, queues)? == Progress::Pending && self.resume_at.is_none();
                if self.io.retry_submit() || is_unfinished {
                    queues.reschedule();
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
        // The memory of a submitted request must stay until it completes.
        self.in_flight.iter_mut().flatten().for_each(|request| request.is_dropped = true);
        self.deferred = None;
        self.resume_at = None;
    }

    fn is_quiescent(&mut self) -> bool {
        self.io.retry_submit();
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
        // Requests own the memory that jobs use, so that they must outlive the jobs.
        self.io.drain();
    }
}
