//! Container images: their conversion to root filesystems, and their configuration.

mod memo;

pub use oci_protocol::{CachedImage, Depends, ImageConfig, Prepared, User};

use crate::converter;
use memo::Request;
use std::ffi::{OsStr, OsString};
use std::io::{self, IsTerminal, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::SystemTime;

/// An error of a container image.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// The image does not exist or is invalid: its name, and the reason, unless [`prepare`] has printed it.
    #[error("cannot use the image {0}")]
    Refused(String),
    /// The user of the command is invalid; the message says why.
    #[error("{0}")]
    Prepare(String),
    /// The cache of images; the message is that of `kindling-oci`.
    #[error("{0}")]
    Cache(String),
    /// The conversion failed for a reason that is not the image's: its name, and the reason, unless [`prepare`] has printed
    /// it.
    #[error("cannot convert the image {0}")]
    Failed(String),
    /// `kindling-oci`, the program that converts images, cannot be executed.
    #[error("cannot run kindling-oci; install it in the same directory as kindling")]
    NoConverter(#[source] io::Error),
    /// Other users could change `kindling-oci`.
    #[error(transparent)]
    Untrusted(#[from] trusted_path::Error),
    /// `kindling-oci` printed a result that this version cannot parse.
    #[error("kindling-oci and kindling are of different versions")]
    Version(#[source] serde_json::Error),
}

/// The message for a `kindling-oci` that a signal has ended, with the likely cause.
fn by_signal(signal: i32) -> String {
    let cause = match signal {
        libc::SIGSYS => {
            " for a system call that its sandbox refuses; if you trust the image, this is an error of Kindling: report it"
        }
        libc::SIGXCPU => " for taking a day of processor time",
        _ => "",
    };
    format!("signal {signal} ended kindling-oci{cause}")
}

/// A container image that is ready for guests.
#[derive(Clone, Debug)]
pub struct Image {
    source: OsString,
    prepared: Prepared,
}

impl Image {
    /// Opens an image: a name of a registry, the path of an archive of `docker save` or of a directory with an OCI layout,
    /// or the path of an EROFS filesystem. Paths start with `/` or `.`, or end like one (`docs/oci.md`). A missing image
    /// is pulled, and an image is converted to a root filesystem once.
    ///
    /// # Errors
    /// When the image cannot be read, pulled or converted. The error has the reason that `kindling-oci` gives.
    pub fn open(image: impl AsRef<OsStr>) -> Result<Self, ImageError> {
        Self::open_with(image, PullPolicy::Missing)
    }

    /// Opens an image as [`Self::open`], and contacts the registry as `pull` says.
    ///
    /// # Errors
    /// When the image cannot be read, pulled or converted.
    pub fn open_with(image: impl AsRef<OsStr>, pull: PullPolicy) -> Result<Self, ImageError> {
        let source = image.as_ref().to_owned();
        let prepared = prepare_in(Path::new("."), &source, None, pull.as_str(), Messages::InError)?;
        Ok(Self { source, prepared })
    }

    /// An image that was prepared for a template.
    pub(crate) const fn of_template(source: OsString, prepared: Prepared) -> Self {
        Self { source, prepared }
    }

    pub(crate) fn source(&self) -> &OsStr {
        &self.source
    }

    /// Returns the root filesystem and the configuration.
    #[must_use]
    pub const fn prepared(&self) -> &Prepared {
        &self.prepared
    }
}

/// When an image is pulled from its registry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PullPolicy {
    /// When the cache does not have it.
    #[default]
    Missing,
    /// Each time, unless the registry's image is the one in the cache.
    Always,
    /// Never: an image that is not in the cache is an error.
    Never,
}

impl PullPolicy {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::Always => "always",
            Self::Never => "never",
        }
    }
}

/// The images in the cache, the most recently used first.
///
/// # Errors
/// When the cache cannot be read.
pub fn images() -> Result<Vec<CachedImage>, ImageError> {
    in_cache("ls", &[])
}

/// Removes an image from the cache by a name, or by the first digits of its id. Running guests are not affected. Returns
/// what was removed.
///
/// # Errors
/// When the cache has no such image, or it cannot be removed.
pub fn remove_image(image: impl AsRef<OsStr>) -> Result<Vec<CachedImage>, ImageError> {
    in_cache("rm", &[OsStr::new("--"), image.as_ref()])
}

/// Removes the images that have not been used for this many days, and unfinished conversions. Returns what was removed.
///
/// # Errors
/// When an image cannot be removed.
pub fn prune_images(unused_days: u32) -> Result<Vec<CachedImage>, ImageError> {
    in_cache("prune", &[OsStr::new("--unused"), OsStr::new(&unused_days.to_string())])
}

