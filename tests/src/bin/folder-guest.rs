//! Exercises the file operations of programs in a shared folder of the host: `folder-guest FOLDER NAMES`, with NAMES
//! files in one directory. Panics if the result differs from that of a local filesystem.
#![expect(unsafe_code, reason = "mappings of files")]
#![expect(clippy::print_stdout, reason = "the results go to standard output")]

use rustix::fs::{AtFlags, CWD, FallocateFlags, Mode, OFlags, RenameFlags, SeekFrom, XattrFlags};
use rustix::io::Errno;
use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

fn main() -> std::process::ExitCode {
    let mut arguments = std::env::args().skip(1);
    match (arguments.next().as_deref(), arguments.next()) {
        (Some("lock"), Some(path)) => return lock(&path),
        (Some("try-flock"), Some(path)) => return try_flock(&path),
        (Some("flock"), Some(path)) => return hold_flock(&path),
        _ => {}
    }
    let folder = std::env::args_os().nth(1).expect("folder-guest FOLDER");
    std::env::set_current_dir(folder).unwrap();
    let checks: [(&str, fn()); 16] = [
        ("contents", contents),
        ("appending", appending),
        ("names", names),
        ("links", links),
        ("removed files", removed_files),
        ("directories", directories),
        ("many names", many_names),
        ("attributes", attributes),
        ("times", times),
        ("extended attributes", extended_attributes),
        ("sizes", sizes),
        ("mappings", mappings),
        ("special files", special_files),
        ("unnamed files (O_TMPFILE)", unnamed_files),
        ("locks", locks),
        ("opening a file that changes", opening_a_changing_file),
    ];
    for (name, check) in checks {
        fs::create_dir("check").unwrap();
        check();
        fs::remove_dir_all("check").unwrap();
        println!("{name}");
    }
    std::process::ExitCode::SUCCESS
}

/// A path in the folder of the current check.
fn at(name: &str) -> String {
    format!("check/{name}")
}

fn errno<T: std::fmt::Debug>(result: std::io::Result<T>) -> Errno {
    Errno::from_io_error(&result.expect_err("the operation should fail")).expect("an error of the host")
}

fn contents() {
    let data: Vec<u8> =
        (0..700_000_u32).flat_map(|number| number.wrapping_mul(40_503).to_le_bytes()).collect();
    fs::write(at("a"), &data).unwrap();
    assert!(fs::read(at("a")).unwrap() == data);
    let file = OpenOptions::new().read(true).write(true).open(at("a")).unwrap();
    file.write_all_at(b"in the middle", 1_234_567).unwrap();
    let mut chunk = [0; 13];
    file.read_exact_at(&mut chunk, 1_234_567).unwrap();
    assert_eq!(&chunk, b"in the middle");
    file.sync_all().unwrap();
    file.sync_data().unwrap();
    // Direct I/O, with lengths and offsets that are not page-aligned.
    let direct = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(at("a")).unwrap();
    let mut chunks = vec![0; 1_500_000];
    direct.read_exact_at(&mut chunks, 999).unwrap();
    assert!(chunks[..1_000_000] == data[999..1_000_999]);
    assert_eq!(direct.read_at(&mut chunks, 1 << 40).unwrap(), 0);
    File::options().write(true).truncate(true).open(at("a")).unwrap();
    assert_eq!(fs::metadata(at("a")).unwrap().len(), 0);
}

fn appending() {
    let open = || OpenOptions::new().append(true).create(true).open(at("log")).unwrap();
    let (mut first, mut second) = (open(), open());
    for _ in 0..100 {
        first.write_all(b"first ").unwrap();
        second.write_all(b"second ").unwrap();
    }
    assert_eq!(fs::read_to_string(at("log")).unwrap(), "first second ".repeat(100));
    assert_eq!(fs::metadata(at("log")).unwrap().len(), 1300);
}

