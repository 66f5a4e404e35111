//! Arguments and environment entries in the form that execve takes, in one allocation.

use alloc::vec::Vec;
use guest_protocol::config::StringList;

/// A list of NUL-terminated strings.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Strings {
    bytes: Vec<u8>,
    count: usize,
}

impl StringList for Strings {
    fn reserve(&mut self, bytes: usize) {
        self.bytes.reserve_exact(bytes);
    }

    fn push(&mut self, string: &[u8]) {
        self.bytes.extend_from_slice(string);
        self.bytes.push(0);
        self.count += 1;
    }

    fn strings(&self) -> impl Iterator<Item = &[u8]> {
        self.iter().map(|string| string.strip_suffix(&[0]).unwrap_or(string))
    }
}

impl Strings {
    /// Whether the list is empty.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Number of strings.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.count
    }

    /// Whether a string contains a NUL before its terminator, where execve would end it.
    #[must_use]
    pub fn has_inner_nul(&self) -> bool {
        self.bytes.iter().filter(|&&byte| byte == 0).count() != self.count
    }

    /// The strings, each with its terminating NUL. None of them may contain another NUL.
    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        self.bytes.split_inclusive(|&byte| byte == 0)
    }
}

impl<S: AsRef<[u8]>> FromIterator<S> for Strings {
    fn from_iter<I: IntoIterator<Item = S>>(strings: I) -> Self {
        let mut list = Self::default();
        strings.into_iter().for_each(|string| list.push(string.as_ref()));
        list
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_are_nul_terminated() {
        let list = Strings::from_iter(["a", "", "bc"]);
        assert_eq!(list.iter().collect::<Vec<_>>(), [&b"a\0"[..], b"\0", b"bc\0"]);
        assert_eq!(list.strings().collect::<Vec<_>>(), [&b"a"[..], b"", b"bc"]);
        assert_eq!((list.len(), list.is_empty(), list.has_inner_nul()), (3, false, false));
        assert!(Strings::default().is_empty());
        assert_eq!(Strings::default().iter().count(), 0);
    }

    #[test]
    fn an_inner_nul_is_detected() {
        for text in ["\0", "a\0", "\0a"] {
            assert!(Strings::from_iter(["x", text]).has_inner_nul(), "{text:?}");
        }
    }
}
