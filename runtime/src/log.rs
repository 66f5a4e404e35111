//! What a detached guest wrote: one file of records, in the order in which they came.
//!
//! A record is the stream (one byte, 1 or 2), three zeroes, the length (four bytes, little endian) and the bytes. When
//! the file is full it becomes `log.old`, in place of the one before, and another is begun: the runtime directory
//! is memory, and of a guest that writes without end the last words count.

use crate::guest::{Guest, GuestError, Process, host};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fd::OwnedFd;
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// Bytes of a file. A guest's log has at most twice as many.
const FULL: u64 = 8 << 20;
const HEADER_LEN: usize = 8;
/// Bytes of a record's content.
const LONGEST: usize = 64 << 10;
const NEW: &str = "log";
const OLD: &str = "log.old";

/// Where a record came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Stream {
    /// Standard output.
    Output = 1,
    /// Standard error.
    Error = 2,
}

/// A log that is written.
#[derive(Debug)]
pub struct Log(Mutex<Writer>);

#[derive(Debug)]
struct Writer {
    folder: PathBuf,
    file: File,
    length: u64,
    full: u64,
}

impl Log {
    /// Begins the log of a guest in its directory.
    ///
    /// # Errors
    /// When the host refuses the file.
    pub fn create(folder: &Path) -> io::Result<Self> {
        Self::with_size(folder, FULL)
    }

    fn with_size(folder: &Path, full: u64) -> io::Result<Self> {
        let file = File::create(folder.join(NEW))?;
        Ok(Self(Mutex::new(Writer { folder: folder.into(), file, length: 0, full })))
    }

    /// Adds what a stream said. Where there is no room it is lost, and the guest goes on.
    pub fn add(&self, stream: Stream, bytes: &[u8]) {
        let mut writer = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for part in bytes.chunks(LONGEST) {
            if writer.add(stream, part).is_err() {
                // A part of a record would hide all that follow.
                let _ = writer.file.set_len(writer.length);
            }
        }
    }
}

impl Writer {
    fn add(&mut self, stream: Stream, bytes: &[u8]) -> io::Result<()> {
        let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_le_bytes();
        let record = [&[stream as u8, 0, 0, 0], &length[..], bytes].concat();
        if self.length + record.len() as u64 > self.full {
            std::fs::rename(self.folder.join(NEW), self.folder.join(OLD))?;
            (self.file, self.length) = (File::create(self.folder.join(NEW))?, 0);
        }
        self.file.write_all_at(&record, self.length)?;
        self.length += record.len() as u64;
        Ok(())
    }
}

/// A log that is read, while it may be written.
#[derive(Debug)]
struct Reader {
    folder: PathBuf,
    file: File,
    at: u64,
}

