//! A folder of the host that a guest shares: opened once, when its path is checked. Whatever the path names later, the
//! descriptor is what the guest has.

use crate::config::ConfigError;
use rustix::fs::{Access, AtFlags, CWD, Mode, OFlags, Stat, accessat, fstat, major, minor, openat};
use rustix::io::Errno;
use std::os::fd::OwnedFd;
use std::path::Path;

/// Opens a folder that its user can read.
///
/// # Errors
/// When there is none at the path, it is not for this user, or its files are interfaces of the host's kernel.
pub(super) fn open(path: &Path) -> Result<OwnedFd, ConfigError> {
    let wrong = |what: String| ConfigError::SharedFolder { path: path.to_owned(), what };
    let refused = |error: Errno| {
        wrong(match error {
            Errno::NOENT => "there is no such folder".into(),
            Errno::NOTDIR if path.is_file() => "it is no folder; share the one that it is in".into(),
            Errno::NOTDIR => "it lies in what is no folder".into(),
            Errno::ACCESS => "it is not for this user to read".into(),
            error => error.to_string(),
        })
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let descriptor = openat(CWD, path, flags, Mode::empty()).map_err(refused)?;
    accessat(&descriptor, ".", Access::EXEC_OK, AtFlags::empty()).map_err(refused)?;
    let stat = fstat(&descriptor).map_err(refused)?;
    if let Some(kind) = kernel_interface(&stat) {
        let what = format!("it is the host's {kind}, whose files are interfaces of its kernel");
        return Err(wrong(what));
    }
    Ok(descriptor)
}

/// Filesystems that are interfaces of the kernel: who writes to a file there changes the host, with the rights of the
/// process that serves the folder.
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

/// The kind of filesystem that a file is on, where it is such an interface.
fn kernel_interface(stat: &Stat) -> Option<&'static str> {
    let device = format!("{}:{}", major(stat.st_dev), minor(stat.st_dev));
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    // proc(5): the third field is the device, and behind " - " stands the kind.
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
    fn interfaces_of_the_kernel_are_no_folders_to_share() {
        for path in ["/proc", "/proc/self", "/proc/sys/kernel", "/sys", "/sys/kernel"] {
            if Path::new(path).exists() {
                let message = message(path);
                assert!(message.ends_with("whose files are interfaces of its kernel"), "{message}");
            }
        }
        open(Path::new("/")).unwrap();
    }

    #[test]
    fn a_folder_stays_what_was_opened() {
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
