use super::*;
use crate::bus::{BusDevice, GuestRequest};
use crate::devices::virtio::driver::{Driver, Piece};
use rustix::fs::{FlockOperation, flock};
use std::io::Write;
use std::os::unix::fs::FileExt;

const MIB: u64 = 1 << 20;

/// A file with this content in its own folder, and a drive for it.
struct Disk {
    folder: tempfile::TempDir,
    file: File,
}

impl Disk {
    fn new(bytes: &[u8]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("disk"), bytes).unwrap();
        let file = File::open(folder.path().join("disk")).unwrap();
        Self { folder, file }
    }

    fn drive(&self) -> Drive {
        Drive::new("disk0", self.folder.path().join("disk"))
    }

    fn start(&self) -> Driver {
        Driver::started(Block::open(&self.drive()).unwrap())
    }

    fn read(&self, offset: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.file.read_exact_at(&mut bytes, offset).unwrap();
        bytes
    }
}

#[test]
fn a_file_that_is_removed_during_the_open_is_refused() {
    let disk = Disk::new(&[0; 512]);
    let path = disk.folder.path().join("disk");
    assert!(file::is_at(&disk.file, &path));
    std::fs::remove_file(&path).unwrap();
    assert!(!file::is_at(&disk.file, &path));
    std::fs::write(&path, [0; 512]).unwrap();
    assert!(!file::is_at(&disk.file, &path), "another file of the same name");
}

fn header(kind: u32, sector: u64) -> Piece {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(sector.to_le_bytes());
    Piece::Out(bytes)
}

/// Constants restated from section 5.2.6.
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

fn status(driver: &mut Driver, pieces: &[Piece]) -> u8 {
    let used = driver.request(0, pieces);
    *used.bytes.last().unwrap()
}

#[test]
fn sectors_are_read_and_written() {
    let content: Vec<u8> = (0..MIB).map(|at| (at / 512 % 251).to_le_bytes()[0]).collect();
    let disk = Disk::new(&content);
    let mut driver = disk.start();
    assert_eq!(driver.configuration(0, 8), (MIB / 512).to_le_bytes());
    let used = driver.request(0, &[header(IN, 3), Piece::In(1024), Piece::In(1)]);
    assert_eq!(used.written, 1025);
    assert_eq!(used.bytes, [vec![3; 512], vec![4; 512], vec![0]].concat());
    assert_eq!(driver.interrupts(), 1);
    let data = Piece::Out(vec![0xaa; 4096]);
    assert_eq!(status(&mut driver, &[header(OUT, 8), data, Piece::In(1)]), 0);
    assert_eq!(disk.read(8 * 512, 4096), vec![0xaa; 4096]);
    assert_eq!(disk.read(7 * 512, 512), vec![7; 512]);
    assert_eq!(disk.read(16 * 512, 512), vec![16; 512]);
    assert_eq!(status(&mut driver, &[header(FLUSH, 0), Piece::In(1)]), 0);
    let used = driver.request(0, &[header(GET_ID, 0), Piece::In(20), Piece::In(1)]);
    assert_eq!(&used.bytes[..6], b"disk0\0");
}

