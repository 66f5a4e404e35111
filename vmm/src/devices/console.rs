//! The destination of console output, and the last lines of output for failure reports.

use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{PollFd, PollFlags, poll};

/// The destination of a guest's console output.
///
/// Output that cannot be written (a closed pipe, a full disk) is dropped: a guest does not fail because of a missing
/// reader. The first error other than a closed pipe is reported when the machine ends. A write to a full pipe blocks the
/// vCPU until the reader reads, or until the machine is stopped.
pub struct ConsoleOutput {
    target: Option<File>,
    /// Size of the file in bytes, when the file is limited.
    length: Option<u64>,
    stopping: Arc<AtomicBool>,
    tail: VecDeque<u8>,
    /// The first error.
    failure: Option<io::Error>,
}

impl fmt::Debug for ConsoleOutput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConsoleOutput").field("target", &self.target).finish_non_exhaustive()
    }
}

/// Creates or empties the file of a console, or opens a named pipe, without waiting for a reader. A guest whose output fills
/// the pipe waits for one.
pub(crate) fn open(path: &Path) -> io::Result<File> {
    if path.metadata().is_ok_and(|metadata| metadata.file_type().is_fifo()) {
        // A pipe that is also open for reading does not wait for a reader (fifo(7)).
        return File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path);
    }
    File::create(path)
}

impl ConsoleOutput {
    /// Bytes of output that are kept for failure reports: about a screen.
    const TAIL: usize = 4096;
    /// Size limit of a console file in bytes. When the file reaches the limit, its older half is discarded: of a guest
    /// that writes without end, the most recent output matters, as in a log.
    const FULL: u64 = 16 << 20;

    /// Creates an output that writes to `target`, or discards all output. Once `stopping` is set, a blocked write
    /// returns and drops its bytes.
    #[must_use]
    pub fn new(target: Option<File>, stopping: Arc<AtomicBool>) -> Self {
        Self { target, length: None, stopping, tail: VecDeque::new(), failure: None }
    }

    /// Creates an output that writes to a new file, of which the last 8 to 16 MiB are kept. A file that is not a
    /// regular file has no limit.
    #[must_use]
    pub fn to_file(file: File, stopping: Arc<AtomicBool>) -> Self {
        let is_regular = file.metadata().is_ok_and(|metadata| metadata.is_file());
        Self { length: is_regular.then_some(0), ..Self::new(Some(file), stopping) }
    }

    /// Discards the older half of the file if `count` more bytes exceed the limit `full`.
    fn make_room(&mut self, count: usize, full: u64) {
        let (Some(file), Some(length)) = (&mut self.target, &mut self.length) else { return };
        if *length + count as u64 > full {
            // When the newer half cannot be copied, the file is truncated to zero.
            *length = keep_newer_half(file, *length).unwrap_or(0);
            let _ = file.set_len(*length).and_then(|()| file.seek(SeekFrom::Start(*length)));
        }
        *length += count as u64;
    }

    /// The last lines of output, at most `lines` of them, oldest first.
    #[must_use]
    pub fn last_lines(&self, lines: usize) -> Vec<String> {
        let bytes: Vec<u8> = self.tail.iter().copied().collect();
        let text = String::from_utf8_lossy(&bytes);
        let mut last: Vec<String> =
            text.lines().rev().take(lines).map(|line| line.trim_end().to_owned()).collect();
        last.reverse();
        last
    }

    /// The error that caused a loss of output; `None` if the output is complete, or the pipe's read end is closed.
    #[must_use]
    pub fn failure(&self) -> Option<String> {
        self.failure.as_ref().map(|error| format!("cannot write the output of the console: {error}"))
    }

    fn write_target(&mut self, mut bytes: &[u8]) {
        let Some(target) = &mut self.target else { return };
        while !bytes.is_empty() {
            match target.write(bytes) {
                Ok(0) => return,
                Ok(written) => bytes = &bytes[written..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    // A signal interrupts the poll, so that the loop checks `stopping` again.
                    let _ = poll(&mut [PollFd::new(target, PollFlags::OUT)], None);
                }
                Err(error) => {
                    if error.kind() != io::ErrorKind::BrokenPipe {
                        self.failure.get_or_insert(error);
                    }
                    return;
                }
            }
            if self.stopping.load(Ordering::Acquire) {
                return;
            }
        }
    }
}

