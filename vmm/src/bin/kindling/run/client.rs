//! The streams of a process in a guest, connected to those of this process.

use super::signals;
use crate::instances::log::{Log, Stream};
use guest_protocol::agent::TerminalSize;
use kindling::agent::{AgentError, Control, Process};
use rustix::event::{PollFd, PollFlags, poll};
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::thread;
use std::time::Duration;

/// Bytes that are read at once: what a pipe holds.
const CHUNK: usize = 64 << 10;

/// Where a process's streams lead.
#[derive(Debug)]
pub(crate) struct Streams {
    /// None for an input that has ended.
    pub(crate) input: Option<File>,
    pub(crate) output: Sink,
    pub(crate) error: Sink,
}

/// Where one stream of output leads.
#[derive(Debug)]
pub(crate) enum Sink {
    File(File),
    Log(Arc<Log>, Stream),
}

impl Streams {
    /// This process's own.
    pub(crate) fn own() -> io::Result<Self> {
        let copy = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().map(File::from);
        let input = copy(rustix::stdio::stdin())?;
        Ok(Self {
            input: (!is_null_device(&input)).then_some(input),
            output: Sink::File(copy(rustix::stdio::stdout())?),
            error: Sink::File(copy(rustix::stdio::stderr())?),
        })
    }

    /// This process's standard error, and nothing to read.
    pub(crate) fn complaints() -> io::Result<Self> {
        let copy = || rustix::stdio::stderr().try_clone_to_owned().map(|copy| Sink::File(copy.into()));
        Ok(Self { input: None, output: copy()?, error: copy()? })
    }

    /// A log's, and nothing to read.
    pub(crate) fn of_log(log: Log) -> Self {
        let log = Arc::new(log);
        Self {
            input: None,
            output: Sink::Log(Arc::clone(&log), Stream::Output),
            error: Sink::Log(log, Stream::Error),
        }
    }
}

/// What is looked at until there is something to do.
enum Watched {
    /// The end of the process.
    Process,
    Input(File, UnixStream),
    Output(UnixStream, Sink),
}

/// Carries everything to and fro until the process has ended and all that it wrote is delivered; its exit status.
///
/// A stream gets a thread when it has something to carry. To start one takes as long as a dozen system calls, and most
/// streams of a short command only turn out to have ended.
pub(crate) fn serve(
    mut process: Process,
    streams: Streams,
    signals: &signals::Receiver,
) -> Result<u8, AgentError> {
    let lost = |_| AgentError::Lost;
    let control = Arc::new(process.control().map_err(lost)?);
    signals.pass_on_to(Arc::clone(&control));
    let input = process.input.try_clone().map_err(lost)?;
    let output = process.output.try_clone().map_err(lost)?;
    let mut watched = vec![Watched::Output(output, streams.output)];
    watched.extend(process.error.take().map(|error| Watched::Output(error, streams.error)));
    match streams.input {
        Some(from) => watched.push(Watched::Input(from, input)),
        None => drop(input.shutdown(Shutdown::Write)),
    }
    let (mut code, mut writers) = (process.status().ok_or(AgentError::Lost), Vec::new());
    if code.is_err() {
        watched.push(Watched::Process);
    }
    // Nobody waits for input: it may come from a terminal at which nobody types any more.
    while watched.iter().any(|one| !matches!(one, Watched::Input(..))) {
        for one in take_ready(&mut watched, &process).map_err(lost)? {
            match one {
                Watched::Process => code = process.wait(),
                Watched::Input(from, to) => drop(thread::spawn(move || carry_input(from, &to))),
                Watched::Output(mut from, to) => {
                    let mut buffer = vec![0; CHUNK];
                    if let Ok(count @ 1..) = from.read(&mut buffer) {
                        writers.push(thread::spawn(move || carry(&from, &to, buffer, count)));
                    }
                }
            }
        }
    }
    for writer in writers {
        let _ = writer.join();
    }
    control.close();
    code
}

/// What became of the process in the guest.
pub(super) enum Outcome {
    Process(Result<u8, AgentError>),
    /// Nobody wants to wait any more.
    GivenUp,
}

