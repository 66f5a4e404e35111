//! Tests of the protocol, with requests that a guest's kernel sends and with malformed ones.

mod locks;
mod server;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, Mode, OFlags};
use server::{O_RDWR, O_WRONLY, ROOT, Server, long, longs, number, op, text, words};
use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;

/// All requests that change something, for a file and the root.
fn changes(file: u64) -> Vec<(&'static str, u32, u64, Vec<u8>)> {
    let rename = [longs(&[ROOT]), text("file"), text("other")].concat();
    let link = [longs(&[file]), text("other")].concat();
    // FATTR_MODE of struct fuse_setattr_in.
    let mut setattr = vec![0; 88];
    setattr[0] = 1;
    setattr[68..72].copy_from_slice(&0o644_u32.to_le_bytes());
    let create = [words(&[O_RDWR | 0o100, 0o644, 0, 0]), text("other")].concat();
    let xattr = [words(&[1, 0]), text("user.a"), b"v".to_vec()].concat();
    vec![
        ("symlink", op::SYMLINK, ROOT, [text("other"), text("target")].concat()),
        ("mknod", op::MKNOD, ROOT, [words(&[0o100_644, 0, 0, 0]), text("other")].concat()),
        ("mkdir", op::MKDIR, ROOT, [words(&[0o755, 0]), text("other")].concat()),
        ("unlink", op::UNLINK, ROOT, text("file")),
        ("rmdir", op::RMDIR, ROOT, text("folder")),
        ("rename", op::RENAME, ROOT, rename),
        ("link", op::LINK, ROOT, link),
        ("setattr", op::SETATTR, file, setattr),
        ("create", op::CREATE, ROOT, create),
        ("setxattr", op::SETXATTR, file, xattr),
        ("open for writing", op::OPEN, file, words(&[O_WRONLY, 0])),
        ("open and truncate", op::OPEN, file, words(&[0o1000, 0])),
    ]
}

/// Written while a process is started: until it executes its program, it has all descriptors of this one, so that a file that
/// another thread closes is closed later for the host, and inotify reports it then.
static STARTS: std::sync::RwLock<()> = std::sync::RwLock::new(());

fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let _starts = STARTS.read().unwrap();
    fs::write(folder.path().join("file"), "content").unwrap();
    fs::create_dir(folder.path().join("folder")).unwrap();
    folder
}

#[test]
fn files_are_looked_up_read_and_written() {
    let folder = folder();
    let mut server = Server::start(folder.path(), &[]);
    let file = server.lookup(ROOT, "file").unwrap();
    let handle = server.open(file, O_RDWR).unwrap();
    assert_eq!(server.read(file, handle, 3, 100).unwrap(), b"tent");
    assert_eq!(number(&server.write(handle, 7, b" and more", 9).unwrap(), 0), 9);
    assert_eq!(fs::read_to_string(folder.path().join("file")).unwrap(), "content and more");
    let directory = long(&server.ask(op::OPENDIR, ROOT, &words(&[0, 0])).unwrap(), 0);
    let names = server.read_directory(directory);
    assert_eq!(names, ["file", "folder"]);
    assert!(server.ask(op::STATFS, ROOT, &[]).unwrap().len() >= 80);
    server.end();
}

#[test]
fn no_name_leads_out_of_the_folder() {
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("secret"), "").unwrap();
    let folder = folder();
    let out = outside.path().to_str().unwrap();
    symlink(out, folder.path().join("link")).unwrap();
    let mut server = Server::start(folder.path(), &[]);
    let inner = server.lookup(ROOT, "folder").unwrap();
    for name in ["..", ".", "", "/", "/etc", "../x", "folder/..", "link/secret", &format!("{out}/secret")] {
        for parent in [ROOT, inner] {
            assert_eq!(server.lookup(parent, name), Err(libc::EINVAL), "{name:?}");
            let made = server.ask(op::MKDIR, parent, &[words(&[0o755, 0]), text(name)].concat());
            assert_eq!(made, Err(libc::EINVAL), "{name:?}");
            let create = [words(&[O_RDWR | 0o100, 0o644, 0, 0]), text(name)].concat();
            assert_eq!(server.ask(op::CREATE, parent, &create), Err(libc::EINVAL), "{name:?}");
            let rename = [longs(&[ROOT]), text("file"), text(name)].concat();
            assert_eq!(server.ask(op::RENAME, parent, &rename), Err(libc::EINVAL), "{name:?}");
        }
    }
    // A symbolic link can be read, but is not followed.
    let link = server.lookup(ROOT, "link").unwrap();
    assert_eq!(server.ask(op::READLINK, link, &[]).unwrap(), out.as_bytes());
    assert_eq!(server.lookup(link, "secret"), Err(libc::ENOTDIR));
    assert_eq!(server.open(link, 0), Err(libc::ENXIO));
    assert_eq!(server.ask(op::OPENDIR, link, &words(&[0, 0])), Err(libc::ENXIO));
    let create = [words(&[O_RDWR | 0o100, 0o644, 0, 0]), text("link")].concat();
    assert_eq!(server.ask(op::CREATE, ROOT, &create), Err(libc::ELOOP));
    assert_eq!(
        server.ask(op::GETXATTR, link, &[words(&[0, 0]), text("user.a")].concat()),
        Err(libc::EOPNOTSUPP)
    );
    let mut setattr = vec![0; 88];
    setattr[0] = 1;
    assert_eq!(server.ask(op::SETATTR, link, &setattr), Err(libc::EOPNOTSUPP));
    server.end();
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
}

