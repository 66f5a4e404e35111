//! The guest kernel: its image, and the cache of pre-booted kernels.

use kindling_vmm::config::image::{DESCRIPTION, Image};
use kindling_vmm::config::{Config, ConfigError};
use kindling_vmm::layout::MIB;
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
    let given = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = given("XDG_CACHE_HOME").or_else(|| Some(given("HOME")?.join(".cache")))?;
    Some(cache.join("kindling"))
}

/// The path of the pre-booted kernel for a configuration. It does not depend on the root filesystem.
pub(crate) fn preboot_path(config: &Config) -> Result<Option<PathBuf>, trusted_path::Error> {
    let Some((cache, key)) = cache().zip(preboot::key(config)) else { return Ok(None) };
    let path = |folder: &Path| Image::preboot_path(&folder.join(&key), &config.machine, &config.devices);
    let trusted = |path: PathBuf| match trusted_path::folder(path.parent().unwrap_or(&path), Owners::own()) {
        Err(error) if !error.is_absent() => Err(error),
        _ => Ok(Some(path)),
    };
    let cache = cache.join("kernels");
    match folder_in_memory(&cache) {
        Some((folder, free)) if path(&folder).exists() || free > 4 * size_of_file(config) => {
            trusted(path(&folder))
        }
        _ => trusted(path(&cache)),
    }
}

/// An estimate of the size of a pre-booted kernel's file in bytes: the kernel, and its structures for each page of memory.
const fn size_of_file(config: &Config) -> u64 {
    (config.machine.mem_size_mib * MIB / 64).saturating_add(16 * MIB)
}

/// The directory of pre-booted kernels in memory, and the bytes that are free there: the host maps huge pages only of files
/// in memory (tmpfs). `None` if the cache is in memory anyway, or the user has no runtime directory in memory.
fn folder_in_memory(cache: &Path) -> Option<(PathBuf, u64)> {
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|path| path.is_absolute())?;
    let free = free_in_memory(&runtime)?;
    let exists = cache.ancestors().find(|folder| folder.exists())?;
    free_in_memory(exists).is_none().then(|| (runtime.join("kindling-kernels"), free))
}

/// The bytes that are free in a filesystem in memory, or `None` for another one.
fn free_in_memory(path: &Path) -> Option<u64> {
    /// `TMPFS_MAGIC` (include/uapi/linux/magic.h).
    const TMPFS: u64 = 0x0102_1994;
    let filesystem = rustix::fs::statfs(path).ok()?;
    let size = u64::try_from(filesystem.f_bsize).ok()?;
    (u64::try_from(filesystem.f_type).ok()? == TMPFS).then(|| filesystem.f_bavail.saturating_mul(size))
}

/// Removes old pre-booted kernels from memory, after the one at `path` was created: those of other versions and images take
/// memory until the user's last session ends. Guests that run from them keep their pages.
pub(crate) fn remove_old(path: &Path) {
    /// Number of kernels that are kept, each with a file for each size of guest.
    const KEPT: usize = 4;
    let Some(folder) = path.ancestors().find(|folder| folder.ends_with("kindling-kernels")) else { return };
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    let modified = |entry: &std::fs::DirEntry| entry.metadata().and_then(|metadata| metadata.modified()).ok();
    let mut kernels: Vec<_> = entries.flatten().map(|entry| (modified(&entry), entry.path())).collect();
    kernels.sort_by(|a, b| b.cmp(a));
    for (_, kernel) in kernels.into_iter().skip(KEPT) {
        let _ = std::fs::remove_dir_all(kernel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_latest_kernels_stay_in_memory() {
        let scratch = tempfile::tempdir().unwrap();
        let folder = scratch.path().join("kindling-kernels");
        for number in 0..7_u64 {
            let kernel = folder.join(number.to_string());
            std::fs::create_dir_all(&kernel).unwrap();
            std::fs::write(kernel.join("1-512"), "").unwrap();
            let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(number);
            std::fs::File::open(kernel).unwrap().set_modified(time).unwrap();
        }
        remove_old(&folder.join("6/1-512"));
        let mut left: Vec<_> =
            std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["3", "4", "5", "6"]);
        // Kernels in the cache stay.
        std::fs::create_dir_all(scratch.path().join("kernels/7")).unwrap();
        remove_old(&scratch.path().join("kernels/7/1-512"));
        assert!(scratch.path().join("kernels/7").exists());
    }
}
