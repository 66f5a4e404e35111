//! The virtio devices that a user may ask for. The structures are the sections of Firecracker's JSON, and
//! what it has no field for has a default.

use super::json::null_is_default;
use super::{ConfigError, HostFolder};
use crate::layout::DEVICES_MAX;
use guest_protocol::frame::Network;
use serde::Deserialize;
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::str::FromStr;

/// The virtio devices of a machine, in the order in which the guest finds them: drives, network interfaces,
/// vsock, entropy, balloon, pmem, shared folders.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
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

impl Devices {
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

    /// The drives, and the image's root filesystem behind them.
    pub fn disks(&self) -> impl Iterator<Item = Drive> {
        self.drives.iter().cloned().chain(self.root_drive().map(|(drive, _)| drive))
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
        let drives = self.disks().map(|drive| if drive.is_read_only { 'r' } else { 'd' });
        let interfaces = self.network_interfaces.iter().map(|_| 'n');
        let single =
            [(self.vsock.is_some(), 'v'), (self.entropy.is_some(), 'e'), (self.balloon.is_some(), 'b')];
        let single = single.into_iter().filter(|(is_there, _)| *is_there).map(|(_, letter)| letter);
        let pmem = self.pmem.iter().map(|_| 'm');
        let folders = self.shared_folders.iter().map(|_| 'f');
        drives.chain(interfaces).chain(single).chain(pmem).chain(folders).collect()
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
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
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
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum CacheType {
    /// What was written reaches the host's disk.
    #[default]
    Writeback,
    /// Nothing: a crash of the host can lose what the guest believes to be written.
    Unsafe,
}

/// Firecracker's ways of reading and writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum IoEngine {
    /// With system calls that wait.
    Sync,
    /// With io_uring.
    Async,
}

/// A network card.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkInterface {
    /// Its name.
    pub iface_id: String,
    /// The tap device that it leads to, or `user` for networking without one, through passt.
    pub host_dev_name: String,
    /// Its address; one that is made from `host_dev_name` where there is none.
    #[serde(default)]
    pub guest_mac: Option<MacAddress>,
    /// The largest IP packet in bytes, 68 to 65535. Where it is not said, it is the guest's kernel's 1500 with a
    /// tap, and 65520 with passt.
    #[serde(default)]
    pub mtu: Option<u16>,
    /// The guest's IPv4 address, which init sets. Without one the guest configures itself; with passt, which knows
    /// the guest by its address, it is [`user_network::ADDRESS`].
    #[serde(default)]
    pub guest_ip: Option<InterfaceAddress>,
    /// The guest's way out.
    #[serde(default)]
    pub gateway: Option<Ipv4Addr>,
    /// The guest's name server.
    #[serde(default)]
    pub nameserver: Option<Ipv4Addr>,
    /// Limits of what the guest receives.
    #[serde(default)]
    pub rx_rate_limiter: Option<RateLimiter>,
    /// Limits of what the guest sends.
    #[serde(default)]
    pub tx_rate_limiter: Option<RateLimiter>,
    /// Of files of Firecracker before 1.0. Accepted and not heeded: there is no metadata service.
    #[serde(default)]
    pub allow_mmds_requests: Option<bool>,
    /// Ports of the host that lead into the guest, where the other end is passt.
    #[serde(skip)]
    pub forwards: Vec<PortForward>,
}

/// What a guest has whose card leads to passt. There is one such network for each card, and nobody else in it.
pub mod user_network {
    use std::net::Ipv4Addr;

    /// The guest's address.
    pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
    /// Bits of the network's part of it.
    pub const PREFIX: u8 = 24;
    /// The way out.
    pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
    /// Where passt answers for the host's first name server.
    pub const NAMESERVER: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
    /// The largest packet that passt takes, rounded down to words of IP (its manual page, `--mtu`).
    pub const MTU: u16 = 65_520;
}

impl NetworkInterface {
    /// Whether it leads to passt.
    #[must_use]
    pub fn is_user(&self) -> bool {
        self.host_dev_name == "user"
    }

    fn validate(&self) -> Result<(), ConfigError> {
        let wrong = |what: String| Err(ConfigError::Interface { id: self.iface_id.clone(), what });
        // Section 5.1.4.1 of the virtio specification.
        if let Some(mtu) = self.mtu.filter(|mtu| *mtu < 68) {
            return wrong(format!("its MTU is {mtu}; one is 68 to 65535 bytes"));
        }
        let own = [self.guest_ip.map(|ip| ip.address), self.gateway, self.nameserver];
        if self.is_user() && own.iter().any(Option::is_some) {
            let address = user_network::ADDRESS;
            return wrong(format!(
                "with passt the guest's address is {address}, and the rest follows from it"
            ));
        }
        if self.guest_ip.is_none() && own.iter().any(Option::is_some) {
            return wrong(
                "a gateway or name server needs the guest's address (ip=ADDRESS/PREFIX) too".into(),
            );
        }
        Ok(())
    }

