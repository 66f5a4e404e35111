//! Filesystems of the host's that the guest has in its root: volumes, which are disks of its own, and folders.

use crate::copy;
use crate::syscall;
use crate::voice::{Words, give_up, say};
use alloc::string::String;
use alloc::vec::Vec;
use core::ffi::CStr;
use guest_init::payload_spec::Mount;
use guest_protocol::frame::MountKind;
use rustix::fd::OwnedFd;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, mkdirat, open, renameat, statat, syncfs};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount, move_mount, open_tree, unmount,
};
use rustix::path::DecInt;
use rustix::process::{WaitOptions, wait};
use rustix::thread::{Timespec, nanosleep};

/// The directory of a volume that programs see: not its root, where ext4 has a `lost+found`. It is there when it has
/// all that the first image had.
const DATA: &CStr = c"data";
/// What it is called until then.
const DRAFT: &CStr = c"draft";

/// What cannot be done, and why.
type Failure = (&'static str, Errno);

/// Mounts that may be written and whose disks are to be left in order.
pub(crate) struct Written(Vec<OwnedFd>);

/// Mounts all in their order. Init ends the machine where one fails: its program would write to another place than its
/// user thinks.
pub(crate) fn mount_all(mounts: &[Mount]) -> Written {
    let mut written = Vec::new();
    for mount in mounts {
        let result = match mount.kind {
            MountKind::Volume => mount_volume(mount),
            MountKind::Folder => mount_folder(mount),
        };
        match result {
            Ok(tree) => written.extend(tree),
            Err((what, error)) => give_up(format_args!(
                "cannot {what} {}: {}{}",
                String::from_utf8_lossy(&mount.target),
                Words(error),
                advice(mount.kind, error)
            )),
        }
    }
    Written(written)
}

const fn advice(kind: MountKind, error: Errno) -> &'static str {
    match (kind, error) {
        (MountKind::Volume, Errno::UCLEAN | Errno::INVAL | Errno::BADMSG | Errno::IO) => {
            "; its filesystem is damaged, which e2fsck can mend, or its disk on the host is full"
        }
        (_, Errno::NODEV) => "; the guest's kernel has no such filesystem",
        _ => "",
    }
}

/// Mounts a volume's data. Returns the mount if it can be written.
fn mount_volume(volume: &Mount) -> Result<Option<OwnedFd>, Failure> {
    let target = volume.target.as_slice();
    make_directories(target);
    let directory = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let image =
        open(target, directory, Mode::empty()).map_err(|error| ("find the place of a volume,", error))?;
    let access = if volume.is_read_only { MountFlags::RDONLY } else { MountFlags::empty() };
    // What is deleted gives its room back to the host.
    mount(volume.source.as_slice(), target, "ext4", access, c"discard")
        .map_err(|error| ("mount the volume of", error))?;
    let failed = |error| ("mount what is in the volume of", error);
    let whole = open(target, directory, Mode::empty()).map_err(failed)?;
    if !volume.is_read_only
        && statat(&whole, DATA, AtFlags::empty()).is_err_and(|error| error == Errno::NOENT)
    {
        fill(&whole, &image).map_err(|error| ("copy what the image has to the volume of", error))?;
    }
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let data = open_tree(&whole, DATA, flags).map_err(failed)?;
    unmount(target, UnmountFlags::DETACH).map_err(failed)?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_SYMLINKS;
    move_mount(&data, "", CWD, target, flags).map_err(failed)?;
    Ok((!volume.is_read_only).then_some(data))
}

/// Gives a new volume what the image has in its place. A guest that ends meanwhile leaves it as new as it was.
fn fill(whole: &OwnedFd, image: &OwnedFd) -> Result<(), Errno> {
    copy::remove(whole, DRAFT)?;
    mkdirat(whole, DRAFT, Mode::from_raw_mode(0o755))?;
    copy::directory(image, &copy::open_directory(whole, DRAFT)?)?;
    // The name may not be on the disk before what it stands for.
    syncfs(whole)?;
    renameat(whole, DRAFT, whole, DATA)
}

/// Mounts a folder of the host's, which the host keeps in order itself. What is a device or has another's rights there
/// is not so here.
fn mount_folder(folder: &Mount) -> Result<Option<OwnedFd>, Failure> {
    make_directories(&folder.target);
    let access = if folder.is_read_only { MountFlags::RDONLY } else { MountFlags::empty() };
    let flags = access | MountFlags::NOSUID | MountFlags::NODEV;
    mount(folder.source.as_slice(), folder.target.as_slice(), "virtiofs", flags, c"")
        .map_err(|error| ("mount the host's folder on", error))?;
    Ok(None)
}

/// Makes a directory and those above it, where they are missing. What cannot be made is found out by who uses it.
pub(crate) fn make_directories(path: &[u8]) {
    let ends = path.iter().enumerate().skip(1).filter(|(_, byte)| **byte == b'/').map(|(at, _)| at);
    for end in ends.chain([path.len()]) {
        let _ = mkdirat(CWD, &path[..end], Mode::from_raw_mode(0o755));
    }
}

impl Written {
    /// Ends all processes and unmounts the filesystems, so that the next guest finds them whole and without a journal
    /// to go through. Where the program has mounted one elsewhere too, the journal is there all the same.
    pub(crate) fn leave(self) {
        if self.0.is_empty() {
            return;
        }
        end_processes();
        for tree in self.0.into_iter().rev() {
            // By its descriptor: the program may have put something else over it. It goes when that is closed.
            let path = [b"/proc/self/fd/", DecInt::from_fd(&tree).as_bytes()].concat();
            if let Err(error) = unmount(path, UnmountFlags::DETACH) {
                say(format_args!("init: cannot unmount a volume: {error}\n"));
            }
        }
    }
}

/// Ends all processes but this one. One that waits for a device may take its time, and is not waited for then.
fn end_processes() {
    /// Of a millisecond each.
    const TURNS: u32 = 2000;
    syscall::kill_all();
    for _ in 0..TURNS {
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
