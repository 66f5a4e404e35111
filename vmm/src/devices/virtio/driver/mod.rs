//! A virtio driver for tests and fuzzing. It accesses the registers and queues of a device as a guest's kernel does, in
//! this process and without KVM, and can also violate the specification.

mod hostile;

use super::registers as register;
use super::{ACKNOWLEDGE_QUEUES, Device, RegisterPage, RegisterPages, Transport, Watcher, Wiring};
use crate::bus::BusDevice;
use crate::layout::MIB;
use crate::memory::GuestMemory;
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, EventData};
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

/// A buffer of a chain.
#[derive(Clone, Debug)]
pub enum Piece {
    /// Device-readable bytes.
    Out(Vec<u8>),
    /// A device-writable buffer of this many bytes.
    In(u32),
}

/// A chain that the device has completed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Used {
    /// The chain's first descriptor, as returned by [`Driver::push`].
    pub head: u16,
    /// Number of written bytes as reported by the device.
    pub written: u32,
    /// The content of all device-writable buffers of the chain.
    pub bytes: Vec<u8>,
}

/// One queue of the driver.
#[derive(Clone, Debug)]
struct Ring {
    size: u16,
    descriptors: u64,
    available: u64,
    used: u64,
    next_descriptor: u16,
    next_available: u16,
    next_used: u16,
    /// The device-writable buffers by the head of their chain: addresses and lengths.
    writable: BTreeMap<u16, Vec<(u64, u32)>>,
}

/// Descriptor flags (section 2.7.5).
pub const NEXT: u16 = 1;
/// The device writes to the descriptor's buffer.
pub const WRITE: u16 = 2;
/// The descriptor points to an indirect table.
pub const INDIRECT: u16 = 4;

/// The driver of one device.
#[derive(Debug)]
pub struct Driver {
    /// The device.
    pub transport: Transport,
    /// The guest's memory: 16 MiB, the second half of which is for data.
    pub memory: GuestMemory,
    page: RegisterPage,
    interrupt: EventFd,
    epoll: Arc<OwnedFd>,
    rings: Vec<Ring>,
    next_data: u64,
}

const MEMORY: u64 = 16 * MIB;
const DATA: u64 = MEMORY / 2;
/// Distance between the rings of two queues in bytes.
const RING_SPACE: u64 = 0x1_0000;

impl Driver {
    /// A device in its reset state, in its own machine.
    pub fn new(device: impl Device + 'static) -> Self {
        Self::with_memory(device, GuestMemory::anonymous(MEMORY).expect("no memory"))
    }

    /// The same, in a machine with this memory of 16 MiB or more.
    pub fn with_memory(device: impl Device + 'static, memory: GuestMemory) -> Self {
        let eventfd = || EventFd::new(libc::EFD_NONBLOCK).expect("no eventfd");
        // Only a small part of it is accessed, and fuzzers create many.
        memory.use_small_pages(0..MEMORY).expect("it is memory");
        let page = RegisterPages::new(1).expect("no memory").page(0);
        let interrupt = eventfd();
        let wiring = Wiring {
            registers: page.clone(),
            interrupt: interrupt.try_clone().expect("no eventfd"),
            doorbell: eventfd(),
            memory: memory.clone(),
        };
        let mut transport = Transport::new(Box::new(device), "device".into(), wiring);
        let epoll = Arc::new(epoll::create(CreateFlags::CLOEXEC).expect("no epoll"));
        transport.watch(Watcher::new(Arc::clone(&epoll), 1)).expect("cannot watch");
        Self { transport, memory, page, interrupt, epoll, rings: Vec::new(), next_data: DATA }
    }

    /// The same, started with all features that the device offers.
    pub fn started(device: impl Device + 'static) -> Self {
        let mut this = Self::new(device);
        this.start(u64::MAX);
        this
    }

    /// Writes a register.
    pub fn write(&mut self, register: usize, value: u32) {
        let offset = u16::try_from(register).expect("no register");
        while self.transport.write(offset, &value.to_le_bytes()).is_some() {
            self.run(Some(1));
        }
    }

    /// Reads a register.
    #[must_use]
    pub fn read(&self, register: usize) -> u32 {
        self.page.get(register)
    }

    /// The device status register.
    #[must_use]
    pub fn status(&self) -> u32 {
        self.read(register::STATUS)
    }

    /// Reads the configuration space.
    #[must_use]
    pub fn configuration(&self, offset: usize, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.page.read(register::CONFIGURATION + offset, &mut bytes);
        bytes
    }

