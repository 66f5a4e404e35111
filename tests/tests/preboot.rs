//! Guests that start from a pre-booted kernel are complete and independent.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};
use tests::guest_console::{GuestConsole, PREAMBLE};
use tests::{Image, is_from_prebooted_kernel, run, testbed};

fn image() -> Image {
    Image::copy_of("busybox")
}

#[test]
fn guests_from_a_prebooted_kernel_have_their_own_payload_user_and_hostname() {
    let image = image();
    let _ = image.preboot("1", "128");
    let script = "echo $A; id -u; hostname; ls /proc/1/exe >/dev/null && ifconfig lo | grep -c UP; exit 7";
    for _ in 0..2 {
        let outcome = image.prebooted_shell(&["--env", "A=b", "--user", "0", "--hostname", "box"], script);
        assert_eq!(outcome.expect_status(7).stdout, "b\n0\nbox\n1\n", "{outcome}");
    }
    let outcome = image.prebooted_shell(&[], "kill -KILL $$");
    outcome.expect_status(128 + 9);
}

#[test]
fn guests_from_one_prebooted_kernel_have_different_random_numbers() {
    let image = image();
    let _ = image.preboot("1", "128");
    let script = "cat /proc/sys/kernel/random/uuid /proc/sys/kernel/random/boot_id; \
                  head -c 16 /dev/urandom | od -An -tx1; mktemp -u; cat /proc/self/maps";
    let outcomes = [(); 2].map(|()| image.prebooted_shell(&[], script).expect_status(0).stdout.clone());
    let lines = outcomes.each_ref().map(|text| text.lines().collect::<Vec<_>>());
    for (number, what) in ["uuid", "boot id", "random bytes", "temporary name"].into_iter().enumerate() {
        assert_ne!(lines[0][number], lines[1][number], "{what}");
    }
    let stack = |lines: &[&str]| lines.iter().find(|line| line.ends_with("[stack]")).unwrap().to_string();
    assert_ne!(stack(&lines[0]), stack(&lines[1]), "stack addresses");
}

/// The host maps the kernel's text in huge pages of the file, which is in memory in the lab.
#[test]
#[expect(clippy::print_stdout, reason = "skipped checks are reported")]
fn the_text_of_a_prebooted_kernel_is_in_huge_pages() {
    const TMPFS: i64 = 0x0102_1994;
    let image = image();
    let path = image.preboot("1", "128");
    if rustix::fs::statfs(&path).unwrap().f_type != TMPFS {
        println!("skipped: the host maps huge pages only of files in memory");
        return;
    }
    let script = format!("{PREAMBLE} echo ready; wait_line");
    let mut guest = GuestConsole::start(image.command("boot").args(["--", "/bin/sh", "-c", &script]));
    guest.expect("ready");
    let mappings = guest.smaps_of(path.file_name().unwrap().to_str().unwrap());
    let lines = mappings.iter().flat_map(|mapping| mapping.lines());
    let huge = lines.filter_map(|line| line.strip_prefix("ShmemPmdMapped:")?.trim().strip_suffix(" kB"));
    let kib: u64 = huge.map(|number| number.parse::<u64>().unwrap()).sum();
    // Most of the text's four.
    assert!(kib >= 3 * 2048, "{kib} KiB in huge pages");
    guest.send_line();
    guest.expect_status(0);
}

#[test]
fn a_bus_error_is_explained_if_the_file_was_truncated() {
    let image = image();
    let path = image.preboot("1", "128");
    let script = format!("{PREAMBLE} echo ready; wait_line");
    let [whole, shorter] = [(); 2].map(|()| {
        let mut guest = GuestConsole::start(image.command("boot").args(["--", "/bin/sh", "-c", &script]));
        guest.expect("ready");
        guest
    });
    // SIGBUS is sent on access to truncated pages. The signal is sent explicitly, because the guest may not access
    // any.
    whole.signal(libc::SIGBUS);
    whole.expect_end("signal: 7");
    // The VMM is stopped, so that the guest accesses nothing before the signal arrives.
    shorter.signal(libc::SIGSTOP);
    fs::File::options().write(true).open(&path).unwrap().set_len(4096).unwrap();
    shorter.signal(libc::SIGBUS);
    shorter.signal(libc::SIGCONT);
    let errors = shorter.expect_end("exit status: 125");
    let path = path.display();
    let expected =
        format!("kindling: {path} is mapped as guest memory and was truncated while the guest ran\n");
    assert_eq!(errors, expected);
}

