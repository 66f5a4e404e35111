//! What programs know of names: the files of /etc that say who the guest is and whom it asks (hostname(5), hosts(5),
//! resolv.conf(5)). In an image they are another machine's, or links to what only its own init makes.

use crate::voice::say;
use alloc::vec::Vec;
use guest_init::payload_spec::PayloadSpec;
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, Uid, chmodat, chownat, mkdirat, openat, statat, unlinkat,
};
use rustix::io::Errno;
use rustix::path::DecInt;

/// Writes them into the root that is there. One that cannot be written keeps what it has.
pub(crate) fn write(spec: &PayloadSpec) {
    if is_needed(spec) {
        let _ = mkdirat(CWD, "/etc", Mode::from_raw_mode(0o755));
        let _ = directory(CWD, "/etc").and_then(|etc| write_files(&etc, spec));
    }
}

/// Writes them into the upper layer of an overlay before it is one, which spares it a copy of the directory.
pub(crate) fn write_above(lower: &str, upper: &str, spec: &PayloadSpec) {
    if is_needed(spec)
        && let Err(error) = try_write_above(lower, upper, spec)
    {
        say(format_args!("init: cannot write the names in /etc: {error}\n"));
    }
}

fn try_write_above(lower: &str, upper: &str, spec: &PayloadSpec) -> Result<(), Errno> {
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
    write_files(&directory(&layer, "etc")?, spec)
}

fn directory(parent: impl AsFd, name: &str) -> Result<OwnedFd, Errno> {
    openat(parent, name, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

fn is_needed(spec: &PayloadSpec) -> bool {
    spec.agent || spec.networks.iter().any(|network| network.nameserver.is_some())
}

fn write_files(etc: &OwnedFd, spec: &PayloadSpec) -> Result<(), Errno> {
    // The first card that knows a name server has the word.
    if let Some(nameserver) = spec.networks.iter().find_map(|network| network.nameserver) {
        write_file(etc, "resolv.conf", &[b"nameserver ", &address(nameserver), b"\n"])?;
    }
    // Who boots an image has it as it is; to whom it is a program's, that has a name.
    if let Some(name) = spec.hostname.as_ref().filter(|_| spec.agent) {
        /// Debian's for a name without a network.
        const OWN: [u8; 4] = [127, 0, 1, 1];
        let own = address(spec.networks.first().map_or(OWN, |network| network.address));
        write_file(etc, "hostname", &[name, b"\n"])?;
        write_file(etc, "hosts", &[b"127.0.0.1\tlocalhost\n", &own, b"\t", name, b"\n"])?;
    }
    Ok(())
}

fn write_file(etc: &OwnedFd, name: &str, parts: &[&[u8]]) -> Result<(), Errno> {
    let _ = unlinkat(etc, name, AtFlags::empty());
    let new = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let file = openat(etc, name, new, Mode::from_raw_mode(0o644))?;
    rustix::io::write(&file, &parts.concat()).map(drop)
}

/// An address as people write it.
fn address(bytes: [u8; 4]) -> Vec<u8> {
    let numbers = bytes.map(DecInt::new);
    numbers.each_ref().map(DecInt::as_bytes).join(&b'.')
}
