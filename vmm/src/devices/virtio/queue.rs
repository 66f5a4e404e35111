//! Virtqueues (section 2.7) and the descriptor chains that come out of them. A queue is set up with `virtio-queue` and
//! accessed through [`Ring`].
//!
//! A chain is validated completely when it is popped: every descriptor lies in guest memory, readable descriptors
//! precede writable ones, and the chain has no more descriptors than the queue. Any other chain fails the device.
//! Devices therefore only handle lists of segments of guest memory.
#![expect(unsafe_code, reason = "copies from and to guest memory that a chain names")]

use super::registers::{CONFIGURATION_CHANGED, CONFIGURATION_GENERATION, INTERRUPT_STATUS};
use super::ring::{Ring, View};
use super::{ACKNOWLEDGE_QUEUES, DeviceError, RegisterPage};
use crate::layout::PAGE;
use crate::memory::GuestMemory;
use std::fmt;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::EventFd;

/// A segment of guest memory at its host address, in the layout of `iovec` for readv(2).
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Segment(libc::iovec);

// SAFETY: a segment is an address and a length; code that dereferences it guarantees that the memory is mapped.
unsafe impl Send for Segment {}

impl fmt::Debug for Segment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes at {:p}", self.0.iov_len, self.0.iov_base)
    }
}

impl Segment {
    pub(super) const fn new(start: *mut u8, length: u32) -> Self {
        Self(libc::iovec { iov_base: start.cast(), iov_len: length as usize })
    }

    /// A segment in the VMM's own memory, for a part of a message that does not come from the guest. The caller keeps
    /// the buffer alive until the system call has completed.
    pub(super) const fn host(bytes: &mut [u8]) -> Self {
        Self(libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() })
    }

    /// Length in bytes.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.0.iov_len
    }

    /// Whether the length is 0.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Host address of the first byte.
    #[must_use]
    pub const fn as_ptr(&self) -> *mut u8 {
        self.0.iov_base.cast()
    }

    /// Returns the whole pages of the segment to the host. The next access to such a page gets a zero page, or the page
    /// of the mapped file. Pages that the segment covers only in part keep their content.
    pub(super) fn discard(self) {
        let start = self.as_ptr().addr().next_multiple_of(PAGE);
        let end = (self.as_ptr().addr() + self.len()) / PAGE * PAGE;
        let skipped = start - self.as_ptr().addr();
        if start < end {
            let address = self.as_ptr().wrapping_add(skipped).cast();
            // SAFETY: the pages are within the segment, which is guest memory in its whole length and stays mapped.
            // Nothing in this process expects guest memory to keep its content. If the host refuses, because a page is
            // locked, the page stays.
            unsafe { libc::madvise(address, end - start, libc::MADV_DONTNEED) };
        }
    }

    /// Removes up to `count` bytes from the start; `count` is at most the length.
    pub(super) const fn skip(&mut self, count: usize) {
        self.0.iov_base = self.as_ptr().wrapping_add(count).cast();
        self.0.iov_len -= count;
    }
}

/// A descriptor chain: a list of segments of guest memory, the readable ones first. The memory is mapped as long as the
/// [`GuestMemory`] of the chain's queues, or a clone of it, exists.
#[derive(Debug)]
pub struct Chain {
    head: u16,
    segments: Vec<Segment>,
    /// Index of the first segment that the device has not read completely.
    start: usize,
    /// Index of the first writable segment that the device has not filled.
    writable: usize,
}

impl Chain {
    /// A chain that a device may write, without a queue.
    #[cfg(test)]
    pub(super) const fn writable_to(segments: Vec<Segment>) -> Self {
        Self { head: 0, segments, start: 0, writable: 0 }
    }

    /// The segments that the device has not read yet.
    #[must_use]
    pub fn readable(&self) -> &[Segment] {
        &self.segments[self.start..self.writable]
    }

    /// The segments that the device has not written yet.
    #[must_use]
    pub fn writable(&self) -> &[Segment] {
        &self.segments[self.writable..]
    }

    /// Number of bytes left to read.
    #[must_use]
    pub fn readable_len(&self) -> u64 {
        total(self.readable())
    }

    /// Number of bytes left to write.
    #[must_use]
    pub fn writable_len(&self) -> u64 {
        total(self.writable())
    }

