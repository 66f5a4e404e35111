//! The log of a detached guest: a file with the output of its command, as records in the order of arrival.
//!
//! A record is the stream (one byte, 1 or 2), three zeroes, the length (four bytes, little endian) and the bytes. A full
//! file is renamed to `log.old`, which replaces the previous one, and a new file is started. This bounds the log, because
//! the runtime directory is usually in memory, and keeps the newest output.

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

/// Maximum size of a file in bytes. The log of a guest has at most two files.
const MAX_FILE_LEN: u64 = 8 << 20;
const HEADER_LEN: usize = 8;
/// Maximum length of a record's content in bytes.
const MAX_RECORD_LEN: usize = 64 << 10;
const NEW: &str = "log";
const OLD: &str = "log.old";

/// An output stream of the guest's command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Stream {
    /// Standard output.
    Output = 1,
    /// Standard error.
    Error = 2,
}

/// The write end of a log.
#[derive(Debug)]
pub struct Log(Mutex<Writer>);

#[derive(Debug)]
struct Writer {
    folder: PathBuf,
    file: File,
    length: u64,
    max_len: u64,
}

impl Log {
    /// Creates the log of a guest in its directory.
    ///
    /// # Errors
    /// When the file cannot be created.
    pub fn create(folder: &Path) -> io::Result<Self> {
        Self::with_size(folder, MAX_FILE_LEN)
    }

    fn with_size(folder: &Path, max_len: u64) -> io::Result<Self> {
        let file = File::create(folder.join(NEW))?;
        Ok(Self(Mutex::new(Writer { folder: folder.into(), file, length: 0, max_len })))
    }

    /// Appends output of a stream. Output that cannot be written, for instance for lack of space, is dropped.
    pub fn add(&self, stream: Stream, bytes: &[u8]) {
        let mut writer = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for part in bytes.chunks(MAX_RECORD_LEN) {
            if writer.add(stream, part).is_err() {
                // An incomplete record would make all later ones unreadable.
                let _ = writer.file.set_len(writer.length);
            }
        }
    }
}

impl Writer {
    fn add(&mut self, stream: Stream, bytes: &[u8]) -> io::Result<()> {
        let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_le_bytes();
        let record = [&[stream as u8, 0, 0, 0], &length[..], bytes].concat();
        if self.length + record.len() as u64 > self.max_len {
            std::fs::rename(self.folder.join(NEW), self.folder.join(OLD))?;
            (self.file, self.length) = (File::create(self.folder.join(NEW))?, 0);
        }
        self.file.write_all_at(&record, self.length)?;
        self.length += record.len() as u64;
        Ok(())
    }
}

/// The read end of a log, which may be written at the same time.
#[derive(Debug)]
struct Reader {
    folder: PathBuf,
    file: File,
    at: u64,
}

impl Reader {
    /// Opens a log at its oldest record. Returns `None` if there is no log.
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

    /// Returns the next record, if it is complete.
    fn next(&mut self) -> io::Result<Option<(Stream, Vec<u8>)>> {
        if let Some(record) = self.next_of_file()? {
            return Ok(Some(record));
        }
        let Ok(newest) = File::open(self.folder.join(NEW)) else { return Ok(None) };
        if newest.metadata()?.ino() == self.file.metadata()?.ino() {
            return Ok(None);
        }
        // The old file may have received another record before it was replaced.
        if let Some(record) = self.next_of_file()? {
            return Ok(Some(record));
        }
        (self.file, self.at) = (newest, 0);
        self.next_of_file()
    }

    fn next_of_file(&mut self) -> io::Result<Option<(Stream, Vec<u8>)>> {
        let Some(header) = self.read(self.at, HEADER_LEN)? else { return Ok(None) };
        let broken = || io::Error::new(io::ErrorKind::InvalidData, "the file is not a guest's log");
        let &[stream, 0, 0, 0, a, b, c, d] = &header[..] else { return Err(broken()) };
        let stream = match stream {
            1 => Stream::Output,
            2 => Stream::Error,
            _ => return Err(broken()),
        };
        let length = usize::try_from(u32::from_le_bytes([a, b, c, d])).unwrap_or(usize::MAX);
        if length > MAX_RECORD_LEN {
            return Err(broken());
        }
        let Some(bytes) = self.read(self.at + HEADER_LEN as u64, length)? else { return Ok(None) };
        self.at += (HEADER_LEN + length) as u64;
        Ok(Some((stream, bytes)))
    }

