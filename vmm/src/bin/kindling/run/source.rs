//! What a guest is made from: the kernel's image, and a root filesystem with what its image says of the command.

use serde::{Deserialize, Serialize};
use std::ffi::OsStr;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use trusted_path::Owners;

/// Why there is nothing to run.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SourceError {
    /// No kernel.
    #[error(
        "there is no kernel to run it on: set KINDLING_IMAGE to a folder that `cargo xtask build-image --profile run` made"
    )]
    NoKernel,
    /// Another image or another name mends it. The program that converts images has said what.
    #[error("{0} cannot be run")]
    Refused(String),
    /// No kernel where the user says.
    #[error(
        "KINDLING_IMAGE is {}, where there is no image.json: name a folder that `cargo xtask build-image --profile run` made",
        .0.display()
    )]
    NoKernelAt(PathBuf),
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
#[derive(Debug, Default, Deserialize)]
pub(crate) struct Prepared {
    pub(crate) rootfs: PathBuf,
    #[serde(default)]
    pub(crate) config: ImageConfig,
}

/// What an image says of its command.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct ImageConfig {
    pub(crate) entrypoint: Vec<String>,
    pub(crate) cmd: Vec<String>,
    pub(crate) env: Vec<String>,
    pub(crate) user: User,
    pub(crate) working_dir: String,
    pub(crate) stop_signal: Option<String>,
}

/// A user of an image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default)]
pub(crate) struct User {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: Vec<u32>,
    pub(crate) home: Option<String>,
}

/// A root filesystem from what a user named: a file that is one, or an image that is converted first.
pub(crate) fn prepare(image: &OsStr, user: Option<&str>, pull: &str) -> Result<Prepared, SourceError> {
    prepare_in(Path::new("."), image, user, pull)
}

/// The same where paths begin in another directory.
fn prepare_in(
    directory: &Path,
    image: &OsStr,
    user: Option<&str>,
    pull: &str,
) -> Result<Prepared, SourceError> {
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
    let output = output.map_err(SourceError::NoConverter)?;
    if !output.status.success() {
        /// Of kindling-oci, where another image or another name mends it.
        const USERS: i32 = 2;
        // It has said why.
        let image = Path::new(image).display();
        return Err(match output.status.code() {
            Some(USERS) => SourceError::Refused(image.to_string()),
            _ => SourceError::Failed(image.to_string()),
        });
    }
    serde_json::from_slice(&output.stdout).map_err(SourceError::Version)
}

/// The program that converts images.
pub(crate) fn converter() -> Result<PathBuf, SourceError> {
    let program = std::env::current_exe().map_err(SourceError::NoConverter)?.with_file_name("kindling-oci");
    match trusted_path::file(&program, Owners::and_of_program()) {
        Ok(_) => Ok(program),
        Err(error) if error.is_absent() => Err(SourceError::NoConverter(io::ErrorKind::NotFound.into())),
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
pub(crate) fn user(directory: &Path, image: &OsStr, text: &str) -> Result<User, SourceError> {
    if text.contains(':')
        && let Ok(user) = numeric_user(text)
    {
        return Ok(user);
    }
    match prepare_in(directory, image, Some(text), "never") {
        Ok(prepared) => Ok(prepared.config.user),
        Err(SourceError::Refused(_)) => {
            Err(SourceError::Prepare(format!("{text:?} is no user of the guest")))
        }
        Err(error) => Err(error),
    }
}

fn numeric_user(text: &str) -> Result<User, SourceError> {
    let number = |text: &str| text.parse().ok().filter(|&id| id != u32::MAX);
    let (uid, gid) = text.split_once(':').unwrap_or((text, text));
    match (number(uid), number(gid)) {
        (Some(uid), Some(gid)) => Ok(User { uid, gid, ..User::default() }),
        _ => Err(SourceError::Prepare(format!(
            "{text:?} is not UID or UID:GID, and a bare filesystem has no names"
        ))),
    }
}

/// The folder with the kernel: named by KINDLING_IMAGE, or where an installation or a build has it.
pub(crate) fn kernel_image() -> Result<PathBuf, SourceError> {
    if let Some(path) = std::env::var_os("KINDLING_IMAGE").filter(|path| !path.is_empty()) {
        let path = PathBuf::from(path);
        if !path.join("image.json").exists() {
            return Err(SourceError::NoKernelAt(path));
        }
        trusted_path::folder(&path, Owners::and_of_program())?;
        return Ok(path);
    }
    let program = std::env::current_exe().unwrap_or_default();
    // The kernel for `kindling run` comes first, wherever it is; one for `kindling boot` has less in it.
    let mut places = ["run", "default"].into_iter().flat_map(|name| {
        let in_folder =
            move |folder: &Path| ["share/kindling", "images"].map(|kind| folder.join(kind).join(name));
        program.ancestors().skip(1).flat_map(in_folder)
    });
    // A folder above the program may be one in which everybody makes folders, /tmp for instance.
    let is_trusted =
        |place: &PathBuf| trusted_path::file(&place.join("image.json"), Owners::and_of_program()).is_ok();
    places.find(is_trusted).ok_or(SourceError::NoKernel)
}

/// Where pre-booted kernels are kept: the user's cache.
pub(crate) fn cache() -> Option<PathBuf> {
    let given = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = given("XDG_CACHE_HOME").or_else(|| Some(given("HOME")?.join(".cache")))?;
    Some(cache.join("kindling"))
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
