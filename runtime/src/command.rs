//! Processes in a guest, in the words of [`std::process`].

use crate::environment;
use crate::exec::{ExecError, ExecOptions};
use crate::guest::Guest;
use guest_protocol::agent::TerminalSize;
use kindling_vmm::agent::{self, AgentError, ProcessEvent, Role};
use rustix::event::{PollFd, Timespec, poll};
use rustix::io::Errno;
use std::ffi::OsStr;
use std::fmt;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread::{self, JoinHandle};

/// Bytes that are carried at once: what a pipe holds.
const CHUNK: usize = 64 << 10;

/// Why a process in a guest cannot be started, or its end is not known.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProcessError {
    /// It cannot be started.
    #[error(transparent)]
    Exec(#[from] ExecError),
    /// The guest's agent is gone or does not answer.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// A stream of this process cannot be read or written, or the host refused something.
    #[error("a stream of the process cannot be carried")]
    Stream(#[from] io::Error),
}

/// A process to be started in a guest, as [`std::process::Command`] is one on the host.
///
/// It has the environment, the working directory and the user of the guest's image where nothing else is said. Without
/// a terminal its streams are pipes.
#[derive(Debug)]
pub struct Command<'a> {
    guest: &'a Guest,
    options: ExecOptions,
    stdin: Option<Stdio>,
    stdout: Option<Stdio>,
    stderr: Option<Stdio>,
}

/// What a stream of a process leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stdio {
    /// The same stream of this process. A thread carries it; that of an input reads ahead, and goes on until there is
    /// something to read after the process has ended.
    Inherit,
    /// Nothing: there is nothing to read, and what is written is thrown away.
    Null,
    /// This process, by [`Child`].
    Piped,
}

impl Guest {
    /// A program to run in the guest: a path, or a name that is looked for in the PATH of the guest.
    #[must_use]
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command<'_> {
        let options = ExecOptions { command: vec![program.as_ref().to_owned()], ..ExecOptions::default() };
        Command { guest: self, options, stdin: None, stdout: None, stderr: None }
    }
}

impl Command<'_> {
    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.options.command.push(argument.as_ref().to_owned());
        self
    }

    /// Adds arguments. With the environment they may have 2 MiB, and one 128 KiB.
    #[must_use]
    pub fn args(mut self, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        self.options.command.extend(arguments.into_iter().map(|argument| argument.as_ref().to_owned()));
        self
    }

    /// Sets an entry of the environment.
    #[must_use]
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.options.env.push(environment::entry(name.as_ref(), value.as_ref()));
        self
    }

    /// Sets the working directory, a path in the guest. It is made where it is missing.
    #[must_use]
    pub fn current_dir(mut self, directory: impl AsRef<Path>) -> Self {
        self.options.working_directory = Some(directory.as_ref().as_os_str().to_owned());
        self
    }

    /// Sets user and group: `USER[:GROUP]`, names of the image or numbers.
    #[must_use]
    pub fn user(mut self, user: impl Into<String>) -> Self {
        self.options.user = Some(user.into());
        self
    }

    /// Gives the process a terminal of this size. Its output and error are one stream then, the output.
    #[must_use]
    pub fn terminal(mut self, size: TerminalSize) -> Self {
        self.options.terminal = Some(size);
        self
    }

    /// Sets what the standard input leads to.
    #[must_use]
    pub fn stdin(mut self, stream: Stdio) -> Self {
        self.stdin = Some(stream);
        self
    }

    /// Sets what the standard output leads to.
    #[must_use]
    pub fn stdout(mut self, stream: Stdio) -> Self {
        self.stdout = Some(stream);
        self
    }

    /// Sets what the standard error leads to.
    #[must_use]
    pub fn stderr(mut self, stream: Stdio) -> Self {
        self.stderr = Some(stream);
        self
    }

    /// Starts the process. Output and error are inherited where nothing else was said, and the input is empty: unlike a
    /// child of this process, one in a guest would take what is typed ahead for others.
    ///
    /// # Errors
    /// When the guest does not run, has no such user, or refuses the process. A program that is not there is no error
    /// here: the process then ends with status 127, or 126, and says why on its standard error, as in a shell.
    pub fn spawn(&self) -> Result<Child, ProcessError> {
        self.spawn_with(Stdio::Null, Stdio::Inherit)
    }

    /// Runs the process and waits for its end. Output and error are inherited where nothing else was said, and the input
    /// is empty.
    ///
    /// # Errors
    /// As [`Self::spawn`], and when the guest ends before the process.
    pub fn status(&self) -> Result<ExitStatus, ProcessError> {
        self.spawn()?.wait()
    }

    /// Runs the process, waits for its end, and collects what it wrote: all of it is kept in memory. Its input is empty
    /// unless something else was said.
    ///
    /// # Errors
    /// As [`Self::status`].
    pub fn output(&self) -> Result<Output, ProcessError> {
        self.spawn_with(Stdio::Null, Stdio::Piped)?.wait_with_output()
    }

    fn spawn_with(&self, input: Stdio, outputs: Stdio) -> Result<Child, ProcessError> {
        let process = self.guest.exec(&self.options)?;
        let mut child =
            Child { process, stdin: None, stdout: None, stderr: None, carriers: Vec::new(), status: None };
        match self.stdin.unwrap_or(input) {
            Stdio::Null => child.process.end_input(),
            Stdio::Piped => child.stdin = Some(ChildStdin(child.process.address().connect(Role::Input)?)),
            Stdio::Inherit => {
                let to = child.process.address().connect(Role::Input)?;
                // Nobody waits for it: nothing may ever come.
                thread::spawn(move || carry(io::stdin(), &to));
            }
        }
        if let Some(stream) = child.output_stream(Role::Output, self.stdout.unwrap_or(outputs), io::stdout)? {
            child.stdout = Some(ChildStdout(stream));
        }
        if let Some(stream) = child.output_stream(Role::Error, self.stderr.unwrap_or(outputs), io::stderr)? {
            child.stderr = Some(ChildStderr(stream));
        }
        Ok(child)
    }
}

