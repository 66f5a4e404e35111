//! The configuration frame: the encoding of [`GuestConfig`] and [`BootInfo`], as a header and a list of items.
//!
//! ```text
//! "KNDL"  version: u16  zero: u16  length of the items: u32   item*
//! item = tag: u8  length: u32  value
//! ```
//! All integers are little-endian. Arguments, environment entries, networks, groups and mounts keep their order; every
//! other item appears at most once.

use crate::config::{BootInfo, GuestConfig, Mount, MountKind, Network, Reseed, StringList};
use crate::terminal::TerminalSize;
use alloc::vec::Vec;
use core::fmt;

const MAGIC: [u8; 4] = *b"KNDL";
const VERSION: u16 = 1;
const HEADER_LEN: usize = 12;
const ITEM_HEADER_LEN: usize = 5;

/// Maximum length of an argument or environment entry in bytes: Linux's limit without the terminating NUL
/// (MAX_ARG_STRLEN in include/uapi/linux/binfmts.h).
pub const MAX_STRING: usize = 128 * 1024 - 1;

/// Maximum size of arguments and environment together in bytes: what Linux allows them on a stack of 8 MiB
/// (`bprm_stack_limits` in fs/exec.c).
pub const MAX_STRINGS: usize = 2 << 20;

/// Bytes that Linux counts for a string in addition to its content: the terminating NUL and a pointer. Larger than
/// [`ITEM_HEADER_LEN`].
const STRING_OVERHEAD: usize = 9;

/// Maximum length of a frame in bytes: the longest arguments and environment, and 256 KiB for everything else.
pub const MAX_FRAME: usize = MAX_STRINGS + 256 * 1024;

/// Tags of items.
mod tag {
    pub(super) const ARGUMENT: u8 = 1;
    pub(super) const ENVIRONMENT: u8 = 2;
    pub(super) const WORKING_DIRECTORY: u8 = 3;
    pub(super) const HOSTNAME: u8 = 4;
    pub(super) const USER_ID: u8 = 5;
    pub(super) const GROUP_ID: u8 = 6;
    pub(super) const VM_AGE: u8 = 7;
    pub(super) const KERNEL_LOG: u8 = 8;
    pub(super) const REAL_TIME: u8 = 9;
    pub(super) const ENTROPY: u8 = 10;
    pub(super) const ROOT_DEVICE: u8 = 11;
    pub(super) const NETWORK: u8 = 12;
    pub(super) const GROUP: u8 = 13;
    pub(super) const TERMINAL: u8 = 14;
    pub(super) const AGENT: u8 = 15;
    pub(super) const MOUNT: u8 = 16;
    pub(super) const READ_ONLY_ROOT: u8 = 17;
    pub(super) const MAX_PROCESSES: u8 = 18;
}

/// Why bytes are not a configuration frame, or a configuration does not fit one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameError {
    /// The first bytes are not those of a frame.
    Magic,
    /// The frame has a version that this program does not support.
    Version(u16),
    /// The frame is truncated, or followed by further bytes.
    Length,
    /// An item with an unknown tag.
    UnknownItem(u8),
    /// An item with this tag has an invalid length or value.
    InvalidItem(u8),
    /// An argument or environment entry has this many bytes, which is more than [`MAX_STRING`].
    StringTooLong(usize),
    /// Arguments and environment take this many bytes, which is more than [`MAX_STRINGS`].
    StringsTooLong(usize),
    /// The frame is longer than [`MAX_FRAME`] bytes.
    TooLong,
}

