//! Where the file of a pre-booted kernel appears, whole or not at all.

use rustix::fs::{AtFlags, CWD, Mode, OFlags, linkat, mkdir, open, openat, renameat, unlinkat};
use rustix::io::Errno;
use std::ffi::OsString;
use std::fs::{File, Permissions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// Where a file is to appear: a name in a folder that is no link, whoever the folder above belongs to.
#[derive(Debug)]
pub(crate) struct Place {
    folder: OwnedFd,
    name: OsString,
}

impl Place {
    pub(crate) fn of(path: &Path) -> io::Result<Self> {
        let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
        match mkdir(folder, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(Self { folder: open(folder, flags, Mode::empty())?, name })
    }

    /// A file of which nothing is left where this program is stopped.
    pub(crate) fn file_without_a_name(&self) -> io::Result<File> {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let file = File::from(openat(&self.folder, ".", flags, Mode::from_raw_mode(0o644))?);
        // Whatever the caller's mask: there is nothing in it that another user's guest could not tell him.
        file.set_permissions(Permissions::from_mode(0o644))?;
        Ok(file)
    }

    /// Gives the file its name, in place of what has it, when all of it is on the disk.
    pub(crate) fn publish(&self, file: &File) -> io::Result<()> {
        /// Drafts that programs which were killed in this moment may have left.
        const ATTEMPTS: u32 = 100;
        file.sync_all()?;
        let open_file = format!("/proc/self/fd/{}", file.as_raw_fd());
        let mut draft = self.name.clone();
        // A link cannot replace what is there, and a rename can.
        for attempt in 0..ATTEMPTS {
            draft.clone_from(&self.name);
            draft.push(format!(".draft-{}-{attempt}", std::process::id()));
            match linkat(CWD, &open_file, &self.folder, &draft, AtFlags::SYMLINK_FOLLOW) {
                Err(Errno::EXIST) => {}
                result => {
                    result?;
                    break;
                }
            }
        }
        let renamed = renameat(&self.folder, &draft, &self.folder, &self.name);
        if renamed.is_err() {
            let _ = unlinkat(&self.folder, &draft, AtFlags::empty());
        }
        Ok(renamed?)
    }
}
