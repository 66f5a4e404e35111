//! The files that the guest knows: each is a descriptor that leads to it, wherever it is moved.

use crate::seen::Seen;
use rustix::fs::{FileType, Stat};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// The folder itself (`FUSE_ROOT_ID` of linux/fuse.h).
pub(crate) const ROOT: u64 = 1;

/// What makes two descriptors lead to one file: device and number. A mount point is not the folder that is mounted
/// there, which may also be below the guest's.
type Identity = (u64, u64, bool);

/// A file, through a descriptor that can neither read nor write it (O_PATH).
#[derive(Clone, Debug)]
pub(crate) struct Inode {
    pub(crate) fd: Arc<OwnedFd>,
    pub(crate) kind: FileType,
    /// Another filesystem, of which the guest sees no more than that it is there.
    pub(crate) is_mount_point: bool,
    /// What the guest knows of it.
    pub(crate) seen: Arc<Seen>,
}

#[derive(Debug)]
struct Known {
    inode: Inode,
    identity: Identity,
    /// How often the guest was told of it.
    lookups: u64,
}

/// All of them.
#[derive(Debug)]
pub(crate) struct Inodes {
    known: BTreeMap<u64, Known>,
    numbers: BTreeMap<Identity, u64>,
    next: u64,
}

impl Inodes {
    /// The root alone.
    pub(crate) fn new(root: Inode, stat: &Stat) -> Self {
        let identity = identity(&root, stat);
        let known = Known { inode: root, identity, lookups: 1 };
        Self {
            known: BTreeMap::from([(ROOT, known)]),
            numbers: BTreeMap::from([(identity, ROOT)]),
            next: ROOT + 1,
        }
    }

    /// Forgets all but the root.
    pub(crate) fn clear(&mut self) {
        self.known.retain(|number, _| *number == ROOT);
        self.numbers.retain(|_, number| *number == ROOT);
    }

    /// The file of this number.
    pub(crate) fn get(&self, number: u64) -> io::Result<Inode> {
        let known = self.known.get(&number);
        known.map(|known| known.inode.clone()).ok_or_else(|| io::Error::from_raw_os_error(libc::ESTALE))
    }

    /// The guest is told of a file; its number. A file that it knows keeps the number and the descriptor: as long as
    /// there is one, nobody else can have the file's identity.
    pub(crate) fn remember(&mut self, inode: Inode, stat: &Stat) -> u64 {
        let identity = identity(&inode, stat);
        let number = *self.numbers.entry(identity).or_insert(self.next);
        if number == self.next {
            self.next += 1;
        }
        let known = self.known.entry(number).or_insert(Known { inode, identity, lookups: 0 });
        known.lookups = known.lookups.saturating_add(1);
        number
    }

    /// The guest has forgotten that it was told of a file so many times.
    pub(crate) fn forget(&mut self, number: u64, count: u64) {
        if number == ROOT {
            return;
        }
        let Some(known) = self.known.get_mut(&number) else { return };
        known.lookups = known.lookups.saturating_sub(count);
        if known.lookups == 0 {
            self.numbers.remove(&known.identity);
            self.known.remove(&number);
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
        Inode { fd: Arc::new(fd), kind: FileType::Directory, is_mount_point: false, seen: Arc::default() }
    }

    fn stat(device: u64, number: u64) -> Stat {
        let mut stat = rustix::fs::fstat(&*inode().fd).unwrap();
        (stat.st_dev, stat.st_ino) = (device, number);
        stat
    }

    #[test]
    fn a_file_is_known_as_often_as_it_was_told() {
        let mut inodes = Inodes::new(inode(), &stat(1, 1));
        let number = inodes.remember(inode(), &stat(1, 2));
        assert_eq!(inodes.remember(inode(), &stat(1, 2)), number);
        assert_ne!(inodes.remember(inode(), &stat(2, 2)), number, "of another filesystem");
        let mounted = Inode { is_mount_point: true, ..inode() };
        assert_ne!(inodes.remember(mounted, &stat(1, 2)), number, "the same one, mounted elsewhere");
        inodes.forget(number, 1);
        assert!(inodes.get(number).is_ok());
        inodes.forget(number, 1);
        assert_eq!(inodes.get(number).unwrap_err().raw_os_error(), Some(libc::ESTALE));
        assert_ne!(inodes.remember(inode(), &stat(1, 2)), number, "numbers are not used again");
    }

    #[test]
    fn no_guest_forgets_the_root_or_more_than_there_is() {
        let mut inodes = Inodes::new(inode(), &stat(1, 1));
        assert_eq!(inodes.remember(inode(), &stat(1, 1)), ROOT);
        inodes.forget(ROOT, u64::MAX);
        inodes.forget(77, 1);
        let number = inodes.remember(inode(), &stat(1, 2));
        inodes.forget(number, u64::MAX);
        assert!(inodes.get(ROOT).is_ok() && inodes.get(number).is_err());
        let number = inodes.remember(inode(), &stat(1, 2));
        inodes.clear();
        assert!(inodes.get(ROOT).is_ok() && inodes.get(number).is_err());
    }
}
