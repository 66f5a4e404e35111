//! Mounts from the host: volumes (disks with ext4) and shared folders (virtio-fs).

use crate::console::{ErrnoText, print};
use crate::copy;
use crate::files;
use crate::panic::fatal;
use crate::syscall;
use alloc::string::String;
use alloc::vec::Vec;
use core::ffi::CStr;
use guest_protocol::config::Mount;
use guest_protocol::config::MountKind;
use rustix::fd::OwnedFd;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, mkdirat, open, renameat, statat, syncfs};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount, move_mount, open_tree, unmount,
};
use rustix::path::DecInt;
use rustix::process::{WaitOptions, wait};
use rustix::thread::{Timespec, nanosleep};

/// The directory of a volume that is mounted. It is not the volume's root, because that contains ext4's `lost+found`.
/// It exists as soon as it contains everything that the first image had at the mount point.
const DATA: &CStr = c"data";
/// Name of that directory while the image's content is copied to it.
const DRAFT: &CStr = c"draft";

/// The failed operation and its error.
type Failure = (&'static str, Errno);

/// Writable volumes, which are unmounted before the machine ends.
pub(crate) struct WritableVolumes(Vec<OwnedFd>);

/// Mounts all filesystems in order. A failure is fatal: the program would write to another filesystem than the user
/// intends.
pub(crate) fn mount_all(mounts: &[Mount]) -> WritableVolumes {
    let mut written = Vec::new();
    for mount in mounts {
        let result = match mount.kind {
            MountKind::Volume => mount_volume(mount),
            MountKind::Folder => mount_folder(mount),
        };
        match result {
            Ok(tree) => written.extend(tree),
            Err((what, error)) => fatal(format_args!(
                "cannot {what} {}: {}{}",
                String::from_utf8_lossy(&mount.target),
                ErrnoText(error),
                advice(mount.kind, error)
            )),
        }
    }
    WritableVolumes(written)
}

const fn advice(kind: MountKind, error: Errno) -> &'static str {
    match (kind, error) {
        (MountKind::Volume, Errno::UCLEAN | Errno::INVAL | Errno::BADMSG | Errno::IO) => {
            "; its filesystem is damaged (repair it with e2fsck), or its disk on the host is full"
        }
        (_, Errno::NODEV) => "; the guest's kernel does not support this filesystem",
        _ => "",
    }
}

/// Mounts a volume's data. Returns the mount if it is writable.
fn mount_volume(volume: &Mount) -> Result<Option<OwnedFd>, Failure> {
    let target = volume.target.as_slice();
    make_directories(target);
    let directory = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let image = open(target, directory, Mode::empty())
        .map_err(|error| ("open the mount point of the volume at", error))?;
    let access = if volume.is_read_only { MountFlags::RDONLY } else { MountFlags::empty() };
    // Discards return the space of deleted files to the host.
    mount(volume.source.as_slice(), target, "ext4", access, c"discard")
        .map_err(|error| ("mount the volume at", error))?;
    let failed = |error| ("mount the data directory of the volume at", error);
    let whole = open(target, directory, Mode::empty()).map_err(failed)?;
    if !volume.is_read_only
        && statat(&whole, DATA, AtFlags::empty()).is_err_and(|error| error == Errno::NOENT)
    {
        fill(&whole, &image).map_err(|error| ("copy the image's content to the volume at", error))?;
    }
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let data = open_tree(&whole, DATA, flags).map_err(failed)?;
    unmount(target, UnmountFlags::DETACH).map_err(failed)?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_SYMLINKS;
    move_mount(&data, "", CWD, target, flags).map_err(failed)?;
    Ok((!volume.is_read_only).then_some(data))
}

/// Copies the image's content at the mount point to a new volume. If the guest ends during the copy, the next guest
/// starts it again.
fn fill(whole: &OwnedFd, image: &OwnedFd) -> Result<(), Errno> {
    copy::remove(whole, DRAFT)?;
    mkdirat(whole, DRAFT, Mode::from_raw_mode(0o755))?;
    copy::directory(image, &files::open_directory(whole, DRAFT)?)?;
    // The new name must not reach the disk before the content.
    syncfs(whole)?;
    renameat(whole, DRAFT, whole, DATA)
}

/// Mounts a shared folder. Device nodes and setuid bits in it have no effect in the guest. The host's filesystem needs
/// no unmount.
fn mount_folder(folder: &Mount) -> Result<Option<OwnedFd>, Failure> {
    make_directories(&folder.target);
    let access = if folder.is_read_only { MountFlags::RDONLY } else { MountFlags::empty() };
    let flags = access | MountFlags::NOSUID | MountFlags::NODEV;
    mount(folder.source.as_slice(), folder.target.as_slice(), "virtiofs", flags, c"")
        .map_err(|error| ("mount the shared folder at", error))?;
    Ok(None)
}

/// Creates a directory and its missing parents. Errors are ignored: the use of the directory fails then.
pub(crate) fn make_directories(path: &[u8]) {
    let ends = path.iter().enumerate().skip(1).filter(|(_, byte)| **byte == b'/').map(|(at, _)| at);
    for end in ends.chain([path.len()]) {
        let _ = mkdirat(CWD, &path[..end], Mode::from_raw_mode(0o755));
    }
}

impl WritableVolumes {
    /// Kills all processes and unmounts the volumes, so that the next guest finds them clean, without a journal to
    /// replay. A volume that the program has mounted a second time stays mounted, and its journal is replayed.
    pub(crate) fn unmount(self) {
        if self.0.is_empty() {
            return;
        }
        kill_processes();
        for tree in self.0.into_iter().rev() {
            // By its descriptor, because the program may have mounted something else over it. The mount is detached,
            // and ends when the descriptor is closed.
            let path = [b"/proc/self/fd/", DecInt::from_fd(&tree).as_bytes()].concat();
            if let Err(error) = unmount(path, UnmountFlags::DETACH) {
                print(format_args!("init: cannot unmount a volume: {error}\n"));
            }
        }
    }
}

/// Kills all other processes and reaps them. Gives up after two seconds, as a process may be blocked in a device
/// driver.
fn kill_processes() {
    /// Of one millisecond each.
    const MAX_WAITS: u32 = 2000;
    syscall::kill_all();
    for _ in 0..MAX_WAITS {
        loop {
            match wait(WaitOptions::NOHANG) {
                Ok(Some(_)) => {}
                Ok(None) => break,
                Err(_) => return,
            }
        }
        let _ = nanosleep(&Timespec { tv_sec: 0, tv_nsec: 1_000_000 });
    }
}
