//! Persistent memory device (section 5.19): a file of the host as memory of the guest, behind its RAM.
//!
//! The guest reads and writes the file without this device; guests that share a file share its pages in the
//! host's memory. The device only says where the file is, and flushes it.

use super::block::file::{ForeignLock, length, open_file};
use super::file_io::{Done, FileIo, Job, Operation};
use super::queue::fill;
use super::{Broken, Chain, Device, Event, Queues, Segment, Watcher};
use crate::config::ConfigError;
use crate::config::devices::Pmem as Config;
use crate::layout::{HUGE_PAGE_SIZE, MIB};
use crate::memory::MappedFile;
use std::fs::File;
use std::io;
use std::sync::Arc;
use vm_memory::GuestAddress;

const KIND: u32 = 27;
const QUEUE: usize = 0;
const QUEUE_SIZE: u16 = 64;
/// The token of [`FileIo`] among this device's events.
const FILE: u32 = 0;
/// The one kind of request (section 5.19.6).
const FLUSH: u32 = 0;

/// How a request ended (section 5.19.6); Linux passes on what is not zero as an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
enum Status {
    Ok = 0,
    IoError = 1,
}

/// A file as memory.
#[derive(Debug)]
pub struct Pmem {
    io: FileIo,
    mapping: Arc<MappedFile>,
    /// Where the guest has it.
    start: GuestAddress,
    /// Chains that wait for the flush that is under way. Others stay in the queue meanwhile: one flush serves all
    /// that have come before it.
    flushing: Vec<(Chain, Segment)>,
    watcher: Option<Watcher>,
}

impl Pmem {
    /// Opens the file of a device and maps it, for a guest that has it from `start` on.
    ///
    /// # Errors
    /// When it is missing, in use, empty, or nothing that can be memory.
    pub fn open(config: &Config, start: GuestAddress) -> Result<Self, ConfigError> {
        Self::new(config, Self::open_file(config)?, start)
    }

    /// Opens the file of a device.
    ///
    /// # Errors
    /// When it is missing, in use, or nothing that can be memory.
    pub(crate) fn open_file(config: &Config) -> Result<File, ConfigError> {
        let wrong = |what: String| ConfigError::PmemFile { path: config.path_on_host.clone(), what };
        open_file(&config.path_on_host, config.read_only, false, ForeignLock::InUse).map_err(wrong)
    }

    /// Maps an open file.
    ///
    /// # Errors
    /// When it is empty, or cannot be mapped.
    pub(crate) fn new(config: &Config, file: File, start: GuestAddress) -> Result<Self, ConfigError> {
        let wrong = |what: String| ConfigError::PmemFile { path: config.path_on_host.clone(), what };
        let length = length(&file).map_err(|error| wrong(error.to_string()))?;
        if length == 0 {
            return Err(wrong("it is empty".into()));
        }
        if !config.read_only && !length.is_multiple_of(HUGE_PAGE_SIZE) {
            // What a guest wrote behind the file's end would be lost.
            let mib = length.next_multiple_of(HUGE_PAGE_SIZE) / MIB;
            return Err(wrong(format!(
                "its {length} bytes are not a multiple of 2 MiB; truncate -s {mib}M makes it so, and :ro, or \
                 read_only, takes it as it is"
            )));
        }
        let mapping = MappedFile::new(&file, length, !config.read_only);
        let mapping = mapping.map_err(|error| wrong(format!("it cannot be mapped: {error}")))?;
        Ok(Self {
            io: FileIo::new(file, 1),
            mapping: Arc::new(mapping),
            start,
            flushing: Vec::new(),
            watcher: None,
        })
    }

