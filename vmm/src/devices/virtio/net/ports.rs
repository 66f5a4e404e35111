//! Host ports that passt forwards to a guest.

use crate::config::devices::{PortForward, Protocol};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with, sockopt};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// The command-line arguments of passt for these ports (passt(1), `--tcp-ports`).
pub(super) fn arguments(forwards: &[PortForward]) -> Vec<String> {
    let mut arguments = Vec::new();
    for forward in forwards {
        let PortForward { protocol, address, host, guest, further } = *forward;
        let option = if protocol == Protocol::Tcp { "--tcp-ports" } else { "--udp-ports" };
        let address = address.map(|address| format!("{address}/")).unwrap_or_default();
        let range = |first: u16| match further {
            0 => first.to_string(),
            _ => format!("{first}-{}", first.saturating_add(further)),
        };
        arguments.extend([option.to_owned(), format!("{address}{}:{}", range(host), range(guest))]);
    }
    for (protocol, option) in [(Protocol::Tcp, "--tcp-ports"), (Protocol::Udp, "--udp-ports")] {
        if !forwards.iter().any(|forward| forward.protocol == protocol) {
            arguments.extend([option.to_owned(), "none".to_owned()]);
        }
    }
    arguments
}

/// Checks that no other process uses one of the ports on one of their addresses: passt ignores such ports, and
/// connections to `localhost` would reach the other process.
pub(super) fn check_free(forward: &PortForward) -> Result<(), String> {
    for (address, port) in sockets(forward) {
        match take(forward.protocol, address, port) {
            // On a host without IPv6, no IPv6 port can be in use; an address that the user has named must exist.
            Ok(()) => {}
            Err(Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL) if forward.address.is_none() => {}
            Err(error) => return Err(refused(forward, port, error)),
        }
    }
    Ok(())
}

/// Checks that passt has bound the ports: it ignores ports of an address family without a default route on the host,
/// and runs nevertheless.
pub(super) fn check_taken(forward: &PortForward) -> Result<(), String> {
    // Without an address, a bound port in one of the families is sufficient.
    let is_taken = |(address, port)| take(forward.protocol, address, port) == Err(Errno::ADDRINUSE);
    let mut ports = (0..=forward.further).map(|number| forward.host.saturating_add(number));
    let free = ports.find(|port| !sockets(forward).filter(|socket| socket.1 == *port).any(is_taken));
    match (free, forward.address) {
        (None, _) => Ok(()),
        (Some(port), Some(IpAddr::V6(address))) => {
            Err(format!("passt did not bind port {port} of {address}: this host has no IPv6 route"))
        }
        (Some(port), _) => Err(format!("passt did not bind port {port} of the host")),
    }
}

/// All combinations of addresses and ports.
fn sockets(forward: &PortForward) -> impl Iterator<Item = (IpAddr, u16)> {
    const ALL: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)];
    let PortForward { address, host, further, .. } = *forward;
    let addresses = address.map_or_else(|| ALL.to_vec(), |address| vec![address]);
    let ports = (0..=further).map(move |number| host.saturating_add(number));
    ports.flat_map(move |port| addresses.clone().into_iter().map(move |address| (address, port)))
}

/// Binds a port and releases it again. IPv6 sockets do not include IPv4, which is checked separately.
fn take(protocol: Protocol, address: IpAddr, port: u16) -> Result<(), Errno> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let kind = if protocol == Protocol::Tcp { SocketType::STREAM } else { SocketType::DGRAM };
    let socket = socket_with(family, kind, SocketFlags::CLOEXEC, None)?;
    if address.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    if protocol == Protocol::Udp {
        return bind(&socket, &SocketAddr::new(address, port));
    }
    // Connections in the state TIME_WAIT are not an obstacle.
    sockopt::set_socket_reuseaddr(&socket, true)?;
    bind(&socket, &SocketAddr::new(address, port))?;
    listen(&socket, 1)
}

fn refused(forward: &PortForward, port: u16, error: Errno) -> String {
    let of = forward.address.map_or_else(|| "the host".to_owned(), |address| address.to_string());
    match error {
        Errno::ADDRINUSE => format!("port {port} of {of} is in use; choose another port"),
        Errno::ACCESS => format!("no permission to use port {port} of {of}; choose a port from 1024 on"),
        Errno::ADDRNOTAVAIL => format!("{of} is not an address of this host"),
        error => format!("port {port} of {of}: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, UdpSocket};

    fn forward(protocol: Protocol, address: Option<&str>, host: u16) -> PortForward {
        let address = address.map(|address| address.parse().unwrap());
        PortForward { protocol, address, host, guest: 80, further: 0 }
    }

    #[test]
    fn arguments_contain_addresses_protocols_and_ranges() {
        let (tcp, udp) = (Protocol::Tcp, Protocol::Udp);
        let all = [
            forward(tcp, None, 8080),
            forward(tcp, Some("127.0.0.1"), 8081),
            PortForward { further: 2, ..forward(tcp, Some("::1"), 8090) },
        ];
        let text = arguments(&all).join(" ");
        let expected = "--tcp-ports 8080:80 --tcp-ports 127.0.0.1/8081:80 --tcp-ports ::1/8090-8092:80-82 --udp-ports none";
        assert_eq!(text, expected);
        assert_eq!(arguments(&[forward(udp, None, 53)]).join(" "), "--udp-ports 53:80 --tcp-ports none");
        assert_eq!(arguments(&[]).join(" "), "--tcp-ports none --udp-ports none");
    }

    /// Another process's port on one address is detected, wherever passt would bind.
    #[test]
    fn ports_in_use_are_detected() {
        let (tcp, udp) = (Protocol::Tcp, Protocol::Udp);
        let hosts = ["127.0.0.1", "::1"].into_iter().filter(|host| UdpSocket::bind((*host, 0)).is_ok());
        for host in hosts {
            let listener = TcpListener::bind((host, 0)).unwrap();
            let port = listener.local_addr().unwrap().port();
            let in_use =
                |forward: PortForward| check_free(&forward).is_err_and(|error| error.contains("is in use"));
            assert!(in_use(forward(tcp, None, port)), "{host}");
            assert!(in_use(forward(tcp, Some(host), port)), "{host}");
            assert!(in_use(PortForward { further: 1, ..forward(tcp, None, port - 1) }), "{host}");
            check_free(&forward(udp, Some(host), port)).unwrap();
            check_taken(&forward(tcp, Some(host), port)).unwrap();
            drop(listener);
            check_free(&forward(tcp, Some(host), port)).unwrap();
            assert!(
                check_taken(&forward(tcp, Some(host), port)).unwrap_err().contains("passt did not bind port")
            );
            let socket = UdpSocket::bind((host, 0)).unwrap();
            let port = socket.local_addr().unwrap().port();
            assert!(in_use(forward(udp, None, port)), "{host}");
        }
        let message = check_free(&forward(tcp, Some("192.0.2.200"), 8080)).unwrap_err();
        assert_eq!(message, "192.0.2.200 is not an address of this host");
    }
}
