//! The host's side of a device: opened for its configuration, sent to the process that runs the machine, and taken over
//! by the device there.

use super::fs::server::Server;
use super::net::starting::Starting;
use super::vsock::host::{Listener, SocketPath};
use super::{BackendError, Device};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::process::Child;
use vm_memory::GuestAddress;

/// A device's configuration, from which its backend is opened and the device is created. Each device's file implements it.
pub(crate) trait Attach {
    /// Opens the backend that the configuration names.
    ///
    /// # Errors
    /// When the backend is not usable, or the host has no resources left.
    fn open(&self) -> Result<Backend, BackendError>;

    /// Opens the backend of a placeholder, with which a kernel is pre-booted: it neither reads nor changes a user's disks
    /// and networks.
    ///
    /// # Errors
    /// As [`Self::open`].
    fn open_placeholder(&self) -> Result<Backend, BackendError> {
        Ok(Backend::Nothing)
    }

    /// Creates the device. `memory` is the guest-physical address of its memory, if it has some ([`Device::memory`]).
    ///
    /// # Errors
    /// When the backend is not usable, or the host has no resources left.
    fn create(&self, backend: Backend, memory: GuestAddress) -> Result<Box<dyn Device>, BackendError>;
}

/// The host's side of a device.
#[derive(Debug)]
pub(crate) enum Backend {
    /// The host itself: its random number generator or its memory.
    Host,
    /// The file of a disk.
    File(File, Contents),
    /// A file that becomes guest memory.
    Memory(File, Contents),
    /// The host's end of a network card's link, and the process at its other end while that is starting.
    Link(OwnedFd, Option<Starting>),
    /// The listening Unix socket of a vsock device.
    Listener(Listener),
    /// The server of a shared folder.
    Folder(Server),
    /// No backend: the device is a placeholder.
    Nothing,
}

/// What the guest sees of a file.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub(crate) enum Contents {
    /// The file's contents.
    Shown,
    /// Zeroes of the same length.
    Zeroes,
}

/// The kind of a [`Backend`], for the process that receives its descriptors.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub(crate) enum BackendKind {
    Host,
    File(Contents),
    Memory(Contents),
    Link,
    Listener,
    Folder,
    Nothing,
}

/// The parts of backends that remain with the process that opened them, while another process uses the rest.
#[derive(Debug, Default)]
pub(crate) struct Kept {
    /// The servers of shared folders. They exit with the guest.
    pub(crate) servers: Vec<Server>,
    /// The Unix sockets of vsock devices. Dropping one removes its file.
    pub(crate) sockets: Vec<SocketPath>,
}

impl Kept {
    /// Leaves everything to the other process, and returns the child processes, which exit with that one.
    pub(crate) fn release(self) -> Vec<Child> {
        self.sockets.into_iter().for_each(SocketPath::release);
        self.servers.into_iter().filter_map(Server::release).collect()
    }
}

impl Backend {
    /// Makes the backend ready for another process. Returns its kind and its descriptors, in the order in which
    /// [`Self::receive`] takes them. Waits for a process that is starting.
    pub(crate) fn send(self, kept: &mut Kept) -> Result<(BackendKind, Vec<OwnedFd>), BackendError> {
        Ok(match self {
            Self::Host => (BackendKind::Host, Vec::new()),
            Self::File(file, contents) => (BackendKind::File(contents), vec![file.into()]),
            Self::Memory(file, contents) => (BackendKind::Memory(contents), vec![file.into()]),
            Self::Link(link, starting) => {
                starting.map_or(Ok(()), Starting::wait)?;
                (BackendKind::Link, vec![link])
            }
            Self::Listener(listener) => {
                let (socket, path) = listener.into_parts();
                kept.sockets.extend(path);
                (BackendKind::Listener, vec![socket.into()])
            }
            Self::Folder(server) => {
                let pair = server.descriptors().map_err(BackendError::host("duplicate a socket"))?;
                kept.servers.push(server);
                (BackendKind::Folder, pair.into())
            }
            Self::Nothing => (BackendKind::Nothing, Vec::new()),
        })
    }

