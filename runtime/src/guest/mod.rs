//! Named guests: each has a directory in the user's runtime directory, with its record, the Unix socket of its vsock, and
//! a lock that is held while the guest runs.

mod abandoned;
mod error;
mod files;
pub(crate) mod origin;
pub(crate) mod owner;
mod pause;
mod process;
mod state;
mod stop;
mod usage;

pub use error::GuestError;
pub use process::Process;
pub use state::State;
pub use stop::StopRequest;
pub use usage::Usage;

use crate::image::User;
use crate::network::PortForward;
use abandoned::temporary_name;
use files::{is_locked, read_record};
use kindling_vmm::control::{Endpoints, listen};
use owner::Owner;
use rustix::fs::{FlockOperation, Mode, OFlags, fcntl_lock, flock, mkdir, open};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

/// The record of a guest, as its directory has it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct GuestRecord {
    /// Image, as the user wrote it.
    pub image: String,
    /// Directory from which a relative path of the image is resolved.
    pub directory: PathBuf,
    /// Command line of the payload; empty for a guest of [`Guest::builder`].
    pub command: Vec<String>,
    /// Environment, working directory and user of the payload, which are the defaults of further processes.
    pub payload: Payload,
    /// Time of the start, in seconds since 1970.
    pub started: u64,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Number of vCPUs.
    pub vcpus: u8,
    /// Number of the signal that stops the payload.
    pub stop_signal: u8,
    /// Whether a program started the guest with [`Guest::builder`]. Such a program does not receive signals for its guest.
    pub is_embedded: bool,
    /// Whether the directory remains after the end of the guest, until `kindling rm` removes it.
    pub is_kept: bool,
    /// Names of the volumes that the guest mounts.
    pub volumes: Vec<String>,
    /// Published ports.
    pub ports: Vec<PortForward>,
    /// Exit status of a guest that has ended.
    pub status: Option<u8>,
    /// What a snapshot of the guest needs ([`origin::Origin`]), as a JSON text of its own, because few commands parse it. `None` if there can
    /// be no snapshot.
    pub(crate) origin: Option<String>,
}

/// Environment, working directory and user of a guest's payload, which are the defaults of further processes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct Payload {
    /// Environment variables, `NAME=VALUE`. U+FFFD replaces bytes that are not UTF-8.
    pub environment: Vec<String>,
    /// Working directory; `None` for `/`.
    pub working_directory: Option<String>,
    /// User.
    pub user: User,
}

/// The directory of a guest, locked by this process.
#[derive(Debug)]
pub struct GuestDir {
    name: String,
    folder: PathBuf,
    lock: File,
    /// The file whose lock identifies the front.
    _front: Option<OwnedFd>,
    /// A lock that keeps systemd-tmpfiles from removing an old directory in /tmp (tmpfiles.d(5)).
    keep: Option<OwnedFd>,
}

const LOCK: &str = "lock";
/// The files on which front and monitor hold a POSIX lock each. For such a lock, F_GETLK returns the ID of the owner, in
/// the PID namespace of the caller. A process loses the lock when it closes any descriptor of the file, so that the two
/// processes have separate files.
const FRONT: &str = "front";
const MONITOR: &str = "monitor";
const RECORD: &str = "guest.json";
/// The exit status of a guest that has ended: a number, padded with spaces.
const STATUS: &str = "status";
const NO_STATUS: &str = "    ";
pub(crate) const SOCKET: &str = "vsock";
/// The socket at which the monitor accepts requests of other programs than the front.
const REQUESTS: &str = "requests";
/// Exists while the guest is paused.
const PAUSED: &str = "paused";
/// Messages of the front of a detached guest.
const REPORT: &str = "report";

impl GuestDir {
    /// Creates and locks the directory of a new guest. Without a name, the guest gets a random one.
    ///
    /// # Errors
    /// When the name is invalid or taken, or the host cannot create the directory.
    pub fn create(name: Option<&str>) -> Result<Self, GuestError> {
        Self::create_with(name, true)
    }

