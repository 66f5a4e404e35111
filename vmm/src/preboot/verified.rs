//! Kernel and initramfs that were compared with their image's digests, in memory of this process: what is read later is
//! what was compared, whoever may write to the image's files.

use crate::config::image::{Digests, sha256_copying};
use crate::config::{BootSource, ConfigError};
use rustix::fs::{MemfdFlags, Mode, OFlags, memfd_create, open};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

/// A boot source whose files are such copies.
#[derive(Debug)]
pub(super) struct Verified {
    pub(super) source: BootSource,
    _files: Vec<File>,
}

impl Verified {
    /// Copies the files, of at most so many bytes each, and compares them.
    ///
    /// # Errors
    /// When one cannot be read, or has another digest.
    pub(super) fn read(source: &BootSource, digests: &Digests, max: u64) -> Result<Self, ConfigError> {
        let mut files = Vec::new();
        let mut read = |path: &Path, digest: &str| -> Result<PathBuf, ConfigError> {
            let (copy, found) =
                copy(path, max).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
            if found != digest {
                let what = format!("its SHA-256 is {found} instead of {digest}");
                return Err(ConfigError::ImageFile { path: path.to_owned(), what });
            }
            let name = format!("/proc/self/fd/{}", copy.as_raw_fd()).into();
            files.push(copy);
            Ok(name)
        };
        let kernel_image_path = read(&source.kernel_image_path, &digests.kernel)?;
        let initrd_path = source.initrd_path.as_ref().map(|path| read(path, &digests.initrd)).transpose()?;
        Ok(Self { source: BootSource { kernel_image_path, initrd_path, ..source.clone() }, _files: files })
    }
}

/// A copy of a file in memory, and its digest.
fn copy(path: &Path, max: u64) -> io::Result<(File, String)> {
    // What is no regular file could block or never end.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(open(path, flags, Mode::empty())?);
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file"));
    }
    let copy = File::from(memfd_create("verified", MemfdFlags::CLOEXEC)?);
    let digest = sha256_copying(file.take(max), &copy)?;
    Ok((copy, digest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::image::sha256;
    use std::fs;

    #[test]
    fn what_is_booted_is_what_was_compared() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::write(path("kernel"), "kernel").unwrap();
        fs::write(path("initrd"), "initrd").unwrap();
        let source = BootSource { initrd_path: Some(path("initrd")), ..BootSource::kernel(path("kernel")) };
        let digests = Digests { kernel: sha256(b"kernel"), initrd: sha256(b"initrd") };
        let verified = Verified::read(&source, &digests, 1 << 20).unwrap();
        // Whatever is written to the files from now on.
        fs::write(path("kernel"), "KERNEL").unwrap();
        fs::write(path("initrd"), "INITRD").unwrap();
        assert_eq!(fs::read(&verified.source.kernel_image_path).unwrap(), b"kernel");
        assert_eq!(fs::read(verified.source.initrd_path.as_ref().unwrap()).unwrap(), b"initrd");
        let message = Verified::read(&source, &digests, 1 << 20).unwrap_err().to_string();
        assert!(
            message.contains("kernel is not the file that image.json describes: its SHA-256 is"),
            "{message}"
        );
        fs::write(path("kernel"), "kernel").unwrap();
        let message = Verified::read(&source, &digests, 1 << 20).unwrap_err().to_string();
        assert!(message.contains("initrd is not the file that image.json describes"), "{message}");
        fs::write(path("initrd"), "initrd").unwrap();
        assert!(Verified::read(&source, &digests, 3).is_err(), "a file without an end is not read for ever");
        fs::remove_file(path("kernel")).unwrap();
        std::os::unix::fs::symlink("initrd", path("kernel")).unwrap();
        assert!(matches!(Verified::read(&source, &digests, 1 << 20), Err(ConfigError::Read { .. })));
    }
}
