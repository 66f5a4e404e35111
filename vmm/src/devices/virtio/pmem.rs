//! Persistent memory device (section 5.19): a file of the host, mapped into guest-physical memory above the RAM.
//!
//! The guest reads and writes the file without exits; guests that share a file share its pages in the host's page
//! cache. The device only reports the location of the mapping, and flushes the file.

use super::backend::{Attach, Backend, Contents};
use super::block::file::{ForeignLock, length, open_file};
use super::file_io::{Completion, FileIo, Job, Operation};
use super::queue::fill;
use super::{BackendError, Chain, Device, DeviceError, Event, Queues, Segment, Watcher};
use crate::config::devices::Pmem as Config;
use crate::jail::Jail;
use crate::layout::{HUGE_PAGE_SIZE, MIB};
use crate::memory::{MappedFile, PlacedFile};
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;
use vm_memory::GuestAddress;

const KIND: u32 = 27;
const QUEUE: usize = 0;
const QUEUE_SIZE: u16 = 64;
/// The token of [`FileIo`] among the device's events.
const FILE: u32 = 0;
/// The only request type (section 5.19.6).
const FLUSH: u32 = 0;

/// Request status (section 5.19.6). Linux reports any other value than 0 as an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
enum Status {
    Ok = 0,
    IoError = 1,
}

/// A virtio pmem device.
#[derive(Debug)]
pub struct Pmem {
    io: FileIo,
    mapping: Arc<MappedFile>,
    /// Guest-physical address of the mapping.
    start: GuestAddress,
    /// Chains that wait for the current flush. New chains stay in the queue in the meantime: the next flush serves all
    /// of them.
    flushing: Vec<(Chain, Segment)>,
    watcher: Option<Watcher>,
}

impl Pmem {
    /// Opens the file of a device and maps it at the guest-physical address `start`.
    ///
    /// # Errors
    /// When the file does not exist, is in use or empty, has an unsupported length, or cannot be mapped.
    #[cfg(any(test, fuzzing))]
    pub fn open(config: &Config, start: GuestAddress) -> Result<Self, BackendError> {
        Self::new(config, Self::open_file(config)?, start)
    }

    /// Opens the file of a device.
    ///
    /// # Errors
    /// When the file does not exist, is in use, or is neither a regular file nor a block device.
    fn open_file(config: &Config) -> Result<File, BackendError> {
        open_file(&config.path_on_host, config.read_only, false, ForeignLock::InUse)
            .map_err(|why| unusable(config, why))
    }

    /// Creates the device for an open file, mapped at `start`.
    ///
    /// # Errors
    /// When the file is empty, is writable and no multiple of 2 MiB long, or cannot be mapped.
    fn new(config: &Config, file: File, start: GuestAddress) -> Result<Self, BackendError> {
        let wrong = |why: String| unusable(config, why);
        let length = length(&file).map_err(|error| wrong(error.to_string()))?;
        if length == 0 {
            return Err(wrong("it is empty".into()));
        }
        if !config.read_only && !length.is_multiple_of(HUGE_PAGE_SIZE) {
            // Writes of the guest beyond the end of the file would be lost.
            let mib = length.next_multiple_of(HUGE_PAGE_SIZE) / MIB;
            return Err(wrong(format!(
                "its {length} bytes are not a multiple of 2 MiB; extend it with truncate -s {mib}M, or attach it \
                 read-only with :ro or read_only"
            )));
        }
        let mapping = MappedFile::new(&file, length, !config.read_only);
        let mapping = mapping.map_err(|error| wrong(format!("it cannot be mapped: {error}")))?;
        Ok(Self::with_mapping(file, mapping, start))
    }

    fn with_mapping(file: File, mapping: MappedFile, start: GuestAddress) -> Self {
        Self {
            io: FileIo::new(file, 1),
            mapping: Arc::new(mapping),
            start,
            flushing: Vec::new(),
            watcher: None,
        }
    }

    /// Creates a device that shows a file at the start of a window, read-only. Guests of one pre-booted kernel have files of
    /// different length in windows of the same size.
    ///
    /// # Errors
    /// When the file is empty, or longer than the window, or cannot be mapped.
    pub(in crate::devices::virtio) fn in_window(
        path: &Path,
        file: File,
        window: u64,
        start: GuestAddress,
    ) -> Result<Self, BackendError> {
        let wrong = |why: String| {
            BackendError::unusable(format!("{} cannot be a root filesystem in memory", path.display()), why)
        };
        let length = length(&file).map_err(|error| wrong(error.to_string()))?;
        if !(1..=window).contains(&length) {
            return Err(wrong(format!("it has {length} bytes, and at most {window} fit")));
        }
        let mapping = MappedFile::in_window(&file, length, window, false);
        let mapping = mapping.map_err(|error| wrong(format!("it cannot be mapped: {error}")))?;
        Ok(Self::with_mapping(file, mapping, start))
    }

    /// Makes the device a placeholder, with which a kernel is pre-booted: replaces the file by a memory file of zeroes.
    ///
    /// # Errors
    /// When the host is out of memory.
    pub fn placeholder(mut self) -> io::Result<Self> {
        let file = File::from(rustix::fs::memfd_create("placeholder pmem", rustix::fs::MemfdFlags::CLOEXEC)?);
        file.set_len(self.mapping.size())?;
        self.mapping = Arc::new(MappedFile::new(&file, self.mapping.size(), self.mapping.is_writable())?);
        self.io = FileIo::new(file, 1);
        Ok(self)
    }

