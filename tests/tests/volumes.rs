//! Volumes (`kindling run -v NAME:/GUEST`) persist across guests, survive crashes, and have one writer at a time.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use tests::guest_console::GuestConsole;
use tests::user::{SmallTmpfs, User};
use tests::{Outcome, run, testbed};

const DATA: &str = "data:/srv/data";

/// Runs a shell script in a guest of the image with files at /srv/data.
#[track_caller]
fn shell(user: &User, options: &[&str], script: &str) -> Outcome {
    run(&mut command(user, options, script))
}

fn command(user: &User, options: &[&str], script: &str) -> Command {
    let mut command = user.command("run");
    command.args(options).arg(testbed("volumes.erofs")).args(["sh", "-c", script]);
    command
}

#[track_caller]
fn volume(user: &User, arguments: &[&str]) -> Outcome {
    run(user.command("volume").args(arguments))
}

fn disk(user: &User, name: &str) -> PathBuf {
    user.folder().join("data/kindling/volumes").join(name)
}

/// Checks a filesystem with e2fsck, without repairing it.
#[track_caller]
fn expect_clean(disk: &PathBuf) {
    run(Command::new(testbed("e2fsck")).args(["-f", "-n"]).arg(disk)).expect_status(0);
}

#[test]
fn data_in_a_volume_persists_for_the_next_guest() {
    let user = User::new();
    let write = "echo words > /srv/new/file; sleep 1000 < /dev/null > /srv/new/held 2>&1 & ls -A /srv/new";
    assert_eq!(shell(&user, &["-v", "new:/srv/new"], write).expect_status(0).stdout, "file\nheld\n");
    expect_clean(&disk(&user, "new"));
    // Read-only, which requires an empty journal.
    let outcome =
        shell(&user, &["-v", "new:/else/where:ro"], "cat /else/where/file; grep -c /else /proc/mounts");
    assert_eq!(outcome.expect_status(0).stdout, "words\n1\n");
    // The file of a volume is sparse.
    assert!(std::os::unix::fs::MetadataExt::blocks(&fs::metadata(disk(&user, "new")).unwrap()) < 64 << 11);
    assert!(user.has_no_guests());
}

/// Buffered writes are lost when the host's disk is full; the error must be reported.
#[test]
fn a_full_disk_of_the_host_is_reported() {
    let user = User::new();
    let scratch = user.folder().join("small");
    let Some(_disk) = SmallTmpfs::at(&scratch) else { return };
    let script = "dd if=/dev/zero bs=1M count=12 | tr '\\0' x > /srv/x";
    let mut command = command(&user, &["-v", "full:/srv"], script);
    let outcome = run(command.env("XDG_DATA_HOME", &scratch));
    let disk = scratch.join("kindling/volumes/full");
    outcome.expect_stderr(&format!("writing {} failed: No space left on device", disk.display()));
}

#[test]
fn a_new_volume_is_initialized_with_the_files_of_the_image() {
    let user = User::new();
    let list = "cd /srv/data; stat -c '%n %a %u %g' . tool deep/er/file; stat -c '%n %y' deep; readlink link;
        md5sum < deep/er/file";
    let expected = shell(&user, &[], list).expect_status(0).stdout.clone();
    assert_eq!(expected.lines().next(), Some(". 2770 70 71"), "{expected}");
    assert!(expected.contains("deep 2001-09-09 01:46:40.000000005"), "{expected}");
    assert_eq!(shell(&user, &["-v", DATA], list).expect_status(0).stdout, expected);
    let attributes = run(Command::new(testbed("e2fsprogs/debugfs"))
        .args(["-R", "ea_get -x /data/deep user.colour"])
        .arg(disk(&user, "data")));
    assert!(attributes.stdout.contains("62 6c 75 65 00 72 65 64"), "{attributes}");
    // Only once: removed files are not copied again.
    shell(&user, &["-v", DATA], "rm -r /srv/data/deep").expect_status(0);
    assert_eq!(shell(&user, &["-v", DATA], "ls -A /srv/data").expect_status(0).stdout, "link\ntool\n");
    expect_clean(&disk(&user, "data"));
}

