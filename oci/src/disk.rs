//! The limit on disk space: images do not fill the last 5 %.

use std::fs::File;
use std::io;

/// The fraction of the disk that stays free: one twentieth.
const RESERVE: u64 = 20;

/// Fails if less than a twentieth of the file's filesystem is free.
pub(crate) fn check(file: &File) -> io::Result<()> {
    let disk = rustix::fs::fstatvfs(file)?;
    if disk.f_bavail < disk.f_blocks / RESERVE {
        let message = "less than 5 % of the disk is free, which is kept for others; `kindling image prune` \
                       removes unused images";
        return Err(io::Error::new(io::ErrorKind::StorageFull, message));
    }
    Ok(())
}