impl Write for ConsoleOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for &byte in bytes {
            if self.tail.len() == Self::TAIL {
                self.tail.pop_front();
            }
            self.tail.push_back(byte);
        }
        self.make_room(bytes.len(), Self::FULL);
        self.write_target(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Copies the second half of a file over the first; returns its length in bytes.
fn keep_newer_half(file: &File, length: u64) -> io::Result<u64> {
    // `file` is open for writing only, so that it is opened again for reading.
    let old = File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    let (start, mut done) = (length / 2, 0);
    let mut buffer = vec![0; 64 << 10];
    loop {
        let count = old.read_at(&mut buffer, start + done)?;
        if count == 0 {
            return Ok(done);
        }
        file.write_all_at(&buffer[..count], done)?;
        done += count as u64;
    }
}

/// Recognizes the escape sequence Ctrl-A x, which stops the machine, in terminal input. Ctrl-A twice sends one Ctrl-A
/// to the guest.
#[derive(Debug, Default)]
pub struct EscapeFilter {
    pending: bool,
}

impl EscapeFilter {
    const CTRL_A: u8 = 0x01;

    /// Appends `input` without escape sequences to `forwarded`; returns `true` when the user typed Ctrl-A x.
    pub fn filter(&mut self, input: &[u8], forwarded: &mut Vec<u8>) -> bool {
        for &byte in input {
            if !std::mem::take(&mut self.pending) {
                if byte == Self::CTRL_A {
                    self.pending = true;
                } else {
                    forwarded.push(byte);
                }
                continue;
            }
            match byte {
                b'x' | b'X' => return true,
                Self::CTRL_A => forwarded.push(Self::CTRL_A),
                // Not an escape sequence: both keys are forwarded to the guest.
                _ => forwarded.extend([Self::CTRL_A, byte]),
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::fd::OwnedFd;

    fn null() -> ConsoleOutput {
        ConsoleOutput::new(None, Arc::default())
    }

    #[test]
    fn the_tail_is_bounded_and_ends_with_the_last_line() {
        let mut output = null();
        for number in 0..10_000 {
            output.write_all(format!("line {number}\r\n").as_bytes()).unwrap();
        }
        assert!(output.tail.len() <= ConsoleOutput::TAIL);
        assert_eq!(output.last_lines(2), ["line 9998", "line 9999"]);
        assert_eq!(null().last_lines(5), Vec::<String>::new());
    }

    #[test]
    fn a_named_pipe_is_opened_without_a_reader_and_a_file_is_emptied() {
        let folder = tempfile::tempdir().unwrap();
        let [pipe, file] = ["pipe", "file"].map(|name| folder.path().join(name));
        rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, 0o600.into()).unwrap();
        std::fs::write(&file, "old").unwrap();
        for path in [&pipe, &file] {
            let mut output = ConsoleOutput::to_file(open(path).unwrap(), Arc::default());
            let mut reader = (path == &pipe).then(|| File::open(path).unwrap());
            output.write_all(b"new").unwrap();
            let mut text = [0; 3];
            let reader = reader.get_or_insert_with(|| File::open(path).unwrap());
            reader.read_exact(&mut text).unwrap();
            assert_eq!(&text, b"new");
        }
    }

    #[test]
    fn a_closed_pipe_does_not_fail_the_guest() {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let file = File::from(std::os::fd::OwnedFd::from(writer));
        let mut output = ConsoleOutput::new(Some(file), Arc::default());
        output.write_all(b"lost\n").unwrap();
        assert_eq!(output.last_lines(1), ["lost"]);
    }

    #[test]
    fn ctrl_a_x_leaves_and_other_keys_pass() {
        let run = |chunks: &[&[u8]]| {
            let (mut filter, mut forwarded) = (EscapeFilter::default(), Vec::new());
            let left = chunks.iter().any(|chunk| filter.filter(chunk, &mut forwarded));
            (left, forwarded)
        };
        assert_eq!(run(&[b"ls\r"]), (false, b"ls\r".to_vec()));
        assert_eq!(run(&[b"a\x01xb"]), (true, b"a".to_vec()));
        assert_eq!(run(&[b"\x01", b"x"]), (true, vec![]), "split between two reads");
        assert_eq!(run(&[b"\x01\x01x"]), (false, b"\x01x".to_vec()));
        assert_eq!(run(&[b"\x01c"]), (false, b"\x01c".to_vec()));
    }

    #[test]
    fn a_file_keeps_the_most_recent_output() {
        const FULL: u64 = 1000;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console");
        let mut output = ConsoleOutput::to_file(File::create(&path).unwrap(), Arc::default());
        let mut all = String::new();
        for number in 0..5000 {
            let line = format!("line {number}\n");
            output.make_room(line.len(), FULL);
            output.write_target(line.as_bytes());
            all.push_str(&line);
            let length = std::fs::metadata(&path).unwrap().len();
            assert!(length <= FULL && (length >= FULL / 2 - 20 || all.len() as u64 == length), "{length}");
        }
        assert!(all.ends_with(&std::fs::read_to_string(&path).unwrap()));
    }

    #[test]
    fn only_regular_files_are_limited() {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let mut output = ConsoleOutput::to_file(File::from(OwnedFd::from(writer)), Arc::default());
        for _ in 0..10 {
            output.make_room(10, 50);
            output.write_target(&[7; 10]);
        }
        drop(output);
        let mut all = Vec::new();
        reader.read_to_end(&mut all).unwrap();
        assert_eq!(all, [7; 100]);
    }
}