#[test]
fn the_clock_of_a_guest_is_the_hosts() {
    let image = image();
    let _ = image.preboot("1", "128");
    // Long enough to detect a guest with the time of the boot.
    std::thread::sleep(Duration::from_secs(3));
    let seconds = || SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs();
    let before = seconds();
    let outcome = image.prebooted_shell(&[], "date +%s");
    let guest: u64 = outcome.expect_status(0).stdout.trim().parse().unwrap();
    assert!((before..=seconds()).contains(&guest), "{guest} is not between {before} and {}", seconds());
}

#[test]
fn a_guest_from_a_prebooted_kernel_has_all_of_its_memory() {
    let image = image();
    let file = image.preboot("1", "4096");
    assert!(fs::metadata(file).unwrap().blocks() < (200 << 20) / 512, "zero pages take no space");
    let script = "grep MemTotal /proc/meminfo; dd if=/dev/zero of=/tmp/f bs=1M count=32 2>/dev/null; \
                  dd if=/tmp/f bs=1M 2>/dev/null | wc -c";
    let outcome = image.prebooted_shell(&["--memory", "4096"], script);
    let words: Vec<&str> = outcome.expect_status(0).stdout.split_whitespace().collect();
    assert!(words[1].parse::<u64>().unwrap() > 4_000_000, "{outcome}");
    assert_eq!(words[3], "33554432", "{outcome}");
}

/// Boots a guest that must not use the pre-booted kernel, and checks the reported reason.
#[track_caller]
fn expect_cold_boot(image: &Image, options: &[&str], why: &str) {
    let report = image.path().join("report.json");
    let mut command = image.command("boot");
    let outcome =
        run(command.args(options).arg("--report-json").arg(&report).args(["--", "/bin/sh", "-c", "exit 5"]));
    outcome.expect_status(5).expect_stderr(why);
    assert!(!is_from_prebooted_kernel(&report), "{outcome}");
    if why.is_empty() {
        assert_eq!(outcome.stderr, "");
    } else {
        outcome.expect_stderr("booting without it; `kindling preboot --image ... --vcpus ");
        assert_eq!(outcome.stderr.lines().count(), 2, "{outcome}");
    }
}

#[test]
fn a_guest_with_cold_or_another_configuration_boots() {
    let image = image();
    let _ = image.preboot("1", "128");
    expect_cold_boot(&image, &["--cold"], "");
    expect_cold_boot(&image, &["--verify"], "");
    expect_cold_boot(&image, &["--memory", "129"], "");
    expect_cold_boot(&image, &["--vcpus", "2"], "");
    expect_cold_boot(&image, &["--cmdline", guest_protocol::DEFAULT_COMMAND_LINE], "");
    let initrd = testbed("images/busybox/initramfs.cpio");
    expect_cold_boot(&image, &["--initrd", initrd.to_str().unwrap()], "");
    let description = image.path().join("image.json");
    let text = fs::read_to_string(&description).unwrap();
    fs::write(&description, text.replace(" quiet ", " quiet audit=0 ")).unwrap();
    expect_cold_boot(&image, &[], "preboot/1-128 was made from another image or with another command line");
}

#[test]
fn a_file_for_another_guest_size_is_not_used() {
    let image = image();
    let file = image.preboot("1", "128");
    for other in ["1-64", "2-128"] {
        fs::copy(&file, file.with_file_name(other)).unwrap();
    }
    let why = "was made for another number of vCPUs or another memory size";
    expect_cold_boot(&image, &["--memory", "64"], why);
    expect_cold_boot(&image, &["--vcpus", "2"], why);
}