    /// Reads the next bytes.
    ///
    /// # Errors
    /// When the readable part is shorter than `buffer`.
    pub fn read(&mut self, buffer: &mut [u8]) -> Result<(), DeviceError> {
        let mut done = 0;
        while done < buffer.len() {
            if self.start == self.writable {
                return Err(DeviceError::new("a chain is too short to be read"));
            }
            let segment = &mut self.segments[self.start];
            let count = segment.len().min(buffer.len() - done);
            // SAFETY: the segment was checked to lie in guest memory when the chain was popped, and the caller keeps
            // that memory mapped. No Rust reference in this process refers to guest memory.
            unsafe { read_once(segment.as_ptr(), &mut buffer[done..done + count]) };
            segment.skip(count);
            done += count;
            if segment.is_empty() {
                self.start += 1;
            }
        }
        Ok(())
    }

    /// Writes the next bytes.
    ///
    /// # Errors
    /// When the writable part is shorter than `bytes`.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), DeviceError> {
        let mut done = 0;
        while done < bytes.len() {
            let Some(segment) = self.segments.get_mut(self.writable) else {
                return Err(DeviceError::new("a chain has too little room"));
            };
            let count = segment.len().min(bytes.len() - done);
            // SAFETY: the segment lies in guest memory, as in `read`. The guest may access it concurrently and then
            // sees arbitrary bytes of the two contents, which is the guest's responsibility.
            unsafe { std::ptr::copy(bytes[done..].as_ptr(), segment.as_ptr(), count) };
            segment.skip(count);
            done += count;
            if segment.is_empty() {
                // Later reads and writes skip empty segments.
                self.start += usize::from(self.start == self.writable);
                self.writable += 1;
            }
        }
        Ok(())
    }

    /// Skips the next readable bytes; stops at the end of the readable part.
    pub fn skip(&mut self, mut count: usize) {
        while count > 0 && self.start < self.writable {
            let segment = &mut self.segments[self.start];
            let skipped = segment.len().min(count);
            segment.skip(skipped);
            count -= skipped;
            self.start += usize::from(segment.is_empty());
        }
    }

    /// Skips the next writable bytes, which were written by other means; stops at the end of the chain.
    pub(super) fn skip_writable(&mut self, mut count: usize) {
        while count > 0
            && let Some(segment) = self.segments.get_mut(self.writable)
        {
            let skipped = segment.len().min(count);
            segment.skip(skipped);
            count -= skipped;
            if segment.is_empty() {
                self.start += usize::from(self.start == self.writable);
                self.writable += 1;
            }
        }
    }

    /// Truncates the readable part to `count` bytes.
    pub fn limit_readable(&mut self, count: usize) {
        limit(&mut self.segments[self.start..self.writable], count);
    }

    /// Truncates the writable part to `count` bytes.
    pub fn limit_writable(&mut self, count: usize) {
        limit(&mut self.segments[self.writable..], count);
    }

    /// Splits `count` bytes off the start of the writable part, for a header that the device writes last. Returns
    /// `None`, without a change, when they are not in one segment.
    pub fn split_front(&mut self, count: usize) -> Option<Segment> {
        let first = self.segments.get_mut(self.writable).filter(|first| first.len() >= count)?;
        let mut split = *first;
        split.0.iov_len = count;
        first.skip(count);
        Some(split)
    }

    /// Splits `count` bytes off the end of the writable part, for a status that the device writes last.
    ///
    /// # Errors
    /// When the last writable segment is shorter than `count`.
    pub fn split_writable(&mut self, count: usize) -> Result<Segment, DeviceError> {
        let last = self.segments[self.writable..].last_mut();
        let Some(last) = last.filter(|last| last.len() >= count) else {
            return Err(DeviceError::new(format!("a chain does not end with {count} bytes in one piece")));
        };
        last.0.iov_len -= count;
        let mut split = *last;
        split.skip(last.len());
        split.0.iov_len = count;
        if last.is_empty() {
            self.segments.pop();
            self.writable = self.writable.min(self.segments.len());
        }
        Ok(split)
    }
}

/// Reads guest memory, each byte exactly once. The guest may write it concurrently: the compiler may read ordinary
/// memory twice, so that the checked value and the used value could differ.
///
/// # Safety
/// `from` is valid for reads of as many bytes as the buffer has.
unsafe fn read_once(mut from: *const u8, buffer: &mut [u8]) {
    // SAFETY: the three calls read the range that the caller guarantees, one part after the other.
    unsafe {
        let rest = read_chunks::<64>(&mut from, buffer);
        let rest = read_chunks::<8>(&mut from, rest);
        read_chunks::<1>(&mut from, rest);
    }
}

