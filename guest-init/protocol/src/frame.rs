//! The configuration frame: what init asks the VMM for, as a header and a list of items.
//!
//! ```text
//! "KNDL"  version: u16  zero: u16  length of the items: u32   item*
//! item = tag: u8  length: u32  bytes
//! ```
//! All integers are little-endian. Arguments, environment entries, networks, groups and mounts keep their order; every
//! other item appears at most once. Decoding borrows from the frame and allocates nothing.

use crate::terminal::TerminalSize;
use core::fmt;

const MAGIC: [u8; 4] = *b"KNDL";
const VERSION: u16 = 1;
const HEADER_LEN: usize = 12;
const ITEM_HEADER_LEN: usize = 5;

/// The longest argument or environment entry in bytes: Linux's limit without the NUL at the end (MAX_ARG_STRLEN in
/// include/uapi/linux/binfmts.h).
pub const MAX_STRING: usize = 128 * 1024 - 1;

/// Bytes that arguments and environment may take together: what Linux leaves them of a stack of 8 MiB
/// (`bprm_stack_limits` in fs/exec.c).
pub const MAX_STRINGS: usize = 2 << 20;

/// What Linux counts for a string beside its bytes: the NUL at its end and a pointer. It is more than an item's header.
const STRING_OVERHEAD: usize = 9;

/// The longest frame in bytes: the longest arguments and environment, and room for everything else.
pub const MAX_FRAME: usize = MAX_STRINGS + 256 * 1024;