    /// The backend that another process has sent. `next` returns its next descriptor.
    pub(crate) fn receive<E>(
        kind: BackendKind,
        mut next: impl FnMut() -> Result<OwnedFd, E>,
    ) -> Result<Self, E> {
        Ok(match kind {
            BackendKind::Host => Self::Host,
            BackendKind::File(contents) => Self::File(next()?.into(), contents),
            BackendKind::Memory(contents) => Self::Memory(next()?.into(), contents),
            BackendKind::Link => Self::Link(next()?, None),
            BackendKind::Listener => Self::Listener(Listener::from_descriptor(next()?.into())),
            BackendKind::Folder => Self::Folder(Server::from_descriptors(next()?.into(), next()?)),
            BackendKind::Nothing => Self::Nothing,
        })
    }

    /// Duplicates the descriptors. What this process keeps or waits for is not included.
    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Host => Self::Host,
            Self::File(file, contents) => Self::File(file.try_clone()?, *contents),
            Self::Memory(file, contents) => Self::Memory(file.try_clone()?, *contents),
            Self::Link(link, _) => Self::Link(link.try_clone()?, None),
            Self::Listener(listener) => Self::Listener(listener.try_clone()?),
            Self::Folder(server) => {
                let [socket, messages] = server.descriptors()?;
                Self::Folder(Server::from_descriptors(socket.into(), messages))
            }
            Self::Nothing => Self::Nothing,
        })
    }

    /// Replaces a file by zeroes.
    pub(crate) fn into_placeholder(self) -> Self {
        match self {
            Self::File(file, _) => Self::File(file, Contents::Zeroes),
            Self::Memory(file, _) => Self::Memory(file, Contents::Zeroes),
            other => other,
        }
    }

    /// Takes the process that has to run before the guest starts, if there is one.
    pub(crate) const fn take_starting(&mut self) -> Option<Starting> {
        match self {
            Self::Link(_, starting) => starting.take(),
            _ => None,
        }
    }

    /// Bytes of guest memory that the backend provides.
    pub(crate) fn memory_len(&self) -> u64 {
        match self {
            // The length of a block device too.
            Self::Memory(file, _) => {
                let mut file: &File = file;
                file.seek(SeekFrom::End(0)).unwrap_or(0)
            }
            _ => 0,
        }
    }

    /// The error of a device that cannot use this kind of backend.
    pub(super) fn mismatch(&self) -> BackendError {
        BackendError::host("use the backend of another device")(io::ErrorKind::InvalidInput.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn another_process_receives_what_was_sent() {
        let file = || File::open("/dev/null").unwrap();
        let (socket, peer) = UnixStream::pair().unwrap();
        let all = [
            Backend::Host,
            Backend::File(file(), Contents::Shown),
            Backend::Memory(file(), Contents::Zeroes),
            Backend::Link(file().into(), None),
            Backend::Listener(Listener::placeholder().unwrap()),
            Backend::Folder(Server::from_descriptors(socket, peer.into())),
            Backend::Nothing,
        ];
        let mut kept = Kept::default();
        for backend in all {
            let copy = backend.try_clone().unwrap();
            let (kind, descriptors) = backend.send(&mut kept).unwrap();
            let mut descriptors = descriptors.into_iter();
            let received = Backend::receive(kind, || descriptors.next().ok_or(())).unwrap();
            assert_eq!(descriptors.count(), 0, "{kind:?}");
            for backend in [received, copy] {
                assert_eq!(backend.send(&mut Kept::default()).unwrap().0, kind);
            }
        }
        assert_eq!((kept.servers.len(), kept.sockets.len()), (1, 0));
    }

    #[test]
    fn a_device_refuses_the_backend_of_another_one() {
        use crate::config::devices::{Drive, Entropy, NetworkInterface, SharedFolder, Vsock};
        let folder = SharedFolder { tag: "t".into(), path: "/".into(), read_only: true, owner: (0, 0) };
        let vsock = Vsock { guest_cid: 3, uds_path: "v".into(), vsock_id: None };
        let (drive, card, entropy) =
            (Drive::new("d", "f"), NetworkInterface::new("n", "tap"), Entropy::default());
        let all: [&dyn Attach; 5] = [&drive, &card, &vsock, &entropy, &folder];
        for (number, device) in all.into_iter().enumerate() {
            let backend = if number == 0 {
                Backend::Host
            } else {
                Backend::File(File::open("/dev/null").unwrap(), Contents::Shown)
            };
            let error = device.create(backend, GuestAddress(0)).unwrap_err();
            assert!(matches!(error, BackendError::Host { .. }), "{error}");
        }
    }
}