impl Reader {
    /// Begins with the oldest record. `None` where there is no log.
    fn open(folder: &Path) -> io::Result<Option<Self>> {
        for name in [OLD, NEW] {
            match File::open(folder.join(name)) {
                Ok(file) => return Ok(Some(Self { folder: folder.into(), file, at: 0 })),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// The next record, if it is there.
    fn next(&mut self) -> io::Result<Option<(Stream, Vec<u8>)>> {
        if let Some(record) = self.next_of_file()? {
            return Ok(Some(record));
        }
        let Ok(newest) = File::open(self.folder.join(NEW)) else { return Ok(None) };
        if newest.metadata()?.ino() == self.file.metadata()?.ino() {
            return Ok(None);
        }
        // It may have got another record before it was full.
        if let Some(record) = self.next_of_file()? {
            return Ok(Some(record));
        }
        (self.file, self.at) = (newest, 0);
        self.next_of_file()
    }

    fn next_of_file(&mut self) -> io::Result<Option<(Stream, Vec<u8>)>> {
        let Some(header) = self.read(self.at, HEADER_LEN)? else { return Ok(None) };
        let broken = || io::Error::new(io::ErrorKind::InvalidData, "this is no log of a guest");
        let &[stream, 0, 0, 0, a, b, c, d] = &header[..] else { return Err(broken()) };
        let stream = match stream {
            1 => Stream::Output,
            2 => Stream::Error,
            _ => return Err(broken()),
        };
        let length = usize::try_from(u32::from_le_bytes([a, b, c, d])).unwrap_or(usize::MAX);
        if length > LONGEST {
            return Err(broken());
        }
        let Some(bytes) = self.read(self.at + HEADER_LEN as u64, length)? else { return Ok(None) };
        self.at += (HEADER_LEN + length) as u64;
        Ok(Some((stream, bytes)))
    }

    /// Bytes of the file, if all of them are there.
    fn read(&self, at: u64, length: usize) -> io::Result<Option<Vec<u8>>> {
        let mut bytes = vec![0; length];
        match self.file.read_exact_at(&mut bytes, at) {
            Ok(()) => Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// Follows a guest's log.
#[derive(Debug)]
pub struct Follower {
    folder: PathBuf,
    reader: Reader,
    /// The front of a guest that runs, and what says that its log has changed.
    front: Option<(Process, OwnedFd)>,
}

impl Guest {
    /// The log of a detached guest, from its oldest record; with `follow` until the guest ends.
    ///
    /// # Errors
    /// When the guest has no log, or the host refuses something.
    pub fn log(&self, follow: bool) -> Result<Follower, GuestError> {
        let failed = |what| host(what, &self.folder);
        let front = if follow { self.front()? } else { None };
        // Before the first look, so that nothing comes between the last look and the watch.
        let changes = front.is_some().then(|| watch(&self.folder)).transpose();
        let changes = changes.map_err(|error| failed("watch")(error.into()))?;
        let reader = Reader::open(&self.folder).map_err(failed("read the log in"))?;
        let reader = reader.ok_or_else(|| GuestError::NoLog(self.name.clone()))?;
        Ok(Follower { folder: self.folder.clone(), reader, front: front.zip(changes) })
    }
}

impl Follower {
    /// The next record; waits for it while the guest runs. `None` at the log's end.
    ///
    /// # Errors
    /// When the log is damaged, or the host refuses something.
    pub fn next_record(&mut self) -> Result<Option<(Stream, Vec<u8>)>, GuestError> {
        loop {
            let record = self.reader.next().map_err(host("read the log in", &self.folder))?;
            let (None, Some((front, changes))) = (&record, &self.front) else { return Ok(record) };
            let has_ended =
                wait(front, changes).map_err(|error| host("watch", &self.folder)(error.into()))?;
            if has_ended {
                // What it wrote last is read before the end is said.
                self.front = None;
            }
        }
    }
}

fn watch(folder: &Path) -> Result<OwnedFd, Errno> {
    let changes = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
    inotify::add_watch(&changes, folder, WatchFlags::MODIFY | WatchFlags::CREATE)?;
    Ok(changes)
}

/// Waits for a change or the front's end; whether it has ended.
fn wait(front: &Process, changes: &OwnedFd) -> Result<bool, Errno> {
    let mut fds = [PollFd::new(front, PollFlags::IN), PollFd::new(changes, PollFlags::IN)];
    match poll(&mut fds, None) {
        Err(Errno::INTR) => return Ok(false),
        result => result?,
    };
    let has_ended = !fds[0].revents().is_empty();
    // That something changed is all they say.
    while rustix::io::read(changes, &mut [0; 4096][..]).is_ok() {}
    Ok(has_ended)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn rest(reader: &mut Reader) -> Vec<(Stream, Vec<u8>)> {
        std::iter::from_fn(|| reader.next().unwrap()).collect()
    }

    #[test]
    fn records_come_in_order_and_whole() {
        let folder = tempfile::tempdir().unwrap();
        assert!(Reader::open(folder.path()).unwrap().is_none());
        let log = Log::create(folder.path()).unwrap();
        let mut reader = Reader::open(folder.path()).unwrap().unwrap();
        assert!(reader.next().unwrap().is_none());
        log.add(Stream::Output, b"out");
        log.add(Stream::Error, b"err");
        let long = vec![7; LONGEST + 1];
        log.add(Stream::Output, &long);
        let records = rest(&mut reader);
        let (o, e) = (Stream::Output, Stream::Error);
        assert_eq!(
            records,
            [(o, b"out".to_vec()), (e, b"err".to_vec()), (o, long[1..].to_vec()), (o, vec![7])]
        );
        // A VMM that was killed leaves part of a record.
        let file = File::options().append(true).open(folder.path().join(NEW)).unwrap();
        (&file).write_all(&[1, 0, 0, 0, 9, 0, 0, 0, 1]).unwrap();
        assert!(rest(&mut reader).is_empty());
    }

    #[test]
    fn a_full_log_keeps_the_last_words_and_its_readers() {
        let folder = tempfile::tempdir().unwrap();
        let log = Log::with_size(folder.path(), 3 * 9).unwrap();
        let mut reader = Reader::open(folder.path()).unwrap().unwrap();
        let add = |range: std::ops::Range<u8>| range.for_each(|byte| log.add(Stream::Output, &[byte]));
        let bytes =
            |reader: &mut Reader| rest(reader).into_iter().flat_map(|(_, bytes)| bytes).collect::<Vec<_>>();
        add(0..2);
        assert_eq!(bytes(&mut reader), [0, 1]);
        add(2..5);
        assert_eq!(bytes(&mut reader), [2, 3, 4], "what was left of the full one comes first");
        add(5..8);
        assert_eq!(bytes(&mut Reader::open(folder.path()).unwrap().unwrap()), [3, 4, 5, 6, 7]);
        assert_eq!(folder.path().read_dir().unwrap().count(), 2);
    }

    #[test]
    fn other_files_are_no_logs() {
        let folder = tempfile::tempdir().unwrap();
        for bytes in [[3, 0, 0, 0, 0, 0, 0, 0], [1, 0, 0, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 1]] {
            std::fs::write(folder.path().join(NEW), bytes).unwrap();
            Reader::open(folder.path()).unwrap().unwrap().next().unwrap_err();
        }
    }
}
