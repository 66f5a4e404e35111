//! The receiver, which creates files and validates everything in the stream.

use crate::bytes::{ReadError, Reader};
use crate::directory::open_directory;
use crate::entry::{Entry, Kind, is_name};
use crate::send::CHUNK_HEAD;
use crate::{CHUNK, Failure, FailureKind, MAX_DEPTH};
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

/// Whether the sender is trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sender {
    /// A symbolic link at the destination's path is followed.
    Trusted,
    /// The sender may have created symbolic links, with an earlier stream or by other access to the destination's
    /// directory: one at the destination's path is not followed, and one among its directories only if the sender cannot
    /// gain anything by it (`open_directory`).
    Untrusted,
}

/// The destination of a stream, and the attributes to keep.
#[derive(Clone, Copy, Debug)]
pub struct Destination<'a> {
    /// An existing directory, into which the received file, link or directory goes, or its new path.
    pub path: &'a [u8],
    /// Sender of the stream.
    pub sender: Sender,
    /// Replaces the name in the stream. `.` for a directory whose content goes into the directory at `path`.
    pub name: Option<&'a [u8]>,
    /// Whether files keep their owners.
    pub keeps_owners: bool,
    /// Mask for the mode bits that files keep.
    pub mode_bits: u16,
}

/// Receives a file, a link, or a directory with its content. A complete file or link replaces an existing one
/// atomically.
///
/// # Errors
/// When a file cannot be created, or the stream is invalid or incomplete.
pub fn receive(destination: Destination<'_>, from: impl AsFd) -> Result<(), Failure> {
    let mut receiver = Receiver {
        destination,
        from: Reader::new(from),
        path: destination.path.into(),
        levels: Vec::new(),
        temporary_names: 0,
    };
    let directory = receiver.root()?;
    receiver.levels.extend(directory);
    receiver.walk()
}

/// An open directory, whose content is received.
struct Level {
    directory: OwnedFd,
    /// Attributes to set after the content; `None` for an existing directory that only receives content.
    attributes: Option<Entry>,
    /// Whether the directory was created. An existing directory keeps its mode and owner.
    is_new: bool,
    path_length: usize,
}

struct Receiver<'a, F> {
    destination: Destination<'a>,
    from: Reader<F>,
    /// Path of the current entry, for messages.
    path: Vec<u8>,
    levels: Vec<Level>,
    /// Number of temporary names so far.
    temporary_names: u64,
}

const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

