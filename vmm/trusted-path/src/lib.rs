//! Files and directories of the host that only this user and root can change: caches, helper programs, lock files.
//!
//! A path is walked from `/` with a descriptor for each directory, and each component is checked: it must be owned by
//! this user or root, and others must not have write permission. In a directory with the sticky bit, such as /tmp,
//! others can create entries but not change those of this user, so such a directory may be part of the path, but not
//! its target. Symbolic links are followed if they pass the same check. After a successful walk, the path can be used
//! as it is.

#![forbid(unsafe_code)]

mod group;
mod walk;

use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use walk::{Target, Walk};

/// Why a path is not trusted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Another user can change it.
    #[error("{} belongs to the user {uid}, who is neither this user nor root", path.display())]
    Owner {
        /// The file or directory.
        path: PathBuf,
        /// The UID of its owner.
        uid: u32,
    },
    /// Other users can write to it.
    #[error("other users can write to {path}; `chmod go-w {path}` takes that from them", path = .0.display())]
    Writable(PathBuf),
    /// The path has another file type than expected.
    #[error("{} is not a {what}", path.display())]
    Kind {
        /// The path.
        path: PathBuf,
        /// The expected type.
        what: &'static str,
    },
    /// A system call failed.
    #[error("cannot open {}", path.display())]
    Host {
        /// The file or directory.
        path: PathBuf,
        /// The error of the system call.
        #[source]
        source: io::Error,
    },
}

impl Error {
    /// Whether the path does not exist.
    #[must_use]
    pub fn is_absent(&self) -> bool {
        matches!(self, Self::Host { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

/// The users whose files are trusted: the effective user of this process, root, and optionally another one.
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

    /// This user, root, and the owner of the running program, who could have changed the program itself.
    #[must_use]
    pub fn and_of_program() -> Self {
        let program = std::fs::metadata("/proc/self/exe");
        Self { other: program.ok().map(|program| program.uid()), ..Self::own() }
    }

    const fn has(self, uid: u32) -> bool {
        uid == 0 || uid == self.user || matches!(self.other, Some(other) if uid == other)
    }
}

/// Opens a trusted directory.
///
/// # Errors
/// If it does not exist, is not a directory, or others can change it.
pub fn folder(path: &Path, owners: Owners) -> Result<OwnedFd, Error> {
    Walk::new(path, owners)?.to(Target::Folder)
}

/// Opens a trusted directory of this user. Missing directories are created with mode 0700.
///
/// # Errors
/// If a directory cannot be created, is not a directory, or others can change it.
pub fn make_folder(path: &Path) -> Result<OwnedFd, Error> {
    Walk::new(path, Owners::own())?.to(Target::NewFolder)
}

/// Opens a trusted regular file with O_PATH; the descriptor cannot read it.
///
/// # Errors
/// If it does not exist, is not a regular file, or others can change it.
pub fn file(path: &Path, owners: Owners) -> Result<OwnedFd, Error> {
    Walk::new(path, owners)?.to(Target::File)
}

/// Checks a regular file in a trusted directory, whose path is `path`: cheaper than [`file()`] for several files of one
/// directory.
///
/// # Errors
/// If it does not exist, is not a regular file, or others can change it.
pub fn file_in(folder: &OwnedFd, path: &Path, name: &str, owners: Owners) -> Result<(), Error> {
    let stat = rustix::fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW);
    let stat = stat.map_err(|error| Error::Host { path: path.join(name), source: error.into() })?;
    // A link may lead anywhere, and each directory on the way counts.
    if name.contains('/') || FileType::from_raw_mode(stat.st_mode) == FileType::Symlink {
        return file(&path.join(name), owners).map(|_| ());
    }
    walk::check(&path.join(name), &stat, Target::File, owners)
}

/// Finds the first trusted program of a name in the system directories, and then in those of PATH. Relative entries of
/// PATH are ignored, since they depend on the working directory.
#[must_use]
pub fn program(name: &str) -> Option<PathBuf> {
    const SYSTEM: [&str; 6] = ["/usr/sbin", "/usr/bin", "/sbin", "/bin", "/usr/local/sbin", "/usr/local/bin"];
    let path = std::env::var_os("PATH").unwrap_or_default();
    let others = std::env::split_paths(&path).filter(|folder| folder.is_absolute());
    let candidates = SYSTEM.iter().map(PathBuf::from).chain(others).map(|folder| folder.join(name));
    candidates.into_iter().find(|path| file(path, Owners::and_of_program()).is_ok())
}

/// The directory of Kindling's programs, if this process has set it.
static COMPANIONS: OnceLock<PathBuf> = OnceLock::new();

/// Sets the directory of Kindling's programs for this process, unless it is set. Returns the directory that is set.
pub fn set_companions(folder: PathBuf) -> &'static PathBuf {
    COMPANIONS.get_or_init(|| folder)
}

/// Finds another program of Kindling: in the directory of [`set_companions`], in KINDLING_PROGRAMS, or else next to this
/// program.
///
/// # Errors
/// If it does not exist, or others can change it.
pub fn companion(name: &str) -> Result<PathBuf, Error> {
    let given =
        || std::env::var_os("KINDLING_PROGRAMS").filter(|folder| !folder.is_empty()).map(PathBuf::from);
    let folder = match COMPANIONS.get().cloned().or_else(given) {
        Some(folder) => folder,
        None => {
            let program = std::env::current_exe();
            let program = program.map_err(|source| Error::Host { path: "/proc/self/exe".into(), source })?;
            program.parent().map(Path::to_owned).unwrap_or_default()
        }
    };
    let path = folder.join(name);
    file(&path, Owners::and_of_program()).map(|_| path)
}

/// Opens a lock file, which is created if it is missing. A symbolic link is not followed, and the file is not
/// truncated.
///
/// # Errors
/// If the path is not a regular file, or a system call fails.
pub fn lock_file(path: &Path) -> io::Result<File> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR)?);
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::ErrorKind::InvalidInput.into()) }
}

/// Whether this process has the rights of its program file: the file has the set-user-ID or set-group-ID bit.
#[must_use]
pub fn is_set_user_id() -> bool {
    use rustix::process::{getegid, geteuid, getgid, getuid};
    getuid() != geteuid() || getgid() != getegid()
}

/// The error message of a program that refuses to run with such rights.
pub const SET_USER_ID: &str = "this program does not run with the set-user-ID or set-group-ID bit: everyone could use \
                               the rights of its owner";

#[cfg(test)]
mod tests;
