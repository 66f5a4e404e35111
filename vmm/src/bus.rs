//! Dispatch of port and memory accesses to devices.

use guest_protocol::ExitStatus;
use std::fmt;
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// A request of the guest to the machine, as the effect of a device access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestRequest {
    /// The guest has ended with this status.
    End(ExitStatus),
    /// The guest requests a reset.
    Reset,
    /// The guest has reached the stage at which the machine stops, to be captured as a pre-booted kernel or to wait as a spare.
    Capture,
    /// The host could not do what the access takes, so that the machine ends; the text says what failed.
    HostFailed(&'static str),
    /// The write cannot complete yet; the vCPU repeats it after a short time.
    Retry,
}

/// A device with registers in I/O ports or in memory.
///
/// `offset` is relative to the device's first port or address. `data` has the length of the access in bytes; a string
/// instruction (`rep insb`) arrives as one access with all its bytes.
pub trait BusDevice: Send {
    /// Handles a read. `data` initially contains all ones; bytes that the device does not fill read as such.
    fn read(&mut self, offset: u16, data: &mut [u8]);
    /// Handles a write; returns a request to the machine, if the write is one.
    fn write(&mut self, offset: u16, data: &[u8]) -> Option<GuestRequest>;
}

struct Claim<A> {
    range: RangeInclusive<A>,
    device: Arc<Mutex<dyn BusDevice>>,
}

/// A bus: either the I/O ports of a machine, or its guest-physical addresses that are not RAM. Unclaimed ports and
/// addresses read as all ones and ignore writes, as on a PC; accesses to them are counted.
pub struct Bus<A> {
    claims: Vec<Claim<A>>,
    unclaimed: AtomicU64,
}

/// The I/O ports.
pub type PortBus = Bus<u16>;
/// The guest-physical addresses that are not RAM.
pub type MemoryBus = Bus<u64>;

impl<A> Default for Bus<A> {
    fn default() -> Self {
        Self { claims: Vec::new(), unclaimed: AtomicU64::new(0) }
    }
}

impl<A: fmt::Debug> fmt::Debug for Bus<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.claims.iter().map(|claim| &claim.range)).finish()
    }
}

impl<A> Bus<A>
where
    A: Copy + Ord + fmt::Debug + std::ops::Sub<Output = A> + TryInto<u16>,
{
    /// Assigns ports or addresses to a device: at most 65,536, and none that another device has.
    pub fn claim(&mut self, range: RangeInclusive<A>, device: Arc<Mutex<dyn BusDevice>>) {
        debug_assert!(
            self.claims
                .iter()
                .all(|other| other.range.end() < range.start() || range.end() < other.range.start()),
            "two devices claim parts of {range:x?}"
        );
        self.claims.push(Claim { range, device });
    }

    /// Assigns ports or addresses to a device, with precedence over earlier claims.
    pub fn override_claims(&mut self, range: RangeInclusive<A>, device: Arc<Mutex<dyn BusDevice>>) {
        self.claims.insert(0, Claim { range, device });
    }

    /// Handles a read of a port or address.
    pub fn read(&self, at: A, data: &mut [u8]) {
        data.fill(0xff);
        match self.find(at) {
            Some((claim, offset)) => lock(&claim.device).read(offset, data),
            None => self.count_unclaimed(),
        }
    }

    /// Handles a write to a port or address.
    pub fn write(&self, at: A, data: &[u8]) -> Option<GuestRequest> {
        let Some((claim, offset)) = self.find(at) else {
            self.count_unclaimed();
            return None;
        };
        lock(&claim.device).write(offset, data)
    }

    /// Number of accesses to unclaimed ports or addresses.
    pub fn unclaimed(&self) -> u64 {
        self.unclaimed.load(Ordering::Relaxed)
    }

    fn find(&self, at: A) -> Option<(&Claim<A>, u16)> {
        let claim = self.claims.iter().find(|claim| claim.range.contains(&at))?;
        Some((claim, (at - *claim.range.start()).try_into().ok()?))
    }

    fn count_unclaimed(&self) {
        self.unclaimed.fetch_add(1, Ordering::Relaxed);
    }
}

/// The two buses of a machine.
#[derive(Debug, Default)]
pub struct Buses {
    /// The I/O ports.
    pub ports: PortBus,
    /// The guest-physical addresses.
    pub memory: MemoryBus,
}

/// Locks a device. A thread that panics ends the process (`panic = "abort"`), so that a lock is never seen poisoned.
pub(crate) fn lock<T: ?Sized>(device: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Recorder(Vec<(u16, Vec<u8>)>);

    impl BusDevice for Recorder {
        fn read(&mut self, offset: u16, data: &mut [u8]) {
            data[0] = offset.to_le_bytes()[0];
        }
        fn write(&mut self, offset: u16, data: &[u8]) -> Option<GuestRequest> {
            self.0.push((offset, data.into()));
            (data == [1]).then_some(GuestRequest::Reset)
        }
    }

    #[test]
    fn accesses_reach_the_device_that_claims_the_port() {
        let device = Arc::new(Mutex::new(Recorder::default()));
        let mut bus = PortBus::default();
        bus.claim(0x10..=0x13, device.clone());
        let mut data = [0; 4];
        bus.read(0x12, &mut data);
        assert_eq!(data, [2, 0xff, 0xff, 0xff]);
        assert_eq!(bus.write(0x13, &[7, 8]), None);
        assert_eq!(bus.write(0x10, &[1]), Some(GuestRequest::Reset));
        assert_eq!(lock(&device).0, [(3, vec![7, 8]), (0, vec![1])]);
        assert_eq!(bus.unclaimed(), 0);
    }

    #[test]
    fn overriding_claims_have_precedence() {
        let (first, second) =
            (Arc::new(Mutex::new(Recorder::default())), Arc::new(Mutex::new(Recorder::default())));
        let mut bus = PortBus::default();
        bus.claim(0x10..=0x13, first.clone());
        bus.override_claims(0x11..=0x11, second.clone());
        for port in 0x10..=0x12 {
            bus.write(port, &[7]);
        }
        assert_eq!(lock(&first).0, [(0, vec![7]), (2, vec![7])]);
        assert_eq!(lock(&second).0, [(0, vec![7])]);
    }

    #[test]
    fn unclaimed_ports_read_as_all_ones() {
        let bus = PortBus::default();
        for port in [0, 0x3f8, 0x550, u16::MAX] {
            let mut data = [0; 2];
            bus.read(port, &mut data);
            assert_eq!(data, [0xff; 2]);
            assert_eq!(bus.write(port, &[1, 2, 3, 4]), None);
        }
        assert_eq!(bus.unclaimed(), 8);
    }
}