/// A filesystem that is mounted below the folder has attributes, but cannot be accessed.
#[test]
fn mount_points_are_not_crossed() {
    let mut server = Server::start(Path::new("/"), &[]);
    let mounted = server.lookup(ROOT, "proc").unwrap();
    assert_eq!(server.lookup(ROOT, "proc"), Ok(mounted));
    assert!(server.ask(op::GETATTR, mounted, &[0; 16]).is_ok());
    for name in ["self", "1", "sys", "version"] {
        assert_eq!(server.lookup(mounted, name), Err(libc::ENOENT), "{name}");
        let create = [words(&[O_RDWR | 0o100, 0o644, 0, 0]), text(name)].concat();
        assert_eq!(server.ask(op::CREATE, mounted, &create), Err(libc::EXDEV), "{name}");
    }
    let directory = long(&server.ask(op::OPENDIR, mounted, &words(&[0, 0])).unwrap(), 0);
    assert_eq!(server.read_directory(directory), [""; 0]);
    assert_eq!(server.read(mounted, directory, 0, 10), Err(libc::EBADF));
    for (name, opcode, inode, body) in changes(mounted) {
        if inode == mounted {
            let result = server.ask(opcode, mounted, &body);
            assert!(matches!(result, Err(libc::EXDEV | libc::ESTALE)), "{name}: {result:?}");
        }
    }
    for opcode in [op::OPEN, op::READLINK, op::STATFS, op::GETXATTR] {
        let result = server.ask(opcode, mounted, &[words(&[0, 0]), text("user.a")].concat());
        assert_eq!(result, Err(libc::EXDEV), "{opcode}");
    }
    server.end();
}