/// Waits until all that the process wrote is delivered; its exit status. Who has given up waits no longer for one who
/// does not read.
pub(super) fn outcome(told: &Receiver<Outcome>) -> Result<u8, AgentError> {
    const PATIENCE: Duration = Duration::from_secs(1);
    let mut is_given_up = false;
    loop {
        match if is_given_up { told.recv_timeout(PATIENCE).ok() } else { told.recv().ok() } {
            Some(Outcome::Process(code)) => return code,
            Some(Outcome::GivenUp) if !is_given_up => is_given_up = true,
            _ => return Err(AgentError::Lost),
        }
    }
}

/// Waits until something can be read from one of them or more, and takes these.
fn take_ready(watched: &mut Vec<Watched>, process: &Process) -> io::Result<Vec<Watched>> {
    let fds = watched.iter().map(|one| match one {
        Watched::Process => process.as_fd(),
        Watched::Input(from, _) => from.as_fd(),
        Watched::Output(from, _) => from.as_fd(),
    });
    let mut fds: Vec<_> = fds.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
    rustix::io::retry_on_intr(|| poll(&mut fds, None))?;
    let mut ready = fds.into_iter().map(|fd| !fd.revents().is_empty()).collect::<Vec<_>>().into_iter();
    Ok(watched.extract_if(.., |_| ready.next().unwrap_or(false)).collect())
}

fn carry_input(mut from: File, mut to: &UnixStream) {
    let mut buffer = vec![0; CHUNK];
    while let Ok(count @ 1..) = read(&mut from, &mut buffer) {
        if to.write_all(&buffer[..count]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}

/// What is lost for another reason than that nobody wants it.
#[derive(Debug, thiserror::Error)]
#[error("cannot write what the program says")]
struct Undelivered(#[source] io::Error);

/// Carries output, of which some bytes have been read, until it ends. Where nobody takes it, whoever writes it learns
/// so, as at a pipe.
fn carry(mut from: &UnixStream, to: &Sink, mut buffer: Vec<u8>, mut count: usize) {
    while count > 0 {
        let result = match to {
            Sink::File(file) => write_all(file, &buffer[..count]),
            Sink::Log(log, stream) => {
                log.add(*stream, &buffer[..count]);
                Ok(())
            }
        };
        if let Err(error) = result {
            if error.kind() != io::ErrorKind::BrokenPipe {
                crate::complain(&Undelivered(error));
            }
            let _ = from.shutdown(Shutdown::Both);
            return;
        }
        count = from.read(&mut buffer).unwrap_or(0);
    }
}

/// Whether it is /dev/null, which has ended before somebody reads it.
fn is_null_device(file: &File) -> bool {
    use rustix::fs::{FileType, fstat, makedev};
    let is_null = |stat: rustix::fs::Stat| {
        FileType::from_raw_mode(stat.st_mode).is_char_device() && stat.st_rdev == makedev(1, 3)
    };
    fstat(file).is_ok_and(is_null)
}

/// Reads once. A descriptor that others made non-blocking is waited for.
fn read(from: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match from.read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => wait(from.as_fd(), PollFlags::IN)?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

fn write_all(mut to: &File, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match to.write(bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => wait(to.as_fd(), PollFlags::OUT)?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn wait(fd: BorrowedFd<'_>, flags: PollFlags) -> io::Result<()> {
    poll(&mut [PollFd::from_borrowed_fd(fd, flags)], None)?;
    Ok(())
}

/// Sends a size of this process's terminal.
pub(crate) fn send_size(control: &Control) {
    if let Some(size) = terminal_size() {
        control.resize(size);
    }
}

/// What a terminal of a guest's is to start with: the size of this process's, or the usual one where it has none.
pub(crate) fn new_terminal_size() -> TerminalSize {
    terminal_size().unwrap_or(TerminalSize { rows: 24, columns: 80 })
}

/// Rows and columns of the terminal at one of the standard streams.
fn terminal_size() -> Option<TerminalSize> {
    [rustix::stdio::stdout(), rustix::stdio::stdin(), rustix::stdio::stderr()].into_iter().find_map(|fd| {
        let size = rustix::termios::tcgetwinsize(fd).ok()?;
        Some(TerminalSize { rows: size.ws_row, columns: size.ws_col })
    })
}