    /// The same for a guest of the calling program, which gets no signals for it.
    pub(crate) fn create_embedded(name: Option<&str>) -> Result<Self, GuestError> {
        Self::create_with(name, false)
    }

    fn create_with(name: Option<&str>, has_front: bool) -> Result<Self, GuestError> {
        let parent = runtime_directory()?;
        if let Some(name) = name {
            check_name(name)?;
            return Self::make(&parent, name, has_front);
        }
        loop {
            let mut bytes = [0; 4];
            // The name must be unused, but may be easy to guess.
            let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
            match Self::make(&parent, &format!("k{:08x}", u32::from_le_bytes(bytes)), has_front) {
                Err(GuestError::Taken { .. }) => {}
                result => return result,
            }
        }
    }

    fn make(parent: &Path, name: &str, has_front: bool) -> Result<Self, GuestError> {
        /// A process that lists guests can mistake a new directory for an abandoned one, and remove it.
        const ATTEMPTS: u32 = 10;
        let folder = parent.join(name);
        let mut attempt = 1;
        loop {
            let draft = parent.join(temporary_name());
            mkdir(&draft, Mode::from_raw_mode(0o700))
                .map_err(|error| host("create the directory", &draft)(error.into()))?;
            match Self::fill(&draft, &folder, has_front) {
                Ok((lock, front)) => {
                    return Ok(Self {
                        name: name.to_owned(),
                        folder,
                        lock,
                        _front: front,
                        keep: keep(parent),
                    });
                }
                Err(GuestError::Host { source, .. })
                    if attempt < ATTEMPTS
                        && matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::WouldBlock) =>
                {
                    attempt += 1;
                }
                Err(error) => {
                    let _ = abandoned::remove(&draft);
                    return Err(error);
                }
            }
        }
    }

    /// Creates the locks of a new directory, and gives it its name. Returns the locks of guest and front.
    fn fill(draft: &Path, folder: &Path, has_front: bool) -> Result<(File, Option<OwnedFd>), GuestError> {
        let path = draft.join(LOCK);
        let lock = trusted_path::lock_file(&path).map_err(host("create", &path))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive)
            .map_err(|error| host("lock", &path)(error.into()))?;
        let front = has_front.then(|| lock_front(&draft.join(FRONT))).transpose()?;
        // The directory appears with its lock held, so that it is never mistaken for that of a dead guest. rename(2) does
        // not replace a directory that has entries.
        match rustix::fs::rename(draft, folder) {
            Ok(()) => Ok((lock, front)),
            Err(Errno::EXIST | Errno::NOTEMPTY) => {
                let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
                Err(GuestError::Taken { name, is_alive: is_locked(folder)? })
            }
            Err(error) => Err(host("create the directory", folder)(error.into())),
        }
    }

    /// Returns the name of the guest.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the path of the directory.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Returns the path of the Unix socket of the guest's vsock.
    pub fn socket(&self) -> PathBuf {
        self.folder.join(SOCKET)
    }

    /// Writes the record of the guest, atomically.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn write(&self, record: &GuestRecord) -> Result<(), GuestError> {
        let (draft, path) = (self.folder.join(".draft"), self.folder.join(RECORD));
        let text = serde_json::to_vec_pretty(record).unwrap_or_default();
        let write = || -> io::Result<()> {
            if record.is_kept {
                // Reserves the space of the exit status, which can then be written to a full filesystem.
                std::fs::write(self.folder.join(STATUS), NO_STATUS)?;
            }
            File::create(&draft)?.write_all(&text)?;
            std::fs::rename(&draft, &path)
        };
        write().map_err(host("write", &path))
    }

    /// Creates what other processes find the monitor by: its request socket, and the file that it locks. The file is opened
    /// for reading: a monitor that its guest has taken over could fill the runtime directory, which is in memory.
    ///
    /// # Errors
    /// When a file cannot be created.
    pub(crate) fn endpoints(&self) -> Result<Endpoints, GuestError> {
        let path = self.folder.join(MONITOR);
        let flags = OFlags::CREATE | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let lock = open(&path, flags, Mode::from_raw_mode(0o600))
            .map_err(|error| host("create", &path)(error.into()))?;
        let path = self.folder.join(REQUESTS);
        let requests = match listen(&path) {
            // The socket of a monitor that could not start the guest.
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                std::fs::remove_file(&path).and_then(|()| listen(&path))
            }
            result => result,
        };
        let requests = requests.map_err(host("create", &path))?;
        Ok(Endpoints { lock: Some(lock), requests: Some(requests) })
    }

    /// Creates the file for messages of a detached guest, which [`Guest::report`] returns.
    ///
    /// # Errors
    /// When the file cannot be created.
    pub fn create_report(&self) -> io::Result<File> {
        File::create(self.folder.join(REPORT))
    }

    /// Writes the exit status of the guest.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn finish(&self, status: u8) -> Result<(), GuestError> {
        let path = self.folder.join(STATUS);
        let file = File::options().write(true).create(true).truncate(false).open(&path);
        let text = format!("{status:<0$}", NO_STATUS.len());
        file.and_then(|file| file.write_all_at(text.as_bytes(), 0)).map_err(host("write", &path))
    }

    /// Opens the file for the exit status, whose space is reserved.
    pub(crate) fn status_file(&self) -> Result<File, GuestError> {
        let path = self.folder.join(STATUS);
        File::options().write(true).open(&path).map_err(host("open", &path))
    }

    /// The files whose locks are held while the guest runs.
    pub(crate) fn locks(&self) -> Vec<BorrowedFd<'_>> {
        std::iter::once(self.lock.as_fd()).chain(self.keep.as_ref().map(AsFd::as_fd)).collect()
    }

    /// Removes the directory and releases the lock.
    pub fn remove(self) {
        self.forget();
    }

    /// Removes the directory, for a process that exits immediately afterwards and with it releases the lock.
    pub fn forget(&self) {
        // The directory is renamed first, so that other processes find it complete or not at all.
        let aside = self.folder.with_file_name(temporary_name());
        let renamed = std::fs::rename(&self.folder, &aside);
        let _ = abandoned::remove(if renamed.is_ok() { &aside } else { &self.folder });
    }
}

