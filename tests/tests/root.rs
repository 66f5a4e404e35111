//! Images whose root filesystem is EROFS on a disk: the content equals the source tree, and writes go to an overlay
//! that is discarded. `xtask/src/test_root.rs` creates the tree.

use std::fs;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::process::Stdio;
use tests::{Image, Outcome, TIMEOUT, is_from_prebooted_kernel, kindling, run, start, testbed};

/// Runs a program in a guest of this image.
#[track_caller]
fn guest(options: &[&str], command: &[&str]) -> Outcome {
    guest_of("images/root", options, command)
}

#[track_caller]
fn guest_of(image: &str, options: &[&str], command: &[&str]) -> Outcome {
    run(kindling()
        .args(["boot", "--memory", "256", "--image"])
        .arg(testbed(image))
        .args(options)
        .arg("--")
        .args(command)
        .stdin(Stdio::null()))
}

#[track_caller]
fn bash(options: &[&str], script: &str) -> String {
    guest(options, &["/bin/bash", "-c", script]).expect_status(0).stdout.clone()
}

/// A Python script that lists the tree and prints the differences from `/list`.
const COMPARE: &str = r"
import hashlib, os, stat
def escaped(path):
    letter = lambda byte: chr(byte).isascii() and chr(byte).isalnum() or byte in b'/._-'
    return ''.join(chr(byte) if letter(byte) else '%%%02x' % byte for byte in path)
def lines(folder):
    for entry in os.scandir(folder or b'/'):
        path, found = folder + b'/' + entry.name, entry.stat(follow_symlinks=False)
        content, names, size = '-', found.st_nlink, found.st_size
        if stat.S_ISREG(found.st_mode):
            content = hashlib.sha256(open(path, 'rb').read()).hexdigest()
        if stat.S_ISLNK(found.st_mode):
            content = hashlib.sha256(os.readlink(path)).hexdigest()
        if stat.S_ISDIR(found.st_mode):
            names, size = 1, 0
        attributes = sorted(os.listxattr(path, follow_symlinks=False))
        values = [name + '=' + os.getxattr(path, name, follow_symlinks=False).hex() for name in attributes]
        yield '%s %o %d %d %d %d %d %s %s' % (escaped(path), found.st_mode, found.st_uid, found.st_gid, names,
                                              size, found.st_rdev, content, ','.join(values))
        if stat.S_ISDIR(found.st_mode) and not os.path.ismount(path):
            yield from lines(path)
made_by_init = {b'/' + name for name in (b'dev', b'proc', b'run', b'tmp')}
def is_listed(line):
    path = line.split(' ')[0].encode()
    return path != b'/list' and not any(path == made or path.startswith(made + b'/') for made in made_by_init)
expected = set(filter(is_listed, open('/list').read().splitlines()))
found = set(filter(is_listed, lines(b'')))
for line in sorted(expected - found)[:10]: print('missing:', line)
for line in sorted(found - expected)[:10]: print('not in the tree:', line)
print(len(expected & found) > 2500, len(expected ^ found))
";

#[test]
fn every_file_is_as_in_the_source_tree() {
    let outcome = guest(&[], &["/usr/bin/python", "-B", "-c", COMPARE]);
    assert_eq!(outcome.expect_status(0).stdout, "True 0\n", "{outcome}");
}

#[test]
fn every_file_of_a_container_image_is_as_in_the_source_tree() {
    let outcome = guest_of("images/oci", &["--user", "0"], &["/usr/bin/python", "-B", "-c", COMPARE]);
    assert_eq!(outcome.expect_status(0).stdout, "True 0\n", "{outcome}");
}

#[test]
fn programs_of_a_distribution_run() {
    let script = "declare -a words=(a b c); echo ${#words[@]} $BASH; sort <(printf '2\\n1\\n') | head -n 1; \
                  python -c 'import sys, os; print(sys.version_info.major, os.getpid() > 1, os.getcwd())'";
    assert_eq!(bash(&[], script), "3 /bin/bash\n1\n3 True /\n");
    assert_eq!(bash(&["--user", "1000:100", "--workdir", "/usr/bin"], "id -u; pwd"), "1000\n/usr/bin\n");
}

#[test]
fn init_mounts_the_kernels_filesystems_over_the_root() {
    let script = "while read -r device path kind rest; do echo $path $kind; done < /proc/mounts; \
                  test -e /overlay; echo $?; test -c /dev/null && test -c /dev/pts/ptmx && test -w /tmp; echo $?";
    let expected = "/ overlay\n/dev devtmpfs\n/dev/mqueue mqueue\n/dev/pts devpts\n/dev/shm tmpfs\n/proc proc\n/run tmpfs\n/tmp tmpfs\n1\n0\n";
    let found = bash(&[], script);
    let (mounts, rest) = found.split_at(found.len() - 4);
    let mut mounts: Vec<_> = mounts.lines().collect();
    mounts.sort_unstable();
    assert_eq!(mounts.join("\n") + "\n" + rest, expected);
}

#[test]
fn file_capabilities_take_effect() {
    // Only root can set file capabilities, so they are missing in testbeds of other users.
    let script =
        "if [ -e /odd/capable ]; then /odd/capable/busybox grep CapEff /proc/self/status; else echo none; fi";
    let found = bash(&["--user", "1000"], script);
    let is_there = bash(&[], "[[ $(< /list) == *security.capability=* ]]; echo $?") == "0\n";
    assert_eq!(found, if is_there { "CapEff:\t0000000002000000\n" } else { "none\n" });
}

