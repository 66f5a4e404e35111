//! Where Kindling's programs and the guest kernel are. A program that embeds the library sets them once, before it opens the
//! first image; for others, the environment variables KINDLING_PROGRAMS and KINDLING_IMAGE name them.

use crate::kernel;
use std::path::PathBuf;

/// A directory was set before, to another value.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the directory is set to {} already", .0.display())]
pub struct AlreadySet(pub PathBuf);

/// Sets the directory of `kindling-vmm`, `kindling-oci` and `kindling-fs` for this process.
///
/// # Errors
/// When another directory was set before.
pub fn set_programs(directory: impl Into<PathBuf>) -> Result<(), AlreadySet> {
    let directory = directory.into();
    check(trusted_path::set_companions(directory.clone()), &directory)
}

/// Sets the directory of the guest kernel for this process: an image made by `cargo xtask build-image --profile run`.
///
/// # Errors
/// When another directory was set before.
pub fn set_kernel(directory: impl Into<PathBuf>) -> Result<(), AlreadySet> {
    let directory = directory.into();
    check(kernel::DIRECTORY.get_or_init(|| directory.clone()), &directory)
}

/// Compares the directory that is set with the one that was to be.
fn check(set: &PathBuf, wanted: &PathBuf) -> Result<(), AlreadySet> {
    if set == wanted { Ok(()) } else { Err(AlreadySet(set.clone())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_set_once() {
        // No test of this process starts a guest.
        assert_eq!(set_kernel("/a"), Ok(()));
        assert_eq!(set_kernel("/a"), Ok(()));
        assert_eq!(set_kernel("/b"), Err(AlreadySet("/a".into())));
        assert!(
            kernel::kernel_image()
                .unwrap_err()
                .to_string()
                .starts_with("the directory of the guest kernel is /a,")
        );
    }
}
