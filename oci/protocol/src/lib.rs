//! What `kindling-oci` prints as JSON, for itself and for the programs that execute it. `docs/oci.md` has the commands.

#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// A prepared image: a root filesystem and the image's configuration.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Prepared {
    /// Path of the file with an EROFS filesystem.
    pub rootfs: PathBuf,
    /// The image's id: `sha256:` and the digest of its configuration, in hexadecimal digits. Empty for an EROFS file that
    /// the user has given instead of an image.
    pub digest: String,
    /// Configuration of the image.
    pub config: ImageConfig,
    /// What this answer depends on, in absolute paths: while none of it changes, and `rootfs` exists, a request with the same
    /// words in the same directory has the same answer.
    #[serde(default)]
    pub depends: Depends,
}

/// The files on which an answer depends.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct Depends {
    /// The archive, the index of a directory, or the file of the cache for a name of a registry.
    pub source: PathBuf,
    /// Files that would have been opened instead if they had existed.
    pub absent: Vec<PathBuf>,
}

/// Configuration of an image: the defaults of its command.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct ImageConfig {
    /// Program and first arguments of the command.
    pub entrypoint: Vec<String>,
    /// Arguments after the entrypoint, unless the user gives some.
    pub cmd: Vec<String>,
    /// Environment variables, `NAME=VALUE`.
    pub env: Vec<String>,
    /// Working directory of the command; empty for `/`.
    pub working_dir: String,
    /// Name of the signal that stops the command.
    pub stop_signal: Option<String>,
    /// Ports on which the command listens, such as `80/tcp`.
    pub exposed_ports: Vec<String>,
    /// User of the command.
    #[serde(default)]
    pub user: User,
}

/// A user of an image, with its groups.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default)]
pub struct User {
    /// User ID.
    pub uid: u32,
    /// Group ID.
    pub gid: u32,
    /// All group IDs, with the primary one.
    pub groups: Vec<u32>,
    /// Home directory, from the image's `/etc/passwd`; `None` if there is no image.
    pub home: Option<String>,
    /// Name; empty if `/etc/passwd` has no entry.
    pub name: String,
}

/// A converted image in the cache.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct CachedImage {
    /// The image's id: `sha256:` and the digest of its configuration, in hexadecimal digits.
    pub id: String,
    /// The names and paths by which it was opened.
    pub names: Vec<String>,
    /// Bytes on the disk.
    pub bytes: u64,
    /// Time of the last use, in seconds since 1970.
    pub used: u64,
}
