//! Failures, in a form that the guest can send to the host.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;
use rustix::io::Errno;

/// The operation that failed, or the reason of the failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum FailureKind {
    /// A file could not be opened.
    Open = 1,
    /// A file could not be read.
    Read,
    /// A file, link or directory could not be created.
    Create,
    /// A file could not be written.
    Write,
    /// A complete file or link could not be renamed to its final name.
    Replace,
    /// Mode, owner or time could not be set.
    Attributes,
    /// The stream could not be written.
    Send,
    /// The stream could not be read.
    Receive,
    /// The source or destination is neither a file nor a directory nor a symbolic link.
    UnsupportedType,
    /// More than [`MAX_DEPTH`](crate::MAX_DEPTH) nested directories.
    TooDeep,
    /// The destination is a directory that does not exist.
    MissingDirectory,
    /// The path exists and is not a directory.
    NotDirectory,
    /// The stream ended before its content was complete.
    Truncated,
    /// The stream is invalid.
    Malformed,
    /// A warning: special files, of which this is the first, were skipped.
    Skipped,
    /// The destination of an untrusted sender's directory, or of a file meant for a directory, is a symbolic link.
    Symlink,
    /// A directory in the path of an untrusted sender's destination is a symbolic link that leads away.
    LinkAway,
}

impl FailureKind {
    const ALL: [Self; 17] = [
        Self::Open,
        Self::Read,
        Self::Create,
        Self::Write,
        Self::Replace,
        Self::Attributes,
        Self::Send,
        Self::Receive,
        Self::UnsupportedType,
        Self::TooDeep,
        Self::MissingDirectory,
        Self::NotDirectory,
        Self::Truncated,
        Self::Malformed,
        Self::Skipped,
        Self::Symlink,
        Self::LinkAway,
    ];
}

/// A failure, with the path of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The operation or reason.
    pub kind: FailureKind,
    /// The error of the system call, if there is one.
    pub error: Option<Errno>,
    /// The path.
    pub path: Vec<u8>,
}

impl Failure {
    /// Maximum length of an encoded failure in bytes.
    pub const MAX_LEN: usize = 8 << 10;

    pub(crate) fn new(kind: FailureKind, path: &[u8]) -> Self {
        Self { kind, error: None, path: path.into() }
    }

    pub(crate) fn of(kind: FailureKind, path: &[u8]) -> impl FnOnce(Errno) -> Self {
        move |error| Self { kind, error: Some(error), path: path.into() }
    }

    /// Encodes the failure: kind (one byte), error number or zero (two bytes, little endian), path. A long path is
    /// truncated.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let error = self.error.and_then(|error| u16::try_from(error.raw_os_error()).ok()).unwrap_or(0);
        let path = self.path.iter().take(Self::MAX_LEN - 3);
        [self.kind as u8].into_iter().chain(error.to_le_bytes()).chain(path.copied()).collect()
    }

    /// Decodes a failure. Returns `None` if the bytes are invalid.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        /// linux/err.h.
        const MAX_ERRNO: u16 = 4095;
        let (&[kind, low, high], path) = bytes.split_first_chunk()?;
        let kind = FailureKind::ALL.into_iter().find(|&known| known as u8 == kind)?;
        let error = u16::from_le_bytes([low, high]);
        if error > MAX_ERRNO || path.len() > Self::MAX_LEN - 3 {
            return None;
        }
        let error = (error != 0).then(|| Errno::from_raw_os_error(error.into()));
        Some(Self { kind, error, path: path.into() })
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = String::from_utf8_lossy(&self.path);
        match self.kind {
            FailureKind::Open => write!(f, "cannot open {path}"),
            FailureKind::Read => write!(f, "cannot read {path}"),
            FailureKind::Create => write!(f, "cannot create {path}"),
            FailureKind::Write => write!(f, "cannot write {path}"),
            FailureKind::Replace => write!(f, "cannot replace {path}"),
            FailureKind::Attributes => write!(f, "cannot set mode, owner or time of {path}"),
            FailureKind::Send => write!(f, "cannot send {path}"),
            FailureKind::Receive => write!(f, "cannot receive {path}"),
            FailureKind::UnsupportedType => {
                write!(f, "{path} is neither a file, a directory nor a symbolic link")
            }
            FailureKind::TooDeep => {
                write!(f, "{path} is nested in more than {} directories", crate::MAX_DEPTH)
            }
            FailureKind::MissingDirectory => write!(f, "directory {path} does not exist"),
            FailureKind::NotDirectory => write!(f, "{path} exists and is not a directory"),
            FailureKind::Truncated => write!(f, "the stream ended in the middle of {path}"),
            FailureKind::Malformed => write!(f, "received an invalid stream for {path}"),
            FailureKind::Symlink => {
                write!(f, "{path} is a symbolic link, which is not followed; name the directory itself")
            }
            FailureKind::LinkAway => write!(
                f,
                "{path} is a symbolic link that leads out of its directory, and a guest may have created it; name the \
                 directory itself"
            ),
            FailureKind::Skipped => write!(f, "skipped special files, for example {path}"),
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
        for kind in FailureKind::ALL {
            for error in [None, Some(Errno::NOSPC)] {
                let failure = Failure { kind, error, path: b"/a\xff".into() };
                assert_eq!(Failure::from_bytes(&failure.to_bytes()), Some(failure));
            }
        }
        let long = Failure { kind: FailureKind::Read, error: None, path: [b'x'; 9000].into() };
        assert_eq!(long.to_bytes().len(), Failure::MAX_LEN);
    }

    proptest! {
        #[test]
        fn any_bytes_are_decoded_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            if let Some(failure) = Failure::from_bytes(&bytes) {
                prop_assert_eq!(failure.to_bytes(), bytes);
                let _ = alloc::format!("{failure}");
            }
        }
    }
}