/// Runs a command of `kindling-oci` that lists images.
fn in_cache(command: &str, arguments: &[&OsStr]) -> Result<Vec<CachedImage>, ImageError> {
    let output = converter::command(&converter()?)
        .args([command, "--json"])
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .map_err(ImageError::NoConverter)?;
    if let Some(signal) = output.status.signal() {
        return Err(ImageError::Cache(by_signal(signal)));
    }
    if !output.status.success() {
        let reason = reason(&output.stderr);
        return Err(ImageError::Cache(
            reason.unwrap_or_else(|| "kindling-oci failed without a message".to_owned()),
        ));
    }
    serde_json::from_slice(&output.stdout).map_err(ImageError::Version)
}

/// Prepares an image: returns an EROFS file as it is, and converts any other image to a root filesystem. `user` is
/// `USER[:GROUP]`, as names of the image or numbers, and overrides the image's user; `pull` is `missing`, `always` or
/// `never`.
///
/// # Errors
/// When the image cannot be read, pulled or converted, or has no such user.
pub fn prepare(image: &OsStr, user: Option<&str>, pull: &str) -> Result<Prepared, ImageError> {
    prepare_in(Path::new("."), image, user, pull, Messages::Printed)
}

/// Where messages of `kindling-oci` go.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Messages {
    /// To standard error, with the progress if that is a terminal.
    Printed,
    /// Into the error.
    InError,
}

/// [`prepare`] with relative paths resolved from `directory`.
fn prepare_in(
    directory: &Path,
    image: &OsStr,
    user: Option<&str>,
    pull: &str,
    messages: Messages,
) -> Result<Prepared, ImageError> {
    if has_path_form(image, pull) && is_erofs(&directory.join(image)) {
        let user = user.map(numeric_user).transpose()?.unwrap_or_default();
        let config = ImageConfig { user, ..ImageConfig::default() };
        return Ok(Prepared {
            rootfs: image.into(),
            digest: String::new(),
            config,
            depends: Depends::default(),
        });
    }
    let program = converter()?;
    let request = memo::folder().zip(Request::new(directory, image, user, &program));
    if pull != "always"
        && let Some(prepared) = request.as_ref().and_then(|(memos, request)| request.recall(memos))
    {
        return Ok(prepared);
    }
    let started = SystemTime::now();
    let prepared = convert(&program, directory, image, user, pull, messages)?;
    if let Some((memos, request)) = request {
        request.remember(&memos, &prepared, started);
    }
    Ok(prepared)
}

/// Asks `kindling-oci`, which is `program`, for an image.
fn convert(
    program: &Path,
    directory: &Path,
    image: &OsStr,
    user: Option<&str>,
    pull: &str,
    messages: Messages,
) -> Result<Prepared, ImageError> {
    let mut command = converter::command(program);
    let own = std::process::id().to_string();
    command.current_dir(directory).args(["prepare", "--pull", pull, "--for", &own]);
    if let Some(user) = user {
        command.args(["--user", user]);
    }
    let is_printed = messages == Messages::Printed;
    if is_printed && io::stderr().is_terminal() {
        command.arg("--progress");
    }
    command.arg("--").arg(image);
    let mut collected = Vec::new();
    let output = if is_printed {
        converter::run(&mut command, &mut io::stderr())
    } else {
        converter::run(&mut command, &mut collected)
    };
    let output = output.map_err(ImageError::NoConverter)?;
    let name = Path::new(image).display();
    if let Some(signal) = output.status.signal() {
        return Err(ImageError::Failed(format!("{name}: {}", by_signal(signal))));
    }
    if !output.status.success() {
        /// Exit status of kindling-oci for an invalid request, such as an image that does not exist.
        const STATUS_BAD_REQUEST: i32 = 2;
        // A reason names the image.
        let reason = reason(&collected).unwrap_or_else(|| name.to_string());
        return Err(match output.status.code() {
            Some(STATUS_BAD_REQUEST) => ImageError::Refused(reason),
            _ => ImageError::Failed(reason),
        });
    }
    let prepared: Prepared = serde_json::from_slice(&output.stdout).map_err(ImageError::Version)?;
    if !is_converted(&prepared.rootfs) {
        return Err(ImageError::Failed(format!(
            "{name}: kindling-oci named a file that is no converted image"
        )));
    }
    Ok(prepared)
}

