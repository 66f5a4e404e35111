//! The kernel of guests: its image, and where it is kept when it was booted before.

use kindling_vmm::config::Config;
use kindling_vmm::config::image::Image;
use kindling_vmm::preboot;
use std::path::{Path, PathBuf};
use trusted_path::Owners;

/// Why there is no kernel.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// None is found.
    #[error(
        "there is no kernel to run it on: set KINDLING_IMAGE to a folder that `cargo xtask build-image --profile run` made"
    )]
    NoKernel,
    /// None is where the user says.
    #[error(
        "KINDLING_IMAGE is {}, where there is no image.json: name a folder that `cargo xtask build-image --profile run` made",
        .0.display()
    )]
    NoKernelAt(PathBuf),
    /// Others could change it.
    #[error(transparent)]
    Untrusted(#[from] trusted_path::Error),
}

/// The folder with the kernel: named by KINDLING_IMAGE, or where an installation or a build has it.
///
/// # Errors
/// When there is none, or others can change it.
pub fn kernel_image() -> Result<PathBuf, KernelError> {
    if let Some(path) = std::env::var_os("KINDLING_IMAGE").filter(|path| !path.is_empty()) {
        let path = PathBuf::from(path);
        if !path.join("image.json").exists() {
            return Err(KernelError::NoKernelAt(path));
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
    places.find(is_trusted).ok_or(KernelError::NoKernel)
}

/// Where pre-booted kernels are kept: the user's cache.
#[must_use]
pub fn cache() -> Option<PathBuf> {
    let given = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = given("XDG_CACHE_HOME").or_else(|| Some(given("HOME")?.join(".cache")))?;
    Some(cache.join("kindling"))
}

/// Where the kernel is that was booted before for guests like this one; the same for all root filesystems.
pub(crate) fn preboot_path(config: &Config) -> Result<Option<PathBuf>, trusted_path::Error> {
    let Some((cache, key)) = cache().zip(preboot::key(config)) else { return Ok(None) };
    let path = Image::preboot_path(&cache.join("kernels").join(key), &config.machine, &config.devices);
    match trusted_path::folder(path.parent().unwrap_or(&path), Owners::own()) {
        Err(error) if !error.is_absent() => Err(error),
        _ => Ok(Some(path)),
    }
}
