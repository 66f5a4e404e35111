//! Templates: guests that were saved after a set-up, and of which any number of copies start.
//!
//! A template is a directory of the user's data with a snapshot of the machine (`memory`), the root filesystem and a record. It
//! appears complete, or not at all.

mod draft;
mod record;

pub(crate) use draft::Draft;

use crate::guest::GuestRecord;
use crate::image::Image;
use kindling_vmm::config::Config;
use record::Record;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// The files of a template.
const MEMORY: &str = "memory";
const ROOT: &str = "root.erofs";
const RECORD: &str = "template.json";
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
    /// The directory for a snapshot exists.
    #[error("{} exists already", .0.display())]
    Exists(PathBuf),
    /// The directory is not a snapshot of a guest with a command.
    #[error("{} has no command that could continue: it is not a snapshot of a guest of `kindling run`", .0.display())]
    NoCommand(PathBuf),
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

impl TemplateError {
    /// Returns whether the request is at fault, rather than the host.
    #[must_use]
    pub const fn is_user_error(&self) -> bool {
        !matches!(self, Self::Host { .. })
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
    /// Opens the template of this name.
    ///
    /// # Errors
    /// When the user has no template of this name, or it was made by another version.
    pub fn open(name: &str) -> Result<Self, TemplateError> {
        let folder = path_of(name)?;
        let record = Record::read(&folder, name)?;
        Ok(Self { name: name.to_owned(), folder, record })
    }

    /// Opens the snapshot in a directory.
    ///
    /// # Errors
    /// When the directory has no snapshot, or it was made by another version.
    pub(crate) fn in_folder(folder: &Path) -> Result<Self, TemplateError> {
        let folder = std::path::absolute(folder).map_err(host("open", folder))?;
        let name = folder.display().to_string();
        let record = match Record::read(&folder, &name) {
            Err(TemplateError::Unknown(_)) => {
                return Err(host("open", &folder)(io::ErrorKind::NotFound.into()));
            }
            result => result?,
        };
        Ok(Self { name, folder, record })
    }

    /// Opens the snapshot of a guest with a command, which continues.
    ///
    /// # Errors
    /// When the directory has no such snapshot, or it was made by another version.
    pub fn of_snapshot(folder: &Path) -> Result<Self, TemplateError> {
        let this = Self::in_folder(folder)?;
        match &this.record.guest {
            Some(guest) if !guest.is_embedded => Ok(this),
            _ => Err(TemplateError::NoCommand(this.folder)),
        }
    }

    /// The record of the guest whose command continues.
    pub(crate) fn guest_record(&self) -> Option<&GuestRecord> {
        self.record.guest.as_deref()
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
        self.record.origin.machine.mem_size_mib
    }

    /// Returns the number of vCPUs of its copies.
    #[must_use]
    pub const fn vcpus(&self) -> u8 {
        self.record.origin.machine.vcpu_count
    }

    /// Returns whether its copies have a network.
    #[must_use]
    pub const fn has_network(&self) -> bool {
        self.record.origin.network.is_some()
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
    pub(crate) fn config(&self) -> Result<Config, TemplateError> {
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

/// The directory of templates.
fn folder() -> Result<PathBuf, TemplateError> {
    crate::data::folder("templates")?.ok_or(TemplateError::NoHome)
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