fn names() {
    fs::write(at("a"), "a").unwrap();
    fs::write(at("b"), "b").unwrap();
    fs::rename(at("a"), at("b")).unwrap();
    assert_eq!(fs::read_to_string(at("b")).unwrap(), "a");
    assert_eq!(fs::metadata(at("a")).unwrap_err().kind(), ErrorKind::NotFound);
    fs::create_dir(at("d")).unwrap();
    fs::rename(at("b"), at("d/c")).unwrap();
    fs::write(at("e"), "e").unwrap();
    let rename =
        |flags| rustix::fs::renameat_with(rustix::fs::CWD, at("e"), rustix::fs::CWD, at("d/c"), flags);
    assert_eq!(rename(RenameFlags::NOREPLACE), Err(Errno::EXIST));
    rename(RenameFlags::EXCHANGE).unwrap();
    assert_eq!(
        (fs::read_to_string(at("e")).unwrap(), fs::read_to_string(at("d/c")).unwrap()),
        ("a".into(), "e".into())
    );
    let longest = "x".repeat(255);
    fs::write(at(&longest), "").unwrap();
    assert_eq!(errno(fs::write(at(&(longest + "x")), "")), Errno::NAMETOOLONG);
    // All bytes except NUL and slash are allowed.
    let odd = at("\n \t\"*?\u{1f980}\u{7f}");
    fs::write(&odd, "odd").unwrap();
    assert_eq!(fs::read_to_string(odd).unwrap(), "odd");
    assert_eq!(errno(File::create_new(at("e"))), Errno::EXIST);
}

fn links() {
    fs::write(at("a"), "one").unwrap();
    fs::hard_link(at("a"), at("b")).unwrap();
    fs::write(at("b"), "two").unwrap();
    assert_eq!(fs::read_to_string(at("a")).unwrap(), "two");
    let (a, b) = (fs::metadata(at("a")).unwrap(), fs::metadata(at("b")).unwrap());
    assert_eq!((a.ino(), a.nlink(), b.nlink()), (b.ino(), 2, 2));
    symlink("a", at("inside")).unwrap();
    assert_eq!(fs::read_to_string(at("inside")).unwrap(), "two");
    fs::hard_link(at("inside"), at("inside too")).unwrap();
    assert_eq!(fs::read_link(at("inside too")).unwrap(), Path::new("a"));
    let target = "x/".repeat(2000);
    symlink(&target, at("long")).unwrap();
    assert_eq!(fs::read_link(at("long")).unwrap(), Path::new(&target));
    symlink("loop", at("loop")).unwrap();
    assert_eq!(errno(fs::read(at("loop"))), Errno::LOOP);
}

fn removed_files() {
    let mut file = File::create_new(at("a")).unwrap();
    fs::remove_file(at("a")).unwrap();
    file.write_all(b"still there").unwrap();
    file.set_len(20).unwrap();
    let mut text = [0; 11];
    assert_eq!(file.metadata().unwrap().len(), 20);
    assert_eq!(file.metadata().unwrap().nlink(), 0);
    file.read_exact_at(&mut text, 0).unwrap();
    assert_eq!(&text, b"still there");
    let only_written = OpenOptions::new().write(true).create_new(true).open(at("c")).unwrap();
    assert_eq!(errno(only_written.read_at(&mut text, 0)), Errno::BADF);
    let mut other = OpenOptions::new().read(true).write(true).create_new(true).open(at("b")).unwrap();
    fs::remove_file(at("b")).unwrap();
    other.write_all(b"still there").unwrap();
    other.read_exact_at(&mut text, 0).unwrap();
    assert_eq!(&text, b"still there");
    let mut end = Vec::new();
    other.read_to_end(&mut end).unwrap();
    assert!(end.is_empty());
}

fn directories() {
    fs::create_dir_all(at("a/b/c")).unwrap();
    assert_eq!(errno(fs::remove_dir(at("a"))), Errno::NOTEMPTY);
    assert_eq!(errno(fs::create_dir(at("a"))), Errno::EXIST);
    assert_eq!(errno(fs::remove_file(at("a/b/c"))), Errno::ISDIR);
    fs::write(at("file"), "").unwrap();
    assert_eq!(errno(fs::read_dir(at("file"))), Errno::NOTDIR);
    assert_eq!(errno(fs::rename(at("a"), at("a/b/d"))), Errno::INVAL);
    // A renamed directory stays the current directory of processes in it.
    let before = std::env::current_dir().unwrap();
    std::env::set_current_dir(at("a/b")).unwrap();
    fs::rename("../../a", "../../z").unwrap();
    assert!(std::env::current_dir().unwrap().ends_with("check/z/b"));
    assert!(fs::metadata("../b/c").unwrap().is_dir());
    File::open(".").unwrap().sync_all().unwrap();
    std::env::set_current_dir(before).unwrap();
}