/// Opening a device or a FIFO could have side effects or block.
#[test]
fn only_files_and_directories_are_opened() {
    let folder = folder();
    rustix::fs::mknodat(rustix::fs::CWD, folder.path().join("fifo"), FileType::Fifo, Mode::RWXU, 0).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(folder.path().join("socket")).unwrap();
    // The reader of a FIFO would get a hangup event after a writer.
    let reading = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let reader = rustix::fs::open(folder.path().join("fifo"), reading, Mode::empty()).unwrap();
    let mut server = Server::start(folder.path(), &[]);
    for name in ["fifo", "socket"] {
        let inode = server.lookup(ROOT, name).unwrap();
        for flags in [0, O_WRONLY, O_RDWR] {
            assert_eq!(server.open(inode, flags), Err(libc::ENXIO), "{name}");
            let create = [words(&[flags | 0o100, 0o644, 0, 0]), text(name)].concat();
            assert_eq!(server.ask(op::CREATE, ROOT, &create), Err(libc::ENXIO), "{name}");
        }
    }
    let mut events = [PollFd::new(&reader, PollFlags::IN)];
    assert_eq!(poll(&mut events, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(0));
    let create = |flags: u32, name: &str| [words(&[flags, 0o644, 0, 0]), text(name)].concat();
    assert_eq!(server.ask(op::CREATE, ROOT, &create(O_RDWR | 0o100, "folder")), Err(libc::EISDIR));
    assert_eq!(server.ask(op::CREATE, ROOT, &create(O_RDWR | 0o300, "file")), Err(libc::EEXIST));
    // An existing file is opened, and truncated only with O_TRUNC.
    assert!(server.ask(op::CREATE, ROOT, &create(O_RDWR | 0o100, "file")).is_ok());
    assert_eq!(fs::read(folder.path().join("file")).unwrap(), b"content");
    assert!(server.ask(op::CREATE, ROOT, &create(O_RDWR | 0o1100, "file")).is_ok());
    assert_eq!(fs::read(folder.path().join("file")).unwrap(), b"");
    server.end();
}

/// An unnamed file (O_TMPFILE), which can be linked later.
#[test]
fn unnamed_files_can_be_created_and_linked() {
    const O_TMPFILE: u32 = 0o20_200_000;
    let folder = folder();
    let mut server = Server::start(folder.path(), &[]);
    let body = |flags| [words(&[flags, 0o4640, 0, 0]), text("/")].concat();
    let reply = server.ask(op::TMPFILE, ROOT, &body(O_RDWR | O_TMPFILE)).unwrap();
    let (inode, handle) = (long(&reply, 0), long(&reply, 128));
    server.write(handle, 0, b"nameless", 8).unwrap();
    assert_eq!(server.read(inode, handle, 0, 100).unwrap(), b"nameless");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    server.ask(op::LINK, ROOT, &[longs(&[inode]), text("linked")].concat()).unwrap();
    assert_eq!(fs::read(folder.path().join("linked")).unwrap(), b"nameless");
    assert_eq!(fs::metadata(folder.path().join("linked")).unwrap().mode() & 0o7777, 0o640);
    assert_eq!(server.lookup(ROOT, "linked"), Ok(inode));
    let file = server.lookup(ROOT, "file").unwrap();
    assert_eq!(server.ask(op::TMPFILE, file, &body(O_RDWR)), Err(libc::ENOTDIR));
    server.end();
    let mut server = Server::start(folder.path(), &["--read-only"]);
    assert_eq!(server.ask(op::TMPFILE, ROOT, &body(O_RDWR | O_TMPFILE)), Err(libc::EROFS));
    server.end();
}

#[test]
fn a_read_only_folder_cannot_be_changed() {
    let folder = folder();
    let mut server = Server::start(folder.path(), &["--read-only"]);
    let file = server.lookup(ROOT, "file").unwrap();
    for (name, opcode, inode, body) in changes(file) {
        assert_eq!(server.ask(opcode, inode, &body), Err(libc::EROFS), "{name}");
    }
    let handle = server.open(file, 0).unwrap();
    assert_eq!(server.read(file, handle, 0, 100).unwrap(), b"content");
    // The sandbox has no system call that writes.
    assert_eq!(server.write(handle, 0, b"x", 1), Err(libc::EPERM));
    let rename = [longs(&[ROOT]), words(&[0, 0]), text("file"), text("other")].concat();
    let fallocate = [&longs(&[handle, 0, 1])[..], &words(&[0, 0])].concat();
    for (opcode, inode, body) in [
        (op::RENAME2, ROOT, rename),
        (op::FALLOCATE, file, fallocate),
        (op::REMOVEXATTR, file, text("user.a")),
    ] {
        assert_eq!(server.ask(opcode, inode, &body), Err(libc::EROFS), "{opcode}");
    }
    server.end();
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    assert_eq!(fs::read(folder.path().join("file")).unwrap(), b"content");
}

/// There is no option to leave the sandbox out.
#[test]
fn a_server_that_answers_is_in_its_sandbox() {
    let folder = folder();
    for options in [&[][..], &["--read-only"]] {
        let server = Server::start(folder.path(), options);
        let proc = |name: &str| fs::read_to_string(format!("/proc/{}/{name}", server.process.id())).unwrap();
        let status = proc("status");
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim();
        assert_eq!([field("Seccomp:"), field("NoNewPrivs:")], ["2", "1"], "filtered, without new rights");
        for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
            assert_eq!(u64::from_str_radix(field(set), 16), Ok(0), "{set}");
        }
        let limits = proc("limits");
        let files = limits.lines().find_map(|line| line.strip_prefix("Max open files")).unwrap();
        let files: Vec<u64> = files.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        assert!(files.len() == 2 && files.iter().all(|limit| *limit <= 1 << 18), "{files:?}");
        server.end();
    }
}

#[test]
fn a_writable_folder_can_be_changed() {
    let folder = folder();
    let mut server = Server::start(folder.path(), &[]);
    let file = server.lookup(ROOT, "file").unwrap();
    for (name, opcode, inode, body) in changes(file) {
        // The filesystem of the tests may have no extended attributes.
        let result = server.ask(opcode, inode, &body);
        assert!(
            result.is_ok()
                || result == Err(libc::EOPNOTSUPP)
                || result == Err(libc::EEXIST)
                // The file is rewritten each time, after the guest has cached it.
                || result == Err(libc::ESTALE)
                || result == Err(libc::ENOENT),
            "{name}: {result:?}"
        );
        let _ = fs::remove_file(folder.path().join("other"));
        let _ = fs::remove_dir(folder.path().join("other"));
        fs::write(folder.path().join("file"), "").unwrap();
    }
    server.end();
}

