//! The payload and its options on the kernel command line, for monitors other than Kindling's.

use crate::GuestConfig;
use alloc::vec::Vec;
use guest_protocol::config::StringList;

/// Parses the kernel command line. Everything after a lone `--` is the payload's argument vector. `kindling.cwd=`,
/// `kindling.hostname=`, `kindling.uid=`, `kindling.gid=`, `kindling.root=` and any number of
/// `kindling.env=NAME=value` stand before it. Double quotes keep spaces together, as in the kernel's own parser.
///
/// # Errors
/// When a number is invalid.
pub fn parse(line: &[u8]) -> Result<GuestConfig, BadNumber> {
    let mut config = GuestConfig::default();
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
            b"env" => config.environment.push(value),
            b"cwd" => config.working_directory = Some(value.into()),
            b"root" => config.root_device = Some(value.into()),
            b"hostname" => config.hostname = Some(value.into()),
            b"uid" => config.user_id = number("kindling.uid", value)?,
            b"gid" => config.group_id = number("kindling.gid", value)?,
            _ => {}
        }
    }
    config.arguments = words.collect();
    Ok(config)
}

/// An invalid number on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadNumber {
    /// The option's name.
    pub name: &'static str,
    /// The text after its `=`.
    pub value: Vec<u8>,
}

fn number(name: &'static str, value: &[u8]) -> Result<u32, BadNumber> {
    core::str::from_utf8(value)
        .ok()
        .and_then(|text| text.parse().ok())
        // setresuid takes the largest number for "unchanged".
        .filter(|&id| id != u32::MAX)
        .ok_or_else(|| BadNumber { name, value: value.into() })
}

/// Splits a command line at white space outside double quotes, and removes the quotes.
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
    use crate::strings::Strings;
    use proptest::prelude::*;

    #[test]
    fn a_command_line_names_the_payload() {
        let line = b"console=ttyS0 kindling.uid=1000 kindling.gid=100 kindling.cwd=/srv \
                     kindling.env=A=1 kindling.env=B=\"x y\" kindling.hostname=box kindling.root=/dev/vda quiet \
                     -- /bin/sh -c \"exit 3\" --\n";
        let config = parse(line).unwrap();
        assert_eq!(
            config,
            GuestConfig {
                arguments: ["/bin/sh", "-c", "exit 3", "--"].into_iter().collect(),
                environment: ["A=1", "B=x y"].into_iter().collect(),
                working_directory: Some(b"/srv".into()),
                hostname: Some(b"box".into()),
                user_id: 1000,
                group_id: 100,
                root_device: Some(b"/dev/vda".into()),
                ..GuestConfig::default()
            }
        );
    }

    #[test]
    fn a_command_line_without_payload_names_none() {
        for line in [&b""[..], b"console=ttyS0 quiet\n", b"root=/dev/vda --", b"a-- --b"] {
            let config = parse(line).unwrap();
            assert_eq!(config, GuestConfig::default(), "{line:?}");
        }
    }

    #[test]
    fn an_empty_word_in_quotes_is_an_argument() {
        let config = parse(b"-- echo \"\" x").unwrap();
        assert_eq!(config.arguments, Strings::from_iter(["echo", "", "x"]));
    }

    #[test]
    fn a_bad_number_is_named() {
        for value in ["", "-1", "4294967295", "4294967296", "root"] {
            let line = alloc::format!("kindling.uid={value}");
            let error = parse(line.as_bytes()).unwrap_err();
            assert_eq!(error, BadNumber { name: "kindling.uid", value: value.into() });
        }
    }

    proptest! {
        #[test]
        fn any_command_line_is_taken(line in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse(&line);
        }
    }
}
