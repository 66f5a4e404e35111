//! Block devices: data integrity, durability of flushed writes, exclusive use, rate limits.

use kindling_vmm::config::image::sha256;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use tests::guest_console::{GuestConsole, PREAMBLE};
use tests::{boot, run, testbed};

const MIB: usize = 1 << 20;

/// A folder with disk images.
struct DiskFolder(tempfile::TempDir);

impl DiskFolder {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("cannot make a folder"))
    }

    /// Creates a disk with this content.
    fn disk(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.path().join(name);
        std::fs::write(&path, bytes).expect("cannot write a disk");
        path
    }

    /// Creates a disk with an empty ext4 filesystem.
    fn filesystem(&self) -> PathBuf {
        let path = self.0.path().join("ext4");
        std::fs::copy(testbed("ext4"), &path).expect("cannot copy a filesystem");
        path
    }
}

fn with_drive(disk: &Path, flags: &str, script: &str) -> Command {
    let mut command = boot();
    let mut drive = disk.as_os_str().to_owned();
    drive.push(flags);
    command.arg("--drive").arg(drive).args(["--", "/bin/sh", "-c", script]);
    command
}

fn content(seed: u32, length: usize) -> Vec<u8> {
    let mut state = seed;
    let next = move || {
        // The content only needs to differ between sectors.
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_le_bytes()[3]
    };
    std::iter::repeat_with(next).take(length).collect()
}

/// Checks a filesystem with e2fsck, without repairing it.
#[track_caller]
fn expect_clean(disk: &Path) {
    run(Command::new(testbed("e2fsck")).args(["-f", "-n"]).arg(disk)).expect_status(0);
}

#[test]
fn a_disk_is_read_and_written_byte_for_byte() {
    let folder = DiskFolder::new();
    let disk = folder.disk("disk", &content(1, 3 * MIB));
    let script = "
        cmp /dev/vda /dev/vda && dd if=/dev/vda of=/copy bs=1M 2>/dev/null &&
        dd if=/copy of=/dev/vda bs=64k seek=16 count=16 conv=fsync 2>/dev/null && cat /sys/none 2>/dev/null;
        dd if=/dev/vda of=/dev/vda bs=4k skip=0 seek=512 count=8 iflag=direct oflag=direct 2>/dev/null
        blockdev --getsize64 /dev/vda";
    let outcome = run(&mut with_drive(&disk, "", script));
    outcome.expect_status(0);
    assert_eq!(outcome.stdout, format!("{}\n", 3 * MIB), "{outcome}");
    let mut expected = content(1, 3 * MIB);
    expected.copy_within(0..MIB, MIB);
    expected.copy_within(0..32768, 2 * MIB);
    assert!(std::fs::read(&disk).unwrap() == expected, "the disk has unexpected content");
}

#[test]
fn a_filesystem_can_be_used_and_is_clean_afterwards() {
    let folder = DiskFolder::new();
    let disk = folder.filesystem();
    let script = "mkdir /m && mount -t ext4 /dev/vda /m && cp -r /bin /m/bin && echo words > /m/file && rm /m/bin/sh &&
        fstrim /m; umount /m";
    run(&mut with_drive(&disk, "", script)).expect_status(0);
    expect_clean(&disk);
    let script =
        "mkdir /m && mount -t ext4 -o ro /dev/vda /m && cat /m/file && cmp /bin/busybox /m/bin/busybox &&
        test ! -e /m/bin/sh";
    let outcome = run(&mut with_drive(&disk, ":ro", script));
    outcome.expect_status(0);
    assert_eq!(outcome.stdout, "words\n");
}

#[test]
fn several_disks_appear_in_the_order_of_the_command_line() {
    let folder = DiskFolder::new();
    let mut command = boot();
    for (name, letter) in [("a", b'a'), ("b", b'b'), ("c", b'c')] {
        command.arg("--drive").arg(folder.disk(name, &vec![letter; MIB]));
    }
    let script = "for d in a b c; do head -c 1 /dev/vd$d; done; tail -c 1 /dev/vdc";
    let outcome = run(command.args(["--", "/bin/sh", "-c", script]));
    outcome.expect_status(0);
    assert_eq!(outcome.stdout, "abcc", "{outcome}");
}

