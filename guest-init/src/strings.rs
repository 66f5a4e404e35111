//! Arguments and environment entries in the form that execve takes: one allocation for all of them.

use alloc::vec::Vec;

/// A list of strings, each with a NUL at its end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Strings {
    bytes: Vec<u8>,
    count: usize,
}

impl Strings {
    /// Makes room for strings of so many bytes with their NULs.
    pub fn reserve(&mut self, bytes: usize) {
        self.bytes.reserve_exact(bytes);
    }

    /// Adds a string.
    pub fn push(&mut self, string: &[u8]) {
        self.bytes.extend_from_slice(string);
        self.bytes.push(0);
        self.count += 1;
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// How many there are.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.count
    }

    /// Whether a string has a NUL inside it, where execve would end it.
    #[must_use]
    pub fn has_inner_nul(&self) -> bool {
        self.bytes.iter().filter(|&&byte| byte == 0).count() != self.count
    }

    /// The strings, each with its NUL; none of them may have another.
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
    fn strings_end_with_their_nul() {
        let list = Strings::from_iter(["a", "", "bc"]);
        assert_eq!(list.iter().collect::<Vec<_>>(), [&b"a\0"[..], b"\0", b"bc\0"]);
        assert_eq!((list.len(), list.is_empty(), list.has_inner_nul()), (3, false, false));
        assert!(Strings::default().is_empty());
        assert_eq!(Strings::default().iter().count(), 0);
    }

    #[test]
    fn a_nul_inside_is_found() {
        for text in ["\0", "a\0", "\0a"] {
            assert!(Strings::from_iter(["x", text]).has_inner_nul(), "{text:?}");
        }
    }
}
