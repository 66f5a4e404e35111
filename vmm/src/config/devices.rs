//! The virtio devices that a user may ask for. The structures are the sections of Firecracker's JSON, and
//! what it has no field for has a default.

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

/// The virtio devices of a machine, in the order in which the guest finds them: drives, network interfaces,
/// vsock, entropy, balloon, pmem, shared folders.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Devices {
    /// Disks; the guest calls them /dev/vda, /dev/vdb and so on.
    pub drives: Vec<Drive>,
    /// Network cards; the guest calls them eth0, eth1 and so on.
    pub network_interfaces: Vec<NetworkInterface>,
    /// A way between sockets of the guest and of the host.
    pub vsock: Option<Vsock>,
    /// A source of random numbers.
    pub entropy: Option<Entropy>,
    /// A balloon, through which memory goes back to the host.
    pub balloon: Option<Balloon>,
    /// Files that the guest sees as memory; it calls them /dev/pmem0, /dev/pmem1 and so on.
    pub pmem: Vec<Pmem>,
    /// Folders of the host, which the guest mounts by their tags.
    pub shared_folders: Vec<SharedFolder>,
    /// File of the image's root filesystem, which init mounts. The guest finds it behind the drives, so that
    /// those have the same names with every image.
    pub root: Option<PathBuf>,
}