/// The error among messages of `kindling-oci`: the last line.
fn reason(messages: &[u8]) -> Option<String> {
    let last = messages.trim_ascii_end().rsplit(|&byte| byte == b'\n').next()?;
    let reason = converter::printable(last.strip_prefix(b"error: ").unwrap_or(last));
    (!reason.is_empty()).then_some(reason)
}

/// Whether a path is that of a converted image in a cache: `/.../DIGEST/root.erofs`. The converter is not trusted, since
/// an image may have taken it over.
fn is_converted(path: &Path) -> bool {
    let folder = path.parent().and_then(Path::file_name).and_then(OsStr::to_str);
    path.is_absolute()
        && path.file_name() == Some(OsStr::new("root.erofs"))
        && folder.is_some_and(kindling_vmm::config::image::is_sha256)
}

/// Returns the path of `kindling-oci`, the program that converts images.
///
/// # Errors
/// When the program is missing, or other users can change it.
pub fn converter() -> Result<PathBuf, ImageError> {
    match trusted_path::companion("kindling-oci") {
        Ok(program) => Ok(program),
        Err(error) if error.is_absent() => Err(ImageError::NoConverter(io::ErrorKind::NotFound.into())),
        Err(error) => Err(error.into()),
    }
}

/// Whether an image's name has the form of a path to an EROFS file. Only the form counts: the current directory may
/// belong to another user, and a file in it must not take the place of an image of a registry. `kindling-oci` decides in
/// the same way.
fn has_path_form(image: &OsStr, pull: &str) -> bool {
    let name = image.as_bytes();
    let is_pinned = name.windows(8).any(|part| part == b"@sha256:");
    name.starts_with(b"/")
        || name.starts_with(b".")
        || (name.ends_with(b".erofs") && pull != "always" && !is_pinned)
}

/// Whether a file is an EROFS filesystem (`struct erofs_super_block` in fs/erofs/erofs_fs.h).
fn is_erofs(path: &Path) -> bool {
    const SUPER_OFFSET: usize = 1024;
    const MAGIC: [u8; 4] = 0xe0f5_e1e2_u32.to_le_bytes();
    let mut head = [0; SUPER_OFFSET + 4];
    path.is_file()
        && std::fs::File::open(path).and_then(|mut file| file.read_exact(&mut head)).is_ok()
        && head[SUPER_OFFSET..] == MAGIC
}

/// Looks up a user, `USER[:GROUP]`, in the image of a guest. A relative path of the image is resolved from `directory`.
///
/// # Errors
/// When the image has no such user, or cannot be read.
pub fn user(directory: &Path, image: &OsStr, text: &str) -> Result<User, ImageError> {
    if text.contains(':')
        && let Ok(user) = numeric_user(text)
    {
        return Ok(user);
    }
    let prepared = prepare_in(directory, image, Some(text), "never", Messages::InError)?;
    Ok(prepared.config.user)
}

fn numeric_user(text: &str) -> Result<User, ImageError> {
    let number = |text: &str| text.parse().ok().filter(|&id| id != u32::MAX);
    let (uid, gid) = text.split_once(':').unwrap_or((text, text));
    match (number(uid), number(gid)) {
        (Some(uid), Some(gid)) => Ok(User { uid, gid, ..User::default() }),
        _ => Err(ImageError::Prepare(format!(
            "{text:?} is not UID or UID:GID; with an EROFS file as image, users are numbers"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_converter_cannot_name_any_file() {
        let digest = "0123456789abcdef".repeat(4);
        assert!(is_converted(Path::new(&format!("/home/user/.cache/kindling/oci/v2/{digest}/root.erofs"))));
        for path in ["/dev/sda", "root.erofs", "/root.erofs", "/cache/abc/root.erofs"] {
            assert!(!is_converted(Path::new(path)), "{path}");
        }
        assert!(!is_converted(Path::new(&format!("{digest}/root.erofs"))));
        assert!(!is_converted(Path::new(&format!("/cache/{}/root.erofs", digest.replace('f', "F")))));
        assert!(!is_converted(Path::new(&format!("/cache/{digest}/image.json"))));
    }

    #[test]
    fn the_message_for_a_refused_system_call_names_it_as_the_cause() {
        assert!(by_signal(libc::SIGSYS).starts_with("signal 31 ended kindling-oci for a system call that"));
        assert_eq!(by_signal(libc::SIGKILL), "signal 9 ended kindling-oci");
    }

    #[test]
    fn a_file_does_not_take_the_place_of_an_image_of_a_registry() {
        let names = |image: &str, pull| has_path_form(image.as_ref(), pull);
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
