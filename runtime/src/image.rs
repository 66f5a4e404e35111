//! Container images: what they are converted to, and what they say of the command.

use serde::{Deserialize, Serialize};
use std::ffi::{OsStr, OsString};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// Another image or another name mends it. The program that converts images has said what.
    #[error("{0} cannot be run")]
    Refused(String),
    /// The program that converts images said why not.
    #[error("{}", if .0.is_empty() { "kindling-oci ended without a word" } else { .0.as_str() })]
    Prepare(String),
    /// It failed, and another image would not help.
    #[error("{0} cannot be prepared")]
    Failed(String),
    /// That program is not there.
    #[error("cannot run kindling-oci, which has to lie beside kindling")]
    NoConverter(#[source] io::Error),
    /// Others could change what is run.
    #[error(transparent)]
    Untrusted(#[from] trusted_path::Error),
    /// It printed something else.
    #[error("kindling-oci and kindling are of different versions")]
    Version(#[source] serde_json::Error),
}

/// A root filesystem, and what its image says of how to use it.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Prepared {
    /// The file with an EROFS filesystem.
    pub rootfs: PathBuf,
    #[serde(default)]
    /// What the image says of its command.
    pub config: ImageConfig,
}

/// A container image, ready for guests.
#[derive(Clone, Debug)]
pub struct Image {
    source: OsString,
    prepared: Prepared,
}

impl Image {
    /// An image by a registry's name, the path of an archive of `docker save` or of a folder with an OCI layout, which
    /// begins with `/` or `.` or ends like one, or the path of an EROFS filesystem. It is converted where that was not
    /// done, and pulled where it is missing.
    ///
    /// # Errors
    /// When it cannot be read, pulled or converted.
    pub fn open(image: impl AsRef<OsStr>) -> Result<Self, ImageError> {
        let source = image.as_ref().to_owned();
        let prepared = prepare(&source, None, "missing")?;
        Ok(Self { source, prepared })
    }

    pub(crate) fn source(&self) -> &OsStr {
        &self.source
    }

    pub(crate) const fn prepared(&self) -> &Prepared {
        &self.prepared
    }
}

/// What an image says of its command.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct ImageConfig {
    /// Its program, and the first arguments.
    pub entrypoint: Vec<String>,
    /// Further arguments, unless the user has some.
    pub cmd: Vec<String>,
    /// Entries of the environment, NAME=VALUE.
    pub env: Vec<String>,
    /// The user of the command.
    pub user: User,
    /// Where the command starts; empty for /.
    pub working_dir: String,
    /// The name of the signal that asks the command to end.
    pub stop_signal: Option<String>,
}

/// A user of an image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default)]
pub struct User {
    /// Number of the user.
    pub uid: u32,
    /// Number of the group.
    pub gid: u32,
    /// Further groups.
    pub groups: Vec<u32>,
    /// The home directory, as /etc/passwd has it.
    pub home: Option<String>,
}

/// A root filesystem from what a user named: a file that is one, or an image that is converted first. `user` is UID,
/// UID:GID, or names of the image; `pull` is `missing`, `always` or `never`.
///
/// # Errors
/// When the image cannot be read, converted or pulled.
pub fn prepare(image: &OsStr, user: Option<&str>, pull: &str) -> Result<Prepared, ImageError> {
    prepare_in(Path::new("."), image, user, pull)
}

