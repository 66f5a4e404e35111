//! The guest kernel: its image, and the cache of pre-booted kernels.

use kindling_vmm::config::image::{DESCRIPTION, Image};
use kindling_vmm::config::{Config, ConfigError};
use kindling_vmm::preboot;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use trusted_path::Owners;

/// An error of the guest kernel.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// No kernel was found.
    #[error(
        "no guest kernel found: set KINDLING_IMAGE to a directory made by `cargo xtask build-image --profile run`"
    )]
    NoKernel,
    /// The directory that KINDLING_IMAGE names has no kernel.
    #[error(
        "the directory of the guest kernel is {}, which has no image.json: set KINDLING_IMAGE, or the directory in the \
         program, to one made by `cargo xtask build-image --profile run`",
        .0.display()
    )]
    NoKernelAt(PathBuf),
    /// The description of the kernel's image is invalid.
    #[error(transparent)]
    Image(#[from] ConfigError),
    /// Other users could change the kernel.
    #[error(transparent)]
    Untrusted(#[from] trusted_path::Error),
}

/// The directory of the guest kernel, if this process has set it ([`crate::installation::set_kernel`]).
pub(crate) static DIRECTORY: OnceLock<PathBuf> = OnceLock::new();

/// Returns the directory of the guest kernel: that of [`set_kernel`](crate::installation::set_kernel), the value of KINDLING_IMAGE, or `share/kindling/run`, `images/run`,
/// `share/kindling/default` or `images/default` in a directory above the program.
///
/// # Errors
/// When there is no kernel, or other users can change it.
pub fn kernel_image() -> Result<PathBuf, KernelError> {
    Ok(trusted_folder()?.0)
}

/// The image of the guest kernel, and its directory. Other users can change neither its description nor its files.
pub(crate) fn open_image() -> Result<(PathBuf, Image), KernelError> {
    let (path, folder) = trusted_folder()?;
    let image = Image::open(&path)?;
    for file in [&image.kernel, &image.initrd] {
        match trusted_path::file_in(&folder, &path, &file.file, Owners::and_of_program()) {
            // Reported when it is opened.
            Err(error) if error.is_absent() => {}
            result => result?,
        }
    }
    Ok((path, image))
}

fn trusted_folder() -> Result<(PathBuf, OwnedFd), KernelError> {
    let checked = |path: PathBuf| {
        let folder = trusted_path::folder(&path, Owners::and_of_program())?;
        trusted_path::file_in(&folder, &path, DESCRIPTION, Owners::and_of_program())?;
        Ok((path, folder))
    };
    let given = || std::env::var_os("KINDLING_IMAGE").filter(|path| !path.is_empty()).map(PathBuf::from);
    if let Some(path) = DIRECTORY.get().cloned().or_else(given) {
        if !path.join(DESCRIPTION).exists() {
            return Err(KernelError::NoKernelAt(path));
        }
        return checked(path).map_err(KernelError::Untrusted);
    }
    let program = std::env::current_exe().unwrap_or_default();
    // The kernel for `kindling run` is preferred in all directories; one for `kindling boot` has fewer features.
    let mut candidates = ["run", "default"].into_iter().flat_map(|name| {
        let in_folder =
            move |folder: &Path| ["share/kindling", "images"].map(|kind| folder.join(kind).join(name));
        program.ancestors().skip(1).flat_map(in_folder)
    });
    // A directory above the program may be writable by all users, /tmp for instance.
    candidates.find_map(|candidate| checked(candidate).ok()).ok_or(KernelError::NoKernel)
}

/// Returns the cache of the user: `$XDG_CACHE_HOME/kindling` or `~/.cache/kindling`. `None` if neither variable is an
/// absolute path.
#[must_use]
pub fn cache() -> Option<PathBuf> {
    crate::data::user_directory("XDG_CACHE_HOME", ".cache")
}

/// The directory of pre-booted kernels: KINDLING_KERNELS, or else one in the user's cache.
fn preboots() -> Option<PathBuf> {
    let given = std::env::var_os("KINDLING_KERNELS").filter(|path| !path.is_empty());
    let given = given.and_then(|path| std::path::absolute(path).ok());
    given.or_else(|| Some(cache()?.join("kernels")))
}

/// The path of the pre-booted kernel for a configuration. It does not depend on the root filesystem.
pub(crate) fn preboot_path(config: &Config) -> Result<Option<PathBuf>, trusted_path::Error> {
    let Some((folder, key)) = preboots().zip(preboot::key(config)) else { return Ok(None) };
    let path = Image::preboot_path(&folder.join(key), &config.machine, &config.devices);
    match trusted_path::folder(path.parent().unwrap_or(&path), Owners::own()) {
        Err(error) if !error.is_absent() => Err(error),
        _ => Ok(Some(path)),
    }
}
