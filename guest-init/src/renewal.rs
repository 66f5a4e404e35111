//! What makes a copy of a guest an individual: random numbers, the time, its name, addresses and identifiers. A copy of a
//! snapshot gets them before any of its programs runs.

use crate::console::print;
use crate::{etc_files, files, network, reseed, setup};
use alloc::vec::Vec;
use guest_init::GuestConfig;
use guest_protocol::config::Reseed;
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, mkdirat, open, statat};
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
/// Changes in each copy: programs watch it, to renew what they keep for themselves.
const COPY_ID: &str = "/run/kindling/copy_id";
/// machine-id(5).
const MACHINE_ID: &str = "/etc/machine-id";
const UUID_LEN: usize = 36;

/// Creates the files that are changed in each copy, before the snapshot is taken.
pub(crate) fn prepare() {
    report("create", "copy_id", prepare_ids());
}

/// Applies the configuration of a copy. It does not run with the random numbers of another guest: if they cannot be replaced,
/// it ends.
pub(crate) fn apply(reseed: &Reseed, guest: &GuestConfig) {
    reseed::apply(reseed);
    setup::set_hostname(guest.hostname.as_deref());
    network::configure(&guest.networks);
    etc_files::write(guest);
    report("renew", "boot_id", random_id().and_then(|id| write(OWN_BOOT_ID, OFlags::empty(), &id)));
    report("renew", "copy_id", random_id().and_then(|id| write(COPY_ID, OFlags::empty(), &id)));
    report("renew", "machine-id", set_machine_id());
}

#[inline(never)]
fn report(what: &str, file: &str, result: Result<(), Errno>) {
    if let Err(error) = result {
        print(format_args!("init: cannot {what} {file}: {error}\n"));
    }
}

/// Mounts a file over the kernel's, as container engines do. A copy of a copy has it already.
fn prepare_ids() -> Result<(), Errno> {
    match mkdirat(CWD, FOLDER, Mode::from_raw_mode(0o755)) {
        Ok(()) => {}
        Err(Errno::EXIST) => return Ok(()),
        Err(error) => return Err(error),
    }
    let mut id = [0; UUID_LEN + 1];
    let file = open(BOOT_ID, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::io::read(file, &mut id)?;
    write(OWN_BOOT_ID, OFlags::CREATE | OFlags::EXCL, &id)?;
    write(COPY_ID, OFlags::CREATE | OFlags::EXCL, &random_id()?)?;
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
    write(MACHINE_ID, OFlags::empty(), &id)
}

/// A UUID and a line feed.
#[inline(never)]
fn random_id() -> Result<[u8; UUID_LEN + 1], Errno> {
    let mut id = [b'\n'; UUID_LEN + 1];
    let file = open(RANDOM_ID, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    match rustix::io::read(file, &mut id)? {
        count if count >= UUID_LEN => Ok(id),
        _ => Err(Errno::IO),
    }
}

/// Writes the content of a file, which has this length already unless it is created.
fn write(path: &str, flags: OFlags, content: &[u8]) -> Result<(), Errno> {
    files::write(CWD, path.as_bytes(), flags | OFlags::NOFOLLOW, content)
}
