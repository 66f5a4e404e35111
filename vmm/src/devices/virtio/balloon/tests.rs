use super::*;
use crate::bus::BusDevice;
use crate::devices::virtio::driver::{Driver, NEXT, Piece, WRITE};
use proptest::prelude::*;

/// Constants restated from section 5.5.
const PAGE: u64 = 4096;
const STATS: u64 = 1 << 1;
const VERSION_1: u64 = 1 << 32;
const CONFIGURATION: u16 = 0x100;

const EVERYTHING: Config = Config {
    amount_mib: 3,
    deflate_on_oom: true,
    stats_polling_interval_s: 1,
    free_page_reporting: true,
    free_page_hinting: false,
};

fn started(config: &Config) -> (Driver, Control) {
    let balloon = Balloon::new(config).unwrap();
    let control = balloon.balloon().unwrap();
    (Driver::started(balloon), control)
}

fn pages(numbers: &[u32]) -> Piece {
    Piece::Out(numbers.iter().flat_map(|number| number.to_le_bytes()).collect())
}

/// Writes a mark to each page without rings or data, and reports which marks are gone.
struct Marks(std::ops::Range<u64>);

impl Marks {
    fn new(driver: &Driver) -> Self {
        let marks = Self(1024..1536);
        for page in marks.0.clone() {
            driver.memory.write(GuestAddress(page * PAGE), &[0xaa]).unwrap();
            driver.memory.write(GuestAddress(page * PAGE + PAGE - 1), &[0xaa]).unwrap();
        }
        marks
    }

    fn gone(&self, driver: &Driver) -> Vec<u64> {
        let is_gone = |page: &u64| {
            let mut bytes = [1; 4096];
            driver.memory.read(GuestAddress(page * PAGE), &mut bytes).unwrap();
            bytes == [0; 4096]
        };
        self.0.clone().filter(is_gone).collect()
    }
}

#[test]
fn the_configuration_contains_the_target() {
    let (mut driver, control) = started(&EVERYTHING);
    assert_eq!(
        driver.configuration(0, 8),
        [0, 3, 0, 0, 0, 0, 0, 0],
        "a target of 768 pages, and an empty balloon"
    );
    assert_eq!(driver.offered() & 0xff, 0b10_0110);
    let (mut driver, _) = started(&Config::default());
    assert_eq!(driver.offered() & 0xff, 0);
    assert_eq!(control.amount(), 3);
}

#[test]
fn exactly_the_inflated_pages_are_discarded() {
    let (mut driver, _) = started(&Config::default());
    let marks = Marks::new(&driver);
    // In any order, twice, and beyond RAM.
    let named = [1026, 1025, 1030, 1025, 4096, u32::MAX, 1535, 1 << 20];
    let used = driver.request(0, &[pages(&named)]);
    assert_eq!(used.written, 0);
    assert_eq!(marks.gone(&driver), [1025, 1026, 1030, 1535]);
    assert_eq!(driver.interrupts(), 1);
    driver.request(1, &[pages(&[1025, 1026])]);
    assert_eq!(marks.gone(&driver), [1025, 1026, 1030, 1535], "deflating discards nothing");
    assert!(!driver.needs_reset());
}

#[test]
fn the_pages_of_a_chain_are_limited() {
    let (mut driver, _) = started(&Config::default());
    let marks = Marks::new(&driver);
    // A part of a number, no bytes, a writable buffer: all are ignored.
    driver.request(0, &[Piece::Out(vec![1, 4, 0])]);
    driver.request(0, &[Piece::In(4)]);
    driver.request(0, &[Piece::Out(Vec::new())]);
    assert!(marks.gone(&driver).is_empty());
    // The first page 1024 times, then a page beyond the limit.
    let mut many = vec![1024; 1024];
    many.push(1100);
    driver.request(0, &[pages(&many)]);
    assert_eq!(marks.gone(&driver), [1024]);
    assert!(!driver.needs_reset());
}

#[test]
fn a_call_ends_after_1024_pages() {
    let (mut driver, _) = started(&Config::default());
    for chain in 0..20 {
        driver.push(0, &[pages(&vec![1024 + chain; 256])]);
    }
    driver.write(0x50, 0);
    assert!(driver.run(Some(0)));
    assert_eq!(std::iter::from_fn(|| driver.pop(0)).count(), 4, "1024 pages per call");
    driver.ring();
    assert_eq!(std::iter::from_fn(|| driver.pop(0)).count(), 16);
}

#[test]
fn reported_whole_pages_are_discarded() {
    let config = Config { free_page_reporting: true, ..Config::default() };
    let (mut driver, _) = started(&config);
    let marks = Marks::new(&driver);
    // From the middle of one page into another, then whole pages, then a part of a page.
    driver.describe(2, 0, 1030 * PAGE + 1, 3 * 4096, WRITE | NEXT, 1);
    driver.describe(2, 1, 1040 * PAGE, 2 * 4096, WRITE | NEXT, 2);
    driver.describe(2, 2, 1050 * PAGE + 1, 4095, WRITE, 0);
    driver.offer(2, 0);
    driver.ring();
    assert_eq!(driver.pop(2).map(|used| used.written), Some(0));
    assert_eq!(marks.gone(&driver), [1031, 1032, 1040, 1041]);
    // Readable buffers are not reports.
    driver.describe(2, 3, 1060 * PAGE, 4096, 0, 0);
    driver.offer(2, 3);
    driver.ring();
    assert_eq!(marks.gone(&driver), [1031, 1032, 1040, 1041]);
    // Memory beyond the end violates the specification.
    driver.describe(2, 4, 4095 * PAGE, 8192, WRITE, 0);
    driver.offer(2, 4);
    driver.ring();
    assert!(driver.needs_reset());
}