#[test]
fn fsynced_data_in_a_volume_survives_a_killed_monitor() {
    let user = User::new();
    let script = "echo words | dd of=/srv/data/promise conv=fsync 2>/dev/null; echo promised; read -r line";
    let mut guest = GuestConsole::start(&mut command(&user, &["--name", "one", "-v", DATA], script));
    guest.expect("promised");
    guest.signal(libc::SIGKILL);
    guest.expect_end("signal: 9");
    // The journal must be replayed, which requires a writable disk.
    shell(&user, &["-v", "data:/srv/data:ro"], "true")
        .expect_status(2)
        .expect_stderr("was not unmounted cleanly");
    let outcome = shell(&user, &["-v", DATA], "cat /srv/data/promise; wc -l < /srv/data/deep/er/file");
    assert_eq!(outcome.expect_status(0).stdout, "words\n100000\n");
    expect_clean(&disk(&user, "data"));
}

#[test]
fn a_volume_has_one_writer_or_several_readers() {
    let user = User::new();
    let wait = "echo ready; read -r line";
    let mut writer = GuestConsole::start(&mut command(&user, &["--name", "writer", "-v", DATA], wait));
    writer.expect("ready");
    let in_use = "the volume data is in use by the guest writer";
    shell(&user, &["-v", DATA], "true").expect_status(2).expect_stderr(in_use);
    shell(&user, &["-v", "data:/x:ro"], "true").expect_status(2).expect_stderr(in_use);
    volume(&user, &["rm", "data"]).expect_status(2).expect_stderr(in_use);
    let row = volume(&user, &["ls"]).expect_status(0).stdout.clone();
    assert!(row.lines().any(|line| line.starts_with("data ") && line.ends_with(" writer")), "{row}");
    writer.send_line();
    writer.expect_status(0);
    let mut reader = GuestConsole::start(&mut command(&user, &["-v", "data:/x:ro"], wait));
    reader.expect("ready");
    let script =
        "cat /x/link | wc -l; echo more > /x/more; mount -o remount,rw /x; echo more > /x/more; ls -A /x";
    let outcome = shell(&user, &["-v", "data:/x:ro"], script);
    assert_eq!(outcome.expect_status(0).stdout, "100000\ndeep\nlink\ntool\n", "{outcome}");
    outcome.expect_stderr("Read-only file system");
    shell(&user, &["-v", DATA], "true")
        .expect_status(2)
        .expect_stderr("the volume data is in use by the guest");
    reader.send_line();
    reader.expect_status(0);
    assert_eq!(volume(&user, &["rm", "data"]).expect_status(0).stdout, "data\n");
    assert!(!disk(&user, "data").exists());
}

#[test]
fn stopping_a_guest_leaves_its_volume_clean() {
    let user = User::new();
    let script = "trap 'exit 0' TERM; while :; do echo word >> /srv/data/words; done";
    let mut started = command(&user, &["-d", "--rm", "--name", "one", "-v", DATA], script);
    run(&mut started).expect_status(0);
    run(user.command("exec").args(["one", "sh", "-c", "until [ -s /srv/data/words ]; do :; done"]))
        .expect_status(0);
    run(user.command("stop").arg("one")).expect_status(0);
    expect_clean(&disk(&user, "data"));
    shell(&user, &["-v", "data:/x:ro"], "grep -q word /x/words").expect_status(0);
}

#[test]
fn deleted_files_are_discarded_from_the_volumes_file() {
    let user = User::new();
    let blocks = || std::os::unix::fs::MetadataExt::blocks(&fs::metadata(disk(&user, "data")).unwrap());
    shell(&user, &["-v", DATA], "head -c 33554432 /dev/urandom > /srv/data/large").expect_status(0);
    let full = blocks();
    shell(&user, &["-v", DATA], "rm /srv/data/large").expect_status(0);
    assert!(blocks() + (24 << 11) < full, "{full} blocks, then {}", blocks());
}

#[test]
fn a_full_volume_affects_only_its_own_guest() {
    let user = User::new();
    volume(&user, &["create", "--size", "16M", "data"]).expect_status(0);
    let outcome = shell(
        &user,
        &["-v", DATA],
        "cat /dev/zero > /srv/data/zero; echo $?; rm /srv/data/zero; echo > /srv/data/one",
    );
    assert_eq!(outcome.expect_status(0).stdout, "1\n", "{outcome}");
    expect_clean(&disk(&user, "data"));
    volume(&user, &["create", "--size", "16M", "large"]).expect_status(0);
    // The files of the image do not fit.
    let outcome = shell(&user, &["-v", "large:/srv/large"], "true");
    let expected = "cannot copy the image's content to the volume at /srv/large: ";
    outcome.expect_status(125).expect_stderr(expected);
    // The volume is still uninitialized, and can be used at another path.
    let outcome = shell(&user, &["-v", "large:/srv/data"], "ls -A /srv/data");
    assert_eq!(outcome.expect_status(0).stdout, "deep\nlink\ntool\n");
    assert!(user.has_no_guests());
}

