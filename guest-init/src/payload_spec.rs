//! What init is asked to run, whoever asks: the VMM's frame or the kernel command line.

use crate::strings::Strings;
use alloc::vec::Vec;
use guest_protocol::agent::TerminalSize;
use guest_protocol::frame::{self, FrameError, Item, MountKind, Network};

/// The guest's configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PayloadSpec {
    /// Argument vector of the payload; empty where there is none.
    pub arguments: Strings,
    /// Environment entries, `NAME=value`.
    pub environment: Strings,
    /// Working directory; `/` where nobody chose one.
    pub working_directory: Option<Vec<u8>>,
    /// Hostname; the kernel's default where nobody chose one.
    pub hostname: Option<Vec<u8>>,
    /// User id; 0 where nobody chose one.
    pub user_id: u32,
    /// Group id; 0 where nobody chose one.
    pub group_id: u32,
    /// Device of the root filesystem; the initramfs stays the root where there is none.
    pub root_device: Option<Vec<u8>>,
    /// Nanoseconds from the creation of the VM to the answer, when the VMM gave it.
    pub vm_age: Option<u64>,
    /// Whether the VMM wants the kernel's log.
    pub kernel_log: bool,
    /// What a kernel must renew that was booted for another guest.
    pub renewal: Renewal,
    /// Network cards that get an address.
    pub networks: Vec<Network>,
    /// Further groups.
    pub groups: Vec<u32>,
    /// Size of the terminal that the payload gets; none where it gets pipes.
    pub terminal: Option<TerminalSize>,
    /// Whether the payload's streams lead to the agent.
    pub agent: bool,
    /// Filesystems to mount, in this order.
    pub mounts: Vec<Mount>,
    /// Whether programs may only read the root.
    pub is_root_read_only: bool,
}

/// A filesystem of the host's, and where it goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// What it is.
    pub kind: MountKind,
    /// Whether the guest may only read.
    pub is_read_only: bool,
    /// The disk, or the device's tag.
    pub source: Vec<u8>,
    /// The directory.
    pub target: Vec<u8>,
}

impl From<frame::Mount<'_>> for Mount {
    fn from(mount: frame::Mount<'_>) -> Self {
        let frame::Mount { kind, is_read_only, source, target } = mount;
        Self { kind, is_read_only, source: source.into(), target: target.into() }
    }
}

/// What two guests may not have from the same boot of a kernel; empty where this guest's kernel is its own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Renewal {
    /// Nanoseconds since 1970.
    pub real_time: Option<u64>,
    /// Random bytes.
    pub entropy: Option<Vec<u8>>,
}

impl PayloadSpec {
    /// What the VMM's configuration frame asks for.
    ///
    /// # Errors
    /// When the bytes are not a whole frame that this init understands.
    pub fn from_frame(bytes: &[u8]) -> Result<Self, FrameError> {
        let mut spec = Self::default();
        let (mut arguments, mut environment) = (0, 0);
        for item in frame::decode(bytes)? {
            match item? {
                Item::Argument(value) => arguments += value.len() + 1,
                Item::Environment(value) => environment += value.len() + 1,
                _ => {}
            }
        }
        spec.arguments.reserve(arguments);
        spec.environment.reserve(environment);
        for item in frame::decode(bytes)? {
            match item? {
                Item::Argument(value) => spec.arguments.push(value),
                Item::Environment(value) => spec.environment.push(value),
                Item::WorkingDirectory(value) => spec.working_directory = Some(value.into()),
                Item::Hostname(value) => spec.hostname = Some(value.into()),
                Item::UserId(id) => spec.user_id = id,
                Item::GroupId(id) => spec.group_id = id,
                Item::VmAge(age) => spec.vm_age = Some(age),
                Item::KernelLog => spec.kernel_log = true,
                Item::RealTime(time) => spec.renewal.real_time = Some(time),
                Item::RootDevice(path) => spec.root_device = Some(path.into()),
                Item::Entropy(bytes) => spec.renewal.entropy = Some(bytes.into()),
                Item::Network(network) => spec.networks.push(network),
                Item::Group(id) => spec.groups.push(id),
                Item::Terminal(size) => spec.terminal = Some(size),
                Item::Agent => spec.agent = true,
                Item::Mount(mount) => spec.mounts.push(mount.into()),
                Item::ReadOnlyRoot => spec.is_root_read_only = true,
            }
        }
        Ok(spec)
    }

