//! The socket at which a spare monitor waits for a front.
//!
//! It is an abstract Unix socket (unix(7)): it has no file that a monitor which ends, or is killed, would leave, and one that
//! is in its jail can accept connections all the same. Any process of the network namespace can connect; both ends check
//! that the other's user is their own. The first front that connects gets the monitor, and a byte that says so.

use super::channel::Channel;
use super::{ControlError, REQUEST_MAX, Request, Start};
use crate::poll::wait_readable;
use rustix::io::Errno;
use rustix::net::sockopt::socket_peercred;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen, socket_with,
};
use rustix::process::{Uid, geteuid};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// Time limit of a front for the byte that gives it the monitor: a start without a spare does not take much longer.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(100);
/// Time limit for the request of a front that has been given the monitor.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(1);
/// Interval between two looks at the files that the machine was made of. An inotify descriptor would report changes sooner,
/// but closing it, when a front comes, waits for SRCU (`fsnotify_destroy_group` in fs/notify/group.c): up to 15 ms.
const CHECK_INTERVAL: Duration = Duration::from_secs(5);
/// Fronts that connect at the same time; others do without a spare.
const BACKLOG: i32 = 16;

/// A front's connection, its request and the descriptors of the request.
type Taken = (Channel, Start, Vec<OwnedFd>);

/// Creates the socket of this name for a spare monitor. `None` if it exists: there is a spare already.
pub(super) fn socket(name: &str) -> io::Result<Option<OwnedFd>> {
    let socket = new_socket(SocketFlags::CLOEXEC)?;
    match bind(&socket, &SocketAddrUnix::new_abstract_name(name.as_bytes())?) {
        Err(Errno::ADDRINUSE) => Ok(None),
        result => Ok(result.map(|()| Some(socket))?),
    }
}

/// Connects to the spare monitor whose socket has this name, if it exists, is the user's, and no other front has it.
pub(super) fn take(name: &str) -> Option<UnixStream> {
    // Other users can fill the queue of connections; the connection must not wait then.
    let socket = new_socket(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK).ok()?;
    connect(&socket, &SocketAddrUnix::new_abstract_name(name.as_bytes()).ok()?).ok()?;
    let mut stream = UnixStream::from(socket);
    stream.set_nonblocking(false).ok()?;
    let is_own = socket_peercred(&stream).is_ok_and(|peer| peer.uid == geteuid());
    let is_ready = is_own && wait_readable(stream.as_fd(), Some(Instant::now() + ANSWER_TIMEOUT)).ok()?;
    (is_ready && stream.read_exact(&mut [0]).is_ok()).then_some(stream)
}

fn new_socket(flags: SocketFlags) -> rustix::io::Result<OwnedFd> {
    socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

/// A spare monitor that waits for a front.
#[derive(Debug)]
pub(super) struct Waiting {
    listener: OwnedFd,
    /// The user whose fronts are accepted. A monitor in its jail may have another user ID.
    user: Uid,
    /// The files that the machine is made of.
    files: Vec<(File, Version)>,
    until: Instant,
}

impl Waiting {
    /// Prepares the wait at a socket, of at most `idle`. Fronts that connect before [`Self::wait`] wait, too. `files` are those
    /// that the machine is made of: the wait ends when one is changed, replaced or removed.
    ///
    /// # Errors
    /// When the socket fails, or a file does not report its state.
    pub(super) fn new(listener: OwnedFd, idle: Duration, files: Vec<File>) -> io::Result<Self> {
        // A front learns process and user of this monitor from the socket, which has those of the process that listens.
        listen(&listener, BACKLOG)?;
        let with_version = |file: File| Version::of(&file).map(|version| (file, version));
        let files = files.into_iter().map(with_version).collect::<io::Result<_>>()?;
        Ok(Self { listener, user: geteuid(), files, until: Instant::now() + idle })
    }

    /// Waits for the front that gets this monitor. Returns `None` if there is none in time, or a file has changed.
    ///
    /// # Errors
    /// When the socket fails.
    #[inline(never)]
    pub(super) fn wait(self) -> Result<Option<Taken>, ControlError> {
        loop {
            let is_unchanged =
                |(file, version): &(File, Version)| Version::of(file).is_ok_and(|now| now == *version);
            if Instant::now() >= self.until || !self.files.iter().all(is_unchanged) {
                return Ok(None);
            }
            let next = self.until.min(Instant::now() + CHECK_INTERVAL);
            if wait_readable(self.listener.as_fd(), Some(next))? {
                let mut stream = UnixStream::from(accept_with(&self.listener, SocketFlags::CLOEXEC)?);
                let is_own = socket_peercred(&stream).is_ok_and(|peer| peer.uid == self.user);
                // A front that has given up has closed its end.
                if is_own && stream.write_all(&[1]).is_ok() {
                    // The others' connections are closed, too.
                    drop(self);
                    return serve(stream);
                }
            }
        }
    }
}

/// Receives the request of the front that has been given the monitor.
fn serve(stream: UnixStream) -> Result<Option<Taken>, ControlError> {
    if !wait_readable(stream.as_fd(), Some(Instant::now() + REQUEST_TIMEOUT))? {
        return Ok(None);
    }
    let channel = Channel::new(stream);
    match channel.receive::<Request>(REQUEST_MAX)? {
        Some((Request::Start(start), descriptors)) => Ok(Some((channel, *start, descriptors))),
        _ => Ok(None),
    }
}

/// What changes when a file is written, replaced or removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Version {
    links: u64,
    /// Seconds and nanoseconds.
    changed: (i64, i64),
}

