//! Memory balloon device (section 5.5): the guest returns unused pages to the host.
//!
//! The guest names pages in three queues: pages that inflate the balloon, pages that deflate it, and, if free page
//! reporting is enabled, free pages. Inflated and free pages are discarded immediately; the next access by the guest
//! gets a zero page, or the page of the file that is mapped there. The device keeps no state per page: a guest that
//! names a page twice, or a page that it uses, harms only itself.

mod statistics;

pub use statistics::Statistics;

use super::backend::{Attach, Backend};
use super::{BackendError, Chain, Device, DeviceError, Event, Queues, Watcher};
use crate::config::devices::Balloon as Config;
use crate::layout::{MIB, PAGE_SIZE};
use crate::timeline::Instant;
use rustix::event::epoll::EventFlags;
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

const KIND: u32 = 5;
const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const QUEUE_SIZE: u16 = 128;
/// The token of [`Control`] among the device's events.
const CONTROL: u32 = 0;
/// Balloon pages per MiB: they have 4 KiB regardless of the guest's page size (section 5.5.6).
const PAGES_PER_MIB: u64 = MIB / PAGE_SIZE;

/// Offset of `actual` in the configuration space.
const ACTUAL: usize = 4;

/// Feature bits (section 5.5.3).
mod feature {
    pub(super) const STATS_VQ: u64 = 1 << 1;
    pub(super) const DEFLATE_ON_OOM: u64 = 1 << 2;
    pub(super) const PAGE_REPORTING: u64 = 1 << 5;
}

/// Maximum number of pages per chain; Linux names 256. Further pages are ignored.
const PAGES_MAX: usize = 1024;
/// Number of pages after which a call ends: without adjacent pages this is the number of madvise(2) calls, each of
/// which takes a few microseconds.
const BUDGET_PAGES: usize = 1024;
/// Bytes of free pages after which a call ends, and the maximum per chain. It is the maximum of Linux
/// (PAGE_REPORTING_CAPACITY of include/linux/page_reporting.h blocks of 4 MiB).
const REPORTED_MAX: usize = 128 << 20;

/// A handle that controls the balloon while the guest runs.
#[derive(Clone, Debug)]
pub struct Control(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// Target size of the balloon in pages.
    target: AtomicU32,
    /// Size of the balloon in pages as reported by the guest.
    actual: AtomicU32,
    statistics: Mutex<Statistics>,
    changed: EventFd,
}

impl Shared {
    fn statistics(&self) -> MutexGuard<'_, Statistics> {
        self.statistics.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Control {
    /// Sets the target size of the balloon in MiB. The guest inflates or deflates the balloon accordingly.
    pub fn set_amount(&self, mib: u64) {
        self.0.target.store(pages(mib), Ordering::Release);
        // A write fails only when the counter overflows, in which case the eventfd is readable already.
        let _ = self.0.changed.write(1);
    }

    /// The target size of the balloon in MiB.
    #[must_use]
    pub fn amount(&self) -> u64 {
        u64::from(self.0.target.load(Ordering::Acquire)) / PAGES_PER_MIB
    }

    /// The size of the balloon in MiB as reported by the guest, rounded down.
    #[must_use]
    pub fn actual(&self) -> u64 {
        u64::from(self.0.actual.load(Ordering::Acquire)) / PAGES_PER_MIB
    }

    /// The latest statistics of the guest; all fields are `None` when the polling interval is 0.
    #[must_use]
    pub fn statistics(&self) -> Statistics {
        *self.0.statistics()
    }
}

/// Converts MiB to balloon pages.
fn pages(mib: u64) -> u32 {
    u32::try_from(mib.saturating_mul(PAGES_PER_MIB)).unwrap_or(u32::MAX)
}

/// The optional queues. Drivers number queues without gaps for unused ones (`vm_find_vqs` in
/// drivers/virtio/virtio_mmio.c), so that their numbers depend on the features.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct OptionalQueues {
    statistics: Option<usize>,
    reporting: Option<usize>,
}

impl OptionalQueues {
    const fn of(features: u64) -> Self {
        let mut next = DEFLATE + 1;
        let mut queues = Self { statistics: None, reporting: None };
        if features & feature::STATS_VQ != 0 {
            queues.statistics = Some(next);
            next += 1;
        }
        if features & feature::PAGE_REPORTING != 0 {
            queues.reporting = Some(next);
        }
        queues
    }
}

/// A virtio balloon device.
#[derive(Debug)]
pub struct Balloon {
    shared: Arc<Shared>,
    features: u64,
    /// Nanoseconds between two statistics; 0 when statistics are disabled.
    interval: u64,
    queues: OptionalQueues,
    /// Time of the next request for statistics, whose chain waits in the queue; `None` when no chain waits.
    ask_at: Option<Instant>,
    watcher: Option<Watcher>,
    /// Page numbers of the current chain.
    named: Vec<u32>,
}

