//! The process that serves a folder: `kindling-fs` beside this program.

use super::host_folder;
use crate::config::ConfigError;
use crate::config::devices::SharedFolder as Config;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

/// A process that serves a folder, and the socket to it. It ends when the socket is closed.
#[derive(Debug)]
pub struct Server {
    socket: UnixStream,
    process: Option<Child>,
    /// Where it says why it ends.
    messages: Option<OwnedFd>,
}

impl Server {
    /// Starts it. That it is ready does not matter: what is sent before waits in the socket. The folder is its standard
    /// output, so that it has the descriptor that was checked, and needs no path.
    ///
    /// # Errors
    /// When the folder is none that its user can read, or there is no such program.
    pub(crate) fn start(config: &Config) -> Result<Self, ConfigError> {
        let folder = host_folder::open(&config.path)?;
        let wrong = |what: String| ConfigError::SharedFolder { path: config.path.clone(), what };
        let program = trusted_path::companion("kindling-fs").map_err(|error| match error.is_absent() {
            true => wrong("kindling-fs has to lie beside this program".into()),
            false => wrong(error.to_string()),
        })?;
        let no_descriptor = |error: io::Error| wrong(format!("the host gave no descriptor: {error}"));
        let (ours, its) = UnixStream::pair().map_err(no_descriptor)?;
        let folder = folder.as_fd().try_clone_to_owned().map_err(no_descriptor)?;
        let mut command = Command::new(program);
        command.arg("--owner").arg(format!("{}:{}", config.owner.0, config.owner.1));
        if config.read_only {
            command.arg("--read-only");
        }
        command.stdin(OwnedFd::from(its)).stdout(folder);
        // Not this program's: who reads that until its end would wait for a detached guest's server.
        command.stderr(Stdio::piped());
        command.env_clear().current_dir("/");
        // Ctrl-C at a terminal is for the guest's program, which may still have something to write.
        command.process_group(0);
        let mut process =
            command.spawn().map_err(|error| wrong(format!("kindling-fs cannot be started: {error}")))?;
        let messages = process.stderr.take().map(OwnedFd::from);
        Ok(Self { socket: ours, process: Some(process), messages })
    }

    /// One that another process has started, and looks after.
    pub(crate) const fn of_descriptors(socket: UnixStream, messages: OwnedFd) -> Self {
        Self { socket, process: None, messages: Some(messages) }
    }

    /// Its descriptors, for another process; this one keeps the server's process.
    pub(crate) fn descriptors(&self) -> io::Result<[OwnedFd; 2]> {
        let messages = self.messages.as_ref().ok_or(io::ErrorKind::NotFound)?;
        Ok([self.socket.try_clone()?.into(), messages.try_clone()?])
    }

    /// Something of this process that behaves like one, or not.
    #[cfg(any(test, fuzzing))]
    #[must_use]
    pub const fn connected(socket: UnixStream) -> Self {
        Self { socket, process: None, messages: None }
    }

    pub(super) const fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Ends it without waiting, which may take long where a disk hangs. What it said, if it did.
    pub(super) fn leave(mut self) -> Option<String> {
        let _ = self.socket.shutdown(Shutdown::Both);
        if let Some(mut process) = self.process.take() {
            // It may have ended already.
            let _ = process.kill();
            let _ = process.try_wait();
        }
        last_words(self.messages.take()?)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            // It sees the end of its requests, whoever else has a copy of the socket, and nothing of it remains.
            let _ = self.socket.shutdown(Shutdown::Both);
            wait_a_little(&process);
            let _ = process.kill();
            let _ = process.try_wait();
        }
    }
}

/// Waits for a process's end, but not for the disk that it may wait for.
fn wait_a_little(process: &Child) {
    const PATIENCE: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };
    if let Ok(process) = pidfd_open(Pid::from_child(process), PidfdFlags::empty()) {
        let _ = poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&PATIENCE));
    }
}

/// The line that it ended with. Nobody waits for one.
fn last_words(stderr: OwnedFd) -> Option<String> {
    const MOST: usize = 1024;
    let mut words = [0; MOST];
    rustix::io::ioctl_fionbio(&stderr, true).ok()?;
    let count = rustix::io::read(&stderr, &mut words).ok()?;
    let text = String::from_utf8_lossy(&words[..count]);
    text.lines().rfind(|line| !line.is_empty()).map(str::to_owned)
}
