//! The backing file of a block or pmem device.

use rustix::fs::{FlockOperation, Mode, OFlags, fcntl_getfl, fcntl_setfl, flock};
use rustix::io::Errno;
use std::fs::{File, Metadata};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

/// The effect of another process's lock on a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ForeignLock {
    /// The file cannot be opened.
    InUse,
    /// None: the lock is ignored.
    Ignored,
}

/// Opens a backing file and locks it (flock(2)), so that other processes of this VMM see that it is in use.
pub(in crate::devices::virtio) fn open_file(
    path: &Path,
    is_read_only: bool,
    is_direct: bool,
    foreign_lock: ForeignLock,
) -> Result<File, String> {
    let access = if is_read_only { OFlags::RDONLY } else { OFlags::RDWR };
    let direct = if is_direct { OFlags::DIRECT } else { OFlags::empty() };
    // NONBLOCK, because the path may be that of a FIFO.
    let flags = access | direct | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = rustix::fs::open(path, flags, Mode::empty()).map_err(|error| match error {
        Errno::INVAL if is_direct => "its filesystem has no direct I/O".to_owned(),
        Errno::ISDIR => "it is a directory".to_owned(),
        Errno::ACCESS | Errno::ROFS | Errno::PERM if !is_read_only => {
            "no permission to write it; add :ro, or set is_read_only, to attach it read-only".to_owned()
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
    // NONBLOCK is not needed after the open. On a filesystem without NOWAIT, io_uring would fail every request that has
    // to wait (`io_rw_init_file` in io_uring/rw.c).
    let flags = fcntl_getfl(&file).map_err(|error| error.to_string())?;
    fcntl_setfl(&file, flags - OFlags::NONBLOCK).map_err(|error| error.to_string())?;
    let lock = if is_read_only {
        FlockOperation::NonBlockingLockShared
    } else {
        FlockOperation::NonBlockingLockExclusive
    };
    // Some filesystems do not support locks; other errors are therefore ignored.
    if flock(&file, lock) == Err(Errno::WOULDBLOCK) && foreign_lock == ForeignLock::InUse {
        return Err("it is in use by another device or another guest, and one of them writes to it".into());
    }
    if is_at(&file, path) { Ok(file) } else { Err("it was removed or replaced just now".into()) }
}

/// Whether a path leads to this file. Between open and lock another process could have removed it because it appeared
/// to be unused.
pub(super) fn is_at(file: &File, path: &Path) -> bool {
    let identity = |metadata: io::Result<Metadata>| metadata.map(|file| (file.dev(), file.ino())).ok();
    identity(file.metadata()) == identity(path.metadata())
}

/// Size of a file or block device in bytes.
pub(in crate::devices::virtio) fn length(mut file: &File) -> io::Result<u64> {
    file.seek(SeekFrom::End(0))
}

/// Alignment that direct I/O on this file requires, in bytes.
pub(super) fn direct_alignment(file: &File) -> u32 {
    use rustix::fs::{AtFlags, StatxFlags, statx};
    // The default works for all common disks, and is used when the host does not report an alignment.
    const USUAL: u32 = 4096;
    let answer = statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::from_bits_retain(libc::STATX_DIOALIGN));
    let alignment = answer.ok().map(|answer| answer.stx_dio_offset_align);
    alignment
        .filter(|alignment| alignment.is_power_of_two() && (512..=4096).contains(alignment))
        .unwrap_or(USUAL)
}