/// One statement of the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Item<'a> {
    /// The next element of the payload's argument vector; the first names the program.
    Argument(&'a [u8]),
    /// The next environment entry, `NAME=value`.
    Environment(&'a [u8]),
    /// The payload's working directory.
    WorkingDirectory(&'a [u8]),
    /// The guest's hostname.
    Hostname(&'a [u8]),
    /// The payload's user id.
    UserId(u32),
    /// The payload's group id.
    GroupId(u32),
    /// Nanoseconds from the creation of the VM until this frame was made.
    VmAge(u64),
    /// Init sends the kernel's log over its port before the guest ends.
    KernelLog,
    /// Nanoseconds since 1970 when this frame was made. Stands where the kernel's own time is that of
    /// another guest: it was booted earlier, and its machine continued from there.
    RealTime(u64),
    /// Random bytes from the host, where the kernel's own are those of another guest.
    Entropy(&'a [u8]),
    /// The device of the image's root filesystem, such as `/dev/vda`, which init mounts below a writable overlay
    /// and enters. Where there is none the initramfs is the root.
    RootDevice(&'a [u8]),
    /// The address of a network card; any number of them.
    Network(Network),
    /// Another group of the payload; any number of them.
    Group(u32),
    /// The payload gets a terminal of this size.
    Terminal(TerminalSize),
    /// The payload's streams lead to the agent, which serves as long as the guest lives.
    Agent,
    /// A filesystem that init mounts in the root before the payload runs; any number of them.
    Mount(Mount<'a>),
    /// The root can be read alone when all is mounted.
    ReadOnlyRoot,
}

/// A filesystem of the host's, and where it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mount<'a> {
    /// What it is.
    pub kind: MountKind,
    /// Whether the guest may only read.
    pub is_read_only: bool,
    /// The disk, such as `/dev/vda`, or the device's tag.
    pub source: &'a [u8],
    /// The directory, which is made where it is missing.
    pub target: &'a [u8],
}

/// What a [`Mount`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum MountKind {
    /// A volume: a disk with ext4.
    Volume = 1,
    /// A folder of the host's, through virtio-fs.
    Folder = 2,
}

impl<'a> Mount<'a> {
    /// Kind, access and length of the source, which stand in front of source and target.
    const HEAD: usize = 4;

    fn from_bytes(bytes: &'a [u8]) -> Option<Self> {
        let (&[kind, access, low, high], names) = bytes.split_first_chunk()?;
        let kind = [MountKind::Volume, MountKind::Folder].into_iter().find(|&known| known as u8 == kind)?;
        let (source, target) = names.split_at_checked(u16::from_le_bytes([low, high]).into())?;
        (access <= 1).then_some(Self { kind, is_read_only: access == 1, source, target })
    }

    fn write<S: Extend<u8>>(&self, sink: &mut S) -> Result<(), FrameError> {
        let length = u16::try_from(self.source.len()).map_err(|_| FrameError::TooLong)?;
        sink.extend([self.kind as u8, self.is_read_only.into()]);
        sink.extend(length.to_le_bytes());
        sink.extend(self.source.iter().chain(self.target).copied());
        Ok(())
    }
}

/// What a network card is told before the payload runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Network {
    /// The card's number: 1 for the kernel's `eth1`.
    pub card: u8,
    /// Bits of the address that are its network's, at most 32.
    pub prefix: u8,
    /// IPv4 address.
    pub address: [u8; 4],
    /// Where packets go that are for no network of the guest's.
    pub gateway: Option<[u8; 4]>,
    /// Who knows the addresses of names.
    pub nameserver: Option<[u8; 4]>,
}

impl Network {
    const LENGTH: usize = 14;

    /// An address of zeroes stands for none.
    fn to_bytes(self) -> [u8; Self::LENGTH] {
        let mut bytes = [0; Self::LENGTH];
        bytes[0] = self.card;
        bytes[1] = self.prefix;
        bytes[2..6].copy_from_slice(&self.address);
        bytes[6..10].copy_from_slice(&self.gateway.unwrap_or_default());
        bytes[10..].copy_from_slice(&self.nameserver.unwrap_or_default());
        bytes
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let &[card, prefix @ ..=32, a, b, c, d, e, f, g, h, i, j, k, l] = bytes else { return None };
        let optional = |address| (address != [0; 4]).then_some(address);
        let (gateway, nameserver) = (optional([e, f, g, h]), optional([i, j, k, l]));
        Some(Self { card, prefix, address: [a, b, c, d], gateway, nameserver })
    }
}

impl Item<'_> {
    const fn tag(&self) -> u8 {
        match self {
            Self::Argument(_) => 1,
            Self::Environment(_) => 2,
            Self::WorkingDirectory(_) => 3,
            Self::Hostname(_) => 4,
            Self::UserId(_) => 5,
            Self::GroupId(_) => 6,
            Self::VmAge(_) => 7,
            Self::KernelLog => 8,
            Self::RealTime(_) => 9,
            Self::Entropy(_) => 10,
            Self::RootDevice(_) => 11,
            Self::Network(_) => 12,
            Self::Group(_) => 13,
            Self::Terminal(_) => 14,
            Self::Agent => 15,
            Self::Mount(_) => 16,
            Self::ReadOnlyRoot => 17,
        }
    }
}

/// Why bytes are not a configuration frame, or items do not fit one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameError {
    /// The first bytes are not those of a frame.
    Magic,
    /// The frame is of a version that this program does not read.
    Version(u16),
    /// The bytes end before the frame does, or go on after it.
    Length,
    /// An item with a tag that this program does not know.
    UnknownItem(u8),
    /// An item of fixed length with another length, or with a value that it cannot have.
    NumberLength(u8),
    /// An argument or environment entry of so many bytes, which is more than [`MAX_STRING`].
    StringTooLong(usize),
    /// Arguments and environment take so many bytes, which is more than [`MAX_STRINGS`].
    StringsTooLong(usize),
    /// The items do not fit [`MAX_FRAME`] bytes.
    TooLong,
}

impl fmt::Display for FrameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Magic => write!(f, "the configuration does not start with KNDL"),
            Self::Version(version) => {
                write!(f, "the configuration has version {version}, this side reads version {VERSION}")
            }
            Self::Length => write!(f, "the configuration's length is not what its header says"),
            Self::UnknownItem(tag) => write!(f, "the configuration has an item of unknown kind {tag}"),
            Self::NumberLength(tag) => {
                write!(f, "the configuration's item of kind {tag} has a wrong length or value")
            }
            Self::StringTooLong(length) => write!(
                f,
                "an argument or environment entry has {length} bytes; Linux takes at most {MAX_STRING}"
            ),
            Self::StringsTooLong(length) => write!(
                f,
                "arguments and environment take {length} bytes with their pointers; Linux takes at most \
                 {MAX_STRINGS}"
            ),
            Self::TooLong => write!(f, "the configuration does not fit {MAX_FRAME} bytes"),
        }
    }
}

