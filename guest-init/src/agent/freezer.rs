//! Freezes all processes of the guest but init, by the freezer of cgroups (Documentation/admin-guide/cgroup-v2.rst in the
//! kernel): while a snapshot is taken, and in a copy until it has random numbers and a time of its own. Programs do not
//! notice.

use crate::files;
use alloc::vec::Vec;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, mkdirat, open, openat, readlinkat, unlinkat};
use rustix::io::{Errno, pread};
use rustix::path::DecInt;

/// The cgroups of the guest, or of its namespace.
const CGROUPS: &str = "/sys/fs/cgroup";
/// The cgroup of processes that were in the root cgroup, which cannot be frozen.
const OWN: &str = "kindling.frozen";
/// Time limit for a cgroup to freeze: a process in a system call is frozen when the call returns.
const LIMIT: Timespec = Timespec { tv_sec: 5, tv_nsec: 0 };
/// Maximum number of passes over the processes: those that are forked meanwhile are in the next pass.
const PASSES: u32 = 64;
const INIT: i32 = 1;

/// Frozen processes.
pub(super) struct Frozen {
    cgroups: OwnedFd,
    /// Names of cgroups that were not frozen before.
    names: Vec<Vec<u8>>,
}

/// Freezes all processes. After an error, they run.
pub(super) fn freeze() -> Result<Frozen, Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mut this = Frozen { cgroups: open(CGROUPS, flags, Mode::empty())?, names: Vec::new() };
    match this.freeze_all() {
        Ok(()) => Ok(this),
        Err(error) => {
            this.thaw();
            Err(error)
        }
    }
}

impl Frozen {
    fn freeze_all(&mut self) -> Result<(), Errno> {
        match mkdirat(&self.cgroups, OWN, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error),
        }
        for name in self.children()? {
            let freeze = [&name, b"/cgroup.freeze".as_slice()].concat();
            if name != OWN.as_bytes() && self.read(&freeze)?.starts_with(b"1") {
                continue;
            }
            self.write(&freeze, b"1")?;
            self.names.push(name);
        }
        self.move_all("cgroup.procs", "kindling.frozen/cgroup.procs")?;
        if self.read(b"kindling.frozen/cgroup.procs")?.is_empty() {
            self.names.retain(|name| name != OWN.as_bytes());
            unlinkat(&self.cgroups, OWN, AtFlags::REMOVEDIR)?;
        }
        self.names.iter().try_for_each(|name| self.wait_until_frozen(name))
    }

    /// Lets the processes run.
    pub(super) fn thaw(self) {
        for name in &self.names {
            let _ = self.write(&[name, b"/cgroup.freeze".as_slice()].concat(), b"0");
        }
        if !self.names.iter().any(|name| name == OWN.as_bytes()) {
            return;
        }
        let _ = self.move_all("kindling.frozen/cgroup.procs", "cgroup.procs");
        // Processes whose cgroup has controllers cannot be moved back, and stay.
        let _ = unlinkat(&self.cgroups, OWN, AtFlags::REMOVEDIR);
    }

    /// Moves all processes but init and the kernel's from a cgroup to another.
    fn move_all(&self, from: &str, to: &str) -> Result<(), Errno> {
        for _ in 0..PASSES {
            let list = self.read(from.as_bytes())?;
            let mut has_moved = false;
            for process in numbers(&list).filter(|&process| process != INIT && is_of_user(process)) {
                match self.write(to.as_bytes(), DecInt::new(process).as_bytes()) {
                    Ok(()) => has_moved = true,
                    // It has ended.
                    Err(Errno::SRCH) => {}
                    Err(error) => return Err(error),
                }
            }
            if !has_moved {
                return Ok(());
            }
        }
        Err(Errno::AGAIN)
    }

    fn wait_until_frozen(&self, name: &[u8]) -> Result<(), Errno> {
        let path = [name, b"/cgroup.events"].concat();
        let file = openat(&self.cgroups, &*path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        loop {
            let mut text = [0; 128];
            let length = pread(&file, &mut text, 0)?;
            if text[..length].split(|&byte| byte == b'\n').any(|line| line == b"frozen 1") {
                return Ok(());
            }
            // The file reports each change of its content.
            if poll(&mut [PollFd::new(&file, PollFlags::PRI)], Some(&LIMIT))? == 0 {
                return Err(Errno::TIMEDOUT);
            }
        }
    }

    /// The names of the cgroups below.
    fn children(&self) -> Result<Vec<Vec<u8>>, Errno> {
        let mut names = Vec::new();
        files::each_entry(&files::open_directory(&self.cgroups, ".")?, &mut |entry| {
            if entry.file_type() == FileType::Directory {
                names.push(entry.file_name().to_bytes().to_vec());
            }
            Ok(())
        })?;
        Ok(names)
    }

    #[inline(never)]
    fn read(&self, path: &[u8]) -> Result<Vec<u8>, Errno> {
        let file = openat(&self.cgroups, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        let mut text = Vec::new();
        let mut part = [0; 1024];
        loop {
            match rustix::io::read(&file, &mut part)? {
                0 => return Ok(text),
                count => text.extend_from_slice(&part[..count]),
            }
        }
    }

    fn write(&self, path: &[u8], value: &[u8]) -> Result<(), Errno> {
        files::write(&self.cgroups, path, OFlags::empty(), value)
    }
}

/// The numbers of a list, one a line.
fn numbers(list: &[u8]) -> impl Iterator<Item = i32> {
    list.split(|&byte| byte == b'\n').filter_map(files::number)
}

/// Whether a process executes a program. Threads of the kernel cannot be frozen, and do not run programs.
fn is_of_user(process: i32) -> bool {
    let path = [b"/proc/".as_slice(), DecInt::new(process).as_bytes(), b"/exe"].concat();
    readlinkat(CWD, &*path, Vec::new()).is_ok()
}
