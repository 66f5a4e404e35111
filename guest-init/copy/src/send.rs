//! The sender, which reads files.

use crate::bytes::Writer;
use crate::entry::{Entry, Kind};
use crate::{Failure, FailureKind, MAX_DEPTH};
use alloc::vec::Vec;
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Mode, OFlags, SeekFrom, Stat, fstat, openat, readlinkat, seek, statat,
};
use rustix::io::{Errno, pread, retry_on_intr};

/// The file, link or directory to send.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    /// Path of the source.
    pub path: &'a [u8],
    /// Name in the stream. `.` for a directory whose content goes into an existing directory.
    pub name: &'a [u8],
    /// Whether a symbolic link at the path is followed.
    pub follows: bool,
}

/// Sends a file, a link, or a directory with its content. Returns a warning if special files were skipped.
///
/// # Errors
/// When the source cannot be read, or the stream cannot be written.
pub fn send(source: Source<'_>, to: impl AsFd) -> Result<Option<Failure>, Failure> {
    let mut sender = Sender { to: Writer::new(to), path: source.path.into(), levels: Vec::new() };
    let flags = if source.follows { AtFlags::empty() } else { AtFlags::SYMLINK_NOFOLLOW };
    let stat = statat(CWD, source.path, flags).map_err(sender.failed(FailureKind::Open))?;
    match sender.entry(CWD, source.path, source.name, &stat, source.follows)? {
        Sent::Complete => {}
        Sent::Directory(directory) => sender.levels.push((directory, source.path.len())),
        Sent::Unsupported => return Err(Failure::new(FailureKind::UnsupportedType, source.path)),
    }
    let skipped = sender.walk()?;
    sender.to.flush().map_err(sender.failed(FailureKind::Send))?;
    Ok(skipped)
}

/// Result of sending one entry.
enum Sent {
    Complete,
    /// The entry of a directory was sent; its content is next.
    Directory(Dir),
    /// A special file, which cannot be sent.
    Unsupported,
}

struct Sender<F> {
    to: Writer<F>,
    /// Path of the current entry, for messages.
    path: Vec<u8>,
    /// The directories on the path to the current entry, with the lengths of their paths.
    levels: Vec<(Dir, usize)>,
}

impl<F: AsFd> Sender<F> {
    fn failed(&self, kind: FailureKind) -> impl FnOnce(Errno) -> Failure + use<F> {
        let path = self.path.clone();
        move |error| Failure { kind, error: Some(error), path }
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        self.to.put(bytes).map_err(Failure::of(FailureKind::Send, &self.path))
    }

    /// Sends the content of all open directories. Returns a warning with the first skipped file.
    fn walk(&mut self) -> Result<Option<Failure>, Failure> {
        let mut skipped = None;
        while let Some((mut directory, length)) = self.levels.pop() {
            self.path.truncate(length);
            let Some(entry) = directory.read() else {
                self.put(&Entry::END_OF_DIRECTORY.to_bytes())?;
                continue;
            };
            let entry = entry.map_err(self.failed(FailureKind::Read))?;
            let sent = match entry.file_name().to_bytes() {
                b"." | b".." => None,
                name => self.member(&directory, name)?,
            };
            self.levels.push((directory, length));
            match sent {
                Some(Sent::Directory(_)) if self.levels.len() == MAX_DEPTH => {
                    return Err(Failure::new(FailureKind::TooDeep, &self.path));
                }
                Some(Sent::Directory(directory)) => self.levels.push((directory, self.path.len())),
                Some(Sent::Unsupported) if skipped.is_none() => {
                    skipped = Some(Failure::new(FailureKind::Skipped, &self.path));
                }
                _ => {}
            }
        }
        Ok(skipped)
    }

