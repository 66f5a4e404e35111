//! The text form of network cards and published ports: the values of `--net` and `--publish`.

pub use kindling_vmm::config::devices::{PortForward, Protocol};

use kindling_vmm::config::devices::{Devices, NetworkInterface};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener, UdpSocket};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

/// An invalid network card or published port. The message names the option, its value and the invalid part.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("--{option} {value}: {what}")]
pub struct NetworkError {
    option: &'static str,
    value: String,
    what: String,
}

/// Parses a network card: `TAP|user[,mac=MAC][,mtu=BYTES][,ip=ADDR/PREFIX][,gw=ADDR][,dns=ADDR]`. `number` is the index of
/// the card in the guest, from 0.
///
/// # Errors
/// When a part of the text is invalid; the error names the part.
pub fn interface(text: &OsStr, number: usize) -> Result<NetworkInterface, NetworkError> {
    let value = text.to_string_lossy().into_owned();
    let wrong = |what: String| NetworkError { option: "net", value: value.clone(), what };
    let mut parts = value.split(',');
    let host_dev_name = parts.next().unwrap_or_default();
    let mut interface = NetworkInterface::new(format!("net{number}"), host_dev_name);
    let ipv4 = |text: &str| {
        text.parse().map_err(|_| wrong(format!("{text:?} is not an IPv4 address such as 10.0.0.1"))).map(Some)
    };
    for part in parts {
        match part.split_once('=') {
            Some(("mac", text)) => interface.guest_mac = Some(text.parse().map_err(wrong)?),
            Some(("mtu", text)) => {
                let mtu = text.parse().map_err(|_| wrong(format!("{text:?} is not a number of bytes")))?;
                interface.mtu = Some(mtu);
            }
            Some(("ip", text)) => interface.guest_ip = Some(text.parse().map_err(wrong)?),
            Some(("gw", text)) => interface.gateway = ipv4(text)?,
            Some(("dns", text)) => interface.nameserver = ipv4(text)?,
            _ => return Err(wrong(format!("{part:?} is none of mac=..., mtu=..., ip=..., gw=..., dns=..."))),
        }
    }
    Ok(interface)
}

/// Parses published ports, and adds them to the first network card of kind `user`. The syntax is that of
/// `docker run --publish`: `[[ADDRESS:][HOST]:]GUEST[/tcp|/udp]`, where HOST and GUEST are ports from 1 to 65535, or ranges
/// of the same length. Without HOST, or with 0, each port of the guest is assigned a free port of the host; a range of the
/// host for a single port of the guest assigns its first free port. Returns the ports that were assigned.
///
/// # Errors
/// When a text is invalid, there is no such card, or no port is free.
pub fn publish_all(texts: &[OsString], devices: &mut Devices) -> Result<Vec<PortForward>, NetworkError> {
    let wrong = |text: &OsString, what: String| NetworkError {
        option: "publish",
        value: text.to_string_lossy().into_owned(),
        what,
    };
    let parse =
        |text: &OsString| PublishRequest::parse(&text.to_string_lossy()).map_err(|what| wrong(text, what));
    let requests: Vec<_> = texts.iter().map(parse).collect::<Result<_, _>>()?;
    let mut ports = HostPorts::default();
    // Ports that the user names come first, so that none of them is assigned to another port of the guest.
    for (text, request) in texts.iter().zip(&requests) {
        if let Some(forward) = request.without_assignment() {
            ports.take(&forward).map_err(|what| wrong(text, what))?;
        }
    }
    let mut all_assigned = Vec::new();
    for (text, request) in texts.iter().zip(&requests) {
        let interface = devices.network_interfaces.iter_mut().find(|card| card.is_user());
        let interface = interface.ok_or_else(|| wrong(text, "it needs --net user".to_owned()))?;
        if let Some(forward) = request.without_assignment() {
            interface.forwards.push(forward);
        } else {
            let assigned = request.assign(&mut ports).map_err(|what| wrong(text, what))?;
            interface.forwards.extend_from_slice(&assigned);
            all_assigned.extend(assigned);
        }
    }
    Ok(all_assigned)
}