    /// Reads bytes of the file, if all of them exist.
    fn read(&self, at: u64, length: usize) -> io::Result<Option<Vec<u8>>> {
        let mut bytes = vec![0; length];
        match self.file.read_exact_at(&mut bytes, at) {
            Ok(()) => Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// A reader of a guest's log, which can wait for new records.
#[derive(Debug)]
pub struct Follower {
    folder: PathBuf,
    reader: Reader,
    /// The front of the guest, and an inotify descriptor for changes of the log, if records are waited for.
    front: Option<(Process, OwnedFd)>,
}

impl Guest {
    /// Opens the log of a detached guest at its oldest record. With `follow`, the reader waits for new records until the
    /// guest ends.
    ///
    /// # Errors
    /// When the guest has no log, or the log cannot be read.
    pub fn log(&self, follow: bool) -> Result<Follower, GuestError> {
        let failed = |what| host(what, &self.folder);
        let front = if follow { self.front()? } else { None };
        // The watch is installed before the first read, so that no change after a read is missed.
        let changes = front.is_some().then(|| watch(&self.folder)).transpose();
        let changes = changes.map_err(|error| failed("watch")(error.into()))?;
        let reader = Reader::open(&self.folder).map_err(failed("read the log in"))?;
        let reader = reader.ok_or_else(|| GuestError::NoLog(self.name.clone()))?;
        Ok(Follower { folder: self.folder.clone(), reader, front: front.zip(changes) })
    }
}

impl Follower {
    /// Returns the next record, or `None` at the end of the log. Blocks while a followed guest runs and has no new record.
    ///
    /// # Errors
    /// When the log is corrupt or cannot be read.
    pub fn next_record(&mut self) -> Result<Option<(Stream, Vec<u8>)>, GuestError> {
        loop {
            let record = self.reader.next().map_err(host("read the log in", &self.folder))?;
            let (None, Some((front, changes))) = (&record, &self.front) else { return Ok(record) };
            let has_ended =
                wait(front, changes).map_err(|error| host("watch", &self.folder)(error.into()))?;
            if has_ended {
                // Records that were written before the end are read first.
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

/// Waits for a change of the log or the end of the front. Returns whether the front has ended.
fn wait(front: &Process, changes: &OwnedFd) -> Result<bool, Errno> {
    let mut fds = [PollFd::new(front, PollFlags::IN), PollFd::new(changes, PollFlags::IN)];
    match poll(&mut fds, None) {
        Err(Errno::INTR) => return Ok(false),
        result => result?,
    };
    let has_ended = !fds[0].revents().is_empty();
    // The content of the inotify events is not needed.
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
    fn records_are_read_in_order_and_complete() {
        let folder = tempfile::tempdir().unwrap();
        assert!(Reader::open(folder.path()).unwrap().is_none());
        let log = Log::create(folder.path()).unwrap();
        let mut reader = Reader::open(folder.path()).unwrap().unwrap();
        assert!(reader.next().unwrap().is_none());
        log.add(Stream::Output, b"out");
        log.add(Stream::Error, b"err");
        let long = vec![7; MAX_RECORD_LEN + 1];
        log.add(Stream::Output, &long);
        let records = rest(&mut reader);
        let (o, e) = (Stream::Output, Stream::Error);
        assert_eq!(
            records,
            [(o, b"out".to_vec()), (e, b"err".to_vec()), (o, long[1..].to_vec()), (o, vec![7])]
        );
        // A front that was killed leaves an incomplete record.
        let file = File::options().append(true).open(folder.path().join(NEW)).unwrap();
        (&file).write_all(&[1, 0, 0, 0, 9, 0, 0, 0, 1]).unwrap();
        assert!(rest(&mut reader).is_empty());
    }

    #[test]
    fn a_full_log_keeps_the_newest_records_and_its_readers() {
        let folder = tempfile::tempdir().unwrap();
        let log = Log::with_size(folder.path(), 3 * 9).unwrap();
        let mut reader = Reader::open(folder.path()).unwrap().unwrap();
        let add = |range: std::ops::Range<u8>| range.for_each(|byte| log.add(Stream::Output, &[byte]));
        let bytes =
            |reader: &mut Reader| rest(reader).into_iter().flat_map(|(_, bytes)| bytes).collect::<Vec<_>>();
        add(0..2);
        assert_eq!(bytes(&mut reader), [0, 1]);
        add(2..5);
        assert_eq!(bytes(&mut reader), [2, 3, 4], "the rest of the full file is read first");
        add(5..8);
        assert_eq!(bytes(&mut Reader::open(folder.path()).unwrap().unwrap()), [3, 4, 5, 6, 7]);
        assert_eq!(folder.path().read_dir().unwrap().count(), 2);
    }

    #[test]
    fn files_with_invalid_headers_are_errors() {
        let folder = tempfile::tempdir().unwrap();
        for bytes in [[3, 0, 0, 0, 0, 0, 0, 0], [1, 0, 0, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 1]] {
            std::fs::write(folder.path().join(NEW), bytes).unwrap();
            Reader::open(folder.path()).unwrap().unwrap().next().unwrap_err();
        }
    }
}
