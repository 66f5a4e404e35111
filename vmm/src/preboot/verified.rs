//! Verifies kernel and initramfs against the digests of their image. They are copied into memory files first, so that
//! later writes to the image's files do not change what is booted.

use crate::boot::BootFiles;
use crate::config::image::{Digests, sha256_copying};
use crate::config::{BootSource, ConfigError};
use rustix::fs::{MemfdFlags, Mode, OFlags, memfd_create, open};
use std::fs::File;
use std::io::{self, Read, Seek};
use std::path::Path;

/// Copies at most `max` bytes of each file of a boot source into memory, and compares the digests.
///
/// # Errors
/// When a file cannot be read, or has another digest.
pub(crate) fn read(source: &BootSource, digests: &Digests, max: u64) -> Result<BootFiles, ConfigError> {
    let read = |path: &Path, digest: &str| -> Result<File, ConfigError> {
        let (copy, found) =
            copy(path, max).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        if found == digest {
            return Ok(copy);
        }
        let what = format!("its SHA-256 is {found} instead of {digest}");
        Err(ConfigError::ImageFile { path: path.to_owned(), what })
    };
    let kernel = read(&source.kernel_image_path, &digests.kernel)?;
    let initrd = source.initrd_path.as_ref().map(|path| read(path, &digests.initrd)).transpose()?;
    Ok(BootFiles { kernel, initrd })
}

/// Copies a file into memory, and returns the copy and its digest.
fn copy(path: &Path, max: u64) -> io::Result<(File, String)> {
    // Reading a file that is not regular could block or never end.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(open(path, flags, Mode::empty())?);
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file"));
    }
    let mut copy = File::from(memfd_create("verified", MemfdFlags::CLOEXEC)?);
    let digest = sha256_copying(file.take(max), &copy)?;
    copy.rewind()?;
    Ok((copy, digest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::image::sha256;
    use std::fs;

    #[test]
    fn later_writes_do_not_change_the_verified_copies() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::write(path("kernel"), "kernel").unwrap();
        fs::write(path("initrd"), "initrd").unwrap();
        let source = BootSource { initrd_path: Some(path("initrd")), ..BootSource::kernel(path("kernel")) };
        let digests = Digests { kernel: sha256(b"kernel"), initrd: sha256(b"initrd") };
        let mut files = read(&source, &digests, 1 << 20).unwrap();
        // The copies are independent of the files.
        fs::write(path("kernel"), "KERNEL").unwrap();
        fs::write(path("initrd"), "INITRD").unwrap();
        assert_eq!(io::read_to_string(&mut files.kernel).unwrap(), "kernel");
        assert_eq!(io::read_to_string(files.initrd.unwrap()).unwrap(), "initrd");
        let message = read(&source, &digests, 1 << 20).unwrap_err().to_string();
        assert!(
            message.contains("kernel is not the file that image.json describes: its SHA-256 is"),
            "{message}"
        );
        fs::write(path("kernel"), "kernel").unwrap();
        let message = read(&source, &digests, 1 << 20).unwrap_err().to_string();
        assert!(message.contains("initrd is not the file that image.json describes"), "{message}");
        fs::write(path("initrd"), "initrd").unwrap();
        assert!(read(&source, &digests, 3).is_err(), "at most 3 bytes are read");
        fs::remove_file(path("kernel")).unwrap();
        std::os::unix::fs::symlink("initrd", path("kernel")).unwrap();
        assert!(matches!(read(&source, &digests, 1 << 20), Err(ConfigError::Read { .. })));
    }
}