fn many_names() {
    let count: usize =
        std::env::args().nth(2).and_then(|text| text.parse().ok()).expect("folder-guest FOLDER NAMES");
    for number in 0..count {
        File::create_new(at(&format!("a file with the number {number}"))).unwrap();
    }
    let found: BTreeSet<_> = fs::read_dir("check").unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(found.len(), count);
    // Removing entries during readdir skips none.
    let mut removed = 0;
    for entry in fs::read_dir("check").unwrap() {
        fs::remove_file(entry.unwrap().path()).unwrap();
        removed += 1;
    }
    assert_eq!(removed, count);
    assert_eq!(fs::read_dir("check").unwrap().count(), 0);
}

fn attributes() {
    let path = at("a");
    let file = OpenOptions::new().write(true).create_new(true).mode(0o640).open(&path).unwrap();
    let mode = || fs::metadata(at("a")).unwrap().mode() & 0o7777;
    assert_eq!(mode(), 0o640);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o451)).unwrap();
    assert_eq!(mode(), 0o451);
    // The set-user-ID and set-group-ID bits are dropped, so that no user of the host gets the rights of the folder's
    // owner.
    fs::set_permissions(&path, fs::Permissions::from_mode(0o6755)).unwrap();
    assert_eq!(mode(), 0o755);
    let metadata = fs::metadata(&path).unwrap();
    let (user, group) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    assert_eq!((metadata.uid(), metadata.gid()), (user, group), "files belong to the user that created them");
    std::os::unix::fs::chown(&path, Some(user), Some(group)).unwrap();
    assert_eq!(errno(std::os::unix::fs::chown(&path, Some(user + 1), None)), Errno::PERM);
    assert_eq!(errno(std::os::unix::fs::chown(&path, None, Some(group + 1))), Errno::PERM);
    drop(file);
    let space = rustix::fs::statvfs("check").unwrap();
    assert!(space.f_blocks > 0 && space.f_bavail <= space.f_blocks);
}

fn times() {
    let (old, older) =
        (UNIX_EPOCH + Duration::new(1_000_000_000, 123_456_789), UNIX_EPOCH - Duration::from_secs(5));
    let file = File::create_new(at("a")).unwrap();
    let made = file.metadata().unwrap().modified().unwrap();
    file.set_times(fs::FileTimes::new().set_modified(old).set_accessed(older)).unwrap();
    let metadata = fs::metadata(at("a")).unwrap();
    assert_eq!((metadata.modified().unwrap(), metadata.accessed().unwrap()), (old, older));
    fs::write(at("a"), "new").unwrap();
    let modified = fs::metadata(at("a")).unwrap().modified().unwrap();
    assert!(modified >= made, "{modified:?} is before {made:?}");
    symlink("nowhere", at("link")).unwrap();
    let times = rustix::fs::Timestamps {
        last_access: rustix::fs::Timespec { tv_sec: 7, tv_nsec: 1 },
        last_modification: rustix::fs::Timespec { tv_sec: 8, tv_nsec: 2 },
    };
    rustix::fs::utimensat(rustix::fs::CWD, at("link"), &times, rustix::fs::AtFlags::SYMLINK_NOFOLLOW)
        .unwrap();
    let link = fs::symlink_metadata(at("link")).unwrap();
    assert_eq!((link.atime(), link.atime_nsec(), link.mtime(), link.mtime_nsec()), (7, 1, 8, 2));
}