impl fmt::Display for FrameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Magic => write!(f, "the configuration does not start with KNDL"),
            Self::Version(version) => {
                write!(f, "the configuration has version {version}, only version {VERSION} is supported")
            }
            Self::Length => write!(f, "the configuration's length differs from its header"),
            Self::UnknownItem(tag) => write!(f, "the configuration has an item with the unknown tag {tag}"),
            Self::InvalidItem(tag) => {
                write!(f, "the configuration's item with tag {tag} has an invalid length or value")
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

impl<L: StringList> GuestConfig<L> {
    /// Encodes a frame.
    ///
    /// # Errors
    /// When the strings are longer than Linux allows, or the frame would be longer than [`MAX_FRAME`] bytes.
    pub fn to_frame(&self, boot: &BootInfo) -> Result<Vec<u8>, FrameError> {
        self.check_strings()?;
        let mut writer = Writer::new();
        for argument in self.arguments.strings() {
            writer.item(tag::ARGUMENT, &[argument])?;
        }
        for entry in self.environment.strings() {
            writer.item(tag::ENVIRONMENT, &[entry])?;
        }
        writer.optional(tag::WORKING_DIRECTORY, self.working_directory.as_deref())?;
        writer.optional(tag::HOSTNAME, self.hostname.as_deref())?;
        writer.optional(tag::ROOT_DEVICE, self.root_device.as_deref())?;
        writer.item(tag::USER_ID, &[&self.user_id.to_le_bytes()])?;
        writer.item(tag::GROUP_ID, &[&self.group_id.to_le_bytes()])?;
        for network in &self.networks {
            writer.item(tag::NETWORK, &[&network.to_bytes()])?;
        }
        for group in &self.groups {
            writer.item(tag::GROUP, &[&group.to_le_bytes()])?;
        }
        writer.optional(tag::TERMINAL, self.terminal.map(TerminalSize::to_bytes))?;
        writer.flag(tag::AGENT, self.agent)?;
        for mount in &self.mounts {
            writer.item(tag::MOUNT, &[&mount.head()?, &mount.source, &mount.target])?;
        }
        writer.flag(tag::READ_ONLY_ROOT, self.is_root_read_only)?;
        writer.optional(tag::MAX_PROCESSES, self.max_processes.map(u64::to_le_bytes))?;
        writer.optional(tag::VM_AGE, boot.vm_age.map(u64::to_le_bytes))?;
        writer.flag(tag::KERNEL_LOG, boot.kernel_log)?;
        if let Some(reseed) = &boot.reseed {
            writer.item(tag::REAL_TIME, &[&reseed.real_time.to_le_bytes()])?;
            writer.item(tag::ENTROPY, &[&reseed.entropy])?;
        }
        writer.finish()
    }

    fn check_strings(&self) -> Result<(), FrameError> {
        let mut total = 0usize;
        for string in self.arguments.strings().chain(self.environment.strings()) {
            if string.len() > MAX_STRING {
                return Err(FrameError::StringTooLong(string.len()));
            }
            total = total.saturating_add(string.len() + STRING_OVERHEAD);
        }
        if total > MAX_STRINGS { Err(FrameError::StringsTooLong(total)) } else { Ok(()) }
    }

    /// Decodes a frame.
    ///
    /// # Errors
    /// When the bytes are not a complete frame of this version.
    pub fn from_frame(frame: &[u8]) -> Result<(Self, BootInfo), FrameError> {
        let items = Items::of_frame(frame)?;
        let mut config = Self::default();
        // Each list is allocated once. The frame is longer than the strings with a NUL each, and memory that stays
        // unused is not touched.
        config.arguments.reserve(frame.len());
        config.environment.reserve(frame.len());
        let mut boot = BootInfo::default();
        let (mut real_time, mut entropy) = (None, None);
        for item in items {
            let (tag, value) = item?;
            match tag {
                tag::ARGUMENT => config.arguments.push(value),
                tag::ENVIRONMENT => config.environment.push(value),
                tag::WORKING_DIRECTORY => config.working_directory = Some(value.into()),
                tag::HOSTNAME => config.hostname = Some(value.into()),
                tag::ROOT_DEVICE => config.root_device = Some(value.into()),
                tag::USER_ID => config.user_id = u32::from_le_bytes(array(tag, value)?),
                tag::GROUP_ID => config.group_id = u32::from_le_bytes(array(tag, value)?),
                tag::NETWORK => {
                    config.networks.push(Network::from_bytes(value).ok_or(FrameError::InvalidItem(tag))?);
                }
                tag::GROUP => config.groups.push(u32::from_le_bytes(array(tag, value)?)),
                tag::TERMINAL => config.terminal = Some(TerminalSize::from_bytes(array(tag, value)?)),
                tag::AGENT => config.agent = flag(tag, value)?,
                tag::MOUNT => {
                    config.mounts.push(Mount::from_bytes(value).ok_or(FrameError::InvalidItem(tag))?);
                }
                tag::READ_ONLY_ROOT => config.is_root_read_only = flag(tag, value)?,
                tag::MAX_PROCESSES => config.max_processes = Some(u64::from_le_bytes(array(tag, value)?)),
                tag::VM_AGE => boot.vm_age = Some(u64::from_le_bytes(array(tag, value)?)),
                tag::KERNEL_LOG => boot.kernel_log = flag(tag, value)?,
                tag::REAL_TIME => real_time = Some(u64::from_le_bytes(array(tag, value)?)),
                tag::ENTROPY => entropy = Some(array(tag, value)?),
                _ => return Err(FrameError::UnknownItem(tag)),
            }
        }
        boot.reseed = match (real_time, entropy) {
            (Some(real_time), Some(entropy)) => Some(Reseed { real_time, entropy }),
            (None, None) => None,
            // One of the two is missing.
            _ => return Err(FrameError::InvalidItem(tag::REAL_TIME)),
        };
        Ok((config, boot))
    }
}

fn array<const N: usize>(tag: u8, value: &[u8]) -> Result<[u8; N], FrameError> {
    value.try_into().map_err(|_| FrameError::InvalidItem(tag))
}

fn flag(tag: u8, value: &[u8]) -> Result<bool, FrameError> {
    array::<0>(tag, value).map(|[]| true)
}

impl Mount {
    /// Length of the fields in front of source and target: kind, access, length of the source.
    const HEAD_LEN: usize = 4;

    fn head(&self) -> Result<[u8; Self::HEAD_LEN], FrameError> {
        let length = u16::try_from(self.source.len()).map_err(|_| FrameError::TooLong)?;
        let [low, high] = length.to_le_bytes();
        Ok([self.kind as u8, self.is_read_only.into(), low, high])
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (&[kind, access, low, high], names) = bytes.split_first_chunk::<{ Self::HEAD_LEN }>()?;
        let kind = [MountKind::Volume, MountKind::Folder].into_iter().find(|&known| known as u8 == kind)?;
        let (source, target) = names.split_at_checked(u16::from_le_bytes([low, high]).into())?;
        (access <= 1).then(|| Self {
            kind,
            is_read_only: access == 1,
            source: source.into(),
            target: target.into(),
        })
    }
}

impl Network {
    const LEN: usize = 14;

    /// An address of zeroes stands for `None`.
    fn to_bytes(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
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

/// A frame under construction.
struct Writer(Vec<u8>);

impl Writer {
    /// Starts with a header whose length is filled in at the end.
    fn new() -> Self {
        let mut frame = Vec::new();
        frame.extend(MAGIC);
        frame.extend(VERSION.to_le_bytes());
        frame.resize(HEADER_LEN, 0);
        Self(frame)
    }

    /// Appends an item, whose value is the concatenation of `parts`.
    fn item(&mut self, tag: u8, parts: &[&[u8]]) -> Result<(), FrameError> {
        let length: usize = parts.iter().map(|part| part.len()).sum();
        if self.0.len() + ITEM_HEADER_LEN + length > MAX_FRAME {
            return Err(FrameError::TooLong);
        }
        self.0.push(tag);
        self.0.extend(u32::try_from(length).map_err(|_| FrameError::TooLong)?.to_le_bytes());
        parts.iter().for_each(|part| self.0.extend_from_slice(part));
        Ok(())
    }

    fn optional(&mut self, tag: u8, value: Option<impl AsRef<[u8]>>) -> Result<(), FrameError> {
        value.map_or(Ok(()), |value| self.item(tag, &[value.as_ref()]))
    }

    fn flag(&mut self, tag: u8, is_set: bool) -> Result<(), FrameError> {
        if is_set { self.item(tag, &[]) } else { Ok(()) }
    }

    fn finish(self) -> Result<Vec<u8>, FrameError> {
        let Self(mut frame) = self;
        let length = u32::try_from(frame.len() - HEADER_LEN).map_err(|_| FrameError::TooLong)?;
        frame[HEADER_LEN - 4..HEADER_LEN].copy_from_slice(&length.to_le_bytes());
        Ok(frame)
    }
}

/// Iterator over the tags and values of a frame's items. An error ends the iteration.
struct Items<'a> {
    rest: &'a [u8],
}

impl<'a> Items<'a> {
    /// The items of a frame, whose header is checked.
    fn of_frame(frame: &'a [u8]) -> Result<Self, FrameError> {
        if frame.len() > MAX_FRAME {
            return Err(FrameError::TooLong);
        }
        let (header, rest) = frame.split_at_checked(HEADER_LEN).ok_or(FrameError::Length)?;
        if header[..4] != MAGIC {
            return Err(FrameError::Magic);
        }
        let version = u16::from_le_bytes([header[4], header[5]]);
        if version != VERSION {
            return Err(FrameError::Version(version));
        }
        let length = u32::from_le_bytes([header[8], header[9], header[10], header[11]]);
        if usize::try_from(length) != Ok(rest.len()) {
            return Err(FrameError::Length);
        }
        Ok(Self { rest })
    }

    fn split(&mut self) -> Option<(u8, &'a [u8])> {
        let (&[tag, a, b, c, d], rest) = self.rest.split_first_chunk::<ITEM_HEADER_LEN>()?;
        let length = usize::try_from(u32::from_le_bytes([a, b, c, d])).ok()?;
        let (value, rest) = rest.split_at_checked(length)?;
        self.rest = rest;
        Some((tag, value))
    }
}

impl<'a> Iterator for Items<'a> {
    type Item = Result<(u8, &'a [u8]), FrameError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let item = self.split().ok_or(FrameError::Length);
        if item.is_err() {
            self.rest = &[];
        }
        Some(item)
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use proptest::prelude::*;
    use std::vec;

    type Config = GuestConfig<Vec<Vec<u8>>>;

    /// A configuration in which every field differs from its default.
    fn full() -> (Config, BootInfo) {
        let config = Config {
            arguments: vec![b"/bin/sh".to_vec(), Vec::new()],
            environment: vec![b"A=b".to_vec()],
            working_directory: Some(b"/tmp".to_vec()),
            hostname: Some(b"h".to_vec()),
            user_id: 1000,
            group_id: 100,
            root_device: Some(b"/dev/vda".to_vec()),
            networks: vec![Network {
                card: 1,
                prefix: 24,
                address: [10, 0, 2, 15],
                gateway: Some([10, 0, 2, 2]),
                nameserver: None,
            }],
            groups: vec![4, 5],
            terminal: Some(TerminalSize { rows: 24, columns: 80 }),
            agent: true,
            mounts: vec![
                Mount {
                    kind: MountKind::Volume,
                    is_read_only: false,
                    source: b"/dev/vdb".to_vec(),
                    target: b"/var/lib/data".to_vec(),
                },
                Mount { kind: MountKind::Folder, is_read_only: true, source: Vec::new(), target: Vec::new() },
            ],
            is_root_read_only: true,
            max_processes: Some(100),
        };
        let boot = BootInfo {
            vm_age: Some(12_345_678_901),
            kernel_log: true,
            reseed: Some(Reseed { real_time: 1_700_000_000_000_000_000, entropy: [7; 32] }),
        };
        (config, boot)
    }

    fn frame() -> Vec<u8> {
        let (config, boot) = full();
        config.to_frame(&boot).unwrap()
    }

    /// A frame of items, which are written byte by byte.
    fn raw_frame(items: &[u8]) -> Vec<u8> {
        let length = u32::try_from(items.len()).unwrap();
        [b"KNDL\x01\0\0\0", &length.to_le_bytes()[..], items].concat()
    }

    fn decode(frame: &[u8]) -> Result<(Config, BootInfo), FrameError> {
        Config::from_frame(frame)
    }

    #[test]
    fn every_field_survives() {
        assert_eq!(decode(&frame()), Ok(full()));
        let default = (Config::default(), BootInfo::default());
        assert_eq!(decode(&default.0.to_frame(&default.1).unwrap()), Ok(default));
    }

    #[test]
    fn truncated_and_extended_frames_are_rejected() {
        let bytes = frame();
        for length in 0..bytes.len() {
            assert_eq!(decode(&bytes[..length]), Err(FrameError::Length), "{length}");
        }
        let mut longer = bytes.clone();
        longer.push(0);
        assert_eq!(decode(&longer), Err(FrameError::Length));
    }

    #[test]
    fn invalid_headers_and_items_have_their_own_errors() {
        let good = raw_frame(&[5, 4, 0, 0, 0, 7, 0, 0, 0]);
        assert_eq!(decode(&good).unwrap().0.user_id, 7);
        for (at, value, error) in [
            (0, b'X', FrameError::Magic),
            (4, 9, FrameError::Version(9)),
            (12, 99, FrameError::UnknownItem(99)),
            // A u64 and a flag do not have four bytes.
            (12, 7, FrameError::InvalidItem(7)),
            (12, 15, FrameError::InvalidItem(15)),
            (13, 5, FrameError::Length),
        ] {
            let mut bytes = good.clone();
            bytes[at] = value;
            assert_eq!(decode(&bytes), Err(error), "{at}: {value}");
        }
        // Mounts with an unknown kind, an unknown access, and a source longer than the item.
        let good = [1, 0, 1, 0, b's'];
        let mount = |bytes: [u8; 5]| raw_frame(&[&[16, 5, 0, 0, 0], &bytes[..]].concat());
        assert_eq!(decode(&mount(good)).unwrap().0.mounts[0].source, b"s");
        for (at, value) in [(0, 0), (0, 3), (1, 2), (2, 2), (3, 1)] {
            let mut bytes = good;
            bytes[at] = value;
            assert_eq!(decode(&mount(bytes)), Err(FrameError::InvalidItem(16)), "{at}: {value}");
        }
    }

    #[test]
    fn a_reseed_needs_both_time_and_entropy() {
        let time = [&[9, 8, 0, 0, 0][..], &[1; 8]].concat();
        let entropy = [&[10, 32, 0, 0, 0][..], &[2; 32]].concat();
        let reseed = Reseed { real_time: 0x0101_0101_0101_0101, entropy: [2; 32] };
        let both = decode(&raw_frame(&[&time[..], &entropy].concat())).unwrap();
        assert_eq!(both.1.reseed, Some(reseed));
        assert!(decode(&raw_frame(&time)).is_err());
        assert!(decode(&raw_frame(&entropy)).is_err());
    }

    #[test]
    fn strings_have_the_limits_of_linux() {
        let encode = |arguments: Vec<Vec<u8>>, environment: Vec<Vec<u8>>| {
            Config { arguments, environment, ..Config::default() }.to_frame(&BootInfo::default()).map(drop)
        };
        let longest = vec![b'x'; MAX_STRING];
        let too_long = vec![b'x'; MAX_STRING + 1];
        assert_eq!(encode(vec![longest.clone()], vec![longest]), Ok(()));
        let error = Err(FrameError::StringTooLong(MAX_STRING + 1));
        assert_eq!(encode(vec![too_long.clone()], Vec::new()), error);
        assert_eq!(encode(Vec::new(), vec![too_long]), error);
        // As many as there can be, short and long.
        for length in [0, 1, 200, MAX_STRING] {
            let string = vec![b'x'; length];
            let arguments = vec![string.clone(); MAX_STRINGS / (length + STRING_OVERHEAD)];
            assert_eq!(encode(arguments.clone(), Vec::new()), Ok(()), "{length}");
            let result = encode(arguments, vec![string]);
            assert!(matches!(result, Err(FrameError::StringsTooLong(_))), "{length}");
        }
    }

    #[test]
    fn a_frame_has_a_maximum_length() {
        let empty = Config::default().to_frame(&BootInfo::default()).unwrap().len();
        let with_directory = |length| {
            let config = Config { working_directory: Some(vec![b'x'; length]), ..Config::default() };
            config.to_frame(&BootInfo::default())
        };
        let longest = with_directory(MAX_FRAME - empty - ITEM_HEADER_LEN).unwrap();
        assert_eq!(longest.len(), MAX_FRAME);
        decode(&longest).unwrap();
        assert_eq!(with_directory(MAX_FRAME - empty - ITEM_HEADER_LEN + 1), Err(FrameError::TooLong));
        let longer = raw_frame(&vec![0; MAX_FRAME - HEADER_LEN + 1]);
        assert_eq!(decode(&longer), Err(FrameError::TooLong));
    }

    proptest! {
        /// Decoding terminates without a panic for any bytes after a valid header, and a decoded configuration
        /// survives another round trip.
        #[test]
        fn any_items_decode_without_harm(
            items in prop::collection::vec((0_u8..20, prop::collection::vec(any::<u8>(), 0..20)), 0..8),
            tail in prop::collection::vec(any::<u8>(), 0..8),
        ) {
            let mut bytes = Vec::new();
            for (tag, value) in &items {
                bytes.push(*tag);
                bytes.extend(u32::try_from(value.len()).unwrap().to_le_bytes());
                bytes.extend(value);
            }
            bytes.extend(tail);
            if let Ok((config, boot)) = decode(&raw_frame(&bytes)) {
                let frame = config.to_frame(&boot).unwrap();
                prop_assert_eq!(decode(&frame).unwrap(), (config, boot));
            }
        }

        #[test]
        fn any_bytes_decode_without_harm(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(&raw_frame(&bytes));
        }
    }
}
