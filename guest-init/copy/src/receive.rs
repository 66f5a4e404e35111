//! The end that makes files, and takes nothing of what the other end says for granted.

use crate::bytes::{NoBytes, Reader};
use crate::entry::{Entry, Kind, is_name};
use crate::send::CHUNK_HEAD;
use crate::{CHUNK, Failure, MAX_DEPTH, What};
use alloc::vec::Vec;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, Timespec, Timestamps, UTIME_OMIT, Uid, chownat, fchmod,
    fchown, fstat, ftruncate, futimens, mkdirat, openat, readlinkat, renameat, statat, symlinkat, unlinkat,
    utimensat,
};
use rustix::io::{Errno, pwrite, retry_on_intr};
use rustix::path::DecInt;
use rustix::process::getpid;

/// Whether the end that sends is believed to want no harm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sender {
    /// A symbolic link at the destination's path is followed.
    Trusted,
    /// It is not: an earlier stream, or another way into the destination's folder, may have planted it.
    Untrusted,
}

/// Where things go, and what of them is kept.
#[derive(Clone, Copy, Debug)]
pub struct Destination<'a> {
    /// A directory that is there, in which case things go into it, or what the thing is called from now on.
    pub path: &'a [u8],
    /// The origin of the stream.
    pub sender: Sender,
    /// What the thing is called instead of what the stream says; `.` where the entries of a directory are meant.
    pub name: Option<&'a [u8]>,
    /// Whether things keep their owners.
    pub keeps_owners: bool,
    /// The bits that a mode may have.
    pub mode_bits: u16,
}

/// Receives a file, a link, or a directory with all that is in it. A file or a link appears at its name when it is
/// whole, in place of what was there.
///
/// # Errors
/// When something cannot be made, or the stream breaks the rules or off.
pub fn receive(destination: Destination<'_>, from: impl AsFd) -> Result<(), Failure> {
    let mut receiver = Receiver {
        destination,
        from: Reader::new(from),
        path: destination.path.into(),
        levels: Vec::new(),
        made: 0,
    };
    let begun = receiver.root()?;
    receiver.levels.extend(begun);
    receiver.walk()
}

/// A directory that things go into.
struct Level {
    directory: OwnedFd,
    /// The attributes that it gets when it is left; none where only its entries were meant.
    attributes: Option<Entry>,
    /// A directory that was there keeps its mode and owner.
    is_new: bool,
    path_length: usize,
}

struct Receiver<'a, F> {
    destination: Destination<'a>,
    from: Reader<F>,
    /// Where it is, for messages.
    path: Vec<u8>,
    levels: Vec<Level>,
    /// Names that were made up.
    made: u64,
}

const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

