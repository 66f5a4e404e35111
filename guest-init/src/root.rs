//! The root filesystem of images that have it on a disk: an overlay of a read-only EROFS and a tmpfs, which becomes
//! `/`. Writes of the guest go to its memory and are lost when it ends.
//!
//! The overlay is mounted over the initramfs, which contains nothing except this program.

use crate::console::print;
use crate::etc_files;
use crate::files;
use crate::mounts::make_directories;
use crate::panic::fatal;
use crate::syscall;
use alloc::string::String;
use guest_init::GuestConfig;
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{CWD, Mode, OFlags, mkdirat, open};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MoveMountFlags, mount, mount_move, mount_remount, move_mount};
use rustix::process::{chdir, chroot};
use rustix::thread::{Timespec, nanosleep};

/// The beginning of the path of a device that is memory (virtio pmem). Files of a filesystem on it are used in place (DAX).
const MEMORY: &[u8] = b"/dev/pmem";
/// Directory in which the overlay is assembled.
const STAGING: &str = "/overlay";
const LOWER: &str = "/overlay/lower";
const UPPER: &str = "/overlay/upper";
const WORK: &str = "/overlay/work";
const ROOT: &str = "/overlay/root";
const LAYERS: &core::ffi::CStr = c"lowerdir=/overlay/lower,upperdir=/overlay/upper,workdir=/overlay/work";

/// Mounts in the initramfs that move into the new root, with the mounts below them.
const MOVED: [&str; 5] = ["/dev", "/proc", "/sys", RUN, TMP];
const RUN: &str = "/run";
const TMP: &str = "/tmp";

/// Makes the filesystem on a device the root, below a writable overlay. A failure is fatal, because the payload is on
/// this filesystem.
pub(crate) fn enter(device: &[u8], config: &GuestConfig) {
    if let Err((what, error)) = mount_overlay(device, config).and_then(|()| switch(config)) {
        let device = String::from_utf8_lossy(device);
        fatal(format_args!(
            "cannot {what} of the image's root filesystem on {device}: {error}{}",
            advice(error)
        ));
    }
}

/// The most likely cause of an error of [`mount_overlay`].
const fn advice(error: Errno) -> &'static str {
    match error {
        // EUCLEAN (EFSCORRUPTED in the kernel), or an invalid superblock.
        Errno::UCLEAN | Errno::INVAL | Errno::BADMSG | Errno::IO => {
            "; it is not an EROFS filesystem, or is damaged: check the image with kindling boot --verify"
        }
        Errno::NODEV => "; the guest's kernel needs the fragment filesystems",
        Errno::NOENT | Errno::NXIO => {
            "; the disk does not exist, or the guest's kernel needs the fragment block or pmem"
        }
        _ => "",
    }
}

type Failure = (&'static str, Errno);

fn mount_overlay(device: &[u8], config: &GuestConfig) -> Result<(), Failure> {
    let directory = |path: &str| {
        mkdirat(CWD, path, Mode::from_raw_mode(0o755)).map_err(|error| ("make the mount points", error))
    };
    directory(STAGING)?;
    mount("tmpfs", STAGING, "tmpfs", MountFlags::empty(), c"mode=0755")
        .map_err(|error| ("mount the writable layer", error))?;
    [LOWER, UPPER, WORK, ROOT].into_iter().try_for_each(directory)?;
    let is_memory = device.starts_with(MEMORY);
    if is_memory {
        // The kernel may have been pre-booted with another file there.
        forget_contents(device).map_err(|error| ("open the device", error))?;
    }
    let options = if is_memory { c"dax=always" } else { c"" };
    mount(device, LOWER, "erofs", MountFlags::RDONLY, options)
        .map_err(|error| ("mount the read-only layer", error))?;
    etc_files::write_above(LOWER, UPPER, config);
    mount("overlay", ROOT, "overlay", MountFlags::empty(), LAYERS)
        .map_err(|error| ("mount the overlay", error))
}

/// Waits for a device, which the kernel may still be probing (`nd_async_domain` in drivers/nvdimm/bus.c), and makes the kernel
/// forget which blocks it has read (`blkdev_flushbuf` in block/ioctl.c).
fn forget_contents(device: &[u8]) -> Result<(), Errno> {
    const ATTEMPTS: u32 = 2000;
    const INTERVAL: Timespec = Timespec { tv_sec: 0, tv_nsec: 1_000_000 };
    let mut attempt = 1;
    let device = loop {
        match open(device, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()) {
            Err(Errno::NOENT | Errno::NXIO) if attempt < ATTEMPTS => attempt += 1,
            result => break result?,
        }
        // An interrupted wait is a short one.
        let _ = nanosleep(&INTERVAL);
    };
    syscall::flush_buffers(device.as_fd())
}

fn switch(config: &GuestConfig) -> Result<(), Failure> {
    let mounted = MOVED.map(|path| {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Some((path, open(path, flags, Mode::empty()).ok()?))
    });
    let failed = |error| ("switch to the overlay", error);
    chdir(ROOT).map_err(failed)?;
    mount_move(".", "/").map_err(failed)?;
    chroot(".").map_err(failed)?;
    chdir("/").map_err(failed)?;
    // Symbolic links of the image resolve correctly only now that the root is the image's.
    for (path, tree) in mounted.into_iter().flatten() {
        // Programs need the image's content in these directories, for example a directory for sockets. In a guest with
        // a read-only root, writable directories matter more.
        if [RUN, TMP].contains(&path) && !config.is_root_read_only && has_content(path) {
            continue;
        }
        match attach(&tree, path) {
            // EINVAL: not mounted. The default kernel has no sysfs.
            Ok(()) | Err(Errno::INVAL) => {}
            Err(error) => print(format_args!("init: cannot move {path} into the root filesystem: {error}\n")),
        }
    }
    Ok(())
}

fn has_content(directory: &str) -> bool {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let Ok(directory) = open(directory, flags, Mode::empty()) else { return false };
    let mut has_entry = false;
    // Any error ends the search.
    let _ = files::each_entry(&directory, &mut |_| {
        has_entry = true;
        Err(Errno::EXIST)
    });
    has_entry
}

/// Moves a mount to a path, and creates the directory if it is missing.
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

/// Remounts the root filesystem read-only after all mounts; other filesystems stay writable. For temporary files,
/// programs have /dev/shm, /run, /tmp and /var/tmp.
pub(crate) fn make_read_only() {
    const TEMPORARY: &str = "/var/tmp";
    make_directories(TEMPORARY.as_bytes());
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    let result = mount("tmpfs", TEMPORARY, "tmpfs", flags, c"mode=1777")
        .and_then(|()| mount_remount("/", MountFlags::RDONLY, c""));
    if let Err(error) = result {
        fatal(format_args!("cannot make the root filesystem read-only: {error}"));
    }
}
