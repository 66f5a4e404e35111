//! Tests of the transport and of the chain checks, which are common to all devices.

use super::driver::{Driver, INDIRECT, NEXT, Piece, WRITE};
use super::{Chain, Device, DeviceError, Event, Queues, Watcher};
use crate::bus::BusDevice;
use proptest::prelude::*;

/// A device that replies to each chain with the bytes it has read, and has a second queue that it does not use.
#[derive(Debug, Default)]
struct Echo {
    resets: u32,
    configuration: [u8; 8],
}

impl Device for Echo {
    fn kind(&self) -> u32 {
        42
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[8, 16]
    }

    fn features(&self) -> u64 {
        1 << 5
    }

    fn configuration(&self) -> Vec<u8> {
        self.configuration.to_vec()
    }

    fn write_configuration(&mut self, offset: usize, data: &[u8]) {
        if let Some(target) = self.configuration.get_mut(offset..offset.saturating_add(data.len())) {
            target.copy_from_slice(data);
        }
    }

    fn activate(&mut self, _: u64, _: &mut Queues, _: &Watcher) -> Result<(), DeviceError> {
        Ok(())
    }

    fn serve(&mut self, _: Event, queues: &mut Queues) -> Result<(), DeviceError> {
        for _ in 0..32 {
            let Some(mut chain) = queues.pop(0)? else {
                if queues.enable_notification(0)? {
                    continue;
                }
                return queues.notify(0);
            };
            let length = chain.readable_len().min(chain.writable_len()).min(1 << 16);
            let mut bytes = vec![0; usize::try_from(length).unwrap()];
            chain.read(&mut bytes)?;
            chain.write(&bytes)?;
            queues.complete(0, chain, u32::try_from(length).unwrap())?;
        }
        queues.reschedule();
        queues.notify(0)
    }

    fn reset(&mut self) {
        self.resets += 1;
    }
}

fn echo() -> Driver {
    Driver::started(Echo::default())
}

// Offsets and bits restate section 4.2.2.

#[test]
fn the_registers_identify_the_device() {
    let driver = Driver::new(Echo::default());
    let read = |offset| driver.read(offset);
    assert_eq!([read(0), read(4), read(8)], [u32::from_le_bytes(*b"virt"), 2, 42]);
    assert_eq!([read(0x34), read(0x44), read(0x60), read(0x70)], [8, 0, 0, 0]);
    assert_eq!(read(0xb0), u32::MAX, "no shared memory");
}

#[test]
fn only_offered_features_are_accepted() {
    let status = |features: u64| {
        let mut driver = Driver::new(Echo::default());
        for status in [1, 3] {
            driver.write(0x70, status);
        }
        for (select, half) in [(0, features & 0xffff_ffff), (1, features >> 32)] {
            driver.write(0x24, select);
            driver.write(0x20, u32::try_from(half).unwrap());
        }
        driver.write(0x70, 11);
        driver.status()
    };
    let version_1 = 1 << 32;
    assert_eq!(status(version_1), 11);
    assert_eq!(status(version_1 | 1 << 5 | 1 << 28 | 1 << 29), 11);
    assert_eq!(status(0), 3, "a legacy driver");
    assert_eq!(status(version_1 | 1 << 6), 3, "a feature that was not offered");
    let mut driver = Driver::new(Echo::default());
    assert_eq!(driver.offered(), 1 << 32 | 1 << 29 | 1 << 28 | 1 << 5);
}

#[test]
fn a_driver_cannot_skip_initialization_steps() {
    let mut driver = Driver::new(Echo::default());
    driver.write(0x70, 4);
    assert_eq!(driver.status() & 4, 0, "no DRIVER_OK without FEATURES_OK");
    driver.write(0x44, 1);
    assert_eq!(driver.read(0x44), 0, "no queue without FEATURES_OK");
}

#[test]
fn queues_cannot_be_moved_after_driver_ok() {
    let mut driver = echo();
    assert_eq!(driver.request(0, &[Piece::Out(vec![1; 3]), Piece::In(3)]).bytes, [1; 3]);
    driver.write(0x30, 0);
    for (offset, value) in [(0x80, 0xffff_fff0), (0x84, 7), (0x90, 2), (0xa0, 4), (0x38, 2), (0x44, 0)] {
        driver.write(offset, value);
    }
    assert_eq!(driver.read(0x44), 1);
    assert_eq!(driver.request(0, &[Piece::Out(vec![2; 3]), Piece::In(3)]).bytes, [2; 3]);
}

