//! What goes wrong, in a form that the guest can tell the host.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;
use rustix::io::Errno;

/// What was attempted, or found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum What {
    /// Opening.
    Open = 1,
    /// Reading.
    Read,
    /// Making.
    Make,
    /// Writing.
    Write,
    /// Replacing.
    Replace,
    /// Setting mode, owner or time.
    Attributes,
    /// The stream took no more bytes.
    Send,
    /// The stream gave an error.
    Receive,
    /// Something that is neither file nor directory nor link.
    Special,
    /// More than [`MAX_DEPTH`](crate::MAX_DEPTH) directories in one another.
    Depth,
    /// A directory that is missing.
    NoDirectory,
    /// A directory was to go where something else is.
    NotDirectory,
    /// The stream ended before what it is of.
    Ended,
    /// The stream breaks the rules.
    Malformed,
    /// No failure: things that are neither file nor directory nor link, this one first, were left out.
    LeftOut,
    /// A link where an untrusted sender's directory, or a file meant for a directory, was to go.
    Link,
}

impl What {
    const ALL: [Self; 16] = [
        Self::Open,
        Self::Read,
        Self::Make,
        Self::Write,
        Self::Replace,
        Self::Attributes,
        Self::Send,
        Self::Receive,
        Self::Special,
        Self::Depth,
        Self::NoDirectory,
        Self::NotDirectory,
        Self::Ended,
        Self::Malformed,
        Self::LeftOut,
        Self::Link,
    ];
}

/// What went wrong, and with which path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What was attempted, or found.
    pub what: What,
    /// The kernel's answer, if it is one.
    pub error: Option<Errno>,
    /// The path.
    pub path: Vec<u8>,
}

impl Failure {
    /// The most bytes of one.
    pub const MOST_BYTES: usize = 8 << 10;

    pub(crate) fn new(what: What, path: &[u8]) -> Self {
        Self { what, error: None, path: path.into() }
    }

    pub(crate) fn of(what: What, path: &[u8]) -> impl FnOnce(Errno) -> Self {
        move |error| Self { what, error: Some(error), path: path.into() }
    }

    /// The bytes: what, the number of the error or zero (two bytes, little endian), the path.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let error = self.error.and_then(|error| u16::try_from(error.raw_os_error()).ok()).unwrap_or(0);
        let path = self.path.iter().take(Self::MOST_BYTES - 3);
        [self.what as u8].into_iter().chain(error.to_le_bytes()).chain(path.copied()).collect()
    }

    /// What the bytes say, if they are a failure.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        /// MAX_ERRNO of linux/err.h.
        const LAST: u16 = 4095;
        let (&[what, low, high], path) = bytes.split_first_chunk()?;
        let what = What::ALL.into_iter().find(|&known| known as u8 == what)?;
        let error = u16::from_le_bytes([low, high]);
        if error > LAST || path.len() > Self::MOST_BYTES - 3 {
            return None;
        }
        let error = (error != 0).then(|| Errno::from_raw_os_error(error.into()));
        Some(Self { what, error, path: path.into() })
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = String::from_utf8_lossy(&self.path);
        match self.what {
            What::Open => write!(f, "cannot open {path}"),
            What::Read => write!(f, "cannot read {path}"),
            What::Make => write!(f, "cannot make {path}"),
            What::Write => write!(f, "cannot write {path}"),
            What::Replace => write!(f, "cannot replace {path}"),
            What::Attributes => write!(f, "cannot set mode, owner or time of {path}"),
            What::Send => write!(f, "cannot send {path}"),
            What::Receive => write!(f, "cannot receive {path}"),
            What::Special => write!(f, "{path} is neither a file, a directory nor a link"),
            What::Depth => write!(f, "{path} lies in more than {} directories", crate::MAX_DEPTH),
            What::NoDirectory => write!(f, "there is no directory {path}"),
            What::NotDirectory => write!(f, "{path} is there and is no directory"),
            What::Ended => write!(f, "the copy ended in the middle of {path}"),
            What::Malformed => write!(f, "what was received for {path} is no copy of files"),
            What::Link => {
                write!(f, "{path} is a symbolic link, which is not followed here; name the directory itself")
            }
            What::LeftOut => write!(f, "left out what is neither file, directory nor link, {path} for one"),
        }?;
        match self.error {
            Some(error) => write!(f, ": {error}"),
            None => Ok(()),
        }
    }
}

impl core::error::Error for Failure {}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn failures_survive() {
        for what in What::ALL {
            for error in [None, Some(Errno::NOSPC)] {
                let failure = Failure { what, error, path: b"/a\xff".into() };
                assert_eq!(Failure::from_bytes(&failure.to_bytes()), Some(failure));
            }
        }
        let long = Failure { what: What::Read, error: None, path: [b'x'; 9000].into() };
        assert_eq!(long.to_bytes().len(), Failure::MOST_BYTES);
    }

    proptest! {
        #[test]
        fn any_bytes_are_taken(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            if let Some(failure) = Failure::from_bytes(&bytes) {
                prop_assert_eq!(failure.to_bytes(), bytes);
                let _ = alloc::format!("{failure}");
            }
        }
    }
}
