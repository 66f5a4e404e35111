//! Snapshots of guests: those that become templates, whose guest ends, and those of a guest that continues.

use crate::GuestBuilder;
use crate::guest::origin::Origin;
use crate::guest::{Guest, GuestError, GuestRecord};
use crate::launch::{Failure, LaunchError};
use crate::template::{Draft, Template, TemplateError};
use kindling_vmm::agent::{AgentError, Process, ProcessEvent};
use kindling_vmm::control::{ControlError, Event};
use kindling_vmm::preboot;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::error::Error;
use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

/// Time limit from the request to freeze the processes to the end of the machine.
const TIMEOUT: Duration = Duration::from_secs(120);

/// Why a template could not be created.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// The template's name or files.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// The guest cannot be started.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// The guest cannot be used.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// The set-up failed.
    #[error(transparent)]
    SetUp(Box<dyn Error + Send + Sync>),
    /// The agent of the guest cannot be reached.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// The guest has what a snapshot cannot have.
    #[error(
        "the guest {0} cannot be saved: it has volumes, shared directories, a tap device, limits or a read-only root filesystem, \
         or was started with --cold or by another version of kindling"
    )]
    Impossible(String),
    /// A process of the guest cannot be frozen.
    #[error(
        "the guest cannot freeze its processes: one is in a system call that does not end, or /sys/fs/cgroup is not \
         mounted there"
    )]
    NotFrozen,
    /// The monitor could not write the snapshot.
    #[error("{}", .0.message)]
    Monitor(Failure),
    /// The monitor ended or does not respond.
    #[error("cannot take the snapshot")]
    Control(#[from] ControlError),
    /// The host cannot wait for the monitor.
    #[error("cannot wait for the snapshot")]
    Host(#[source] std::io::Error),
}

impl SnapshotError {
    /// Returns whether the request is at fault, rather than the host or the guest.
    #[must_use]
    pub fn is_user_error(&self) -> bool {
        match self {
            Self::Template(error) => error.is_user_error(),
            Self::Launch(error) => error.is_user_error(),
            Self::Guest(error) => error.is_user_error(),
            Self::Impossible(_) => true,
            _ => false,
        }
    }
}

impl Template {
    /// Starts a guest, calls `set_up` with it, and saves it as a template. The guest ends. It has no volumes, shared directories or
    /// network.
    ///
    /// # Errors
    /// When the name is invalid or taken, the guest cannot be started or saved, or `set_up` fails.
    pub fn create(
        name: &str,
        builder: GuestBuilder,
        set_up: impl FnOnce(&Guest) -> Result<(), Box<dyn Error + Send + Sync>>,
    ) -> Result<Self, SnapshotError> {
        let mut draft = Draft::new(name)?;
        let guest = builder.start_for_snapshot(draft.memory()?)?;
        set_up(&guest).map_err(SnapshotError::SetUp)?;
        let (image, origin) = (guest.record.image.clone(), origin_of(&guest)?);
        draft.keep_root(&origin)?;
        take(&guest)?;
        // The monitor does not write to the file any more when it appears.
        drop(guest);
        Ok(draft.publish(&origin, &image, None)?)
    }
}

impl Guest {
    /// Saves the guest in a new directory, and lets it continue: memory and state of the machine, and its root filesystem. Its
    /// processes are frozen meanwhile. [`Guest::restore`] starts guests that continue from there, and `kindling restore` one whose
    /// command does.
    ///
    /// # Errors
    /// When the directory exists or cannot be written, the guest is paused or has ended, has volumes, shared directories, a tap
    /// device or limits, a process cannot be frozen, or the monitor cannot read the machine's state. The guest continues.
    pub fn snapshot(&self, folder: impl AsRef<Path>) -> Result<(), SnapshotError> {
        self.save(folder.as_ref(), false)
    }

    /// Saves the guest as [`Self::snapshot`] does, and ends it: it executes nothing after what was saved. Its exit status is that of a
    /// guest that was killed.
    ///
    /// # Errors
    /// Those of [`Self::snapshot`] and [`Self::kill`]. A guest that could not be saved continues.
    pub fn suspend(&self, folder: impl AsRef<Path>) -> Result<(), SnapshotError> {
        self.check_runs()?;
        if let Err(error) = self.save(folder.as_ref(), true) {
            // Its memory may have been saved, and the directory could not be created.
            let _ = self.resume();
            return Err(error);
        }
        Ok(self.kill()?)
    }

    fn save(&self, folder: &Path, pauses: bool) -> Result<(), SnapshotError> {
        let origin = origin_of(self)?;
        let mut draft = Draft::at(folder)?;
        self.check_runs()?;
        draft.keep_root(&origin)?;
        let file = draft.memory()?;
        let length = preboot::length_max(origin.machine.mem_size_mib);
        file.set_len(length).map_err(SnapshotError::Host)?;
        let until = Instant::now() + preboot::time_limit(origin.machine.mem_size_mib);
        receive(self, &file, length, pauses, until)?;
        let record = GuestRecord { origin: None, ..self.record.clone() };
        draft.publish(&origin, &self.record.image, Some(Box::new(record)))?;
        Ok(())
    }

    /// Starts to describe a guest that continues from a snapshot in a directory. Its processes continue when it is started, with
    /// random numbers, a name and addresses of its own; programs of the host start others.
    ///
    /// # Errors
    /// When the directory has no snapshot, or it was made by another version.
    pub fn restore(folder: impl AsRef<Path>) -> Result<GuestBuilder, TemplateError> {
        Ok(Template::in_folder(folder.as_ref())?.guest())
    }
}

fn origin_of(guest: &Guest) -> Result<Origin, SnapshotError> {
    let origin = guest.record.origin.as_deref().and_then(Origin::from_text);
    origin.ok_or_else(|| SnapshotError::Impossible(guest.name.clone()))
}

/// Makes the guest freeze its processes, and writes to a file, of at most this length, what its monitor sends then.
fn receive(
    guest: &Guest,
    file: &File,
    length: u64,
    pauses: bool,
    until: Instant,
) -> Result<(), SnapshotError> {
    let mut receiver = guest.requester()?.snapshot(file, length, pauses, until)?;
    let mut process = Process::freeze(&guest.socket(), crate::token(), true)?;
    loop {
        if receiver.receive()? {
            return Ok(());
        }
        if let Some(ProcessEvent::Exited { .. }) = process.poll_event()? {
            // A guest that continues after its snapshot reports that, too.
            let is_complete = receiver.receive()?;
            return if is_complete { Ok(()) } else { Err(SnapshotError::NotFrozen) };
        }
        wait(&receiver, Some(&process), until)?;
    }
}

/// Makes the guest freeze its processes, and waits until its monitor has saved it.
fn take(guest: &Guest) -> Result<(), SnapshotError> {
    let monitor = guest.owned_monitor()?;
    let until = Instant::now() + TIMEOUT;
    let mut process = Some(Process::freeze(&guest.socket(), crate::token(), false)?);
    loop {
        match monitor.event_before(Instant::now())? {
            Some(Event::Saved) => return Ok(()),
            Some(Event::Failed(failure)) => return Err(SnapshotError::Monitor(failure)),
            Some(_) => continue,
            None => {}
        }
        match process.as_mut().map(Process::poll_event) {
            Some(Ok(Some(ProcessEvent::Exited { .. }))) => return Err(SnapshotError::NotFrozen),
            // The connection ends with the machine, whose monitor then reports the result.
            Some(Err(AgentError::Lost)) => process = None,
            Some(Err(error)) => return Err(error.into()),
            Some(Ok(_)) | None => {}
        }
        wait(monitor, process.as_ref(), until)?;
    }
}

/// Waits for an event of the monitor or of the guest's agent.
fn wait(monitor: &impl AsFd, process: Option<&Process>, until: Instant) -> Result<(), SnapshotError> {
    let rest = until.checked_duration_since(Instant::now()).ok_or(ControlError::Timeout)?;
    let mut watched = vec![PollFd::from_borrowed_fd(monitor.as_fd(), PollFlags::IN)];
    watched
        .extend(process.map(|process| PollFd::from_borrowed_fd(process.as_fd(), process.poll_interest().0)));
    match poll(&mut watched, Timespec::try_from(rest).ok().as_ref()) {
        Ok(0) => Err(ControlError::Timeout.into()),
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(SnapshotError::Host(error.into())),
    }
}
