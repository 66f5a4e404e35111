//! The files in /etc with the hostname and the name server: hostname(5), hosts(5), resolv.conf(5). In an image they are
//! those of another machine, or links to files that only the image's own init creates.

use crate::console::print;
use crate::files;
use alloc::vec::Vec;
use guest_init::GuestConfig;
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, Uid, chmodat, chownat, mkdirat, openat, statat, unlinkat,
};
use rustix::io::Errno;
use rustix::path::DecInt;

/// Writes the files into the current root filesystem. A root filesystem that is not writable keeps its own files.
pub(crate) fn write(config: &GuestConfig) {
    if is_needed(config) {
        let _ = mkdirat(CWD, "/etc", Mode::from_raw_mode(0o755));
        let _ = directory(CWD, "/etc").and_then(|etc| write_files(&etc, config));
    }
}

/// Writes the files into the upper layer of an overlay before the overlay is mounted, which avoids a copy-up of /etc.
pub(crate) fn write_above(lower: &str, upper: &str, config: &GuestConfig) {
    if is_needed(config)
        && let Err(error) = try_write_above(lower, upper, config)
    {
        print(format_args!("init: cannot write hostname and resolv.conf in /etc: {error}\n"));
    }
}

fn try_write_above(lower: &str, upper: &str, config: &GuestConfig) -> Result<(), Errno> {
    let (image, layer) = (directory(CWD, lower)?, directory(CWD, upper)?);
    let etc = match statat(&image, "etc", AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Some(stat),
        Err(Errno::NOENT) => None,
        Err(error) => return Err(error),
    };
    if etc.is_some_and(|etc| FileType::from_raw_mode(etc.st_mode) != FileType::Directory) {
        return Err(Errno::NOTDIR);
    }
    mkdirat(&layer, "etc", Mode::from_raw_mode(0o755))?;
    if let Some(etc) = etc {
        let (uid, gid) = (Uid::from_raw(etc.st_uid), Gid::from_raw(etc.st_gid));
        chownat(&layer, "etc", Some(uid), Some(gid), AtFlags::empty())?;
        chmodat(&layer, "etc", Mode::from_raw_mode(etc.st_mode), AtFlags::empty())?;
    }
    write_files(&directory(&layer, "etc")?, config)
}

fn directory(parent: impl AsFd, name: &str) -> Result<OwnedFd, Errno> {
    openat(parent, name, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

fn is_needed(config: &GuestConfig) -> bool {
    config.agent || config.networks.iter().any(|network| network.nameserver.is_some())
}

fn write_files(etc: &OwnedFd, config: &GuestConfig) -> Result<(), Errno> {
    // The first interface with a name server determines it.
    if let Some(nameserver) = config.networks.iter().find_map(|network| network.nameserver) {
        write_file(etc, "resolv.conf", &[b"nameserver ", &address(nameserver), b"\n"])?;
    }
    // `kindling boot` boots an image unchanged. `kindling run`, whose guests have the agent, gives it a name.
    if let Some(name) = config.hostname.as_ref().filter(|_| config.agent) {
        /// The address that Debian assigns to the hostname of a machine without a permanent IP address.
        const OWN: [u8; 4] = [127, 0, 1, 1];
        let own = address(config.networks.first().map_or(OWN, |network| network.address));
        write_file(etc, "hostname", &[name, b"\n"])?;
        write_file(etc, "hosts", &[b"127.0.0.1\tlocalhost\n", &own, b"\t", name, b"\n"])?;
    }
    Ok(())
}

fn write_file(etc: &OwnedFd, name: &str, parts: &[&[u8]]) -> Result<(), Errno> {
    let _ = unlinkat(etc, name, AtFlags::empty());
    files::write(etc, name.as_bytes(), OFlags::CREATE | OFlags::EXCL, &parts.concat())
}

/// Formats an address in dotted decimal notation.
fn address(bytes: [u8; 4]) -> Vec<u8> {
    let numbers = bytes.map(DecInt::new);
    numbers.each_ref().map(DecInt::as_bytes).join(&b'.')
}