    /// The card's address.
    pub(crate) fn mac(&self) -> MacAddress {
        self.guest_mac.unwrap_or_else(|| {
            // FNV-1a: names of taps are different on one host, and so are the addresses behind one bridge.
            let hash = self.host_dev_name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
                (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
            });
            let [a, b, c, d, e, ..] = hash.to_le_bytes();
            // An address that nobody assigned, of one card.
            MacAddress([0x06, a, b, c, d, e])
        })
    }

    /// What the card says about its MTU.
    pub(crate) fn guest_mtu(&self) -> Option<u16> {
        self.mtu.or_else(|| self.is_user().then_some(user_network::MTU))
    }

    /// What init has to set up, if this is card number `card`.
    fn guest_network(&self, card: u8) -> Option<Network> {
        if self.is_user() {
            return Some(Network {
                card,
                prefix: user_network::PREFIX,
                address: user_network::ADDRESS.octets(),
                gateway: Some(user_network::GATEWAY.octets()),
                nameserver: Some(user_network::NAMESERVER.octets()),
            });
        }
        let InterfaceAddress { address, prefix } = self.guest_ip?;
        let octets = |address: Option<Ipv4Addr>| address.map(|address| address.octets());
        let (gateway, nameserver) = (octets(self.gateway), octets(self.nameserver));
        Some(Network { card, prefix, address: address.octets(), gateway, nameserver })
    }
}

/// An IPv4 address with its network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct InterfaceAddress {
    /// The address.
    pub address: Ipv4Addr,
    /// Bits of its network's part, 1 to 32.
    pub prefix: u8,
}

impl FromStr for InterfaceAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parse = |text: &str| {
            let (address, prefix) = text.split_once('/')?;
            let prefix = prefix.parse().ok().filter(|prefix| (1..=32).contains(prefix))?;
            Some(Self { address: address.parse().ok()?, prefix })
        };
        parse(text).ok_or_else(|| format!("{text:?} is not an address with its prefix such as 10.0.0.2/24"))
    }
}

impl TryFrom<String> for InterfaceAddress {
    type Error = String;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl NetworkInterface {
    /// A card of which nothing is said but its name and its other end.
    #[must_use]
    pub fn new(iface_id: impl Into<String>, host_dev_name: impl Into<String>) -> Self {
        Self {
            iface_id: iface_id.into(),
            host_dev_name: host_dev_name.into(),
            guest_mac: None,
            mtu: None,
            guest_ip: None,
            gateway: None,
            nameserver: None,
            rx_rate_limiter: None,
            tx_rate_limiter: None,
            allow_mmds_requests: None,
            forwards: Vec::new(),
        }
    }
}

/// An Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct MacAddress(pub [u8; 6]);

impl FromStr for MacAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || format!("{text:?} is not an Ethernet address such as 06:00:ac:10:00:02");
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part =
                parts.next().filter(|part| part.len() == 2 && !part.starts_with('+')).ok_or_else(wrong)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
        }
        if parts.next().is_some() {
            return Err(wrong());
        }
        // The lowest bit of the first byte is that of groups.
        if bytes[0] & 1 != 0 {
            return Err(format!("{text:?} is the address of a group of cards"));
        }
        Ok(Self(bytes))
    }
}

impl TryFrom<String> for MacAddress {
    type Error = String;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

/// Ports of the host that lead to as many of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortForward {
    /// Whose ports.
    pub protocol: Protocol,
    /// The host's address that they are ports of; of all where none is named.
    pub address: Option<IpAddr>,
    /// The first one on the host.
    pub host: u16,
    /// The first one in the guest.
    pub guest: u16,
    /// How many follow each of them.
    pub further: u16,
}

/// A protocol with ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// Sockets between guest and host.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
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
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Entropy {
    /// Limits of bytes and requests.
    pub rate_limiter: Option<RateLimiter>,
}

/// A balloon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
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
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
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
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SharedFolder {
    /// What the guest mounts it by, up to 36 bytes.
    pub tag: String,
    /// The folder.
    pub folder: HostFolder,
    /// Whether the guest may only read.
    pub read_only: bool,
    /// User and group that files of this process's user and group belong to in the guest.
    pub owner: (u32, u32),
}

/// Limits of a device. What goes beyond waits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RateLimiter {
    /// Of bytes.
    pub bandwidth: Option<TokenBucket>,
    /// Of requests.
    pub ops: Option<TokenBucket>,
}

impl RateLimiter {
    /// Whether it limits anything.
    #[must_use]
    pub fn is_limit(&self) -> bool {
        [self.bandwidth, self.ops].into_iter().flatten().any(|bucket| bucket.is_limit())
    }
}

/// A bucket of tokens, which fills up evenly. One whose size or refill time is 0 limits nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenBucket {
    /// Tokens that it holds.
    pub size: u64,
    /// Tokens that it has once, beside those.
    #[serde(default)]
    pub one_time_burst: Option<u64>,
    /// Milliseconds in which an empty bucket fills up.
    pub refill_time: u64,
}

impl TokenBucket {
    /// Whether it limits anything.
    #[must_use]
    pub const fn is_limit(&self) -> bool {
        self.size > 0 && self.refill_time > 0
    }
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
        assert_eq!(devices.disks().map(|drive| drive.drive_id).collect::<Vec<_>>(), ["d", "root"]);
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