impl<F: AsFd> Receiver<'_, F> {
    fn failed(&self, what: What) -> impl FnOnce(Errno) -> Failure + use<F> {
        let path = self.path.clone();
        move |error| Failure { what, error: Some(error), path }
    }

    fn failure(&self, what: What) -> Failure {
        Failure::new(what, &self.path)
    }

    fn fill(&mut self, place: &mut [u8]) -> Result<(), Failure> {
        self.from.fill(place).map_err(|reason| match reason {
            NoBytes::End => Failure::new(What::Ended, &self.path),
            NoBytes::Error(error) => Failure::of(What::Receive, &self.path)(error),
        })
    }

    fn entry(&mut self) -> Result<(Entry, Vec<u8>), Failure> {
        let mut bytes = [0; Entry::LEN];
        self.fill(&mut bytes)?;
        let entry = Entry::from_bytes(&bytes).ok_or_else(|| self.failure(What::Malformed))?;
        let mut name = alloc::vec![0; entry.name_length.into()];
        self.fill(&mut name)?;
        Ok((entry, name))
    }

    /// Receives what the stream is of. Links among the directories of the destination's path are followed, as in every
    /// path; at its last component only those that a trusted sender may use.
    fn root(&mut self) -> Result<Option<Level>, Failure> {
        let (entry, name) = self.entry()?;
        let name = self.destination.name.map_or(name, Into::into);
        if name == b"." && entry.kind != Kind::Directory {
            return Err(self.failure(What::Malformed));
        }
        let is_trusted = self.destination.sender == Sender::Trusted;
        let (path, follow) = match self.destination.path {
            path if is_trusted => (path, OFlags::empty()),
            path => (without_end(path), OFlags::NOFOLLOW),
        };
        let needs_directory =
            self.destination.path.ends_with(b"/") || path.len() < self.destination.path.len();
        let there = match openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC | follow, Mode::empty()) {
            Err(Errno::NOENT) if needs_directory && entry.kind != Kind::Directory => {
                return Err(self.failure(What::NoDirectory));
            }
            Err(Errno::NOENT) => return self.place_at(entry, path),
            result => result.map_err(self.failed(What::Open))?,
        };
        let stat = fstat(&there).map_err(self.failed(What::Open))?;
        match (FileType::from_raw_mode(stat.st_mode), entry.kind) {
            (FileType::Directory, Kind::Directory) if name == b"." => {
                let directory =
                    openat(&there, ".", DIRECTORY, Mode::empty()).map_err(self.failed(What::Open))?;
                let path_length = self.path.len();
                Ok(Some(Level { directory, attributes: None, is_new: false, path_length }))
            }
            (FileType::Directory, _) => {
                self.name(&name);
                self.place(entry, there.as_fd(), &name)
            }
            (FileType::Symlink, Kind::Directory) => Err(self.failure(What::Link)),
            (FileType::Symlink, Kind::File) if needs_directory || leads_to_directory(path) => {
                Err(self.failure(What::Link))
            }
            (FileType::RegularFile, Kind::Directory) => Err(self.failure(What::NotDirectory)),
            (FileType::RegularFile, _) if needs_directory => Err(self.failure(What::NotDirectory)),
            (FileType::RegularFile, _) if is_trusted => {
                // Where links lead to a file, it is that file that is replaced.
                let link = [b"/proc/self/fd/", DecInt::from_fd(&there).as_bytes()].concat();
                let real = readlinkat(CWD, link, Vec::new()).map_err(self.failed(What::Open))?;
                self.place_at(entry, real.to_bytes())
            }
            (FileType::RegularFile | FileType::Symlink, _) => self.place_at(entry, path),
            _ => Err(self.failure(What::Special)),
        }
    }

    /// Receives one thing to a path whose last component is not followed.
    fn place_at(&mut self, entry: Entry, path: &[u8]) -> Result<Option<Level>, Failure> {
        let (parent, name) = split(path);
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = openat(CWD, parent, flags, Mode::empty()).map_err(Failure::of(What::Open, parent))?;
        self.place(entry, directory.as_fd(), name)
    }

    /// Receives what goes into the directories it is in.
    fn walk(&mut self) -> Result<(), Failure> {
        while let Some(level) = self.levels.pop() {
            self.path.truncate(level.path_length);
            let (entry, name) = self.entry()?;
            if entry.kind == Kind::Leave {
                self.leave(&level).map_err(self.failed(What::Attributes))?;
                continue;
            }
            self.name(&name);
            let begun = self.place(entry, level.directory.as_fd(), &name)?;
            self.levels.push(level);
            if begun.is_some() && self.levels.len() == MAX_DEPTH {
                return Err(self.failure(What::Depth));
            }
            self.levels.extend(begun);
        }
        Ok(())
    }

    /// Gives a directory its attributes, when nothing goes into it any more.
    fn leave(&self, level: &Level) -> Result<(), Errno> {
        match &level.attributes {
            Some(entry) if level.is_new => self.set_attributes(&level.directory, entry),
            Some(entry) => match futimens(&level.directory, &times(entry)) {
                // The directory of another user, in which the caller may make files.
                Err(Errno::PERM) => Ok(()),
                result => result,
            },
            None => Ok(()),
        }
    }

    fn name(&mut self, name: &[u8]) {
        if !self.path.ends_with(b"/") {
            self.path.push(b'/');
        }
        self.path.extend_from_slice(name);
    }

    /// Receives one thing and gives it a name in a directory. Of a directory no more than that it begins; it is returned.
    fn place(&mut self, entry: Entry, parent: BorrowedFd<'_>, name: &[u8]) -> Result<Option<Level>, Failure> {
        if !is_name(name) {
            return Err(self.failure(What::Malformed));
        }
        match entry.kind {
            Kind::Directory => return self.directory(entry, parent, name).map(Some),
            Kind::File => {
                let (draft, file) = self.draft(parent, |draft| {
                    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
                    openat(parent, draft, flags, Mode::from_raw_mode(0o600))
                })?;
                self.content(&file)?;
                self.set_attributes(&file, &entry).map_err(self.failed(What::Attributes))?;
                draft.publish(name).map_err(self.failed(What::Replace))?;
            }
            Kind::Link => {
                let target = self.target()?;
                let (draft, ()) = self.draft(parent, |draft| symlinkat(&target[..], parent, draft))?;
                self.set_link_attributes(&draft, &entry).map_err(self.failed(What::Attributes))?;
                draft.publish(name).map_err(self.failed(What::Replace))?;
            }
            Kind::Leave => return Err(self.failure(What::Malformed)),
        }
        Ok(None)
    }

    fn directory(&self, entry: Entry, parent: BorrowedFd<'_>, name: &[u8]) -> Result<Level, Failure> {
        let is_new = match mkdirat(parent, name, Mode::RWXU) {
            Ok(()) => true,
            Err(Errno::EXIST) => false,
            Err(error) => return Err(self.failed(What::Make)(error)),
        };
        let directory = match openat(parent, name, DIRECTORY | OFlags::NOFOLLOW, Mode::empty()) {
            Err(Errno::NOTDIR | Errno::LOOP) => return Err(self.failure(What::NotDirectory)),
            result => result.map_err(self.failed(What::Open))?,
        };
        Ok(Level { directory, attributes: Some(entry), is_new, path_length: self.path.len() })
    }

    /// Makes something under a name that nothing has.
    fn draft<'p, T>(
        &mut self,
        parent: BorrowedFd<'p>,
        make: impl Fn(&[u8]) -> Result<T, Errno>,
    ) -> Result<(Draft<'p>, T), Failure> {
        const ATTEMPTS: u32 = 1000;
        for _ in 0..ATTEMPTS {
            self.made += 1;
            let (process, number) = (DecInt::new(getpid().as_raw_pid()), DecInt::new(self.made));
            let name = [b".kindling-cp-", process.as_bytes(), b"-", number.as_bytes()].concat();
            match make(&name) {
                Ok(thing) => return Ok((Draft { parent, name: Some(name) }, thing)),
                // Left by a process that was killed and had this one's number.
                Err(Errno::EXIST) => {}
                Err(error) => return Err(self.failed(What::Make)(error)),
            }
        }
        Err(self.failed(What::Make)(Errno::EXIST))
    }

    fn chunk(&mut self) -> Result<(u64, usize), Failure> {
        let mut head = [0; CHUNK_HEAD];
        self.fill(&mut head)?;
        let [a, b, c, d, e, f, g, h, i, j, k, l] = head;
        let offset = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
        let length = usize::try_from(u32::from_le_bytes([i, j, k, l])).unwrap_or(usize::MAX);
        if length > CHUNK { Err(self.failure(What::Malformed)) } else { Ok((offset, length)) }
    }

    fn content(&mut self, file: &OwnedFd) -> Result<(), Failure> {
        let mut end = 0;
        loop {
            let (mut offset, mut left) = self.chunk()?;
            if offset < end || offset > i64::MAX.unsigned_abs() - CHUNK as u64 {
                return Err(self.failure(What::Malformed));
            }
            if left == 0 {
                // A hole at the end, if there is one.
                return match offset {
                    _ if offset == end => Ok(()),
                    size => ftruncate(file, size).map_err(self.failed(What::Write)),
                };
            }
            while left > 0 {
                let bytes = self.from.some(left).map_err(|reason| match reason {
                    NoBytes::End => Failure::new(What::Ended, &self.path),
                    NoBytes::Error(error) => Failure::of(What::Receive, &self.path)(error),
                })?;
                write_at(file, bytes, offset).map_err(Failure::of(What::Write, &self.path))?;
                offset += bytes.len() as u64;
                left -= bytes.len();
            }
            end = offset;
        }
    }

    /// Where a link leads.
    fn target(&mut self) -> Result<Vec<u8>, Failure> {
        /// PATH_MAX, with a NUL.
        const MOST: usize = 4096;
        let (_, length) = self.chunk()?;
        if length == 0 || length >= MOST {
            return Err(self.failure(What::Malformed));
        }
        let mut target = alloc::vec![0; length];
        self.fill(&mut target)?;
        if target.contains(&0) { Err(self.failure(What::Malformed)) } else { Ok(target) }
    }

    /// The owner first: a change of it takes bits of the mode away. Access time stays the present.
    fn set_attributes(&self, file: &OwnedFd, entry: &Entry) -> Result<(), Errno> {
        if self.destination.keeps_owners {
            fchown(file, Some(Uid::from_raw(entry.user)), Some(Gid::from_raw(entry.group)))?;
        }
        fchmod(file, Mode::from_raw_mode((entry.mode & self.destination.mode_bits).into()))?;
        futimens(file, &times(entry))
    }

    fn set_link_attributes(&self, link: &Draft<'_>, entry: &Entry) -> Result<(), Errno> {
        let Some(name) = link.name.as_deref() else { return Ok(()) };
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        if self.destination.keeps_owners {
            let (user, group) = (Uid::from_raw(entry.user), Gid::from_raw(entry.group));
            chownat(link.parent, name, Some(user), Some(group), flags)?;
        }
        utimensat(link.parent, name, &times(entry), flags)
    }
}