#[test]
fn writes_to_a_read_only_disk_do_not_reach_the_file() {
    let folder = DiskFolder::new();
    let disk = folder.disk("disk", &[b'x'; 1 << 16]);
    let script = "echo other > /dev/vda; sync; blockdev --getro /dev/vda";
    let outcome = run(&mut with_drive(&disk, ":ro", script));
    assert!(outcome.stdout.contains('1'), "{outcome}");
    assert_eq!(std::fs::read(&disk).unwrap(), [b'x'; 1 << 16]);
}

#[test]
fn a_bandwidth_limit_slows_reads_down() {
    let folder = DiskFolder::new();
    let disk = folder.disk("disk", &vec![1; MIB]);
    let seconds = |limiter: &str| -> f64 {
        let image = testbed("images/busybox");
        let file = folder.0.path().join("vm.json");
        let json = format!(
            r#"{{"boot-source": {{"kernel_image_path": "{0}/vmlinux", "initrd_path": "{0}/initramfs.cpio"}},
                "drives": [{{"drive_id": "d", "path_on_host": "{1}", "is_root_device": false,
                             "is_read_only": true{limiter}}}]}}"#,
            image.display(),
            disk.display(),
        );
        std::fs::write(&file, json).unwrap();
        let script = "read a b < /proc/uptime; cat /dev/vda > /dev/null; read c d < /proc/uptime; echo $a $c";
        let mut command = tests::kindling();
        command.args(["boot", "--config-file"]).arg(&file).args(["--", "/bin/sh", "-c", script]);
        let outcome = run(command.stdin(Stdio::null()));
        outcome.expect_status(0);
        let times: Vec<f64> = outcome.stdout.split_whitespace().map(|word| word.parse().unwrap()).collect();
        times[1] - times[0]
    };
    assert!(seconds("") < 0.5);
    // 1 MiB at 1 MiB/s, with a quarter available immediately.
    let limiter = r#", "rate_limiter": {"bandwidth": {"size": 262144, "refill_time": 250}}"#;
    let limited = seconds(limiter);
    assert!((0.5..2.0).contains(&limited), "{limited} s");
}

#[test]
fn a_disk_in_use_cannot_be_opened_by_another_guest() {
    let folder = DiskFolder::new();
    let disk = folder.disk("disk", &[0; MIB]);
    let mut first = with_drive(&disk, "", "echo started; read line");
    let mut child = first.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line.trim(), "started");
    let second = run(&mut with_drive(&disk, ":ro", "true"));
    second.expect_status(2).expect_stderr("cannot be a drive: it is in use");
    child.stdin.take().unwrap().write_all(b"go on\n").unwrap();
    assert!(child.wait().unwrap().success());
    run(&mut with_drive(&disk, "", "true")).expect_status(0);
}

/// When the monitor is killed at any moment, all data that fsync acknowledged is on the disk, and journal recovery
/// leaves a clean filesystem. `KINDLING_ROUNDS` sets the number of rounds.
#[test]
fn fsynced_data_survives_a_killed_monitor() {
    let rounds = tests::rounds(3);
    let folder = DiskFolder::new();
    let disk = folder.filesystem();
    let mut synced: u32 = 0;
    for round in 1..=rounds {
        synced = write_until_killed(&disk, round, synced);
        let intact = last_intact_file(&disk);
        assert!(
            intact >= synced,
            "round {round}: {synced} files were synced, but file {} is lost",
            intact + 1
        );
        expect_clean(&disk);
        if round % 5 == 0 {
            tests::print_progress(&format!("killed {round} times, {synced} files intact"));
        }
    }
}

/// Runs a guest that writes and fsyncs files until its monitor is killed; returns the number of the last synced file.
fn write_until_killed(disk: &Path, round: u32, mut synced: u32) -> u32 {
    let script = format!(
        "mkdir /m && mount -t ext4 /dev/vda /m || exit 1
         i={synced}
         while true; do
             i=$((i + 1))
             echo $i $i $i | dd of=/m/file.$i conv=fsync 2>/dev/null || exit 2
             echo synced $i
         done"
    );
    let mut guest = GuestConsole::start(&mut with_drive(disk, "", &script));
    // The number of files and the time of the kill within a write vary with the round.
    let mut time = Duration::ZERO;
    for _ in 0..1 + (round * 7) % 23 {
        let since = Instant::now();
        synced = guest.expect("synced ").parse().unwrap();
        time = since.elapsed();
    }
    std::thread::sleep(time * (round * 61 % 100) / 100);
    // Dropping the guest kills it.
    drop(guest);
    synced
}