impl core::error::Error for FrameError {}

/// Writes a frame into a byte sink that grows.
///
/// # Errors
/// When the strings are longer than Linux takes, or the items need more than [`MAX_FRAME`] bytes; the sink may then
/// hold a part of them.
pub fn encode<'a, S: Extend<u8>>(
    items: impl Iterator<Item = Item<'a>> + Clone,
    sink: &mut S,
) -> Result<(), FrameError> {
    let (mut length, mut strings) = (0usize, 0usize);
    for item in items.clone() {
        let value = value_len(&item);
        length = length.saturating_add(ITEM_HEADER_LEN).saturating_add(value);
        if matches!(item, Item::Argument(_) | Item::Environment(_)) {
            if value > MAX_STRING {
                return Err(FrameError::StringTooLong(value));
            }
            strings = strings.saturating_add(STRING_OVERHEAD).saturating_add(value);
        }
    }
    if strings > MAX_STRINGS {
        return Err(FrameError::StringsTooLong(strings));
    }
    if length > MAX_FRAME - HEADER_LEN {
        return Err(FrameError::TooLong);
    }
    let length = u32::try_from(length).map_err(|_| FrameError::TooLong)?;
    sink.extend(MAGIC);
    sink.extend(VERSION.to_le_bytes());
    sink.extend([0, 0]);
    sink.extend(length.to_le_bytes());
    for item in items {
        encode_item(&item, sink)?;
    }
    Ok(())
}

fn value_len(item: &Item<'_>) -> usize {
    match item {
        Item::Argument(bytes)
        | Item::Environment(bytes)
        | Item::WorkingDirectory(bytes)
        | Item::Hostname(bytes)
        | Item::Entropy(bytes)
        | Item::RootDevice(bytes) => bytes.len(),
        Item::UserId(_) | Item::GroupId(_) | Item::Group(_) | Item::Terminal(_) => 4,
        Item::VmAge(_) | Item::RealTime(_) => 8,
        Item::KernelLog | Item::Agent | Item::ReadOnlyRoot => 0,
        Item::Network(_) => Network::LENGTH,
        Item::Mount(mount) => Mount::HEAD + mount.source.len() + mount.target.len(),
    }
}

fn encode_item<S: Extend<u8>>(item: &Item<'_>, sink: &mut S) -> Result<(), FrameError> {
    let length = u32::try_from(value_len(item)).map_err(|_| FrameError::TooLong)?;
    sink.extend([item.tag()]);
    sink.extend(length.to_le_bytes());
    match *item {
        Item::Argument(bytes)
        | Item::Environment(bytes)
        | Item::WorkingDirectory(bytes)
        | Item::Hostname(bytes)
        | Item::Entropy(bytes)
        | Item::RootDevice(bytes) => sink.extend(bytes.iter().copied()),
        Item::UserId(id) | Item::GroupId(id) | Item::Group(id) => sink.extend(id.to_le_bytes()),
        Item::VmAge(time) | Item::RealTime(time) => sink.extend(time.to_le_bytes()),
        Item::KernelLog | Item::Agent | Item::ReadOnlyRoot => {}
        Item::Terminal(size) => sink.extend(size.to_bytes()),
        Item::Network(network) => sink.extend(network.to_bytes()),
        Item::Mount(mount) => mount.write(sink)?,
    }
    Ok(())
}

/// The items of a frame. An error ends the iteration.
///
/// # Errors
/// When the header is not that of a whole frame of a known version; the iterator's items say
/// what is wrong further in.
pub fn decode(frame: &[u8]) -> Result<Items<'_>, FrameError> {
    let (header, items) = frame.split_at_checked(HEADER_LEN).ok_or(FrameError::Length)?;
    if header[..4] != MAGIC {
        return Err(FrameError::Magic);
    }
    let version = u16::from_le_bytes([header[4], header[5]]);
    if version != VERSION {
        return Err(FrameError::Version(version));
    }
    let length = u32::from_le_bytes([header[8], header[9], header[10], header[11]]);
    if usize::try_from(length) != Ok(items.len()) {
        return Err(FrameError::Length);
    }
    Ok(Items { rest: items })
}