/// Returns all guests of the user, including kept ones that have ended, sorted by the time of their start.
///
/// # Errors
/// When the runtime directory cannot be read.
pub fn guests() -> Result<Vec<Guest>, GuestError> {
    Guest::all()
}

/// A guest of the user.
///
/// [`Guest::builder`] starts a guest that belongs to the calling program: dropping the value ends the guest, unless
/// [`detach`](Self::detach) was called. [`Guest::open`] finds a guest by its name; dropping the value then has no effect on
/// the guest.
#[derive(Debug)]
pub struct Guest {
    /// Name.
    pub name: String,
    /// Path of the guest's directory.
    pub folder: PathBuf,
    /// Record of the guest, as of the time when the guest was opened.
    pub record: GuestRecord,
    /// Whether the guest was running when it was opened.
    pub is_alive: bool,
    /// Monitor and directory of a guest that this program started.
    pub(crate) owner: Option<Owner>,
}

impl Guest {
    /// Opens the guest of this name, which may have ended.
    ///
    /// # Errors
    /// When the user has no guest of this name.
    pub fn open(name: &str) -> Result<Self, GuestError> {
        check_name(name).map_err(|_| GuestError::Unknown(name.to_owned()))?;
        let folder = runtime_directory()?.join(name);
        if !folder.is_dir() {
            return Err(GuestError::Unknown(name.to_owned()));
        }
        Self::in_folder(name.to_owned(), folder)
    }

    fn in_folder(name: String, folder: PathBuf) -> Result<Self, GuestError> {
        let is_alive = is_locked(&folder)?;
        let record = read_record(&folder)?;
        Ok(Self { name, folder, record, is_alive, owner: None })
    }

