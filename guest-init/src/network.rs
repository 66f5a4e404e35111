//! Network interfaces: loopback in every guest, and the addresses from the configuration.
//!
//! The kernel's own `ip=` would wait 20 ms for a carrier that is already present.
#![expect(unsafe_code, reason = "ioctls without a safe wrapper")]

use crate::console::print;
use core::fmt::{self, Write};
use guest_protocol::config::Network;
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::ioctl::{Opcode, Setter, ioctl};
use rustix::net::{AddressFamily, SocketType, socket};

// linux/sockios.h.
const SIOCADDRT: Opcode = 0x890b;
const SIOCSIFFLAGS: Opcode = 0x8914;
const SIOCSIFADDR: Opcode = 0x8916;
const SIOCSIFNETMASK: Opcode = 0x891c;

/// `struct ifreq` of linux/if.h: the name of an interface, and the value to set.
#[repr(C)]
struct Request<T> {
    name: [u8; 16],
    value: T,
}

/// Flags in the union of `struct ifreq`.
#[repr(C)]
struct Flags {
    flags: u16,
    padding: [u8; 22],
}

/// `struct sockaddr_in` of linux/in.h.
#[derive(Clone, Copy)]
#[repr(C)]
struct Address {
    family: u16,
    port: u16,
    address: [u8; 4],
    padding: [u8; 8],
}

/// An address in the union of `struct ifreq`.
#[repr(C)]
struct PaddedAddress {
    address: Address,
    padding: [u8; 8],
}

/// `struct rtentry` of linux/route.h.
#[repr(C)]
struct Route {
    padding: usize,
    target: Address,
    gateway: Address,
    mask: Address,
    flags: u16,
    rest: [usize; 7],
}

impl Address {
    const fn new(address: [u8; 4]) -> Self {
        const AF_INET: u16 = 2;
        Self { family: AF_INET, port: 0, address, padding: [0; 8] }
    }
}

/// Brings the loopback interface up. A kernel without networking has none.
pub(crate) fn bring_up_loopback() {
    let Ok(socket) = any_socket() else { return };
    if let Err(error) = bring_up(&socket, name(format_args!("lo"))) {
        print(format_args!("init: cannot bring lo up: {error}\n"));
    }
}

/// Assigns addresses to the network interfaces. An interface that fails stays without an address.
pub(crate) fn configure(networks: &[Network]) {
    for network in networks {
        if let Err(error) = any_socket().and_then(|socket| set_up(&socket, network)) {
            print(format_args!("init: cannot set up eth{}: {error}\n", network.card));
        }
    }
}

fn any_socket() -> Result<OwnedFd, Errno> {
    socket(AddressFamily::INET, SocketType::DGRAM, None)
}

fn name(text: fmt::Arguments<'_>) -> [u8; 16] {
    let mut line = Line::<16>::default();
    let _ = line.write_fmt(text);
    line.bytes
}

/// A short text without a heap: formatting with `alloc` would link the unwinder.
struct Line<const N: usize> {
    bytes: [u8; N],
    length: usize,
}

impl<const N: usize> Default for Line<N> {
    fn default() -> Self {
        Self { bytes: [0; N], length: 0 }
    }
}

impl<const N: usize> Write for Line<N> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let end = self.length + text.len();
        self.bytes.get_mut(self.length..end).ok_or(fmt::Error)?.copy_from_slice(text.as_bytes());
        self.length = end;
        Ok(())
    }
}

fn bring_up(socket: &OwnedFd, name: [u8; 16]) -> Result<(), Errno> {
    const IFF_UP: u16 = 1;
    let request = Request { name, value: Flags { flags: IFF_UP, padding: [0; 22] } };
    // SAFETY: SIOCSIFFLAGS reads a struct ifreq, which Request lays out in full size.
    unsafe { ioctl(socket, Setter::<SIOCSIFFLAGS, _>::new(request)) }
}

fn set_up(socket: &OwnedFd, network: &Network) -> Result<(), Errno> {
    let name = name(format_args!("eth{}", network.card));
    let request = |address| {
        let value = PaddedAddress { address: Address::new(address), padding: [0; 8] };
        Request { name, value }
    };
    // The frame's prefix is at most 32. A prefix of 0 is a mask of 0, where the shift overflows.
    let mask = u32::MAX.checked_shl(32 - u32::from(network.prefix)).unwrap_or(0).to_be_bytes();
    // SAFETY: both read a struct ifreq, which Request lays out in full size.
    unsafe {
        ioctl(socket, Setter::<SIOCSIFADDR, _>::new(request(network.address)))?;
        ioctl(socket, Setter::<SIOCSIFNETMASK, _>::new(request(mask)))?;
    }
    bring_up(socket, name)?;
    network.gateway.map_or(Ok(()), |gateway| add_default_route(socket, gateway))
}

fn add_default_route(socket: &OwnedFd, gateway: [u8; 4]) -> Result<(), Errno> {
    const RTF_UP: u16 = 1;
    const RTF_GATEWAY: u16 = 2;
    let any = Address::new([0; 4]);
    let route = Route {
        padding: 0,
        target: any,
        gateway: Address::new(gateway),
        mask: any,
        flags: RTF_UP | RTF_GATEWAY,
        rest: [0; 7],
    };
    // SAFETY: SIOCADDRT reads a struct rtentry, which Route lays out in full size; it names no device.
    match unsafe { ioctl(socket, Setter::<SIOCADDRT, _>::new(route)) } {
        // A copy has it already.
        Err(Errno::EXIST) => Ok(()),
        result => result,
    }
}

// The sizes that the ioctls read on x86-64.
const _: () = assert!(size_of::<Request<Flags>>() == 40 && size_of::<Request<PaddedAddress>>() == 40);
const _: () = assert!(size_of::<Route>() == 120);
