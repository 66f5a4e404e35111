//! Templates: guests that were saved after a set-up, and of which any number of copies start.
//!
//! A template is a directory of the user's data with a snapshot of the machine (`memory`), the root filesystem and a record. It
//! appears complete, or not at all.

mod record;

use crate::GuestBuilder;
use crate::guest::{Guest, GuestError};
use crate::image::Image;
use crate::launch::{Failure, LaunchError};
use crate::volume;
use kindling_vmm::agent::{AgentError, Process, ProcessEvent};
use kindling_vmm::control::{ControlError, Event, Monitor};
use record::Record;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, RenameFlags, linkat, open, renameat_with};
use rustix::io::Errno;
use std::error::Error;
use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};
use trusted_path::Owners;

/// The files of a template.
const MEMORY: &str = "memory";
const ROOT: &str = "root.erofs";
const RECORD: &str = "template.json";
/// Time limit from the request to freeze the processes to the end of the machine.
const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(120);
/// Age after which the files of a process that was killed while it created a template are removed.
const ABANDONED: Duration = Duration::from_secs(3600);

/// An error of a template.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TemplateError {
    /// The name is invalid.
    #[error(
        "invalid template name {0:?}: use up to 64 letters, digits, '.', '_' and '-', and start with a letter or digit"
    )]
    Name(String),
    /// No template has this name.
    #[error("no template named {0}; `kindling template ls` lists all templates")]
    Unknown(String),
    /// A template of this name exists.
    #[error("a template named {0} exists already; `kindling template rm` removes it")]
    Taken(String),
    /// The guest of the template cannot be started.
    #[error(transparent)]
    Launch(Box<LaunchError>),
    /// The guest of the template cannot be used.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// The set-up failed.
    #[error(transparent)]
    SetUp(Box<dyn Error + Send + Sync>),
    /// The agent of the guest cannot be reached.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// A process of the guest cannot be frozen.
    #[error(
        "the guest cannot freeze its processes: one is in a system call that does not end, or /sys/fs/cgroup is not \
         mounted there"
    )]
    NotFrozen,
    /// The monitor could not write the snapshot.
    #[error("{}", .0.message)]
    Snapshot(Failure),
    /// The monitor ended or does not respond.
    #[error("cannot take the snapshot")]
    Monitor(#[source] ControlError),
    /// The template was made by another version, or its record is damaged.
    #[error(
        "the template {name} cannot be used: {what}; remove it with `kindling template rm`, and create it again"
    )]
    Invalid {
        /// Name of the template.
        name: String,
        /// What is wrong with it.
        what: String,
    },
    /// An option that a copy cannot have, because its machine is the template's.
    #[error("{0} cannot be combined with a template, whose copies have the machine of the template; {1}")]
    Fixed(&'static str, &'static str),
    /// Other users can change the directory of templates.
    #[error("cannot use the directory of templates")]
    Untrusted(#[from] trusted_path::Error),
    /// The user has no data directory.
    #[error("cannot find the directory of templates; set XDG_DATA_HOME or HOME to an absolute path")]
    NoHome,
    /// An operation on a file of the host failed.
    #[error("cannot {what} {}", path.display())]
    Host {
        /// The operation.
        what: &'static str,
        /// Path of the file.
        path: PathBuf,
        /// The host's error.
        source: io::Error,
    },
}

impl From<LaunchError> for TemplateError {
    fn from(error: LaunchError) -> Self {
        Self::Launch(error.into())
    }
}

impl TemplateError {
    /// Returns whether the request is at fault, rather than the host or the guest.
    #[must_use]
    pub fn is_user_error(&self) -> bool {
        match self {
            Self::Launch(error) => error.is_user_error(),
            Self::Guest(error) => error.is_user_error(),
            Self::Name(_)
            | Self::Unknown(_)
            | Self::Taken(_)
            | Self::Invalid { .. }
            | Self::Fixed(..)
            | Self::Untrusted(_)
            | Self::NoHome => true,
            _ => false,
        }
    }
}

