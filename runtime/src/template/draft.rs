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
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

/// A template that is being created.
#[derive(Debug)]
pub(crate) struct Draft {
    name: String,
    folder: PathBuf,
    /// An unnamed file, which the kernel deletes if this process ends.
    memory: File,
    /// A copy of the root filesystem, without a name, too, if it has to be copied.
    root: Option<File>,
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
        let memory = unnamed_file(parent).map_err(host("create a file in", parent))?;
        Ok(Self { name, folder, memory, root: None })
    }

    /// The file for the snapshot, duplicated.
    pub(crate) fn memory(&self) -> Result<File, TemplateError> {
        self.memory.try_clone().map_err(host("open", parent(&self.folder)))
    }

    /// Copies the root filesystem of the guest, if that is necessary; before the guest is saved, because it takes long.
    pub(crate) fn keep_root(&mut self, origin: &Origin) -> Result<(), TemplateError> {
        let copy = copy_of_root(origin, parent(&self.folder));
        self.root = copy.map_err(host("keep the root filesystem", &origin.rootfs))?;
        Ok(())
    }

    /// Creates the template or snapshot of a guest, whose memory has been written. `guest` is its record, if its command continues.
    pub(crate) fn publish(
        self,
        origin: &Origin,
        image: &str,
        guest: Option<Box<GuestRecord>>,
    ) -> Result<Template, TemplateError> {
        let Self { name, folder, memory, root } = self;
        let draft = Unfinished(folder.with_file_name(format!(".{:016x}", crate::token())));
        let record =
            draft.fill(&memory, root.as_ref(), origin, image, guest).map_err(host("create", &folder))?;
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
        copy_of_root: Option<&File>,
        origin: &Origin,
        image: &str,
        guest: Option<Box<GuestRecord>>,
    ) -> io::Result<Record> {
        // Before the directory exists, because it takes long: a process that is killed leaves no file.
        memory.sync_all()?;
        DirBuilder::new().mode(0o700).create(&self.0)?;
        name_file(memory, &self.0.join(MEMORY))?;
        let root = self.0.join(ROOT);
        match copy_of_root {
            Some(copy) => name_file(copy, &root)?,
            // Some filesystems have no links, and each has a maximum of them.
            None => {
                fs::hard_link(&origin.rootfs, &root).or_else(|_| fs::copy(&origin.rootfs, &root).map(drop))?
            }
        }
        let record = Record::new(origin.clone(), image.to_owned(), guest, &root)?;
        record.write(&self.0.join(RECORD))?;
        Ok(record)
    }
}

/// Copies the root filesystem to a file without a name, unless its file can have another name: one of the cache on the same
/// filesystem, which is never rewritten. A file that the user has given could be rewritten in place.
fn copy_of_root(origin: &Origin, folder: &Path) -> io::Result<Option<File>> {
    let source = File::open(&origin.rootfs)?;
    let is_of_cache = !origin.digest.is_empty();
    if is_of_cache && source.metadata()?.dev() == folder.metadata()?.dev() {
        return Ok(None);
    }
    let mut copy = unnamed_file(folder)?;
    io::copy(&mut &source, &mut copy)?;
    Ok(Some(copy))
}

fn unnamed_file(folder: &Path) -> io::Result<File> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    Ok(open(folder, flags, Mode::from_raw_mode(0o600))?.into())
}

fn name_file(file: &File, path: &Path) -> io::Result<()> {
    let open_file = format!("/proc/self/fd/{}", file.as_raw_fd());
    Ok(linkat(CWD, open_file, CWD, path, AtFlags::SYMLINK_FOLLOW)?)
}
