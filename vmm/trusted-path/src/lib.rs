//! Files and folders of the host that only this user and root can change: caches, helper programs, lock files.
//!
//! A path is walked from `/` with a descriptor for each folder, and every step is checked: it belongs to this user or
//! root, and others cannot write to it. In a folder with the sticky bit, such as /tmp, others can make entries and not
//! touch those of this user, so that such a folder may lie on the way, but not at the end. Symbolic links are followed
//! where they pass the same check. What has been walked so can be used by its path afterwards.

#![forbid(unsafe_code)]

mod group;
mod walk;

use rustix::fs::{Mode, OFlags};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use walk::{Target, Walk};

/// Why a path is not trusted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Another user can change it.
    #[error("{} belongs to the user {uid}, who is neither this user nor root", path.display())]
    Owner {
        /// The file or folder.
        path: PathBuf,
        /// Its owner.
        uid: u32,
    },
    /// Other users can write to it.
    #[error("other users can write to {path}; `chmod go-w {path}` takes that from them", path = .0.display())]
    Writable(PathBuf),
    /// A folder was expected, or a file.
    #[error("{} is not a {what}", path.display())]
    Kind {
        /// The path.
        path: PathBuf,
        /// What was expected.
        what: &'static str,
    },
    /// The host refused something.
    #[error("cannot open {}", path.display())]
    Host {
        /// The file or folder.
        path: PathBuf,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
}

impl Error {
    /// Whether there is nothing at the path.
    #[must_use]
    pub fn is_absent(&self) -> bool {
        matches!(self, Self::Host { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

/// The users whose files are trusted: this process's effective user, root, and maybe one more.
#[derive(Clone, Copy, Debug)]
pub struct Owners {
    user: u32,
    other: Option<u32>,
}

impl Owners {
    /// This user and root.
    #[must_use]
    pub fn own() -> Self {
        Self { user: rustix::process::geteuid().as_raw(), other: None }
    }

    /// And the owner of the program that runs: its owner could have changed what runs now.
    #[must_use]
    pub fn and_of_program() -> Self {
        let program = std::fs::metadata("/proc/self/exe");
        Self { other: program.ok().map(|program| program.uid()), ..Self::own() }
    }

    const fn has(self, uid: u32) -> bool {
        uid == 0 || uid == self.user || matches!(self.other, Some(other) if uid == other)
    }
}

/// Walks to a folder.
///
/// # Errors
/// When it is not there, is no folder, or others can change it.
pub fn folder(path: &Path, owners: Owners) -> Result<OwnedFd, Error> {
    Walk::new(path, owners)?.to(Target::Folder)
}

/// Walks to a folder of this user's, and makes those that are missing, for this user alone.
///
/// # Errors
/// When one cannot be made, is no folder, or others can change it.
pub fn make_folder(path: &Path) -> Result<OwnedFd, Error> {
    Walk::new(path, Owners::own())?.to(Target::NewFolder)
}

/// Walks to a regular file. The descriptor names it and cannot read it.
///
/// # Errors
/// When it is not there, is no regular file, or others can change it.
pub fn file(path: &Path, owners: Owners) -> Result<OwnedFd, Error> {
    Walk::new(path, owners)?.to(Target::File)
}

/// The first program of a name in the folders of the system, and then in those of PATH, that others cannot change.
/// Relative folders of PATH lead to where this user happens to be, and are left out.
#[must_use]
pub fn program(name: &str) -> Option<PathBuf> {
    const SYSTEM: [&str; 6] = ["/usr/sbin", "/usr/bin", "/sbin", "/bin", "/usr/local/sbin", "/usr/local/bin"];
    let path = std::env::var_os("PATH").unwrap_or_default();
    let others = std::env::split_paths(&path).filter(|folder| folder.is_absolute());
    let candidates = SYSTEM.iter().map(PathBuf::from).chain(others).map(|folder| folder.join(name));
    candidates.into_iter().find(|path| file(path, Owners::and_of_program()).is_ok())
}

/// One of Kindling's own programs: in the folder that KINDLING_PROGRAMS names, or else beside this program.
///
/// # Errors
/// When it is not there, or others can change it.
pub fn companion(name: &str) -> Result<PathBuf, Error> {
    let given = std::env::var_os("KINDLING_PROGRAMS").filter(|folder| !folder.is_empty());
    let folder = match given {
        Some(folder) => PathBuf::from(folder),
        None => {
            let program = std::env::current_exe();
            let program = program.map_err(|source| Error::Host { path: "/proc/self/exe".into(), source })?;
            program.parent().map(Path::to_owned).unwrap_or_default()
        }
    };
    let path = folder.join(name);
    file(&path, Owners::and_of_program()).map(|_| path)
}

/// Opens a file for a lock, and makes it where it is missing. No link is followed, and nothing is removed from it.
///
/// # Errors
/// When there is something else of that name, or the host refuses it.
pub fn lock_file(path: &Path) -> io::Result<File> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR)?);
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::ErrorKind::InvalidInput.into()) }
}

/// Whether this process got rights from its program's file: a copy with the set-user-ID or set-group-ID bit.
#[must_use]
pub fn is_set_user_id() -> bool {
    use rustix::process::{getegid, geteuid, getgid, getuid};
    getuid() != geteuid() || getgid() != getegid()
}

/// What a program says that refuses to run with such rights.
pub const SET_USER_ID: &str = "this program does not run with the set-user-ID or set-group-ID bit: everyone could use \
                               the rights of its owner";

#[cfg(test)]
mod tests;
