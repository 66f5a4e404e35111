//! Memory balloon device (section 5.5): pages that the guest does without go back to the host.
//!
//! The guest names pages in three ways: those that the balloon takes, those that it gives back, and, where that
//! was asked for, those that just happen to be free. What is named goes back to the host at once; when the guest
//! touches it again, the host gives it a page of zeroes, or of the file that lies there. Nothing is kept about
//! single pages, so a guest that names one twice, or one that it uses, harms nobody but itself.

mod statistics;

pub use statistics::Statistics;

use super::{Broken, Chain, Device, Event, Queues, Watcher};
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
/// The token of [`Control`] among this device's events.
const CONTROL: u32 = 0;
/// Pages of the balloon in a MiB: they are of 4 KiB whatever the guest's are (section 5.5.6).
const PAGES_PER_MIB: u64 = MIB / PAGE_SIZE;

/// Place of the number of pages that the driver has in the configuration space.
const ACTUAL: usize = 4;

/// Feature bits (section 5.5.3).
mod feature {
    pub(super) const STATS_VQ: u64 = 1 << 1;
    pub(super) const DEFLATE_ON_OOM: u64 = 1 << 2;
    pub(super) const PAGE_REPORTING: u64 = 1 << 5;
}

/// Pages that a chain may name; Linux names 256. What goes beyond stays where it is.
const PAGES_MAX: usize = 1024;
/// Pages after which others have their turn: as many calls of the host, if no two pages are neighbours, each of some
/// microseconds.
const PAGES_PER_TURN: usize = 1024;
/// Bytes of free pages after which others have their turn, and that a chain may name; Linux names as many at most
/// (PAGE_REPORTING_CAPACITY of include/linux/page_reporting.h blocks of 4 MiB).
const REPORTED_MAX: usize = 128 << 20;

/// What others may ask of the balloon while the guest runs.
#[derive(Clone, Debug)]
pub struct Control(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// Pages that the balloon is to have.
    target: AtomicU32,
    /// Pages that the guest says it has.
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
    /// Lets the guest give up this many MiB altogether, or take back what goes beyond.
    pub fn set_amount(&self, mib: u64) {
        self.0.target.store(pages(mib), Ordering::Release);
        // A counter that is full is readable, which is all that is wanted.
        let _ = self.0.changed.write(1);
    }

    /// MiB that the balloon is to have.
    #[must_use]
    pub fn amount(&self) -> u64 {
        u64::from(self.0.target.load(Ordering::Acquire)) / PAGES_PER_MIB
    }

    /// MiB that it has, if the guest tells the truth.
    #[must_use]
    pub fn actual(&self) -> u64 {
        u64::from(self.0.actual.load(Ordering::Acquire)) / PAGES_PER_MIB
    }

    /// What the guest said of its memory last; nothing where the polling interval is 0.
    #[must_use]
    pub fn statistics(&self) -> Statistics {
        *self.0.statistics()
    }
}

/// Pages of so many MiB.
fn pages(mib: u64) -> u32 {
    u32::try_from(mib.saturating_mul(PAGES_PER_MIB)).unwrap_or(u32::MAX)
}

/// The queues behind the first two. Drivers leave no gap for one that they do not use (`vm_find_vqs` in
/// drivers/virtio/virtio_mmio.c), so that their numbers follow from the features.
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

/// A balloon.
#[derive(Debug)]
pub struct Balloon {
    shared: Arc<Shared>,
    features: u64,
    /// Nanoseconds between two statistics.
    interval: u64,
    queues: OptionalQueues,
    /// When the guest is asked for statistics again; the chain for it waits in its queue.
    ask_at: Option<Instant>,
    watcher: Option<Watcher>,
    /// Pages of a chain.
    named: Vec<u32>,
}

impl Balloon {
    /// A balloon of the size that was asked for, which a guest has yet to fill.
    ///
    /// # Errors
    /// When the host has no descriptor left.
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

    /// The same with nothing in it, for a kernel that is booted once for many guests.
    #[must_use]
    pub fn blank(self) -> Self {
        self.shared.target.store(0, Ordering::Release);
        self
    }

    /// What others change it with.
    #[must_use]
    pub fn control(&self) -> Control {
        Control(Arc::clone(&self.shared))
    }

    fn serve_queues(&mut self, queues: &mut Queues) -> Result<(), Broken> {
        self.inflate(queues)?;
        deflate(queues)?;
        if let Some(queue) = self.queues.reporting {
            take_reports(queue, queues)?;
        }
        self.read_statistics(queues)
    }

    /// Gives the pages of the balloon to the host.
    fn inflate(&mut self, queues: &mut Queues) -> Result<(), Broken> {
        let mut count = 0;
        let result = serve_chains(INFLATE, queues, |mut chain, queues| {
            self.read_pages(&mut chain)?;
            // All that were named: one that is named twice is read and sorted twice.
            count += self.named.len();
            self.give_back(queues);
            queues.complete(INFLATE, chain, 0)?;
            Ok(count < PAGES_PER_TURN)
        });
        queues.notify(INFLATE)?;
        result
    }

