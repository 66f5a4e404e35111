//! Processes in a running guest, as `kindling exec` starts them.

pub use kindling_vmm::agent::{AgentError, Process};

use crate::environment::{self, EnvironmentError};
use crate::guest::{Guest, GuestRecord};
use crate::image::{self, ImageError};
use guest_protocol::agent::TerminalSize;
use guest_protocol::frame::FrameError;
use kindling_vmm::config::{BootInfo, GuestConfig};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

/// An error when a process is started in a guest.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExecError {
    /// The guest's image has no such user, or cannot be read.
    #[error(transparent)]
    User(#[from] ImageError),
    /// An environment file is invalid.
    #[error(transparent)]
    Environment(#[from] EnvironmentError),
    /// The guest's agent cannot be reached.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// The command, with its environment, exceeds the limits of a guest.
    #[error(transparent)]
    Command(#[from] FrameError),
}

impl ExecError {
    /// Returns whether the request is at fault, rather than the host or the guest.
    #[must_use]
    pub const fn is_user_error(&self) -> bool {
        !matches!(
            self,
            Self::User(ImageError::Failed(_)) | Self::Agent(AgentError::Lost | AgentError::Silent { .. })
        )
    }
}

/// Options of a process in a guest. Text has the syntax of `docker exec`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExecOptions {
    /// The program and its arguments.
    pub command: Vec<OsString>,
    /// Environment variables in addition to the guest's: `NAME=VALUE`, or `NAME` for the value that the calling process
    /// has.
    pub env: Vec<OsString>,
    /// Files with such variables, one a line. Those of [`env`](Self::env) override them.
    pub env_files: Vec<PathBuf>,
    /// Working directory. Defaults to the guest's.
    pub working_directory: Option<OsString>,
    /// User and group, `USER[:GROUP]`, as names of the image or numbers. Defaults to the guest's.
    pub user: Option<String>,
    /// Initial size of the terminal. Without one, the streams are pipes.
    pub terminal: Option<TerminalSize>,
}

impl Guest {
    /// Starts a process, with control over its streams by the messages of the agent. [`Guest::command`] is the simpler
    /// interface. A paused guest starts it when it is resumed.
    ///
    /// # Errors
    /// When the image has no such user, an environment file is invalid, or the guest's agent cannot be reached.
    pub fn exec(&self, options: &ExecOptions) -> Result<Process, ExecError> {
        let frame = options.guest(&self.record)?.to_frame(&BootInfo::default())?;
        Ok(Process::start(&self.socket(), crate::token(), &frame)?)
    }
}

impl ExecOptions {
    /// The configuration of the process: that of the guest's payload, changed by these options.
    fn guest(&self, guest: &GuestRecord) -> Result<GuestConfig, ExecError> {
        let payload = &guest.payload;
        let mut environment: Vec<_> = payload.environment.iter().map(|entry| entry.clone().into()).collect();
        let other_user = self
            .user
            .as_deref()
            .map(|user| image::user(&guest.directory, guest.image.as_ref(), user))
            .transpose()?;
        if let Some(home) = other_user.as_ref().and_then(|user| user.home.as_ref()) {
            environment::set(&mut environment, OsStr::new(&format!("HOME={home}")));
        }
        environment::set_all(&mut environment, &self.env_files, &self.env)?;
        let bytes = |word: &OsString| word.as_bytes().to_vec();
        let workdir = self.working_directory.as_ref().map(bytes);
        let user = other_user.as_ref().unwrap_or(&payload.user);
        Ok(GuestConfig {
            arguments: self.command.iter().map(bytes).collect(),
            environment,
            working_directory: workdir.or_else(|| payload.working_directory.clone().map(String::into_bytes)),
            user_id: user.uid,
            group_id: user.gid,
            groups: user.groups.clone(),
            terminal: self.terminal,
            agent: true,
            ..GuestConfig::default()
        })
    }
}
