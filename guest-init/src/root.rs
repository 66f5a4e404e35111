//! The root filesystem of images that have it on a disk: read-only EROFS below, a tmpfs above, and an overlay of
//! both, which becomes `/`. What the guest writes is in its memory and gone with it.
//!
//! The initramfs stays where it is, out of sight: it has no more in it than this program.

use crate::mounts::make_directories;
use crate::names;
use crate::voice::{give_up, say};
use alloc::string::String;
use core::mem::MaybeUninit;
use guest_init::payload_spec::PayloadSpec;
use rustix::fd::OwnedFd;
use rustix::fs::{CWD, Mode, OFlags, RawDir, mkdirat, open};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MoveMountFlags, mount, mount_move, mount_remount, move_mount};
use rustix::process::{chdir, chroot};

/// Where the overlay is put together.
const PLACE: &str = "/overlay";
const LOWER: &str = "/overlay/lower";
const UPPER: &str = "/overlay/upper";
const WORK: &str = "/overlay/work";
const ROOT: &str = "/overlay/root";
const LAYERS: &core::ffi::CStr = c"lowerdir=/overlay/lower,upperdir=/overlay/upper,workdir=/overlay/work";

/// What is mounted in the initramfs and moves into the new root; what lies below moves with it.
const MOVED: [&str; 5] = ["/dev", "/proc", "/sys", RUN, TMP];
const RUN: &str = "/run";
const TMP: &str = "/tmp";

/// Makes the filesystem on a device the root, below a writable overlay. Init ends the machine where that
/// fails: nothing that the payload could be is anywhere else.
pub(crate) fn enter(device: &[u8], spec: &PayloadSpec) {
    if let Err((what, error)) = mount_overlay(device, spec).and_then(|()| switch(spec)) {
        let device = String::from_utf8_lossy(device);
        give_up(format_args!(
            "cannot {what} of the image's root filesystem on {device}: {error}{}",
            advice(error)
        ));
    }
}

/// What an error of [`mount_overlay`] most likely comes from.
const fn advice(error: Errno) -> &'static str {
    match error {
        // EUCLEAN, EFSCORRUPTED in the kernel's words, or a superblock that is none.
        Errno::UCLEAN | Errno::INVAL | Errno::BADMSG | Errno::IO => {
            "; it is no EROFS filesystem or is damaged: kindling boot --verify compares it with its description"
        }
        Errno::NODEV => "; the guest's kernel needs the fragment filesystems",
        Errno::NOENT | Errno::NXIO => {
            "; there is no such disk, or the guest's kernel needs the fragment block"
        }
        _ => "",
    }
}

type Failure = (&'static str, Errno);

fn mount_overlay(device: &[u8], spec: &PayloadSpec) -> Result<(), Failure> {
    let directory = |path: &str| {
        mkdirat(CWD, path, Mode::from_raw_mode(0o755)).map_err(|error| ("make the mount points", error))
    };
    directory(PLACE)?;
    mount("tmpfs", PLACE, "tmpfs", MountFlags::empty(), c"mode=0755")
        .map_err(|error| ("mount the writable layer", error))?;
    [LOWER, UPPER, WORK, ROOT].into_iter().try_for_each(directory)?;
    mount(device, LOWER, "erofs", MountFlags::RDONLY, c"")
        .map_err(|error| ("mount the read-only layer", error))?;
    names::write_above(LOWER, UPPER, spec);
    mount("overlay", ROOT, "overlay", MountFlags::empty(), LAYERS)
        .map_err(|error| ("mount the overlay", error))
}

fn switch(spec: &PayloadSpec) -> Result<(), Failure> {
    let mounted = MOVED.map(|path| {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Some((path, open(path, flags, Mode::empty()).ok()?))
    });
    let failed = |error| ("switch to the overlay", error);
    chdir(ROOT).map_err(failed)?;
    mount_move(".", "/").map_err(failed)?;
    chroot(".").map_err(failed)?;
    chdir("/").map_err(failed)?;
    // Only here do links of the image lead to where they lead for its programs.
    for (path, tree) in mounted.into_iter().flatten() {
        // What an image has there, a folder for sockets for instance, its programs need. Where the root can only be
        // read, they need more that they can write there.
        if [RUN, TMP].contains(&path) && !spec.is_root_read_only && has_content(path) {
            continue;
        }
        match attach(&tree, path) {
            // Not everything is mounted: the default kernel has no sysfs.
            Ok(()) | Err(Errno::INVAL) => {}
            Err(error) => say(format_args!("init: cannot move {path} into the root filesystem: {error}\n")),
        }
    }
    Ok(())
}

fn has_content(directory: &str) -> bool {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let Ok(directory) = open(directory, flags, Mode::empty()) else { return false };
    let mut buffer = [const { MaybeUninit::uninit() }; 1024];
    let mut entries = RawDir::new(&directory, &mut buffer);
    loop {
        match entries.next() {
            Some(Ok(entry)) if [c".", c".."].contains(&entry.file_name()) => {}
            Some(Ok(_)) => return true,
            Some(Err(_)) | None => return false,
        }
    }
}

/// Moves a mount to a path, where a directory is made if there is none.
fn attach(tree: &OwnedFd, path: &str) -> Result<(), Errno> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_SYMLINKS;
    let attach = || move_mount(tree, "", CWD, path, flags);
    match attach() {
        Err(Errno::NOENT) => {
            mkdirat(CWD, path, Mode::from_raw_mode(0o755))?;
            attach()
        }
        result => result,
    }
}

/// Takes the root from its programs' writing when all is in its place; what else is mounted stays as it is. What
/// programs write for a while they write to /dev/shm, /run, /tmp and /var/tmp.
pub(crate) fn make_read_only() {
    const TEMPORARY: &str = "/var/tmp";
    make_directories(TEMPORARY.as_bytes());
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    let result = mount("tmpfs", TEMPORARY, "tmpfs", flags, c"mode=1777")
        .and_then(|()| mount_remount("/", MountFlags::RDONLY, c""));
    if let Err(error) = result {
        give_up(format_args!("cannot make the root filesystem read-only: {error}"));
    }
}
