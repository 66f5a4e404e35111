//! Queues (section 2.7): set up with `virtio-queue`, used through [`Ring`], and the chains of descriptors that come out of them.
//!
//! A chain is checked whole when it is taken: every descriptor lies in guest memory, those that the device
//! reads come before those that it writes, and it ends within the queue's size. What is not like that breaks
//! the device. Devices therefore see nothing but lists of pieces of guest memory.
#![expect(unsafe_code, reason = "copies from and to guest memory that a chain names")]

use super::registers::{CONFIGURATION_CHANGED, CONFIGURATION_GENERATION, INTERRUPT_STATUS};
use super::ring::{Ring, View};
use super::{ACKNOWLEDGE_QUEUES, Broken, RegisterPage};
use crate::layout::PAGE;
use crate::memory::GuestMemory;
use std::fmt;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::EventFd;

/// A piece of guest memory by its place in this process, in the form that readv(2) takes.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Segment(libc::iovec);

// SAFETY: a segment is an address and a length; whoever dereferences it vouches for the memory.
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

    /// Memory of this process, for a part of a message that is not the guest's. Whoever passes it to the host
    /// keeps it until then.
    pub(super) const fn own(bytes: &mut [u8]) -> Self {
        Self(libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() })
    }

    /// Bytes of it.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.0.iov_len
    }

    /// Whether it is empty.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Where it is.
    #[must_use]
    pub const fn as_ptr(&self) -> *mut u8 {
        self.0.iov_base.cast()
    }

    /// Gives its whole pages to the host, which has new ones where they are touched again: of zeroes, or of the
    /// file that lies there. What is not whole pages stays.
    pub(super) fn give_back(self) {
        let start = self.as_ptr().addr().next_multiple_of(PAGE);
        let end = (self.as_ptr().addr() + self.len()) / PAGE * PAGE;
        let skipped = start - self.as_ptr().addr();
        if start < end {
            let address = self.as_ptr().wrapping_add(skipped).cast();
            // SAFETY: the pages are within the segment, which is guest memory in its whole length and stays
            // mapped. Nothing in this process expects guest memory to keep its content. Where the host refuses,
            // because a page is locked, it keeps its pages.
            unsafe { libc::madvise(address, end - start, libc::MADV_DONTNEED) };
        }
    }

    /// Leaves out bytes at its start; at most as many as it has.
    pub(super) const fn skip(&mut self, count: usize) {
        self.0.iov_base = self.as_ptr().wrapping_add(count).cast();
        self.0.iov_len -= count;
    }
}

/// Pieces of guest memory, one after the other. The memory lives as long as the [`GuestMemory`] of the queues
/// that the chain came from, or a clone of it.
#[derive(Debug)]
pub struct Chain {
    head: u16,
    segments: Vec<Segment>,
    /// Where the part starts that the device has not read yet.
    start: usize,
    /// Where the part starts that the device writes.
    writable: usize,
}

impl Chain {
    /// What the device has not read yet.
    #[must_use]
    pub fn readable(&self) -> &[Segment] {
        &self.segments[self.start..self.writable]
    }

    /// What the device may write, but for what it has written already.
    #[must_use]
    pub fn writable(&self) -> &[Segment] {
        &self.segments[self.writable..]
    }

    /// Bytes that can still be read.
    #[must_use]
    pub fn readable_len(&self) -> u64 {
        total(self.readable())
    }

    /// Bytes that can still be written.
    #[must_use]
    pub fn writable_len(&self) -> u64 {
        total(self.writable())
    }

