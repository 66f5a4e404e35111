//! Room on the disk: an image may not take all of it.

use std::fs::File;
use std::io;

/// One part of so many has to stay free.
const RESERVE: u64 = 20;

/// Fails where less than a twentieth of a file's disk is free.
pub(crate) fn check(file: &File) -> io::Result<()> {
    let disk = rustix::fs::fstatvfs(file)?;
    if disk.f_bavail < disk.f_blocks / RESERVE {
        let message = "less than 5 % of the disk is free, which is kept for others; `kindling image prune` \
                       removes unused images";
        return Err(io::Error::new(io::ErrorKind::StorageFull, message));
    }
    Ok(())
}