impl Balloon {
    /// Creates a balloon with the configured target size. It is empty until the guest inflates it.
    ///
    /// # Errors
    /// When the process has no file descriptor left.
    pub fn new(config: &Config) -> io::Result<Self> {
        let mut features = 0;
        for (wanted, bit) in [
            (config.stats_polling_interval_s > 0, feature::STATS_VQ),
            (config.deflate_on_oom, feature::DEFLATE_ON_OOM),
            (config.free_page_reporting, feature::PAGE_REPORTING),
        ] {
            features |= if wanted { bit } else { 0 };
        }
        let shared = Shared {
            target: AtomicU32::new(pages(config.amount_mib)),
            actual: AtomicU32::new(0),
            statistics: Mutex::default(),
            changed: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
        };
        Ok(Self {
            shared: Arc::new(shared),
            features,
            interval: u64::from(config.stats_polling_interval_s) * 1_000_000_000,
            queues: OptionalQueues::default(),
            ask_at: None,
            watcher: None,
            named: Vec::new(),
        })
    }

    /// Makes the device a placeholder, with which a kernel is pre-booted: sets the target size to 0.
    #[must_use]
    pub fn placeholder(self) -> Self {
        self.shared.target.store(0, Ordering::Release);
        self
    }

    fn serve_queues(&mut self, queues: &mut Queues) -> Result<(), DeviceError> {
        self.inflate(queues)?;
        deflate(queues)?;
        if let Some(queue) = self.queues.reporting {
            take_reports(queue, queues)?;
        }
        self.read_statistics(queues)
    }

    /// Discards the pages that inflate the balloon.
    fn inflate(&mut self, queues: &mut Queues) -> Result<(), DeviceError> {
        let mut count = 0;
        let result = serve_chains(INFLATE, queues, |mut chain, queues| {
            self.read_pages(&mut chain)?;
            // Includes pages that are named twice, because they are read and sorted twice.
            count += self.named.len();
            self.discard(queues);
            queues.complete(INFLATE, chain, 0)?;
            Ok(count < BUDGET_PAGES)
        });
        queues.notify(INFLATE)?;
        result
    }

    /// Reads the page numbers of a chain.
    fn read_pages(&mut self, chain: &mut Chain) -> Result<(), DeviceError> {
        self.named.clear();
        let count = usize::try_from(chain.readable_len() / 4).unwrap_or(PAGES_MAX).min(PAGES_MAX);
        let mut number = [0; 4];
        for _ in 0..count {
            chain.read(&mut number)?;
            self.named.push(u32::from_le_bytes(number));
        }
        Ok(())
    }

    /// Discards the pages that were read, with one call per contiguous range. Numbers beyond RAM are ignored.
    fn discard(&mut self, queues: &Queues) {
        let memory = queues.memory();
        let page = |number: u64, count: u64| {
            let length = usize::try_from(count * PAGE_SIZE).ok()?;
            memory.range(GuestAddress(number * PAGE_SIZE), length)
        };
        self.named.retain(|number| page(u64::from(*number), 1).is_some());
        self.named.sort_unstable();
        self.named.dedup();
        for run in self.named.chunk_by(|a, b| a.checked_add(1) == Some(*b)) {
            if let Some(segment) = page(u64::from(run[0]), run.len() as u64) {
                segment.discard();
            }
        }
    }

    /// Reads statistics, and leaves the chain in the queue: its completion requests the next statistics.
    fn read_statistics(&mut self, queues: &mut Queues) -> Result<(), DeviceError> {
        let Some(queue) = self.queues.statistics.filter(|_| self.ask_at.is_none()) else { return Ok(()) };
        let Some(mut chain) = next(queue, queues)? else { return Ok(()) };
        self.shared.statistics().update(&mut chain)?;
        queues.undo_pop(queue, chain);
        self.ask_at = Some(Instant(Instant::now().0.saturating_add(self.interval)));
        Ok(())
    }

    fn ask_for_statistics(&mut self, queues: &mut Queues) -> Result<(), DeviceError> {
        self.ask_at = None;
        let Some(queue) = self.queues.statistics else { return Ok(()) };
        if let Some(chain) = queues.pop(queue)? {
            queues.complete(queue, chain, 0)?;
            queues.notify(queue)?;
        }
        self.read_statistics(queues)
    }
}

impl Attach for Config {
    fn open(&self) -> Result<Backend, BackendError> {
        Ok(Backend::Host)
    }

    fn create(&self, backend: Backend, _: GuestAddress) -> Result<Box<dyn Device>, BackendError> {
        let device = Balloon::new(self).map_err(BackendError::host("create an eventfd"))?;
        match backend {
            Backend::Host => Ok(Box::new(device)),
            Backend::Nothing => Ok(Box::new(device.placeholder())),
            other => Err(other.mismatch()),
        }
    }
}