fn host(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> TemplateError {
    move |source| TemplateError::Host { what, path: path.to_owned(), source }
}

/// A guest that was saved after a set-up.
///
/// ```no_run
/// use kindling::{Guest, Image, Template};
///
/// let builder = Guest::builder(Image::open("python.tar")?).memory_mib(256);
/// let template = Template::create("python", builder, |guest| {
///     guest.command("pip").args(["install", "numpy"]).status()?;
///     Ok(())
/// })?;
/// let copy = template.guest().start()?;
/// copy.command("python3").args(["-c", "import numpy"]).status()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    name: String,
    folder: PathBuf,
    record: Record,
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
    ) -> Result<Self, TemplateError> {
        let folder = path_of(name)?;
        if folder.exists() {
            return Err(TemplateError::Taken(name.to_owned()));
        }
        let parent = folder.parent().unwrap_or(&folder);
        trusted_path::make_folder(parent)?;
        remove_abandoned(parent);
        let memory = unnamed_file(parent)?;
        let (guest, config, image) =
            builder.start_for_snapshot(memory.try_clone().map_err(host("open", parent))?)?;
        set_up(&guest).map_err(TemplateError::SetUp)?;
        take_snapshot(&guest)?;
        // The monitor does not write to the file any more when it appears.
        drop(guest);
        let draft = Draft(parent.join(format!(".{:016x}.{name}", crate::token())));
        let record = draft.fill(&memory, config, &image)?;
        match renameat_with(CWD, &draft.0, CWD, &folder, RenameFlags::NOREPLACE) {
            Ok(()) => Ok(Self { name: name.to_owned(), folder, record }),
            Err(Errno::EXIST | Errno::NOTEMPTY) => Err(TemplateError::Taken(name.to_owned())),
            Err(error) => Err(host("create", &folder)(error.into())),
        }
    }

    /// Opens the template of this name.
    ///
    /// # Errors
    /// When the user has no template of this name, or it was made by another version.
    pub fn open(name: &str) -> Result<Self, TemplateError> {
        let folder = path_of(name)?;
        let record = Record::read(&folder, name)?;
        Ok(Self { name: name.to_owned(), folder, record })
    }

    /// Returns a builder for a copy. Memory, vCPUs and devices are those of the template; environment, working directory and user
    /// are the image's.
    pub fn guest(&self) -> GuestBuilder {
        GuestBuilder::from_template(self.clone())
    }

    /// Returns the name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the path of the directory.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Returns the image of the template, with its configuration and the template's root filesystem.
    #[must_use]
    pub fn image(&self) -> Image {
        self.record.image(&self.folder)
    }

    /// Returns the image's name, as it was given.
    #[must_use]
    pub fn image_name(&self) -> &OsStr {
        self.record.image.as_ref()
    }

    /// Returns the memory of its copies in MiB.
    #[must_use]
    pub const fn memory_mib(&self) -> u64 {
        self.record.config.machine.mem_size_mib
    }

    /// Returns the number of vCPUs of its copies.
    #[must_use]
    pub const fn vcpus(&self) -> u8 {
        self.record.config.machine.vcpu_count
    }

    /// Returns the time of its creation, in seconds since 1970.
    #[must_use]
    pub const fn created(&self) -> u64 {
        self.record.created
    }

    /// Returns the space that the saved memory takes on the host, in bytes.
    ///
    /// # Errors
    /// When the attributes of the file cannot be read.
    pub fn size(&self) -> Result<u64, TemplateError> {
        let path = self.folder.join(MEMORY);
        Ok(path.metadata().map_err(host("look at", &path))?.blocks() * 512)
    }

    /// The configuration of a copy's machine, without what each copy has of its own.
    pub(crate) fn config(&self) -> Result<kindling_vmm::config::Config, TemplateError> {
        self.record.check_root(&self.folder, &self.name)?;
        Ok(self.record.config(&self.folder))
    }
}

/// Returns the names of all templates of the user, sorted.
///
/// # Errors
/// When the directory of templates cannot be read.
pub fn templates() -> Result<Vec<String>, TemplateError> {
    let folder = folder()?;
    remove_abandoned(&folder);
    let entries = match folder.read_dir() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        result => result.map_err(host("read", &folder))?,
    };
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut names: Vec<_> = names.filter(|name| is_name(name)).collect();
    names.sort();
    Ok(names)
}

/// Removes a template, also one that this version cannot use. Its copies continue to run.
///
/// # Errors
/// When the user has no template of this name, or the host cannot remove it.
pub fn remove(name: &str) -> Result<(), TemplateError> {
    let folder = path_of(name)?;
    // Renamed first, so that it is never found in part.
    let draft = folder.with_file_name(format!(".{:016x}.{name}", crate::token()));
    fs::rename(&folder, &draft).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => TemplateError::Unknown(name.to_owned()),
        _ => host("remove", &folder)(error),
    })?;
    fs::remove_dir_all(&draft).map_err(host("remove", &draft))
}

/// A directory that is about to get its name. Dropping it removes it.
struct Draft(PathBuf);