    /// The same with nothing but zeroes, for a kernel that is booted once for many files.
    ///
    /// # Errors
    /// When the host has no memory left.
    pub fn blank(mut self) -> io::Result<Self> {
        let file = File::from(rustix::fs::memfd_create("blank memory", rustix::fs::MemfdFlags::CLOEXEC)?);
        file.set_len(self.mapping.size())?;
        self.mapping = Arc::new(MappedFile::new(&file, self.mapping.size(), self.mapping.is_writable())?);
        self.io = FileIo::new(file, 1);
        Ok(self)
    }

    /// Where the guest has the file, and the file.
    #[must_use]
    pub fn memory(&self) -> (GuestAddress, Arc<MappedFile>) {
        (self.start, Arc::clone(&self.mapping))
    }

    fn serve_queue(&mut self, queues: &mut Queues) -> Result<(), Broken> {
        if !self.flushing.is_empty() {
            self.retry(queues);
            return Ok(());
        }
        let result = self.take_chains(queues).and_then(|()| self.flush(queues));
        queues.notify(QUEUE)?;
        result
    }

    /// Takes the chains that there are; those that want no flush are answered.
    fn take_chains(&mut self, queues: &mut Queues) -> Result<(), Broken> {
        for _ in 0..QUEUE_SIZE {
            let Some(mut chain) = queues.pop(QUEUE)? else {
                if queues.rearm(QUEUE)? {
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
        queues.yield_turn();
        Ok(())
    }

    /// Starts the flush that the chains wait for.
    fn flush(&mut self, queues: &mut Queues) -> Result<(), Broken> {
        let Some(watcher) = self.watcher.as_ref().filter(|_| !self.flushing.is_empty()) else {
            return Ok(());
        };
        let status = match self.io.attempt(&flush_job()) {
            Some(result) => result.map_or(Status::IoError, |_| Status::Ok),
            None if self.io.submit(0, flush_job(), FILE, watcher).is_ok() => {
                self.retry(queues);
                return Ok(());
            }
            None => Status::IoError,
        };
        self.finish_all(status, queues)
    }

    /// Comes back as long as the host has no memory for the flush.
    fn retry(&mut self, queues: &Queues) {
        if self.io.is_held_up() {
            queues.yield_turn();
        }
    }

    fn finish_all(&mut self, status: Status, queues: &mut Queues) -> Result<(), Broken> {
        for (chain, place) in self.flushing.drain(..) {
            finish(chain, place, status, queues)?;
        }
        Ok(())
    }

    fn take_finished(&mut self, queues: &mut Queues) -> Result<(), Broken> {
        let mut finished: Vec<Done> = Vec::new();
        self.io.finished(&mut finished);
        for (_, result) in finished {
            self.finish_all(result.map_or(Status::IoError, |_| Status::Ok), queues)?;
        }
        // Others have come meanwhile, of which the doorbell said nothing that was heeded.
        self.serve_queue(queues)
    }
}

fn finish(chain: Chain, place: Segment, status: Status, queues: &mut Queues) -> Result<(), Broken> {
    fill(place, &(status as u32).to_le_bytes());
    queues.complete(QUEUE, chain, 4)
}

#[expect(unsafe_code, reason = "a job may name guest memory; this one names none")]
fn flush_job() -> Job {
    // SAFETY: there are no segments.
    unsafe { Job::new(Operation::Flush, 0, &[]) }
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

    fn activate(&mut self, _: u64, _: &mut Queues, watcher: &Watcher) -> Result<(), Broken> {
        self.watcher = Some(watcher.clone());
        Ok(())
    }

    fn serve(&mut self, event: Event, queues: &mut Queues) -> Result<(), Broken> {
        match event {
            Event::Doorbell | Event::Deadline => self.serve_queue(queues),
            Event::Ready(..) => self.take_finished(queues),
        }
    }

    fn reset(&mut self) {
        self.flushing.clear();
    }

    fn is_at_rest(&mut self) -> bool {
        self.io.is_held_up();
        self.io.finished(&mut Vec::new());
        !self.io.is_busy()
    }
}

#[cfg(test)]
mod tests;