    /// Features that the device offers.
    pub fn offered(&mut self) -> u64 {
        let mut half = |select| {
            self.write(register::DEVICE_FEATURES_SELECT, select);
            u64::from(self.read(register::DEVICE_FEATURES))
        };
        half(0) | half(1) << 32
    }

    /// Resets and starts the device like a kernel does (section 3.1.1), with the offered features that are in `wanted`.
    pub fn start(&mut self, wanted: u64) {
        self.write(register::STATUS, 0);
        self.write(register::STATUS, 1);
        self.write(register::STATUS, 3);
        let features = self.offered() & wanted;
        for (select, bits) in [(0, features & 0xffff_ffff), (1, features >> 32)] {
            self.write(register::DRIVER_FEATURES_SELECT, select);
            self.write(register::DRIVER_FEATURES, u32::try_from(bits).unwrap_or(0));
        }
        self.write(register::STATUS, 11);
        self.rings.clear();
        for queue in 0.. {
            self.write(register::QUEUE_SELECT, queue);
            let size = self.read(register::QUEUE_SIZE_MAX);
            if size == 0 {
                break;
            }
            let start = u64::from(queue + 1) * RING_SPACE;
            let ring = Ring {
                size: u16::try_from(size).expect("a queue is too large"),
                descriptors: start,
                available: start + 0x8000,
                used: start + 0xc000,
                next_descriptor: 0,
                next_available: 0,
                next_used: 0,
                writable: BTreeMap::new(),
            };
            self.clear(&ring);
            self.write(register::QUEUE_SIZE, size);
            for (register, address) in [
                (register::QUEUE_DESCRIPTORS, ring.descriptors),
                (register::QUEUE_DRIVER, ring.available),
                (register::QUEUE_DEVICE, ring.used),
            ] {
                self.write(register, u32::try_from(address & 0xffff_ffff).unwrap_or(0));
                self.write(register + 4, u32::try_from(address >> 32).unwrap_or(0));
            }
            self.write(register::QUEUE_READY, 1);
            self.rings.push(ring);
        }
        self.write(register::STATUS, 15);
        self.run(Some(0));
    }

    /// Clears the rings.
    fn clear(&self, ring: &Ring) {
        let size = usize::from(ring.size);
        for (address, length) in
            [(ring.descriptors, 16 * size), (ring.available, 6 + 2 * size), (ring.used, 6 + 8 * size)]
        {
            self.put(address, &vec![0; length]);
        }
    }

    fn put(&self, address: u64, bytes: &[u8]) {
        self.memory.write(GuestAddress(address), bytes).expect("the driver writes into memory");
    }

    fn get<const N: usize>(&self, address: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.memory.read(GuestAddress(address), &mut bytes).expect("the driver reads memory");
        bytes
    }

    /// Allocates guest memory for data. The memory is reused from its start when it is exhausted. Buffers of at least a
    /// sector are aligned to a sector, as required for direct I/O; smaller ones are not aligned.
    pub fn allocate(&mut self, length: u32) -> u64 {
        const SECTOR: u32 = 512;
        if length >= SECTOR {
            self.next_data = self.next_data.next_multiple_of(SECTOR.into());
        }
        if self.next_data + u64::from(length) > MEMORY {
            self.next_data = DATA;
        }
        let address = self.next_data;
        // Odd addresses are valid.
        self.next_data += u64::from(length) + 1;
        address
    }

