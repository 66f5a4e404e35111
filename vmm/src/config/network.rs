//! Network cards.

use super::ConfigError;
use super::limits::RateLimiter;
use guest_protocol::config::Network;
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;

/// A network card.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
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

    pub(super) fn validate(&self) -> Result<(), ConfigError> {
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

/// An IPv4 address with its network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
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
        // The lowest bit of the first byte is that of groups.
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

/// Ports of the host that lead to as many of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}
