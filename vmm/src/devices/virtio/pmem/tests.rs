use super::*;
use crate::devices::virtio::driver::{Driver, Piece};
use crate::layout::MIB;
use proptest::prelude::*;
use std::path::Path;

const START: GuestAddress = GuestAddress(1 << 32);

/// A folder with a file of this many bytes.
fn file(length: u64) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::File::create(folder.path().join("file")).unwrap().set_len(length).unwrap();
    folder
}

fn config(path: &Path, read_only: bool) -> Config {
    Config {
        id: "pmem0".into(),
        path_on_host: path.into(),
        root_device: false,
        read_only,
        rate_limiter: None,
    }
}

fn open(folder: &tempfile::TempDir, read_only: bool) -> Result<Pmem, BackendError> {
    Pmem::open(&config(&folder.path().join("file"), read_only), START)
}

fn status(driver: &mut Driver, kind: u32) -> u32 {
    let used = driver.request(0, &[Piece::Out(kind.to_le_bytes().to_vec()), Piece::In(4)]);
    assert_eq!(used.written, 4);
    u32::from_le_bytes(used.bytes.try_into().unwrap())
}

#[test]
fn the_configuration_has_the_address_and_size() {
    let folder = file(5000);
    let pmem = open(&folder, true).unwrap();
    assert_eq!(pmem.memory().unwrap().0, START);
    let driver = Driver::started(pmem);
    let expected = [(1_u64 << 32).to_le_bytes(), (2 * MIB).to_le_bytes()].concat();
    assert_eq!(driver.configuration(0, 16), expected);
}

#[test]
fn flushes_are_completed() {
    let folder = file(2 * MIB);
    let mut driver = Driver::started(open(&folder, false).unwrap());
    assert_eq!(status(&mut driver, 0), 0);
    assert_eq!(driver.interrupts(), 1);
    assert_eq!(status(&mut driver, 1), 1, "no such request");
    // More than are popped per call, during a flush.
    for _ in 0..50 {
        driver.push(0, &[Piece::Out(vec![0; 4]), Piece::In(4)]);
    }
    driver.ring();
    for _ in 0..50 {
        assert_eq!(driver.wait(0).bytes, [0; 4]);
    }
    drop(driver);
    let mut driver = Driver::started(open(&folder, true).unwrap());
    assert_eq!(status(&mut driver, 0), 0, "there is nothing to flush");
}

#[test]
fn a_reset_waits_for_the_current_flush() {
    let folder = file(2 * MIB);
    let mut driver = Driver::started(open(&folder, false).unwrap());
    driver.push(0, &[Piece::Out(vec![0; 4]), Piece::In(4)]);
    driver.ring();
    driver.start(u64::MAX);
    assert_eq!(status(&mut driver, 0), 0);
}

#[test]
fn chains_without_request_or_status_fail_the_device_until_it_is_reset() {
    let folder = file(2 * MIB);
    let mut driver = Driver::started(open(&folder, false).unwrap());
    for pieces in [
        vec![Piece::In(4)],
        vec![Piece::Out(vec![0; 3]), Piece::In(4)],
        vec![Piece::Out(vec![0; 4])],
        vec![Piece::Out(vec![0; 4]), Piece::In(3)],
    ] {
        driver.push(0, &pieces);
        driver.ring();
        assert!(driver.needs_reset(), "{pieces:?}");
        driver.start(u64::MAX);
        assert_eq!(status(&mut driver, 0), 0);
    }
}

#[test]
fn other_devices_transfer_to_and_from_the_mapping() {
    use crate::config::devices::Entropy as EntropyConfig;
    use crate::devices::virtio::driver::WRITE;
    use crate::devices::virtio::entropy::Entropy;
    use std::os::unix::fs::FileExt;
    let folders = [file(2 * MIB), file(2 * MIB)];
    let [written, read] = [(&folders[0], false), (&folders[1], true)]
        .map(|(folder, read_only)| open(folder, read_only).unwrap().mapping);
    let behind = GuestAddress(START.0 + 128 * MIB);
    let memory = crate::memory::GuestMemory::anonymous(16 * MIB).unwrap();
    let memory = memory.with_files(vec![(START, written), (behind, read)]);
    let mut driver = Driver::with_memory(Entropy::new(&EntropyConfig::default()), memory);
    driver.start(u64::MAX);
    driver.describe(0, 0, START.0 + 4096, 4096, WRITE, 0);
    driver.offer(0, 0);
    driver.ring();
    assert_eq!(driver.pop(0).map(|used| used.written), Some(4096));
    let content = std::fs::File::open(folders[0].path().join("file")).unwrap();
    let mut bytes = [0; 3 * 4096];
    content.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes[..4096] == [0; 4096] && bytes[4096..8192] != [0; 4096] && bytes[8192..] == [0; 4096]);
    // A read-only mapping is not written by another device either.
    driver.describe(0, 0, behind.0, 4096, WRITE, 0);
    driver.offer(0, 0);
    driver.ring();
    assert!(driver.needs_reset());
}

#[test]
fn errors_name_the_file() {
    let error = |config: &Config| Pmem::open(config, START).unwrap_err().to_string();
    let missing = error(&config(Path::new("/nonexistent/file"), true));
    assert!(missing.starts_with("/nonexistent/file cannot be a pmem device: No such file"), "{missing}");
    assert!(error(&config(Path::new("/"), true)).ends_with("it is a directory"));
    assert!(
        error(&config(Path::new("/dev/null"), true)).ends_with("it is neither a file nor a block device")
    );
    let message = |folder: &tempfile::TempDir, read_only| open(folder, read_only).unwrap_err().to_string();
    assert!(message(&file(0), true).ends_with("it is empty"));
    let text = message(&file(2 * MIB + 1), false);
    assert!(
        text.contains("its 2097153 bytes are not a multiple of 2 MiB; extend it with truncate -s 4M"),
        "{text}"
    );
    let folder = file(2 * MIB);
    let written = open(&folder, false).unwrap();
    assert!(message(&folder, true).contains("it is in use"));
    assert!(message(&folder, false).contains("it is in use"));
    drop(written);
    let (first, second) = (open(&folder, true).unwrap(), open(&folder, true).unwrap());
    assert!(message(&folder, false).contains("it is in use"));
    drop((first, second));
}

proptest! {
    #[test]
    fn no_driver_harms_the_host(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        let folder = file(2 * MIB);
        Driver::new(open(&folder, false).unwrap()).misbehave(&bytes);
    }
}