impl Drop for Draft {
    fn drop(&mut self) {
        // It does not exist any more if it has its name.
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl Draft {
    /// Creates the directory with its files.
    fn fill(
        &self,
        memory: &File,
        config: kindling_vmm::config::Config,
        image: &Image,
    ) -> Result<Record, TemplateError> {
        let failed = || host("create", &self.0);
        DirBuilder::new().mode(0o700).create(&self.0).map_err(failed())?;
        memory.sync_all().map_err(failed())?;
        let open_file = format!("/proc/self/fd/{}", memory.as_raw_fd());
        linkat(CWD, open_file, CWD, self.0.join(MEMORY), AtFlags::SYMLINK_FOLLOW)
            .map_err(|error| failed()(error.into()))?;
        let root = self.0.join(ROOT);
        keep_root(image, &root).map_err(failed())?;
        let record = Record::new(config, image, &root).map_err(failed())?;
        record.write(&self.0.join(RECORD)).map_err(failed())?;
        Ok(record)
    }
}

/// Keeps the root filesystem. A file of the cache is never rewritten and can have another name; one that the user has given
/// could be rewritten in place, and is copied.
fn keep_root(image: &Image, target: &Path) -> io::Result<()> {
    let prepared = image.prepared();
    let is_of_cache = !prepared.digest.is_empty();
    if is_of_cache && fs::hard_link(&prepared.rootfs, target).is_ok() {
        return Ok(());
    }
    fs::copy(&prepared.rootfs, target).map(drop)
}

/// Creates an unnamed file in a directory, which the kernel deletes if this process ends.
fn unnamed_file(folder: &Path) -> Result<File, TemplateError> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let file = open(folder, flags, Mode::from_raw_mode(0o600));
    file.map(File::from).map_err(|error| host("create a file in", folder)(error.into()))
}

/// Makes the guest freeze its processes, and waits until its monitor has saved it.
fn take_snapshot(guest: &Guest) -> Result<(), TemplateError> {
    let monitor = guest.owned_monitor()?;
    let until = Instant::now() + SNAPSHOT_TIMEOUT;
    let mut process = Some(Process::freeze(&guest.socket(), crate::token())?);
    loop {
        if let Some(event) = monitor.event_before(Instant::now()).map_err(TemplateError::Monitor)? {
            match event {
                Event::Saved => return Ok(()),
                Event::Failed(failure) => return Err(TemplateError::Snapshot(failure)),
                _ => continue,
            }
        }
        match process.as_mut().map(Process::poll_event) {
            Some(Ok(Some(ProcessEvent::Exited { .. }))) => return Err(TemplateError::NotFrozen),
            // The connection ends with the machine, whose monitor then reports the result.
            Some(Err(AgentError::Lost)) => process = None,
            Some(Err(error)) => return Err(error.into()),
            Some(Ok(_)) | None => {}
        }
        wait(monitor, process.as_ref(), until)?;
    }
}

/// Waits for an event of the monitor or of the guest's agent.
fn wait(monitor: &Monitor, process: Option<&Process>, until: Instant) -> Result<(), TemplateError> {
    let timeout = || TemplateError::Monitor(ControlError::Timeout);
    let rest = until.checked_duration_since(Instant::now()).ok_or_else(timeout)?;
    let mut watched = vec![PollFd::from_borrowed_fd(monitor.as_fd(), PollFlags::IN)];
    watched
        .extend(process.map(|process| PollFd::from_borrowed_fd(process.as_fd(), process.poll_interest().0)));
    match poll(&mut watched, Timespec::try_from(rest).ok().as_ref()) {
        Ok(0) => Err(timeout()),
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(host("wait for", Path::new("the guest"))(error.into())),
    }
}

/// The directory of templates.
fn folder() -> Result<PathBuf, TemplateError> {
    let folder = volume::data().ok_or(TemplateError::NoHome)?.join("templates");
    match trusted_path::folder(&folder, Owners::own()) {
        Err(error) if !error.is_absent() => Err(error.into()),
        _ => Ok(folder),
    }
}

fn path_of(name: &str) -> Result<PathBuf, TemplateError> {
    if is_name(name) { Ok(folder()?.join(name)) } else { Err(TemplateError::Name(name.to_owned())) }
}

/// Whether a name has the form of a volume's.
fn is_name(name: &str) -> bool {
    crate::mount::volume_name(name.as_bytes()).is_some()
}

/// Removes directories of processes that were killed while they created or removed a template.
fn remove_abandoned(folder: &Path) {
    let is_old = |path: &Path| {
        let modified = path.metadata().and_then(|metadata| metadata.modified());
        modified.is_ok_and(|time| SystemTime::now().duration_since(time).is_ok_and(|age| age > ABANDONED))
    };
    let entries = folder.read_dir().into_iter().flatten().flatten();
    for entry in entries.filter(|entry| entry.file_name().as_encoded_bytes().starts_with(b".")) {
        if is_old(&entry.path()) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}