#[test]
fn ranges_are_discarded_and_zeroed() {
    let disk = Disk::new(&vec![1; 64 << 10]);
    let mut driver = disk.start();
    let range = |sector: u64, count: u32, flags: u32| {
        let mut bytes = sector.to_le_bytes().to_vec();
        bytes.extend(count.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        Piece::Out(bytes)
    };
    assert_eq!(status(&mut driver, &[header(DISCARD, 0), range(0, 8, 0), Piece::In(1)]), 0);
    assert_eq!(disk.read(0, 4096), vec![0; 4096]);
    assert_eq!(disk.read(4096, 1), [1]);
    assert_eq!(status(&mut driver, &[header(WRITE_ZEROES, 0), range(16, 8, 1), Piece::In(1)]), 0);
    assert_eq!(disk.read(8192, 4096), vec![0; 4096]);
    for (sector, count, flags, expected) in
        [(127, 2, 0, 1), (u64::MAX, 1, 0, 1), (u64::MAX / 512, 1, 0, 1), (0, 0, 0, 1), (0, 1, 2, 2)]
    {
        let pieces = [header(DISCARD, 0), range(sector, count, flags), Piece::In(1)];
        assert_eq!(status(&mut driver, &pieces), expected, "{sector} {count} {flags}");
    }
}

#[test]
fn write_zeroes_allocates_nothing_in_a_sparse_file() {
    use std::os::unix::fs::MetadataExt;
    let disk = Disk::new(&[]);
    let path = disk.folder.path().join("disk");
    let file = File::options().write(true).open(&path).unwrap();
    file.set_len(1 << 30).unwrap();
    file.write_all_at(&[7; 4096], 8192).unwrap();
    let place = || std::fs::metadata(&path).unwrap().blocks() * 512;
    let before = place();
    let mut driver = disk.start();
    let all = |flags: u32| {
        let range = [&0_u64.to_le_bytes()[..], &(1_u32 << 21).to_le_bytes(), &flags.to_le_bytes()].concat();
        [header(WRITE_ZEROES, 0), Piece::Out(range), Piece::In(1)]
    };
    for flags in [0, 1] {
        assert_eq!(status(&mut driver, &all(flags)), 0);
        assert!(place() <= before, "{before} bytes became {}", place());
        assert_eq!(disk.read(8192, 4096), vec![0; 4096]);
    }
    assert_eq!(file.metadata().unwrap().len(), 1 << 30);
}

#[test]
fn write_zeroes_keeps_the_allocation() {
    use std::os::unix::fs::MetadataExt;
    let disk = Disk::new(&vec![1; 64 << 10]);
    // tmpfs does not support it and returns an error: the guest's driver writes zeroes in that case.
    let is_memory = rustix::fs::fstatfs(&disk.file).unwrap().f_type == libc::TMPFS_MAGIC;
    let place = || disk.file.metadata().unwrap().blocks();
    disk.file.sync_all().unwrap();
    let before = place();
    let mut driver = disk.start();
    let range = [&16_u64.to_le_bytes()[..], &8_u32.to_le_bytes(), &0_u32.to_le_bytes()].concat();
    let status = status(&mut driver, &[header(WRITE_ZEROES, 0), Piece::Out(range), Piece::In(1)]);
    assert_eq!(status, if is_memory { 2 } else { 0 });
    assert_eq!(disk.read(8192, 4096), vec![if is_memory { 1 } else { 0 }; 4096]);
    assert_eq!(place(), before);
}

#[test]
fn invalid_requests_get_an_error_and_do_not_fail_the_device() {
    let disk = Disk::new(&[0; 4096]);
    let mut driver = disk.start();
    for (kind, sector, expected) in
        [(IN, 8, 1), (IN, 7, 1), (IN, u64::MAX, 1), (IN, u64::MAX / 512, 1), (5, 0, 2), (u32::MAX, 0, 2)]
    {
        let pieces = [header(kind, sector), Piece::In(1024), Piece::In(1)];
        assert_eq!(status(&mut driver, &pieces), expected, "{kind} {sector}");
    }
    assert_eq!(status(&mut driver, &[header(IN, 0), Piece::In(100), Piece::In(1)]), 1, "half a sector");
    assert_eq!(status(&mut driver, &[header(IN, 0), Piece::In(1)]), 1, "no sector");
    assert!(!driver.needs_reset());
}

#[test]
fn a_read_only_drive_refuses_writes() {
    let disk = Disk::new(&[1; 4096]);
    let drive = Drive { is_read_only: true, ..disk.drive() };
    let mut driver = Driver::started(Block::open(&drive).unwrap());
    assert_ne!(driver.offered() & 1 << 5, 0);
    let range = |flags: u32| {
        Piece::Out([&0_u64.to_le_bytes()[..], &8_u32.to_le_bytes(), &flags.to_le_bytes()].concat())
    };
    for (kind, data) in [
        (OUT, Piece::Out(vec![2; 512])),
        (DISCARD, range(0)),
        (WRITE_ZEROES, range(0)),
        (WRITE_ZEROES, range(1)),
    ] {
        assert_eq!(status(&mut driver, &[header(kind, 0), data, Piece::In(1)]), 1, "{kind}");
    }
    assert_eq!(disk.read(0, 4096), [1; 4096]);
    assert_eq!(driver.transport.failure(), None, "the host was asked to change the file");
}

/// A format that is recognized by its content, with references to other files, would be the guest's choice.
#[test]
fn a_disk_is_raw_whatever_the_guest_writes_into_it() {
    // The beginning of a QCOW2 file of 1 GiB that is based on another file.
    let qcow2 = [
        &b"QFI\xfb"[..],
        &3_u32.to_be_bytes(),
        &512_u64.to_be_bytes(),
        &11_u32.to_be_bytes(),
        &16_u32.to_be_bytes(),
        &(1_u64 << 30).to_be_bytes(),
        &[0; 480],
        b"/etc/passwd",
    ]
    .concat();
    let vmdk = b"# Disk DescriptorFile\nversion=1\nRW 2097152 FLAT \"/etc/passwd\" 0\n";
    for start in [&qcow2[..], b"conectix", b"vhdxfile", b"KDMV\x01", vmdk] {
        let disk = Disk::new(&[0; 4096]);
        let mut sectors = start.to_vec();
        sectors.resize(4096, 0);
        let request = [header(OUT, 0), Piece::Out(sectors.clone()), Piece::In(1)];
        assert_eq!(status(&mut disk.start(), &request), 0);
        let mut driver = disk.start();
        assert_eq!(driver.configuration(0, 8), 8_u64.to_le_bytes());
        let used = driver.request(0, &[header(IN, 0), Piece::In(4096), Piece::In(1)]);
        assert_eq!(used.bytes, [sectors, vec![0]].concat());
    }
}

/// Also for requests with SCSI commands (types 2 and 3), which older versions of the specification have.
#[test]
fn a_reply_is_not_longer_than_its_chain() {
    let disk = Disk::new(&[0; 4096]);
    for room in [0, 1, 5, 19, 20, 21, 600] {
        let mut driver = disk.start();
        let used = driver.request(0, &[header(GET_ID, 0), Piece::In(room), Piece::In(1)]);
        let name = [&b"disk0"[..], &[0; 595]].concat();
        let room = usize::try_from(room).unwrap();
        assert_eq!(used.bytes, [&name[..room], &[0]].concat());
        assert_eq!(usize::try_from(used.written).unwrap(), room.min(20) + 1);
    }
    let mut driver = disk.start();
    for kind in [2, 3] {
        for room in [0, 4, 96] {
            let command = Piece::Out(vec![0xff; 16]);
            let used = driver.request(0, &[header(kind, 0), command, Piece::In(room), Piece::In(1)]);
            let untouched = vec![0; usize::try_from(room).unwrap()];
            assert_eq!((used.bytes, used.written), ([untouched, vec![2]].concat(), 1));
        }
    }
    assert!(!driver.needs_reset());
}

#[test]
fn direct_io_does_not_block() {
    // With direct I/O nothing is in the page cache: each request goes through io_uring.
    let content: Vec<u8> = (0..MIB).map(|at| (at / 4096).to_le_bytes()[0]).collect();
    let disk = Disk::new(&content);
    let block = match Block::open(&Drive { direct: true, ..disk.drive() }) {
        Ok(block) => block,
        // Whether direct I/O works depends on the filesystem of the temporary folder; no other error is accepted.
        Err(error) => {
            assert!(error.to_string().ends_with("its filesystem has no direct I/O"), "{error}");
            return;
        }
    };
    let mut driver = Driver::started(block);
    let mut pages = std::collections::BTreeMap::new();
    for page in 0..64 {
        let head = driver.push(0, &[header(IN, u64::from(page) * 8), Piece::In(4096), Piece::In(1)]);
        pages.insert(head, page);
    }
    driver.ring();
    for _ in 0..64 {
        let used = driver.wait(0);
        let page = pages.remove(&used.head).expect("each chain comes back once");
        assert_eq!(used.bytes, [vec![page; 4096], vec![0]].concat());
    }
}

#[test]
fn cached_requests_are_served_inline_up_to_the_budget() {
    let disk = Disk::new(&[0; 4096]);
    let mut driver = Driver::started(Block::open(&disk.drive()).unwrap().placeholder().unwrap());
    // The first doorbell is written by the transport.
    driver.ring();
    for _ in 0..70 {
        driver.push(0, &[header(IN, 0), Piece::In(512), Piece::In(1)]);
    }
    driver.write(0x50, 0);
    let mut done = 0;
    while driver.pop(0).is_some() {
        done += 1;
    }
    assert_eq!(done, 64, "no event was needed");
    for _ in 64..70 {
        driver.wait(0);
    }
}

/// A guest that continues from a kernel with this disk reads zeroes beyond its capacity until it knows its own disk's.
#[test]
fn the_capacity_of_a_placeholder_is_larger_than_that_of_any_disk() {
    let disk = Disk::new(&[0; 4096]);
    let capacity = |device: &Block| u64::from_le_bytes(*device.configuration().first_chunk().unwrap());
    let device = Block::open(&disk.drive()).unwrap();
    assert_eq!(capacity(&device), 8);
    assert!(capacity(&device.placeholder().unwrap()) >= (1 << 50) / 512);
}

#[test]
fn a_large_request_is_not_served_inline() {
    let disk = Disk::new(&vec![7; 4 << 20]);
    for (bytes, is_inline) in [(2 << 20, true), ((2 << 20) + 512, false)] {
        for kind in [IN, OUT] {
            let mut driver = Driver::started(Block::open(&disk.drive()).unwrap().placeholder().unwrap());
            driver.ring();
            let data = if kind == IN {
                Piece::In(bytes)
            } else {
                Piece::Out(vec![1; usize::try_from(bytes).unwrap()])
            };
            driver.push(0, &[header(kind, 0), data, Piece::In(1)]);
            driver.write(0x50, 0);
            assert_eq!(driver.pop(0).is_some(), is_inline, "{bytes} bytes of {kind}");
            if !is_inline {
                assert_eq!(driver.wait(0).bytes.last(), Some(&0));
            }
        }
    }
}

#[test]
fn direct_io_is_not_served_inline() {
    let disk = Disk::new(&[0; 4096]);
    if let Ok(block) = Block::open(&Drive { direct: true, ..disk.drive() }) {
        // tmpfs is memory, with and without O_DIRECT.
        let is_memory = rustix::fs::fstatfs(&disk.file).unwrap().f_type == libc::TMPFS_MAGIC;
        assert_eq!(block.serves_inline(), is_memory);
    }
}

#[test]
fn chains_without_header_or_status_fail_the_device_until_it_is_reset() {
    let disk = Disk::new(&[0; 4096]);
    for pieces in [
        vec![Piece::In(1)],
        vec![Piece::Out(vec![0; 15]), Piece::In(1)],
        vec![header(IN, 0)],
        vec![header(FLUSH, 0), Piece::In(0)],
    ] {
        let mut driver = disk.start();
        driver.push(0, &pieces);
        driver.ring();
        assert!(driver.needs_reset(), "{pieces:?}");
        assert!(driver.transport.failure().is_some());
        assert_eq!(driver.interrupts(), 1, "the driver is interrupted");
        driver.start(u64::MAX);
        assert_eq!(status(&mut driver, &[header(FLUSH, 0), Piece::In(1)]), 0, "a reset recovers the device");
        drop(driver);
    }
}

#[test]
fn a_reset_is_pending_while_the_disk_hangs_and_blocks_no_thread() {
    if io_uring::IoUring::new(1).is_err() {
        // The worker thread cannot read a pipe at an offset.
        return;
    }
    for breaks in [false, true] {
        // The disk hangs until the test writes to the pipe.
        let (reader, writer) = std::io::pipe().unwrap();
        let mut block = Block::open(&Disk::new(&[0; 4096]).drive()).unwrap();
        block.io = FileIo::slow(std::os::fd::OwnedFd::from(reader).into());
        let mut driver = Driver::started(block);
        // Dropped before the driver, whose drop would otherwise wait for the disk after a failed assertion.
        let mut writer = writer;
        let request = [header(IN, 0), Piece::In(512), Piece::In(1)];
        driver.push(0, &request);
        driver.ring();
        assert_eq!(driver.pop(0), None);
        if breaks {
            driver.offer(0, 999);
            driver.ring();
            assert!(driver.needs_reset());
        }
        let reset = |driver: &mut Driver| driver.transport.write(0x70, &[0; 4]);
        assert_eq!(reset(&mut driver), Some(GuestRequest::Retry));
        assert_eq!(reset(&mut driver), Some(GuestRequest::Retry));
        assert_ne!(driver.status(), 0);
        writer.write_all(&[7; 512]).unwrap();
        assert!(driver.run(Some(60_000)), "the completion is taken");
        assert!(!driver.run(Some(0)), "and only once");
        assert_eq!(reset(&mut driver), None);
        assert_eq!(driver.status(), 0);
        driver.start(u64::MAX);
        writer.write_all(&[8; 512]).unwrap();
        let used = driver.request(0, &request);
        assert_eq!((&used.bytes[..512], used.bytes[512]), (&[8; 512][..], 0));
    }
}

/// The host still reads the list of segments, and writes to them.
#[test]
fn a_reset_keeps_the_memory_of_a_request_in_flight() {
    if io_uring::IoUring::new(1).is_err() {
        return;
    }
    let (reader, writer) = std::io::pipe().unwrap();
    let (mut data, mut status) = ([0; 512], [0xff]);
    let mut block = Block::open(&Disk::new(&[0; 4096]).drive()).unwrap();
    block.io = FileIo::slow(std::os::fd::OwnedFd::from(reader).into());
    block.watcher = Some(crate::devices::virtio::file_io::tests::watcher());
    // Dropped before the disk, whose drop would otherwise wait for it after a failed assertion.
    let mut writer = writer;
    let request = Request {
        chain: Chain::writable_to(vec![Segment::host(&mut data)]),
        status: Segment::host(&mut status),
        operation: Operation::Read,
        offset: 0,
        length: 512,
        is_dropped: false,
    };
    block.io.submit(0, request.job(), FILE, &block.watcher.clone().unwrap()).unwrap();
    block.in_flight.push(Some(request));
    for _ in 0..2 {
        block.reset();
        assert!(!block.is_quiescent(), "the driver could use the memory for something else");
        assert!(block.in_flight[0].is_some(), "the list of segments is freed");
    }
    writer.write_all(&[7; 512]).unwrap();
    while !block.is_quiescent() {
        std::thread::yield_now();
    }
    assert!(block.in_flight[0].is_none());
    assert_eq!((data, status), ([7; 512], [0xff]), "the status belongs to no request");
}

#[test]
fn a_rate_limit_delays_requests() {
    use crate::config::devices::{RateLimiter, TokenBucket};
    let disk = Disk::new(&[0; 4096]);
    let bucket = TokenBucket { size: 2, one_time_burst: None, refill_time: 20 };
    let limiter = RateLimiter { ops: Some(bucket), bandwidth: None };
    let block = Block::open(&Drive { rate_limiter: Some(limiter), ..disk.drive() }).unwrap();
    let mut driver = Driver::started(block);
    for _ in 0..10 {
        driver.push(0, &[header(FLUSH, 0), Piece::In(1)]);
    }
    let start = Instant::now();
    driver.ring();
    let mut done = 0;
    while done < 10 {
        match driver.pop(0) {
            Some(_) => done += 1,
            None => match driver.transport.deadline() {
                Some(_) => driver.transport.serve_deadline(),
                None => assert!(driver.run(Some(60_000)), "neither an event nor a deadline"),
            },
        }
    }
    // Three pass immediately, and the others 10 ms apart: a lower bound holds on any machine.
    assert!(start.0 + 60_000_000 < Instant::now().0);
}

#[test]
fn errors_name_the_file() {
    let disk = Disk::new(&[0; 4096]);
    let error = |drive: &Drive| Block::open(drive).unwrap_err().to_string();
    let at = |path: &str| Drive { path_on_host: path.into(), ..disk.drive() };
    assert!(error(&at("/nonexistent/disk")).starts_with("/nonexistent/disk cannot be a drive: No such file"));
    assert!(error(&at("/")).ends_with("it is a directory"));
    assert!(error(&at("/dev/null")).ends_with("it is neither a file nor a block device"));
    assert!(error(&Disk::new(&[]).drive()).ends_with("it is empty"));
    assert!(error(&Disk::new(&[0; 513]).drive()).ends_with("its 513 bytes are not a multiple of 512"));
    let open = Block::open(&disk.drive()).unwrap();
    assert!(error(&disk.drive()).contains("it is in use"));
    assert!(error(&Drive { is_read_only: true, ..disk.drive() }).contains("it is in use"));
    drop(open);
    let read_only = Drive { is_read_only: true, ..disk.drive() };
    // Any process that may read a file can lock it.
    let locked = File::open(disk.drive().path_on_host).unwrap();
    flock(&locked, FlockOperation::NonBlockingLockExclusive).unwrap();
    assert!(error(&read_only).contains("it is in use"));
    Block::open_file(&read_only, ForeignLock::Ignored).unwrap();
    drop(locked);
    let (first, second) = (Block::open(&read_only).unwrap(), Block::open(&read_only).unwrap());
    assert!(error(&disk.drive()).contains("it is in use"));
    drop((first, second));
}

proptest::proptest! {
    #[test]
    fn any_driver_is_survived(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..600)) {
        let disk = Disk::new(&[0; 8192]);
        Driver::new(Block::open(&disk.drive()).unwrap()).misbehave(&bytes);
    }
}
