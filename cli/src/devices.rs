//! Device options of the command line.

use crate::command_line::{Opt, Store, flag, option};
use kindling::network::{self, NetworkError, PortForward};
use kindling::vmm::config::devices::{Balloon, Devices, Drive, Entropy, Pmem, Vsock};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

/// Device options as text, which [`DeviceArguments::add_to`] parses.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct DeviceArguments {
    pub(crate) drive: Vec<OsString>,
    pub(crate) net: Vec<OsString>,
    pub(crate) publish: Vec<OsString>,
    pub(crate) vsock: Option<OsString>,
    pub(crate) entropy: bool,
    /// In MiB.
    pub(crate) balloon: Option<u64>,
    pub(crate) pmem: Vec<OsString>,
}

/// The device options of a command whose arguments are `A`.
pub(crate) struct DeviceOptions<A>(std::marker::PhantomData<A>);

impl<A: AsMut<DeviceArguments> + 'static> DeviceOptions<A> {
    #[rustfmt::skip]
    pub(crate) const TABLE: &'static [Opt<A>] = &[
        option("", "drive", "PATH[:ro][:direct]", |all, word| all.as_mut().drive.store(word),
            "Attach a disk: a raw file or a block device, in the guest /dev/vda and so on; :ro is read-only, :direct \
             bypasses the page cache of the host (repeatable)"),
        option("", "net", "TAP|user[,OPTION]...", |all, word| all.as_mut().net.store(word),
            "Attach a network card: to a tap device, or user for passt, without root; options are mac=MAC, mtu=BYTES, \
             ip=ADDRESS/PREFIX, gw=ADDRESS and dns=ADDRESS (repeatable)"),
        option("p", "publish", "[[ADDRESS:][HOST]:]GUEST[/tcp|/udp]", |all, word| all.as_mut().publish.store(word),
            "Publish a port of the guest on the host, by --net user; without HOST, on any free port (repeatable)"),
        option("", "vsock", "PATH", |all, word| all.as_mut().vsock.store(word),
            "Attach a vsock, with this Unix socket on the host"),
        flag("", "entropy", |all| all.as_mut().entropy = true,
            "Attach a source of random numbers"),
        option("", "balloon", "MIB", |all, word| all.as_mut().balloon.store(word),
            "Attach a balloon of this initial size, which also reports free pages to the host"),
        option("", "pmem", "PATH[:ro]", |all, word| all.as_mut().pmem.store(word),
            "Attach a file as persistent memory, in the guest /dev/pmem0 and so on; :ro is read-only (repeatable)"),
    ];
}

impl DeviceArguments {
    /// Parses the options, and adds the devices to a configuration. Returns the ports of the host that were assigned.
    pub(crate) fn add_to(&self, devices: &mut Devices) -> Result<Vec<PortForward>, NetworkError> {
        for text in &self.drive {
            let number = devices.drives.len();
            devices.drives.push(drive(text, number));
        }
        for text in &self.net {
            let number = devices.network_interfaces.len();
            devices.network_interfaces.push(network::interface(text, number)?);
        }
        let assigned = network::publish_all(&self.publish, devices)?;
        if let Some(path) = &self.vsock {
            /// The lowest CID of a guest. All guests can use it, because each vsock device has a separate Unix socket.
            const GUEST_CID: u32 = 3;
            devices.vsock = Some(Vsock { guest_cid: GUEST_CID, uds_path: path.into(), vsock_id: None });
        }
        if self.entropy {
            devices.entropy = Some(Entropy::default());
        }
        if let Some(amount_mib) = self.balloon {
            devices.balloon = Some(Balloon {
                amount_mib,
                deflate_on_oom: true,
                free_page_reporting: true,
                ..Balloon::default()
            });
        }
        for text in &self.pmem {
            let id = format!("pmem{}", devices.pmem.len());
            let (path, [read_only]) = flags(text, [":ro"]);
            devices.pmem.push(Pmem {
                id,
                path_on_host: path.into(),
                root_device: false,
                read_only,
                rate_limiter: None,
            });
        }
        Ok(assigned)
    }
}

fn drive(text: &OsStr, number: usize) -> Drive {
    let (path, [is_read_only, direct]) = flags(text, [":ro", ":direct"]);
    Drive { is_read_only, direct, ..Drive::new(format!("drive{number}"), path) }
}

/// Splits a path from the flags that follow it in any order. Returns the path, and which flags were present.
fn flags<const N: usize>(text: &OsStr, names: [&str; N]) -> (OsString, [bool; N]) {
    let mut path = text.as_bytes();
    let mut found = [false; N];
    while let Some((at, rest)) =
        names.iter().enumerate().find_map(|(at, name)| Some((at, path.strip_suffix(name.as_bytes())?)))
    {
        found[at] = true;
        path = rest;
    }
    (OsString::from_vec(path.to_vec()), found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_follow_a_path_in_any_order() {
        for (text, path, expected) in [
            ("disk", "disk", [false, false]),
            ("disk:ro", "disk", [true, false]),
            ("disk:direct:ro", "disk", [true, true]),
            ("a:b:direct", "a:b", [false, true]),
            ("a:rw", "a:rw", [false, false]),
        ] {
            assert_eq!(flags(text.as_ref(), [":ro", ":direct"]), (path.into(), expected), "{text}");
        }
    }

    #[test]
    fn errors_name_the_invalid_part() {
        let add = |arguments: DeviceArguments| {
            arguments.add_to(&mut Devices::default()).map(drop).map_err(|error| error.to_string())
        };
        let net = |text: &str| add(DeviceArguments { net: vec![text.into()], ..DeviceArguments::default() });
        assert_eq!(net("tap0,mac=06:00:ac:10:00:02,mtu=9000"), Ok(()));
        assert!(
            net("tap0,mac=1").unwrap_err().contains("--net tap0,mac=1: \"1\" is not an Ethernet address")
        );
        assert!(net("tap0,mtu=x").unwrap_err().contains("\"x\" is not a number"));
        assert!(net("tap0,speed=1").unwrap_err().contains("\"speed=1\" is none of"));
        assert_eq!(net("tap0,ip=10.0.0.2/24,gw=10.0.0.1,dns=10.0.0.1"), Ok(()));
        for text in ["10.0.0.2", "10.0.0.2/0", "10.0.0.2/33", "10.0.0/24", "::1/64", ""] {
            let message = net(&format!("tap0,ip={text}")).unwrap_err();
            assert!(message.contains("is not an address with its prefix"), "{message}");
        }
        assert!(net("tap0,gw=10.0.0").unwrap_err().contains("\"10.0.0\" is not an IPv4 address"));
        let publish = |net: &[&str], text: &str| {
            let net = net.iter().map(OsString::from).collect();
            add(DeviceArguments { net, publish: vec![text.into()], ..DeviceArguments::default() })
        };
        assert_eq!(publish(&["user"], "8080:80"), Ok(()));
        assert!(publish(&["tap0"], "8080:80").unwrap_err().contains("needs --net user"));
        assert_eq!(publish(&["user"], "[::1]:8080:80/udp"), Ok(()));
        assert!(publish(&["user"], "8080:0").unwrap_err().contains("--publish 8080:0: \"0\" is not a port"));
    }
}
