//! Configuration of the virtio devices. The structures are the sections of Firecracker's configuration file; fields
//! that Firecracker does not have are optional.

use super::ConfigError;
pub use super::limits::{RateLimiter, TokenBucket};
pub use super::network::{
    InterfaceAddress, MacAddress, NetworkInterface, PortForward, Protocol, user_network,
};
use super::null::null_is_default;
use crate::layout::DEVICES_MAX;
use guest_protocol::config::Network;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::path::PathBuf;

/// The virtio devices of a machine, in the order in which the guest discovers them: drives, network interfaces, vsock,
/// entropy, balloon, pmem, shared folders.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Devices {
    /// Block devices: /dev/vda, /dev/vdb and so on in the guest.
    pub drives: Vec<Drive>,
    /// Network devices: eth0, eth1 and so on in the guest.
    pub network_interfaces: Vec<NetworkInterface>,
    /// The socket device.
    pub vsock: Option<Vsock>,
    /// The entropy device.
    pub entropy: Option<Entropy>,
    /// The memory balloon device.
    pub balloon: Option<Balloon>,
    /// Persistent memory devices: /dev/pmem0, /dev/pmem1 and so on in the guest.
    pub pmem: Vec<Pmem>,
    /// Shared folders, which the guest mounts by their tags.
    pub shared_folders: Vec<SharedFolder>,
    /// Path of the image's root filesystem, which init mounts. It is the block device after the drives, so that the
    /// names of the drives do not depend on the image.
    pub root: Option<PathBuf>,
}

