//! The Unix sockets on the host: one at which programs of the host connect to ports of the guest, and those of the
//! programs that the guest connects to.
//!
//! A program of the host connects, sends `CONNECT <port>\n`, and receives `OK <host port>\n` when the guest has
//! accepted; otherwise the connection is closed. A connection of the guest to host port N leads to the socket at the
//! same path with the suffix `_N`. This is the protocol of Firecracker's docs/vsock.md.

use crate::devices::virtio::BackendError;
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType, accept_with, connect, recv,
    shutdown, socket_with,
};
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// The socket at which programs of the host connect, and its path.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: UnixListener,
    /// `None` for a socket without a path, or whose path another process manages.
    path: Option<SocketPath>,
}

/// The path of a socket, which is removed on drop.
#[derive(Debug)]
pub(crate) struct SocketPath {
    path: PathBuf,
    /// Device and inode number of the path when it was created; another process may have replaced it since.
    file: Option<(u64, u64)>,
}

impl SocketPath {
    /// Keeps the path, for another process.
    pub(crate) fn release(mut self) {
        self.file = None;
    }

    /// Removes the path, if it still belongs to this socket.
    fn remove(&mut self) {
        if self.file.take().is_some_and(|file| file_at(&self.path) == Some(file)) {
            // The process has created the file, so that this fails only if the permissions have changed since.
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Drop for SocketPath {
    fn drop(&mut self) {
        self.remove();
    }
}

impl Listener {
    /// Binds the socket, and replaces a stale one without a listener.
    pub(crate) fn bind(path: &Path) -> Result<Self, BackendError> {
        let wrong = |why: String| {
            BackendError::unusable(format!("{} cannot be the vsock's socket", path.display()), why)
        };
        // bind(2) would assign an abstract name, to which every user of the host could connect.
        if path.as_os_str().is_empty() {
            return Err(wrong("the path is empty; choose one such as ./vsock".into()));
        }
        let socket = match UnixListener::bind(path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                remove_stale(path).map_err(wrong)?;
                UnixListener::bind(path)
            }
            other => other,
        };
        let socket = socket.map_err(|error| wrong(error.to_string()))?;
        let this = Self { socket, path: Some(SocketPath { path: path.into(), file: file_at(path) }) };
        this.socket.set_nonblocking(true).map_err(|error| wrong(error.to_string()))?;
        Ok(this)
    }

    /// A descriptor in place of a socket, to which no program can connect: an eventfd, which accepts no connections and is
    /// never readable.
    pub(crate) fn placeholder() -> io::Result<Self> {
        Ok(Self { socket: eventfd(0, EventfdFlags::CLOEXEC)?.into(), path: None })
    }

    /// A socket that another process has created, which also removes its path. The guest cannot connect to programs of
    /// the host.
    pub(crate) const fn from_descriptor(socket: UnixListener) -> Self {
        Self { socket, path: None }
    }

    /// A duplicate of the socket, without its path.
    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        self.socket.try_clone().map(Self::from_descriptor)
    }

    /// The socket, for the process that serves it, and its path, which the caller manages. A caller that kept the socket
    /// would keep connections open that the other process does not accept before it ends.
    pub(crate) fn into_parts(self) -> (UnixListener, Option<SocketPath>) {
        (self.socket, self.path)
    }

    /// Accepts the next connection; `None` when there is none.
    pub(super) fn accept(&self) -> io::Result<Option<UnixStream>> {
        match accept_with(&self.socket, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
            Ok(socket) => Ok(Some(socket.into())),
            // The program has closed the connection already.
            Err(Errno::WOULDBLOCK | Errno::CONNABORTED | Errno::INTR) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Connects to the program of the host that listens on a port.
    pub(super) fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let mut path = OsString::from(&self.path.as_ref().ok_or(io::ErrorKind::NotFound)?.path);
        path.push(format!("_{port}"));
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        connect(&socket, &SocketAddrUnix::new(path)?)?;
        Ok(socket.into())
    }

    /// Closes the socket for new connections, and drops those in the backlog, which would otherwise stay open as long
    /// as this process.
    pub(super) fn close(&mut self) {
        self.path.iter_mut().for_each(SocketPath::remove);
        let _ = shutdown(&self.socket, Shutdown::Both);
        while let Ok(Some(_)) = self.accept() {}
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn file_at(path: &Path) -> Option<(u64, u64)> {
    fs::symlink_metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

/// Whether the error is a temporary lack of file descriptors or memory.
pub(super) fn is_temporary(error: &io::Error) -> bool {
    let short = [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM];
    Errno::from_io_error(error).is_some_and(|errno| short.contains(&errno))
}

/// Removes the path of a socket without a listener, which a killed VMM leaves behind.
fn remove_stale(path: &Path) -> Result<(), String> {
    let metadata = fs::symlink_metadata(path).map_err(|error| error.to_string())?;
    if !metadata.file_type().is_socket() {
        return Err("it exists and is not a socket; choose another path".into());
    }
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let probe = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None);
    let answer = probe.and_then(|probe| connect(&probe, &SocketAddrUnix::new(path)?));
    match answer {
        Err(Errno::CONNREFUSED) => fs::remove_file(path).map_err(|error| error.to_string()),
        Err(error) if error != Errno::WOULDBLOCK => Err(io::Error::from(error).to_string()),
        _ => Err("it is in use, perhaps by another guest; choose another path".into()),
    }
}

/// The state of a program's request for a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PortRequest {
    /// A request for this port of the guest.
    Port(u32),
    /// The line is incomplete.
    Incomplete,
    /// The line is not a request, or the program has closed the connection.
    Invalid,
}

/// Maximum length of a request in bytes, which allows for a differently formatted one.
const REQUEST_MAX: usize = 32;

/// Reads the request of a program, and no byte beyond it.
pub(super) fn read_request(socket: &UnixStream) -> PortRequest {
    let mut bytes = [0; REQUEST_MAX];
    let seen = match recv(socket, &mut bytes[..], RecvFlags::PEEK | RecvFlags::DONTWAIT) {
        Ok((count, _)) => count,
        Err(Errno::WOULDBLOCK | Errno::INTR) => return PortRequest::Incomplete,
        Err(_) => return PortRequest::Invalid,
    };
    let Some(end) = bytes[..seen].iter().position(|&byte| byte == b'\n') else {
        return if seen == 0 || seen == REQUEST_MAX { PortRequest::Invalid } else { PortRequest::Incomplete };
    };
    // The bytes were peeked at before, so that they are available.
    let line = &mut bytes[..=end];
    if !matches!(recv(socket, &mut *line, RecvFlags::DONTWAIT), Ok((count, _)) if count == end + 1) {
        return PortRequest::Invalid;
    }
    std::str::from_utf8(line).ok().and_then(parse).map_or(PortRequest::Invalid, PortRequest::Port)
}

fn parse(line: &str) -> Option<u32> {
    let mut words = line.split_ascii_whitespace();
    let is_request = words.next()?.eq_ignore_ascii_case("connect");
    let port = words.next()?.parse().ok()?;
    (is_request && words.next().is_none()).then_some(port)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn a_request_is_read_to_its_end_and_no_further() {
        let (mut program, socket) = UnixStream::pair().unwrap();
        assert_eq!(read_request(&socket), PortRequest::Incomplete);
        program.write_all(b"CONNECT 52").unwrap();
        assert_eq!(read_request(&socket), PortRequest::Incomplete);
        program.write_all(b"\nhello").unwrap();
        assert_eq!(read_request(&socket), PortRequest::Port(52));
        drop(program);
        let mut rest = String::new();
        (&socket).read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "hello");
    }

    #[test]
    fn invalid_requests_are_refused() {
        for (line, expected) in [
            ("connect 4294967295\r\n", PortRequest::Port(u32::MAX)),
            ("CONNECT 4294967296\n", PortRequest::Invalid),
            ("CONNECT -1\n", PortRequest::Invalid),
            ("CONNECT\n", PortRequest::Invalid),
            ("CONNECT 1 2\n", PortRequest::Invalid),
            ("GET / HTTP/1.1\n", PortRequest::Invalid),
            ("\n", PortRequest::Invalid),
            ("CONNECT 52                         ", PortRequest::Invalid),
            ("CONNECT \u{e4}\n", PortRequest::Invalid),
        ] {
            let (mut program, socket) = UnixStream::pair().unwrap();
            program.write_all(line.as_bytes()).unwrap();
            assert_eq!(read_request(&socket), expected, "{line:?}");
        }
        let (program, socket) = UnixStream::pair().unwrap();
        drop(program);
        assert_eq!(read_request(&socket), PortRequest::Invalid, "the program has closed the connection");
    }

    #[test]
    fn no_program_can_connect_to_a_placeholder() {
        let listener = Listener::placeholder().unwrap();
        assert!(listener.socket.local_addr().is_err(), "it is no socket");
        assert!(listener.accept().is_err(), "an error ends the watch after the first event");
        assert!(listener.connect(1).is_err());
        let error = Listener::bind(Path::new("")).unwrap_err().to_string();
        assert!(error.ends_with("the path is empty; choose one such as ./vsock"), "{error}");
    }

    #[test]
    fn the_path_exists_as_long_as_the_socket() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vsock");
        let error = || Listener::bind(&path).unwrap_err().to_string();
        let first = Listener::bind(&path).unwrap();
        assert!(error().ends_with("it is in use, perhaps by another guest; choose another path"));
        drop(first);
        assert!(!path.exists());
        // A killed VMM leaves a socket without a listener.
        drop(UnixListener::bind(&path).unwrap());
        let second = Listener::bind(&path).unwrap();
        // A file of another process is not removed.
        fs::remove_file(&path).unwrap();
        fs::write(&path, "mine").unwrap();
        drop(second);
        assert_eq!(fs::read(&path).unwrap(), b"mine");
        assert!(error().contains("is not a socket"), "{}", error());
        let elsewhere = Listener::bind(Path::new("/nonexistent/vsock")).unwrap_err().to_string();
        assert!(elsewhere.starts_with("/nonexistent/vsock cannot be the vsock's socket: No such file"));
    }
}
