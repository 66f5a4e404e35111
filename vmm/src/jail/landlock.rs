//! Landlock: one ruleset that denies everything it can (Documentation/userspace-api/landlock.rst).
//!
//! Open descriptors stay usable. A ruleset without rules needs no path, so that two system calls and one structure of the
//! kernel's interface suffice.
#![expect(unsafe_code, reason = "Landlock's system calls have no safe interface")]

use super::Layer;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// `struct landlock_ruleset_attr` (include/uapi/linux/landlock.h).
#[repr(C)]
#[derive(Debug, Default)]
struct Attributes {
    handled_access_fs: u64,
    handled_access_net: u64,
    scoped: u64,
}

/// `LANDLOCK_CREATE_RULESET_VERSION`.
const VERSION: libc::c_uint = 1;

/// The version of the interface from which a layer exists, and its rights from each version on.
const fn rights(layer: Layer) -> &'static [(i32, u64)] {
    match layer {
        // LANDLOCK_ACCESS_FS_EXECUTE to _MAKE_SYM, _REFER, _TRUNCATE, _IOCTL_DEV.
        Layer::Paths => &[(1, 0x1fff), (2, 1 << 13), (3, 1 << 14), (5, 1 << 15)],
        // LANDLOCK_ACCESS_NET_BIND_TCP, _CONNECT_TCP.
        Layer::Network => &[(4, 0b11)],
        // LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET, _SIGNAL.
        Layer::Scopes => &[(6, 0b11)],
        _ => &[],
    }
}

/// Whether a layer is one of Landlock's.
pub(super) const fn has_rules(layer: Layer) -> bool {
    !rights(layer).is_empty()
}

/// Denies what these layers take away. Returns the layers that the host does not have.
pub(super) fn deny(layers: &[Layer]) -> Vec<(Layer, io::Error)> {
    let refused = |error: io::Error| {
        let code = error.raw_os_error().unwrap_or(libc::EINVAL);
        layers.iter().map(|layer| (*layer, io::Error::from_raw_os_error(code))).collect()
    };
    if layers.is_empty() {
        return Vec::new();
    }
    match version() {
        Ok(version) => {
            let has = |layer: &&Layer| rights(**layer)[0].0 <= version;
            let (known, unknown): (Vec<_>, Vec<_>) = layers.iter().partition(has);
            if !known.is_empty()
                && let Err(error) = restrict(&known, version)
            {
                return refused(error);
            }
            let unsupported = |layer: &Layer| (*layer, io::Error::from_raw_os_error(libc::EOPNOTSUPP));
            unknown.into_iter().map(unsupported).collect()
        }
        Err(error) => refused(error),
    }
}

/// The version of the host's interface.
fn version() -> io::Result<i32> {
    // SAFETY: with this flag the call reads no memory.
    let version =
        unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<u8>(), 0, VERSION) };
    i32::try_from(version).ok().filter(|version| *version > 0).ok_or_else(io::Error::last_os_error)
}

fn restrict(layers: &[&Layer], version: i32) -> io::Result<()> {
    let all = |of: Layer| {
        let known = rights(of).iter().filter(|(from, _)| *from <= version && layers.contains(&&of));
        known.fold(0, |all, (_, rights)| all | rights)
    };
    let attributes = Attributes {
        handled_access_fs: all(Layer::Paths),
        handled_access_net: all(Layer::Network),
        scoped: all(Layer::Scopes),
    };
    // Kernels before a field was added accept a longer structure if the field is zero.
    let size = size_of::<Attributes>();
    // SAFETY: the call reads `size` bytes of the structure, and returns a new descriptor.
    let ruleset = unsafe {
        let ruleset = libc::syscall(libc::SYS_landlock_create_ruleset, &raw const attributes, size, 0);
        let Ok(ruleset @ 0..) = i32::try_from(ruleset) else { return Err(io::Error::last_os_error()) };
        OwnedFd::from_raw_fd(ruleset)
    };
    // SAFETY: the call reads no memory.
    let result = unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