/// Carries what is read to a process, and then ends its input.
fn carry(mut from: impl Read, to: &UnixStream) {
    let _ = io::copy(&mut from, &mut &*to);
    let _ = to.shutdown(Shutdown::Write);
}

/// A process in a guest. Dropping it hangs up on it: the guest sends it SIGHUP, as when a terminal is closed.
#[derive(Debug)]
pub struct Child {
    process: agent::Process,
    /// Its input, where that is piped. Dropping this ends the input.
    pub stdin: Option<ChildStdin>,
    /// Its output, where that is piped.
    pub stdout: Option<ChildStdout>,
    /// Its error, where that is piped.
    pub stderr: Option<ChildStderr>,
    /// Threads that carry inherited output.
    carriers: Vec<JoinHandle<()>>,
    status: Option<ExitStatus>,
}

impl Child {
    /// A stream of output, where it is piped.
    fn output_stream<W: Write + Send + 'static>(
        &mut self,
        role: Role,
        to: Stdio,
        own: fn() -> W,
    ) -> Result<Option<UnixStream>, ProcessError> {
        let stream = self.process.address().connect(role)?;
        let mut from = match to {
            Stdio::Piped => return Ok(Some(stream)),
            Stdio::Inherit | Stdio::Null => stream,
        };
        let carrier = thread::Builder::new().name("kindling-output".to_owned()).spawn(move || {
            // Where this process's stream takes no more, the process in the guest learns it as at a pipe.
            let _ = if to == Stdio::Null {
                io::copy(&mut from, &mut io::sink())
            } else {
                deliver(&mut from, own())
            };
        })?;
        self.carriers.push(carrier);
        Ok(None)
    }

    /// Sends a signal: those of a terminal's keys, and SIGTERM, to the process and its foreground children, others to
    /// the process alone.
    pub fn signal(&self, number: u8) {
        self.process.signal(number);
    }

    /// Ends the process by SIGKILL.
    pub fn kill(&self) {
        const SIGKILL: u8 = 9;
        self.process.signal(SIGKILL);
    }

    /// Says how large its terminal is now.
    pub fn resize(&self, size: TerminalSize) {
        self.process.resize(size);
    }

    /// Its exit status, if it has ended.
    ///
    /// # Errors
    /// When the guest has ended before the process.
    pub fn try_wait(&mut self) -> Result<Option<ExitStatus>, ProcessError> {
        while self.status.is_none() {
            match self.process.poll_event()? {
                Some(ProcessEvent::Exited { status, .. }) => self.status = Some(ExitStatus(status)),
                Some(ProcessEvent::HasOutput(_) | ProcessEvent::Started) => {}
                None => break,
            }
        }
        Ok(self.status)
    }

    /// Waits for its end, and until inherited output is delivered. Its input is ended first.
    ///
    /// # Errors
    /// When the guest ends before the process.
    pub fn wait(&mut self) -> Result<ExitStatus, ProcessError> {
        self.stdin = None;
        let status = loop {
            if let Some(status) = self.try_wait()? {
                break status;
            }
            let (flags, limit) = self.process.poll_interest();
            let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
            match poll(&mut [PollFd::new(&self.process, flags)], limit.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(io::Error::from(error).into()),
            }
        };
        for carrier in self.carriers.drain(..) {
            let _ = carrier.join();
        }
        Ok(status)
    }

    /// Waits for its end and collects what it writes to piped streams.
    ///
    /// # Errors
    /// As [`Self::wait`], and when a stream cannot be read.
    pub fn wait_with_output(mut self) -> Result<Output, ProcessError> {
        self.stdin = None;
        let read = |stream: Option<UnixStream>| -> io::Result<Vec<u8>> {
            let mut bytes = Vec::new();
            if let Some(mut stream) = stream {
                stream.read_to_end(&mut bytes)?;
            }
            Ok(bytes)
        };
        let (stdout, stderr) =
            (self.stdout.take().map(|stream| stream.0), self.stderr.take().map(|stream| stream.0));
        // Both at once: a process may block on one stream while the other is read.
        let other = thread::Builder::new().name("kindling-output".to_owned()).spawn(move || read(stderr))?;
        let stdout = read(stdout)?;
        let stderr = other.join().unwrap_or_else(|_| Err(io::Error::other("a thread panicked")))?;
        Ok(Output { status: self.wait()?, stdout, stderr })
    }
}

