//! Network devices.

use super::limits::RateLimiter;
use super::{Description, DeviceKind};
use crate::config::ConfigError;
use guest_protocol::config::Network;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;

/// A network device.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct NetworkInterface {
    /// Name of the device.
    pub iface_id: String,
    /// Name of the tap device on the host, or `user` for user-mode networking with passt.
    pub host_dev_name: String,
    /// MAC address; by default it is derived from `host_dev_name`.
    #[serde(default)]
    pub guest_mac: Option<MacAddress>,
    /// Maximum size of an IP packet in bytes: 68 to 65535. The default is that of the guest's kernel (1500) with a tap
    /// device, and 65520 with passt.
    #[serde(default)]
    pub mtu: Option<u16>,
    /// IPv4 address of the guest, which init configures. Without an address the guest configures itself. With passt,
    /// which identifies the guest by its address, the default is [`user_network::ADDRESS`].
    #[serde(default)]
    pub guest_ip: Option<InterfaceAddress>,
    /// Default gateway of the guest.
    #[serde(default)]
    pub gateway: Option<Ipv4Addr>,
    /// Name server of the guest.
    #[serde(default)]
    pub nameserver: Option<Ipv4Addr>,
    /// Rate limits for received frames.
    #[serde(default)]
    pub rx_rate_limiter: Option<RateLimiter>,
    /// Rate limits for sent frames.
    #[serde(default)]
    pub tx_rate_limiter: Option<RateLimiter>,
    /// A field of Firecracker before 1.0, accepted and ignored: there is no metadata service.
    #[serde(default)]
    pub allow_mmds_requests: Option<bool>,
    /// Host ports that are forwarded to the guest; only with passt.
    #[serde(skip)]
    pub forwards: Vec<PortForward>,
}

/// The guest's network configuration with passt. Each device has its own such network, without other hosts.
pub mod user_network {
    use std::net::Ipv4Addr;

    /// IPv4 address of the guest.
    pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
    /// Prefix length of the network in bits.
    pub const PREFIX: u8 = 24;
    /// Default gateway.
    pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
    /// Address at which passt forwards DNS requests to the host's first name server.
    pub const NAMESERVER: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
    /// MTU in bytes: the largest packet that passt supports, rounded down to a multiple of four (passt(1), `--mtu`).
    pub const MTU: u16 = 65_520;
}

impl NetworkInterface {
    /// Whether the device is connected to passt.
    #[must_use]
    pub fn is_user(&self) -> bool {
        self.host_dev_name == "user"
    }

    /// The MAC address of the device.
    pub(crate) fn mac(&self) -> MacAddress {
        self.guest_mac.unwrap_or_else(|| {
            // FNV-1a: the names of tap devices are unique on a host, and so are the addresses on one bridge.
            let hash = self.host_dev_name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
                (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
            });
            let [a, b, c, d, e, ..] = hash.to_le_bytes();
            // A locally administered unicast address.
            MacAddress([0x06, a, b, c, d, e])
        })
    }

    /// The MTU that the device reports to the guest.
    pub(crate) fn guest_mtu(&self) -> Option<u16> {
        self.mtu.or_else(|| self.is_user().then_some(user_network::MTU))
    }

    /// The network configuration for init; `card` is the index of the device.
    pub(super) fn guest_network(&self, card: u8) -> Option<Network> {
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

impl DeviceKind for NetworkInterface {
    fn describe(&self) -> Description<'_> {
        Description {
            name: &self.iface_id,
            is_named: true,
            letter: 'n',
            is_private: false,
            is_root_device: false,
        }
    }

    fn validate(&self, _: u64) -> Result<(), ConfigError> {
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
}

/// An IPv4 address with its prefix length.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct InterfaceAddress {
    /// The address.
    pub address: Ipv4Addr,
    /// Prefix length of the network in bits: 1 to 32.
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

impl From<InterfaceAddress> for String {
    fn from(InterfaceAddress { address, prefix }: InterfaceAddress) -> Self {
        format!("{address}/{prefix}")
    }
}

impl TryFrom<String> for InterfaceAddress {
    type Error = String;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl NetworkInterface {
    /// A network device with default values.
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
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
        // The lowest bit of the first byte marks multicast addresses.
        if bytes[0] & 1 != 0 {
            return Err(format!("{text:?} is the address of a group of cards"));
        }
        Ok(Self(bytes))
    }
}

impl From<MacAddress> for String {
    fn from(MacAddress([a, b, c, d, e, f]): MacAddress) -> Self {
        format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
    }
}

impl TryFrom<String> for MacAddress {
    type Error = String;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

/// A range of host ports that is forwarded to guest ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortForward {
    /// The transport protocol.
    pub protocol: Protocol,
    /// The host address that the ports are bound to; `None` for all addresses.
    pub address: Option<IpAddr>,
    /// First host port.
    pub host: u16,
    /// First guest port.
    pub guest: u16,
    /// Number of ports in the range in addition to the first.
    pub further: u16,
}

/// As `docker ps` prints it: `127.0.0.1:8080->80/tcp`, with 0.0.0.0 for all addresses.
impl fmt::Display for PortForward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let range = |first: u16| match self.further {
            0 => first.to_string(),
            further => format!("{first}-{}", first.saturating_add(further)),
        };
        let address = self.address.unwrap_or(Ipv4Addr::UNSPECIFIED.into());
        match address {
            IpAddr::V4(address) => write!(f, "{address}:")?,
            IpAddr::V6(address) => write!(f, "[{address}]:")?,
        }
        write!(f, "{}->{}/{}", range(self.host), range(self.guest), self.protocol)
    }
}

/// A transport protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if *self == Self::Tcp { "tcp" } else { "udp" })
    }
}

impl FromStr for Protocol {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut all = [Self::Tcp, Self::Udp].into_iter();
        let found = all.find(|protocol| text.eq_ignore_ascii_case(&protocol.to_string()));
        found.ok_or_else(|| format!("{text:?} is neither tcp nor udp"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_ports_are_printed_like_those_of_docker() {
        let forward =
            PortForward { protocol: Protocol::Tcp, address: None, host: 8080, guest: 80, further: 0 };
        assert_eq!(forward.to_string(), "0.0.0.0:8080->80/tcp");
        let address = Some("::1".parse().unwrap());
        let range = PortForward { protocol: Protocol::Udp, address, further: 2, ..forward };
        assert_eq!(range.to_string(), "[::1]:8080-8082->80-82/udp");
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
