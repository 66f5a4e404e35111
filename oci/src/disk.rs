//! The limit on disk space: images do not fill a disk to the end.

use std::fs::File;
use std::io;

/// The fraction of the disk that stays free: one twentieth.
const RESERVE: u64 = 20;
/// Maximum of that in bytes: a twentieth of a large disk would be many gigabytes.
const RESERVE_MAX: u64 = 2 << 30;

/// Fails if less than a twentieth of the file's filesystem, and less than 2 GiB, are free.
pub(crate) fn check(file: &File) -> io::Result<()> {
    let disk = rustix::fs::fstatvfs(file)?;
    if disk.f_bavail < reserve(disk.f_blocks, disk.f_frsize) {
        let message = "the disk is full but for 5 % or 2 GiB, which is kept for others; `kindling image prune` \
                       removes unused images";
        return Err(io::Error::new(io::ErrorKind::StorageFull, message));
    }
    Ok(())
}

/// The number of blocks that stay free, of a filesystem with this number of blocks of this size.
fn reserve(blocks: u64, size: u64) -> u64 {
    (blocks / RESERVE).min(RESERVE_MAX / size.max(1))
}

#[cfg(test)]
mod tests {
    use super::reserve;

    #[test]
    fn a_twentieth_stays_free_but_no_more_than_2_gib() {
        assert_eq!(reserve(1000, 4096), 50);
        assert_eq!(reserve(1 << 28, 4096) * 4096, 2 << 30);
        // A filesystem that has no size has no reserve.
        assert_eq!(reserve(0, 0), 0);
    }
}
