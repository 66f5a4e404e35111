//! What the guest runs: what init is told.

use guest_protocol::agent::TerminalSize;
use guest_protocol::frame::{self, FrameError, Item, MountKind, Network};
use serde::{Deserialize, Serialize};
use std::io;

/// What the guest runs and how, in the guest's own terms.
///
/// Strings are bytes, as Linux has them; none may contain a NUL.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestConfig {
    /// Argument vector of the payload; empty for none.
    #[serde(with = "byte_strings")]
    pub arguments: Vec<Vec<u8>>,
    /// Environment entries, `NAME=value`.
    #[serde(with = "byte_strings")]
    pub environment: Vec<Vec<u8>>,
    /// Working directory, `/` by default.
    pub working_directory: Option<Vec<u8>>,
    /// Hostname, the kernel's default if none.
    pub hostname: Option<Vec<u8>>,
    /// User id.
    pub user_id: u32,
    /// Group id.
    pub group_id: u32,
    /// Device with an EROFS root filesystem, such as `/dev/vda`; that of the configuration's image where none is
    /// named and the image has one.
    pub root_device: Option<Vec<u8>>,
    /// Network cards that init gives an address; those of the machine's own configuration come before them.
    pub networks: Vec<Network>,
    /// Further group ids.
    pub groups: Vec<u32>,
    /// Size of the terminal that the payload gets from the agent; none where it gets pipes.
    pub terminal: Option<TerminalSize>,
    /// Whether the payload's streams lead to the agent (`guest_protocol::agent`), over vsock.
    pub agent: bool,
    /// Filesystems that init mounts before the payload runs, in this order.
    pub mounts: Vec<Mount>,
    /// Whether programs may only read the root filesystem.
    pub is_root_read_only: bool,
}

/// A filesystem that init mounts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// What it is.
    pub kind: MountKind,
    /// Whether the guest may only read.
    pub is_read_only: bool,
    /// The guest's name for the disk, such as `/dev/vda`, or the device's tag.
    pub source: Vec<u8>,
    /// An absolute path in the guest, where directories are made that are missing.
    pub target: Vec<u8>,
}

impl Mount {
    fn item(&self) -> Item<'_> {
        let Self { kind, is_read_only, source, target } = self;
        Item::Mount(frame::Mount { kind: *kind, is_read_only: *is_read_only, source, target })
    }
}

impl GuestConfig {
    /// The frame that says this to init.
    ///
    /// # Errors
    /// When arguments and environment are longer than Linux takes them.
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

/// What a guest sets anew whose kernel has booted before.
#[derive(Clone, Copy, Debug)]
pub struct Reseed {
    /// Nanoseconds since 1970.
    pub real_time: u64,
    /// Random bytes, never the same twice.
    pub entropy: [u8; 32],
}

impl Reseed {
    /// One that is as long as any, to see whether it fits a frame.
    pub const PLACEHOLDER: Self = Self { real_time: 0, entropy: [0; 32] };

    /// The host's time and some of its random numbers.
    ///
    /// # Errors
    /// When the host gives no random numbers.
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

/// Lists of byte strings, each of which is moved whole: an environment may have 2 MiB.
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
