//! The payload of a guest, which is sent to init.

use guest_protocol::agent::TerminalSize;
use guest_protocol::frame::{self, FrameError, Item, MountKind, Network};
use serde::{Deserialize, Serialize};
use std::io;

/// The payload of a guest and its environment.
///
/// Strings are bytes, as Linux has them; none may contain a NUL.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestConfig {
    /// Argument vector of the payload; empty for init's greeting.
    #[serde(with = "byte_strings")]
    pub arguments: Vec<Vec<u8>>,
    /// Environment entries, each `NAME=value`.
    #[serde(with = "byte_strings")]
    pub environment: Vec<Vec<u8>>,
    /// Working directory; `/` by default.
    pub working_directory: Option<Vec<u8>>,
    /// Hostname; the kernel's default by default.
    pub hostname: Option<Vec<u8>>,
    /// User id of the payload.
    pub user_id: u32,
    /// Group id of the payload.
    pub group_id: u32,
    /// Block device with an EROFS root filesystem, such as `/dev/vda`; by default that of the configuration's image, if
    /// the image has one.
    pub root_device: Option<Vec<u8>>,
    /// Network devices that init configures, in addition to those of
    /// [`Devices::network_interfaces`](super::Devices::network_interfaces), which are configured first.
    pub networks: Vec<Network>,
    /// Supplementary group ids of the payload.
    pub groups: Vec<u32>,
    /// Size of the terminal that the agent creates for the payload; `None` for pipes.
    pub terminal: Option<TerminalSize>,
    /// Whether the standard streams of the payload are connected to the agent (`guest_protocol::agent`) over vsock.
    pub agent: bool,
    /// Filesystems that init mounts before the payload runs, in this order.
    pub mounts: Vec<Mount>,
    /// Whether the root filesystem is read-only.
    pub is_root_read_only: bool,
}

/// A filesystem that init mounts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// The type of the filesystem.
    pub kind: MountKind,
    /// Whether the mount is read-only.
    pub is_read_only: bool,
    /// The guest's name of the device, such as `/dev/vda`, or the tag of a shared folder.
    pub source: Vec<u8>,
    /// The mount point, an absolute path in the guest. Missing directories are created.
    pub target: Vec<u8>,
}

impl Mount {
    fn item(&self) -> Item<'_> {
        let Self { kind, is_read_only, source, target } = self;
        Item::Mount(frame::Mount { kind: *kind, is_read_only: *is_read_only, source, target })
    }
}

impl GuestConfig {
    /// Encodes the configuration as a frame for init. `vm_age` is the age of the VM in nanoseconds, `kernel_log` makes
    /// init send the kernel log, and `reseed` is required for a kernel that was booted for another guest.
    ///
    /// # Errors
    /// When arguments and environment exceed the limits of Linux.
    pub fn to_frame(
        &self,
        vm_age: u64,
        kernel_log: bool,
        reseed: Option<&Reseed>,
    ) -> Result<Vec<u8>, FrameError> {
        let reseed_items =
            reseed.map(|reseed| [Item::RealTime(reseed.real_time), Item::Entropy(&reseed.entropy)]);
        let items = self
            .arguments
            .iter()
            .map(|bytes| Item::Argument(bytes))
            .chain(self.environment.iter().map(|bytes| Item::Environment(bytes)))
            .chain(self.working_directory.iter().map(|bytes| Item::WorkingDirectory(bytes)))
            .chain(self.hostname.iter().map(|bytes| Item::Hostname(bytes)))
            .chain(self.root_device.iter().map(|bytes| Item::RootDevice(bytes)))
            .chain([Item::UserId(self.user_id), Item::GroupId(self.group_id), Item::VmAge(vm_age)])
            .chain(self.networks.iter().map(|network| Item::Network(*network)))
            .chain(self.groups.iter().map(|id| Item::Group(*id)))
            .chain(self.terminal.map(Item::Terminal))
            .chain(self.agent.then_some(Item::Agent))
            .chain(self.mounts.iter().map(Mount::item))
            .chain(self.is_root_read_only.then_some(Item::ReadOnlyRoot))
            .chain(kernel_log.then_some(Item::KernelLog))
            .chain(reseed_items.into_iter().flatten());
        let mut bytes = Vec::new();
        frame::encode(items, &mut bytes)?;
        Ok(bytes)
    }
}

/// What a guest must be given when its kernel was booted for another guest (a preboot): the time and new random
/// numbers.
#[derive(Clone, Copy, Debug)]
pub struct Reseed {
    /// Wall-clock time in nanoseconds since 1970.
    pub real_time: u64,
    /// Random bytes, which are never used twice.
    pub entropy: [u8; 32],
}

impl Reseed {
    /// A value for checking whether a configuration fits into a frame.
    pub const PLACEHOLDER: Self = Self { real_time: 0, entropy: [0; 32] };

    /// The current time and random numbers of the host (getrandom(2)).
    ///
    /// # Errors
    /// When the host provides no random numbers.
    pub fn now() -> io::Result<Self> {
        let mut entropy = [0; 32];
        let length = rustix::rand::getrandom(&mut entropy, rustix::rand::GetRandomFlags::empty())?;
        if length < entropy.len() {
            return Err(io::Error::other("the host gave too few random bytes"));
        }
        let time = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
        let [seconds, nanoseconds] = [time.tv_sec, time.tv_nsec].map(|part| u64::try_from(part).unwrap_or(0));
        Ok(Self { real_time: seconds * 1_000_000_000 + nanoseconds, entropy })
    }
}

/// Serialization of lists of byte strings, each of which is copied as a whole: an environment may have 2 MiB.
mod byte_strings {
    use serde::de::{Deserialize, Deserializer, Error, Visitor};
    use serde::ser::{Serialize, Serializer};
    use std::fmt;

    struct Bytes<'a>(&'a [u8]);

    impl Serialize for Bytes<'_> {
        fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            serializer.serialize_bytes(self.0)
        }
    }

    struct ByteBuf(Vec<u8>);

    impl<'de> Deserialize<'de> for ByteBuf {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            struct Copied;

            impl Visitor<'_> for Copied {
                type Value = ByteBuf;

                fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                    formatter.write_str("bytes")
                }

                fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<ByteBuf, E> {
                    Ok(ByteBuf(bytes.to_vec()))
                }
            }

            deserializer.deserialize_bytes(Copied)
        }
    }

    pub(super) fn serialize<S: Serializer>(strings: &[Vec<u8>], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(strings.iter().map(|string| Bytes(string)))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Vec<u8>>, D::Error> {
        let strings = Vec::<ByteBuf>::deserialize(deserializer)?;
        Ok(strings.into_iter().map(|ByteBuf(bytes)| bytes).collect())
    }
}