#[test]
fn writes_are_discarded_with_the_guest() {
    let content = || fs::read(testbed("images/root/root.erofs")).unwrap();
    let before = content();
    let script = "cat /odd/plain; echo; test -e /odd/many/7; echo $?; test -e /new; echo $?; \
                  echo changed > /odd/plain; rm -r /odd/many; mkdir /new; mv /odd/sticky /new/; cat /odd/plain; ls /new";
    for _ in 0..2 {
        assert_eq!(bash(&[], script), "plain\n0\n1\nchanged\nsticky\n");
    }
    assert!(content() == before, "the image has changed");
}

#[test]
fn two_guests_can_use_one_image_concurrently() {
    let mut command = kindling();
    command.args(["boot", "--memory", "256", "--image"]).arg(testbed("images/root"));
    command.args(["--", "/bin/bash", "-c", "stty -echo; echo first > /odd/plain; read line; cat /odd/plain"]);
    let mut first = start(command.stdin(Stdio::piped()));
    // The first guest waits for input, which it gets after the second guest has run to its end.
    let mut input = first.child.stdin.take().unwrap();
    assert_eq!(bash(&[], "cat /odd/plain; echo second > /odd/plain"), "plain");
    writeln!(input, "go on").unwrap();
    let outcome = first.finish_within(TIMEOUT);
    assert!(outcome.expect_status(0).stdout.ends_with("first\n"), "{outcome}");
}

#[test]
fn drives_precede_the_root_disk_in_the_device_names() {
    let scratch = tempfile::tempdir().unwrap();
    let drive = scratch.path().join("drive");
    fs::write(&drive, [b'd'; 4096]).unwrap();
    let script = "head -c 4 /dev/vda; echo; head -c 1028 /dev/vdb | tail -c 4 | od -An -tx1; \
                  (echo x > /dev/vdb) 2>/dev/null || echo read-only";
    // The EROFS magic number, 0xe0f5e1e2, is at offset 1024 (fs/erofs/erofs_fs.h).
    assert_eq!(bash(&["--drive", drive.to_str().unwrap()], script), "dddd\n e2 e1 f5 e0\nread-only\n");
}

#[test]
fn the_initrd_option_replaces_the_root_disk() {
    let initramfs = testbed("images/busybox/initramfs.cpio");
    let outcome = guest(
        &["--initrd", initramfs.to_str().unwrap()],
        &["/bin/sh", "-c", "ls /odd 2>&1; ls /dev/vd* 2>&1; grep -c overlay /proc/mounts"],
    );
    let expected = "ls: /odd: No such file or directory\nls: /dev/vd*: No such file or directory\n0\n";
    assert_eq!(outcome.stdout, expected, "{outcome}");
}

/// `build-image --from` keeps the command, environment and user of the container image.
#[test]
fn an_image_from_a_container_image_runs_its_command() {
    let of_image = guest_of("images/oci", &[], &[]);
    assert_eq!(of_image.expect_status(0).stdout, "word image /\n/odd\n7\n8\n", "{of_image}");
    let command = ["/bin/bash", "-c", "echo $WORD $OTHER; pwd; id -u"];
    let other = guest_of("images/oci", &["-e", "OTHER=mine", "--user", "9", "--workdir", "/etc"], &command);
    assert_eq!(other.expect_status(0).stdout, "word mine\n/etc\n9\n", "{other}");
}

/// Boots a guest whose root filesystem is damaged at an offset.
#[track_caller]
fn damaged(at: u64, bytes: &[u8], expected: &str) {
    let image = Image::copy_of("root");
    let root = fs::File::options().write(true).open(image.path().join("root.erofs")).unwrap();
    root.write_all_at(bytes, at).unwrap();
    let outcome = run(image.command("boot").args(["--", "/bin/bash", "-c", "true"]));
    // Messages of the kernel precede the last line.
    let last = outcome.expect_status(120).stdout.lines().last().unwrap_or_default();
    assert!(last.starts_with(expected), "{outcome}");
}

#[test]
fn init_reports_a_damaged_superblock() {
    let expected = "init: cannot mount the read-only layer of the image's root filesystem on /dev/vda: ";
    damaged(1024, &[0; 128], expected);
    // The checksum does not match a changed UUID.
    damaged(1024 + 48, &[0xff; 16], expected);
}

/// The kernel is pre-booted with a placeholder disk instead of the root.
#[test]
fn guests_with_an_erofs_root_start_from_a_prebooted_kernel() {
    let image = Image::copy_of("root");
    run(image.command("preboot").args(["--memory", "256"]))
        .expect_status(0)
        .expect_stderr("1-256-r; `kindling boot` continues from it");
    let report = image.path().join("report.json");
    for _ in 0..2 {
        let mut command = image.command("boot");
        command.args(["--memory", "256", "--report-json"]).arg(&report);
        let outcome = run(command.args(["--", "/bin/bash", "-c", "cat /odd/plain; echo x > /odd/plain"]));
        assert_eq!(outcome.expect_status(0).stdout, "plain", "{outcome}");
        assert!(is_from_prebooted_kernel(&report), "{outcome}");
    }
}
