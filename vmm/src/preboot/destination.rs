//! Creates the file of a pre-booted kernel atomically: it appears complete, or not at all.

use rustix::fs::{
    AtFlags, CWD, Dir, Mode, OFlags, linkat, mkdir, open, openat, renameat, rmdir, statat, unlinkat,
};
use rustix::io::Errno;
use rustix::time::{ClockId, clock_gettime};
use std::ffi::OsString;
use std::fs::{File, Permissions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// The directory and name of a file to create. The directory is never a symbolic link, which another user who can write
/// to its parent could have placed there.
#[derive(Debug)]
pub(crate) struct Destination {
    folder: OwnedFd,
    name: OsString,
    /// The path of the directory, if it was created for this file.
    created: Option<PathBuf>,
}

/// Removes a directory that was created for a file, unless the file is there.
impl Drop for Destination {
    fn drop(&mut self) {
        // A directory that is not empty is not removed.
        let _ = self.created.take().map(rmdir);
    }
}

impl Destination {
    /// Opens the directory of `path`, which is created if necessary.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
        let created = match mkdir(folder, Mode::from_raw_mode(0o755)) {
            Ok(()) => Some(folder.to_owned()),
            Err(Errno::EXIST) => None,
            Err(error) => return Err(error.into()),
        };
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(Self { folder: open(folder, flags, Mode::empty())?, name, created })
    }

    /// Creates an unnamed file (`O_TMPFILE`), which the kernel deletes if this program is killed.
    pub(crate) fn create_unnamed_file(&self) -> io::Result<File> {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let file = File::from(openat(&self.folder, ".", flags, Mode::from_raw_mode(0o644))?);
        // The mode does not depend on the umask: the file contains nothing that the guest of another user could not
        // read as well.
        file.set_permissions(Permissions::from_mode(0o644))?;
        Ok(file)
    }

    /// Removes drafts that processes which were killed between link and rename have left. A draft of another process that
    /// is about to be renamed is too new.
    fn remove_abandoned_drafts(&self) {
        const AGE_SECONDS: i64 = 60;
        let Ok(entries) = Dir::read_from(&self.folder) else { return };
        for entry in entries.flatten().filter(|entry| is_draft_name(entry.file_name().to_bytes())) {
            let now = clock_gettime(ClockId::Realtime).tv_sec;
            let is_old = statat(&self.folder, entry.file_name(), AtFlags::SYMLINK_NOFOLLOW)
                .is_ok_and(|stat| now.saturating_sub(stat.st_mtime) > AGE_SECONDS);
            if is_old {
                let _ = unlinkat(&self.folder, entry.file_name(), AtFlags::empty());
            }
        }
    }

    /// Syncs the file, and gives it its name, in place of an existing file.
    pub(crate) fn publish(&self, file: &File) -> io::Result<()> {
        /// Names of drafts to try: a process that was killed between link and rename leaves its draft.
        const ATTEMPTS: u32 = 100;
        self.remove_abandoned_drafts();
        file.sync_all()?;
        // The age of a draft counts from here.
        file.set_modified(SystemTime::now())?;
        let open_file = format!("/proc/self/fd/{}", file.as_raw_fd());
        let mut draft = self.name.clone();
        // linkat(2) cannot replace an existing file, but renameat(2) can.
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

/// Whether a file has the name of a draft: that of its file, `.draft-`, a number, `-`, and a number.
fn is_draft_name(name: &[u8]) -> bool {
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let numbers =
        std::str::from_utf8(name).ok().and_then(|name| name.rsplit_once(".draft-")?.1.split_once('-'));
    numbers.is_some_and(|(process, attempt)| is_number(process) && is_number(attempt))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_file_appears_complete_and_old_drafts_go() {
        let folder = tempfile::tempdir().unwrap();
        for (name, age) in
            [("1.draft-7-0", 120), ("1.draft-8-0", 0), ("2.draft-7-0", 120), ("2.draft-x", 120)]
        {
            let file = File::create(folder.path().join(name)).unwrap();
            file.set_modified(SystemTime::now() - Duration::from_secs(age)).unwrap();
        }
        let destination = Destination::open(&folder.path().join("1")).unwrap();
        destination.publish(&destination.create_unnamed_file().unwrap()).unwrap();
        let entries = folder.path().read_dir().unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        assert_eq!(names, ["1", "1.draft-8-0", "2.draft-x"]);
    }
}
