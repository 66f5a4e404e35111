//! Attempts of code that has taken over the program. Each attempt is made by a separate process, in the sandbox and
//! without it. Most are of a kind that only one layer refuses.
#![expect(unsafe_code, reason = "these system calls have no safe interface")]

use super::*;
use std::fs::{self, File, Permissions};
use std::net::{TcpListener, UdpSocket};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};

/// An attempt, with a folder that has the folders `cache` and `image`, and the file `beside`.
type Attempt = fn(&Path) -> io::Result<()>;

/// How an attempt ends.
#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    Done,
    Fails(i32),
    Signal(i32),
}

const DENIED: End = End::Fails(libc::EACCES);
const ENDED: End = End::Signal(libc::SIGSYS);

/// Attempts on files, memory and processes, and their ends in the sandbox of a local image.
const LOCAL: &[(&str, Attempt, End)] = &[
    ("read the image", |folder| File::open(folder.join("image/file")).map(drop), End::Done),
    ("write to the cache", |folder| fs::write(folder.join("cache/new"), "x"), End::Done),
    (
        "start a thread",
        |_| std::thread::Builder::new().spawn(|| {}).map(|thread| thread.join().unwrap()),
        End::Done,
    ),
    ("read a file beside the image", |folder| File::open(folder.join("beside")).map(drop), DENIED),
    ("read a file of the host", |_| File::open("/etc/passwd").map(drop), DENIED),
    ("list the folder of the image", |folder| fs::read_dir(folder).map(drop), DENIED),
    ("write to the image", |folder| fs::write(folder.join("image/file"), "x"), DENIED),
    ("write beside the cache", |folder| fs::write(folder.join("new"), "x"), DENIED),
    ("remove the image", |folder| fs::remove_file(folder.join("image/file")), DENIED),
    ("make a link in the cache", |folder| symlink("/", folder.join("cache/link")), ENDED),
    ("change a mode in the cache", |folder| mode(&folder.join("cache/file"), 0o666), ENDED),
    ("execute a program", |_| execute(), ENDED),
    ("start a process", |_| fork(), ENDED),
    ("open a socket", |_| UdpSocket::bind("127.0.0.1:0").map(drop), ENDED),
    ("read the memory of another process", |_| read_memory(), ENDED),
    ("signal another process", |_| signal_parent(), ENDED),
    ("raise a limit", |_| raise_limit(), ENDED),
    ("map executable memory", |_| map(4096, libc::PROT_EXEC), End::Fails(libc::ENOSYS)),
    ("take 5 GiB of memory", |_| map(5 << 30, libc::PROT_NONE), End::Fails(libc::ENOMEM)),
    ("write a file of 3 TiB", |folder| lengthen(&folder.join("cache/file")), End::Signal(libc::SIGXFSZ)),
    ("open 300 files", |folder| open_many(&folder.join("cache/file")), End::Fails(libc::EMFILE)),
];

/// Attempts on the network, and their ends in the sandbox of an image in a registry.
const REGISTRY: &[(&str, Attempt, End)] = &[
    ("resolve and ask", |_| UdpSocket::bind("127.0.0.1:0").map(drop), End::Done),
    ("take a TCP port", |_| TcpListener::bind("127.0.0.1:0").map(drop), DENIED),
    ("open a Unix socket", |_| UnixDatagram::unbound().map(drop), End::Fails(libc::ENOSYS)),
    ("execute a program for a registry", |_| execute(), ENDED),
    ("read a file of the host for a registry", |_| File::open("/etc/passwd").map(drop), DENIED),
];

/// The attempt on the files of other users, which only root can make.
const ROOT: (&str, Attempt, End) =
    ("read a file of another user", |folder| File::open(folder.join("cache/private")).map(drop), DENIED);