impl<F: AsFd> Receiver<'_, F> {
    fn failed(&self, kind: FailureKind) -> impl FnOnce(Errno) -> Failure + use<F> {
        let path = self.path.clone();
        move |error| Failure { kind, error: Some(error), path }
    }

    fn failure(&self, kind: FailureKind) -> Failure {
        Failure::new(kind, &self.path)
    }

    fn fill(&mut self, buffer: &mut [u8]) -> Result<(), Failure> {
        self.from.fill(buffer).map_err(|reason| match reason {
            ReadError::EndOfStream => Failure::new(FailureKind::Truncated, &self.path),
            ReadError::Os(error) => Failure::of(FailureKind::Receive, &self.path)(error),
        })
    }

    fn entry(&mut self) -> Result<(Entry, Vec<u8>), Failure> {
        let mut bytes = [0; Entry::LEN];
        self.fill(&mut bytes)?;
        let entry = Entry::from_bytes(&bytes).ok_or_else(|| self.failure(FailureKind::Malformed))?;
        let mut name = alloc::vec![0; entry.name_length.into()];
        self.fill(&mut name)?;
        Ok((entry, name))
    }

    /// Receives the first entry of the stream at the destination.
    fn root(&mut self) -> Result<Option<Level>, Failure> {
        let (entry, name) = self.entry()?;
        let name = self.destination.name.map_or(name, Into::into);
        if name == b"." && entry.kind != Kind::Directory {
            return Err(self.failure(FailureKind::Malformed));
        }
        let is_trusted = self.destination.sender == Sender::Trusted;
        let shortened = without_trailing_dots(self.destination.path);
        let requires_directory =
            self.destination.path.ends_with(b"/") || shortened.len() < self.destination.path.len();
        let (parent, path, follow) = if is_trusted {
            (None, self.destination.path, OFlags::empty())
        } else {
            let (parent, last) = split(shortened);
            (Some(open_directory(parent)?), last, OFlags::NOFOLLOW)
        };
        let parent = parent.as_ref().map_or(CWD, AsFd::as_fd);
        let existing = match openat(parent, path, OFlags::PATH | OFlags::CLOEXEC | follow, Mode::empty()) {
            Err(Errno::NOENT) if requires_directory && entry.kind != Kind::Directory => {
                return Err(self.failure(FailureKind::MissingDirectory));
            }
            Err(Errno::NOENT) => return self.place_at(entry, parent, path),
            result => result.map_err(self.failed(FailureKind::Open))?,
        };
        let stat = fstat(&existing).map_err(self.failed(FailureKind::Open))?;
        match (FileType::from_raw_mode(stat.st_mode), entry.kind) {
            (FileType::Directory, Kind::Directory) if name == b"." => {
                let directory = openat(&existing, ".", DIRECTORY, Mode::empty())
                    .map_err(self.failed(FailureKind::Open))?;
                let path_length = self.path.len();
                Ok(Some(Level { directory, attributes: None, is_new: false, path_length }))
            }
            (FileType::Directory, _) => {
                self.push_name(&name);
                self.place(entry, existing.as_fd(), &name)
            }
            (FileType::Symlink, Kind::Directory) => Err(self.failure(FailureKind::Symlink)),
            (FileType::Symlink, Kind::File) if requires_directory || resolves_to_directory(parent, path) => {
                Err(self.failure(FailureKind::Symlink))
            }
            (FileType::RegularFile, Kind::Directory) => Err(self.failure(FailureKind::NotDirectory)),
            (FileType::RegularFile, _) if requires_directory => Err(self.failure(FailureKind::NotDirectory)),
            (FileType::RegularFile, _) if is_trusted => {
                // If the path is a link to a file, that file is replaced.
                let link = [b"/proc/self/fd/", DecInt::from_fd(&existing).as_bytes()].concat();
                let real = readlinkat(CWD, link, Vec::new()).map_err(self.failed(FailureKind::Open))?;
                self.place_at(entry, CWD, real.to_bytes())
            }
            (FileType::RegularFile | FileType::Symlink, _) => self.place_at(entry, parent, path),
            _ => Err(self.failure(FailureKind::UnsupportedType)),
        }
    }

    /// Receives an entry at a path, whose last component is not followed.
    fn place_at(
        &mut self,
        entry: Entry,
        from: BorrowedFd<'_>,
        path: &[u8],
    ) -> Result<Option<Level>, Failure> {
        let (parent, name) = split(path);
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory =
            openat(from, parent, flags, Mode::empty()).map_err(Failure::of(FailureKind::Open, parent))?;
        self.place(entry, directory.as_fd(), name)
    }

    /// Receives the content of all open directories.
    fn walk(&mut self) -> Result<(), Failure> {
        while let Some(level) = self.levels.pop() {
            self.path.truncate(level.path_length);
            let (entry, name) = self.entry()?;
            if entry.kind == Kind::EndOfDirectory {
                self.close_directory(&level).map_err(self.failed(FailureKind::Attributes))?;
                continue;
            }
            self.push_name(&name);
            let directory = self.place(entry, level.directory.as_fd(), &name)?;
            self.levels.push(level);
            if directory.is_some() && self.levels.len() == MAX_DEPTH {
                return Err(self.failure(FailureKind::TooDeep));
            }
            self.levels.extend(directory);
        }
        Ok(())
    }

    /// Sets the attributes of a directory after its content is complete.
    fn close_directory(&self, level: &Level) -> Result<(), Errno> {
        match &level.attributes {
            Some(entry) if level.is_new => self.set_attributes(&level.directory, entry),
            Some(entry) => match futimens(&level.directory, &times(entry)) {
                // The directory of another user, in which the caller may create files.
                Err(Errno::PERM) => Ok(()),
                result => result,
            },
            None => Ok(()),
        }
    }

    fn push_name(&mut self, name: &[u8]) {
        if !self.path.ends_with(b"/") {
            self.path.push(b'/');
        }
        self.path.extend_from_slice(name);
    }

    /// Receives a file or link into a directory. For a directory, only creates it and returns it.
    fn place(&mut self, entry: Entry, parent: BorrowedFd<'_>, name: &[u8]) -> Result<Option<Level>, Failure> {
        if !is_name(name) {
            return Err(self.failure(FailureKind::Malformed));
        }
        match entry.kind {
            Kind::Directory => return self.directory(entry, parent, name).map(Some),
            Kind::File => {
                let (temporary, file) = self.temporary(parent, |name| {
                    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
                    openat(parent, name, flags, Mode::from_raw_mode(0o600))
                })?;
                self.content(&file)?;
                self.set_attributes(&file, &entry).map_err(self.failed(FailureKind::Attributes))?;
                temporary.publish(name).map_err(self.failed(FailureKind::Replace))?;
            }
            Kind::Link => {
                let target = self.target()?;
                let (temporary, ()) = self.temporary(parent, |name| symlinkat(&target[..], parent, name))?;
                self.set_link_attributes(&temporary, &entry).map_err(self.failed(FailureKind::Attributes))?;
                temporary.publish(name).map_err(self.failed(FailureKind::Replace))?;
            }
            Kind::EndOfDirectory => return Err(self.failure(FailureKind::Malformed)),
        }
        Ok(None)
    }

    fn directory(&self, entry: Entry, parent: BorrowedFd<'_>, name: &[u8]) -> Result<Level, Failure> {
        let is_new = match mkdirat(parent, name, Mode::RWXU) {
            Ok(()) => true,
            Err(Errno::EXIST) => false,
            Err(error) => return Err(self.failed(FailureKind::Create)(error)),
        };
        let directory = match openat(parent, name, DIRECTORY | OFlags::NOFOLLOW, Mode::empty()) {
            Err(Errno::NOTDIR | Errno::LOOP) => return Err(self.failure(FailureKind::NotDirectory)),
            result => result.map_err(self.failed(FailureKind::Open))?,
        };
        Ok(Level { directory, attributes: Some(entry), is_new, path_length: self.path.len() })
    }

    /// Creates a file or link under an unused temporary name.
    fn temporary<'p, T>(
        &mut self,
        parent: BorrowedFd<'p>,
        create: impl Fn(&[u8]) -> Result<T, Errno>,
    ) -> Result<(Temporary<'p>, T), Failure> {
        const ATTEMPTS: u32 = 1000;
        for _ in 0..ATTEMPTS {
            self.temporary_names += 1;
            let (process, number) = (DecInt::new(getpid().as_raw_pid()), DecInt::new(self.temporary_names));
            let name = [b".kindling-cp-", process.as_bytes(), b"-", number.as_bytes()].concat();
            match create(&name) {
                Ok(created) => return Ok((Temporary { parent, name: Some(name) }, created)),
                // Left over from a killed process with the same process id.
                Err(Errno::EXIST) => {}
                Err(error) => return Err(self.failed(FailureKind::Create)(error)),
            }
        }
        Err(self.failed(FailureKind::Create)(Errno::EXIST))
    }

    fn chunk(&mut self) -> Result<(u64, usize), Failure> {
        let mut head = [0; CHUNK_HEAD];
        self.fill(&mut head)?;
        let [a, b, c, d, e, f, g, h, i, j, k, l] = head;
        let offset = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
        let length = usize::try_from(u32::from_le_bytes([i, j, k, l])).unwrap_or(usize::MAX);
        if length > CHUNK { Err(self.failure(FailureKind::Malformed)) } else { Ok((offset, length)) }
    }

    fn content(&mut self, file: &OwnedFd) -> Result<(), Failure> {
        let mut end = 0;
        loop {
            let (mut offset, mut remaining) = self.chunk()?;
            if offset < end || offset > i64::MAX.unsigned_abs() - CHUNK as u64 {
                return Err(self.failure(FailureKind::Malformed));
            }
            if remaining == 0 {
                // The file may end with a hole.
                return match offset {
                    _ if offset == end => Ok(()),
                    size => ftruncate(file, size).map_err(self.failed(FailureKind::Write)),
                };
            }
            while remaining > 0 {
                let bytes = self.from.some(remaining).map_err(|reason| match reason {
                    ReadError::EndOfStream => Failure::new(FailureKind::Truncated, &self.path),
                    ReadError::Os(error) => Failure::of(FailureKind::Receive, &self.path)(error),
                })?;
                write_at(file, bytes, offset).map_err(Failure::of(FailureKind::Write, &self.path))?;
                offset += bytes.len() as u64;
                remaining -= bytes.len();
            }
            end = offset;
        }
    }

    /// Receives the target of a symbolic link.
    fn target(&mut self) -> Result<Vec<u8>, Failure> {
        /// PATH_MAX, including the NUL.
        const MAX: usize = 4096;
        let (_, length) = self.chunk()?;
        if length == 0 || length >= MAX {
            return Err(self.failure(FailureKind::Malformed));
        }
        let mut target = alloc::vec![0; length];
        self.fill(&mut target)?;
        if target.contains(&0) { Err(self.failure(FailureKind::Malformed)) } else { Ok(target) }
    }

    /// Sets the owner first, because chown clears mode bits. The access time is not set.
    fn set_attributes(&self, file: &OwnedFd, entry: &Entry) -> Result<(), Errno> {
        if self.destination.keeps_owners {
            fchown(file, Some(Uid::from_raw(entry.user)), Some(Gid::from_raw(entry.group)))?;
        }
        fchmod(file, Mode::from_raw_mode((entry.mode & self.destination.mode_bits).into()))?;
        futimens(file, &times(entry))
    }

    fn set_link_attributes(&self, link: &Temporary<'_>, entry: &Entry) -> Result<(), Errno> {
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

/// A file or link with a temporary name, which is removed unless it is published.
struct Temporary<'p> {
    parent: BorrowedFd<'p>,
    name: Option<Vec<u8>>,
}