#[test]
fn a_file_that_changed_is_looked_up_before_it_is_opened() {
    let folder = folder();
    let mut server = Server::start(folder.path(), &[]);
    let file = server.lookup(ROOT, "file").unwrap();
    fs::write(folder.path().join("file"), "longer content").unwrap();
    assert_eq!(server.open(file, 0), Err(libc::ESTALE));
    assert_eq!(server.lookup(ROOT, "file"), Ok(file));
    let handle = server.open(file, 0).unwrap();
    assert_eq!(server.read(file, handle, 0, 100).unwrap(), b"longer content");
    // Replaced by a new file, as editors do.
    fs::write(folder.path().join("new"), "new content").unwrap();
    fs::rename(folder.path().join("new"), folder.path().join("file")).unwrap();
    assert_eq!(server.open(file, 0), Err(libc::ESTALE));
    let new = server.lookup(ROOT, "file").unwrap();
    let handle = server.open(new, 0).unwrap();
    assert_eq!(server.read(new, handle, 0, 100).unwrap(), b"new content");
    server.end();
}

/// A second ESTALE would reach the program; SQLite then opens the file read-only.
#[test]
fn all_threads_can_open_a_changing_file() {
    let folder = folder();
    let path = folder.path().join("file");
    let mut server = Server::start(folder.path(), &[]);
    let file = server.lookup(ROOT, "file").unwrap();
    let mut open = |thread, text: &str| {
        fs::write(&path, text).unwrap();
        server.thread = thread;
        let result = server.open(file, O_RDWR);
        if result == Err(libc::ESTALE) {
            server.lookup(ROOT, "file").unwrap();
        }
        result.map(|_| ())
    };
    assert_eq!(open(1, "1"), Err(libc::ESTALE));
    assert_eq!(open(2, "22"), Err(libc::ESTALE));
    assert_eq!(open(2, "333"), Ok(()));
    assert_eq!(open(1, "4444"), Ok(()));
}

/// The inode number of a file is the same in all replies, and after it was forgotten.
#[test]
fn numbers_of_files_are_stable() {
    let folder = folder();
    let number_of = |name: &str| fs::symlink_metadata(folder.path().join(name)).unwrap().ino();
    let mut server = Server::start(folder.path(), &[]);
    for name in ["file", "folder"] {
        for _ in 0..2 {
            let reply = server.ask(op::LOOKUP, ROOT, &text(name)).unwrap();
            let inode = long(&reply, 0);
            // struct fuse_entry_out, struct fuse_attr_out: the attributes begin with it.
            assert_eq!(long(&reply, 40), number_of(name));
            assert_eq!(long(&server.ask(op::GETATTR, inode, &[0; 16]).unwrap(), 16), number_of(name));
            server.send(op::FORGET, inode, &longs(&[1]));
        }
    }
    let directory = long(&server.ask(op::OPENDIR, ROOT, &words(&[0, 0])).unwrap(), 0);
    let body = [&longs(&[directory, 0])[..], &words(&[4096, 0]), &[0; 16]].concat();
    let reply = server.ask(op::READDIR, ROOT, &body).unwrap();
    assert!([number_of("file"), number_of("folder")].contains(&long(&reply, 0)));
    // A file of another filesystem may have the inode number of a file in the folder.
    let root = fs::metadata("/proc").unwrap().ino();
    let mut server = Server::start(Path::new("/"), &[]);
    assert_ne!(long(&server.ask(op::LOOKUP, ROOT, &text("proc")).unwrap(), 40), root);
}

#[test]
fn devices_and_set_user_id_bits_cannot_be_created() {
    let folder = folder();
    let mut server = Server::start(folder.path(), &[]);
    for kind in [0o020_000, 0o060_000, 0o170_000] {
        let body = [words(&[kind | 0o666, 0x103, 0, 0]), text("device")].concat();
        assert_eq!(server.ask(op::MKNOD, ROOT, &body), Err(libc::EPERM));
    }
    let create = [words(&[O_RDWR | 0o100, 0o6755, 0, 0]), text("program")].concat();
    server.ask(op::CREATE, ROOT, &create).unwrap();
    assert_eq!(fs::metadata(folder.path().join("program")).unwrap().mode() & 0o7777, 0o755);
    server.end();
}

