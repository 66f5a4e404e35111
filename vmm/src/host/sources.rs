//! The files that facts are read from.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

/// Maximum number of bytes that are read of a file: enough for `/proc/self/mountinfo` on a host with thousands of
/// containers. Longer files are truncated: of `/proc/cpuinfo` only the first processor matters.
const MAX_FILE_LEN: u64 = 1 << 20;

/// The directory tree that facts are read from.
#[derive(Clone, Debug)]
pub struct Sources {
    root: PathBuf,
}

impl Sources {
    /// The files of this host.
    #[must_use]
    pub fn host() -> Self {
        Self::under("/")
    }

    /// The directories `proc`, `sys`, `dev` and `etc` below `root`.
    #[must_use]
    pub fn under(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The path of a host file in the tree.
    pub(super) fn path(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    pub(super) fn exists(&self, path: &str) -> bool {
        self.path(path).exists()
    }

    /// The text of a file without the trailing newline.
    pub(super) fn read(&self, path: &str) -> Result<String, Unreadable> {
        let mut bytes = Vec::new();
        File::open(self.path(path))
            .and_then(|file| file.take(MAX_FILE_LEN).read_to_end(&mut bytes))
            .map_err(|source| Unreadable { path: path.into(), source })?;
        Ok(String::from_utf8_lossy(&bytes).trim_end().to_owned())
    }

    /// The number in a file.
    pub(super) fn number(&self, path: &str) -> Result<u64, String> {
        let text = self.read(path).map_err(|error| error.to_string())?;
        text.parse().map_err(|_| format!("{path} says {} where a number was expected", super::quoted(&text)))
    }

    /// Opens a device for reading and writing, and closes it again.
    pub(super) fn open_device(&self, path: &str) -> io::Result<()> {
        OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(self.path(path))
            .map(drop)
    }
}

/// A file that could not be read.
#[derive(Debug)]
pub(super) struct Unreadable {
    path: String,
    source: io::Error,
}

impl Unreadable {
    pub(super) fn is_missing(&self) -> bool {
        self.source.kind() == io::ErrorKind::NotFound
    }
}

impl fmt::Display for Unreadable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_missing() {
            write!(f, "{} does not exist", self.path)
        } else {
            write!(f, "{} cannot be read: {}", self.path, self.source)
        }
    }
}
