//! Parsing of the files in a guest's directory.

use super::{GuestError, GuestRecord, LOCK, NO_STATUS, RECORD, STATUS, host};
use rustix::fs::{FlockOperation, Mode, OFlags, flock, open};
use rustix::io::Errno;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

/// Reads the record of a guest. A missing or damaged record is replaced by the default one, so that the guest can still
/// be listed and removed.
pub(super) fn read_record(folder: &Path) -> Result<GuestRecord, GuestError> {
    let path = folder.join(RECORD);
    let text = match std::fs::read(&path) {
        // The guest is being created or removed.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        result => result.map_err(host("read", &path))?,
    };
    let record: GuestRecord = serde_json::from_slice(&text).unwrap_or_default();
    Ok(GuestRecord { status: read_status(&folder.join(STATUS)), ..record })
}

/// Reads an exit status. The monitor of a detached guest, which the guest may have taken over, can write to the file.
fn read_status(path: &Path) -> Option<u8> {
    let mut text = String::new();
    File::open(path).ok()?.take(NO_STATUS.len() as u64).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

/// Whether the guest of a directory runs.
pub(super) fn is_locked(folder: &Path) -> Result<bool, GuestError> {
    let path = folder.join(LOCK);
    let lock = match open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(false),
        result => result.map_err(|error| host("open", &path)(error.into()))?,
    };
    // A shared lock, so that two processes that test at the same time do not mistake each other for the owner. It is
    // released immediately.
    match flock(&lock, FlockOperation::NonBlockingLockShared) {
        Err(Errno::WOULDBLOCK) => Ok(true),
        result => result.map(|()| false).map_err(|error| host("lock", &path)(error.into())),
    }
}
