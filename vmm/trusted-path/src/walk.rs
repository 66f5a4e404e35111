//! The walk along a path, with a check of each component.

use crate::{Error, Owners, group};
use rustix::fs::{FileType, Mode, OFlags, Stat, fstat, mkdirat, open, openat, readlinkat};
use rustix::io::Errno;
use std::ffi::{OsStr, OsString};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

/// Maximum number of symbolic links in a path, as in the kernel (`MAXSYMLINKS` in include/linux/namei.h).
const LINKS_MAX: u32 = 40;

const STICKY: u32 = 0o1000;
const GROUP_WRITES: u32 = 0o020;
const OTHERS_WRITE: u32 = 0o002;

/// The expected target of a walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    File,
    Folder,
    /// A directory that is created if it is missing, with its parents.
    NewFolder,
}

/// The state of a walk.
#[derive(Debug)]
pub(crate) struct Walk {
    owners: Owners,
    /// The directory or file that has been reached.
    current: OwnedFd,
    /// Its path, for messages.
    path: PathBuf,
    /// The remaining components, in reverse order.
    names: Vec<OsString>,
    links: u32,
}

impl Walk {
    pub(crate) fn new(path: &Path, owners: Owners) -> Result<Self, Error> {
        let absolute =
            std::path::absolute(path).map_err(|source| Error::Host { path: path.to_owned(), source })?;
        let mut walk = Self { owners, current: root()?, path: "/".into(), names: Vec::new(), links: 0 };
        walk.push(&absolute);
        Ok(walk)
    }

    /// Inserts the components of a path before the remaining ones.
    fn push(&mut self, path: &Path) {
        let names = path.components().rev().filter_map(|part| match part {
            Component::Normal(name) => Some(name.to_owned()),
            Component::ParentDir => Some("..".into()),
            _ => None,
        });
        self.names.extend(names);
    }

    /// Walks to the end of the path.
    pub(crate) fn to(mut self, target: Target) -> Result<OwnedFd, Error> {
        loop {
            let stat = self.stat(&self.current)?;
            let Some(name) = self.names.pop() else { return self.check_target(&stat, target) };
            self.check_parent(&stat)?;
            self.path.push(&name);
            let entry = self.open(&name, target)?;
            let stat = self.stat(&entry)?;
            if FileType::from_raw_mode(stat.st_mode) == FileType::Symlink {
                self.check_owner(&stat, true)?;
                self.follow(&entry)?;
            } else {
                self.current = entry;
            }
        }
    }

    fn open(&self, name: &OsStr, target: Target) -> Result<OwnedFd, Error> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let open = || openat(&self.current, name, flags, Mode::empty());
        let entry = match open() {
            Err(Errno::NOENT) if target == Target::NewFolder => {
                match mkdirat(&self.current, name, Mode::RWXU) {
                    Ok(()) | Err(Errno::EXIST) => open(),
                    Err(error) => Err(error),
                }
            }
            result => result,
        };
        entry.map_err(|error| self.host_error(error))
    }

    fn follow(&mut self, link: &OwnedFd) -> Result<(), Error> {
        self.links += 1;
        if self.links > LINKS_MAX {
            return Err(self.host_error(Errno::LOOP));
        }
        let text = readlinkat(link, "", Vec::new()).map_err(|error| self.host_error(error))?;
        let target = Path::new(OsStr::from_bytes(text.as_bytes()));
        self.path.pop();
        if target.is_absolute() {
            (self.current, self.path) = (root()?, "/".into());
        }
        self.push(target);
        Ok(())
    }

    /// Checks a directory on the path. Others may have write permission if the sticky bit keeps them from replacing the
    /// entries of this user.
    fn check_parent(&self, stat: &Stat) -> Result<(), Error> {
        self.check_owner(stat, true)?;
        if stat.st_mode & STICKY != 0 { Ok(()) } else { check_mode(&self.path, stat) }
    }

    fn check_target(self, stat: &Stat, target: Target) -> Result<OwnedFd, Error> {
        check(&self.path, stat, target, self.owners)?;
        Ok(self.current)
    }

    fn check_owner(&self, stat: &Stat, is_parent: bool) -> Result<(), Error> {
        check_owner(&self.path, stat, self.owners, is_parent)
    }

    fn stat(&self, entry: &OwnedFd) -> Result<Stat, Error> {
        fstat(entry).map_err(|error| self.host_error(error))
    }

    fn host_error(&self, error: Errno) -> Error {
        Error::Host { path: self.path.clone(), source: error.into() }
    }
}

/// Checks the type, the owner and the mode of a target.
pub(crate) fn check(path: &Path, stat: &Stat, target: Target, owners: Owners) -> Result<(), Error> {
    let (kind, what) = match target {
        Target::File => (FileType::RegularFile, "regular file"),
        Target::Folder | Target::NewFolder => (FileType::Directory, "folder"),
    };
    if FileType::from_raw_mode(stat.st_mode) != kind {
        return Err(Error::Kind { path: path.to_owned(), what });
    }
    check_owner(path, stat, owners, false)?;
    check_mode(path, stat)
}

fn check_owner(path: &Path, stat: &Stat, owners: Owners, is_parent: bool) -> Result<(), Error> {
    if owners.has(stat.st_uid) || (is_parent && group::is_unmapped(stat.st_uid)) {
        return Ok(());
    }
    Err(Error::Owner { path: path.to_owned(), uid: stat.st_uid })
}

fn check_mode(path: &Path, stat: &Stat) -> Result<(), Error> {
    let by_group = stat.st_mode & GROUP_WRITES != 0 && !group::is_private_group(stat.st_gid);
    if by_group || stat.st_mode & OTHERS_WRITE != 0 {
        return Err(Error::Writable(path.to_owned()));
    }
    Ok(())
}

fn root() -> Result<OwnedFd, Error> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    open("/", flags, Mode::empty()).map_err(|error| Error::Host { path: "/".into(), source: error.into() })
}
