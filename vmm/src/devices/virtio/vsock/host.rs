//! The host's side: the socket at which programs of the host ask for ports of the guest, and those to which
//! the guest's connections lead.
//!
//! A program of the host connects, sends `CONNECT <port>\n`, and receives `OK <host port>\n` when the guest
//! has accepted; otherwise it finds the connection closed. For port N of the host the guest is led to the socket
//! of the same path with `_N` behind it. This is the protocol of Firecracker's docs/vsock.md.

use crate::config::ConfigError;
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

/// The socket at which programs of the host ask for ports, with its file.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: UnixListener,
    /// None where nobody finds it.
    path: Option<PathBuf>,
    /// Filesystem and number of the file, which somebody may have replaced meanwhile.
    file: Option<(u64, u64)>,
}

impl Listener {
    /// Makes the socket, also in place of one that nobody listens on any more.
    pub(crate) fn bind(path: &Path) -> Result<Self, ConfigError> {
        let wrong = |what: String| ConfigError::VsockSocket { path: path.into(), what };
        // Such a socket would get an abstract name, which every user of the host may connect to.
        if path.as_os_str().is_empty() {
            return Err(wrong("its path is empty; choose one such as ./vsock".into()));
        }
        let socket = match UnixListener::bind(path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                remove_stale(path).map_err(wrong)?;
                UnixListener::bind(path)
            }
            other => other,
        };
        let socket = socket.map_err(|error| wrong(error.to_string()))?;
        let file = file_at(path);
        let this = Self { socket, path: Some(path.into()), file };
        this.socket.set_nonblocking(true).map_err(|error| wrong(error.to_string()))?;
        Ok(this)
    }

    /// A socket that no program finds, because it has no name, and from which none is found.
    pub(crate) fn nowhere() -> io::Result<Self> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        Ok(Self { socket: socket.into(), path: None, file: None })
    }

    /// One that another process has made, which also removes its file. The guest reaches no program of the host.
    pub(crate) const fn of_descriptor(socket: UnixListener) -> Self {
        Self { socket, path: None, file: None }
    }

    /// The same socket, without its file.
    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        self.socket.try_clone().map(Self::of_descriptor)
    }

    /// The next program that has connected, if there is one.
    pub(super) fn accept(&self) -> io::Result<Option<UnixStream>> {
        match accept_with(&self.socket, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
            Ok(socket) => Ok(Some(socket.into())),
            // It has gone again.
            Err(Errno::WOULDBLOCK | Errno::CONNABORTED | Errno::INTR) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Connects to the program of the host that listens on a port.
    pub(super) fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let mut path = OsString::from(self.path.as_ref().ok_or(io::ErrorKind::NotFound)?);
        path.push(format!("_{port}"));
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        connect(&socket, &SocketAddrUnix::new(path)?)?;
        Ok(socket.into())
    }

    /// Lets no program connect any more. Those that nobody has accepted yet would wait as long as this process lives.
    pub(super) fn close(&mut self) {
        self.remove_file();
        let _ = shutdown(&self.socket, Shutdown::Both);
        while let Ok(Some(_)) = self.accept() {}
    }

    /// Removes the file, if it is still this socket's.
    fn remove_file(&mut self) {
        let Some(path) = &self.path else { return };
        if self.file.take().is_some_and(|file| file_at(path) == Some(file)) {
            // Whoever may make a file may remove it, but for rights that somebody took away meanwhile.
            let _ = fs::remove_file(path);
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.remove_file();
    }
}

fn file_at(path: &Path) -> Option<(u64, u64)> {
    fs::symlink_metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

/// Whether the host lacks what it may have again in a moment: descriptors, of this process or at all, or memory.
pub(super) fn is_short(error: &io::Error) -> bool {
    let short = [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM];
    Errno::from_io_error(error).is_some_and(|errno| short.contains(&errno))
}

/// Removes a socket's file on which nobody listens: that of a VMM that was killed.
fn remove_stale(path: &Path) -> Result<(), String> {
    let metadata = fs::symlink_metadata(path).map_err(|error| error.to_string())?;
    if !metadata.file_type().is_socket() {
        return Err("there is a file of that name, which is no socket; choose another path".into());
    }
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let probe = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None);
    let answer = probe.and_then(|probe| connect(&probe, &SocketAddrUnix::new(path)?));
    match answer {
        Err(Errno::CONNREFUSED) => fs::remove_file(path).map_err(|error| error.to_string()),
        Err(error) if error != Errno::WOULDBLOCK => Err(io::Error::from(error).to_string()),
        _ => Err("somebody listens on it, perhaps another guest; choose another path".into()),
    }
}

/// What a program of the host has asked for so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    /// This port of the guest.
    Port(u32),
    /// The line is not complete.
    NotYet,
    /// Something that is no request, or it has left.
    Nonsense,
}