/// The configuration of one device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceConfig<'a> {
    /// A block device.
    Drive(&'a Drive),
    /// The image's root filesystem, as a block device.
    Root(Drive),
    /// A network device.
    Network(&'a NetworkInterface),
    /// The socket device.
    Vsock(&'a Vsock),
    /// The entropy device.
    Entropy(&'a Entropy),
    /// The balloon device.
    Balloon(&'a Balloon),
    /// A persistent memory device.
    Pmem(&'a Pmem),
    /// A shared folder.
    Folder(&'a SharedFolder),
}

impl DeviceConfig<'_> {
    /// The name of the device.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Drive(drive) => &drive.drive_id,
            Self::Root(drive) => &drive.drive_id,
            Self::Network(interface) => &interface.iface_id,
            Self::Vsock(_) => "vsock",
            Self::Entropy(_) => "entropy",
            Self::Balloon(_) => "balloon",
            Self::Pmem(pmem) => &pmem.id,
            Self::Folder(folder) => &folder.tag,
        }
    }

    /// The letter of the device type: disk, read-only disk, network, vsock, entropy, balloon, memory (pmem), folder.
    const fn letter(&self) -> char {
        match self {
            Self::Drive(drive) if !drive.is_read_only => 'd',
            Self::Drive(_) | Self::Root(_) => 'r',
            Self::Network(_) => 'n',
            Self::Vsock(_) => 'v',
            Self::Entropy(_) => 'e',
            Self::Balloon(_) => 'b',
            Self::Pmem(_) => 'm',
            Self::Folder(_) => 'f',
        }
    }
}

impl Devices {
    /// All devices, in the order of their register addresses. The image's root filesystem comes after the drives.
    pub fn iter(&self) -> impl Iterator<Item = DeviceConfig<'_>> {
        let drives = self.drives.iter().map(DeviceConfig::Drive);
        let root = self.root_drive().map(|(drive, _)| DeviceConfig::Root(drive));
        let interfaces = self.network_interfaces.iter().map(DeviceConfig::Network);
        let vsock = self.vsock.iter().map(DeviceConfig::Vsock);
        let entropy = self.entropy.iter().map(DeviceConfig::Entropy);
        let balloon = self.balloon.iter().map(DeviceConfig::Balloon);
        let pmem = self.pmem.iter().map(DeviceConfig::Pmem);
        let folders = self.shared_folders.iter().map(DeviceConfig::Folder);
        drives
            .chain(root)
            .chain(interfaces)
            .chain(vsock)
            .chain(entropy)
            .chain(balloon)
            .chain(pmem)
            .chain(folders)
    }

    /// The image's root filesystem as a drive, and its device name in the guest; `None` without one. Only this function
    /// determines its device type.
    #[must_use]
    pub fn root_drive(&self) -> Option<(Drive, String)> {
        let path = self.root.as_ref()?;
        // Drives are named by letters; there are fewer devices than letters.
        let letter = ('a'..='z').nth(self.drives.len())?;
        let drive = Drive { is_read_only: true, ..Drive::new("root", path) };
        Some((drive, format!("/dev/vd{letter}")))
    }

    /// Whether the machine shares no state with others that outlives it: no disks, pmem files or folders, which the
    /// guest must leave in a consistent state, and no network devices, whose host interface may be reused.
    #[must_use]
    pub const fn are_private(&self) -> bool {
        self.drives.is_empty()
            && self.pmem.is_empty()
            && self.shared_folders.is_empty()
            && self.network_interfaces.is_empty()
    }

    /// Number of devices.
    #[must_use]
    pub fn count(&self) -> usize {
        self.iter().count()
    }

    /// One letter per device, for its type: **d**isk, **r**ead-only disk, **n**etwork, **v**sock, **e**ntropy,
    /// **b**alloon, **m**emory (pmem), **f**older.
    #[must_use]
    pub fn kinds(&self) -> String {
        self.iter().map(|device| device.letter()).collect()
    }

    /// Checks everything that can be checked without opening a file. `memory` is the size of the guest's memory in MiB.
    pub(super) fn validate(&self, memory: u64) -> Result<(), ConfigError> {
        if self.count() > DEVICES_MAX {
            return Err(ConfigError::TooManyDevices(self.count()));
        }
        let ids = self.drives.iter().map(|drive| &drive.drive_id);
        let ids = ids.chain(self.network_interfaces.iter().map(|interface| &interface.iface_id));
        let ids = ids.chain(self.pmem.iter().map(|pmem| &pmem.id));
        let ids = ids.chain(self.shared_folders.iter().map(|folder| &folder.tag));
        let mut seen = BTreeSet::new();
        for id in ids {
            if id.is_empty() || !id.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-".contains(&byte))
            {
                return Err(ConfigError::DeviceId(id.clone()));
            }
            if !seen.insert(id) {
                return Err(ConfigError::DeviceTwice(id.clone()));
            }
        }
        self.drives.iter().try_for_each(Drive::validate)?;
        let drives = self.drives.iter().filter(|drive| drive.is_root_device).map(|drive| &drive.drive_id);
        let pmem = self.pmem.iter().filter(|pmem| pmem.root_device).map(|pmem| &pmem.id);
        if let [first, second, ..] = drives.chain(pmem).collect::<Vec<_>>()[..] {
            return Err(ConfigError::SecondRoot { first: first.clone(), second: second.clone() });
        }
        for interface in &self.network_interfaces {
            interface.validate()?;
        }
        if let Some(folder) = self.shared_folders.iter().find(|folder| folder.tag.len() > TAG_MAX) {
            return Err(ConfigError::DeviceId(folder.tag.clone()));
        }
        if let Some(vsock) = &self.vsock {
            vsock.validate()?;
        }
        if let Some(balloon) = &self.balloon {
            balloon.validate(memory)?;
        }
        Ok(())
    }

    /// The network configuration for init.
    pub(crate) fn guest_networks(&self) -> Vec<Network> {
        (0..)
            .zip(&self.network_interfaces)
            .filter_map(|(card, interface)| interface.guest_network(card))
            .collect()
    }
}

/// A block device.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Drive {
    /// Name of the drive. The guest reads its first 20 bytes as the serial number.
    pub drive_id: String,
    /// Path of the backing file: a raw image, or a block device.
    #[serde(default, deserialize_with = "null_is_default")]
    pub path_on_host: PathBuf,
    /// Whether this is the root device, which adds `root=` to the kernel command line.
    #[serde(default, deserialize_with = "null_is_default")]
    pub is_root_device: bool,
    /// Whether the guest can only read.
    #[serde(default, deserialize_with = "null_is_default")]
    pub is_read_only: bool,
    /// UUID of the partition that is the root filesystem.
    #[serde(default)]
    pub partuuid: Option<String>,
    /// Whether flushes of the guest make writes durable on the host.
    #[serde(default, deserialize_with = "null_is_default")]
    pub cache_type: CacheType,
    /// Accepted and ignored: requests are served inline if they do not block, and otherwise by io_uring if the host
    /// allows it.
    #[serde(default)]
    pub io_engine: Option<IoEngine>,
    /// Limits of bytes and requests per time; no limit by default.
    #[serde(default)]
    pub rate_limiter: Option<RateLimiter>,
    /// Whether to bypass the host's page cache (`O_DIRECT`).
    #[serde(default, deserialize_with = "null_is_default")]
    pub direct: bool,
    /// Path of the socket of a vhost-user backend, which is not supported.
    #[serde(default)]
    pub socket: Option<PathBuf>,
}

impl Drive {
    /// A writable drive with default values.
    #[must_use]
    pub fn new(drive_id: impl Into<String>, path_on_host: impl Into<PathBuf>) -> Self {
        Self {
            drive_id: drive_id.into(),
            path_on_host: path_on_host.into(),
            is_root_device: false,
            is_read_only: false,
            partuuid: None,
            cache_type: CacheType::default(),
            io_engine: None,
            rate_limiter: None,
            direct: false,
            socket: None,
        }
    }

    fn validate(&self) -> Result<(), ConfigError> {
        if let Some(socket) = &self.socket {
            return Err(ConfigError::Unsupported {
                field: "drives.socket",
                value: socket.display().to_string(),
                supported: "null, and set path_on_host",
            });
        }
        if self.path_on_host.as_os_str().is_empty() {
            return Err(ConfigError::NoDrivePath(self.drive_id.clone()));
        }
        Ok(())
    }
}

/// The effect of a flush of the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub enum CacheType {
    /// Completed writes are durable on the host's disk.
    #[default]
    Writeback,
    /// None: a crash of the host can lose writes that the guest has flushed.
    Unsafe,
}

