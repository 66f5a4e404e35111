//! `kindling port`: prints the published ports of a guest.

use crate::command_line::{Argument, Command, Store, any, one, store_as};
use crate::{STATUS_BAD_REQUEST, print, print_error, print_message};
use kindling::guest::Guest;
use kindling::network::{PortForward, Protocol};
use std::net::{Ipv4Addr, SocketAddr};

#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Arguments {
    name: String,
    ports: Vec<(u16, Protocol)>,
}

pub(crate) const COMMAND: Command<Arguments> =
    Command::new("port", "Print the published ports of a guest", run).arguments(ARGUMENTS);

#[rustfmt::skip]
const ARGUMENTS: &[Argument<Arguments>] = &[
    one("NAME", |all, word| all.name.store(word),
        "Name of the guest"),
    any("PORT[/tcp|/udp]", |all, word| {
            let mut asked = (0, Protocol::Tcp);
            store_as(&mut asked, word, port)?;
            all.ports.push(asked);
            Ok(())
        },
        "Print only the host's addresses of these ports of the guest [default: all ports, as GUEST -> HOST]"),
];

/// Parses a port of the guest.
fn port(text: &str) -> Result<(u16, Protocol), &'static str> {
    let (number, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    let number = number.parse().ok().filter(|_| number.bytes().all(|byte| byte.is_ascii_digit()));
    number.zip(protocol.parse().ok()).ok_or("expected a port of the guest such as 80 or 53/udp")
}

/// Prints the ports. Returns the exit status.
fn run(arguments: &Arguments, _: kindling::timeline::Instant) -> u8 {
    let guest = match Guest::open_running(&arguments.name) {
        Ok(guest) => guest,
        Err(error) => {
            print_error(&error);
            return crate::status(error.is_user_error());
        }
    };
    let published: Vec<_> = guest.record.ports.iter().flat_map(each_port).collect();
    let mut text = String::new();
    let mut status = 0;
    if arguments.ports.is_empty() {
        text.extend(published.iter().map(|(guest, host)| format!("{} -> {host}\n", guest_port(*guest))));
    }
    for &asked in &arguments.ports {
        let hosts: Vec<_> = published
            .iter()
            .filter(|(guest, _)| *guest == asked)
            .map(|(_, host)| format!("{host}\n"))
            .collect();
        if hosts.is_empty() {
            let name = &arguments.name;
            print_message(&format!(
                "the guest {name} does not publish {}; `kindling port {name}` prints all ports",
                guest_port(asked)
            ));
            status = STATUS_BAD_REQUEST;
        }
        text.extend(hosts);
    }
    print(text.as_bytes()).max(status)
}

/// The ports of a range: that of the guest, and the address on the host.
fn each_port(forward: &PortForward) -> impl Iterator<Item = ((u16, Protocol), SocketAddr)> {
    let PortForward { protocol, address, host, guest, further } = *forward;
    let address = address.unwrap_or(Ipv4Addr::UNSPECIFIED.into());
    (0..=further).map(move |number| {
        ((guest.saturating_add(number), protocol), SocketAddr::new(address, host.saturating_add(number)))
    })
}

fn guest_port((port, protocol): (u16, Protocol)) -> String {
    format!("{port}/{protocol}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_of_a_guest_are_parsed_or_refused() {
        assert_eq!(port("80"), Ok((80, Protocol::Tcp)));
        assert_eq!(port("53/UDP"), Ok((53, Protocol::Udp)));
        for text in ["", "x", "+80", "65536", "80/", "80/sctp", "80:80", "-1"] {
            assert!(port(text).unwrap_err().contains("such as 80 or 53/udp"), "{text}");
        }
    }

    #[test]
    fn each_port_of_a_range_has_its_address() {
        let forward = PortForward {
            protocol: Protocol::Udp,
            address: Some("::1".parse().unwrap()),
            host: 8080,
            guest: 80,
            further: 1,
        };
        let lines: Vec<_> =
            each_port(&forward).map(|(guest, host)| format!("{} -> {host}", guest_port(guest))).collect();
        assert_eq!(lines, ["80/udp -> [::1]:8080", "81/udp -> [::1]:8081"]);
    }
}