/// The same where paths begin in another directory.
fn prepare_in(
    directory: &Path,
    image: &OsStr,
    user: Option<&str>,
    pull: &str,
) -> Result<Prepared, ImageError> {
    if names_a_filesystem(image, pull) && is_erofs(&directory.join(image)) {
        let user = user.map(numeric_user).transpose()?.unwrap_or_default();
        return Ok(Prepared { rootfs: image.into(), config: ImageConfig { user, ..ImageConfig::default() } });
    }
    let mut command = Command::new(converter()?);
    let own = std::process::id().to_string();
    command.current_dir(directory).args(["prepare", "--pull", pull, "--for", &own]);
    if let Some(user) = user {
        command.args(["--user", user]);
    }
    let output = command.arg("--").arg(image).stdin(Stdio::null()).stderr(Stdio::inherit()).output();
    let output = output.map_err(ImageError::NoConverter)?;
    if !output.status.success() {
        /// Of kindling-oci, where another image or another name mends it.
        const USERS: i32 = 2;
        // It has said why.
        let image = Path::new(image).display();
        return Err(match output.status.code() {
            Some(USERS) => ImageError::Refused(image.to_string()),
            _ => ImageError::Failed(image.to_string()),
        });
    }
    serde_json::from_slice(&output.stdout).map_err(ImageError::Version)
}

/// The program that converts images.
///
/// # Errors
/// When it is missing, or others can change it.
pub fn converter() -> Result<PathBuf, ImageError> {
    match trusted_path::companion("kindling-oci") {
        Ok(program) => Ok(program),
        Err(error) if error.is_absent() => Err(ImageError::NoConverter(io::ErrorKind::NotFound.into())),
        Err(error) => Err(error.into()),
    }
}

/// Whether a name can be that of a filesystem's file, by its form: the current directory may be a stranger's, so that
/// no file in it answers for a name of a registry. `kindling-oci` does the same for its images.
fn names_a_filesystem(image: &OsStr, pull: &str) -> bool {
    let name = image.as_bytes();
    let is_pinned = name.windows(8).any(|part| part == b"@sha256:");
    name.starts_with(b"/")
        || name.starts_with(b".")
        || (name.ends_with(b".erofs") && pull != "always" && !is_pinned)
}

/// Whether a file is a filesystem of the kind that guests mount (`struct erofs_super_block` in fs/erofs/erofs_fs.h).
fn is_erofs(path: &Path) -> bool {
    const AT: usize = 1024;
    const MAGIC: [u8; 4] = 0xe0f5_e1e2_u32.to_le_bytes();
    let mut head = [0; AT + 4];
    path.is_file()
        && std::fs::File::open(path).and_then(|mut file| file.read_exact(&mut head)).is_ok()
        && head[AT..] == MAGIC
}

/// A user of the image that a guest was made from, which was named in `directory`.
///
/// # Errors
/// When the image has no such user.
pub fn user(directory: &Path, image: &OsStr, text: &str) -> Result<User, ImageError> {
    if text.contains(':')
        && let Ok(user) = numeric_user(text)
    {
        return Ok(user);
    }
    match prepare_in(directory, image, Some(text), "never") {
        Ok(prepared) => Ok(prepared.config.user),
        Err(ImageError::Refused(_)) => Err(ImageError::Prepare(format!("{text:?} is no user of the guest"))),
        Err(error) => Err(error),
    }
}

fn numeric_user(text: &str) -> Result<User, ImageError> {
    let number = |text: &str| text.parse().ok().filter(|&id| id != u32::MAX);
    let (uid, gid) = text.split_once(':').unwrap_or((text, text));
    match (number(uid), number(gid)) {
        (Some(uid), Some(gid)) => Ok(User { uid, gid, ..User::default() }),
        _ => Err(ImageError::Prepare(format!(
            "{text:?} is not UID or UID:GID, and a bare filesystem has no names"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_file_answers_for_a_name_of_a_registry() {
        let names = |image: &str, pull| names_a_filesystem(image.as_ref(), pull);
        for image in ["/a", "./busybox", "../x", "root.erofs", "folder/root.erofs"] {
            assert!(names(image, "missing") && names(image, "never"), "{image}");
        }
        for image in
            ["busybox", "busybox:1", "team/app", "host.example/app:1", "a@sha256:0.erofs", "root.erofs:1"]
        {
            assert!(!names(image, "missing"), "{image}");
        }
        assert!(!names("root.erofs", "always") && names("./root.erofs", "always"));
    }
}
