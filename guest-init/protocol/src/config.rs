//! The configuration of a guest: everything that the VMM tells init. Both sides use these types;
//! [`frame`](crate::frame) has their encoding.

use crate::terminal::TerminalSize;
use alloc::vec::Vec;

/// A list of byte strings without NUL.
///
/// The VMM uses `Vec<Vec<u8>>`, whose entries are easy to edit. Init uses one allocation of NUL-terminated strings,
/// which is the form that execve takes.
pub trait StringList: Default {
    /// Reserves memory for strings of up to `bytes` bytes in total, including their terminators.
    fn reserve(&mut self, bytes: usize);

    /// Appends a string.
    fn push(&mut self, string: &[u8]);

    /// The strings in order, without a terminating NUL.
    fn strings(&self) -> impl Iterator<Item = &[u8]>;
}

impl StringList for Vec<Vec<u8>> {
    /// Does nothing: each string is a separate allocation.
    fn reserve(&mut self, _bytes: usize) {}

    fn push(&mut self, string: &[u8]) {
        Self::push(self, string.into());
    }

    fn strings(&self) -> impl Iterator<Item = &[u8]> {
        self.iter().map(Vec::as_slice)
    }
}

/// What a guest runs and how, in the guest's own terms. `L` is the type of [string lists](StringList).
///
/// Strings are bytes, as in Linux; none may contain a NUL.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(bound = "L: StringList"))]
pub struct GuestConfig<L> {
    /// Argument vector of the payload; the first argument names the program. Empty for a guest without a payload.
    #[cfg_attr(feature = "serde", serde(with = "serde_strings"))]
    pub arguments: L,
    /// Environment entries, `NAME=value`.
    #[cfg_attr(feature = "serde", serde(with = "serde_strings"))]
    pub environment: L,
    /// Working directory of the payload; `/` by default.
    pub working_directory: Option<Vec<u8>>,
    /// Hostname; the kernel's default if `None`.
    pub hostname: Option<Vec<u8>>,
    /// User id of the payload.
    pub user_id: u32,
    /// Group id of the payload.
    pub group_id: u32,
    /// Device with an EROFS root filesystem, such as `/dev/vda`, which init mounts below a writable overlay and
    /// enters. If `None`, the VMM uses the root disk of the configured image, if it has one; without one, init stays
    /// in the initramfs.
    pub root_device: Option<Vec<u8>>,
    /// Network interfaces to which init assigns addresses. The VMM puts those of its own configuration first.
    pub networks: Vec<Network>,
    /// Supplementary group ids of the payload.
    pub groups: Vec<u32>,
    /// Size of the terminal that the agent allocates for the payload; the payload gets pipes if `None`.
    pub terminal: Option<TerminalSize>,
    /// Whether init runs the [agent](crate::agent), which connects the payload's streams to the host over vsock.
    /// Otherwise the payload uses the console.
    pub agent: bool,
    /// Filesystems that init mounts before the payload runs, in this order.
    pub mounts: Vec<Mount>,
    /// Whether the root filesystem is remounted read-only before the payload runs.
    pub is_root_read_only: bool,
    /// Maximum number of processes and threads beside those of the kernel and init.
    pub max_processes: Option<u64>,
}

/// A filesystem of the host that init mounts.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Mount {
    /// Type of the filesystem.
    pub kind: MountKind,
    /// Whether it is mounted read-only.
    pub is_read_only: bool,
    /// The disk, such as `/dev/vda`, or the virtio-fs tag.
    pub source: Vec<u8>,
    /// Absolute path of the mount point. Init creates missing directories.
    pub target: Vec<u8>,
}

/// Type of a [`Mount`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum MountKind {
    /// A volume: a disk with ext4.
    Volume = 1,
    /// A directory of the host, shared over virtio-fs.
    Folder = 2,
}

/// Addresses that init assigns to a network interface before the payload runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Network {
    /// Number of the interface: 1 for `eth1`.
    pub card: u8,
    /// Prefix length of the address, at most 32.
    pub prefix: u8,
    /// IPv4 address.
    pub address: [u8; 4],
    /// Default gateway.
    pub gateway: Option<[u8; 4]>,
    /// DNS server.
    pub nameserver: Option<[u8; 4]>,
}

/// Facts about one boot, which the VMM adds to the [`GuestConfig`] when init requests its configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BootInfo {
    /// Nanoseconds from the creation of the VM until the frame was encoded.
    pub vm_age: Option<u64>,
    /// Whether init sends the kernel's log to [`port::KERNEL_LOG`](crate::port::KERNEL_LOG) before the guest ends.
    pub kernel_log: bool,
    /// Set if the guest continues from a pre-booted kernel, which other guests share.
    pub reseed: Option<Reseed>,
}

impl BootInfo {
    /// All fields set, which gives the longest encoding: a configuration that fits a frame with it fits a frame with any
    /// other `BootInfo`.
    pub const ALL_SET: Self = Self {
        vm_age: Some(0),
        kernel_log: true,
        reseed: Some(Reseed { real_time: 0, entropy: [0; Reseed::ENTROPY_LEN] }),
    };
}

/// State that two guests must not share, although they continue from the same pre-booted kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reseed {
    /// Wall-clock time: nanoseconds since 1970 when the frame was encoded.
    pub real_time: u64,
    /// Random bytes from the host.
    pub entropy: [u8; Self::ENTROPY_LEN],
}

impl Reseed {
    /// Size of a key of the kernel's random number generator in bytes (`CHACHA_KEY_SIZE`).
    pub const ENTROPY_LEN: usize = 32;
}

/// Serializes each string of a list as one block of bytes and not as a sequence of integers: an environment may have
/// 2 MiB.
#[cfg(feature = "serde")]
mod serde_strings {
    use super::StringList;
    use alloc::vec::Vec;
    use core::fmt;
    use serde::de::{Deserialize, Deserializer, Error, Visitor};
    use serde::ser::{Serialize, Serializer};

    struct Bytes<'a>(&'a [u8]);

    impl Serialize for Bytes<'_> {
        fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            serializer.serialize_bytes(self.0)
        }
    }

    struct ByteBuf(Vec<u8>);

    impl<'de> Deserialize<'de> for ByteBuf {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            struct CopyingVisitor;

            impl Visitor<'_> for CopyingVisitor {
                type Value = ByteBuf;

                fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                    formatter.write_str("bytes")
                }

                fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<ByteBuf, E> {
                    Ok(ByteBuf(bytes.to_vec()))
                }
            }

            deserializer.deserialize_bytes(CopyingVisitor)
        }
    }

    pub(super) fn serialize<L: StringList, S: Serializer>(
        list: &L,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        let strings: Vec<_> = list.strings().map(Bytes).collect();
        serializer.collect_seq(strings)
    }

    pub(super) fn deserialize<'de, L: StringList, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<L, D::Error> {
        let mut list = L::default();
        for ByteBuf(bytes) in Vec::<ByteBuf>::deserialize(deserializer)? {
            list.push(&bytes);
        }
        Ok(list)
    }
}