    /// What the kernel command line asks for: everything after a lone `--` is the payload's
    /// argument vector, and `kindling.cwd=`, `kindling.hostname=`, `kindling.uid=`,
    /// `kindling.gid=`, `kindling.root=` and any number of `kindling.env=NAME=value` stand before it.
    /// Double quotes keep spaces together, as they do for the kernel.
    ///
    /// # Errors
    /// The name and the value of a number that is none.
    pub fn from_command_line(line: &[u8]) -> Result<Self, BadNumber> {
        let mut spec = Self::default();
        let mut words = words(line).into_iter();
        for word in words.by_ref() {
            if word == b"--" {
                break;
            }
            let Some(option) = word.strip_prefix(b"kindling.") else {
                continue;
            };
            let mut halves = option.splitn(2, |&byte| byte == b'=');
            let (Some(name), Some(value)) = (halves.next(), halves.next()) else {
                continue;
            };
            match name {
                b"env" => spec.environment.push(value),
                b"cwd" => spec.working_directory = Some(value.into()),
                b"root" => spec.root_device = Some(value.into()),
                b"hostname" => spec.hostname = Some(value.into()),
                b"uid" => spec.user_id = number("kindling.uid", value)?,
                b"gid" => spec.group_id = number("kindling.gid", value)?,
                _ => {}
            }
        }
        spec.arguments = words.collect();
        Ok(spec)
    }
}

/// A number on the command line that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadNumber {
    /// The option's name.
    pub name: &'static str,
    /// What stands behind its `=`.
    pub value: Vec<u8>,
}

fn number(name: &'static str, value: &[u8]) -> Result<u32, BadNumber> {
    core::str::from_utf8(value)
        .ok()
        .and_then(|text| text.parse().ok())
        // setresuid takes the largest number for "leave it as it is".
        .filter(|&id| id != u32::MAX)
        .ok_or_else(|| BadNumber { name, value: value.into() })
}

/// Splits a command line at white space outside double quotes and drops the quotes.
fn words(line: &[u8]) -> Vec<Vec<u8>> {
    let mut words = Vec::new();
    let mut word: Option<Vec<u8>> = None;
    let mut quoted = false;
    for &byte in line {
        match byte {
            b'"' => {
                quoted = !quoted;
                word.get_or_insert_default();
            }
            byte if byte.is_ascii_whitespace() && !quoted => words.extend(word.take()),
            byte => word.get_or_insert_default().push(byte),
        }
    }
    words.extend(word);
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;
    use proptest::prelude::*;

    #[test]
    fn a_frame_says_what_to_renew() {
        let mut frame = Vec::new();
        let items = [Item::RealTime(1_700_000_000_000_000_000), Item::Entropy(&[7; 32])];
        frame::encode(items.into_iter(), &mut frame).unwrap();
        let renewal = PayloadSpec::from_frame(&frame).unwrap().renewal;
        assert_eq!(renewal.real_time, Some(1_700_000_000_000_000_000));
        assert_eq!(renewal.entropy, Some(vec![7; 32]));
    }

    #[test]
    fn a_command_line_names_the_payload() {
        let line = b"console=ttyS0 kindling.uid=1000 kindling.gid=100 kindling.cwd=/srv \
                     kindling.env=A=1 kindling.env=B=\"x y\" kindling.hostname=box kindling.root=/dev/vda quiet \
                     -- /bin/sh -c \"exit 3\" --\n";
        let spec = PayloadSpec::from_command_line(line).unwrap();
        assert_eq!(
            spec,
            PayloadSpec {
                arguments: ["/bin/sh", "-c", "exit 3", "--"].into_iter().collect(),
                environment: ["A=1", "B=x y"].into_iter().collect(),
                working_directory: Some(b"/srv".into()),
                hostname: Some(b"box".into()),
                user_id: 1000,
                group_id: 100,
                root_device: Some(b"/dev/vda".into()),
                vm_age: None,
                kernel_log: false,
                renewal: Renewal::default(),
                ..PayloadSpec::default()
            }
        );
    }

    #[test]
    fn a_command_line_without_payload_names_none() {
        for line in [&b""[..], b"console=ttyS0 quiet\n", b"root=/dev/vda --", b"a-- --b"] {
            let spec = PayloadSpec::from_command_line(line).unwrap();
            assert_eq!(spec, PayloadSpec::default(), "{line:?}");
        }
    }

    #[test]
    fn an_empty_word_in_quotes_is_an_argument() {
        let spec = PayloadSpec::from_command_line(b"-- echo \"\" x").unwrap();
        assert_eq!(spec.arguments, Strings::from_iter(["echo", "", "x"]));
    }

    #[test]
    fn a_bad_number_is_named() {
        for value in ["", "-1", "4294967295", "4294967296", "root"] {
            let line = alloc::format!("kindling.uid={value}");
            let error = PayloadSpec::from_command_line(line.as_bytes()).unwrap_err();
            assert_eq!(error, BadNumber { name: "kindling.uid", value: value.into() });
        }
    }

    proptest! {
        #[test]
        fn any_command_line_is_taken(line in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = PayloadSpec::from_command_line(&line);
        }
    }
}
