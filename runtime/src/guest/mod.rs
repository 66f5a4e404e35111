//! Guests with a name: each has a directory in the user's runtime directory, with the socket to its agent and a file
//! whose lock its monitor holds as long as it lives.

mod error;
pub(crate) mod owner;
mod process;
mod stop;
mod usage;

pub use error::GuestError;
pub use process::Process;
pub use stop::StopRequest;
pub use usage::Usage;

use crate::image::User;
use owner::Owner;
use rustix::fs::{FlockOperation, Mode, OFlags, fcntl_lock, flock, mkdir, open};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// What is known of a guest besides its name.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct GuestRecord {
    /// What it was made from, as the user wrote it.
    pub image: String,
    /// Where that was, for an image that is a path.
    pub directory: PathBuf,
    /// What it runs.
    pub command: Vec<String>,
    /// With what it runs that, and what one more command gets.
    pub payload: Payload,
    /// Seconds since 1970.
    pub started: u64,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Virtual processors.
    pub vcpus: u8,
    /// The signal that asks its payload to end.
    pub stop_signal: u8,
    /// Whether it belongs to a program that embeds it, with which it ends, and which gets no signals for it.
    pub is_embedded: bool,
    /// Whether its folder stays when it has ended, until somebody removes it.
    pub is_kept: bool,
    /// Names of its volumes.
    pub volumes: Vec<String>,
    /// Exit status, once it has one.
    pub status: Option<u8>,
}

/// What a guest's command has, and one more command gets.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct Payload {
    /// Entries of the environment; in one that is not UTF-8 a mark stands for what is not.
    pub environment: Vec<String>,
    /// Where it starts; / where there is none.
    pub working_directory: Option<String>,
    /// The user it runs as.
    pub user: User,
}

/// A guest's folder, which this process holds the lock of.
#[derive(Debug)]
pub struct GuestDir {
    name: String,
    folder: PathBuf,
    lock: File,
    /// What tells others which process the front is.
    _front: Option<OwnedFd>,
    /// Keeps systemd-tmpfiles from clearing the folder away, where that is in /tmp and old (tmpfiles.d(5)).
    _keep: Option<OwnedFd>,
}

const LOCK: &str = "lock";
/// The front and the monitor of a guest hold a POSIX lock on a file each. Of such a lock the kernel says which process has
/// it, as each process with numbers of its own has to call it. It is gone when the process closes any descriptor of the
/// file, so that each has one.
const FRONT: &str = "front";
const MONITOR: &str = "monitor";
const RECORD: &str = "guest.json";
/// How it ended, once it has: the number, and blanks behind it.
const STATUS: &str = "status";
const NO_STATUS: &str = "    ";
pub(crate) const SOCKET: &str = "vsock";
/// What the front of a detached guest has to say.
const REPORT: &str = "report";

impl GuestDir {
    /// Makes the folder of a new guest. Without a name it gets one that no other has.
    pub fn create(name: Option<&str>) -> Result<Self, GuestError> {
        let parent = runtime_directory()?;
        if let Some(name) = name {
            check_name(name)?;
            return Self::make(&parent, name);
        }
        loop {
            let mut bytes = [0; 4];
            // A name need not be hard to guess, only new.
            let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
            match Self::make(&parent, &format!("k{:08x}", u32::from_le_bytes(bytes))) {
                Err(GuestError::Taken { .. }) => {}
                result => return result,
            }
        }
    }