#[test]
fn the_size_of_a_queue_cannot_be_changed_after_driver_ok() {
    let mut driver = echo();
    driver.write(0x30, 0);
    for size in [0, 1, 2, 4, 16, 0x8000, u32::MAX] {
        for (offset, value) in [(0x44, 0), (0x38, size), (0x44, 1)] {
            driver.write(offset, value);
        }
        let state = serde_json::to_string(&driver.transport.state().unwrap()).unwrap();
        assert!(state.contains("\"queues\":[{\"size\":8,"), "{size}: {state}");
        // Each slot of the ring once: of another size, one of them would be missed.
        for byte in 0..8 {
            assert_eq!(driver.request(0, &[Piece::Out(vec![byte]), Piece::In(1)]).bytes, [byte], "{size}");
        }
    }
}

#[test]
fn queues_outside_of_guest_memory_fail_the_device() {
    let mut driver = Driver::new(Echo::default());
    for status in [1, 3] {
        driver.write(0x70, status);
    }
    driver.write(0x24, 1);
    driver.write(0x20, 1);
    driver.write(0x70, 11);
    driver.write(0x84, 0x7fff_ffff);
    driver.write(0x44, 1);
    driver.write(0x70, 15);
    driver.run(Some(0));
    assert!(driver.needs_reset());
    assert!(driver.transport.failure().unwrap().contains("queue 0 is not in guest memory"));
}

#[test]
fn the_configuration_is_written_within_its_bounds() {
    let mut driver = echo();
    driver.transport.write(0x102, &[7, 8]);
    driver.transport.write(0x107, &[9, 9]);
    driver.transport.write(0xffff, &[1]);
    assert_eq!(driver.configuration(0, 8), [0, 0, 7, 8, 0, 0, 0, 0]);
}

#[test]
fn segments_of_any_size_make_a_chain() {
    let mut driver = echo();
    let pieces = [
        Piece::Out(vec![1; 5]),
        Piece::Out(Vec::new()),
        Piece::Out(vec![2; 4]),
        Piece::In(1),
        Piece::In(0),
        Piece::In(8),
    ];
    let used = driver.request(0, &pieces);
    assert_eq!((used.written, used.bytes), (9, [vec![1; 5], vec![2; 4]].concat()));
}

/// Offers one hand-made chain and returns the device's failure; an empty string for a valid chain.
fn verdict(describe: impl Fn(&mut Driver, u64)) -> String {
    let mut driver = echo();
    let data = driver.allocate(0x4000);
    describe(&mut driver, data);
    driver.offer(0, 0);
    driver.ring();
    assert_eq!(driver.needs_reset(), driver.transport.failure().is_some());
    driver.transport.failure().unwrap_or_default()
}