    /// Writes an arbitrary descriptor.
    pub fn describe(&self, queue: usize, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(length.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.put(self.rings[queue].descriptors + 16 * u64::from(index), &bytes);
    }

    /// Makes an arbitrary descriptor available as the head of a chain.
    pub fn offer(&mut self, queue: usize, head: u16) {
        let ring = &mut self.rings[queue];
        let slot = ring.available + 4 + 2 * u64::from(ring.next_available % ring.size);
        ring.next_available = ring.next_available.wrapping_add(1);
        let (index, next) = (ring.available + 2, ring.next_available);
        self.put(slot, &head.to_le_bytes());
        self.put(index, &next.to_le_bytes());
    }

    /// Sets the index of the available ring to an arbitrary value.
    pub fn set_available(&mut self, queue: usize, index: u16) {
        self.rings[queue].next_available = index;
        self.put(self.rings[queue].available + 2, &index.to_le_bytes());
    }

    /// Makes a chain available; returns the index of its first descriptor.
    pub fn push(&mut self, queue: usize, pieces: &[Piece]) -> u16 {
        let size = self.rings[queue].size;
        let head = self.rings[queue].next_descriptor;
        let mut writable = Vec::new();
        let mut index = head;
        for (position, chunk) in pieces.iter().enumerate() {
            let (address, length, kind) = match chunk {
                Piece::Out(bytes) => {
                    let length = u32::try_from(bytes.len()).expect("a piece is too large");
                    let address = self.allocate(length);
                    self.put(address, bytes);
                    (address, length, 0)
                }
                Piece::In(length) => {
                    let address = self.allocate(*length);
                    writable.push((address, *length));
                    (address, *length, WRITE)
                }
            };
            let next = (index + 1) % size;
            let follow = if position + 1 < pieces.len() { NEXT } else { 0 };
            self.describe(queue, index, address, length, kind | follow, next);
            index = next;
        }
        self.rings[queue].next_descriptor = index;
        self.rings[queue].writable.insert(head, writable);
        self.offer(queue, head);
        head
    }

    /// Takes the next chain that the device has completed.
    pub fn pop(&mut self, queue: usize) -> Option<Used> {
        let ring = &self.rings[queue];
        let index = u16::from_le_bytes(self.get(ring.used + 2));
        if index == ring.next_used {
            return None;
        }
        let entry = ring.used + 4 + 8 * u64::from(ring.next_used % ring.size);
        let head = u32::from_le_bytes(self.get(entry));
        let written = u32::from_le_bytes(self.get(entry + 4));
        let head = u16::try_from(head).expect("a chain that was never there");
        let mut bytes = Vec::new();
        for &(address, length) in ring.writable.get(&head).into_iter().flatten() {
            let mut part = vec![0; usize::try_from(length).expect("64 bits")];
            self.memory.read(GuestAddress(address), &mut part).expect("the driver reads memory");
            bytes.extend(part);
        }
        self.rings[queue].next_used = ring.next_used.wrapping_add(1);
        Some(Used { head, written, bytes })
    }

    /// Requests an interrupt for the completed chain with this index, counted from 0.
    pub fn ask_for_interrupt_at(&self, queue: usize, number: u16) {
        let ring = &self.rings[queue];
        self.put(ring.available + 4 + 2 * u64::from(ring.size), &number.to_le_bytes());
    }

    /// Rings the doorbell, and runs the device until no event is pending.
    pub fn ring(&mut self) {
        self.write(register::DOORBELL_OFFSET, 0);
        while self.run(Some(0)) {}
    }

    /// Waits for an event and runs the device; `false` when no event occurs within `milliseconds`.
    pub fn run(&mut self, milliseconds: Option<u32>) -> bool {
        let limit = milliseconds.map(|milliseconds| Timespec {
            tv_sec: i64::from(milliseconds / 1000),
            tv_nsec: i64::from(milliseconds % 1000) * 1_000_000,
        });
        let mut events = Vec::with_capacity(16);
        // The completion of an io_uring request interrupts the thread that submitted it.
        let _ = rustix::io::retry_on_intr(|| {
            epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), limit.as_ref())
        });
        for event in &events {
            let data: EventData = event.data;
            let token = u32::try_from(data.u64() & 0xffff_ffff).unwrap_or(0);
            self.transport.serve(token, event.flags);
        }
        !events.is_empty()
    }

    /// Waits for the device to complete a chain.
    ///
    /// # Panics
    /// When no chain completes within one minute.
    pub fn wait(&mut self, queue: usize) -> Used {
        loop {
            if let Some(used) = self.pop(queue) {
                return used;
            }
            assert!(self.run(Some(60_000)), "the device completes no chain: {:?}", self.transport.failure());
        }
    }

    /// Makes a chain available, rings the doorbell, and waits for the completion.
    pub fn request(&mut self, queue: usize, pieces: &[Piece]) -> Used {
        self.push(queue, pieces);
        self.ring();
        self.wait(queue)
    }

    /// Number of interrupts since the last call. Acknowledges them like a kernel does.
    pub fn interrupts(&mut self) -> u64 {
        let count = self.interrupt.read().unwrap_or(0);
        if count > 0 {
            let status = self.read(register::INTERRUPT_STATUS);
            // KVM handles this value without an exit to the VMM.
            if status != ACKNOWLEDGE_QUEUES {
                self.write(register::ACKNOWLEDGE_OFFSET, status);
            }
        }
        count
    }

    /// Whether the device has set DEVICE_NEEDS_RESET because of a violation of the specification.
    #[must_use]
    pub fn needs_reset(&self) -> bool {
        self.status() & 64 != 0
    }
}