/// One device of a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceConfig<'a> {
    /// A drive.
    Drive(&'a Drive),
    /// The image's root filesystem as a disk.
    Root(Drive),
    /// A network card.
    Network(&'a NetworkInterface),
    /// The vsock.
    Vsock(&'a Vsock),
    /// The source of random numbers.
    Entropy(&'a Entropy),
    /// The balloon.
    Balloon(&'a Balloon),
    /// A file as memory.
    Pmem(&'a Pmem),
    /// A shared folder.
    Folder(&'a SharedFolder),
}

impl DeviceConfig<'_> {
    /// Its name.
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

    /// A letter for its kind: disk, read-only disk, network card, vsock, entropy, balloon, memory, folder.
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
    /// All of them, in the order of their registers. The image's root filesystem comes behind the drives.
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

    /// The image's root filesystem as a disk, and the guest's name for it. This is the only place that knows
    /// which kind of device it is.
    #[must_use]
    pub fn root_drive(&self) -> Option<(Drive, String)> {
        let path = self.root.as_ref()?;
        // Drives are named by letters; there are fewer devices than letters.
        let letter = ('a'..='z').nth(self.drives.len())?;
        let drive = Drive { is_read_only: true, ..Drive::new("root", path) };
        Some((drive, format!("/dev/vd{letter}")))
    }

    /// Whether nothing of them outlives the machine: neither disks, files as memory nor folders that a guest leaves in
    /// order, nor network cards whose other end others may have afterwards.
    #[must_use]
    pub const fn are_private(&self) -> bool {
        self.drives.is_empty()
            && self.pmem.is_empty()
            && self.shared_folders.is_empty()
            && self.network_interfaces.is_empty()
    }

    /// How many there are.
    #[must_use]
    pub const fn count(&self) -> usize {
        self.drives.len()
            + self.network_interfaces.len()
            + self.vsock.is_some() as usize
            + self.entropy.is_some() as usize
            + self.balloon.is_some() as usize
            + self.pmem.len()
            + self.shared_folders.len()
            + self.root.is_some() as usize
    }

    /// A letter for each, by its kind: disk, read-only disk, network card, vsock, entropy, balloon, memory,
    /// folder.
    #[must_use]
    pub fn kinds(&self) -> String {
        self.iter().map(|device| device.letter()).collect()
    }

    /// Checks everything that can be checked without opening a file, for a machine with so many MiB of memory.
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

    /// What init has to tell the guest's kernel of its network cards.
    pub(crate) fn guest_networks(&self) -> Vec<Network> {
        (0..)
            .zip(&self.network_interfaces)
            .filter_map(|(card, interface)| interface.guest_network(card))
            .collect()
    }
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Drive {
    /// Its name, which the guest reads as the disk's serial number, up to 20 bytes of it.
    pub drive_id: String,
    /// A raw file or a block device.
    #[serde(default, deserialize_with = "null_is_default")]
    pub path_on_host: PathBuf,
    /// Whether the kernel mounts it as its root; `root=` on the command line then names it.
    #[serde(default, deserialize_with = "null_is_default")]
    pub is_root_device: bool,
    /// Whether the guest may only read.
    #[serde(default, deserialize_with = "null_is_default")]
    pub is_read_only: bool,
    /// The partition to mount as root.
    #[serde(default)]
    pub partuuid: Option<String>,
    /// Whether what the guest flushes is flushed to the host's disk.
    #[serde(default, deserialize_with = "null_is_default")]
    pub cache_type: CacheType,
    /// Accepted and not heeded: what can be done at once is, and the rest goes to io_uring where there is one.
    #[serde(default)]
    pub io_engine: Option<IoEngine>,
    /// Limits of bytes and requests.
    #[serde(default)]
    pub rate_limiter: Option<RateLimiter>,
    /// Whether the host's page cache is left out.
    #[serde(default, deserialize_with = "null_is_default")]
    pub direct: bool,
    /// The socket of a vhost-user backend, which is not supported.
    #[serde(default)]
    pub socket: Option<PathBuf>,
}

impl Drive {
    /// A disk that the guest may write.
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

/// What a flush of the guest does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub enum CacheType {
    /// What was written reaches the host's disk.
    #[default]
    Writeback,
    /// Nothing: a crash of the host can lose what the guest believes to be written.
    Unsafe,
}

/// Firecracker's ways of reading and writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub enum IoEngine {
    /// With system calls that wait.
    Sync,
    /// With io_uring.
    Async,
}

/// Sockets between guest and host.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Vsock {
    /// The guest's number, 3 or more.
    pub guest_cid: u32,
    /// The Unix socket at which programs of the host ask for ports of the guest. For port N of the host the
    /// guest is connected to the socket of this path with `_N` behind it.
    pub uds_path: PathBuf,
    /// Accepted and not heeded.
    #[serde(default)]
    pub vsock_id: Option<String>,
}

impl Vsock {
    /// Bytes that the path can have: those of any Unix socket (`sun_path` in unix(7), without its NUL), less the
    /// longest port behind it.
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

/// A source of random numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Entropy {
    /// Limits of bytes and requests.
    pub rate_limiter: Option<RateLimiter>,
}

/// A balloon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Balloon {
    /// MiB of memory that the guest gives back at first.
    #[serde(deserialize_with = "null_is_default")]
    pub amount_mib: u64,
    /// Whether a guest that runs out of memory takes it back by itself.
    #[serde(deserialize_with = "null_is_default")]
    pub deflate_on_oom: bool,
    /// Seconds between statistics of the guest; 0 for none.
    #[serde(deserialize_with = "null_is_default")]
    pub stats_polling_interval_s: u16,
    /// Whether the guest says which pages it does not use, so that the host can have them.
    #[serde(deserialize_with = "null_is_default")]
    pub free_page_reporting: bool,
    /// Accepted and not heeded: hinting runs serve live migration.
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

/// A file as memory.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Pmem {
    /// Its name.
    pub id: String,
    /// The file.
    pub path_on_host: PathBuf,
    /// Whether the kernel mounts it as its root.
    #[serde(default, deserialize_with = "null_is_default")]
    pub root_device: bool,
    /// Whether the guest may only read.
    #[serde(default, deserialize_with = "null_is_default")]
    pub read_only: bool,
    /// Accepted and not heeded: flushes are not limited.
    #[serde(default)]
    pub rate_limiter: Option<RateLimiter>,
}

/// Bytes of a shared folder's tag (section 5.11.4 of the virtio specification).
const TAG_MAX: usize = 36;

/// A folder of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedFolder {
    /// What the guest mounts it by, up to 36 bytes.
    pub tag: String,
    /// The folder.
    pub path: PathBuf,
    /// Whether the guest may only read.
    pub read_only: bool,
    /// User and group that files of this process's user and group belong to in the guest.
    pub owner: (u32, u32),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn balloons_that_cannot_be_are_refused() {
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
    fn the_root_filesystem_is_behind_the_drives() {
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
    fn ethernet_addresses_are_read_or_refused() {
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