#[test]
fn a_damaged_file_is_reported_and_not_used() {
    let image = image();
    let file = image.preboot("1", "128");
    let good = fs::read(&file).unwrap();
    let damaged = |change: &dyn Fn(&mut Vec<u8>), why: &str| {
        let mut bytes = good.clone();
        change(&mut bytes);
        fs::write(&file, bytes).unwrap();
        let message = format!("1-128 is neither a pre-booted kernel nor a snapshot: {why}");
        expect_cold_boot(&image, &[], &message);
    };
    damaged(&|bytes| bytes.clear(), "it is shorter than its header");
    damaged(&|bytes| bytes[0] = b'k', "it has no valid magic number");
    damaged(&|bytes| bytes[8] = 200, "its format is ");
    damaged(&|bytes| bytes[15] = 1, "its state is too long");
    damaged(&|bytes| bytes.truncate(1000), "it ends inside its state");
    damaged(&|bytes| bytes[24] ^= 1, "its state does not match its checksum");
    damaged(&|bytes| change_state(bytes, |state| state[0] = 0xff), "");
    // The state ends with the number of pages that a guest writes.
    let is_number = |state: &mut [u8]| {
        let last = state.last_mut().unwrap();
        assert!((1..128).contains(last), "{last}");
        *last = 0;
    };
    damaged(&|bytes| change_state(bytes, is_number), "its pages are not those of a guest");
    damaged(&|bytes| bytes.truncate(good.len() - 1), "it ends before its last page");
    fs::remove_file(&file).unwrap();
    fs::create_dir(&file).unwrap();
    expect_cold_boot(&image, &[], "it is not a regular file");
}

/// Changes the state in a file, and its checksum (FNV-1a of words).
fn change_state(bytes: &mut [u8], change: impl FnOnce(&mut [u8])) {
    let length = u32::from_le_bytes(bytes[12..16].try_into().unwrap()) as usize;
    let state = &mut bytes[24..24 + length];
    change(state);
    let mut sum = length as u64 ^ 0xcbf2_9ce4_8422_2325;
    let (words, rest) = state.as_chunks::<8>();
    let mut last = [0; 8];
    last[..rest.len()].copy_from_slice(rest);
    for word in words.iter().chain([&last]) {
        sum = (sum ^ u64::from_le_bytes(*word)).wrapping_mul(0x0100_0000_01b3);
    }
    bytes[16..24].copy_from_slice(&sum.to_le_bytes());
}

/// A file whose state KVM rejects is handled like a damaged one.
#[test]
fn a_guest_boots_if_kvm_rejects_the_saved_state() {
    let image = image();
    let file = image.preboot("1", "128");
    let mut bytes = fs::read(&file).unwrap();
    // CR0 with paging but without protected mode, which is invalid.
    let cr0: u64 = 0x8005_0033;
    change_state(&mut bytes, |state| {
        let at = state.windows(8).position(|window| window == cr0.to_le_bytes()).unwrap();
        state[at..at + 8].copy_from_slice(&0x8000_0000_u64.to_le_bytes());
    });
    fs::write(&file, bytes).unwrap();
    expect_cold_boot(&image, &[], "1-128: KVM refused to set a vCPU's state");
}

#[test]
fn a_damaged_image_is_not_prebooted() {
    let image = image();
    let kernel = image.path().join("vmlinux");
    let mut bytes = fs::read(&kernel).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&kernel, bytes).unwrap();
    run(&mut image.command("preboot")).expect_status(2).expect_stderr("its SHA-256 is");
}

#[test]
fn a_kernel_that_does_not_reach_init_leaves_no_file() {
    let image = image();
    let description = image.path().join("image.json");
    let text = fs::read_to_string(&description).unwrap();
    fs::write(&description, text.replace(" quiet ", " rdinit=/absent root=/dev/absent ")).unwrap();
    let outcome = run(&mut image.command("preboot"));
    outcome
        .expect_status(2)
        .expect_stderr("kindling: the guest did not reach init: the guest's kernel panicked");
    assert!(!image.path().join("preboot").exists(), "{outcome}");
}

#[test]
fn a_file_that_cannot_be_written_leaves_nothing() {
    let image = image();
    fs::write(image.path().join("preboot"), "a file, not a folder").unwrap();
    let outcome = run(&mut image.command("preboot"));
    outcome.expect_status(2).expect_stderr("cannot write");
    // A symbolic link in the image's folder is not followed.
    let elsewhere = tempfile::tempdir().unwrap();
    fs::remove_file(image.path().join("preboot")).unwrap();
    std::os::unix::fs::symlink(elsewhere.path(), image.path().join("preboot")).unwrap();
    run(&mut image.command("preboot")).expect_status(2).expect_stderr("cannot write");
    assert_eq!(fs::read_dir(elsewhere.path()).unwrap().count(), 0);
    // A file size limit simulates a full disk.
    fs::remove_file(image.path().join("preboot")).unwrap();
    let mut command = Command::new("/bin/sh");
    command.args(["-c", "ulimit -f 2048; trap '' XFSZ; exec \"$0\" preboot --image \"$1\""]);
    let outcome = run(command.arg(testbed("kindling")).arg(image.path()).stdin(Stdio::null()));
    outcome.expect_status(2).expect_stderr("File too large");
    assert!(fs::read_dir(image.path().join("preboot")).map_or(true, |mut entries| entries.next().is_none()));
}