/// Firecracker's I/O engines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub enum IoEngine {
    /// Blocking system calls.
    Sync,
    /// io_uring.
    Async,
}

/// The socket device.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Vsock {
    /// The CID of the guest: 3 to 4294967294.
    pub guest_cid: u32,
    /// Path of the Unix socket at which programs of the host connect to ports of the guest: at most 96 bytes. A
    /// connection of the guest to port N of the host leads to the socket at this path with the suffix `_N`.
    pub uds_path: PathBuf,
    /// Accepted and ignored.
    #[serde(default)]
    pub vsock_id: Option<String>,
}

impl Vsock {
    /// Maximum length of the path in bytes: that of a Unix socket (`sun_path` in unix(7), without its NUL), minus that
    /// of the longest port suffix.
    const PATH_MAX: usize = 107 - "_4294967295".len();

    fn validate(&self) -> Result<(), ConfigError> {
        use std::os::unix::ffi::OsStrExt;
        if self.guest_cid < 3 || self.guest_cid == u32::MAX {
            return Err(ConfigError::GuestCid(self.guest_cid));
        }
        let length = self.uds_path.as_os_str().as_bytes().len();
        if length > Self::PATH_MAX {
            return Err(ConfigError::SocketPath { path: self.uds_path.clone(), length });
        }
        Ok(())
    }
}

/// The entropy device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Entropy {
    /// Limits of bytes and requests per time; no limit by default.
    pub rate_limiter: Option<RateLimiter>,
}

