//! The process that serves a folder: `kindling-fs`, in the directory of the running program.

use super::host_folder;
use crate::config::devices::SharedFolder as Config;
use crate::devices::virtio::BackendError;
use crate::poll::wait_readable;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The server process of a folder, and the socket to it. The process exits when the socket is closed.
#[derive(Debug)]
pub struct Server {
    socket: UnixStream,
    process: Option<Child>,
    /// Its standard error, to which it writes the reason when it fails.
    messages: Option<OwnedFd>,
}

impl Server {
    /// Starts the server. It need not be ready on return: requests wait in the socket. The folder is passed as standard
    /// output, so that the server uses the descriptor that was checked, and needs no path.
    ///
    /// # Errors
    /// When the folder is not usable, or the server cannot be started.
    pub(super) fn start(config: &Config) -> Result<Self, BackendError> {
        let folder = host_folder::open(&config.path)?;
        let wrong = |why: String| host_folder::unusable(&config.path, why);
        let program = trusted_path::companion("kindling-fs").map_err(|error| match error.is_absent() {
            true => wrong("kindling-fs is missing from the directory of this program".into()),
            false => wrong(error.to_string()),
        })?;
        let no_descriptor = |error: io::Error| wrong(format!("cannot create a descriptor: {error}"));
        let (ours, theirs) = UnixStream::pair().map_err(no_descriptor)?;
        let folder = folder.as_fd().try_clone_to_owned().map_err(no_descriptor)?;
        let mut command = Command::new(program);
        command.arg("--owner").arg(format!("{}:{}", config.owner.0, config.owner.1));
        if config.read_only {
            command.arg("--read-only");
        }
        command.stdin(OwnedFd::from(theirs)).stdout(folder);
        // Not inherited: a program that reads this process's standard error until EOF would wait for the server of a
        // detached guest.
        command.stderr(Stdio::piped());
        command.env_clear().current_dir("/");
        // Ctrl-C in a terminal is meant for the guest's program, which may still write files.
        command.process_group(0);
        let mut process =
            command.spawn().map_err(|error| wrong(format!("cannot start kindling-fs: {error}")))?;
        let messages = process.stderr.take().map(OwnedFd::from);
        Ok(Self { socket: ours, process: Some(process), messages })
    }

    /// A server that another process has started and manages.
    pub(crate) const fn from_descriptors(socket: UnixStream, messages: OwnedFd) -> Self {
        Self { socket, process: None, messages: Some(messages) }
    }

    /// Duplicates of the socket and of the server's standard error, for another process; this one keeps the child
    /// process.
    pub(crate) fn descriptors(&self) -> io::Result<[OwnedFd; 2]> {
        let messages = self.messages.as_ref().ok_or(io::ErrorKind::NotFound)?;
        Ok([self.socket.try_clone()?.into(), messages.try_clone()?])
    }

    /// Closes this handle of a server that another process uses, and returns the child process, which exits with that one.
    pub(crate) fn release(mut self) -> Option<Child> {
        self.process.take()
    }

    /// A server in this process, for tests and fuzzing.
    #[cfg(any(test, fuzzing))]
    #[must_use]
    pub const fn connected(socket: UnixStream) -> Self {
        Self { socket, process: None, messages: None }
    }

    pub(super) const fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Kills the server without waiting for its exit, which may take long on a hanging disk. Returns its last message,
    /// if there is one.
    pub(super) fn stop(mut self) -> Option<String> {
        let _ = self.socket.shutdown(Shutdown::Both);
        if let Some(mut process) = self.process.take() {
            // The process may have exited already.
            let _ = process.kill();
            let _ = process.try_wait();
        }
        last_message(self.messages.take()?)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            // The shutdown ends the stream even if there are duplicates of the socket; then the process is reaped.
            let _ = self.socket.shutdown(Shutdown::Both);
            wait_for_exit(&process);
            let _ = process.kill();
            let _ = process.try_wait();
        }
    }
}

/// Waits for the exit of a process, up to a timeout, because the process may wait for a hanging disk.
fn wait_for_exit(process: &Child) {
    const STOP_TIMEOUT: Duration = Duration::from_secs(1);
    if let Ok(process) = pidfd_open(Pid::from_child(process), PidfdFlags::empty()) {
        let _ = wait_readable(process.as_fd(), Some(Instant::now() + STOP_TIMEOUT));
    }
}

/// The last line that the server has written, without waiting for one.
fn last_message(stderr: OwnedFd) -> Option<String> {
    const MAX_LEN: usize = 1024;
    let mut bytes = [0; MAX_LEN];
    rustix::io::ioctl_fionbio(&stderr, true).ok()?;
    let count = rustix::io::read(&stderr, &mut bytes).ok()?;
    let text = String::from_utf8_lossy(&bytes[..count]);
    text.lines().rfind(|line| !line.is_empty()).map(str::to_owned)
}
