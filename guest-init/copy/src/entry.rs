//! Entries: the headers of files, links and directories in a stream.

/// Type of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    File,
    Directory,
    Link,
    EndOfDirectory,
}

/// An entry without its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) kind: Kind,
    pub(crate) name_length: u8,
    pub(crate) mode: u16,
    pub(crate) user: u32,
    pub(crate) group: u32,
    pub(crate) seconds: i64,
    pub(crate) nanoseconds: u32,
}

impl Entry {
    pub(crate) const LEN: usize = 24;

    /// The end of a directory.
    pub(crate) const END_OF_DIRECTORY: Self = Self {
        kind: Kind::EndOfDirectory,
        name_length: 0,
        mode: 0,
        user: 0,
        group: 0,
        seconds: 0,
        nanoseconds: 0,
    };

    pub(crate) fn to_bytes(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[0] = match self.kind {
            Kind::File => 1,
            Kind::Directory => 2,
            Kind::Link => 3,
            Kind::EndOfDirectory => 4,
        };
        bytes[1] = self.name_length;
        bytes[2..4].copy_from_slice(&self.mode.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.user.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.group.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.nanoseconds.to_le_bytes());
        bytes[16..].copy_from_slice(&self.seconds.to_le_bytes());
        bytes
    }

    pub(crate) fn from_bytes(bytes: &[u8; Self::LEN]) -> Option<Self> {
        const SECOND: u32 = 1_000_000_000;
        let kind = match bytes[0] {
            1 => Kind::File,
            2 => Kind::Directory,
            3 => Kind::Link,
            4 => Kind::EndOfDirectory,
            _ => return None,
        };
        let number = |at: usize| bytes[at..].first_chunk().copied().map(u32::from_le_bytes);
        let entry = Self {
            kind,
            name_length: bytes[1],
            mode: u16::from_le_bytes([bytes[2], bytes[3]]),
            user: number(4)?,
            group: number(8)?,
            nanoseconds: number(12)?,
            seconds: i64::from_le_bytes(*bytes.last_chunk()?),
        };
        // The kernel takes the largest number for "unchanged".
        let is_valid = entry.mode <= 0o7777
            && entry.nanoseconds < SECOND
            && ![entry.user, entry.group].contains(&u32::MAX)
            && (entry.name_length == 0) == (kind == Kind::EndOfDirectory);
        is_valid.then_some(entry)
    }
}

/// Whether a name is one component of a path, except `.` and `..`.
pub(crate) fn is_name(name: &[u8]) -> bool {
    !name.is_empty()
        && name.len() <= usize::from(u8::MAX)
        && !matches!(name, b"." | b"..")
        && !name.iter().any(|byte| matches!(byte, 0 | b'/'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_are_single_components() {
        for name in [&b"a"[..], b"...", b"..a", b" ", b"\xff\n", &[b'x'; 255]] {
            assert!(is_name(name), "{name:?}");
        }
        for name in [&b""[..], b".", b"..", b"a/b", b"/", b"a\0", &[b'x'; 256]] {
            assert!(!is_name(name), "{name:?}");
        }
    }

    proptest! {
        #[test]
        fn entries_survive(bytes in any::<[u8; Entry::LEN]>()) {
            if let Some(entry) = Entry::from_bytes(&bytes) {
                prop_assert_eq!(entry.to_bytes(), bytes);
            }
        }
    }
}
