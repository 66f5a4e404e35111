//! A pending reset: the device is usable again only when the reset completes.

use crate::bus::{BusDevice, GuestRequest};
use crate::devices::virtio::driver::Driver;
use crate::devices::virtio::{Device, DeviceError, Event, Queues, Watcher};
use proptest::prelude::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};

/// A device that accesses guest memory until the test clears a flag.
#[derive(Clone, Debug, Default)]
struct Busy {
    is_quiescent: Arc<AtomicBool>,
    calls: Arc<AtomicU32>,
}

impl Busy {
    fn count(&self) {
        self.calls.fetch_add(1, SeqCst);
    }
}

impl Device for Busy {
    fn kind(&self) -> u32 {
        42
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[8]
    }

    fn features(&self) -> u64 {
        0
    }

    fn configuration(&self) -> Vec<u8> {
        vec![0; 8]
    }

    fn write_configuration(&mut self, _: usize, _: &[u8]) {
        self.count();
    }

    fn activate(&mut self, _: u64, _: &mut Queues, _: &Watcher) -> Result<(), DeviceError> {
        self.count();
        Ok(())
    }

    fn serve(&mut self, _: Event, _: &mut Queues) -> Result<(), DeviceError> {
        self.count();
        Ok(())
    }

    fn reset(&mut self) {}

    fn is_quiescent(&mut self) -> bool {
        self.is_quiescent.load(SeqCst)
    }
}

/// A driver that has begun to reset its busy device, and the device.
fn resetting() -> (Driver, Busy) {
    let device = Busy::default();
    device.is_quiescent.store(true, SeqCst);
    let mut driver = Driver::started(device.clone());
    while driver.run(Some(0)) {}
    device.is_quiescent.store(false, SeqCst);
    assert_eq!(driver.transport.write(0x70, &[0; 4]), Some(GuestRequest::Retry));
    device.calls.store(0, SeqCst);
    (driver, device)
}

/// The register writes that start a device: offsets and values.
const START: [(u16, u32); 13] = [
    (0x70, 1),
    (0x70, 3),
    (0x24, 1),
    (0x20, 1),
    (0x70, 11),
    (0x30, 0),
    (0x38, 8),
    (0x80, 0x1_0000),
    (0x90, 0x1_8000),
    (0xa0, 0x1_c000),
    (0x44, 1),
    (0x70, 15),
    (0x50, 0),
];

#[test]
fn another_vcpu_cannot_start_a_device_during_a_pending_reset() {
    let (mut driver, device) = resetting();
    for (register, value) in START {
        assert_eq!(driver.transport.write(register, &value.to_le_bytes()), None, "{register:#x}");
    }
    driver.transport.write(0x100, &[1]);
    while driver.run(Some(0)) {}
    assert_eq!(device.calls.load(SeqCst), 0, "the device was called");
    assert!(driver.transport.state().is_err(), "the device still accesses memory");
    assert_eq!(driver.transport.write(0x70, &[0; 4]), Some(GuestRequest::Retry));
    device.is_quiescent.store(true, SeqCst);
    driver.write(0x70, 0);
    assert_eq!((driver.status(), driver.read(0x44)), (0, 0));
    for (register, value) in START {
        assert_eq!(driver.transport.write(register, &value.to_le_bytes()), None, "{register:#x}");
    }
    assert_eq!((driver.status(), device.calls.load(SeqCst)), (15, 0), "a vCPU's thread calls the device");
    while driver.run(Some(0)) {}
    assert_eq!(device.calls.load(SeqCst), 2, "it is activated and served");
}

#[test]
fn a_device_that_failed_before_driver_ok_is_not_activated() {
    let device = Busy::default();
    let text = serde_json::to_string(&Driver::new(device.clone()).transport.state().unwrap()).unwrap();
    let error = text.replacen("\"status\":0", "\"status\":75", 1);
    assert_ne!(error, text);
    let mut driver = Driver::new(device.clone());
    driver.transport.restore(&serde_json::from_str(&error).unwrap());
    driver.transport.write(0x70, &79_u32.to_le_bytes());
    assert_eq!((driver.needs_reset(), device.calls.load(SeqCst)), (true, 0));
}

proptest! {
    /// Whatever several vCPUs write during a pending reset, the device is in its reset state afterwards.
    #[test]
    fn no_write_takes_effect_during_a_pending_reset(
        writes in prop::collection::vec(
            prop_oneof![
                prop::sample::select(&START[..]).prop_map(|(at, value)| (at, value.to_le_bytes().to_vec())),
                (0_u16..0x200, prop::collection::vec(any::<u8>(), 0..9)),
            ],
            0..60,
        )
    ) {
        let (mut driver, device) = resetting();
        for (offset, data) in writes {
            let waits = driver.transport.write(offset, &data);
            prop_assert_eq!(waits.is_some(), offset == 0x70 && data == [0; 4]);
            while driver.run(Some(0)) {}
        }
        prop_assert_eq!(device.calls.load(SeqCst), 0);
        device.is_quiescent.store(true, SeqCst);
        driver.write(0x70, 0);
        let fresh = Driver::new(Busy::default());
        prop_assert_eq!(driver.transport.state().unwrap(), fresh.transport.state().unwrap());
    }
}