    fn make(parent: &Path, name: &str) -> Result<Self, GuestError> {
        let (folder, draft) = (parent.join(name), parent.join(aside()));
        // One of a process that had this one's number and did not get far.
        let _ = std::fs::remove_dir_all(&draft);
        mkdir(&draft, Mode::from_raw_mode(0o700))
            .map_err(|error| host("make the folder", &draft)(error.into()))?;
        let path = draft.join(LOCK);
        let lock = trusted_path::lock_file(&path).map_err(host("make", &path))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive)
            .map_err(|error| host("lock", &path)(error.into()))?;
        let front = hold_front(&draft.join(FRONT))?;
        // It appears with its lock held, so that nobody takes it for one whose front is dead. No folder that has a
        // file is replaced.
        let result = rustix::fs::rename(&draft, &folder);
        if result.is_err() {
            let _ = std::fs::remove_dir_all(&draft);
        }
        match result {
            Ok(()) => {
                Ok(Self { name: name.to_owned(), folder, lock, _front: Some(front), _keep: keep(parent) })
            }
            Err(Errno::EXIST | Errno::NOTEMPTY) => {
                let is_alive = is_locked(&folder);
                Err(GuestError::Taken { name: name.to_owned(), is_alive })
            }
            Err(error) => Err(host("make the folder", &folder)(error.into())),
        }
    }

    /// The guest's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where everything is that belongs to it.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The Unix socket of its vsock.
    pub fn socket(&self) -> PathBuf {
        self.folder.join(SOCKET)
    }

    /// Writes down what it is, for others to read: whole or as it was before.
    pub fn write(&self, record: &GuestRecord) -> Result<(), GuestError> {
        let (draft, path) = (self.folder.join(".draft"), self.folder.join(RECORD));
        let text = serde_json::to_vec_pretty(record).unwrap_or_default();
        let write = || -> io::Result<()> {
            if record.is_kept {
                // Where the disk is full in the end, there is still room for how the guest ended.
                std::fs::write(self.folder.join(STATUS), NO_STATUS)?;
            }
            File::create(&draft)?.write_all(&text)?;
            std::fs::rename(&draft, &path)
        };
        write().map_err(host("write", &path))
    }

    /// Makes the file that the monitor locks.
    ///
    /// # Errors
    /// When the host refuses the file.
    pub fn monitor_lock(&self) -> Result<OwnedFd, GuestError> {
        let path = self.folder.join(MONITOR);
        let flags = OFlags::CREATE | OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        open(&path, flags, Mode::from_raw_mode(0o600)).map_err(|error| host("make", &path)(error.into()))
    }

    /// Begins the file for what the monitor of a detached guest has to say.
    ///
    /// # Errors
    /// When the host refuses the file.
    pub fn create_report(&self) -> io::Result<File> {
        File::create(self.folder.join(REPORT))
    }

    /// Writes down how it ended.
    pub fn finish(&self, status: u8) -> Result<(), GuestError> {
        let path = self.folder.join(STATUS);
        let file = File::options().write(true).create(true).truncate(false).open(&path);
        let text = format!("{status:<0$}", NO_STATUS.len());
        file.and_then(|file| file.write_all_at(text.as_bytes(), 0)).map_err(host("write", &path))
    }

    /// The file for the exit status, which fits in the room that it has already.
    pub(crate) fn status_file(&self) -> Result<File, GuestError> {
        let path = self.folder.join(STATUS);
        File::options().write(true).open(&path).map_err(host("open", &path))
    }

    /// The file whose lock says that the guest runs.
    pub(crate) fn lock(&self) -> BorrowedFd<'_> {
        self.lock.as_fd()
    }

    /// Forgets the guest.
    pub fn remove(self) {
        self.forget();
    }

    /// The same, where this process ends at once.
    pub fn forget(&self) {
        // Who looks at it meanwhile finds it whole or not at all.
        let aside = self.folder.with_file_name(aside());
        let _ = std::fs::remove_dir_all(&aside);
        let _ = std::fs::rename(&self.folder, &aside);
        let _ = std::fs::remove_dir_all(&aside);
    }
}

/// All guests of this user, the oldest first.
///
/// # Errors
/// When the folder of guests cannot be read.
pub fn guests() -> Result<Vec<Guest>, GuestError> {
    Guest::all()
}

/// A guest of this user's: found by its name, or started by this program ([`Guest::builder`]), with which it ends.
#[derive(Debug)]
pub struct Guest {
    /// Its name.
    pub name: String,
    /// Its directory.
    pub folder: PathBuf,
    /// What is known of it.
    pub record: GuestRecord,
    /// Whether it ran when it was found.
    pub is_alive: bool,
    /// What ends with this, of a guest that this program started.
    pub(crate) owner: Option<Owner>,
}

impl Guest {
    /// The guest of this name.
    ///
    /// # Errors
    /// When this user has no guest of this name.
    pub fn open(name: &str) -> Result<Self, GuestError> {
        check_name(name).map_err(|_| GuestError::Unknown(name.to_owned()))?;
        let folder = runtime_directory()?.join(name);
        if !folder.is_dir() {
            return Err(GuestError::Unknown(name.to_owned()));
        }
        Ok(Self::in_folder(name.to_owned(), folder))
    }

    fn in_folder(name: String, folder: PathBuf) -> Self {
        let is_alive = is_locked(&folder);
        let record = read_record(&folder);
        Self { name, folder, record, is_alive, owner: None }
    }