    /// Sends an entry of a directory, unless it was removed after it was listed.
    fn member(&mut self, directory: &Dir, name: &[u8]) -> Result<Option<Sent>, Failure> {
        if !self.path.ends_with(b"/") {
            self.path.push(b'/');
        }
        self.path.extend_from_slice(name);
        let parent = directory.fd().map_err(self.failed(FailureKind::Open))?;
        match statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(self.failed(FailureKind::Open)(error)),
            Ok(stat) => self.entry(parent, name, name, &stat, false).map(Some),
        }
    }

    /// Sends a file or link, or only the entry of a directory.
    fn entry(
        &mut self,
        parent: impl AsFd,
        path: &[u8],
        name: &[u8],
        stat: &Stat,
        follows: bool,
    ) -> Result<Sent, Failure> {
        // NONBLOCK: a pipe, whose open would block, may have replaced the file in the meantime.
        let mut flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        if !follows && !path.ends_with(b"/") {
            flags |= OFlags::NOFOLLOW;
        }
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => {
                let file =
                    openat(parent, path, flags, Mode::empty()).map_err(self.failed(FailureKind::Open))?;
                let stat = fstat(&file).map_err(self.failed(FailureKind::Open))?;
                if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
                    return Ok(Sent::Unsupported);
                }
                self.put_entry(Kind::File, name, &stat)?;
                self.content(&file, &stat)?;
            }
            FileType::Directory => {
                let directory = openat(parent, path, flags | OFlags::DIRECTORY, Mode::empty())
                    .map_err(self.failed(FailureKind::Open))?;
                let stat = fstat(&directory).map_err(self.failed(FailureKind::Open))?;
                let directory = Dir::new(directory).map_err(self.failed(FailureKind::Read))?;
                self.put_entry(Kind::Directory, name, &stat)?;
                return Ok(Sent::Directory(directory));
            }
            FileType::Symlink => {
                let target = readlinkat(parent, path, Vec::new()).map_err(self.failed(FailureKind::Read))?;
                self.put_entry(Kind::Link, name, stat)?;
                self.chunk_head(0, target.to_bytes().len())?;
                self.put(target.to_bytes())?;
            }
            _ => return Ok(Sent::Unsupported),
        }
        Ok(Sent::Complete)
    }

    fn put_entry(&mut self, kind: Kind, name: &[u8], stat: &Stat) -> Result<(), Failure> {
        let Ok(name_length) = u8::try_from(name.len()) else {
            return Err(Failure {
                kind: FailureKind::Send,
                error: Some(Errno::NAMETOOLONG),
                path: self.path.clone(),
            });
        };
        let entry = Entry {
            kind,
            name_length,
            mode: u16::try_from(stat.st_mode & 0o7777).unwrap_or(0),
            user: stat.st_uid,
            group: stat.st_gid,
            seconds: stat.st_mtime,
            nanoseconds: u32::try_from(stat.st_mtime_nsec).unwrap_or(0),
        };
        self.put(&entry.to_bytes())?;
        self.put(name)
    }

    fn chunk_head(&mut self, offset: u64, length: usize) -> Result<(), Failure> {
        self.put(&chunk_head(offset, length))
    }

    /// Sends the data of a file, and skips its holes.
    fn content(&mut self, file: &OwnedFd, stat: &Stat) -> Result<(), Failure> {
        const BLOCK: u64 = 512;
        /// Minimum buffer size of a read in bytes.
        const MIN_READ: usize = 4 << 10;
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        let has_holes = u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(BLOCK) < size;
        let (mut offset, mut data_end) = (0, if has_holes { 0 } else { u64::MAX });
        loop {
            if offset >= data_end {
                match seek(file, SeekFrom::Data(offset)) {
                    Ok(data) => {
                        offset = data;
                        data_end = seek(file, SeekFrom::Hole(offset)).unwrap_or(u64::MAX);
                    }
                    // A hole up to the end of the file.
                    Err(Errno::NXIO) => return self.chunk_head(offset.max(size), 0),
                    Err(_) => data_end = u64::MAX,
                }
            }
            let max = usize::try_from(data_end - offset).unwrap_or(usize::MAX);
            let buffer = self
                .to
                .free_space(CHUNK_HEAD + MIN_READ)
                .map_err(Failure::of(FailureKind::Send, &self.path))?;
            let (head, data) = buffer.split_at_mut(CHUNK_HEAD);
            let length = data.len().min(max);
            let count = retry_on_intr(|| pread(file, &mut data[..length], offset))
                .map_err(Failure::of(FailureKind::Read, &self.path))?;
            head.copy_from_slice(&chunk_head(offset, count));
            self.to.advance(CHUNK_HEAD + count);
            if count == 0 {
                return Ok(());
            }
            offset += count as u64;
        }
    }
}

/// Length of a chunk's header in bytes.
pub(crate) const CHUNK_HEAD: usize = 12;

fn chunk_head(offset: u64, length: usize) -> [u8; CHUNK_HEAD] {
    let mut bytes = [0; CHUNK_HEAD];
    bytes[..8].copy_from_slice(&offset.to_le_bytes());
    bytes[8..].copy_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes());
    bytes
}
