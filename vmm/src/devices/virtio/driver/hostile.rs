//! A driver that violates the specification, controlled by input bytes.
//!
//! Fuzzers and property tests provide the bytes. Valid and invalid operations are mixed, so that the input gets past
//! the first check of the device.

use super::{Driver, INDIRECT, NEXT, WRITE};
use crate::bus::BusDevice;
use crate::devices::virtio::registers as register;

/// Input bytes that are consumed from the front, followed by endless zeroes.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut taken = [0; N];
        let count = self.0.len().min(N);
        let (front, rest) = self.0.split_at(count);
        taken[..count].copy_from_slice(front);
        self.0 = rest;
        taken
    }

    fn byte(&mut self) -> u8 {
        self.take::<1>()[0]
    }

    fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.take())
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }

    /// Usually an address of data, sometimes an arbitrary one.
    fn address(&mut self) -> u64 {
        match self.byte() {
            0 => self.u64(),
            // The ends of memory and of the address space.
            1 => super::MEMORY - u64::from(self.byte()),
            2 => u64::MAX - u64::from(self.byte()),
            // The rings themselves.
            3 => super::RING_SPACE + u64::from(self.u32()) % (8 * super::RING_SPACE),
            _ => super::DATA + u64::from(self.u16()),
        }
    }

    /// Usually a small length, sometimes an arbitrary one.
    fn length(&mut self) -> u32 {
        match self.byte() {
            0 => self.u32(),
            1 => u32::from(self.u16()),
            _ => u32::from(self.byte()),
        }
    }

    fn flags(&mut self) -> u16 {
        match self.byte() % 16 {
            0 => self.u16(),
            1 | 2 => INDIRECT,
            3..8 => NEXT,
            8..11 => NEXT | WRITE,
            11..14 => WRITE,
            _ => 0,
        }
    }
}

impl Driver {
    /// Performs the operations that the bytes encode. Then resets and starts the device, which must work again.
    pub fn misbehave(&mut self, bytes: &[u8]) {
        self.start(u64::MAX);
        let mut bytes = Bytes(bytes);
        while !bytes.0.is_empty() {
            self.step(&mut bytes);
            let places: usize = self.rings.iter().map(|ring| usize::from(ring.size)).sum();
            assert!(self.transport.in_flight() <= places, "more chains are in flight than the queues hold");
        }
        while self.run(Some(0)) {}
        self.start(u64::MAX);
        assert!(!self.needs_reset(), "a reset does not recover the device: {:?}", self.transport.failure());
    }

    fn step(&mut self, bytes: &mut Bytes<'_>) {
        let queues = self.rings.len().max(1);
        let queue = usize::from(bytes.byte()) % queues;
        match bytes.byte() % 16 {
            0..5 => {
                let (index, address, length) = (bytes.u16() % 8, bytes.address(), bytes.length());
                let (flags, next) = (bytes.flags(), bytes.u16() % 9);
                self.describe(queue, index, address, length, flags, next);
            }
            5..8 => {
                let head = if bytes.byte() == 0 { bytes.u16() } else { bytes.u16() % 8 };
                self.offer(queue, head);
            }
            8 | 9 => self.ring(),
            10 => {
                // An indirect descriptor table, or packets and requests.
                let address = super::DATA + u64::from(bytes.u16());
                let data: [u8; 32] = bytes.take();
                self.put(address, &data);
            }
            11 => {
                let offset = bytes.u16() % 0x200;
                let data: [u8; 8] = bytes.take();
                let width = usize::from(bytes.byte()) % 9;
                self.transport.write(offset, &data[..width]);
                self.transport.read(offset, &mut vec![0; width]);
            }
            12 => {
                let registers = [
                    register::STATUS,
                    register::QUEUE_SELECT,
                    register::QUEUE_SIZE,
                    register::QUEUE_READY,
                    register::QUEUE_DESCRIPTORS,
                    register::QUEUE_DEVICE,
                    register::DRIVER_FEATURES,
                    register::ACKNOWLEDGE_OFFSET,
                ];
                let register = registers[usize::from(bytes.byte()) % registers.len()];
                let value = if bytes.byte() == 0 { bytes.u32() } else { bytes.byte().into() };
                self.write(register, value);
            }
            13 => self.start(bytes.u64()),
            14 => {
                // The available index jumps: by a little in either direction, or to an arbitrary value.
                let jump = match bytes.byte() % 4 {
                    0 => bytes.u16(),
                    1 => u16::from(bytes.byte() % 9),
                    _ => u16::from(bytes.byte() % 9).wrapping_neg(),
                };
                self.set_available(queue, self.rings[queue].next_available.wrapping_add(jump));
            }
            _ => {
                self.transport.serve_deadline();
                self.run(Some(0));
                self.interrupts();
            }
        }
    }
}