fn write_at(file: &OwnedFd, mut bytes: &[u8], mut offset: u64) -> Result<(), Errno> {
    while !bytes.is_empty() {
        let count = retry_on_intr(|| pwrite(file, bytes, offset))?;
        if count == 0 {
            return Err(Errno::NOSPC);
        }
        bytes = &bytes[count..];
        offset += count as u64;
    }
    Ok(())
}

fn times(entry: &Entry) -> Timestamps {
    Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        last_modification: Timespec { tv_sec: entry.seconds, tv_nsec: entry.nanoseconds.into() },
    }
}

/// A file or link that has not got its name yet, and goes where it does not get one.
struct Draft<'p> {
    parent: BorrowedFd<'p>,
    name: Option<Vec<u8>>,
}

impl Draft<'_> {
    fn publish(mut self, name: &[u8]) -> Result<(), Errno> {
        let Some(draft) = self.name.as_deref() else { return Ok(()) };
        renameat(self.parent, draft, self.parent, name)?;
        self.name = None;
        Ok(())
    }
}

impl Drop for Draft<'_> {
    fn drop(&mut self) {
        if let Some(name) = &self.name {
            let _ = unlinkat(self.parent, &name[..], AtFlags::empty());
        }
    }
}

/// A path without the slashes and dots behind its last component, which would make the kernel follow a link there.
pub(crate) fn without_end(mut path: &[u8]) -> &[u8] {
    while let Some(shorter) = path.strip_suffix(b"/").or_else(|| path.strip_suffix(b"/.")) {
        if shorter.is_empty() {
            return b"/";
        }
        path = shorter;
    }
    path
}

fn leads_to_directory(path: &[u8]) -> bool {
    statat(CWD, path, AtFlags::empty())
        .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory)
}

/// The directory of a path, and its last component.
fn split(path: &[u8]) -> (&[u8], &[u8]) {
    let end = path.iter().rposition(|&byte| byte != b'/').map_or(0, |at| at + 1);
    let path = &path[..end];
    match path.iter().rposition(|&byte| byte == b'/') {
        None => (b".", path),
        Some(0) => (b"/", &path[1..]),
        Some(at) => (&path[..at], &path[at + 1..]),
    }
}
