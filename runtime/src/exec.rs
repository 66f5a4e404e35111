//! One more process in a guest that runs.

use crate::environment::{self, EnvironmentError};
use crate::guest::{Guest, GuestRecord};
use crate::image::{self, ImageError};
use guest_protocol::agent::TerminalSize;
use guest_protocol::frame::FrameError;
use kindling_vmm::agent::{AgentError, Process};
use kindling_vmm::config::{BootInfo, GuestConfig};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

/// Why a process cannot be started in a guest.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExecError {
    /// The guest has no such user.
    #[error(transparent)]
    User(#[from] ImageError),
    /// A file of entries cannot be used.
    #[error(transparent)]
    Environment(#[from] EnvironmentError),
    /// The guest's agent refused or is gone.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// The command is longer than a guest takes.
    #[error(transparent)]
    Command(#[from] FrameError),
}

impl ExecError {
    /// Whether asking for something else can help, rather than the host.
    #[must_use]
    pub const fn is_users(&self) -> bool {
        !matches!(
            self,
            Self::User(ImageError::Failed(_)) | Self::Agent(AgentError::Lost | AgentError::Silent { .. })
        )
    }
}

/// What a user wants of a process. Text is as users of docker write it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExecOptions {
    /// The program and its arguments.
    pub command: Vec<OsString>,
    /// Entries of the environment beside the guest's: `NAME=VALUE`, or `NAME` for this process's value.
    pub env: Vec<OsString>,
    /// Files with such entries, which come first.
    pub env_files: Vec<PathBuf>,
    /// Working directory, instead of the guest's.
    pub working_directory: Option<OsString>,
    /// `USER[:GROUP]`, names or numbers, instead of the guest's.
    pub user: Option<String>,
    /// It has a terminal, which starts with this size.
    pub terminal: Option<TerminalSize>,
}

impl Guest {
    /// Starts a process.
    ///
    /// # Errors
    /// When the guest has no such user or refuses the process.
    pub fn exec(&self, options: &ExecOptions) -> Result<Process, ExecError> {
        let frame = options.guest(&self.record)?.to_frame(&BootInfo::default())?;
        Ok(Process::start(&self.socket(), crate::token(), &frame)?)
    }
}

impl ExecOptions {
    /// The command as the guest's own would be, but for what is asked for.
    fn guest(&self, guest: &GuestRecord) -> Result<GuestConfig, ExecError> {
        let of_guest = &guest.payload;
        let mut environment: Vec<_> = of_guest.environment.iter().map(|entry| entry.clone().into()).collect();
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
        let user = other_user.as_ref().unwrap_or(&of_guest.user);
        Ok(GuestConfig {
            arguments: self.command.iter().map(bytes).collect(),
            environment,
            working_directory: workdir.or_else(|| of_guest.working_directory.clone().map(String::into_bytes)),
            user_id: user.uid,
            group_id: user.gid,
            groups: user.groups.clone(),
            terminal: self.terminal,
            agent: true,
            ..GuestConfig::default()
        })
    }
}