/// Bytes of the longest request, with room for another spelling of it.
const REQUEST_MAX: usize = 32;

/// Reads the request of a program, and not a byte of what it sent behind it.
pub(super) fn read_request(socket: &UnixStream) -> Asked {
    let mut bytes = [0; REQUEST_MAX];
    let seen = match recv(socket, &mut bytes[..], RecvFlags::PEEK | RecvFlags::DONTWAIT) {
        Ok((count, _)) => count,
        Err(Errno::WOULDBLOCK | Errno::INTR) => return Asked::NotYet,
        Err(_) => return Asked::Nonsense,
    };
    let Some(end) = bytes[..seen].iter().position(|&byte| byte == b'\n') else {
        return if seen == 0 || seen == REQUEST_MAX { Asked::Nonsense } else { Asked::NotYet };
    };
    // They are there, so that they come at once.
    let line = &mut bytes[..=end];
    if !matches!(recv(socket, &mut *line, RecvFlags::DONTWAIT), Ok((count, _)) if count == end + 1) {
        return Asked::Nonsense;
    }
    std::str::from_utf8(line).ok().and_then(parse).map_or(Asked::Nonsense, Asked::Port)
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
    fn requests_are_read_to_their_end_and_no_further() {
        let (mut program, socket) = UnixStream::pair().unwrap();
        assert_eq!(read_request(&socket), Asked::NotYet);
        program.write_all(b"CONNECT 52").unwrap();
        assert_eq!(read_request(&socket), Asked::NotYet);
        program.write_all(b"\nhello").unwrap();
        assert_eq!(read_request(&socket), Asked::Port(52));
        drop(program);
        let mut rest = String::new();
        (&socket).read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "hello");
    }

    #[test]
    fn what_is_no_request_is_refused() {
        for (line, expected) in [
            ("connect 4294967295\r\n", Asked::Port(u32::MAX)),
            ("CONNECT 4294967296\n", Asked::Nonsense),
            ("CONNECT -1\n", Asked::Nonsense),
            ("CONNECT\n", Asked::Nonsense),
            ("CONNECT 1 2\n", Asked::Nonsense),
            ("GET / HTTP/1.1\n", Asked::Nonsense),
            ("\n", Asked::Nonsense),
            ("CONNECT 52                         ", Asked::Nonsense),
            ("CONNECT \u{e4}\n", Asked::Nonsense),
        ] {
            let (mut program, socket) = UnixStream::pair().unwrap();
            program.write_all(line.as_bytes()).unwrap();
            assert_eq!(read_request(&socket), expected, "{line:?}");
        }
        let (program, socket) = UnixStream::pair().unwrap();
        drop(program);
        assert_eq!(read_request(&socket), Asked::Nonsense, "it has left");
    }

    #[test]
    fn nowhere_is_found_by_nobody() {
        // Linux gives abstract names to sockets without one, and lists those in /proc/net/unix for everybody.
        let listener = Listener::nowhere().unwrap();
        assert!(listener.socket.local_addr().unwrap().is_unnamed());
        assert!(listener.accept().is_err(), "it is watched no longer after its first event");
        assert!(listener.connect(1).is_err());
        let error = Listener::bind(Path::new("")).unwrap_err().to_string();
        assert!(error.ends_with("its path is empty; choose one such as ./vsock"), "{error}");
    }

    #[test]
    fn the_file_comes_and_goes_with_the_socket() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vsock");
        let error = || Listener::bind(&path).unwrap_err().to_string();
        let first = Listener::bind(&path).unwrap();
        assert!(error().ends_with("somebody listens on it, perhaps another guest; choose another path"));
        drop(first);
        assert!(!path.exists());
        // A socket without a program is what a VMM that was killed leaves.
        drop(UnixListener::bind(&path).unwrap());
        let second = Listener::bind(&path).unwrap();
        // Somebody else's file stays.
        fs::remove_file(&path).unwrap();
        fs::write(&path, "mine").unwrap();
        drop(second);
        assert_eq!(fs::read(&path).unwrap(), b"mine");
        assert!(error().contains("which is no socket"), "{}", error());
        let elsewhere = Listener::bind(Path::new("/nonexistent/vsock")).unwrap_err().to_string();
        assert!(elsewhere.starts_with("/nonexistent/vsock cannot be the vsock's socket: No such file"));
    }
}