    fn all() -> Result<Vec<Self>, GuestError> {
        let parent = runtime_directory()?;
        let entries = parent.read_dir().map_err(host("read", &parent))?;
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let names = names.filter(|name| check_name(name).is_ok() && parent.join(name).join(LOCK).exists());
        let mut all: Vec<_> = names.map(|name| Self::in_folder(name.clone(), parent.join(name))).collect();
        all.sort_by(|a, b| (a.record.started, &a.name).cmp(&(b.record.started, &b.name)));
        Ok(all)
    }

    /// Takes the folder of a guest that has ended, so that it can be changed or removed.
    pub fn take(&self) -> Result<GuestDir, GuestError> {
        let path = self.folder.join(LOCK);
        let lock = match open(&path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()) {
            Err(Errno::NOENT) => return Err(GuestError::Unknown(self.name.clone())),
            result => File::from(result.map_err(|error| host("open", &path)(error.into()))?),
        };
        // Others who look whether it is locked hold it for a moment, but not alone.
        while flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            if flock(&lock, FlockOperation::NonBlockingLockShared).is_err() {
                return Err(GuestError::Runs(self.name.clone()));
            }
            std::thread::yield_now();
        }
        let number = |metadata: io::Result<std::fs::Metadata>| metadata.map(|metadata| metadata.ino()).ok();
        if number(lock.metadata()) != number(path.metadata()) {
            // Somebody was faster and removed it, and maybe another has the name now.
            return Err(GuestError::Unknown(self.name.clone()));
        }
        Ok(GuestDir { name: self.name.clone(), folder: self.folder.clone(), lock, _front: None, _keep: None })
    }

    /// What the monitor of a detached guest had to say since it was started.
    #[must_use]
    pub fn report(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.folder.join(REPORT)).unwrap_or_default()).into_owned()
    }

    /// The guest of this name, if it runs.
    ///
    /// # Errors
    /// When this user has no guest of this name, or it has ended.
    pub fn open_running(name: &str) -> Result<Self, GuestError> {
        let found = Self::open(name)?;
        if found.is_alive { Ok(found) } else { Err(GuestError::Ended(name.to_owned())) }
    }

    /// The Unix socket of its vsock.
    pub fn socket(&self) -> PathBuf {
        self.folder.join(SOCKET)
    }
}

/// How a guest is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It runs.
    Running,
    /// It ended with this exit status.
    Exited(u8),
    /// Its monitor ended without saying how the guest did.
    Dead,
}

impl State {
    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Exited(_) => "exited",
            Self::Dead => "dead",
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())?;
        if let Self::Exited(status) = self { write!(f, " {status}") } else { Ok(()) }
    }
}

impl Guest {
    /// How it was when it was found.
    #[must_use]
    pub const fn state(&self) -> State {
        match (self.is_alive, self.record.status) {
            (true, _) => State::Running,
            (false, Some(status)) => State::Exited(status),
            (false, None) => State::Dead,
        }
    }

    /// Waits for its end; its exit status.
    ///
    /// # Errors
    /// When nothing says how it ended, or the host refuses something.
    pub fn wait(&self) -> Result<u8, GuestError> {
        if let Some(process) = self.front()?.map_or_else(|| self.monitor(), |front| Ok(Some(front)))? {
            process.wait(None);
        }
        let unknown = |why| GuestError::NoStatus(self.name.clone(), why);
        match Self::open(&self.name).map(|guest| guest.state()) {
            Ok(State::Exited(status)) => Ok(status),
            Ok(State::Dead) => Err(unknown("the kindling process that ran it crashed or was killed")),
            Ok(State::Running) => Err(unknown("it is gone, and another has its name")),
            Err(GuestError::Unknown(_)) => Err(unknown("it was to leave nothing behind")),
            Err(error) => Err(error),
        }
    }
}

/// One that ended before it could say what it is can still be forgotten.
fn read_record(folder: &Path) -> GuestRecord {
    let text = std::fs::read(folder.join(RECORD)).unwrap_or_default();
    let record: GuestRecord = serde_json::from_slice(&text).unwrap_or_default();
    let status = std::fs::read_to_string(folder.join(STATUS)).ok();
    GuestRecord { status: status.and_then(|text| text.trim().parse().ok()), ..record }
}

/// Makes the file of a front's lock, and locks it.
fn hold_front(path: &Path) -> Result<OwnedFd, GuestError> {
    let flags = OFlags::CREATE | OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let front =
        open(path, flags, Mode::from_raw_mode(0o600)).map_err(|error| host("make", path)(error.into()))?;
    fcntl_lock(&front, FlockOperation::NonBlockingLockExclusive)
        .map_err(|error| host("lock", path)(error.into()))?;
    Ok(front)
}