    /// Reads the next bytes.
    ///
    /// # Errors
    /// When the chain has not as many.
    pub fn read(&mut self, buffer: &mut [u8]) -> Result<(), Broken> {
        let mut done = 0;
        while done < buffer.len() {
            if self.start == self.writable {
                return Err(Broken::because("a chain is too short to be read"));
            }
            let segment = &mut self.segments[self.start];
            let count = segment.len().min(buffer.len() - done);
            // SAFETY: the segment was checked to lie in guest memory when the chain was made, and the
            // caller holds that memory. Nothing else in this process refers to guest memory.
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
    /// When the chain has no room for them.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), Broken> {
        let mut done = 0;
        while done < bytes.len() {
            let Some(segment) = self.segments.get_mut(self.writable) else {
                return Err(Broken::because("a chain has too little room"));
            };
            let count = segment.len().min(bytes.len() - done);
            // SAFETY: the segment lies in guest memory, as in `read`. The guest may access it meanwhile: what it then
            // sees is its own affair.
            unsafe { std::ptr::copy(bytes[done..].as_ptr(), segment.as_ptr(), count) };
            segment.skip(count);
            done += count;
            if segment.is_empty() {
                // An empty segment is passed over by whoever reads or writes next.
                self.start += usize::from(self.start == self.writable);
                self.writable += 1;
            }
        }
        Ok(())
    }

    /// Leaves out the next bytes that could be read, at most all.
    pub fn skip(&mut self, mut count: usize) {
        while count > 0 && self.start < self.writable {
            let segment = &mut self.segments[self.start];
            let skipped = segment.len().min(count);
            segment.skip(skipped);
            count -= skipped;
            self.start += usize::from(segment.is_empty());
        }
    }

    /// Leaves out the next bytes that could be written, at most all, which were written by other means.
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

    /// Leaves out what could be read behind so many bytes.
    pub fn limit_readable(&mut self, count: usize) {
        limit(&mut self.segments[self.start..self.writable], count);
    }

    /// Leaves out what could be written behind so many bytes.
    pub fn limit_writable(&mut self, count: usize) {
        limit(&mut self.segments[self.writable..], count);
    }

    /// Splits bytes off the start of what is to be written, which a device fills when it knows the rest; nothing
    /// happens where they are not in one piece.
    pub fn split_front(&mut self, count: usize) -> Option<Segment> {
        let first = self.segments.get_mut(self.writable).filter(|first| first.len() >= count)?;
        let mut split = *first;
        split.0.iov_len = count;
        first.skip(count);
        Some(split)
    }

    /// Splits bytes off the end of what is to be written, which a device fills when all else is done.
    ///
    /// # Errors
    /// When the chain has not as many.
    pub fn split_writable(&mut self, count: usize) -> Result<Segment, Broken> {
        let last = self.segments[self.writable..].last_mut();
        let Some(last) = last.filter(|last| last.len() >= count) else {
            return Err(Broken::because(format!("a chain does not end with {count} bytes in one piece")));
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

/// Reads guest memory, each byte exactly once. The guest may write it meanwhile: of an ordinary read the compiler may
/// make two, so that what is used is not what was checked.
///
/// # Safety
/// As many bytes as the buffer has are mapped there.
unsafe fn read_once(mut from: *const u8, buffer: &mut [u8]) {
    // SAFETY: the three read what the caller vouches for, one after the other.
    unsafe {
        let rest = read_chunks::<64>(&mut from, buffer);
        let rest = read_chunks::<8>(&mut from, rest);
        read_chunks::<1>(&mut from, rest);
    }
}

/// Reads as many chunks as fit; the rest of the buffer.
///
/// # Safety
/// As for [`read_once`].
unsafe fn read_chunks<'a, const N: usize>(from: &mut *const u8, buffer: &'a mut [u8]) -> &'a mut [u8] {
    let (chunks, rest) = buffer.as_chunks_mut::<N>();
    for chunk in chunks {
        // SAFETY: the caller vouches for the memory; an array of bytes has no alignment.
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

/// Writes bytes into a segment, from its start; what does not fit is left out.
pub(super) fn fill(segment: Segment, bytes: &[u8]) {
    let count = segment.len().min(bytes.len());
    // SAFETY: as in `Chain::write`.
    unsafe { std::ptr::copy(bytes.as_ptr(), segment.as_ptr(), count) };
}

/// The queues of one device, with what it needs to use them.
#[derive(Debug)]
pub struct Queues {
    /// As the driver sets them up.
    pub(super) queues: Vec<Queue>,
    /// Those that are in use.
    rings: Vec<Option<Ring>>,
    view: View,
    pub(super) memory: GuestMemory,
    registers: RegisterPage,
    interrupt: EventFd,
    doorbell: EventFd,
    /// Vectors of chains that are done, for the next ones.
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
        // Sizes are constants of the devices, and their tests see that they are right.
        let queues = sizes.iter().filter_map(|&size| Queue::new(size).ok()).collect();
        let view = View::new(&memory);
        Self { queues, rings: Vec::new(), view, memory, registers, interrupt, doorbell, spare: Vec::new() }
    }

    /// The driver is ready: looks up the rings of the queues that it has set up.
    pub(super) fn activate(&mut self, has_event_index: bool) -> Result<(), Broken> {
        self.rings.clear();
        for (number, queue) in self.queues.iter_mut().enumerate() {
            queue.set_event_idx(has_event_index);
            let ring = queue.ready().then(|| {
                let outside = || Broken::because(format!("queue {number} is not in guest memory"));
                Ring::new(queue, &self.view).ok_or_else(outside)
            });
            self.rings.push(ring.transpose()?);
        }
        Ok(())
    }

    /// The driver starts over.
    pub(super) fn reset(&mut self) {
        self.rings.clear();
        self.queues.iter_mut().for_each(QueueT::reset);
    }

    /// The places of the next chains to take and to give back.
    pub(super) fn position(&self, queue: usize) -> (u16, u16) {
        let unused =
            || self.queues.get(queue).map_or((0, 0), |queue| (queue.next_avail(), queue.next_used()));
        self.ring(queue).map_or_else(unused, |ring| (ring.next_available, ring.next_used))
    }

    /// Chains that were taken and not given back.
    pub(super) fn in_flight(&self) -> usize {
        self.rings.iter().flatten().map(|ring| usize::from(ring.in_flight())).sum()
    }

    fn ring(&self, queue: usize) -> Option<&Ring> {
        self.rings.get(queue)?.as_ref()
    }

    fn ring_mut(&mut self, queue: usize) -> Result<&mut Ring, Broken> {
        let ring = self.rings.get_mut(queue).and_then(Option::as_mut);
        ring.ok_or_else(|| Broken::because(format!("queue {queue} is not in use")))
    }

    pub(super) const fn doorbell(&self) -> &EventFd {
        &self.doorbell
    }

    /// The guest's memory, in which all chains lie.
    #[must_use]
    pub const fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Whether the driver uses this queue.
    #[must_use]
    pub fn is_ready(&self, queue: usize) -> bool {
        self.ring(queue).is_some()
    }

    /// The next chain that the driver has made available, if there is one.
    ///
    /// # Errors
    /// When the driver's rings or descriptors are not what they have to be.
    pub fn pop(&mut self, queue: usize) -> Result<Option<Chain>, Broken> {
        let Some(ring) = self.rings.get_mut(queue).and_then(Option::as_mut) else { return Ok(None) };
        let broken = |what: String| Broken::because(format!("queue {queue}: {what}"));
        let Some(head) = ring.next().map_err(broken)? else { return Ok(None) };
        let mut segments = self.spare.pop().unwrap_or_default();
        segments.clear();
        let writable = ring
            .walk(head, &self.view, &mut segments)
            .map_err(|what| broken(format!("the chain at descriptor {head} {what}")))?;
        Ok(Some(Chain { head, segments, start: 0, writable }))
    }

    /// Puts back the chain that was taken last, so that the next [`Self::pop`] finds it again.
    pub fn put_back(&mut self, queue: usize, chain: Chain) {
        if let Ok(ring) = self.ring_mut(queue) {
            ring.next_available = ring.next_available.wrapping_sub(1);
        }
        self.spare.push(chain.segments);
    }

    /// Gives a chain back to the driver. `written` counts the bytes that the device wrote.
    ///
    /// # Errors
    /// When the queue is not in use.
    pub fn complete(&mut self, queue: usize, chain: Chain, written: u32) -> Result<(), Broken> {
        self.complete_together(queue, [(chain, written)])
    }

    /// Gives several chains back, of which the driver sees either none or all: a packet may take more than one.
    ///
    /// # Errors
    /// When the queue is not in use.
    pub fn complete_together(
        &mut self,
        queue: usize,
        chains: impl IntoIterator<Item = (Chain, u32)>,
    ) -> Result<(), Broken> {
        let ring = self.rings.get_mut(queue).and_then(Option::as_mut);
        let ring = ring.ok_or_else(|| Broken::because(format!("queue {queue} is not in use")))?;
        for (chain, written) in chains {
            ring.complete(chain.head, written);
            self.spare.push(chain.segments);
        }
        ring.publish();
        Ok(())
    }

    /// Chains that the driver can make available at a time.
    #[must_use]
    pub fn size(&self, queue: usize) -> usize {
        self.queues.get(queue).map_or(0, |ring| ring.size().into())
    }

    /// Interrupts the driver if it wants to hear of the chains that were given back.
    ///
    /// # Errors
    /// When the queue is not in use.
    pub fn notify(&mut self, queue: usize) -> Result<(), Broken> {
        if self.ring_mut(queue)?.is_awaited() {
            self.interrupt();
        }
        Ok(())
    }

    /// Asks to hear of new chains; `true` where some have come meanwhile, which have to be looked at first.
    ///
    /// # Errors
    /// When the queue is not in use.
    pub fn rearm(&mut self, queue: usize) -> Result<bool, Broken> {
        Ok(self.ring_mut(queue)?.rearm())
    }

    /// Asks to be called again for what is left, when others have had their turn.
    pub fn yield_turn(&self) {
        // A counter that is full is readable, which is all that is wanted.
        let _ = self.doorbell.write(1);
    }

    /// Shows the driver another configuration space.
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
        // KVM takes the counter at once.
        let _ = self.interrupt.write(1);
    }
}

impl GuestMemory {
    /// These bytes, if all of them are RAM.
    pub(super) fn range(&self, address: GuestAddress, length: usize) -> Option<Segment> {
        let slice = self.inner().get_slice(address, length).ok()?;
        Some(Segment(libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: length }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_whole_whatever_its_size_and_place() {
        let memory: Vec<u8> = (0..400_u32).map(|at| (at % 251).to_le_bytes()[0]).collect();
        for start in 0..9 {
            for length in 0..200 {
                let mut buffer = vec![0xff; length + 1];
                // SAFETY: the memory is there.
                unsafe { read_once(memory[start..].as_ptr(), &mut buffer[..length]) };
                assert_eq!((&buffer[..length], buffer[length]), (&memory[start..start + length], 0xff));
            }
        }
    }
}