fn extended_attributes() {
    fs::write(at("a"), "").unwrap();
    let set = |name, value: &[u8], flags| rustix::fs::setxattr(at("a"), name, value, flags);
    match set("user.one", b"1", XattrFlags::empty()) {
        // The host's filesystem does not support extended attributes.
        Err(Errno::OPNOTSUPP) => return,
        result => result.unwrap(),
    }
    let large = vec![7; 2000];
    set("user.two", &large, XattrFlags::CREATE).unwrap();
    assert_eq!(set("user.two", b"", XattrFlags::CREATE), Err(Errno::EXIST));
    assert_eq!(set("user.three", b"", XattrFlags::REPLACE), Err(Errno::NODATA));
    let mut value = [0; 4000];
    let length = rustix::fs::getxattr(at("a"), "user.two", &mut value).unwrap();
    assert_eq!(value[..length], large);
    assert_eq!(rustix::fs::getxattr(at("a"), "user.two", &mut value[..10]), Err(Errno::RANGE));
    assert_eq!(rustix::fs::getxattr(at("a"), "user.none", &mut value), Err(Errno::NODATA));
    let length = rustix::fs::listxattr(at("a"), &mut value).unwrap();
    let names: BTreeSet<_> = value[..length].split_inclusive(|byte| *byte == 0).collect();
    assert_eq!(names, BTreeSet::from([&b"user.one\0"[..], b"user.two\0"]));
    rustix::fs::removexattr(at("a"), "user.one").unwrap();
    assert_eq!(rustix::fs::removexattr(at("a"), "user.one"), Err(Errno::NODATA));
    // For other users the guest's kernel itself refuses.
    let refused = if rustix::process::getuid().is_root() { Errno::OPNOTSUPP } else { Errno::PERM };
    assert_eq!(set("trusted.a", b"", XattrFlags::empty()), Err(refused));
}

fn sizes() {
    const FAR: u64 = 5 << 30;
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(at("a")).unwrap();
    file.write_all_at(b"far", FAR).unwrap();
    let metadata = file.metadata().unwrap();
    assert_eq!(metadata.len(), FAR + 3);
    assert!(metadata.blocks() < 1 << 20, "{} blocks", metadata.blocks());
    let mut chunk = [1; 6];
    file.read_exact_at(&mut chunk, FAR - 3).unwrap();
    assert_eq!(&chunk, b"\0\0\0far");
    assert_eq!(rustix::fs::seek(&file, SeekFrom::Data(0)).unwrap() & !0xf_ffff, FAR & !0xf_ffff);
    assert_eq!(rustix::fs::seek(&file, SeekFrom::Hole(0)).unwrap(), 0);
    file.set_len(10).unwrap();
    assert_eq!(rustix::fs::seek(&file, SeekFrom::End(0)).unwrap(), 10);
    rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, 8192).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 8192);
    file.write_all_at(&[1; 8192], 0).unwrap();
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&file, hole, 0, 4096).unwrap();
    let mut bytes = [1; 8192];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes[..4096] == [0; 4096] && bytes[4096..] == [1; 4096]);
}

fn mappings() {
    use rustix::mm::{MapFlags, MsyncFlags, ProtFlags, mmap, msync, munmap};
    const LENGTH: usize = 3 * 4096;
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(at("a")).unwrap();
    file.set_len(LENGTH as u64).unwrap();
    let access = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: the mapping is new and only this program uses it.
    let address = unsafe { mmap(std::ptr::null_mut(), LENGTH, access, MapFlags::SHARED, &file, 0) }.unwrap();
    // SAFETY: the file is as long as the mapping.
    let bytes = unsafe { std::slice::from_raw_parts_mut(address.cast::<u8>(), LENGTH) };
    bytes[5000..5005].copy_from_slice(b"maped");
    // SAFETY: the range is that of the mapping.
    unsafe { msync(address, LENGTH, MsyncFlags::SYNC) }.unwrap();
    let direct = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(at("a")).unwrap();
    let mut chunk = [0; 5];
    direct.read_exact_at(&mut chunk, 5000).unwrap();
    assert_eq!(&chunk, b"maped", "a write to the mapping is visible in the file");
    file.write_all_at(b"other", 9000).unwrap();
    assert_eq!(&bytes[9000..9005], b"other", "a write to the file is visible in the mapping");
    bytes[0] = b'x';
    // SAFETY: the mapping is not used any more.
    unsafe { munmap(address, LENGTH) }.unwrap();
    drop(file);
    assert_eq!(fs::read(at("a")).unwrap()[0], b'x');
}

fn unnamed_files() {
    let flags = OFlags::TMPFILE | OFlags::RDWR;
    let file = File::from(rustix::fs::open("check", flags, Mode::from_raw_mode(0o640)).unwrap());
    file.write_all_at(b"unnamed", 0).unwrap();
    assert_eq!(fs::read_dir("check").unwrap().count(), 0);
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    rustix::fs::linkat(CWD, path, CWD, at("a"), AtFlags::SYMLINK_FOLLOW).unwrap();
    assert_eq!(fs::read(at("a")).unwrap(), b"unnamed");
    assert_eq!(fs::metadata(at("a")).unwrap().ino(), file.metadata().unwrap().ino());
}