impl Temporary<'_> {
    fn publish(mut self, name: &[u8]) -> Result<(), Errno> {
        let Some(temporary) = self.name.as_deref() else { return Ok(()) };
        renameat(self.parent, temporary, self.parent, name)?;
        self.name = None;
        Ok(())
    }
}

impl Drop for Temporary<'_> {
    fn drop(&mut self) {
        if let Some(name) = &self.name {
            let _ = unlinkat(self.parent, &name[..], AtFlags::empty());
        }
    }
}

/// Removes trailing `/` and `/.`, which would make the kernel follow a symbolic link at the last component.
pub(crate) fn without_trailing_dots(mut path: &[u8]) -> &[u8] {
    while let Some(shorter) = path.strip_suffix(b"/").or_else(|| path.strip_suffix(b"/.")) {
        if shorter.is_empty() {
            return b"/";
        }
        path = shorter;
    }
    path
}

fn resolves_to_directory(parent: BorrowedFd<'_>, path: &[u8]) -> bool {
    statat(parent, path, AtFlags::empty())
        .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory)
}

/// Splits a path into its directory and its last component.
fn split(path: &[u8]) -> (&[u8], &[u8]) {
    let end = path.iter().rposition(|&byte| byte != b'/').map_or(0, |at| at + 1);
    let path = &path[..end];
    match path.iter().rposition(|&byte| byte == b'/') {
        None if end == 0 => (b"/", b"."),
        None => (b".", path),
        Some(0) => (b"/", &path[1..]),
        Some(at) => (&path[..at], &path[at + 1..]),
    }
}