/// The number of the last file of a contiguous sequence of intact files.
fn last_intact_file(disk: &Path) -> u32 {
    let script = "mkdir /m && mount -t ext4 /dev/vda /m && cat /m/file.* | sort -n |
        awk 'NF == 3 && $1 == $2 && $2 == $3 && $1 == last + 1 { last = $1 } END { print \"intact\", last + 0 }'
        umount /m && echo unmounted";
    let mut guest = GuestConsole::start(&mut with_drive(disk, "", script));
    let number = guest.expect("intact ");
    guest.expect("unmounted");
    number.parse().unwrap()
}

#[test]
fn a_direct_disk_is_read_and_written_byte_for_byte() {
    // Direct requests never complete immediately.
    let folder = DiskFolder::new();
    let disk = folder.disk("disk", &content(5, MIB));
    let script = "dd if=/dev/vda of=/dev/vda bs=64k seek=8 count=4 oflag=direct 2>/dev/null";
    let outcome = run(&mut with_drive(&disk, ":direct", script));
    if outcome.status == Some(2) {
        // The filesystem of the folder does not support direct I/O.
        outcome.expect_stderr("its filesystem has no direct I/O");
        return;
    }
    outcome.expect_status(0);
    let mut changed = content(5, MIB);
    changed.copy_within(0..MIB / 4, MIB / 2);
    assert!(std::fs::read(&disk).unwrap() == changed, "the disk has unexpected content");
}

/// A disk whose requests are asynchronous: the lab's RAM disk, or a file with direct I/O.
fn slow_disk(folder: &DiskFolder) -> PathBuf {
    let ram = PathBuf::from("/dev/ram0");
    if ram.exists() { ram } else { folder.disk("disk", &[]) }
}

/// Runs a guest that copies the first half of an asynchronous disk to its second half, and checks every byte. Returns
/// the names of the monitor's threads and the targets of its descriptors.
fn use_slow_disk(refuse_io_uring: bool) -> (String, String) {
    let folder = DiskFolder::new();
    let disk = slow_disk(&folder);
    let mut expected = content(7, 8 * MIB);
    std::fs::write(&disk, &expected).unwrap();
    // Four concurrent copies with different block sizes, each with a flush at its end.
    let script = format!(
        "{PREAMBLE} for i in 0 1 2 3; do
            dd if=/dev/vda of=/dev/vda iflag=direct oflag=direct conv=fsync bs=$((4096 << i)) \
                skip=$((i * (256 >> i))) seek=$(((i + 4) * (256 >> i))) count=$((256 >> i)) 2>/dev/null &
        done; wait; echo done; wait_line; head -c {} /dev/vda | sha256sum",
        expected.len()
    );
    let mut command = with_drive(&disk, ":direct", &script);
    if refuse_io_uring {
        tests::io_uring::refuse(&mut command);
    }
    let mut guest = GuestConsole::start(&mut command);
    guest.expect("done");
    let of_monitor = |name: &str| {
        std::fs::read_dir(guest.process().join(name)).unwrap().map(|entry| entry.unwrap().path())
    };
    let threads =
        of_monitor("task").map(|path| std::fs::read_to_string(path.join("comm")).unwrap()).collect();
    let files =
        of_monitor("fd").map(|path| std::fs::read_link(path).unwrap().display().to_string() + "\n").collect();
    guest.send_line();
    expected.copy_within(..4 * MIB, 4 * MIB);
    assert_eq!(guest.expect(""), format!("{}  -", sha256(&expected)));
    guest.expect_status(0);
    let mut found = std::fs::read(&disk).unwrap();
    found.truncate(expected.len());
    assert!(found == expected, "the disk has unexpected content");
    (threads, files)
}

#[test]
fn asynchronous_disk_requests_use_io_uring() {
    let (threads, files) = use_slow_disk(false);
    assert!(files.contains("io_uring"), "{files}");
    assert!(!threads.lines().any(|name| name == "file"), "{threads}");
}

#[test]
fn asynchronous_disk_requests_use_a_thread_if_io_uring_is_denied() {
    let (threads, files) = use_slow_disk(true);
    assert!(!files.contains("io_uring"), "{files}");
    assert!(threads.lines().any(|name| name == "file"), "{threads}");
}