    fn all() -> Result<Vec<Self>, GuestError> {
        let parent = runtime_directory()?;
        let mut all = Vec::new();
        for entry in parent.read_dir().map_err(host("read", &parent))? {
            let name = entry.map_err(host("read", &parent))?.file_name();
            let Ok(name) = name.into_string() else { continue };
            let folder = parent.join(&name);
            let lock = folder.join(LOCK);
            if check_name(&name).is_err() {
                abandoned::remove_if_abandoned(&parent, &name);
            } else if lock.try_exists().map_err(host("read", &lock))? {
                all.push(Self::in_folder(name, folder)?);
            }
        }
        all.sort_by(|a, b| (a.record.started, &a.name).cmp(&(b.record.started, &b.name)));
        Ok(all)
    }

    /// Locks the directory of a guest that has ended, so that it can be changed or removed.
    ///
    /// # Errors
    /// When the guest runs, or was removed in between.
    pub fn take(&self) -> Result<GuestDir, GuestError> {
        let path = self.folder.join(LOCK);
        let lock = match open(&path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()) {
            Err(Errno::NOENT) => return Err(GuestError::Unknown(self.name.clone())),
            result => File::from(result.map_err(|error| host("open", &path)(error.into()))?),
        };
        // Processes that test the lock hold it shared for a moment.
        while flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            if flock(&lock, FlockOperation::NonBlockingLockShared).is_err() {
                return Err(GuestError::Runs(self.name.clone()));
            }
            std::thread::yield_now();
        }
        let number = |metadata: io::Result<std::fs::Metadata>| metadata.map(|metadata| metadata.ino()).ok();
        if number(lock.metadata()) != number(path.metadata()) {
            // Another process has removed the directory, and a new guest may have its name.
            return Err(GuestError::Unknown(self.name.clone()));
        }
        Ok(GuestDir { name: self.name.clone(), folder: self.folder.clone(), lock, _front: None, keep: None })
    }

    /// Returns the messages of a detached guest since its start: failed devices, and the report of a failure.
    #[must_use]
    pub fn report(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.folder.join(REPORT)).unwrap_or_default()).into_owned()
    }

    /// Opens the guest of this name, which must be running.
    ///
    /// # Errors
    /// When the user has no guest of this name, or the guest has ended.
    pub fn open_running(name: &str) -> Result<Self, GuestError> {
        let found = Self::open(name)?;
        if found.is_alive { Ok(found) } else { Err(GuestError::Ended(name.to_owned())) }
    }

    /// Returns the path of the Unix socket of the guest's vsock.
    pub fn socket(&self) -> PathBuf {
        self.folder.join(SOCKET)
    }
}

/// Creates and locks the file that identifies the front.
fn lock_front(path: &Path) -> Result<OwnedFd, GuestError> {
    let flags = OFlags::CREATE | OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let front =
        open(path, flags, Mode::from_raw_mode(0o600)).map_err(|error| host("create", path)(error.into()))?;
    fcntl_lock(&front, FlockOperation::NonBlockingLockExclusive)
        .map_err(|error| host("lock", path)(error.into()))?;
    Ok(front)
}

/// Takes a shared lock on a directory.
fn keep(directory: &Path) -> Option<OwnedFd> {
    let directory = open(directory, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).ok()?;
    flock(&directory, FlockOperation::NonBlockingLockShared).ok().map(|()| directory)
}