/// Reads as many chunks as fit; returns the rest of the buffer.
///
/// # Safety
/// As for [`read_once`].
unsafe fn read_chunks<'a, const N: usize>(from: &mut *const u8, buffer: &'a mut [u8]) -> &'a mut [u8] {
    let (chunks, rest) = buffer.as_chunks_mut::<N>();
    for chunk in chunks {
        // SAFETY: the caller guarantees that the memory is mapped; an array of bytes has no alignment.
        *chunk = unsafe { from.cast::<[u8; N]>().read_volatile() };
        *from = from.wrapping_add(N);
    }
    rest
}

fn total(segments: &[Segment]) -> u64 {
    segments.iter().map(|segment| segment.len() as u64).sum()
}

fn limit(segments: &mut [Segment], mut count: usize) {
    for segment in segments {
        segment.0.iov_len = segment.len().min(count);
        count -= segment.len();
    }
}

/// Writes bytes to the start of a segment; bytes beyond its end are dropped.
pub(super) fn fill(segment: Segment, bytes: &[u8]) {
    let count = segment.len().min(bytes.len());
    // SAFETY: as in `Chain::write`.
    unsafe { std::ptr::copy(bytes.as_ptr(), segment.as_ptr(), count) };
}

/// The queues of one device, with the resources that the device needs to process them.
#[derive(Debug)]
pub struct Queues {
    /// The queues as the driver has configured them.
    pub(super) queues: Vec<Queue>,
    /// The rings of the enabled queues, once the driver has set DRIVER_OK.
    rings: Vec<Option<Ring>>,
    view: View,
    pub(super) memory: GuestMemory,
    registers: RegisterPage,
    interrupt: EventFd,
    doorbell: EventFd,
    /// The vectors of completed chains, reused for the next chains.
    spare: Vec<Vec<Segment>>,
}

impl Queues {
    pub(super) fn new(
        sizes: &[u16],
        memory: GuestMemory,
        registers: RegisterPage,
        interrupt: EventFd,
        doorbell: EventFd,
    ) -> Self {
        // Sizes are constants of the devices; the device's tests fail for an invalid one.
        let queues = sizes.iter().filter_map(|&size| Queue::new(size).ok()).collect();
        let view = View::new(&memory);
        Self { queues, rings: Vec::new(), view, memory, registers, interrupt, doorbell, spare: Vec::new() }
    }

    /// Looks up the rings of the enabled queues, after the driver has set DRIVER_OK.
    pub(super) fn activate(&mut self, has_event_index: bool) -> Result<(), DeviceError> {
        self.rings.clear();
        for (number, queue) in self.queues.iter_mut().enumerate() {
            queue.set_event_idx(has_event_index);
            let ring = queue.ready().then(|| {
                let outside = || DeviceError::new(format!("queue {number} is not in guest memory"));
                Ring::new(queue, &self.view).ok_or_else(outside)
            });
            self.rings.push(ring.transpose()?);
        }
        Ok(())
    }

    /// The driver resets the device.
    pub(super) fn reset(&mut self) {
        self.rings.clear();
        self.queues.iter_mut().for_each(QueueT::reset);
    }

    /// The indices of the next available and of the next used chain.
    pub(super) fn position(&self, queue: usize) -> (u16, u16) {
        let unused =
            || self.queues.get(queue).map_or((0, 0), |queue| (queue.next_avail(), queue.next_used()));
        self.ring(queue).map_or_else(unused, |ring| (ring.next_available, ring.next_used))
    }

    /// Number of chains that were popped and not completed.
    pub(super) fn in_flight(&self) -> usize {
        self.rings.iter().flatten().map(|ring| usize::from(ring.in_flight())).sum()
    }

    fn ring(&self, queue: usize) -> Option<&Ring> {
        self.rings.get(queue)?.as_ref()
    }

    fn ring_mut(&mut self, queue: usize) -> Result<&mut Ring, DeviceError> {
        let ring = self.rings.get_mut(queue).and_then(Option::as_mut);
        ring.ok_or_else(|| DeviceError::new(format!("queue {queue} is not in use")))
    }

    pub(super) const fn doorbell(&self) -> &EventFd {
        &self.doorbell
    }

    /// The guest's memory, which contains all chains.
    #[must_use]
    pub const fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Whether the driver has enabled this queue.
    #[must_use]
    pub fn is_ready(&self, queue: usize) -> bool {
        self.ring(queue).is_some()
    }

