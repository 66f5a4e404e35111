//! The I/O port through which init sends the kernel log when the VMM profiles a boot.

use crate::bus::{BusDevice, GuestRequest};

/// Records what the guest writes, up to a limit.
#[derive(Debug, Default)]
pub struct KernelLog {
    text: Vec<u8>,
}

impl KernelLog {
    /// Bytes that are recorded: a kernel with the debug fragment logs about 100 KiB. The rest is dropped.
    const CAPACITY: usize = 1 << 20;

    /// The bytes received so far. The guest controls them: they are not necessarily UTF-8.
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