pub(crate) fn host(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> GuestError {
    move |source| GuestError::Host { what, path: path.to_owned(), source }
}

fn check_name(name: &str) -> Result<(), GuestError> {
    /// Limited because the path of a Unix socket has 107 bytes at most.
    const MAX_NAME_LEN: usize = 48;
    let is_valid = name.len() <= MAX_NAME_LEN
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
        && name.bytes().next().is_some_and(|first| first.is_ascii_alphanumeric());
    if is_valid { Ok(()) } else { Err(GuestError::Name(name.to_owned())) }
}

/// Returns the directory of the user's guests: `kindling` in XDG_RUNTIME_DIR, or `kindling-UID` in the directory of temporary
/// files. It is created if it does not exist, without access for other users.
///
/// # Errors
/// When the directory cannot be created, or other users can change it.
pub fn runtime_directory() -> Result<PathBuf, GuestError> {
    let user = rustix::process::geteuid().as_raw();
    let given = std::env::var_os("XDG_RUNTIME_DIR").filter(|path| Path::new(path).is_absolute());
    let folder = match given {
        Some(path) => PathBuf::from(path).join("kindling"),
        None => std::env::temp_dir().join(format!("kindling-{user}")),
    };
    match trusted_path::make_folder(&folder) {
        Ok(_) => Ok(folder),
        Err(trusted_path::Error::Host { path, source }) => Err(host("create the directory", &path)(source)),
        Err(error) => Err(GuestError::NotOurs(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_valid_as_directories_and_hostnames() {
        for name in ["a", "web-1", "A.b_c", "0", &"x".repeat(48)] {
            check_name(name).unwrap();
        }
        for name in ["", ".", "..", "a/b", "-a", "a b", "ä", &"x".repeat(49)] {
            assert!(check_name(name).is_err(), "{name}");
        }
    }

    /// `kindling rm` holds the lock of a guest that has ended, and must not be mistaken for its front.
    #[test]
    fn a_directory_that_another_process_locks_has_no_front() {
        let parent = tempfile::tempdir().unwrap();
        drop(GuestDir::make(parent.path(), "one", true).unwrap());
        let found = Guest::in_folder("one".to_owned(), parent.path().join("one")).unwrap();
        let _taken = found.take().unwrap();
        assert!(found.front().unwrap().is_none());
        // Older versions do not create the file.
        std::fs::remove_file(parent.path().join("one").join(FRONT)).unwrap();
        assert!(matches!(found.front(), Err(GuestError::Elsewhere(_))));
    }

    /// A process that lists guests removes directories that no process has locked, also those that are about to be locked.
    #[test]
    fn a_lister_does_not_take_the_directory_of_a_guest_that_is_being_created() {
        let parent = tempfile::tempdir().unwrap();
        let parent = parent.path();
        std::thread::scope(|scope| {
            let creator = scope.spawn(|| {
                for round in 0..500 {
                    let guest = GuestDir::make(parent, &format!("guest{round}"), true).unwrap();
                    let found = Guest::in_folder(guest.name().to_owned(), guest.folder().to_owned()).unwrap();
                    assert!(found.is_alive && guest.folder().join(FRONT).exists(), "{round}");
                    guest.remove();
                }
            });
            while !creator.is_finished() {
                for entry in parent.read_dir().unwrap().flatten() {
                    abandoned::remove_if_abandoned(parent, &entry.file_name().into_string().unwrap());
                }
            }
        });
        assert_eq!(parent.read_dir().unwrap().count(), 0);
    }

    #[test]
    fn a_directory_has_one_owner_at_a_time() {
        let parent = tempfile::tempdir().unwrap();
        let parent = parent.path();
        let found = || Guest::in_folder("one".to_owned(), parent.join("one")).unwrap();
        let taken = || match GuestDir::make(parent, "one", true) {
            Err(GuestError::Taken { is_alive, .. }) => is_alive,
            result => panic!("{result:?}"),
        };
        let instance = GuestDir::make(parent, "one", true).unwrap();
        assert!(found().is_alive && taken());
        assert!(matches!(found().take(), Err(GuestError::Runs(_))));
        instance.write(&GuestRecord { status: None, vcpus: 7, ..GuestRecord::default() }).unwrap();
        instance.finish(3).unwrap();
        drop(instance);
        assert!(!found().is_alive && !taken());
        assert_eq!((found().record.vcpus, found().record.status), (7, Some(3)));
        // A process that tests the lock is not mistaken for the owner.
        let other = File::open(parent.join("one").join(LOCK)).unwrap();
        flock(&other, FlockOperation::LockShared).unwrap();
        assert!(!found().is_alive);
        drop(other);
        let before = found();
        before.take().unwrap().remove();
        assert_eq!(parent.read_dir().unwrap().count(), 0);
        assert!(matches!(before.take(), Err(GuestError::Unknown(_))));
        drop(GuestDir::make(parent, "one", true).unwrap());
    }
}