impl Version {
    fn of(file: &File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        Ok(Self { links: metadata.nlink(), changed: (metadata.ctime(), metadata.ctime_nsec()) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::timeline::Timeline;
    use std::fs;

    const LONG: Duration = Duration::from_secs(60);

    fn name() -> String {
        format!("kindling-test-{:?}-{}", std::thread::current().id(), std::process::id())
    }

    fn waiting(name: &str, idle: Duration, files: Vec<File>) -> Waiting {
        Waiting::new(socket(name).unwrap().unwrap(), idle, files).unwrap()
    }

    fn start() -> Request {
        Request::Start(Box::new(Start {
            version: "version".to_owned(),
            config: Config::new(crate::config::BootSource::kernel("kernel")),
            timeline: Timeline::starting_at(crate::timeline::Instant(0)),
            descriptors: Vec::new(),
            backends: Vec::new(),
        }))
    }

    #[test]
    fn a_spare_has_one_front_and_its_name_is_free_afterwards() {
        let name = name();
        let waiting = waiting(&name, LONG, Vec::new());
        assert!(socket(&name).unwrap().is_none(), "there is one already");
        let spare = std::thread::spawn(move || waiting.wait().unwrap().unwrap());
        let front = take(&name).unwrap();
        assert!(take(&name).is_none(), "it is taken");
        Channel::new(front).send(&start(), REQUEST_MAX, &[]).unwrap();
        assert_eq!(spare.join().unwrap().1.version, "version");
        assert!(socket(&name).unwrap().is_some());
    }

    #[test]
    fn a_front_that_gives_up_does_not_end_the_spare() {
        let name = name();
        let waiting = waiting(&name, LONG, Vec::new());
        // Nobody accepts the connection yet.
        assert!(take(&name).is_none());
        let spare = std::thread::spawn(move || waiting.wait().unwrap().unwrap());
        let front = take(&name).unwrap();
        Channel::new(front).send(&start(), REQUEST_MAX, &[]).unwrap();
        assert_eq!(spare.join().unwrap().1.version, "version");
    }

    #[test]
    fn a_front_that_sends_nothing_ends_the_spare() {
        let name = name();
        let waiting = waiting(&name, LONG, Vec::new());
        let spare = std::thread::spawn(move || waiting.wait().unwrap().is_none());
        drop(take(&name).unwrap());
        assert!(spare.join().unwrap());
        assert!(take(&name).is_none());
    }

    #[test]
    fn a_spare_ends_when_it_is_idle_or_a_file_changes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kernel");
        fs::write(&path, "kernel").unwrap();
        let open = || vec![File::open(&path).unwrap()];
        assert!(waiting(&name(), Duration::ZERO, open()).wait().unwrap().is_none());
        for change in [
            |path: &std::path::Path| fs::write(path, "KERNEL").unwrap(),
            |path: &std::path::Path| {
                fs::write(path.with_extension("new"), "kernel").unwrap();
                fs::rename(path.with_extension("new"), path).unwrap();
            },
            |path: &std::path::Path| fs::remove_file(path).unwrap(),
        ] {
            let waiting = waiting(&name(), LONG, open());
            change(&path);
            assert!(waiting.wait().unwrap().is_none());
        }
    }

    #[test]
    fn nothing_is_taken_where_nobody_listens() {
        let name = name();
        assert!(take(&name).is_none());
        // A spare that is not ready.
        let socket = socket(&name).unwrap();
        assert!(take(&name).is_none());
        drop(socket);
    }
}