/// Writes a table of descriptors to guest memory: address, length, flags, next.
fn table(driver: &Driver, at: u64, entries: &[(u64, u32, u16, u16)]) {
    for (number, &(address, length, flags, next)) in (0_u64..).zip(entries) {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(length.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        driver.memory.write(vm_memory::GuestAddress(at + 16 * number), &bytes).unwrap();
    }
}

#[test]
fn good_chains_pass() {
    assert_eq!(verdict(|driver, data| driver.describe(0, 0, data, 16, 0, 0)), "");
    assert_eq!(
        verdict(|driver, _| driver.describe(0, 0, u64::MAX, 0, 0, 0)),
        "",
        "an empty descriptor may point anywhere"
    );
    let indirect = |driver: &mut Driver, data: u64| {
        table(driver, data, &[(data + 64, 16, NEXT, 1), (data + 80, 16, WRITE, 0)]);
        driver.describe(0, 0, data, 32, INDIRECT, 0);
    };
    assert_eq!(verdict(indirect), "");
}

/// Writes descriptors; the number is the address of memory for data.
type Describe = Box<dyn Fn(&mut Driver, u64)>;

#[test]
fn invalid_chains_fail_the_device() {
    let memory_end = 16 << 20;
    let cases: [(&str, Describe); 12] = [
        ("does not end", Box::new(|driver, data| driver.describe(0, 0, data, 16, NEXT, 0))),
        ("does not end", Box::new(|driver, data| driver.describe(0, 0, data, 16, NEXT, 8))),
        ("is not in guest memory", Box::new(move |driver, _| driver.describe(0, 0, memory_end, 1, 0, 0))),
        (
            "is not in guest memory",
            Box::new(move |driver, _| driver.describe(0, 0, memory_end - 8, 16, 0, 0)),
        ),
        ("is not in guest memory", Box::new(|driver, _| driver.describe(0, 0, u64::MAX - 7, 16, 0, 0))),
        ("is not in guest memory", Box::new(|driver, data| driver.describe(0, 0, data, u32::MAX, 0, 0))),
        (
            "a readable descriptor after a writable one",
            Box::new(|driver, data| {
                driver.describe(0, 0, data, 16, WRITE | NEXT, 1);
                driver.describe(0, 1, data, 16, 0, 0);
            }),
        ),
        (
            "does not end",
            Box::new(|driver, data| {
                // An indirect table that points to another one.
                table(driver, data, &[(data, 16, INDIRECT, 0)]);
                driver.describe(0, 0, data, 16, INDIRECT, 0);
            }),
        ),
        (
            "is longer than its queue",
            Box::new(|driver, data| {
                let entries: Vec<_> =
                    (0..9).map(|at| (data, 16, if at < 8 { NEXT } else { 0 }, at + 1)).collect();
                table(driver, data, &entries);
                driver.describe(0, 0, data, 9 * 16, INDIRECT, 0);
            }),
        ),
        (
            "is longer than its queue",
            Box::new(|driver, data| {
                // Of zero bytes each: without the limit, 65,535 of them would be processed.
                let entries: Vec<_> =
                    (0..9).map(|at| (data, 0, if at < 8 { NEXT } else { 0 }, at + 1)).collect();
                table(driver, data, &entries);
                driver.describe(0, 0, data, 9 * 16, INDIRECT, 0);
            }),
        ),
        (
            "does not end",
            Box::new(|driver, data| {
                table(driver, data, &[(data, 16, NEXT, 0)]);
                driver.describe(0, 0, data, 17, INDIRECT, 0);
            }),
        ),
        ("does not end", Box::new(|driver, _| driver.describe(0, 0, u64::MAX - 15, 16, INDIRECT, 0))),
    ];
    for (number, (expected, describe)) in cases.into_iter().enumerate() {
        let verdict = verdict(describe);
        assert!(verdict.contains(expected), "case {number}: {verdict:?} should say {expected:?}");
    }
}

/// A sum of 32 bits would be 0 again.
#[test]
fn a_chain_of_4_gib_fails_the_device() {
    const LARGE: u32 = 16 << 20;
    for (length, is_valid) in [(LARGE, false), (LARGE - 1, true)] {
        let mut driver = Driver::started(Keeper::with_queue(&[256]));
        let data = driver.allocate(256 * 16);
        let last = 255;
        let pieces: Vec<_> =
            (0..=last).map(|at| (0, length, WRITE | if at < last { NEXT } else { 0 }, at + 1)).collect();
        table(&driver, data, &pieces);
        driver.describe(0, 0, data, 256 * 16, INDIRECT, 0);
        driver.offer(0, 0);
        driver.ring();
        let failure = driver.transport.failure().unwrap_or_default();
        assert_eq!(failure.is_empty(), is_valid, "{length}: {failure}");
        assert!(is_valid || failure.contains("is longer than 4 GiB"), "{failure}");
    }
}

#[test]
fn an_available_index_that_jumps_fails_the_device() {
    let mut driver = echo();
    for _ in 0..9 {
        driver.offer(0, 0);
    }
    driver.ring();
    assert!(driver.needs_reset());
    let mut driver = echo();
    driver.offer(0, 8);
    driver.ring();
    assert!(driver.needs_reset(), "a head outside of the descriptor table");
}

/// A device that never completes a chain, like one whose host is slow.
#[derive(Debug)]
struct Keeper {
    queues: &'static [u16],
    kept: Vec<Chain>,
}

impl Keeper {
    const fn with_queue(queues: &'static [u16]) -> Self {
        Self { queues, kept: Vec::new() }
    }
}

impl Default for Keeper {
    fn default() -> Self {
        Self::with_queue(&[8])
    }
}

impl Device for Keeper {
    fn kind(&self) -> u32 {
        42
    }

    fn queue_sizes(&self) -> &'static [u16] {
        self.queues
    }

    fn features(&self) -> u64 {
        0
    }

    fn configuration(&self) -> Vec<u8> {
        Vec::new()
    }

    fn activate(&mut self, _: u64, _: &mut Queues, _: &Watcher) -> Result<(), DeviceError> {
        Ok(())
    }

    fn serve(&mut self, _: Event, queues: &mut Queues) -> Result<(), DeviceError> {
        while let Some(chain) = queues.pop(0)? {
            self.kept.push(chain);
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.kept.clear();
    }
}

#[test]
fn a_descriptor_in_flight_cannot_be_made_available_again() {
    let mut driver = Driver::started(Keeper::default());
    for _ in 0..8 {
        driver.push(0, &[Piece::Out(vec![1])]);
    }
    driver.ring();
    assert!(!driver.needs_reset(), "a full queue is valid");
    driver.offer(0, 0);
    driver.ring();
    assert!(driver.needs_reset(), "the number of chains in flight is not limited");
    assert!(driver.transport.failure().unwrap().contains("more than its size"));
}

#[test]
fn an_available_index_that_decreases_fails_the_device() {
    for (taken, index) in [(4, 3), (8, 7), (8, 0), (1, 0), (4, 4_u16.wrapping_sub(9))] {
        let mut driver = Driver::started(Keeper::default());
        for _ in 0..taken {
            driver.push(0, &[Piece::Out(vec![1])]);
        }
        driver.ring();
        assert_eq!((driver.transport.in_flight(), driver.needs_reset()), (taken, false));
        driver.set_available(0, index);
        driver.ring();
        assert!(driver.needs_reset(), "{taken} in flight, index {index}");
        assert!(driver.transport.failure().unwrap().contains("more than its size"));
    }
}

#[test]
fn a_failed_device_is_inactive_until_it_is_reset() {
    let mut driver = echo();
    driver.offer(0, 8);
    driver.ring();
    assert!(driver.needs_reset());
    assert!(driver.interrupts() > 0);
    driver.push(0, &[Piece::Out(vec![1]), Piece::In(1)]);
    driver.ring();
    assert_eq!(driver.pop(0), None);
    driver.write(0x70, 0);
    assert_eq!([driver.status(), driver.read(0x60)], [0, 0]);
    driver.start(u64::MAX);
    assert_eq!(driver.request(0, &[Piece::Out(vec![1]), Piece::In(1)]).bytes, [1]);
}

#[test]
fn interrupts_are_suppressed_until_the_requested_index() {
    // With the event index the driver requests an interrupt for a chain by its index: not for the first, but for the
    // third.
    let mut driver = echo();
    driver.interrupts();
    driver.ask_for_interrupt_at(0, 2);
    for expected in [0, 0, 1] {
        driver.request(0, &[Piece::Out(vec![1]), Piece::In(1)]);
        assert_eq!(driver.interrupts(), expected);
    }
}

#[test]
fn the_state_contains_the_driver_s_settings() {
    let mut driver = echo();
    driver.request(0, &[Piece::Out(vec![1]), Piece::In(1)]);
    let text = serde_json::to_string(&driver.transport.state().unwrap()).unwrap();
    assert!(text.contains("\"status\":15"), "{text}");
    assert!(text.contains("\"next_available\":1,\"next_used\":1"), "{text}");
}

#[test]
fn a_device_with_requests_in_flight_cannot_be_saved() {
    let mut driver = Driver::started(Keeper::default());
    driver.transport.state().unwrap();
    for _ in 0..2 {
        driver.push(0, &[Piece::Out(vec![1])]);
    }
    driver.transport.state().unwrap();
    driver.ring();
    let error = driver.transport.state().unwrap_err();
    assert_eq!(error.to_string(), "the device device has 2 requests in flight");
    driver.start(u64::MAX);
    driver.transport.state().unwrap();
}

#[test]
fn a_state_that_no_driver_can_reach_fails_the_device() {
    let text = serde_json::to_string(&echo().transport.state().unwrap()).unwrap();
    let restored = |from: &str, to: &str| {
        let changed = text.replacen(from, to, 1);
        assert_eq!(changed == text, from == to, "{from} in {text}");
        let mut driver = Driver::new(Echo::default());
        driver.transport.restore(&serde_json::from_str(&changed).unwrap());
        driver.needs_reset()
    };
    assert!(!restored("", ""));
    for (from, to) in [
        ("\"size\":8", "\"size\":0"),
        ("\"size\":8", "\"size\":7"),
        ("\"size\":8", "\"size\":16"),
        ("\"descriptors\":65536", "\"descriptors\":65537"),
        ("\"driver\":98304", "\"driver\":98305"),
        ("\"device\":114688", "\"device\":114690"),
        ("\"driver_features\":", "\"driver_features\":1"),
        ("\"next_available\":0", "\"next_available\":3"),
        ("\"status\":15", "\"status\":7"),
    ] {
        assert!(restored(from, to), "{to} instead of {from}");
    }
}

proptest! {
    /// No sequence of accesses causes a panic, and a reset recovers the device.
    #[test]
    fn any_driver_is_survived(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        Driver::new(Echo::default()).misbehave(&bytes);
    }

    /// A device that completes no chain never holds more chains than the size of its queue.
    #[test]
    fn no_driver_makes_a_device_keep_more_than_its_queue_holds(
        bytes in prop::collection::vec(any::<u8>(), 0..600)
    ) {
        Driver::new(Keeper::default()).misbehave(&bytes);
    }

    /// Any access to any register is harmless.
    #[test]
    fn any_access_is_survived(
        accesses in prop::collection::vec((0_u16..0x1000, prop::collection::vec(any::<u8>(), 0..9)), 0..50)
    ) {
        let mut driver = echo();
        for (offset, data) in accesses {
            driver.transport.write(offset, &data);
            driver.transport.read(offset, &mut vec![0; data.len()]);
        }
        while driver.run(Some(0)) {}
        prop_assert_eq!(driver.read(0), u32::from_le_bytes(*b"virt"));
    }
}