/// Creates a disk of `mib` MiB with `start` as its first bytes.
fn disk(folder: &tempfile::TempDir, name: &str, mib: u64, start: &[u8]) -> std::path::PathBuf {
    let path = folder.path().join(name);
    fs::write(&path, start).unwrap();
    fs::File::options().write(true).open(&path).unwrap().set_len(mib << 20).unwrap();
    path
}

#[test]
fn each_guest_from_a_prebooted_kernel_has_its_own_disks() {
    let image = image();
    let folder = tempfile::tempdir().unwrap();
    let first = disk(&folder, "first", 1, b"first disk");
    let outcome = run(image.command("preboot").arg("--drive").arg(&first));
    outcome.expect_status(0).expect_stderr("preboot/1-128-d; `kindling boot` continues from it");
    assert_eq!(fs::read(&first).unwrap()[..10], *b"first disk");
    // A larger and a smaller disk, and the same disk with other content.
    for (name, mib, text) in
        [("large", 20, "large disk"), ("small", 1, "small disk"), ("first", 1, "other text")]
    {
        let path = disk(&folder, name, mib, text.as_bytes());
        let script = "blockdev --getsize64 /dev/vda; head -c 10 /dev/vda; echo changed | dd of=/dev/vda conv=fsync 2>/dev/null";
        let outcome = image.prebooted_shell(&["--drive", path.to_str().unwrap()], script);
        outcome.expect_status(0);
        assert_eq!(outcome.stdout, format!("{}\n{text}", mib << 20), "{outcome}");
        assert_eq!(fs::read(&path).unwrap()[..8], *b"changed\n");
    }
}

#[test]
fn partitions_are_read_from_the_guests_own_disk() {
    let image = image();
    let folder = tempfile::tempdir().unwrap();
    // A master boot record (UEFI specification, section 5.2.1): one partition of type Linux, one MiB from sector 2048.
    let mut record = [0; 512];
    record[446..462].copy_from_slice(&[0, 0, 0, 0, 0x83, 0, 0, 0, 0, 8, 0, 0, 0, 8, 0, 0]);
    record[510..].copy_from_slice(&[0x55, 0xaa]);
    let parted = disk(&folder, "parted", 4, &record);
    let plain = disk(&folder, "plain", 4, b"no partitions");
    run(image.command("preboot").arg("--drive").arg(&parted)).expect_status(0);
    for (path, expected) in [(&plain, "/dev/vda\n"), (&parted, "/dev/vda\n/dev/vda1\n")] {
        let outcome = image.prebooted_shell(&["--drive", path.to_str().unwrap()], "ls -1 /dev/vd*");
        assert_eq!(outcome.stdout, expected, "{outcome}");
    }
}

#[test]
fn devices_of_every_kind_work_after_a_start_from_a_prebooted_kernel() {
    let image = image();
    let folder = tempfile::tempdir().unwrap();
    let path = disk(&folder, "disk", 1, b"disk");
    let socket = folder.path().join("vsock");
    let options = |command: &mut Command| {
        command.arg("--drive").arg(&path).arg("--vsock").arg(&socket).args(["--entropy", "--balloon", "0"]);
    };
    let mut command = image.command("preboot");
    options(&mut command);
    run(&mut command).expect_status(0).expect_stderr("preboot/1-128-dveb; `kindling boot` continues from it");
    assert!(!socket.exists(), "pre-booting must not create the socket");
    let mut command = image.command("boot");
    options(&mut command);
    let report = image.path().join("report.json");
    let script = "head -c 4 /dev/vda; echo; head -c 16 /dev/hwrng | wc -c; cat /proc/interrupts";
    let outcome = run(command.arg("--report-json").arg(&report).args(["--", "/bin/sh", "-c", script]));
    outcome.expect_status(0);
    assert!(is_from_prebooted_kernel(&report), "the guest booted instead: {outcome}");
    assert!(outcome.stdout.starts_with("disk\n16\n"), "{outcome}");
    assert_eq!(outcome.stdout.matches("virtio").count(), 4, "each device must have an interrupt: {outcome}");
    assert_eq!(outcome.stderr, "", "{outcome}");
}
