//! The inode table: files that the guest has looked up. Each entry has a descriptor, which refers to the file even
//! after it was renamed.

use crate::cached_version::CachedVersion;
use rustix::fs::{FileType, Stat};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// The inode number of the folder (`FUSE_ROOT_ID` in linux/fuse.h).
pub(crate) const ROOT: u64 = 1;

/// The identity of a file: device, inode number, and whether it is a mount point. A mount point differs from the
/// directory that is mounted there, which may also be elsewhere in the shared folder.
type Identity = (u64, u64, bool);

/// A file and its O_PATH descriptor.
#[derive(Clone, Debug)]
pub(crate) struct Inode {
    pub(crate) fd: Arc<OwnedFd>,
    pub(crate) kind: FileType,
    /// Whether it is a mount point of another filesystem, which the guest sees as an empty directory.
    pub(crate) is_mount_point: bool,
    /// The version that the guest has cached.
    pub(crate) cached_version: Arc<CachedVersion>,
}

#[derive(Debug)]
struct Entry {
    inode: Inode,
    identity: Identity,
    /// The lookup count, which FORGET decreases.
    lookups: u64,
}

/// The inode table.
#[derive(Debug)]
pub(crate) struct Inodes {
    entries: BTreeMap<u64, Entry>,
    numbers: BTreeMap<Identity, u64>,
    next: u64,
}

impl Inodes {
    /// A table with the root only.
    pub(crate) fn new(root: Inode, stat: &Stat) -> Self {
        let identity = identity(&root, stat);
        let entry = Entry { inode: root, identity, lookups: 1 };
        Self {
            entries: BTreeMap::from([(ROOT, entry)]),
            numbers: BTreeMap::from([(identity, ROOT)]),
            next: ROOT + 1,
        }
    }

    /// Removes all entries except the root.
    pub(crate) fn clear(&mut self) {
        self.entries.retain(|number, _| *number == ROOT);
        self.numbers.retain(|_, number| *number == ROOT);
    }

    /// The file with an inode number.
    pub(crate) fn get(&self, number: u64) -> io::Result<Inode> {
        let entry = self.entries.get(&number);
        entry.map(|entry| entry.inode.clone()).ok_or_else(|| io::Error::from_raw_os_error(libc::ESTALE))
    }

    /// Counts a lookup of a file and returns its inode number. A known file keeps its number and its descriptor; while
    /// the descriptor is open, no other file can have the same identity.
    pub(crate) fn lookup(&mut self, inode: Inode, stat: &Stat) -> u64 {
        let identity = identity(&inode, stat);
        let number = *self.numbers.entry(identity).or_insert(self.next);
        if number == self.next {
            self.next += 1;
        }
        let entry = self.entries.entry(number).or_insert(Entry { inode, identity, lookups: 0 });
        entry.lookups = entry.lookups.saturating_add(1);
        number
    }

    /// Decreases the lookup count of a file, and removes the file when the count is zero.
    pub(crate) fn forget(&mut self, number: u64, count: u64) {
        if number == ROOT {
            return;
        }
        let Some(entry) = self.entries.get_mut(&number) else { return };
        entry.lookups = entry.lookups.saturating_sub(count);
        if entry.lookups == 0 {
            self.numbers.remove(&entry.identity);
            self.entries.remove(&number);
        }
    }
}

const fn identity(inode: &Inode, stat: &Stat) -> Identity {
    (stat.st_dev, stat.st_ino, inode.is_mount_point)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inode() -> Inode {
        let fd = rustix::fs::open("/", rustix::fs::OFlags::PATH, rustix::fs::Mode::empty()).unwrap();
        Inode {
            fd: Arc::new(fd),
            kind: FileType::Directory,
            is_mount_point: false,
            cached_version: Arc::default(),
        }
    }

    fn stat(device: u64, number: u64) -> Stat {
        let mut stat = rustix::fs::fstat(&*inode().fd).unwrap();
        (stat.st_dev, stat.st_ino) = (device, number);
        stat
    }

    #[test]
    fn lookups_are_counted() {
        let mut inodes = Inodes::new(inode(), &stat(1, 1));
        let number = inodes.lookup(inode(), &stat(1, 2));
        assert_eq!(inodes.lookup(inode(), &stat(1, 2)), number);
        assert_ne!(inodes.lookup(inode(), &stat(2, 2)), number, "a file of another filesystem");
        let mounted = Inode { is_mount_point: true, ..inode() };
        assert_ne!(inodes.lookup(mounted, &stat(1, 2)), number, "the same directory as a mount point");
        inodes.forget(number, 1);
        assert!(inodes.get(number).is_ok());
        inodes.forget(number, 1);
        assert_eq!(inodes.get(number).unwrap_err().raw_os_error(), Some(libc::ESTALE));
        assert_ne!(inodes.lookup(inode(), &stat(1, 2)), number, "numbers are not reused");
    }

    #[test]
    fn forgetting_the_root_or_too_much_is_harmless() {
        let mut inodes = Inodes::new(inode(), &stat(1, 1));
        assert_eq!(inodes.lookup(inode(), &stat(1, 1)), ROOT);
        inodes.forget(ROOT, u64::MAX);
        inodes.forget(77, 1);
        let number = inodes.lookup(inode(), &stat(1, 2));
        inodes.forget(number, u64::MAX);
        assert!(inodes.get(ROOT).is_ok() && inodes.get(number).is_err());
        let number = inodes.lookup(inode(), &stat(1, 2));
        inodes.clear();
        assert!(inodes.get(ROOT).is_ok() && inodes.get(number).is_err());
    }
}
