//! The text form of network cards and published ports: the values of `--net` and `--publish`.

use kindling_vmm::config::devices::{Devices, NetworkInterface, PortForward, Protocol};
use std::ffi::{OsStr, OsString};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

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

/// Parses published ports, and adds them to the first network card of kind `user`.
///
/// # Errors
/// When a text is invalid, or there is no such card.
pub fn publish_all(texts: &[OsString], devices: &mut Devices) -> Result<(), NetworkError> {
    for text in texts {
        let wrong = |what: &str| NetworkError {
            option: "publish",
            value: text.to_string_lossy().into_owned(),
            what: what.to_owned(),
        };
        let forward = parse_publish(&text.to_string_lossy()).map_err(|what| wrong(&what))?;
        let interface = devices.network_interfaces.iter_mut().find(|card| card.is_user());
        interface.ok_or_else(|| wrong("it needs --net user"))?.forwards.push(forward);
    }
    Ok(())
}

/// Parses a published port with the syntax of `docker run --publish`: `[ADDRESS:]HOST:GUEST[/tcp|/udp]`. HOST and GUEST
/// are ports from 1 to 65535, or ranges of the same length.
///
/// # Errors
/// When the text is invalid; the error is a message that names the part and the expected form.
pub fn parse_publish(text: &str) -> Result<PortForward, String> {
    let (rest, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    let protocol = match protocol {
        _ if protocol.eq_ignore_ascii_case("tcp") => Protocol::Tcp,
        _ if protocol.eq_ignore_ascii_case("udp") => Protocol::Udp,
        _ => return Err(format!("{protocol:?} is neither tcp nor udp")),
    };
    let (address, ports) = match rest.rsplitn(3, ':').collect::<Vec<_>>()[..] {
        [guest, host, address] => (Some(parse_address(address)?), [host, guest]),
        [guest, host] => (None, [host, guest]),
        [_] if rest.is_empty() => return Err(FORM.to_owned()),
        _ => return Err(NO_HOST_PORT.to_owned()),
    };
    if ports[0].is_empty() {
        return Err(NO_HOST_PORT.to_owned());
    }
    let [host, guest] = [parse_ports(ports[0])?, parse_ports(ports[1])?];
    if host.1 != guest.1 {
        return Err("the ranges of the host and of the guest differ in length".to_owned());
    }
    Ok(PortForward { protocol, address, host: host.0, guest: guest.0, further: host.1 })
}

const FORM: &str =
    "it is not of the form [ADDRESS:]HOST:GUEST[/tcp|/udp], such as 8080:80 or 127.0.0.1:5353:53/udp";
const NO_HOST_PORT: &str =
    "it names no port of the host, and none is assigned automatically: write HOST:GUEST";

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

/// Parses a port or a range of ports. Returns the first port, and the number of ports that follow it.
fn parse_ports(text: &str) -> Result<(u16, u16), String> {
    let is_number = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    let port = |text: &str| text.parse::<u16>().ok().filter(|&port| port != 0 && is_number(text));
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    match (port(first), port(last)) {
        (Some(first), Some(last)) if first <= last => Ok((first, last - first)),
        _ => {
            Err(format!("{text:?} is not a port, 1 to 65535, nor a range of them such as 8000-8010; {FORM}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
            assert_eq!(parse_publish(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn errors_name_the_invalid_part() {
        for (text, expected) in [
            ("", "not of the form"),
            ("80", "names no port of the host"),
            ("127.0.0.1::80", "names no port of the host"),
            (":80", "names no port of the host"),
            ("80:", "\"\" is not a port"),
            ("0:80", "\"0\" is not a port"),
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
            ("8000-8010:80", "differ in length"),
            ("8010-8000:80-90", "\"8010-8000\" is not a port"),
            ("1-2-3:1-3", "\"1-2-3\" is not a port"),
            ("a:b", "\"a\" is not a port"),
        ] {
            let message = parse_publish(text).unwrap_err();
            assert!(message.contains(expected), "{text:?}: {message}");
        }
    }
}