#[test]
fn queue_numbers_have_no_gap_without_statistics() {
    let (mut driver, _) = started(&EVERYTHING);
    driver.start(!STATS);
    let marks = Marks::new(&driver);
    driver.describe(2, 0, 1040 * PAGE, 4096, WRITE, 0);
    driver.offer(2, 0);
    driver.ring();
    assert_eq!(marks.gone(&driver), [1040]);
    assert_eq!(driver.transport.deadline(), None);
    driver.start(u64::MAX);
    driver.describe(3, 0, 1050 * PAGE, 4096, WRITE, 0);
    driver.offer(3, 0);
    driver.ring();
    assert_eq!(marks.gone(&driver), [1040, 1050]);
}

fn entry(tag: u16, value: u64) -> Vec<u8> {
    [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()
}

#[test]
fn statistics_are_requested_at_the_polling_interval() {
    let (mut driver, control) = started(&EVERYTHING);
    assert_eq!(driver.transport.deadline(), None, "no deadline before the first statistics");
    driver.transport.serve_deadline();
    assert_eq!(control.statistics(), Statistics::default());
    let before = Instant::now();
    driver.push(2, &[Piece::Out([entry(4, 1 << 40), entry(99, 7), entry(6, 5)].concat())]);
    driver.ring();
    let deadline = driver.transport.deadline().unwrap();
    assert!(deadline.0 >= before.0 + 1_000_000_000);
    let expected =
        Statistics { free_memory: Some(1 << 40), available_memory: Some(5), ..Statistics::default() };
    assert_eq!(control.statistics(), expected);
    // Other chains do not end the interval.
    driver.request(0, &[pages(&[1024])]);
    assert_eq!(driver.transport.deadline(), Some(deadline));
    assert!(driver.pop(2).is_none(), "its completion requests the next statistics");
    driver.interrupts();
    driver.transport.serve_deadline();
    assert!(driver.pop(2).is_some());
    assert_eq!(driver.interrupts(), 1);
    assert_eq!(driver.transport.deadline(), None);
    // Too long, and with an incomplete entry at the end.
    driver.push(2, &[Piece::Out([entry(7, 9).repeat(1000), entry(4, 1), vec![1; 5]].concat())]);
    driver.ring();
    let expected = Statistics { disk_caches: Some(9), ..expected };
    assert_eq!(control.statistics(), expected);
}

#[test]
fn the_target_can_be_changed_while_the_guest_runs() {
    let (mut driver, control) = started(&EVERYTHING);
    let generation = driver.read(0xfc);
    control.set_amount(5);
    assert!(driver.run(Some(60_000)));
    assert_eq!(driver.configuration(0, 4), 1280_u32.to_le_bytes());
    assert_ne!(driver.read(0xfc), generation);
    assert_eq!(driver.interrupts(), 1);
    driver.transport.write(CONFIGURATION + 4, &1280_u32.to_le_bytes());
    assert_eq!((control.amount(), control.actual()), (5, 5));
    // The driver can change neither the target nor a part of a number.
    driver.transport.write(CONFIGURATION, &1_u32.to_le_bytes());
    driver.transport.write(CONFIGURATION + 4, &[1]);
    assert_eq!((control.amount(), control.actual()), (5, 5));
    driver.start(u64::MAX);
    assert_eq!((control.amount(), control.actual()), (5, 0), "the balloon is empty after a reset");
    control.set_amount(u64::MAX);
    assert!(driver.run(Some(60_000)));
    assert_eq!(driver.configuration(0, 4), [0xff; 4]);
}

#[test]
fn a_restored_balloon_keeps_the_actual_size() {
    let (mut driver, _) = started(&EVERYTHING);
    driver.transport.write(CONFIGURATION + 4, &77_u32.to_le_bytes());
    let state = driver.transport.state().unwrap();
    let balloon = Balloon::new(&Config { amount_mib: 1, ..EVERYTHING }).unwrap();
    assert_eq!(crate::devices::virtio::Transport::identity(&balloon), state.identity);
    let mut other = Driver::new(balloon);
    other.transport.restore(&state);
    assert_eq!(other.configuration(0, 8), [256_u32.to_le_bytes(), 77_u32.to_le_bytes()].concat());
    assert_eq!(other.interrupts(), 1, "the target is different");
    let placeholder = Balloon::new(&EVERYTHING).unwrap().placeholder();
    assert_eq!(placeholder.configuration(), [0; 16]);
}

#[test]
fn the_features_determine_the_queues() {
    for (config, count) in [
        (Config::default(), 2),
        (Config { stats_polling_interval_s: 1, ..Config::default() }, 3),
        (Config { free_page_reporting: true, ..Config::default() }, 3),
        (EVERYTHING, 4),
    ] {
        assert_eq!(Balloon::new(&config).unwrap().queue_sizes().len(), count, "{config:?}");
    }
    assert_eq!(OptionalQueues::of(VERSION_1), OptionalQueues::default());
}

proptest! {
    #[test]
    fn no_driver_harms_the_host(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        Driver::new(Balloon::new(&EVERYTHING).unwrap()).misbehave(&bytes);
    }

    #[test]
    fn exactly_the_named_pages_are_discarded(named in proptest::collection::vec(1000_u32..1600, 0..300)) {
        let (mut driver, _) = started(&Config::default());
        let marks = Marks::new(&driver);
        driver.request(0, &[pages(&named)]);
        let mut expected: Vec<u64> =
            named.into_iter().map(u64::from).filter(|page| marks.0.contains(page)).collect();
        expected.sort_unstable();
        expected.dedup();
        assert_eq!(marks.gone(&driver), expected);
    }
}