/// Locks the assignment of ports of the host for this user's starts of guests, until the returned file is closed: an assigned
/// port is free for others until passt has bound it. `None` if another start holds the lock for too long.
pub(crate) fn lock_ports(directory: &Path) -> io::Result<Option<File>> {
    /// passt takes some milliseconds to start, and a kernel that has to be pre-booted first a second or two.
    const TIMEOUT: Duration = Duration::from_secs(10);
    const INTERVAL: Duration = Duration::from_millis(2);
    let file = trusted_path::lock_file(&directory.join(".ports"))?;
    let until = Instant::now() + TIMEOUT;
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(Some(file)),
            Err(Errno::WOULDBLOCK) if Instant::now() < until => std::thread::sleep(INTERVAL),
            Err(_) => return Ok(None),
        }
    }
}

/// The ports of the host that are published.
#[derive(Default)]
struct HostPorts {
    /// By protocol and number.
    taken: HashMap<(Protocol, u16), HostPort>,
    /// Sockets that keep assigned ports in use until all are assigned.
    sockets: Vec<OwnedFd>,
}

/// A port of the host. passt forwards it to one port of the guest, whatever the address of the host.
struct HostPort {
    guest: u16,
    addresses: Vec<Option<IpAddr>>,
}

impl HostPorts {
    fn is_taken(&self, protocol: Protocol, port: u16) -> bool {
        self.taken.contains_key(&(protocol, port))
    }

    /// Adds ports that the user has named.
    fn take(&mut self, forward: &PortForward) -> Result<(), String> {
        for number in 0..=forward.further {
            let (host, guest) = (forward.host.saturating_add(number), forward.guest.saturating_add(number));
            let of_host = self
                .taken
                .entry((forward.protocol, host))
                .or_insert(HostPort { guest, addresses: Vec::new() });
            let is_same = |other: &Option<IpAddr>| {
                other.is_none() || forward.address.is_none() || *other == forward.address
            };
            if of_host.addresses.iter().any(is_same) {
                return Err(format!("port {host} of the host is published twice"));
            }
            if of_host.guest != guest {
                return Err(format!(
                    "port {host} of the host is published for port {} of the guest too, and different addresses of the \
                     host cannot lead to different ports; choose another port of the host",
                    of_host.guest
                ));
            }
            of_host.addresses.push(forward.address);
        }
        Ok(())
    }
}

/// A published port or range of ports, as the user wrote it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct PublishRequest {
    protocol: Protocol,
    address: Option<IpAddr>,
    /// Ports of the host; without them, free ones are assigned.
    host: Option<Ports>,
    guest: Ports,
}

/// A port, and the number of ports that follow it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Ports {
    first: u16,
    further: u16,
}

