//! The rings of a queue (section 2.7). Their host addresses are looked up once, when the driver sets DRIVER_OK.
//!
//! `virtio-queue` validates the driver's settings, and translates the guest address on each access. For a request of 4
//! KiB that took as long as reading the data. The guest may change everything that is read here concurrently, so that
//! each value is read once.
#![expect(unsafe_code, reason = "reads and writes rings in guest memory")]

use super::Segment;
use crate::memory::GuestMemory;
use std::sync::atomic::{AtomicU16, Ordering, fence};
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

/// Descriptor flags (section 2.7.5).
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// Bytes of a descriptor.
const DESCRIPTOR: usize = 16;
/// The same, in the type of the length of an indirect table.
const DESCRIPTOR_LEN: u32 = 16;
/// Flag of the available ring: the driver does not need an interrupt (section 2.7.6).
const NO_INTERRUPT: u16 = 1;

/// The host addresses of guest memory.
#[derive(Clone, Debug)]
pub(super) struct View {
    ram: Vec<Region>,
    memory: GuestMemory,
}

#[derive(Clone, Copy, Debug)]
struct Region {
    start: u64,
    length: u64,
    host: *mut u8,
}

// SAFETY: a region is two numbers and an address; code that dereferences it guarantees that the memory is mapped.
unsafe impl Send for Region {}

impl View {
    pub(super) fn new(memory: &GuestMemory) -> Self {
        let region = |region: &vm_memory::GuestRegionMmap| Region {
            start: region.start_addr().0,
            length: region.len(),
            host: region.as_ptr(),
        };
        Self { ram: memory.inner().iter().map(region).collect(), memory: memory.clone() }
    }

    /// The host address of a guest-physical range; `None` if a part of it is not guest RAM.
    fn find(&self, address: u64, length: u64) -> Option<*mut u8> {
        self.ram.iter().find_map(|region| {
            let offset = address.checked_sub(region.start)?;
            let fits = offset <= region.length && length <= region.length - offset;
            fits.then(|| region.host.wrapping_add(usize::try_from(offset).unwrap_or(usize::MAX)))
        })
    }
}

/// The rings of one enabled queue.
#[derive(Debug)]
pub(super) struct Ring {
    size: u16,
    has_event_index: bool,
    descriptors: *const u8,
    available: *const u8,
    used: *mut u8,
    /// Index of the next chain in the available ring.
    pub(super) next_available: u16,
    /// Index of the next chain in the used ring.
    pub(super) next_used: u16,
    /// The value of `next_used` at the last decision about an interrupt.
    signalled_used: u16,
}

// SAFETY: rings are guest memory, which is not bound to a thread.
unsafe impl Send for Ring {}

impl Ring {
    /// Looks up the rings of a queue that the driver has set up; `None` when they are not in guest memory.
    pub(super) fn new(queue: &Queue, view: &View) -> Option<Self> {
        let size = u64::from(queue.size());
        // The lengths include the event index at the end of each ring (`used_event` and `avail_event`).
        Some(Self {
            size: queue.size(),
            has_event_index: queue.event_idx_enabled(),
            descriptors: view.find(queue.desc_table(), size * DESCRIPTOR as u64)?,
            available: view.find(queue.avail_ring(), 6 + size * 2)?,
            used: view.find(queue.used_ring(), 6 + size * 8)?,
            next_available: queue.next_avail(),
            next_used: queue.next_used(),
            signalled_used: queue.next_used(),
        })
    }

    /// The field of the available ring at this offset in bytes.
    const fn available(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: the ring was found in guest memory, which stays mapped as long as the queues, in the length of all
        // offsets used here. The queue accepts only addresses that are multiples of two, and the mapping is
        // page-aligned.
        unsafe { AtomicU16::from_ptr(self.available.wrapping_add(offset).cast_mut().cast()) }
    }

    const fn used(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: as above; addresses of used rings are multiples of four.
        unsafe { AtomicU16::from_ptr(self.used.wrapping_add(offset).cast()) }
    }

    fn slot(&self, index: u16) -> usize {
        // Sizes are powers of two.
        usize::from(index & (self.size - 1))
    }

    /// Number of chains that were popped and not completed.
    pub(super) const fn in_flight(&self) -> u16 {
        self.next_available.wrapping_sub(self.next_used)
    }

    /// Takes the next chain from the available ring; returns the index of its first descriptor.
    ///
    /// # Errors
    /// When the available index exceeds the chains that can be available.
    pub(super) fn next(&mut self) -> Result<Option<u16>, String> {
        let end = u16::from_le(self.available(2).load(Ordering::Acquire));
        if end == self.next_available {
            return Ok(None);
        }
        // The index only increases (section 2.7.13.3). Relative to the device's own index, an index that went back is
        // far ahead. If accepted, it would make the device process the whole ring again and again. Each chain in flight
        // occupies a descriptor, so that the device never holds more chains than the size of the queue.
        let (new, in_flight) = (end.wrapping_sub(self.next_available), self.in_flight());
        if new > self.size.saturating_sub(in_flight) {
            return Err(format!("{new} chains are available and {in_flight} in flight, more than its size"));
        }
        let entry = self.available(4 + 2 * self.slot(self.next_available));
        let head = u16::from_le(entry.load(Ordering::Relaxed));
        self.next_available = self.next_available.wrapping_add(1);
        Ok(Some(head))
    }

