//! The layers that apply to the whole process.

use super::{capabilities, landlock, namespaces};
use rustix::io::Errno;
use rustix::process::{DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit};
use rustix::thread::{CapabilitySet, set_no_new_privs};
use std::io;

/// A layer of the jail. Each is effective without the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Layer {
    /// No core dumps, which would contain guest memory, no file longer than the largest disk, no more memory than the guest's
    /// and what a monitor needs, and a bounded number of descriptors.
    Limits,
    /// Other processes of the user cannot read this process's memory (`PR_SET_DUMPABLE`).
    NotDumpable,
    /// No program that this process executes has more privileges (`PR_SET_NO_NEW_PRIVS`).
    NoNewPrivileges,
    /// No capabilities.
    Capabilities,
    /// No path can be opened, listed, created or removed (Landlock, from Linux 5.13).
    Paths,
    /// No TCP port can be bound or connected to (Landlock, from Linux 6.7).
    Network,
    /// No signal to a process outside, and no connection to an abstract Unix socket outside (Landlock, from Linux 6.12).
    Scopes,
    /// New network, IPC, UTS and cgroup namespaces, and an unused UID for a monitor of root, or else a new user namespace.
    /// Not part of [`Self::ALL`].
    Namespaces,
    /// An empty root directory. Not part of [`Self::ALL`], and entered after [`Self::Namespaces`].
    Root,
}

impl Layer {
    /// All layers of the standard jail, in the order in which they are entered.
    pub const ALL: [Self; 7] = [
        Self::Limits,
        Self::NotDumpable,
        Self::NoNewPrivileges,
        Self::Capabilities,
        Self::Paths,
        Self::Network,
        Self::Scopes,
    ];

    /// Whether every supported kernel has the layer.
    #[must_use]
    pub const fn is_in_every_kernel(self) -> bool {
        !matches!(self, Self::Network | Self::Scopes | Self::Namespaces | Self::Root)
    }

    /// The layer's action, as a phrase after "cannot".
    #[must_use]
    pub const fn action(self) -> &'static str {
        match self {
            Self::Limits => "limit resources",
            Self::NotDumpable => "forbid other processes to read the monitor's memory",
            Self::NoNewPrivileges => "set no_new_privs",
            Self::Capabilities => "drop capabilities",
            Self::Paths => "deny all paths by Landlock",
            Self::Network => "deny TCP by Landlock",
            Self::Scopes => "deny signals and abstract sockets by Landlock",
            Self::Namespaces => "create namespaces",
            Self::Root => "change the root directory",
        }
    }
}

/// How much a monitor may use.
#[derive(Clone, Copy, Debug, Default)]
pub struct Limits {
    /// Length of the largest file in bytes.
    pub file: Option<u64>,
    /// Address space in bytes: guest memory, and that of the monitor itself.
    pub memory: Option<u64>,
}

/// Enters layers. Returns those that the host does not have, with its error.
pub(super) fn enter(layers: &[Layer], limits: Limits) -> Vec<(Layer, io::Error)> {
    let mut missing = Vec::new();
    for &layer in layers {
        let result = match layer {
            Layer::Limits => limit_all(limits),
            // Not yet: until the guest runs, this process looks at its own descriptors in /proc.
            Layer::NotDumpable => Ok(()),
            Layer::NoNewPrivileges => set_no_new_privs(true),
            Layer::Capabilities => capabilities::keep(CapabilitySet::empty()),
            Layer::Namespaces => namespaces::enter(),
            Layer::Root => namespaces::change_root(),
            // One ruleset has all three.
            Layer::Paths | Layer::Network | Layer::Scopes => continue,
        };
        if let Err(error) = result {
            missing.push((layer, error.into()));
        }
    }
    let ruleset: Vec<_> = layers.iter().copied().filter(|layer| landlock::has_rules(*layer)).collect();
    missing.extend(landlock::deny(&ruleset));
    missing
}

/// Enters [`Layer::NotDumpable`], when this process does not need its own descriptors in /proc any more.
pub(super) fn hide_memory() -> Result<(), Errno> {
    set_dumpable_behavior(DumpableBehavior::NotDumpable)
}

/// Limits resources, except for the number of processes: at the first entry into the guest, KVM starts a thread of this
/// process (`kvm_mmu_start_lpage_recovery` in arch/x86/kvm/mmu/mmu.c). The filters refuse to start any other.
fn limit_all(limits: Limits) -> Result<(), Errno> {
    /// Maximum number of descriptors: each connection to the guest's vsock takes one.
    const DESCRIPTORS_MAX: u64 = 1 << 16;
    /// Minimum of the maximum length of a file in bytes, for the exit status of a detached guest.
    const FILE_MIN: u64 = 4096;
    limit(Resource::Core, 0)?;
    if let Some(length) = limits.file {
        limit(Resource::Fsize, length.max(FILE_MIN))?;
    }
    if let Some(length) = limits.memory {
        limit(Resource::As, length)?;
    }
    let own = getrlimit(Resource::Nofile).maximum;
    limit(Resource::Nofile, own.map_or(DESCRIPTORS_MAX, |own| own.min(DESCRIPTORS_MAX)))
}

/// Limits a resource, for good.
pub(super) fn limit(resource: Resource, value: u64) -> Result<(), Errno> {
    setrlimit(resource, Rlimit { current: Some(value), maximum: Some(value) })
}