#[test]
fn a_guest_with_a_volume_starts_from_a_prebooted_kernel() {
    let user = User::new();
    for _ in 0..2 {
        let outcome = shell(&user, &["--report", "-v", DATA], "echo");
        outcome.expect_status(0).expect_stderr("pre-booted kernel loaded");
    }
}

#[test]
fn volumes_can_be_created_listed_inspected_and_removed() {
    let user = User::new();
    assert_eq!(volume(&user, &["ls"]).expect_status(0).stdout, "NAME  SIZE  USED  GUESTS\n");
    assert_eq!(volume(&user, &["create", "--size", "1G", "one"]).expect_status(0).stdout, "one\n");
    expect_clean(&disk(&user, "one"));
    volume(&user, &["create", "one"]).expect_status(2).expect_stderr("a volume named one exists already");
    volume(&user, &["create", "a/b"]).expect_status(2).expect_stderr("invalid volume name");
    volume(&user, &["create", "--size", "1X", "two"]).expect_status(2).expect_stderr("invalid volume size");
    let details: serde_json::Value =
        serde_json::from_str(&volume(&user, &["inspect", "one"]).expect_status(0).stdout).unwrap();
    assert_eq!((&details["name"], &details["size"]), (&"one".into(), &(1 << 30).into()), "{details}");
    let mode =
        std::os::unix::fs::PermissionsExt::mode(&fs::metadata(disk(&user, "one")).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    shell(&user, &["-v", "two:/x:ro"], "true").expect_status(2).expect_stderr("no volume named two");
    shell(&user, &["-v", "one:/x:ro"], "true").expect_status(125).expect_stderr("volume at /x: ");
    volume(&user, &["rm", "one", "two"]).expect_status(2).expect_stderr("no volume named two");
    // Nothing is left in the folder.
    let folder = disk(&user, "");
    assert_eq!(fs::read_dir(folder).unwrap().count(), 0);
    let mut without = user.command("volume");
    run(without.args(["create", "three"]).env("PATH", "/nowhere"))
        .expect_status(2)
        .expect_stderr("e2fsprogs");
}

#[test]
fn a_damaged_volume_is_reported() {
    let user = User::new();
    volume(&user, &["create", "data"]).expect_status(0);
    let file = fs::File::options().write(true).open(disk(&user, "data")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[0xff; 512], 1024).unwrap();
    drop(file);
    let outcome = shell(&user, &["-v", DATA], "true");
    outcome.expect_status(125).expect_stderr("cannot mount the volume at /srv/data: ");
}

#[test]
fn with_a_read_only_root_only_temporary_filesystems_and_volumes_are_writable() {
    let user = User::new();
    let script = "for d in / /etc /srv /root /tmp /run /dev/shm /var/tmp /srv/data; do
            echo x 2>/dev/null > $d/written && echo $d
        done; mount | grep -c ' on / .*[(]ro,'; cat /etc/hostname /etc/hosts; ls -A /srv/data";
    let outcome = shell(&user, &["--read-only", "--name", "box", "-v", DATA], script);
    let expected = "/tmp\n/run\n/dev/shm\n/var/tmp\n/srv/data\n1\nbox\n127.0.0.1\tlocalhost\n127.0.1.1\tbox\n\
                    deep\nlink\ntool\nwritten\n";
    assert_eq!(outcome.expect_status(0).stdout, expected, "{outcome}");
    shell(&user, &[], "echo x > /etc/written").expect_status(0);
}

#[test]
fn standard_paths_have_the_expected_permissions() {
    let user = User::new();
    let script = "stat -c '%a' /dev/shm /tmp; test -c /dev/pts/ptmx && echo a | cat /dev/stdin > /dev/stdout;
        echo b > /dev/fd/1; echo c > /dev/stderr; stat -c '%a %u' /etc /etc/hosts";
    let outcome = shell(&user, &[], script);
    let expected = "1777\n1777\na\nb\n755 0\n644 0\n";
    assert_eq!((outcome.expect_status(0).stdout.as_str(), outcome.stderr.as_str()), (expected, "c\n"));
}