    /// Collects the segments of a chain; returns the number of readable segments.
    ///
    /// # Errors
    /// The reason why the chain is invalid.
    pub(super) fn walk(
        &self,
        head: u16,
        view: &View,
        segments: &mut Vec<Segment>,
    ) -> Result<usize, &'static str> {
        let (mut table, mut length, mut index) = (self.descriptors, u32::from(self.size), u32::from(head));
        let (mut is_indirect, mut left, mut pieces, mut bytes) = (false, length, 0, 0_u32);
        let mut readable = None;
        loop {
            if index >= length || left == 0 {
                return Err("does not end");
            }
            left -= 1;
            let descriptor = Descriptor::read(table.wrapping_add(index as usize * DESCRIPTOR));
            if descriptor.flags & INDIRECT != 0 {
                let count = descriptor.length / DESCRIPTOR_LEN;
                let is_table = !is_indirect
                    && descriptor.length.is_multiple_of(DESCRIPTOR_LEN)
                    && count <= u32::from(u16::MAX);
                let slot = view.find(descriptor.address, descriptor.length.into()).filter(|_| is_table);
                table = slot.ok_or("does not end")?;
                (length, index, left, is_indirect) = (count, 0, count, true);
                continue;
            }
            match (descriptor.flags & WRITE != 0, readable) {
                (true, None) => readable = Some(segments.len()),
                (false, Some(_)) => return Err("has a readable descriptor after a writable one"),
                _ => {}
            }
            if pieces == self.size {
                return Err("is longer than its queue");
            }
            pieces += 1;
            // A descriptor of zero bytes is ignored, wherever it points.
            if descriptor.length > 0 {
                bytes = bytes.checked_add(descriptor.length).ok_or("is longer than 4 GiB")?;
                segments.push(descriptor.segment(view).ok_or("is not in guest memory")?);
            }
            if descriptor.flags & NEXT == 0 {
                return Ok(readable.unwrap_or(segments.len()));
            }
            index = descriptor.next.into();
        }
    }

    /// Adds a chain to the used ring. The driver sees it after the next [`Self::publish`].
    pub(super) fn complete(&mut self, head: u16, written: u32) {
        let [a, b] = head.to_le_bytes();
        let [c, d, e, f] = written.to_le_bytes();
        let element = self.used.wrapping_add(4 + 8 * self.slot(self.next_used)).cast::<[u8; 8]>();
        // SAFETY: the ring was found in guest memory, with as many elements as its size.
        unsafe { element.write_volatile([a, b, 0, 0, c, d, e, f]) };
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Publishes all completed chains to the driver.
    pub(super) fn publish(&self) {
        self.used(2).store(self.next_used.to_le(), Ordering::Release);
    }

    /// Whether the driver needs an interrupt for the chains that were completed since the last call.
    pub(super) fn needs_notification(&mut self) -> bool {
        let new = self.next_used.wrapping_sub(self.signalled_used);
        self.signalled_used = self.next_used;
        // The used index must be visible to the driver before the driver's flag or event index is read.
        fence(Ordering::SeqCst);
        if !self.has_event_index {
            return new > 0 && u16::from_le(self.available(0).load(Ordering::Relaxed)) & NO_INTERRUPT == 0;
        }
        let wanted = self.available(4 + 2 * usize::from(self.size)).load(Ordering::Relaxed);
        // The requested index is among the new ones (section 2.7.10).
        self.next_used.wrapping_sub(u16::from_le(wanted)).wrapping_sub(1) < new
    }

    /// Enables notifications of available chains; returns whether chains have become available in the meantime.
    pub(super) fn enable_notification(&self) -> bool {
        if self.has_event_index {
            let event = self.used(4 + 8 * usize::from(self.size));
            event.store(self.next_available.to_le(), Ordering::Relaxed);
        } else {
            self.used(0).store(0, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
        u16::from_le(self.available(2).load(Ordering::Acquire)) != self.next_available
    }
}

/// A descriptor (section 2.7.5).
struct Descriptor {
    address: u64,
    length: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    /// The segment that the descriptor points to; `None` unless it is in RAM or in one file that the guest has as
    /// memory.
    fn segment(&self, view: &View) -> Option<Segment> {
        let file_address = || {
            let length = usize::try_from(self.length).ok()?;
            view.memory.file_address(GuestAddress(self.address), length, self.flags & WRITE != 0)
        };
        let slot = view.find(self.address, self.length.into()).or_else(file_address)?;
        Some(Segment::new(slot, self.length))
    }

    /// Reads a descriptor from guest memory.
    fn read(slot: *const u8) -> Self {
        // SAFETY: callers found the table in guest memory, and the descriptor is inside of it. A read of bytes has no
        // alignment.
        let bytes = unsafe { slot.cast::<[u8; DESCRIPTOR]>().read_volatile() };
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = bytes;
        Self {
            address: u64::from_le_bytes([a, b, c, d, e, f, g, h]),
            length: u32::from_le_bytes([i, j, k, l]),
            flags: u16::from_le_bytes([m, n]),
            next: u16::from_le_bytes([o, p]),
        }
    }
}