/// Pops the next chain; without one, enables notifications.
fn next(queue: usize, queues: &mut Queues) -> Result<Option<Chain>, DeviceError> {
    if let Some(chain) = queues.pop(queue)? {
        return Ok(Some(chain));
    }
    if queues.enable_notification(queue)? { queues.pop(queue) } else { Ok(None) }
}

/// Serves chains until the queue is empty or `serve` returns `false`, which ends the call so that other devices are
/// served.
fn serve_chains(
    queue: usize,
    queues: &mut Queues,
    mut serve: impl FnMut(Chain, &mut Queues) -> Result<bool, DeviceError>,
) -> Result<(), DeviceError> {
    for _ in 0..QUEUE_SIZE {
        let Some(chain) = next(queue, queues)? else { return Ok(()) };
        if !serve(chain, queues)? {
            break;
        }
    }
    queues.reschedule();
    Ok(())
}

/// Completes the chains of deflated pages. The guest gets new pages when it accesses them.
fn deflate(queues: &mut Queues) -> Result<(), DeviceError> {
    let result = serve_chains(DEFLATE, queues, |chain, queues| {
        queues.complete(DEFLATE, chain, 0)?;
        Ok(true)
    });
    queues.notify(DEFLATE)?;
    result
}

/// Discards free pages, which are the writable segments of a chain (section 5.5.6.7).
fn take_reports(queue: usize, queues: &mut Queues) -> Result<(), DeviceError> {
    let mut reported = 0;
    let result = serve_chains(queue, queues, |chain, queues| {
        let mut left = REPORTED_MAX;
        for segment in chain.writable() {
            if segment.len() > left {
                break;
            }
            left -= segment.len();
            segment.discard();
        }
        reported += REPORTED_MAX - left;
        queues.complete(queue, chain, 0)?;
        Ok(reported < REPORTED_MAX)
    });
    queues.notify(queue)?;
    result
}

impl Device for Balloon {
    fn kind(&self) -> u32 {
        KIND
    }

    fn queue_sizes(&self) -> &'static [u16] {
        const QUEUES: [u16; 4] = [QUEUE_SIZE; 4];
        let optional = self.features & (feature::STATS_VQ | feature::PAGE_REPORTING);
        match optional.count_ones() {
            0 => QUEUES.split_at(2).0,
            1 => QUEUES.split_at(3).0,
            _ => &QUEUES,
        }
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn configuration(&self) -> Vec<u8> {
        // struct virtio_balloon_config (section 5.5.4): num_pages, actual, free_page_hint_cmd_id and poison_val. The
        // features of the last two are not offered.
        let [target, actual] =
            [&self.shared.target, &self.shared.actual].map(|pages| pages.load(Ordering::Acquire));
        [target, actual, 0, 0].map(u32::to_le_bytes).concat()
    }

    fn static_configuration(&self) -> Vec<u8> {
        // Both numbers change while a driver is active.
        Vec::new()
    }

    fn restore_configuration(&mut self, seen: &[u8]) {
        if let Some(actual) = seen.get(ACTUAL..ACTUAL + 4) {
            self.write_configuration(ACTUAL, actual);
        }
    }

    fn write_configuration(&mut self, offset: usize, data: &[u8]) {
        if let (ACTUAL, Ok(data)) = (offset, data.try_into()) {
            self.shared.actual.store(u32::from_le_bytes(data), Ordering::Release);
        }
    }

    fn balloon(&self) -> Option<Control> {
        Some(Control(Arc::clone(&self.shared)))
    }

    fn activate(&mut self, features: u64, _: &mut Queues, watcher: &Watcher) -> Result<(), DeviceError> {
        self.queues = OptionalQueues::of(features);
        let changed = crate::poll::borrow(&self.shared.changed);
        watcher
            .add(changed, CONTROL, EventFlags::IN)
            .map_err(|error| DeviceError::new(format!("the balloon's size cannot be watched: {error}")))?;
        self.watcher = Some(watcher.clone());
        Ok(())
    }

    fn serve(&mut self, event: Event, queues: &mut Queues) -> Result<(), DeviceError> {
        match event {
            Event::Doorbell => self.serve_queues(queues),
            Event::Ready(..) => {
                // The read only resets the counter.
                let _ = self.shared.changed.read();
                queues.set_configuration(&self.configuration());
                Ok(())
            }
            Event::Deadline => self.ask_for_statistics(queues),
        }
    }

    fn deadline(&self) -> Option<Instant> {
        self.ask_at
    }

    fn reset(&mut self) {
        if let Some(watcher) = self.watcher.take() {
            watcher.remove(crate::poll::borrow(&self.shared.changed));
        }
        self.queues = OptionalQueues::default();
        self.ask_at = None;
        // The balloon is empty after a reset.
        self.shared.actual.store(0, Ordering::Release);
    }
}

#[cfg(test)]
mod tests;
