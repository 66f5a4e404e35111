//! The file behind a disk.

use rustix::fs::{FlockOperation, Mode, OFlags, fcntl_getfl, fcntl_setfl, flock};
use rustix::io::Errno;
use std::fs::{File, Metadata};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

/// What the lock of another process on a file means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ForeignLock {
    /// The file cannot be had.
    InUse,
    /// Nothing.
    Ignored,
}

/// Opens a file that can be a disk, and says to others that it is in use.
pub(in crate::devices::virtio) fn open_file(
    path: &Path,
    is_read_only: bool,
    is_direct: bool,
    foreign_lock: ForeignLock,
) -> Result<File, String> {
    let access = if is_read_only { OFlags::RDONLY } else { OFlags::RDWR };
    let direct = if is_direct { OFlags::DIRECT } else { OFlags::empty() };
    // Without waiting: the path may lead to a FIFO.
    let flags = access | direct | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = rustix::fs::open(path, flags, Mode::empty()).map_err(|error| match error {
        Errno::INVAL if is_direct => "its filesystem has no direct I/O".to_owned(),
        Errno::ISDIR => "it is a directory".to_owned(),
        Errno::ACCESS | Errno::ROFS | Errno::PERM if !is_read_only => {
            "it may not be written; :ro, or is_read_only, needs no more than reading".to_owned()
        }
        error => io::Error::from(error).to_string(),
    })?;
    let file = File::from(file);
    let kind = file.metadata().map_err(|error| error.to_string())?.file_type();
    if kind.is_dir() {
        return Err("it is a directory".into());
    }
    if !kind.is_file() && !kind.is_block_device() {
        return Err("it is neither a file nor a block device".into());
    }
    // It has served its purpose. On a filesystem that does not know NOWAIT, io_uring would take it to mean that no
    // request may wait (`io_rw_init_file` in io_uring/rw.c).
    let flags = fcntl_getfl(&file).map_err(|error| error.to_string())?;
    fcntl_setfl(&file, flags - OFlags::NONBLOCK).map_err(|error| error.to_string())?;
    let lock = if is_read_only {
        FlockOperation::NonBlockingLockShared
    } else {
        FlockOperation::NonBlockingLockExclusive
    };
    // Some filesystems have no locks.
    if flock(&file, lock) == Err(Errno::WOULDBLOCK) && foreign_lock == ForeignLock::InUse {
        return Err("it is in use: another device or another guest has it, and one of them writes".into());
    }
    if is_at(&file, path) { Ok(file) } else { Err("it was removed or replaced just now".into()) }
}

/// Whether a path leads to this file. Before it was locked, somebody could remove it, who then believed it unused.
pub(super) fn is_at(file: &File, path: &Path) -> bool {
    let identity = |metadata: io::Result<Metadata>| metadata.map(|file| (file.dev(), file.ino())).ok();
    identity(file.metadata()) == identity(path.metadata())
}

/// Bytes of a file or block device.
pub(in crate::devices::virtio) fn length(mut file: &File) -> io::Result<u64> {
    file.seek(SeekFrom::End(0))
}

/// Bytes to which direct I/O on this file has to be aligned.
pub(super) fn direct_alignment(file: &File) -> u32 {
    use rustix::fs::{AtFlags, StatxFlags, statx};
    // A host that does not say takes what every disk takes today.
    const USUAL: u32 = 4096;
    let answer = statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::from_bits_retain(libc::STATX_DIOALIGN));
    let alignment = answer.ok().map(|answer| answer.stx_dio_offset_align);
    alignment
        .filter(|alignment| alignment.is_power_of_two() && (512..=4096).contains(alignment))
        .unwrap_or(USUAL)
}
