//! The root directory of the program: `BASE/PROGRAM/ID/root`, with the devices that it needs.
//!
//! The program's user owns the directory, and may have left anything there in an earlier run, also processes: no link in it is
//! followed, and the devices are in directories of root.

use crate::Error;
use crate::arguments::Arguments;
use rustix::fs::{
    AtFlags, FileType, FlockOperation, Gid, Mode, OFlags, Stat, Uid, chownat, fchown, flock, fstat, mkdirat,
    mknodat, open, openat, stat, unlinkat,
};
use rustix::io::Errno;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// Devices of the host: their path, and their directory and name in the root directory.
const DEVICES: [(&str, &[&str], &str); 2] =
    [("/dev/kvm", &["dev"], "kvm"), ("/dev/net/tun", &["dev", "net"], "tun")];

/// How long the end of an earlier program with the same ID is waited for.
const END_TIMEOUT: Duration = Duration::from_secs(1);

/// The directory. What was created in it is removed on drop, and so are it and those above it, if they were created and are
/// empty.
#[derive(Debug)]
pub(crate) struct JailDirectory {
    path: PathBuf,
    pub(crate) root: OwnedFd,
    /// Locked while this process runs.
    _lock: OwnedFd,
    /// Those of this ID and of the program, if they were created.
    created_parents: Vec<PathBuf>,
    /// What was created: its directory, its name, and how it is removed. In this order.
    created: Vec<(OwnedFd, PathBuf, AtFlags)>,
}

impl JailDirectory {
    /// Creates what does not exist.
    pub(crate) fn create(arguments: &Arguments) -> Result<Self, Error> {
        let of_program = arguments.chroot_base_dir.join(arguments.program_name());
        let parent = of_program.join(&arguments.id);
        let created_parents =
            [&parent, &of_program].into_iter().filter(|path| !path.exists()).cloned().collect();
        let lock = lock(&parent)?;
        let failed = |what, path: &Path| {
            let path = path.to_owned();
            move |error: Errno| Error::Path { what, path, source: error.into() }
        };
        let (path, mut created) = (parent.join("root"), Vec::new());
        let root = directory(&lock, &path, Path::new("root"), Mode::RWXU, &mut created)?;
        let owner = (Some(Uid::from_raw(arguments.uid)), Some(Gid::from_raw(arguments.gid)));
        fchown(&root, owner.0, owner.1).map_err(failed("change the owner of", &path))?;
        let mut this = Self { path, root, _lock: lock, created_parents, created };
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
            // In a directory of its own, a process of the user could put another file in the place of the device.
            let is_roots = fstat(&parent).is_ok_and(|stat| {
                stat.st_uid == 0 && !Mode::from_raw_mode(stat.st_mode).intersects(Mode::WGRP | Mode::WOTH)
            });
            if !is_roots {
                return Err(Error::Unexpected(path));
            }
        }
        path.push(name);
        let failed =
            |what, path: &Path, error: Errno| Error::Path { what, path: path.into(), source: error.into() };
        match mknodat(&parent, name, FileType::CharacterDevice, Mode::RUSR | Mode::WUSR, number) {
            // Left by a jailer that was killed.
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(failed("create the device", &path, error)),
        }
        let node = openat(&parent, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
            .map_err(|error| failed("open", &path, error))?;
        let is_device = fstat(&node).is_ok_and(|stat| {
            FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == number
        });
        if !is_device {
            return Err(Error::Unexpected(path));
        }
        self.created.push((parent, name.into(), AtFlags::empty()));
        chownat(&node, "", owner.0, owner.1, AtFlags::EMPTY_PATH)
            .map_err(|error| failed("change the owner of", &path, error))
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
        for directory in &self.created_parents {
            let _ = std::fs::remove_dir(directory);
        }
    }
}

/// Creates the directory of an ID, and locks it. Other users can change neither it nor those above it.
fn lock(path: &Path) -> Result<OwnedFd, Error> {
    let failed = |what, error: Errno| Error::Path { what, path: path.to_owned(), source: error.into() };
    let until = Instant::now() + END_TIMEOUT;
    loop {
        let walked = trusted_path::make_folder(path)?;
        // The descriptor of the walk has O_PATH.
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let lock = openat(&walked, ".", flags, Mode::empty()).map_err(|error| failed("open", error))?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {
                let identity = |stat: Stat| (stat.st_dev, stat.st_ino);
                // The end of an earlier program may have removed the directory in the meantime.
                if stat(path).map(identity) == fstat(&lock).map(identity) {
                    return Ok(lock);
                }
            }
            Err(Errno::WOULDBLOCK) if Instant::now() < until => thread::sleep(Duration::from_millis(10)),
            Err(Errno::WOULDBLOCK) => return Err(Error::Taken(path.to_owned())),
            Err(error) => return Err(failed("lock", error)),
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
