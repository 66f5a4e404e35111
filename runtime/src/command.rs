//! Processes in a guest, with the API of [`std::process`].

use crate::attach::OutputTarget;
use crate::attach::streams::{self, OutputError};
use crate::environment;
use crate::exec::{ExecError, ExecOptions};
use crate::guest::Guest;
use guest_protocol::agent::TerminalSize;
use kindling_vmm::agent::{self, AgentError, ProcessEvent, Role};
use kindling_vmm::with_causes;
use rustix::event::{PollFd, Timespec, poll};
use rustix::io::Errno;
use std::ffi::OsStr;
use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread::{self, JoinHandle};

/// An error of a process in a guest.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProcessError {
    /// The process cannot be started.
    #[error(transparent)]
    Exec(#[from] ExecError),
    /// The guest ended, or its agent does not respond.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// A stream cannot be read or written, or the host cannot start a thread for it.
    #[error("cannot forward a standard stream of the process")]
    Stream(#[from] io::Error),
    /// The process has ended, and not all of its inherited output could be received or written: the reason.
    #[error("{0}")]
    Output(String),
}

/// A builder for a process in a guest, as [`std::process::Command`] is for one on the host.
///
/// Environment, working directory and user default to those of the guest's image. Without a terminal, the standard
/// streams of the process are pipes in the guest.
#[derive(Debug)]
pub struct Command<'a> {
    guest: &'a Guest,
    options: ExecOptions,
    stdin: Option<Stdio>,
    stdout: Option<Stdio>,
    stderr: Option<Stdio>,
}

/// The destination of output, or the source of input, of a process in a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stdio {
    /// The same stream of the calling process, forwarded by a thread. The thread of an input reads ahead, and blocks in a
    /// read when the process has ended, until there is input once more.
    Inherit,
    /// The null device: input is empty, and output is discarded.
    Null,
    /// A pipe to the calling process, as a field of [`Child`].
    Piped,
}

impl Guest {
    /// Constructs a [`Command`] that runs `program` in the guest: a path, or a name to be found by the PATH of the guest.
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

    /// Adds arguments. Arguments and environment are limited to 2 MiB in total, a single argument to 128 KiB.
    #[must_use]
    pub fn args(mut self, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        self.options.command.extend(arguments.into_iter().map(|argument| argument.as_ref().to_owned()));
        self
    }

    /// Sets an environment variable.
    #[must_use]
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.options.env.push(environment::entry(name.as_ref(), value.as_ref()));
        self
    }

    /// Sets the working directory, a path in the guest. It is created if it does not exist.
    #[must_use]
    pub fn current_dir(mut self, directory: impl AsRef<Path>) -> Self {
        self.options.working_directory = Some(directory.as_ref().as_os_str().to_owned());
        self
    }

    /// Sets user and group: `USER[:GROUP]`, as names of the image or numbers.
    #[must_use]
    pub fn user(mut self, user: impl Into<String>) -> Self {
        self.options.user = Some(user.into());
        self
    }

    /// Allocates a terminal of this size for the process. Its output and error are one stream then, the output.
    #[must_use]
    pub fn terminal(mut self, size: TerminalSize) -> Self {
        self.options.terminal = Some(size);
        self
    }

    /// Sets the source of the standard input.
    #[must_use]
    pub fn stdin(mut self, stream: Stdio) -> Self {
        self.stdin = Some(stream);
        self
    }

    /// Sets the destination of the standard output.
    #[must_use]
    pub fn stdout(mut self, stream: Stdio) -> Self {
        self.stdout = Some(stream);
        self
    }

    /// Sets the destination of the standard error.
    #[must_use]
    pub fn stderr(mut self, stream: Stdio) -> Self {
        self.stderr = Some(stream);
        self
    }

    /// Starts the process. By default, output and error are inherited, and the input is empty: a thread that forwards
    /// inherited input reads ahead, and would consume input that is meant for others.
    ///
    /// # Errors
    /// When the guest has ended, its image has no such user, or its agent cannot be reached. A missing program is not an
    /// error here: as in a shell, the process ends with status 127 (not found) or 126 (not executable) and a message on
    /// its standard error.
    pub fn spawn(&self) -> Result<Child, ProcessError> {
        self.spawn_with(Stdio::Null, Stdio::Inherit)
    }

    /// Runs the process and waits for its end. By default, output and error are inherited, and the input is empty.
    ///
    /// # Errors
    /// Those of [`Self::spawn`] and of [`Child::wait`].
    pub fn status(&self) -> Result<ExitStatus, ProcessError> {
        self.spawn()?.wait()
    }

    /// Runs the process, waits for its end, and collects its output in memory. By default, output and error are piped, and
    /// the input is empty.
    ///
    /// # Errors
    /// Those of [`Self::status`], and when a stream cannot be read.
    pub fn output(&self) -> Result<Output, ProcessError> {
        self.spawn_with(Stdio::Null, Stdio::Piped)?.wait_with_output()
    }

    fn spawn_with(&self, input: Stdio, outputs: Stdio) -> Result<Child, ProcessError> {
        let process = self.guest.exec(&self.options)?;
        let mut child = Child {
            process,
            stdin: None,
            stdout: None,
            stderr: None,
            output_threads: Vec::new(),
            status: None,
        };
        match self.stdin.unwrap_or(input) {
            Stdio::Null => child.process.end_input(),
            Stdio::Piped => child.stdin = Some(ChildStdin(child.process.address().connect(Role::Input)?)),
            Stdio::Inherit => {
                let from = File::from(rustix::stdio::stdin().try_clone_to_owned()?);
                let to = child.process.address().connect(Role::Input)?;
                // The thread is not joined, because its read may never return.
                thread::Builder::new().name("kindling-input".to_owned()).spawn(move || {
                    // An input that cannot be read has ended.
                    let _ = streams::copy_input(from, &to);
                    let _ = to.shutdown(Shutdown::Write);
                })?;
            }
        }
        if let Some(stream) =
            child.output_stream(Role::Output, self.stdout.unwrap_or(outputs), rustix::stdio::stdout())?
        {
            child.stdout = Some(ChildStdout(stream));
        }
        if let Some(stream) =
            child.output_stream(Role::Error, self.stderr.unwrap_or(outputs), rustix::stdio::stderr())?
        {
            child.stderr = Some(ChildStderr(stream));
        }
        Ok(child)
    }
}