    /// Pops the next available chain; `None` when there is none or the queue is not enabled.
    ///
    /// # Errors
    /// When the driver's rings or descriptors are invalid.
    pub fn pop(&mut self, queue: usize) -> Result<Option<Chain>, DeviceError> {
        let Some(ring) = self.rings.get_mut(queue).and_then(Option::as_mut) else { return Ok(None) };
        let error = |what: String| DeviceError::new(format!("queue {queue}: {what}"));
        let Some(head) = ring.next().map_err(error)? else { return Ok(None) };
        let mut segments = self.spare.pop().unwrap_or_default();
        segments.clear();
        let writable = ring
            .walk(head, &self.view, &mut segments)
            .map_err(|what| error(format!("the chain at descriptor {head} {what}")))?;
        Ok(Some(Chain { head, segments, start: 0, writable }))
    }

    /// Makes the chain that was popped last available again for the next [`Self::pop`].
    pub fn undo_pop(&mut self, queue: usize, chain: Chain) {
        if let Ok(ring) = self.ring_mut(queue) {
            ring.next_available = ring.next_available.wrapping_sub(1);
        }
        self.spare.push(chain.segments);
    }

    /// Adds a chain to the used ring. `written` is the number of bytes that the device wrote.
    ///
    /// # Errors
    /// When the queue is not enabled.
    pub fn complete(&mut self, queue: usize, chain: Chain, written: u32) -> Result<(), DeviceError> {
        self.complete_all(queue, [(chain, written)])
    }

    /// Adds several chains to the used ring and publishes them with one update of the index: a packet may span several
    /// chains.
    ///
    /// # Errors
    /// When the queue is not enabled.
    pub fn complete_all(
        &mut self,
        queue: usize,
        chains: impl IntoIterator<Item = (Chain, u32)>,
    ) -> Result<(), DeviceError> {
        let ring = self.rings.get_mut(queue).and_then(Option::as_mut);
        let ring = ring.ok_or_else(|| DeviceError::new(format!("queue {queue} is not in use")))?;
        for (chain, written) in chains {
            ring.complete(chain.head, written);
            self.spare.push(chain.segments);
        }
        ring.publish();
        Ok(())
    }

    /// The size of the queue: the maximum number of chains in flight.
    #[must_use]
    pub fn size(&self, queue: usize) -> usize {
        self.queues.get(queue).map_or(0, |ring| ring.size().into())
    }

    /// Interrupts the driver if it has asked for a notification of the chains that were completed.
    ///
    /// # Errors
    /// When the queue is not enabled.
    pub fn notify(&mut self, queue: usize) -> Result<(), DeviceError> {
        if self.ring_mut(queue)?.needs_notification() {
            self.interrupt();
        }
        Ok(())
    }

    /// Enables notifications of available chains. Returns `true` when chains have become available in the meantime; the
    /// device must process them first, because they may cause no notification.
    ///
    /// # Errors
    /// When the queue is not enabled.
    pub fn enable_notification(&mut self, queue: usize) -> Result<bool, DeviceError> {
        Ok(self.ring_mut(queue)?.enable_notification())
    }

    /// Makes the event loop call the device again, after the events of other devices.
    pub fn reschedule(&self) {
        // A write fails only when the counter overflows, in which case the eventfd is readable already.
        let _ = self.doorbell.write(1);
    }

    /// Updates the configuration space that the driver sees, increments its generation, and interrupts the driver.
    pub fn set_configuration(&self, bytes: &[u8]) {
        let generation = self.registers.get(CONFIGURATION_GENERATION);
        self.registers.set_configuration(bytes);
        self.registers.set(CONFIGURATION_GENERATION, generation.wrapping_add(1));
        self.interrupt_for_configuration();
    }

    pub(super) fn interrupt_for_configuration(&self) {
        self.registers.set(INTERRUPT_STATUS, ACKNOWLEDGE_QUEUES | CONFIGURATION_CHANGED);
        self.interrupt();
    }

    fn interrupt(&self) {
        // KVM consumes the counter immediately.
        let _ = self.interrupt.write(1);
    }
}

impl GuestMemory {
    /// The segment of guest RAM at this address; `None` if a part of it is not RAM.
    pub(super) fn range(&self, address: GuestAddress, length: usize) -> Option<Segment> {
        let slice = self.inner().get_slice(address, length).ok()?;
        Some(Segment(libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: length }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_of_any_size_and_alignment_are_complete() {
        let memory: Vec<u8> = (0..400_u32).map(|at| (at % 251).to_le_bytes()[0]).collect();
        for start in 0..9 {
            for length in 0..200 {
                let mut buffer = vec![0xff; length + 1];
                // SAFETY: the memory is mapped.
                unsafe { read_once(memory[start..].as_ptr(), &mut buffer[..length]) };
                assert_eq!((&buffer[..length], buffer[length]), (&memory[start..start + length], 0xff));
            }
        }
    }
}
