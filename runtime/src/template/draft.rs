//! A template that is being created: unnamed files, and then a directory with a name that no template has.

use super::record::Record;
use super::{MEMORY, RECORD, ROOT, Template, TemplateError, host, path_of, remove_abandoned};
use crate::guest::GuestRecord;
use crate::guest::origin::Origin;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, RenameFlags, linkat, open, renameat_with};
use rustix::io::Errno;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// A template that is being created.
#[derive(Debug)]
pub(crate) struct Draft {
    name: String,
    folder: PathBuf,
    /// An unnamed file, which the kernel deletes if this process ends.
    memory: File,
}

impl Draft {
    /// Prepares a template of this name.
    pub(crate) fn new(name: &str) -> Result<Self, TemplateError> {
        let folder = path_of(name)?;
        if folder.exists() {
            return Err(TemplateError::Taken(name.to_owned()));
        }
        trusted_path::make_folder(parent(&folder))?;
        remove_abandoned(parent(&folder));
        Self::in_folder(name.to_owned(), folder)
    }

    /// Prepares a snapshot in a new directory, whose parent exists.
    pub(crate) fn at(folder: &Path) -> Result<Self, TemplateError> {
        let folder = std::path::absolute(folder).map_err(host("create", folder))?;
        let name = folder.file_name().ok_or_else(|| TemplateError::Exists(folder.clone()))?;
        let name = name.to_string_lossy().into_owned();
        if folder.symlink_metadata().is_ok() {
            return Err(TemplateError::Exists(folder));
        }
        Self::in_folder(name, folder)
    }

    fn in_folder(name: String, folder: PathBuf) -> Result<Self, TemplateError> {
        let parent = parent(&folder);
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let memory = open(parent, flags, Mode::from_raw_mode(0o600));
        let memory = memory.map_err(|error| host("create a file in", parent)(error.into()))?.into();
        Ok(Self { name, folder, memory })
    }

    /// The file for the snapshot, duplicated.
    pub(crate) fn memory(&self) -> Result<File, TemplateError> {
        self.memory.try_clone().map_err(host("open", parent(&self.folder)))
    }

    /// Creates the template or snapshot of a guest, whose memory has been written. `guest` is its record, if its command continues.
    pub(crate) fn publish(
        self,
        origin: &Origin,
        image: &str,
        guest: Option<Box<GuestRecord>>,
    ) -> Result<Template, TemplateError> {
        let Self { name, folder, memory } = self;
        let draft = Unfinished(folder.with_file_name(format!(".{:016x}", crate::token())));
        let record = draft.fill(&memory, origin, image, guest).map_err(host("create", &folder))?;
        match renameat_with(CWD, &draft.0, CWD, &folder, RenameFlags::NOREPLACE) {
            Ok(()) => Ok(Template { name, folder, record }),
            Err(Errno::EXIST | Errno::NOTEMPTY) => Err(TemplateError::Exists(folder)),
            Err(error) => Err(host("create", &folder)(error.into())),
        }
    }
}

fn parent(folder: &Path) -> &Path {
    folder.parent().unwrap_or(folder)
}

/// A directory that is about to get its name. Dropping it removes it.
struct Unfinished(PathBuf);

impl Drop for Unfinished {
    fn drop(&mut self) {
        // It does not exist any more if it has its name.
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl Unfinished {
    /// Creates the directory with its files.
    fn fill(
        &self,
        memory: &File,
        origin: &Origin,
        image: &str,
        guest: Option<Box<GuestRecord>>,
    ) -> io::Result<Record> {
        DirBuilder::new().mode(0o700).create(&self.0)?;
        memory.sync_all()?;
        let open_file = format!("/proc/self/fd/{}", memory.as_raw_fd());
        linkat(CWD, open_file, CWD, self.0.join(MEMORY), AtFlags::SYMLINK_FOLLOW)?;
        let root = self.0.join(ROOT);
        keep_root(origin, &root)?;
        let record = Record::new(origin.clone(), image.to_owned(), guest, &root)?;
        record.write(&self.0.join(RECORD))?;
        Ok(record)
    }
}

/// Keeps the root filesystem. A file of the cache is never rewritten and can have another name; one that the user has given
/// could be rewritten in place, and is copied.
fn keep_root(origin: &Origin, target: &Path) -> io::Result<()> {
    let is_of_cache = !origin.digest.is_empty();
    if is_of_cache && fs::hard_link(&origin.rootfs, target).is_ok() {
        return Ok(());
    }
    fs::copy(&origin.rootfs, target).map(drop)
}
