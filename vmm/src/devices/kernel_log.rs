//! The port over which init sends the kernel's log, where the VMM profiles a boot.

use crate::bus::{BusDevice, GuestRequest};

/// Keeps what the guest sends, up to a bound.
#[derive(Debug, Default)]
pub struct KernelLog {
    text: Vec<u8>,
}

impl KernelLog {
    /// Bytes that are kept: a kernel with the debug fragment logs about 100 KiB.
    const CAPACITY: usize = 1 << 20;

    /// What was sent so far.
    #[must_use]
    pub fn text(&self) -> &[u8] {
        &self.text
    }
}

impl BusDevice for KernelLog {
    fn read(&mut self, _offset: u16, _data: &mut [u8]) {}

    fn write(&mut self, _offset: u16, data: &[u8]) -> Option<GuestRequest> {
        let taken = data.len().min(Self::CAPACITY - self.text.len());
        self.text.extend(&data[..taken]);
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_cannot_make_it_grow_without_bound() {
        let mut log = KernelLog::default();
        log.write(0, b"abc");
        assert_eq!(log.text(), b"abc");
        for _ in 0..2000 {
            log.write(0, &[b'x'; 1000]);
        }
        assert_eq!(log.text().len(), 1 << 20);
    }
}