/// A process in a guest.
///
/// Dropping it closes the connection to the process. A process on a terminal then gets SIGHUP, as when a terminal is
/// closed; another one continues to run in the guest.
#[derive(Debug)]
pub struct Child {
    process: agent::Process,
    /// The write end of a piped standard input. Dropping it closes the input.
    pub stdin: Option<ChildStdin>,
    /// The read end of a piped standard output.
    pub stdout: Option<ChildStdout>,
    /// The read end of a piped standard error.
    pub stderr: Option<ChildStderr>,
    /// Threads that forward inherited output, and discard output to the null device.
    output_threads: Vec<JoinHandle<Result<(), OutputError>>>,
    status: Option<ExitStatus>,
}

impl Child {
    /// Connects to an output stream. Returns the connection of a piped stream, and starts a thread for another.
    fn output_stream(
        &mut self,
        role: Role,
        to: Stdio,
        own: BorrowedFd<'_>,
    ) -> Result<Option<UnixStream>, ProcessError> {
        let stream = self.process.address().connect(role)?;
        let target = match to {
            Stdio::Piped => return Ok(Some(stream)),
            Stdio::Inherit => OutputTarget::copy_of(own)?,
            Stdio::Null => OutputTarget::null()?,
        };
        let thread = thread::Builder::new()
            .name("kindling-output".to_owned())
            .spawn(move || streams::copy_output(stream, &target))?;
        self.output_threads.push(thread);
        Ok(None)
    }

    /// Sends a signal by its number. SIGINT, SIGQUIT and SIGHUP go to the process group, as from a terminal; other signals
    /// go to the process only.
    pub fn signal(&self, number: u8) {
        self.process.signal(number);
    }

    /// Kills the process with SIGKILL.
    pub fn kill(&self) {
        const SIGKILL: u8 = 9;
        self.process.signal(SIGKILL);
    }

    /// Resizes the terminal of the process.
    pub fn resize(&self, size: TerminalSize) {
        self.process.resize(size);
    }

    /// Returns the exit status if the process has ended. Does not block.
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

    /// Waits for the end of the process, and until inherited output is written. A piped input is closed first.
    ///
    /// # Errors
    /// When the guest ends before the process, or not all of its inherited output could be written; a second call then returns
    /// the exit status.
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
        // All threads are joined before an error is returned.
        let ends: Vec<_> = self.output_threads.drain(..).map(JoinHandle::join).collect();
        match ends.into_iter().flatten().find_map(Result::err) {
            Some(error) => Err(ProcessError::Output(with_causes(&error))),
            None => Ok(status),
        }
    }

    /// Waits for the end of the process, and collects its piped output and error in memory. A piped input is closed first.
    ///
    /// # Errors
    /// Those of [`Self::wait`], and when a stream cannot be read.
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
        // The streams are read in parallel: a process may block on one while only the other is read.
        let other = thread::Builder::new().name("kindling-output".to_owned()).spawn(move || read(stderr))?;
        let stdout = read(stdout)?;
        let stderr = other.join().unwrap_or_else(|_| Err(io::Error::other("a thread panicked")))?;
        Ok(Output { status: self.wait()?, stdout, stderr })
    }
}

impl AsFd for Child {
    /// Readable when [`Self::try_wait`] may return a status.
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.process.as_fd()
    }
}

/// The standard input of a process in a guest. Dropping it closes the input.
#[derive(Debug)]
pub struct ChildStdin(UnixStream);

/// The standard output of a process in a guest.
#[derive(Debug)]
pub struct ChildStdout(UnixStream);

/// The standard error of a process in a guest.
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

/// The exit status of a process in a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExitStatus(u8);

impl ExitStatus {
    /// Returns whether the status is 0.
    #[must_use]
    pub const fn success(self) -> bool {
        self.0 == 0
    }

    /// Returns the status as a number: 128 + signal if a signal killed the process, 127 if the program was not found, 126
    /// if it is not executable.
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

/// The exit status and the collected output of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// Exit status.
    pub status: ExitStatus,
    /// Data of the standard output, if it was piped.
    pub stdout: Vec<u8>,
    /// Data of the standard error, if it was piped.
    pub stderr: Vec<u8>,
}