    fn serve_queue(&mut self, queues: &mut Queues) -> Result<(), DeviceError> {
        if !self.flushing.is_empty() {
            self.retry(queues);
            return Ok(());
        }
        let result = self.take_chains(queues).and_then(|()| self.flush(queues));
        queues.notify(QUEUE)?;
        result
    }

    /// Pops the available chains. Those that need no flush are completed immediately.
    fn take_chains(&mut self, queues: &mut Queues) -> Result<(), DeviceError> {
        for _ in 0..QUEUE_SIZE {
            let Some(mut chain) = queues.pop(QUEUE)? else {
                if queues.enable_notification(QUEUE)? {
                    continue;
                }
                return Ok(());
            };
            let mut kind = [0; 4];
            chain.read(&mut kind)?;
            let status = chain.split_writable(4)?;
            match u32::from_le_bytes(kind) {
                FLUSH if self.mapping.is_writable() => self.flushing.push((chain, status)),
                FLUSH => finish(chain, status, Status::Ok, queues)?,
                _ => finish(chain, status, Status::IoError, queues)?,
            }
        }
        queues.reschedule();
        Ok(())
    }

    /// Starts a flush for the popped chains.
    fn flush(&mut self, queues: &mut Queues) -> Result<(), DeviceError> {
        let Some(watcher) = self.watcher.as_ref().filter(|_| !self.flushing.is_empty()) else {
            return Ok(());
        };
        let status = match self.io.try_inline(&flush_job()) {
            Some(result) => result.map_or(Status::IoError, |_| Status::Ok),
            None if self.io.submit(0, flush_job(), FILE, watcher).is_ok() => {
                self.retry(queues);
                return Ok(());
            }
            None => Status::IoError,
        };
        self.finish_all(status, queues)
    }

    /// Reschedules the device until the host has memory for the flush.
    fn retry(&mut self, queues: &Queues) {
        if self.io.retry_submit() {
            queues.reschedule();
        }
    }

    fn finish_all(&mut self, status: Status, queues: &mut Queues) -> Result<(), DeviceError> {
        for (chain, status_segment) in self.flushing.drain(..) {
            finish(chain, status_segment, status, queues)?;
        }
        Ok(())
    }

    fn take_finished(&mut self, queues: &mut Queues) -> Result<(), DeviceError> {
        let mut finished: Vec<Completion> = Vec::new();
        self.io.finished(&mut finished);
        for (_, result) in finished {
            self.finish_all(result.map_or(Status::IoError, |_| Status::Ok), queues)?;
        }
        // Chains that have become available during the flush; their doorbell was ignored.
        self.serve_queue(queues)
    }
}

fn finish(
    chain: Chain,
    status_segment: Segment,
    status: Status,
    queues: &mut Queues,
) -> Result<(), DeviceError> {
    fill(status_segment, &(status as u32).to_le_bytes());
    queues.complete(QUEUE, chain, 4)
}

#[expect(unsafe_code, reason = "a job may name guest memory; this one names none")]
fn flush_job() -> Job {
    // SAFETY: there are no segments.
    unsafe { Job::new(Operation::Flush, 0, &[]) }
}

fn unusable(config: &Config, why: String) -> BackendError {
    BackendError::unusable(format!("{} cannot be a pmem device", config.path_on_host.display()), why)
}

impl Attach for Config {
    fn open(&self) -> Result<Backend, BackendError> {
        Ok(Backend::Memory(Pmem::open_file(self)?, Contents::Shown))
    }

    fn open_placeholder(&self) -> Result<Backend, BackendError> {
        Ok(Backend::Memory(Pmem::open_file(self)?, Contents::Zeroes))
    }

    fn create(&self, backend: Backend, memory: GuestAddress) -> Result<Box<dyn Device>, BackendError> {
        match backend {
            Backend::Memory(file, Contents::Shown) => Ok(Box::new(Pmem::new(self, file, memory)?)),
            Backend::Memory(file, Contents::Zeroes) => {
                let device = Pmem::new(self, file, memory)?.placeholder();
                Ok(Box::new(device.map_err(BackendError::host("create a placeholder pmem device"))?))
            }
            other => Err(other.mismatch()),
        }
    }
}

impl Device for Pmem {
    fn kind(&self) -> u32 {
        KIND
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        0
    }

    fn configuration(&self) -> Vec<u8> {
        // struct virtio_pmem_config (section 5.19.4): start and size in bytes.
        [self.start.0, self.mapping.size()].map(u64::to_le_bytes).concat()
    }

    fn memory(&self) -> Option<PlacedFile> {
        Some((self.start, Arc::clone(&self.mapping)))
    }

    fn move_memory(&mut self, (start, mapping): &PlacedFile) -> io::Result<()> {
        if *start != self.start {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        mapping.take_over(&self.mapping)?;
        self.mapping = Arc::clone(mapping);
        Ok(())
    }

    fn prepare(&mut self, watcher: &Watcher, jail: Jail) -> io::Result<()> {
        self.io.prepare(FILE, watcher, jail)
    }

    fn activate(&mut self, _: u64, _: &mut Queues, watcher: &Watcher) -> Result<(), DeviceError> {
        self.watcher = Some(watcher.clone());
        Ok(())
    }

    fn serve(&mut self, event: Event, queues: &mut Queues) -> Result<(), DeviceError> {
        match event {
            Event::Doorbell | Event::Deadline => self.serve_queue(queues),
            Event::Ready(..) => self.take_finished(queues),
        }
    }

    fn reset(&mut self) {
        self.flushing.clear();
    }

    fn is_quiescent(&mut self) -> bool {
        self.io.retry_submit();
        self.io.finished(&mut Vec::new());
        !self.io.is_busy()
    }
}

#[cfg(test)]
mod tests;