/// flock locks conflict between open file descriptions; POSIX locks belong to a process and end with it.
fn locks() {
    use rustix::fs::{FlockOperation, fcntl_lock, flock};
    let exclusive = FlockOperation::NonBlockingLockExclusive;
    let open =
        || OpenOptions::new().read(true).write(true).create(true).truncate(false).open(at("a")).unwrap();
    let (first, second) = (open(), open());
    flock(&first, exclusive).unwrap();
    assert_eq!(flock(&second, exclusive), Err(Errno::WOULDBLOCK));
    let waiter = std::thread::spawn(move || flock(&second, FlockOperation::LockExclusive).map(|()| second));
    // The unlock may come before or after the blocking lock request.
    flock(&first, FlockOperation::Unlock).unwrap();
    let second = waiter.join().unwrap().unwrap();
    assert_eq!(flock(&first, exclusive), Err(Errno::WOULDBLOCK));
    drop(second);
    flock(&first, exclusive).unwrap();
    fcntl_lock(&first, exclusive).unwrap();
    fcntl_lock(open(), exclusive).unwrap();
    // Closing any descriptor of the file releases the process's POSIX lock.
    let status =
        std::process::Command::new(std::env::current_exe().unwrap()).args(["lock", &at("a")]).status();
    assert!(status.unwrap().success());
    fcntl_lock(&first, exclusive).unwrap();
    let status =
        std::process::Command::new(std::env::current_exe().unwrap()).args(["lock", &at("a")]).status();
    assert!(!status.unwrap().success());
}

/// Tries to take a POSIX lock on a file in a separate process.
fn lock(path: &str) -> std::process::ExitCode {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    status_of(rustix::fs::fcntl_lock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive))
}

/// Tries to take a flock lock on a file.
fn try_flock(path: &str) -> std::process::ExitCode {
    let file = File::open(path).unwrap();
    status_of(rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive))
}

/// Success if the lock was granted, failure if another process holds it.
fn status_of(result: Result<(), Errno>) -> std::process::ExitCode {
    match result {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(Errno::AGAIN) => std::process::ExitCode::FAILURE,
        Err(error) => panic!("{error}"),
    }
}

/// Waits for a flock lock, and holds it until a line arrives on standard input.
fn hold_flock(path: &str) -> std::process::ExitCode {
    let file = File::open(path).unwrap();
    rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive).unwrap();
    println!("locked");
    std::io::stdin().read_line(&mut String::new()).unwrap();
    std::process::ExitCode::SUCCESS
}

/// A file that other threads append to keeps its inode number for every open and stat.
fn opening_a_changing_file() {
    const ROUNDS: usize = 100;
    fs::write(at("a"), "").unwrap();
    let number = fs::metadata(at("a")).unwrap().ino();
    let threads: Vec<_> = (0..3)
        .map(|_| {
            std::thread::spawn(move || {
                for _ in 0..ROUNDS {
                    let mut file = OpenOptions::new().read(true).append(true).open(at("a")).unwrap();
                    file.write_all(b"x").unwrap();
                    assert_eq!(file.metadata().unwrap().ino(), number);
                    assert_eq!(fs::metadata(at("a")).unwrap().ino(), number);
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    assert_eq!(fs::read(at("a")).unwrap().len(), 3 * ROUNDS);
}

fn special_files() {
    use rustix::fs::{CWD, FileType, mknodat};
    let make = |name: &str, kind| mknodat(CWD, at(name), kind, Mode::from_raw_mode(0o600), 0x103);
    make("fifo", FileType::Fifo).unwrap();
    let writer = std::thread::spawn(|| fs::write(at("fifo"), "through"));
    assert_eq!(fs::read_to_string(at("fifo")).unwrap(), "through");
    writer.join().unwrap().unwrap();
    let listener = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
    std::os::unix::net::UnixStream::connect(at("socket")).unwrap();
    drop(listener);
    if rustix::process::getuid().is_root() {
        assert_eq!(make("device", FileType::CharacterDevice), Err(Errno::PERM));
    }
    assert_eq!(
        errno(rustix::fs::open(at("socket"), OFlags::RDONLY, Mode::empty()).map_err(Into::into)),
        Errno::NXIO
    );
}