/// Iterator over the items of a frame; made by [`decode`].
#[derive(Clone, Debug)]
pub struct Items<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for Items<'a> {
    type Item = Result<Item<'a>, FrameError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let item = split_item(self.rest).and_then(|(tag, value, rest)| {
            self.rest = rest;
            parse_item(tag, value)
        });
        if item.is_err() {
            self.rest = &[];
        }
        Some(item)
    }
}

fn split_item(bytes: &[u8]) -> Result<(u8, &[u8], &[u8]), FrameError> {
    let (header, rest) = bytes.split_at_checked(ITEM_HEADER_LEN).ok_or(FrameError::Length)?;
    let length = u32::from_le_bytes([header[1], header[2], header[3], header[4]]);
    let length = usize::try_from(length).map_err(|_| FrameError::Length)?;
    let (value, rest) = rest.split_at_checked(length).ok_or(FrameError::Length)?;
    Ok((header[0], value, rest))
}

fn parse_item(tag: u8, value: &[u8]) -> Result<Item<'_>, FrameError> {
    let number = FrameError::NumberLength(tag);
    Ok(match tag {
        1 => Item::Argument(value),
        2 => Item::Environment(value),
        3 => Item::WorkingDirectory(value),
        4 => Item::Hostname(value),
        5 => Item::UserId(u32::from_le_bytes(value.try_into().map_err(|_| number)?)),
        6 => Item::GroupId(u32::from_le_bytes(value.try_into().map_err(|_| number)?)),
        7 => Item::VmAge(u64::from_le_bytes(value.try_into().map_err(|_| number)?)),
        8 if value.is_empty() => Item::KernelLog,
        8 => return Err(number),
        9 => Item::RealTime(u64::from_le_bytes(value.try_into().map_err(|_| number)?)),
        10 => Item::Entropy(value),
        11 => Item::RootDevice(value),
        12 => Item::Network(Network::from_bytes(value).ok_or(number)?),
        13 => Item::Group(u32::from_le_bytes(value.try_into().map_err(|_| number)?)),
        14 => Item::Terminal(TerminalSize::from_bytes(value).ok_or(number)?),
        15 if value.is_empty() => Item::Agent,
        15 => return Err(number),
        16 => Item::Mount(Mount::from_bytes(value).ok_or(number)?),
        17 if value.is_empty() => Item::ReadOnlyRoot,
        17 => return Err(number),
        _ => return Err(FrameError::UnknownItem(tag)),
    })
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use proptest::prelude::*;
    use std::vec::Vec;

    fn frame(items: &[Item<'_>]) -> Vec<u8> {
        let mut bytes = Vec::new();
        encode(items.iter().copied(), &mut bytes).unwrap();
        bytes
    }

    const EVERY_KIND: [Item<'_>; 19] = [
        Item::ReadOnlyRoot,
        Item::Group(4),
        Item::Terminal(TerminalSize { rows: 24, columns: 80 }),
        Item::Agent,
        Item::Network(Network {
            card: 1,
            prefix: 24,
            address: [10, 0, 2, 15],
            gateway: Some([10, 0, 2, 2]),
            nameserver: None,
        }),
        Item::Argument(b"/bin/sh"),
        Item::Argument(b""),
        Item::Environment(b"A=b"),
        Item::WorkingDirectory(b"/tmp"),
        Item::Hostname(b"h"),
        Item::UserId(1000),
        Item::GroupId(100),
        Item::VmAge(12_345_678_901),
        Item::KernelLog,
        Item::RealTime(1_700_000_000_000_000_000),
        Item::Entropy(&[1, 2, 3]),
        Item::RootDevice(b"/dev/vda"),
        Item::Mount(Mount {
            kind: MountKind::Volume,
            is_read_only: false,
            source: b"/dev/vdb",
            target: b"/var/lib/data",
        }),
        Item::Mount(Mount { kind: MountKind::Folder, is_read_only: true, source: b"", target: b"" }),
    ];

    #[test]
    fn every_item_survives() {
        let bytes = frame(&EVERY_KIND);
        let items: Vec<_> = decode(&bytes).unwrap().map(Result::unwrap).collect();
        assert_eq!(items, EVERY_KIND);
    }

    #[test]
    fn every_truncation_and_extension_is_an_error() {
        let bytes = frame(&EVERY_KIND);
        for length in 0..bytes.len() {
            assert_eq!(decode(&bytes[..length]).unwrap_err(), FrameError::Length, "{length}");
        }
        let mut longer = bytes.clone();
        longer.push(0);
        assert_eq!(decode(&longer).unwrap_err(), FrameError::Length);
    }

    #[test]
    fn wrong_headers_and_items_are_named() {
        let mut bytes = frame(&[Item::UserId(7)]);
        bytes[0] = b'X';
        assert_eq!(decode(&bytes).unwrap_err(), FrameError::Magic);
        bytes[0] = b'K';
        bytes[4] = 9;
        assert_eq!(decode(&bytes).unwrap_err(), FrameError::Version(9));
        bytes[4] = 1;
        bytes[12] = 99;
        assert_eq!(decode(&bytes).unwrap().next(), Some(Err(FrameError::UnknownItem(99))));
        bytes[12] = 7;
        let mut items = decode(&bytes).unwrap();
        assert_eq!(items.next(), Some(Err(FrameError::NumberLength(7))));
        assert_eq!(items.next(), None, "an error ends the iteration");
        let mount = Mount { kind: MountKind::Volume, is_read_only: false, source: b"s", target: b"" };
        // Its kind, its access, the length of its source.
        for (at, value) in [(0, 0), (0, 3), (1, 2), (2, 2), (3, 1)] {
            let mut bytes = frame(&[Item::Mount(mount)]);
            bytes[HEADER_LEN + ITEM_HEADER_LEN + at] = value;
            let mut items = decode(&bytes).unwrap();
            assert_eq!(items.next(), Some(Err(FrameError::NumberLength(16))), "{at}: {value}");
        }
    }

    #[test]
    fn strings_are_as_long_as_linux_takes_them() {
        let encoded = |items: &[Item<'_>]| encode(items.iter().copied(), &mut Vec::new());
        let long = std::vec![b'x'; MAX_STRING + 1];
        encoded(&[Item::Argument(&long[1..]), Item::Environment(&long[1..])]).unwrap();
        for item in [Item::Argument(&long), Item::Environment(&long)] {
            assert_eq!(encoded(&[item]), Err(FrameError::StringTooLong(MAX_STRING + 1)));
        }
        // As many as there can be, short and long.
        for length in [0, 1, 200, MAX_STRING] {
            let count = MAX_STRINGS / (length + STRING_OVERHEAD);
            let mut items = std::vec![Item::Argument(&long[..length]); count];
            encoded(&items).unwrap();
            items.push(Item::Environment(&long[..length]));
            assert!(matches!(encoded(&items), Err(FrameError::StringsTooLong(_))), "{length}");
        }
    }

    #[test]
    fn a_frame_has_a_longest_length() {
        let long = std::vec![b'x'; MAX_FRAME - HEADER_LEN - ITEM_HEADER_LEN];
        assert_eq!(frame(&[Item::WorkingDirectory(&long)]).len(), MAX_FRAME);
        let items = [Item::WorkingDirectory(&long), Item::Argument(b"")];
        let result = encode(items.into_iter(), &mut Vec::new());
        assert_eq!(result, Err(FrameError::TooLong));
    }

    proptest! {
        #[test]
        fn any_bytes_decode_without_harm(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut framed = Vec::new();
            framed.extend(MAGIC);
            framed.extend(VERSION.to_le_bytes());
            framed.extend([0, 0]);
            framed.extend(u32::try_from(bytes.len()).unwrap().to_le_bytes());
            framed.extend(&bytes);
            let steps = decode(&framed).unwrap().count();
            prop_assert!(steps <= bytes.len());
        }
    }
}
