//! The end that reads files.

use crate::bytes::Writer;
use crate::entry::{Entry, Kind};
use crate::{Failure, MAX_DEPTH, What};
use alloc::vec::Vec;
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Mode, OFlags, SeekFrom, Stat, fstat, openat, readlinkat, seek, statat,
};
use rustix::io::{Errno, pread, retry_on_intr};

/// What is sent.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    /// Where it is.
    pub path: &'a [u8],
    /// What it is called at the other end; `.` for a directory whose entries go into one that is there.
    pub name: &'a [u8],
    /// Whether it is what a link leads to rather than the link.
    pub follows: bool,
}

/// Sends a file, a link, or a directory with all that is in it. Returns what was left out because it is neither.
///
/// # Errors
/// When something cannot be read, or nobody takes it.
pub fn send(source: Source<'_>, to: impl AsFd) -> Result<Option<Failure>, Failure> {
    let mut sender = Sender { to: Writer::new(to), path: source.path.into(), levels: Vec::new() };
    let flags = if source.follows { AtFlags::empty() } else { AtFlags::SYMLINK_NOFOLLOW };
    let stat = statat(CWD, source.path, flags).map_err(sender.failed(What::Open))?;
    match sender.entry(CWD, source.path, source.name, &stat, source.follows)? {
        Sent::Whole => {}
        Sent::Begun(directory) => sender.levels.push((directory, source.path.len())),
        Sent::Nothing => return Err(Failure::new(What::Special, source.path)),
    }
    let left_out = sender.walk()?;
    sender.to.flush().map_err(sender.failed(What::Send))?;
    Ok(left_out)
}

/// What became of something that was to be sent.
enum Sent {
    Whole,
    /// What is in this directory is still to be sent.
    Begun(Dir),
    /// It is neither file nor directory nor link.
    Nothing,
}

struct Sender<F> {
    to: Writer<F>,
    /// Where it is, for messages.
    path: Vec<u8>,
    /// The directories it is in, and how long their paths are.
    levels: Vec<(Dir, usize)>,
}

impl<F: AsFd> Sender<F> {
    fn failed(&self, what: What) -> impl FnOnce(Errno) -> Failure + use<F> {
        let path = self.path.clone();
        move |error| Failure { what, error: Some(error), path }
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        self.to.put(bytes).map_err(Failure::of(What::Send, &self.path))
    }

    /// Sends what is in the directories it is in; the first thing that was left out.
    fn walk(&mut self) -> Result<Option<Failure>, Failure> {
        let mut left_out = None;
        while let Some((mut directory, length)) = self.levels.pop() {
            self.path.truncate(length);
            let Some(found) = directory.read() else {
                self.put(&Entry::LEAVE.to_bytes())?;
                continue;
            };
            let found = found.map_err(self.failed(What::Read))?;
            let sent = match found.file_name().to_bytes() {
                b"." | b".." => None,
                name => self.member(&directory, name)?,
            };
            self.levels.push((directory, length));
            match sent {
                Some(Sent::Begun(_)) if self.levels.len() == MAX_DEPTH => {
                    return Err(Failure::new(What::Depth, &self.path));
                }
                Some(Sent::Begun(directory)) => self.levels.push((directory, self.path.len())),
                Some(Sent::Nothing) if left_out.is_none() => {
                    left_out = Some(Failure::new(What::LeftOut, &self.path));
                }
                _ => {}
            }
        }
        Ok(left_out)
    }

    /// Sends what has a name in a directory, unless it was removed after it was listed.
    fn member(&mut self, directory: &Dir, name: &[u8]) -> Result<Option<Sent>, Failure> {
        if !self.path.ends_with(b"/") {
            self.path.push(b'/');
        }
        self.path.extend_from_slice(name);
        let parent = directory.fd().map_err(self.failed(What::Open))?;
        match statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(self.failed(What::Open)(error)),
            Ok(stat) => self.entry(parent, name, name, &stat, false).map(Some),
        }
    }

    /// Sends one thing, of a directory no more than that it begins.
    fn entry(
        &mut self,
        parent: impl AsFd,
        path: &[u8],
        name: &[u8],
        stat: &Stat,
        follows: bool,
    ) -> Result<Sent, Failure> {
        // NONBLOCK: somebody may have put a pipe there meanwhile.
        let mut flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        if !follows && !path.ends_with(b"/") {
            flags |= OFlags::NOFOLLOW;
        }
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => {
                let file = openat(parent, path, flags, Mode::empty()).map_err(self.failed(What::Open))?;
                let stat = fstat(&file).map_err(self.failed(What::Open))?;
                if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
                    return Ok(Sent::Nothing);
                }
                self.announce(Kind::File, name, &stat)?;
                self.content(&file, &stat)?;
            }
            FileType::Directory => {
                let directory = openat(parent, path, flags | OFlags::DIRECTORY, Mode::empty())
                    .map_err(self.failed(What::Open))?;
                let stat = fstat(&directory).map_err(self.failed(What::Open))?;
                let directory = Dir::new(directory).map_err(self.failed(What::Read))?;
                self.announce(Kind::Directory, name, &stat)?;
                return Ok(Sent::Begun(directory));
            }
            FileType::Symlink => {
                let target = readlinkat(parent, path, Vec::new()).map_err(self.failed(What::Read))?;
                self.announce(Kind::Link, name, stat)?;
                self.chunk_head(0, target.to_bytes().len())?;
                self.put(target.to_bytes())?;
            }
            _ => return Ok(Sent::Nothing),
        }
        Ok(Sent::Whole)
    }

    fn announce(&mut self, kind: Kind, name: &[u8], stat: &Stat) -> Result<(), Failure> {
        let Ok(name_length) = u8::try_from(name.len()) else {
            return Err(Failure {
                what: What::Send,
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

    /// Sends a file's bytes, and of its holes only where they are.
    fn content(&mut self, file: &OwnedFd, stat: &Stat) -> Result<(), Failure> {
        const BLOCK: u64 = 512;
        /// Less is not read at once.
        const LEAST: usize = 4 << 10;
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
                    // Up to the end there is a hole.
                    Err(Errno::NXIO) => return self.chunk_head(offset.max(size), 0),
                    Err(_) => data_end = u64::MAX,
                }
            }
            let most = usize::try_from(data_end - offset).unwrap_or(usize::MAX);
            let place = self.to.room(CHUNK_HEAD + LEAST).map_err(Failure::of(What::Send, &self.path))?;
            let (head, place) = place.split_at_mut(CHUNK_HEAD);
            let length = place.len().min(most);
            let count = retry_on_intr(|| pread(file, &mut place[..length], offset))
                .map_err(Failure::of(What::Read, &self.path))?;
            head.copy_from_slice(&chunk_head(offset, count));
            self.to.advance(CHUNK_HEAD + count);
            if count == 0 {
                return Ok(());
            }
            offset += count as u64;
        }
    }
}

/// Bytes in front of a chunk's.
pub(crate) const CHUNK_HEAD: usize = 12;

fn chunk_head(offset: u64, length: usize) -> [u8; CHUNK_HEAD] {
    let mut bytes = [0; CHUNK_HEAD];
    bytes[..8].copy_from_slice(&offset.to_le_bytes());
    bytes[8..].copy_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes());
    bytes
}