    /// Reads the numbers of the pages that a chain names.
    fn read_pages(&mut self, chain: &mut Chain) -> Result<(), Broken> {
        self.named.clear();
        let count = usize::try_from(chain.readable_len() / 4).unwrap_or(PAGES_MAX).min(PAGES_MAX);
        let mut number = [0; 4];
        for _ in 0..count {
            chain.read(&mut number)?;
            self.named.push(u32::from_le_bytes(number));
        }
        Ok(())
    }

    /// Gives back the pages that were read, those that follow each other in one piece. Numbers of no memory are
    /// passed over.
    fn give_back(&mut self, queues: &Queues) {
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
                segment.give_back();
            }
        }
    }

    /// Reads statistics and leaves the chain where it is: its return is what asks for the next.
    fn read_statistics(&mut self, queues: &mut Queues) -> Result<(), Broken> {
        let Some(queue) = self.queues.statistics.filter(|_| self.ask_at.is_none()) else { return Ok(()) };
        let Some(mut chain) = next(queue, queues)? else { return Ok(()) };
        self.shared.statistics().update(&mut chain)?;
        queues.put_back(queue, chain);
        self.ask_at = Some(Instant(Instant::now().0.saturating_add(self.interval)));
        Ok(())
    }

    fn ask_for_statistics(&mut self, queues: &mut Queues) -> Result<(), Broken> {
        self.ask_at = None;
        let Some(queue) = self.queues.statistics else { return Ok(()) };
        if let Some(chain) = queues.pop(queue)? {
            queues.complete(queue, chain, 0)?;
            queues.notify(queue)?;
        }
        self.read_statistics(queues)
    }
}

/// The next chain of a queue. Where there is none, the driver is asked to ring for the next.
fn next(queue: usize, queues: &mut Queues) -> Result<Option<Chain>, Broken> {
    if let Some(chain) = queues.pop(queue)? {
        return Ok(Some(chain));
    }
    if queues.rearm(queue)? { queues.pop(queue) } else { Ok(None) }
}

/// Serves chains until there is none, or `serve` says that others are to have their turn.
fn serve_chains(
    queue: usize,
    queues: &mut Queues,
    mut serve: impl FnMut(Chain, &mut Queues) -> Result<bool, Broken>,
) -> Result<(), Broken> {
    for _ in 0..QUEUE_SIZE {
        let Some(chain) = next(queue, queues)? else { return Ok(()) };
        if !serve(chain, queues)? {
            break;
        }
    }
    queues.yield_turn();
    Ok(())
}

/// The guest takes pages back: the host gives it new ones when they are touched.
fn deflate(queues: &mut Queues) -> Result<(), Broken> {
    let result = serve_chains(DEFLATE, queues, |chain, queues| {
        queues.complete(DEFLATE, chain, 0)?;
        Ok(true)
    });
    queues.notify(DEFLATE)?;
    result
}

/// Gives the host the ranges that the guest does not use, which are the places of a chain (section 5.5.6.7).
fn take_reports(queue: usize, queues: &mut Queues) -> Result<(), Broken> {
    let mut reported = 0;
    let result = serve_chains(queue, queues, |chain, queues| {
        let mut left = REPORTED_MAX;
        for segment in chain.writable() {
            if segment.len() > left {
                break;
            }
            left -= segment.len();
            segment.give_back();
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
        // struct virtio_balloon_config (section 5.5.4): the target and what the driver has; a command and a
        // pattern that belong to features which are not offered.
        let [target, actual] =
            [&self.shared.target, &self.shared.actual].map(|pages| pages.load(Ordering::Acquire));
        [target, actual, 0, 0].map(u32::to_le_bytes).concat()
    }

    fn identity(&self) -> Vec<u8> {
        // Both numbers change while a driver works.
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

    fn activate(&mut self, features: u64, _: &mut Queues, watcher: &Watcher) -> Result<(), Broken> {
        self.queues = OptionalQueues::of(features);
        let changed = crate::poll::borrow(&self.shared.changed);
        watcher
            .add(changed, CONTROL, EventFlags::IN)
            .map_err(|error| Broken::because(format!("the balloon's size cannot be watched: {error}")))?;
        self.watcher = Some(watcher.clone());
        Ok(())
    }

    fn serve(&mut self, event: Event, queues: &mut Queues) -> Result<(), Broken> {
        match event {
            Event::Doorbell => self.serve_queues(queues),
            Event::Ready(..) => {
                // The counter only has to be reset.
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
        // All pages are the guest's again.
        self.shared.actual.store(0, Ordering::Release);
    }
}

#[cfg(test)]
mod tests;
