//! The host folder that a guest shares. It is opened once, when its path is checked. The guest has access to this
//! descriptor, whatever the path refers to later.

use crate::devices::virtio::BackendError;
use rustix::fs::{Access, AtFlags, CWD, Mode, OFlags, Stat, accessat, fstat, major, minor, openat};
use rustix::io::Errno;
use std::os::fd::OwnedFd;
use std::path::Path;

/// Opens a folder and checks that the user can list and traverse it.
///
/// # Errors
/// When there is no folder at the path, permission is denied, or its files are interfaces of the host's kernel.
pub(super) fn open(path: &Path) -> Result<OwnedFd, BackendError> {
    let wrong = |why: String| unusable(path, why);
    let refused = |error: Errno| {
        wrong(match error {
            Errno::NOENT => "no such folder".into(),
            Errno::NOTDIR if path.is_file() => "not a folder; share the folder that contains it".into(),
            Errno::NOTDIR => "a part of the path is not a folder".into(),
            Errno::ACCESS => "permission denied".into(),
            error => error.to_string(),
        })
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let descriptor = openat(CWD, path, flags, Mode::empty()).map_err(refused)?;
    accessat(&descriptor, ".", Access::EXEC_OK, AtFlags::empty()).map_err(refused)?;
    let stat = fstat(&descriptor).map_err(refused)?;
    if let Some(kind) = kernel_interface(&stat) {
        let what = format!("the files of the host's {kind} are interfaces of its kernel");
        return Err(wrong(what));
    }
    Ok(descriptor)
}

/// The error of a folder that cannot be shared.
pub(super) fn unusable(path: &Path, why: String) -> BackendError {
    BackendError::unusable(format!("cannot share {}", path.display()), why)
}

/// Filesystems that are interfaces of the kernel: a write to one of their files changes the host, with the rights of
/// the process that serves the folder.
const KERNEL_INTERFACES: &[&str] = &[
    "binfmt_misc",
    "bpf",
    "cgroup",
    "cgroup2",
    "configfs",
    "debugfs",
    "devpts",
    "devtmpfs",
    "efivarfs",
    "fusectl",
    "mqueue",
    "nsfs",
    "proc",
    "pstore",
    "resctrl",
    "securityfs",
    "selinuxfs",
    "smackfs",
    "sysfs",
    "tracefs",
];

/// The type of the filesystem of a file, if it is such an interface.
fn kernel_interface(stat: &Stat) -> Option<&'static str> {
    let device = format!("{}:{}", major(stat.st_dev), minor(stat.st_dev));
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    // proc(5): the third field is the device, and the type follows " - ".
    let kinds = mounts.lines().filter_map(|line| {
        let (mount, filesystem) = line.split_once(" - ")?;
        (mount.split(' ').nth(2)? == device).then(|| filesystem.split(' ').next())?
    });
    kinds.filter_map(|kind| KERNEL_INTERFACES.iter().copied().find(|known| *known == kind)).next()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(path: &str) -> String {
        open(Path::new(path)).unwrap_err().to_string()
    }

    #[test]
    fn kernel_filesystems_are_refused() {
        for path in ["/proc", "/proc/self", "/proc/sys/kernel", "/sys", "/sys/kernel"] {
            if Path::new(path).exists() {
                let message = message(path);
                assert!(message.ends_with("are interfaces of its kernel"), "{message}");
            }
        }
        open(Path::new("/")).unwrap();
    }

    #[test]
    fn the_opened_folder_does_not_change_with_the_path() {
        let folder = tempfile::tempdir().unwrap();
        let (first, second) = (folder.path().join("first"), folder.path().join("second"));
        std::fs::create_dir(&first).unwrap();
        let folder = open(&first).unwrap();
        let before = fstat(&folder).unwrap().st_ino;
        std::fs::rename(&first, &second).unwrap();
        std::os::unix::fs::symlink("/", &first).unwrap();
        assert_eq!(fstat(&folder).unwrap().st_ino, before);
    }
}