fn result(value: libc::c_int) -> io::Result<()> {
    if value == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn mode(path: &Path, mode: u32) -> io::Result<()> {
    fs::set_permissions(path, Permissions::from_mode(mode))
}

fn execute() -> io::Result<()> {
    let words = [c"/bin/true".as_ptr(), std::ptr::null()];
    // SAFETY: the words and the empty environment end with a null pointer.
    result(unsafe { libc::execve(words[0], words.as_ptr(), &raw const words[1]) })
}

fn fork() -> io::Result<()> {
    // SAFETY: the new process only ends.
    match unsafe { libc::fork() } {
        // SAFETY: this ends the process.
        0 => unsafe { libc::_exit(0) },
        process => result(process),
    }
}

fn read_memory() -> io::Result<()> {
    // SAFETY: without any part of memory, the call reads and writes none.
    let read =
        unsafe { libc::process_vm_readv(libc::getppid(), std::ptr::null(), 0, std::ptr::null(), 0, 0) };
    result(i32::try_from(read).unwrap())
}

fn signal_parent() -> io::Result<()> {
    // SAFETY: signal 0 does nothing.
    result(unsafe { libc::kill(libc::getppid(), 0) })
}

fn raise_limit() -> io::Result<()> {
    Ok(setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?)
}

fn map(bytes: usize, protection: libc::c_int) -> io::Result<()> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: the mapping is new.
    let address = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, -1, 0) };
    result(if address == libc::MAP_FAILED { -1 } else { 0 })
}

fn lengthen(path: &Path) -> io::Result<()> {
    File::options().write(true).open(path)?.set_len(3 << 40)
}

fn open_many(path: &Path) -> io::Result<()> {
    (0..300).map(|_| File::open(path)).collect::<io::Result<Vec<_>>>().map(drop)
}

/// The variables that make this program a process that makes an attempt: the attempt, the folder, and the sandbox.
const VARIABLES: [&str; 3] = ["ATTEMPT", "ATTEMPT_FOLDER", "ATTEMPT_SANDBOX"];

/// In a process that `end_of` starts, enters the sandbox and makes the attempt. Otherwise this test does nothing.
#[test]
#[expect(clippy::exit, reason = "the status is the result")]
fn one_attempt_is_made() {
    let [Ok(name), Ok(folder), Ok(sandbox)] = VARIABLES.map(std::env::var) else { return };
    let folder = Path::new(&folder);
    let mut all = LOCAL.iter().chain(REGISTRY).chain([&ROOT]);
    let (_, attempt, _) = all.find(|(known, ..)| *known == name).unwrap();
    let reads = Reads { paths: vec![folder.join("image")], registry: sandbox == "registry" };
    if sandbox != "none" {
        enter(&folder.join("cache"), &reads).unwrap();
    }
    let end = attempt(folder);
    std::process::exit(end.map_or_else(|error| error.raw_os_error().unwrap(), |()| 0));
}

/// Makes an attempt in another process, in a sandbox: `local`, `registry` or `none`.
fn end_of(name: &str, sandbox: &str) -> End {
    let folder = tempfile::tempdir().unwrap();
    let path = |name| folder.path().join(name);
    for name in ["cache", "image"] {
        fs::create_dir(path(name)).unwrap();
    }
    for name in ["cache/file", "image/file", "beside", "cache/private"] {
        fs::write(path(name), "x").unwrap();
    }
    mode(&path("cache/private"), 0o600).unwrap();
    // Only root can, and the attempt is only made for root.
    let _ = chown(path("cache/private"), Some(12345), None);
    let values = [name, folder.path().to_str().unwrap(), sandbox];
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "sandbox::tests::one_attempt_is_made", "--nocapture"])
        .envs(VARIABLES.into_iter().zip(values))
        .stdout(Stdio::null())
        .status()
        .unwrap();
    match (status.code(), status.signal()) {
        (Some(0), _) => End::Done,
        (Some(code), _) => End::Fails(code),
        (_, signal) => End::Signal(signal.unwrap()),
    }
}

/// Whether the kernel has the layers of Landlock that the attempts are about.
fn has_landlock() -> bool {
    let ruleset = Ruleset::default().set_compatibility(CompatLevel::HardRequirement);
    ruleset.handle_access(AccessNet::BindTcp).is_ok()
}

fn check(sandbox: &str, attempts: &[(&str, Attempt, End)]) {
    for (name, _, end) in attempts.iter().filter(|(_, _, end)| *end != DENIED || has_landlock()) {
        assert_eq!(end_of(name, sandbox), *end, "{name}");
        assert_eq!(end_of(name, "none"), End::Done, "{name}, without the sandbox");
    }
}

#[test]
fn a_local_image_gets_no_further_than_the_cache() {
    check("local", LOCAL);
}

#[test]
fn a_registry_gets_no_further_than_its_connections() {
    check("registry", REGISTRY);
}

#[test]
fn root_has_no_right_to_files_of_others() {
    if rustix::process::geteuid().is_root() {
        check("local", &[ROOT]);
    }
}