/// The memory balloon device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Balloon {
    /// Initial target size in MiB, less than the guest's memory.
    #[serde(deserialize_with = "null_is_default")]
    pub amount_mib: u64,
    /// Whether the guest may deflate the balloon when it runs out of memory.
    #[serde(deserialize_with = "null_is_default")]
    pub deflate_on_oom: bool,
    /// Interval of the guest's memory statistics in seconds; 0 disables them.
    #[serde(deserialize_with = "null_is_default")]
    pub stats_polling_interval_s: u16,
    /// Whether the guest reports free pages, which are then returned to the host.
    #[serde(deserialize_with = "null_is_default")]
    pub free_page_reporting: bool,
    /// Accepted and ignored: free page hinting serves live migration.
    #[serde(deserialize_with = "null_is_default")]
    pub free_page_hinting: bool,
}

impl Balloon {
    fn validate(&self, memory: u64) -> Result<(), ConfigError> {
        if self.amount_mib >= memory {
            return Err(ConfigError::BalloonTooLarge { asked: self.amount_mib, memory });
        }
        Ok(())
    }
}

/// A persistent memory device.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Pmem {
    /// Name of the device.
    pub id: String,
    /// Path of the backing file. The length of a writable file must be a multiple of 2 MiB.
    pub path_on_host: PathBuf,
    /// Whether this is the root device, which adds `root=` to the kernel command line.
    #[serde(default, deserialize_with = "null_is_default")]
    pub root_device: bool,
    /// Whether the guest can only read.
    #[serde(default, deserialize_with = "null_is_default")]
    pub read_only: bool,
    /// Accepted and ignored: flushes are not limited.
    #[serde(default)]
    pub rate_limiter: Option<RateLimiter>,
}

/// Maximum length of a tag in bytes (section 5.11.4 of the virtio specification).
const TAG_MAX: usize = 36;

/// A folder of the host that is shared with the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedFolder {
    /// The tag by which the guest mounts the folder: at most 36 bytes.
    pub tag: String,
    /// Path of the folder on the host.
    pub path: PathBuf,
    /// Whether the guest can only read.
    pub read_only: bool,
    /// The guest's user and group id of files that belong to this process's user and group.
    pub owner: (u32, u32),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn invalid_balloons_are_refused() {
        let check = |balloon| {
            let devices = Devices { balloon: Some(balloon), ..Devices::default() };
            devices.validate(128).map_err(|error| error.to_string())
        };
        assert_eq!(check(Balloon { amount_mib: 127, ..Balloon::default() }), Ok(()));
        for (balloon, expected) in [
            (Balloon { amount_mib: 128, ..Balloon::default() }, "a balloon of 128 MiB is too large"),
            (Balloon { amount_mib: u64::MAX, ..Balloon::default() }, "is too large for a guest of 128 MiB"),
        ] {
            let message = check(balloon).unwrap_err();
            assert!(message.contains(expected), "{message:?} should say {expected:?}");
        }
    }

    #[test]
    fn the_root_filesystem_comes_after_the_drives() {
        let mut devices = Devices { root: Some("root.erofs".into()), ..Devices::default() };
        let (drive, name) = devices.root_drive().unwrap();
        assert_eq!((&*name, drive.is_read_only, devices.count()), ("/dev/vda", true, 1));
        devices.drives.push(Drive::new("d", "file"));
        assert_eq!(devices.root_drive().unwrap().1, "/dev/vdb");
        assert_eq!(devices.kinds(), "dr");
        assert_eq!(devices.iter().map(|device| device.name().to_owned()).collect::<Vec<_>>(), ["d", "root"]);
        devices.root = None;
        assert_eq!(devices.root_drive(), None);
    }

    #[test]
    fn ethernet_addresses_are_parsed_or_refused() {
        assert_eq!("06:00:ac:10:00:02".parse(), Ok(MacAddress([6, 0, 0xac, 0x10, 0, 2])));
        for text in [
            "",
            "06:00:ac:10:00",
            "06:00:ac:10:00:02:03",
            "6:0:ac:10:0:2",
            "06-00-ac-10-00-02",
            "+6:00:ac:10:00:02",
        ] {
            assert!(text.parse::<MacAddress>().is_err(), "{text}");
        }
        assert!("01:00:5e:00:00:01".parse::<MacAddress>().unwrap_err().contains("group"));
    }
}
