//! What makes a copy of a guest an individual: random numbers, the time, its name, addresses and identifiers. A copy of a
//! snapshot gets them before any of its programs runs.

use crate::console::print;
use crate::{etc_files, network, reseed, setup};
use alloc::vec::Vec;
use guest_init::GuestConfig;
use guest_protocol::config::Reseed;
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, mkdirat, open, rename, statat};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount_bind, mount_remount};

/// A new UUID at each read.
const RANDOM_ID: &str = "/proc/sys/kernel/random/uuid";
/// A UUID that the kernel generates once, at the first read, and cannot change.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// The directory of the files below. Only root can write to it.
const FOLDER: &str = "/run/kindling";
/// What [`BOOT_ID`] shows in a copy.
const OWN_BOOT_ID: &str = "/run/kindling/boot_id";
/// Exists in copies only, and is replaced in each: programs watch it, to renew what they keep for themselves.
const COPY_ID: &str = "/run/kindling/copy_id";
const DRAFT: &str = "/run/kindling/.draft";
/// machine-id(5).
const MACHINE_ID: &str = "/etc/machine-id";
const UUID_LEN: usize = 36;

/// Applies the configuration of a copy. It does not run with the random numbers of another guest: if they cannot be replaced,
/// it ends.
pub(crate) fn apply(reseed: &Reseed, guest: &GuestConfig) {
    reseed::apply(reseed);
    setup::set_hostname(guest.hostname.as_deref());
    network::configure(&guest.networks);
    etc_files::write(guest);
    for (what, result) in
        [("boot_id", set_boot_id()), ("machine-id", set_machine_id()), ("copy_id", set_copy_id())]
    {
        if let Err(error) = result {
            print(format_args!("init: cannot renew {what}: {error}\n"));
        }
    }
}

/// Mounts a file over the kernel's, as container engines do.
fn set_boot_id() -> Result<(), Errno> {
    match mkdirat(CWD, FOLDER, Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(error),
    }
    replace(OWN_BOOT_ID, &random_id()?)?;
    mount_bind(OWN_BOOT_ID, BOOT_ID)?;
    let flags = MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV;
    mount_remount(BOOT_ID, flags | MountFlags::NOEXEC, c"")
}

/// Replaces the identifier of an installed system: that of an image is the same in all guests, as in containers.
fn set_machine_id() -> Result<(), Errno> {
    const LEN: i64 = 33;
    match statat(CWD, MACHINE_ID, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile && stat.st_size == LEN => {
        }
        _ => return Ok(()),
    }
    let id: Vec<_> = random_id()?.into_iter().filter(|&byte| byte != b'-').collect();
    write(MACHINE_ID, OFlags::TRUNC, &id)
}

fn set_copy_id() -> Result<(), Errno> {
    replace(COPY_ID, &random_id()?)
}

/// A UUID and a line feed.
fn random_id() -> Result<[u8; UUID_LEN + 1], Errno> {
    let mut id = [b'\n'; UUID_LEN + 1];
    let file = open(RANDOM_ID, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    match rustix::io::read(file, &mut id)? {
        count if count >= UUID_LEN => Ok(id),
        _ => Err(Errno::IO),
    }
}

/// Creates a file, in place of another with this name.
fn replace(path: &str, content: &[u8]) -> Result<(), Errno> {
    write(DRAFT, OFlags::CREATE | OFlags::TRUNC, content)?;
    rename(DRAFT, path)
}

fn write(path: &str, flags: OFlags, content: &[u8]) -> Result<(), Errno> {
    let flags = flags | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = open(path, flags, Mode::from_raw_mode(0o644))?;
    rustix::io::write(file, content).map(drop)
}
