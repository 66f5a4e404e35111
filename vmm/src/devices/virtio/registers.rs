//! The registers of virtio devices (section 4.2.2), in pages that the guest reads without an exit.
//!
//! KVM maps the pages into the guest as read-only memory: a read is an ordinary memory access, and only writes exit to
//! the VMM. An interrupt handler reads and acknowledges the interrupt status, which would cost two exits per interrupt.
//! With these pages the read causes no exit. The acknowledgment always has the same value, which KVM matches and
//! discards without an exit to the VMM.

use crate::layout::{PAGE, PAGE_SIZE};
use std::io;
use std::sync::Arc;
use vm_memory::{Bytes, MmapRegion, VolatileMemory};

pub(super) const MAGIC: usize = 0x000;
pub(super) const VERSION: usize = 0x004;
pub(super) const DEVICE_ID: usize = 0x008;
pub(super) const VENDOR_ID: usize = 0x00c;
pub(super) const DEVICE_FEATURES: usize = 0x010;
pub(super) const DEVICE_FEATURES_SELECT: usize = 0x014;
pub(super) const DRIVER_FEATURES: usize = 0x020;
pub(super) const DRIVER_FEATURES_SELECT: usize = 0x024;
pub(super) const QUEUE_SELECT: usize = 0x030;
pub(super) const QUEUE_SIZE_MAX: usize = 0x034;
pub(super) const QUEUE_SIZE: usize = 0x038;
pub(super) const QUEUE_READY: usize = 0x044;
/// Offset of the doorbell register (QueueNotify): the driver writes the number of a queue that has new chains.
pub const DOORBELL: u64 = DOORBELL_OFFSET as u64;
pub(super) const INTERRUPT_STATUS: usize = 0x060;
/// Offset of the interrupt acknowledge register: the driver writes the bits that it has read from the interrupt status.
pub const ACKNOWLEDGE: u64 = ACKNOWLEDGE_OFFSET as u64;
pub(super) const DOORBELL_OFFSET: usize = 0x050;
pub(super) const ACKNOWLEDGE_OFFSET: usize = 0x064;
/// Bit of the interrupt status: a queue has used chains.
pub const ACKNOWLEDGE_QUEUES: u32 = 1;
/// Bit of the interrupt status: the configuration space has changed.
pub(super) const CONFIGURATION_CHANGED: u32 = 2;
pub(super) const STATUS: usize = 0x070;
pub(super) const QUEUE_DESCRIPTORS: usize = 0x080;
pub(super) const QUEUE_DRIVER: usize = 0x090;
pub(super) const QUEUE_DEVICE: usize = 0x0a0;
/// Offset of the first address register of a queue. Writes to the address registers have no effect before the queue is
/// enabled.
pub const QUEUE_ADDRESSES: u64 = QUEUE_DESCRIPTORS as u64;
/// Length of the address registers in bytes.
pub const QUEUE_ADDRESSES_LEN: u32 = 0x028;
/// Lengths and addresses of shared memory regions. All ones: there are no such regions.
pub(super) const SHARED_MEMORY: std::ops::Range<usize> = 0x0b0..0x0c0;
pub(super) const CONFIGURATION_GENERATION: usize = 0x0fc;
pub(super) const CONFIGURATION: usize = 0x100;
/// Maximum length of the configuration space in bytes.
pub(super) const CONFIGURATION_MAX: usize = 256;

/// The register pages of all devices of a machine, one page per device.
#[derive(Clone, Debug)]
pub struct RegisterPages(Arc<MmapRegion>);

impl RegisterPages {
    /// Allocates zeroed pages for `devices` devices, at least one page.
    ///
    /// # Errors
    /// When the host is out of memory.
    pub fn new(devices: usize) -> io::Result<Self> {
        let mapping = MmapRegion::new(devices.max(1) * PAGE).map_err(io::Error::other)?;
        Ok(Self(Arc::new(mapping)))
    }

    /// The page of one device. `device` starts at 0.
    ///
    /// # Panics
    /// When `device` is out of range.
    #[must_use]
    pub fn page(&self, device: usize) -> RegisterPage {
        assert!(device < self.0.size() / PAGE, "there is no page for device {device}");
        RegisterPage { pages: Arc::clone(&self.0), start: device * PAGE }
    }

    /// The host mapping of all pages.
    #[must_use]
    pub fn mapping(&self) -> &MmapRegion {
        &self.0
    }

    /// Total size of all pages in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        (self.0.size() as u64).next_multiple_of(PAGE_SIZE)
    }
}

/// The registers of one device as the guest reads them. Reads are concurrent with updates, and never see a part of an
/// updated register.
#[derive(Clone, Debug)]
pub struct RegisterPage {
    pages: Arc<MmapRegion>,
    start: usize,
}

impl RegisterPage {
    /// Sets a register; `offset` is a multiple of 4 within the page.
    pub(super) fn set(&self, offset: usize, value: u32) {
        use std::sync::atomic::Ordering::Release;
        // Offsets are constants of this module and lie within the page.
        let _ = self.pages.as_volatile_slice().store(value.to_le(), self.start + offset, Release);
    }

    /// The current value of a register.
    pub(super) fn get(&self, offset: usize) -> u32 {
        use std::sync::atomic::Ordering::Acquire;
        self.pages.as_volatile_slice().load(self.start + offset, Acquire).map_or(0, u32::from_le)
    }

    /// Reads with any width, as the guest does; bytes beyond the page are all ones.
    pub(super) fn read(&self, offset: usize, data: &mut [u8]) {
        let length = data.len().min(PAGE.saturating_sub(offset));
        let _ = self.pages.as_volatile_slice().read_slice(&mut data[..length], self.start + offset);
    }

    /// Sets the content of the configuration space.
    pub(super) fn set_configuration(&self, bytes: &[u8]) {
        let bytes = &bytes[..bytes.len().min(CONFIGURATION_MAX)];
        let _ = self.pages.as_volatile_slice().write_slice(bytes, self.start + CONFIGURATION);
    }
}