fn deliver(from: &mut UnixStream, mut to: impl Write) -> io::Result<u64> {
    let mut buffer = vec![0; CHUNK];
    let mut sum = 0;
    loop {
        let count = from.read(&mut buffer)?;
        if count == 0 {
            return Ok(sum);
        }
        let written = to.write_all(&buffer[..count]).and_then(|()| to.flush());
        if written.is_err() {
            let _ = from.shutdown(Shutdown::Both);
            return written.map(|()| sum);
        }
        sum += count as u64;
    }
}

impl AsFd for Child {
    /// Readable when [`Self::try_wait`] may have something to say.
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.process.as_fd()
    }
}

/// The input of a process in a guest. Dropping it ends the input.
#[derive(Debug)]
pub struct ChildStdin(UnixStream);

/// The output of a process in a guest.
#[derive(Debug)]
pub struct ChildStdout(UnixStream);

/// The error of a process in a guest.
#[derive(Debug)]
pub struct ChildStderr(UnixStream);

impl Write for ChildStdin {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for ChildStdin {
    fn drop(&mut self) {
        let _ = self.0.shutdown(Shutdown::Write);
    }
}

impl Read for ChildStdout {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.0.read(bytes)
    }
}

impl Read for ChildStderr {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.0.read(bytes)
    }
}

/// How a process in a guest ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExitStatus(u8);

impl ExitStatus {
    /// Whether it ended with status 0.
    #[must_use]
    pub const fn success(self) -> bool {
        self.0 == 0
    }

    /// Its exit status: 128 and the signal's number where a signal ended it, 127 where there was no such program, 126
    /// where it could not be executed.
    #[must_use]
    pub const fn code(self) -> u8 {
        self.0
    }
}

impl fmt::Display for ExitStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "exit status: {}", self.0)
    }
}

/// How a process ended, and what it wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// What it wrote to its piped output.
    pub stdout: Vec<u8>,
    /// What it wrote to its piped error.
    pub stderr: Vec<u8>,
}
