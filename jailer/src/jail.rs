//! The root directory of the program: `BASE/PROGRAM/ID/root`, with the devices that it needs.
//!
//! The program's user owns the directory, and may have left anything there in an earlier run: no link in it is followed, and
//! nothing that exists is changed.

use crate::Error;
use crate::arguments::Arguments;
use rustix::fs::{
    AtFlags, FileType, FlockOperation, Gid, Mode, OFlags, Uid, chownat, fchown, flock, mkdirat, mknodat,
    open, openat, stat, statat, unlinkat,
};
use rustix::io::Errno;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// Devices of the host: their path, and their directory and name in the root directory.
const DEVICES: [(&str, &[&str], &str); 2] =
    [("/dev/kvm", &["dev"], "kvm"), ("/dev/net/tun", &["dev", "net"], "tun")];

/// The directory, which is removed on drop with all that was created in it, as far as it is empty.
#[derive(Debug)]
pub(crate) struct JailDirectory {
    path: PathBuf,
    pub(crate) root: OwnedFd,
    /// Locked while the program runs.
    _lock: OwnedFd,
    /// What was created: its directory, its name, and how it is removed. In this order.
    created: Vec<(OwnedFd, PathBuf, AtFlags)>,
}

impl JailDirectory {
    /// Creates what does not exist.
    pub(crate) fn create(arguments: &Arguments) -> Result<Self, Error> {
        let parent = arguments.chroot_base_dir.join(arguments.program_name()).join(&arguments.id);
        let lock = trusted_path::make_folder(&parent)?;
        let failed = |what, path: &Path| {
            let path = path.to_owned();
            move |error: Errno| Error::Path { what, path, source: error.into() }
        };
        // The descriptor of the walk has O_PATH.
        let lock = openat(&lock, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map_err(failed("open", &parent))?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => return Err(Error::Taken(parent)),
            result => result.map_err(failed("lock", &parent))?,
        }
        let (path, mut created) = (parent.join("root"), Vec::new());
        let root = directory(&lock, &path, Path::new("root"), Mode::RWXU, &mut created)?;
        let owner = (Some(Uid::from_raw(arguments.uid)), Some(Gid::from_raw(arguments.gid)));
        fchown(&root, owner.0, owner.1).map_err(failed("change the owner of", &path))?;
        let mut this = Self { path, root, _lock: lock, created };
        for (source, directories, name) in DEVICES {
            match stat(source) {
                Err(Errno::NOENT) => {}
                Err(error) => return Err(failed("find", Path::new(source))(error)),
                Ok(device) => this.add_device(device.st_rdev, directories, name, owner)?,
            }
        }
        Ok(this)
    }

    fn add_device(
        &mut self,
        number: u64,
        directories: &[&str],
        name: &str,
        owner: (Option<Uid>, Option<Gid>),
    ) -> Result<(), Error> {
        const FOR_ALL: Mode =
            Mode::RWXU.union(Mode::RGRP).union(Mode::XGRP).union(Mode::ROTH).union(Mode::XOTH);
        let mut path = self.path.clone();
        let mut parent = duplicate(&self.root)?;
        for part in directories {
            path.push(part);
            parent = directory(&parent, &path, Path::new(part), FOR_ALL, &mut self.created)?;
        }
        path.push(name);
        match mknodat(&parent, name, FileType::CharacterDevice, Mode::RUSR | Mode::WUSR, number) {
            Ok(()) => {
                self.created.push((duplicate(&parent)?, name.into(), AtFlags::empty()));
                chownat(&parent, name, owner.0, owner.1, AtFlags::SYMLINK_NOFOLLOW)
                    .map_err(|error| Error::Path { what: "change the owner of", path, source: error.into() })
            }
            // Left by a jailer that was killed.
            Err(Errno::EXIST) => {
                let found = statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW);
                let is_device = found.is_ok_and(|stat| {
                    FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice
                        && stat.st_rdev == number
                });
                if is_device { Ok(()) } else { Err(Error::Unexpected(path)) }
            }
            Err(error) => Err(Error::Path { what: "create the device", path, source: error.into() }),
        }
    }

    /// Writes the PID of the program to `PROGRAM.pid`, as Firecracker's jailer does.
    pub(crate) fn write_pid(&mut self, arguments: &Arguments, pid: i32) -> Result<(), Error> {
        let mut name = arguments.program_name().to_owned();
        name.push(".pid");
        let failed =
            |error: Errno| Error::Path { what: "write", path: self.path.join(&name), source: error.into() };
        match unlinkat(&self.root, &name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => return Err(failed(error)),
        }
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::ROTH;
        let file = openat(&self.root, &name, flags, mode).map_err(failed)?;
        self.created.push((duplicate(&self.root)?, name.clone().into(), AtFlags::empty()));
        rustix::io::write(&file, pid.to_string().as_bytes()).map_err(failed)?;
        Ok(())
    }
}

impl Drop for JailDirectory {
    fn drop(&mut self) {
        for (parent, name, flags) in self.created.drain(..).rev() {
            // A directory with files of the user stays.
            let _ = unlinkat(&parent, &name, flags);
        }
        // The directories of this ID and of the program, if nothing is left in them.
        for directory in self.path.ancestors().skip(1).take(2) {
            let _ = std::fs::remove_dir(directory);
        }
    }
}

/// Opens a directory, which is created if it does not exist. A link is not followed.
fn directory(
    parent: &OwnedFd,
    path: &Path,
    name: &Path,
    mode: Mode,
    created: &mut Vec<(OwnedFd, PathBuf, AtFlags)>,
) -> Result<OwnedFd, Error> {
    match mkdirat(parent, name, mode) {
        Ok(()) => created.push((duplicate(parent)?, name.to_owned(), AtFlags::REMOVEDIR)),
        Err(Errno::EXIST) => {}
        Err(error) => {
            return Err(Error::Path { what: "create", path: path.to_owned(), source: error.into() });
        }
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match openat(parent, name, flags, Mode::empty()) {
        Err(Errno::NOTDIR | Errno::LOOP) => Err(Error::Unexpected(path.to_owned())),
        result => {
            result.map_err(|error| Error::Path { what: "open", path: path.to_owned(), source: error.into() })
        }
    }
}

fn duplicate(fd: &OwnedFd) -> Result<OwnedFd, Error> {
    fd.try_clone().map_err(|error| Error::Host("duplicate a descriptor", error))
}

/// Opens a network namespace.
pub(crate) fn open_namespace(path: &Path) -> Result<OwnedFd, Error> {
    open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map_err(|error| Error::Path {
        what: "open the network namespace",
        path: path.to_owned(),
        source: error.into(),
    })
}