/// A lock on a directory, which any number may have.
fn keep(directory: &Path) -> Option<OwnedFd> {
    let directory = open(directory, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).ok()?;
    flock(&directory, FlockOperation::NonBlockingLockShared).ok().map(|()| directory)
}

/// Name of a folder that is made or removed: of this process, and once. No guest can have it.
fn aside() -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    format!(".{}.{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}

pub(crate) fn host(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> GuestError {
    move |source| GuestError::Host { what, path: path.to_owned(), source }
}

fn check_name(name: &str) -> Result<(), GuestError> {
    /// A Unix socket's path has 107 bytes at most.
    const LONGEST: usize = 48;
    let is_fine = name.len() <= LONGEST
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
        && name.bytes().next().is_some_and(|first| first.is_ascii_alphanumeric());
    if is_fine { Ok(()) } else { Err(GuestError::Name(name.to_owned())) }
}

/// Whether the front of the guest in a folder lives.
fn is_locked(folder: &Path) -> bool {
    let lock = open(folder.join(LOCK), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    // Shared, so that two who look do not take each other for its front. It is let go of again at once.
    lock.is_ok_and(|lock| flock(&lock, FlockOperation::NonBlockingLockShared) == Err(Errno::WOULDBLOCK))
}

/// Where the guests of this user are: nobody else may look into it.
pub fn runtime_directory() -> Result<PathBuf, GuestError> {
    let user = rustix::process::geteuid().as_raw();
    let given = std::env::var_os("XDG_RUNTIME_DIR").filter(|path| Path::new(path).is_absolute());
    let folder = match given {
        Some(path) => PathBuf::from(path).join("kindling"),
        None => std::env::temp_dir().join(format!("kindling-{user}")),
    };
    match trusted_path::make_folder(&folder) {
        Ok(_) => Ok(folder),
        Err(trusted_path::Error::Host { path, source }) => Err(host("make the folder", &path)(source)),
        Err(error) => Err(GuestError::NotOurs(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_folders_and_hosts() {
        for name in ["a", "web-1", "A.b_c", "0", &"x".repeat(48)] {
            check_name(name).unwrap();
        }
        for name in ["", ".", "..", "a/b", "-a", "a b", "ä", &"x".repeat(49)] {
            assert!(check_name(name).is_err(), "{name}");
        }
    }

    /// `rm` holds the lock of a guest that has ended, whose number another process may have by then.
    #[test]
    fn a_folder_that_is_locked_by_another_has_no_vmm() {
        let parent = tempfile::tempdir().unwrap();
        drop(GuestDir::make(parent.path(), "one").unwrap());
        let found = Guest::in_folder("one".to_owned(), parent.path().join("one"));
        let _taken = found.take().unwrap();
        assert!(found.front().unwrap().is_none());
        // An older version has no such file.
        std::fs::remove_file(parent.path().join("one").join(FRONT)).unwrap();
        assert!(matches!(found.front(), Err(GuestError::Elsewhere(_))));
    }

    #[test]
    fn a_folder_has_one_owner_at_a_time() {
        let parent = tempfile::tempdir().unwrap();
        let parent = parent.path();
        let found = || Guest::in_folder("one".to_owned(), parent.join("one"));
        let taken = || match GuestDir::make(parent, "one") {
            Err(GuestError::Taken { is_alive, .. }) => is_alive,
            result => panic!("{result:?}"),
        };
        let instance = GuestDir::make(parent, "one").unwrap();
        assert!(found().is_alive && taken());
        assert!(matches!(found().take(), Err(GuestError::Runs(_))));
        instance.write(&GuestRecord { status: None, vcpus: 7, ..GuestRecord::default() }).unwrap();
        instance.finish(3).unwrap();
        drop(instance);
        assert!(!found().is_alive && !taken());
        assert_eq!((found().record.vcpus, found().record.status), (7, Some(3)));
        // Somebody else who looks is not its front.
        let looker = File::open(parent.join("one").join(LOCK)).unwrap();
        flock(&looker, FlockOperation::LockShared).unwrap();
        assert!(!found().is_alive);
        drop(looker);
        let before = found();
        before.take().unwrap().remove();
        assert_eq!(parent.read_dir().unwrap().count(), 0);
        assert!(matches!(before.take(), Err(GuestError::Unknown(_))));
        drop(GuestDir::make(parent, "one").unwrap());
    }
}