#[test]
fn malformed_requests_fail() {
    let folder = folder();
    let mut server = Server::start(folder.path(), &[]);
    for inode in [0, 2, 77, u64::MAX] {
        assert_eq!(server.lookup(inode, "file"), Err(libc::ESTALE), "{inode}");
        assert_eq!(server.ask(op::GETATTR, inode, &[0; 16]), Err(libc::ESTALE), "{inode}");
    }
    for handle in [0, 1, 99, u64::MAX] {
        assert_eq!(server.read(ROOT, handle, 0, 10), Err(libc::EBADF));
        assert_eq!(server.write(handle, 0, b"x", 1), Err(libc::EBADF));
    }
    // Too short, without the end of a name, and with huge sizes.
    for opcode in 0..60 {
        if opcode != op::FORGET && opcode != 36 && opcode != 42 && opcode != op::INIT && opcode != op::DESTROY
        {
            let _ = server.ask(opcode, ROOT, b"");
            let _ = server.ask(opcode, ROOT, &[0xff; 7]);
        }
    }
    let file = server.lookup(ROOT, "file").unwrap();
    let handle = server.open(file, O_RDWR).unwrap();
    assert!(server.read(file, handle, u64::MAX, 10).is_err());
    assert!(server.read(file, handle, 0, u32::MAX).is_err());
    let _ = server.write(handle, u64::MAX, b"x", 1);
    let _ = server.write(handle, 0, b"x", u32::MAX);
    let directory = long(&server.ask(op::OPENDIR, ROOT, &words(&[0, 0])).unwrap(), 0);
    let body = [&longs(&[directory, u64::MAX])[..], &words(&[4096, 0]), &[0; 16]].concat();
    assert!(server.ask(op::READDIR, ROOT, &body).is_err());
    assert_eq!(server.lookup(ROOT, "file").unwrap(), file, "the server continues");
    server.end();
}

#[test]
fn a_new_mount_has_no_state_of_the_last_one() {
    let folder = folder();
    let mut server = Server::start(folder.path(), &[]);
    let file = server.lookup(ROOT, "file").unwrap();
    let handle = server.open(file, 0).unwrap();
    server.ask(op::DESTROY, 0, &[]).unwrap();
    assert_eq!(server.read(file, handle, 0, 10), Err(libc::EBADF));
    assert_eq!(server.open(file, 0), Err(libc::ESTALE));
    server.ask(op::INIT, 0, &[&words(&[7, 38, 0, 0, 0, 0])[..], &[0; 40]].concat()).unwrap();
    let file = server.lookup(ROOT, "file").unwrap();
    let handle = server.open(file, 0).unwrap();
    assert_eq!(server.read(file, handle, 0, 10).unwrap(), b"content");
    server.end();
}

#[test]
fn a_guest_with_too_many_open_files_gets_an_error() {
    let folder = folder();
    let mut server = Server::start(folder.path(), &[]);
    let limit = rustix::process::Rlimit { current: Some(64), maximum: Some(64) };
    let process = rustix::process::Pid::from_child(&server.process);
    rustix::process::prlimit(Some(process), rustix::process::Resource::Nofile, limit).unwrap();
    let file = server.lookup(ROOT, "file").unwrap();
    let opened = (0..100).take_while(|_| server.open(file, 0).is_ok()).count();
    assert!((40..64).contains(&opened), "{opened}");
    assert_eq!(server.open(file, 0), Err(libc::EMFILE));
    assert_eq!(server.lookup(ROOT, "folder"), Err(libc::EMFILE));
    server.ask(op::GETATTR, file, &[0; 16]).unwrap();
    server.end();
}

#[test]
fn forgotten_files_are_removed() {
    let folder = folder();
    let mut server = Server::start(folder.path(), &[]);
    let file = server.lookup(ROOT, "file").unwrap();
    assert_eq!(server.lookup(ROOT, "file").unwrap(), file);
    server.send(op::FORGET, file, &longs(&[1]));
    server.ask(op::GETATTR, file, &[0; 16]).unwrap();
    server.send(op::FORGET, file, &longs(&[u64::MAX]));
    assert_eq!(server.ask(op::GETATTR, file, &[0; 16]), Err(libc::ESTALE));
    server.send(op::FORGET, ROOT, &longs(&[u64::MAX]));
    server.ask(op::GETATTR, ROOT, &[0; 16]).unwrap();
    server.end();
}