impl PublishRequest {
    fn parse(text: &str) -> Result<Self, String> {
        let (rest, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
        let protocol = protocol.parse()?;
        let (address, host, guest) = match rest.rsplitn(3, ':').collect::<Vec<_>>()[..] {
            [guest, host, address] => (Some(parse_address(address)?), host, guest),
            [guest, host] => (None, host, guest),
            _ if rest.is_empty() => return Err(FORM.to_owned()),
            _ => (None, "", rest),
        };
        let host = if matches!(host, "" | "0") { None } else { Some(Ports::parse(host)?) };
        let guest = Ports::parse(guest)?;
        if host.is_some_and(|host| guest.further != 0 && host.further != guest.further) {
            return Err("the ranges of the host and of the guest differ in length".to_owned());
        }
        Ok(Self { protocol, address, host, guest })
    }

    /// The forwarded ports, if the user has named those of the host.
    fn without_assignment(&self) -> Option<PortForward> {
        let host = self.host.filter(|host| host.further == self.guest.further)?;
        Some(PortForward { further: host.further, ..self.forward(self.guest.first, host.first) })
    }

    /// Chooses a port of the host for each port of the guest.
    fn assign(&self, ports: &mut HostPorts) -> Result<Vec<PortForward>, String> {
        /// Maximum number of ports that are assigned for one option. A socket is bound for each.
        const ASSIGNED_MAX: u16 = 256;
        if self.guest.further >= ASSIGNED_MAX {
            return Err(format!("at most {ASSIGNED_MAX} ports can be assigned; name those of the host"));
        }
        let mut assign_one = |guest: u16| {
            let (port, socket) = self.free_port(ports)?;
            ports.taken.insert((self.protocol, port), HostPort { guest, addresses: vec![self.address] });
            ports.sockets.push(socket);
            Ok(self.forward(guest, port))
        };
        (0..=self.guest.further).map(|number| assign_one(self.guest.first.saturating_add(number))).collect()
    }

    /// Finds and binds a port of the host that is free.
    fn free_port(&self, ports: &HostPorts) -> Result<(u16, OwnedFd), String> {
        let Some(range) = self.host else {
            // The kernel may choose a port that is published at another address.
            /// Maximum number of such choices.
            const ATTEMPTS: usize = 100;
            let mut refused = Vec::new();
            for _ in 0..ATTEMPTS {
                let (socket, port) =
                    bind(self.protocol, self.address, 0).map_err(|error| self.reason(0, &error))?;
                if !ports.is_taken(self.protocol, port) {
                    return Ok((port, socket));
                }
                refused.push(socket);
            }
            return Err("no port of the host is free; name one: HOST:GUEST".to_owned());
        };
        let last = range.first.saturating_add(range.further);
        for port in (range.first..=last).filter(|&port| !ports.is_taken(self.protocol, port)) {
            match bind(self.protocol, self.address, port) {
                Ok((socket, port)) => return Ok((port, socket)),
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
                Err(error) => return Err(self.reason(port, &error)),
            }
        }
        Err(format!("all ports of the host from {} to {last} are in use; choose a larger range", range.first))
    }

    /// Why a port of the host cannot be bound.
    fn reason(&self, port: u16, error: &io::Error) -> String {
        match (error.kind(), self.address) {
            (io::ErrorKind::PermissionDenied, _) => {
                format!("no permission to use port {port} of the host; choose ports from 1024 on")
            }
            (io::ErrorKind::AddrNotAvailable, Some(address)) => {
                format!("{address} is not an address of this host")
            }
            _ => format!("no port of the host can be assigned: {error}"),
        }
    }

    const fn forward(&self, guest: u16, host: u16) -> PortForward {
        PortForward { protocol: self.protocol, address: self.address, host, guest, further: 0 }
    }
}

/// Binds a port, or a free one if `port` is 0. Returns the socket, which keeps the port in use, and the number of the port.
fn bind(protocol: Protocol, address: Option<IpAddr>, port: u16) -> io::Result<(OwnedFd, u16)> {
    let bind_to = |address: IpAddr| -> io::Result<(OwnedFd, u16)> {
        Ok(match protocol {
            Protocol::Tcp => {
                let listener = TcpListener::bind((address, port))?;
                let port = listener.local_addr()?.port();
                (listener.into(), port)
            }
            Protocol::Udp => {
                let socket = UdpSocket::bind((address, port))?;
                let port = socket.local_addr()?.port();
                (socket.into(), port)
            }
        })
    };
    // By default, a socket on all IPv6 addresses includes all IPv4 addresses (ipv6(7), IPV6_V6ONLY).
    match (address, bind_to(address.unwrap_or(Ipv6Addr::UNSPECIFIED.into()))) {
        // The host has no IPv6.
        (None, Err(error)) if error.kind() != io::ErrorKind::AddrInUse => {
            bind_to(Ipv4Addr::UNSPECIFIED.into())
        }
        (_, result) => result,
    }
}

const FORM: &str =
    "it is not of the form [[ADDRESS:][HOST]:]GUEST[/tcp|/udp], such as 8080:80 or 127.0.0.1:5353:53/udp";

/// Parses an address of the host. An IPv6 address is in brackets.
fn parse_address(text: &str) -> Result<IpAddr, String> {
    let inner = text.strip_prefix('[').and_then(|text| text.strip_suffix(']'));
    let address = match inner {
        Some(inner) => inner.parse::<Ipv6Addr>().ok().map(IpAddr::from),
        None => text.parse::<Ipv4Addr>().ok().map(IpAddr::from),
    };
    address.ok_or_else(|| {
        format!("{text:?} is not an address of the host such as 127.0.0.1 or [::1]; the form is ADDRESS:HOST:GUEST")
    })
}

impl Ports {
    fn parse(text: &str) -> Result<Self, String> {
        let is_number = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
        let port = |text: &str| text.parse::<u16>().ok().filter(|&port| port != 0 && is_number(text));
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        match (port(first), port(last)) {
            (Some(first), Some(last)) if first <= last => Ok(Self { first, further: last - first }),
            _ => Err(format!(
                "{text:?} is not a port, 1 to 65535, nor a range of them such as 8000-8010; {FORM}"
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Publishes ports; returns those that were assigned, and all as text.
    fn publish(texts: &[&str]) -> Result<(Vec<PortForward>, Vec<String>), String> {
        let mut devices = Devices::default();
        devices.network_interfaces.push(NetworkInterface::new("net0", "user"));
        let texts: Vec<_> = texts.iter().map(OsString::from).collect();
        let assigned = publish_all(&texts, &mut devices).map_err(|error| error.to_string())?;
        let all = devices.network_interfaces[0].forwards.iter().map(PortForward::to_string).collect();
        Ok((assigned, all))
    }

    #[test]
    fn published_ports_have_the_syntax_of_docker() {
        let forward = |protocol, address: Option<&str>, host, guest, further| PortForward {
            protocol,
            address: address.map(|address| address.parse().unwrap()),
            host,
            guest,
            further,
        };
        let (tcp, udp) = (Protocol::Tcp, Protocol::Udp);
        for (text, expected) in [
            ("8080:80", forward(tcp, None, 8080, 80, 0)),
            ("8080:80/tcp", forward(tcp, None, 8080, 80, 0)),
            ("53:53/udp", forward(udp, None, 53, 53, 0)),
            ("8080:80/TCP", forward(tcp, None, 8080, 80, 0)),
            ("53:53/Udp", forward(udp, None, 53, 53, 0)),
            ("127.0.0.1:8080:80", forward(tcp, Some("127.0.0.1"), 8080, 80, 0)),
            ("0.0.0.0:8080:80/udp", forward(udp, Some("0.0.0.0"), 8080, 80, 0)),
            ("[::1]:8080:80", forward(tcp, Some("::1"), 8080, 80, 0)),
            ("[2001:db8::1]:53:5353/udp", forward(udp, Some("2001:db8::1"), 53, 5353, 0)),
            ("8000-8010:9000-9010", forward(tcp, None, 8000, 9000, 10)),
            ("127.0.0.1:1-65535:1-65535", forward(tcp, Some("127.0.0.1"), 1, 1, 65534)),
        ] {
            assert_eq!(
                PublishRequest::parse(text).map(|request| request.without_assignment()),
                Ok(Some(expected)),
                "{text}"
            );
        }
    }

    #[test]
    fn ports_that_the_user_does_not_name_are_assigned() {
        let (all, _) = publish(&["80", ":81", "0:82/udp", "127.0.0.1::83", "127.0.0.1::90-92/udp"]).unwrap();
        let guests: Vec<_> =
            all.iter().map(|forward| (forward.guest, forward.protocol, forward.address)).collect();
        let (tcp, udp, local) = (Protocol::Tcp, Protocol::Udp, Some(IpAddr::from(Ipv4Addr::LOCALHOST)));
        let expected = [
            (80, tcp, None),
            (81, tcp, None),
            (82, udp, None),
            (83, tcp, local),
            (90, udp, local),
            (91, udp, local),
            (92, udp, local),
        ];
        assert_eq!(guests, expected);
        for (number, forward) in all.iter().enumerate() {
            assert!(forward.host != 0 && forward.further == 0);
            let is_same =
                |other: &PortForward| (other.host, other.protocol) == (forward.host, forward.protocol);
            assert!(!all[..number].iter().any(is_same), "port {} is assigned twice", forward.host);
        }
        // Of a range, the first port that is free, and that no other option has.
        let used = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = used.local_addr().unwrap().port();
        let range =
            |address: &str, guest: u16| format!("{address}:{port}-{}:{guest}", port.saturating_add(40));
        let (all, _) = publish(&[&range("127.0.0.1", 80), &range("127.0.0.1", 81)]).unwrap();
        assert!(port < all[0].host && all[0].host < all[1].host, "{all:?}");
        let message = publish(&["8000:1", "8001:2", "127.0.0.1:8000-8001:80"]).unwrap_err();
        assert!(
            message.ends_with("all ports of the host from 8000 to 8001 are in use; choose a larger range")
        );
        let message = publish(&["192.0.2.200::80"]).unwrap_err();
        assert!(message.ends_with("192.0.2.200 is not an address of this host"), "{message}");
        assert!(publish(&["1-65535"]).unwrap_err().contains("at most 256 ports can be assigned"));
    }

    #[test]
    fn a_port_of_the_host_leads_to_one_port_of_the_guest() {
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = free.local_addr().unwrap().port();
        drop(free);
        // A port that the user names is not assigned, even if it is named later, or at another address.
        for named in [format!("{port}:81"), format!("[::1]:{port}:81")] {
            let range = format!("127.0.0.1:{port}-{}:80", port.saturating_add(40));
            let (assigned, all) = publish(&[&range, &named]).unwrap();
            assert!(assigned[0].host > port && all.len() == 2, "{all:?}");
        }
        assert!(publish(&["127.0.0.1:8080:80", "[::1]:8080:80", "8080:80/udp"]).is_ok());
        for (texts, expected) in [
            (["8080:80", "8080:80"], "port 8080 of the host is published twice"),
            (["127.0.0.1:8080:80", "8070-8090:70-90"], "port 8080 of the host is published twice"),
            (["127.0.0.1:8080:80", "[::1]:8080:81"], "for port 80 of the guest too"),
        ] {
            let message = publish(&texts).unwrap_err();
            assert!(message.contains(expected), "{message}");
        }
    }

    #[test]
    fn errors_name_the_invalid_part() {
        for (text, expected) in [
            ("", "not of the form"),
            ("80:", "\"\" is not a port"),
            ("80:0", "\"0\" is not a port"),
            ("65536:80", "\"65536\" is not a port"),
            ("+80:80", "\"+80\" is not a port"),
            ("80:80/", "\"\" is neither tcp nor udp"),
            ("80:80/sctp", "\"sctp\" is neither tcp nor udp"),
            ("80:80/tcp/tcp", "\"tcp/tcp\" is neither tcp nor udp"),
            ("localhost:80:80", "\"localhost\" is not an address of the host"),
            ("::1:80:80", "\"::1\" is not an address of the host"),
            ("[127.0.0.1]:80:80", "\"[127.0.0.1]\" is not an address of the host"),
            ("127.0.0.256:80:80", "\"127.0.0.256\" is not an address"),
            ("[::1]:80", "\"[:\" is not an address"),
            ("0-1:80-81", "\"0-1\" is not a port"),
            ("localhost::80", "\"localhost\" is not an address of the host"),
            ("8000-8010:80-81", "differ in length"),
            ("8000-8000:80-81", "differ in length"),
            ("8010-8000:80-90", "\"8010-8000\" is not a port"),
            ("1-2-3:1-3", "\"1-2-3\" is not a port"),
            ("a:b", "\"a\" is not a port"),
        ] {
            let message = PublishRequest::parse(text).unwrap_err();
            assert!(message.contains(expected), "{text:?}: {message}");
        }
    }
}
