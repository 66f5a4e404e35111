//! The request socket of a monitor, by which programs other than its front ask for something: to pause the guest, for instance.
//!
//! A request is one packet of a SOCK_SEQPACKET socket (unix(7)), and so is its answer, so that the monitor never waits for the
//! rest of a request. The directory of the socket's file determines who can connect. A program that asks trusts the answer no
//! more than a front does: the guest may have taken the monitor over.

use super::{Answer, ControlError, EVENT_MAX, PROTOCOL, Query, Statistics};
use crate::poll::wait_readable;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect,
    listen as start_listening, recv, send, socket_with,
};
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

/// Maximum number of programs that are connected. A further one takes the place of the first.
const CLIENTS_MAX: usize = 8;
/// Programs that connect at the same time.
const BACKLOG: i32 = 16;
/// Length of the buffer for a request in bytes: the longest is shorter.
const LENGTH_MAX: usize = 64;

/// Creates the request socket of a monitor that will be started.
///
/// # Errors
/// When the file exists, or the host cannot create it.
pub fn listen(path: &Path) -> io::Result<OwnedFd> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, FLAGS, None)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    start_listening(&socket, BACKLOG)?;
    Ok(socket)
}

const FLAGS: SocketFlags = SocketFlags::CLOEXEC.union(SocketFlags::NONBLOCK);

/// Maximum number of bytes of a part of a snapshot.
pub(crate) const PART_MAX: usize = 32 << 10;
/// Length of the offset before a part of a snapshot in bytes.
const OFFSET_LEN: usize = size_of::<u64>();
/// Instead of an offset, before the answer that ends a snapshot.
const IS_ANSWER: u64 = u64::MAX;
/// Maximum number of parts that are received before the time is looked at.
const PARTS: usize = 64;

/// A connection to the request socket of another program's monitor.
#[derive(Debug)]
pub struct Requester(OwnedFd);

impl AsFd for Requester {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Requester {
    /// Connects to the socket with this file.
    ///
    /// # Errors
    /// When the file does not exist, its monitor has ended, or too many programs are connecting.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, FLAGS, None)?;
        connect(&socket, &SocketAddrUnix::new(path)?)?;
        Ok(Self(socket))
    }

    /// Pauses the machine, as [`Monitor::pause`](super::Monitor::pause) does.
    ///
    /// # Errors
    /// When the monitor is of another version, has ended, or does not answer before `until`.
    pub fn pause(&self, until: Instant) -> Result<(), ControlError> {
        self.ask(Query::Pause, until).map(drop)
    }

    /// Resumes the machine.
    ///
    /// # Errors
    /// As [`Self::pause`].
    pub fn resume(&self, until: Instant) -> Result<(), ControlError> {
        self.ask(Query::Resume, until).map(drop)
    }

    /// Requests the statistics of the machine.
    ///
    /// # Errors
    /// As [`Self::pause`].
    pub fn statistics(&self, until: Instant) -> Result<Statistics, ControlError> {
        match self.ask(Query::Statistics, until)? {
            Answer::Statistics(statistics) => Ok(*statistics),
            _ => Err(ControlError::Version),
        }
    }

    /// Requests a snapshot: when the guest has frozen its processes ([`crate::agent::Process::freeze`]), the monitor sends it, and
    /// the guest continues, or is paused. It is written to `file`, of at most `max` bytes.
    ///
    /// # Errors
    /// As [`Self::pause`], and when another snapshot is being taken.
    pub fn snapshot(
        self,
        file: &File,
        max: u64,
        pauses: bool,
        until: Instant,
    ) -> Result<Receiver<'_>, ControlError> {
        match self.ask(Query::Snapshot { pauses }, until)? {
            Answer::Done => Ok(Receiver { socket: self.0, file, max, received: 0 }),
            Answer::Refused(reason) => Err(ControlError::Declined(reason)),
            Answer::Statistics(_) => Err(ControlError::Version),
        }
    }

    /// Sends a query and waits for its answer.
    fn ask(&self, query: Query, until: Instant) -> Result<Answer, ControlError> {
        let request = postcard::to_extend(&(PROTOCOL, query), Vec::new())?;
        match retry_on_intr(|| send(&self.0, &request, SendFlags::NOSIGNAL)) {
            Err(Errno::PIPE | Errno::CONNRESET) => return Err(ControlError::Ended),
            result => _ = result?,
        }
        if !wait_readable(self.0.as_fd(), Some(until))? {
            return Err(ControlError::Timeout);
        }
        let mut answer = vec![0; EVENT_MAX];
        match retry_on_intr(|| recv(&self.0, &mut answer[..], RecvFlags::TRUNC)) {
            // A monitor closes the connection at its end, and if it does not know the request.
            Ok((_, 0)) | Err(Errno::CONNRESET) => Err(ControlError::Ended),
            Ok((_, length)) if length > answer.len() => Err(ControlError::TooLong(length)),
            result => Ok(postcard::from_bytes(&answer[..result?.1])?),
        }
    }
}

/// Receives a snapshot. The descriptor of [`AsFd`] is readable when a part has arrived. Dropping it cancels the snapshot.
#[derive(Debug)]
pub struct Receiver<'a> {
    socket: OwnedFd,
    file: &'a File,
    max: u64,
    /// Number of bytes so far. A guest that has taken its monitor over could send any number.
    received: u64,
}

impl AsFd for Receiver<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Receiver<'_> {
    /// Writes the parts that have arrived to the file. Returns whether the snapshot is complete.
    ///
    /// # Errors
    /// When the monitor could not take the snapshot, has ended, or sends something else, and when the file cannot be written.
    pub fn receive(&mut self) -> Result<bool, ControlError> {
        let mut part = vec![0; OFFSET_LEN + PART_MAX];
        for _ in 0..PARTS {
            let length = match retry_on_intr(|| recv(&self.socket, &mut part[..], RecvFlags::TRUNC)) {
                Err(Errno::AGAIN) => return Ok(false),
                Ok((_, 0)) | Err(Errno::CONNRESET) => return Err(ControlError::Ended),
                result => result?.1,
            };
            let too_long = ControlError::TooLong(length);
            let Some((offset, bytes)) = part.get(..length).and_then(<[u8]>::split_first_chunk) else {
                return Err(too_long);
            };
            let offset = u64::from_le_bytes(*offset);
            if offset == IS_ANSWER {
                return match postcard::from_bytes(bytes)? {
                    Answer::Done => Ok(true),
                    Answer::Refused(reason) => Err(ControlError::Declined(reason)),
                    Answer::Statistics(_) => Err(ControlError::Version),
                };
            }
            self.received += length as u64;
            // Each page arrives once, with an offset.
            let end = offset.checked_add(bytes.len() as u64);
            if end.is_none_or(|end| end > self.max) || self.received / 2 > self.max {
                return Err(too_long);
            }
            self.file.write_all_at(bytes, offset).map_err(ControlError::File)?;
        }
        Ok(false)
    }
}

/// The monitor's end: the socket, and the programs that are connected.
#[derive(Debug)]
pub(crate) struct Requests {
    listener: OwnedFd,
    /// In the order of their numbers.
    clients: VecDeque<(u32, OwnedFd)>,
    /// The number of the next program. Numbers are not used again for a long time, so that an answer does not go to another one.
    next: u32,
}

impl AsFd for Requests {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Requests {
    pub(crate) const fn new(listener: OwnedFd) -> Self {
        Self { listener, clients: VecDeque::new(), next: 0 }
    }

    /// Accepts a connection. Returns its number, which is below 2^31, and its descriptor.
    pub(crate) fn accept(&mut self) -> Option<(u32, BorrowedFd<'_>)> {
        let client = accept_with(&self.listener, FLAGS).ok()?;
        if self.clients.len() >= CLIENTS_MAX {
            self.clients.pop_front();
        }
        let number = self.next;
        self.next = (self.next + 1) % (1 << 31);
        self.clients.push_back((number, client));
        self.clients.back().map(|(number, client)| (*number, client.as_fd()))
    }

    /// Receives a query that has arrived. Returns `None` after closing the connection, if the program has closed it or sends
    /// something else.
    pub(crate) fn receive(&mut self, number: u32) -> Option<Query> {
        let (_, client) = self.clients.iter().find(|(known, _)| *known == number)?;
        let mut request = [0; LENGTH_MAX];
        let query = match retry_on_intr(|| recv(client, &mut request[..], RecvFlags::TRUNC)) {
            Ok((_, length)) if length <= LENGTH_MAX => query_of(&request[..length]),
            _ => None,
        };
        if query.is_none() {
            self.close(number);
        }
        query
    }

    /// Sends an answer. A program that has not read its earlier answers gets none.
    pub(crate) fn answer(&mut self, number: u32, answer: &Answer) {
        let Some((_, client)) = self.clients.iter().find(|(known, _)| *known == number) else { return };
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let sent = postcard::to_extend(answer, Vec::new())
            .map(|answer: Vec<u8>| retry_on_intr(|| send(client, &answer, flags)));
        if !matches!(sent, Ok(Ok(_))) {
            self.close(number);
        }
    }

    /// Sends a part of a snapshot, and waits until the program takes it, or until a time.
    pub(crate) fn send_part(&self, number: u32, offset: u64, bytes: &[u8], until: Instant) -> io::Result<()> {
        let client = self.clients.iter().find(|(known, _)| *known == number);
        let (_, client) = client.ok_or(io::ErrorKind::NotConnected)?;
        let part = [&offset.to_le_bytes(), bytes].concat();
        loop {
            match retry_on_intr(|| send(client, &part, SendFlags::NOSIGNAL)) {
                Err(Errno::AGAIN) if wait_writable(client.as_fd(), until)? => {}
                Err(Errno::AGAIN) => return Err(io::ErrorKind::TimedOut.into()),
                result => return result.map(drop).map_err(io::Error::from),
            }
        }
    }

    /// Ends a snapshot with an answer. A program that has not taken all parts gets none.
    pub(crate) fn end_snapshot(&mut self, number: u32, answer: &Answer) {
        let answer = postcard::to_extend(answer, Vec::new()).unwrap_or_default();
        if self.send_part(number, IS_ANSWER, &answer, Instant::now()).is_err() {
            self.close(number);
        }
    }

    /// Whether a program is connected.
    pub(crate) fn is_connected(&self, number: u32) -> bool {
        self.clients.iter().any(|(known, _)| *known == number)
    }

    fn close(&mut self, number: u32) {
        self.clients.retain(|(known, _)| *known != number);
    }
}

/// Waits until a socket accepts more, or has ended, at most until a time. Returns `false` at that time.
fn wait_writable(socket: BorrowedFd<'_>, until: Instant) -> io::Result<bool> {
    let left = Timespec::try_from(until.saturating_duration_since(Instant::now())).ok();
    let count =
        retry_on_intr(|| poll(&mut [PollFd::from_borrowed_fd(socket, PollFlags::OUT)], left.as_ref()))?;
    Ok(count > 0)
}

/// The query of a request, if it is of this version and complete. Only the front can detach.
pub(super) fn query_of(request: &[u8]) -> Option<Query> {
    let ((version, query), rest) = postcard::take_from_bytes::<(&str, Query)>(request).ok()?;
    (version == PROTOCOL && rest.is_empty() && query != Query::Detach).then_some(query)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    /// A monitor's end, and how programs reach it.
    fn pair() -> (Requests, std::path::PathBuf, tempfile::TempDir) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("requests");
        (Requests::new(listen(&path).unwrap()), path, folder)
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    #[test]
    fn each_program_gets_its_answer() {
        let (mut requests, path, _folder) = pair();
        std::thread::scope(|scope| {
            let path = &path;
            let ask =
                |query| scope.spawn(move || Requester::connect(path).unwrap().ask(query, soon()).unwrap());
            let programs = [Query::Pause, Query::Statistics].map(|query| {
                let program = ask(query);
                wait_readable(requests.as_fd(), None).unwrap();
                let (number, client) = requests.accept().unwrap();
                wait_readable(client, None).unwrap();
                assert_eq!(requests.receive(number), Some(query));
                (number, program)
            });
            let [(pause, paused), (statistics, reported)] = programs;
            requests.answer(statistics, &Answer::Statistics(Box::default()));
            assert!(matches!(reported.join().unwrap(), Answer::Statistics(_)));
            requests.answer(pause, &Answer::Done);
            assert!(matches!(paused.join().unwrap(), Answer::Done));
            // Both have closed their connections.
            assert_eq!((requests.receive(pause), requests.receive(statistics)), (None, None));
            assert!(requests.clients.is_empty());
        });
    }

    #[test]
    fn other_packets_close_the_connection() {
        let (mut requests, path, _folder) = pair();
        let valid = postcard::to_extend(&(PROTOCOL, Query::Resume), Vec::new()).unwrap();
        let of_other_version = postcard::to_extend(&("0123456789abcdef", Query::Resume), Vec::new()).unwrap();
        let detach = postcard::to_extend(&(PROTOCOL, Query::Detach), Vec::new()).unwrap();
        let longer = [&valid[..], &[0]].concat();
        for (packet, expected) in [
            (&valid[..], Some(Query::Resume)),
            (&of_other_version, None),
            (&detach, None),
            (&longer, None),
            (&valid[..3], None),
            (&[0; LENGTH_MAX], None),
            (&[0; 10_000], None),
            (&[], None),
        ] {
            let program = Requester::connect(&path).unwrap();
            send(&program.0, packet, SendFlags::NOSIGNAL).unwrap();
            let (number, _) = requests.accept().unwrap();
            assert_eq!(requests.receive(number), expected, "{packet:?}");
            assert_eq!(requests.clients.len(), usize::from(expected.is_some()));
            requests.close(number);
            assert!(matches!(program.ask(Query::Resume, soon()), Err(ControlError::Ended)));
        }
    }

    #[test]
    fn a_snapshot_arrives_in_parts() {
        const MAX: u64 = 1 << 20;
        // What the monitor sends, the result, and the file after it.
        type Case<'a> = (&'a [(u64, &'a [u8])], Option<Answer>, Result<bool, &'a str>, &'a [u8]);
        let refused = Answer::Refused("no memory".to_owned());
        let cases: [Case<'_>; 6] = [
            (&[(2, b"cd"), (0, b"ab")], Some(Answer::Done), Ok(true), b"abcd"),
            (&[(0, b"ab")], None, Ok(false), b"ab"),
            (&[(0, b"ab")], Some(refused), Err("no memory"), b"ab"),
            (&[(MAX - 1, b"ab")], None, Err("too long"), b""),
            (&[(u64::MAX - 1, b"ab")], None, Err("too long"), b""),
            (&[(0, &[7; PART_MAX + 1])], None, Err("too long"), b""),
        ];
        for (parts, answer, expected, content) in cases {
            let (mut requests, path, _folder) = pair();
            let file = tempfile::tempfile().unwrap();
            let requester = Requester::connect(&path).unwrap();
            let (number, _) = requests.accept().unwrap();
            std::thread::scope(|scope| {
                let receiver = scope.spawn(|| requester.snapshot(&file, MAX, true, soon()).unwrap());
                wait_readable(requests.clients[0].1.as_fd(), None).unwrap();
                assert_eq!(requests.receive(number), Some(Query::Snapshot { pauses: true }));
                requests.answer(number, &Answer::Done);
                let mut receiver = receiver.join().unwrap();
                parts
                    .iter()
                    .for_each(|(offset, part)| requests.send_part(number, *offset, part, soon()).unwrap());
                answer.iter().for_each(|answer| requests.end_snapshot(number, answer));
                match (receiver.receive(), expected) {
                    (Ok(is_complete), Ok(expected)) => assert_eq!(is_complete, expected),
                    (Err(error), Err(expected)) => assert!(error.to_string().contains(expected), "{error}"),
                    (result, _) => panic!("{result:?} is not {expected:?}"),
                }
                drop(receiver);
                assert!(requests.send_part(number, 0, b"ab", soon()).is_err(), "the program has gone");
            });
            let mut written = vec![0; content.len()];
            file.read_exact_at(&mut written, 0).unwrap();
            assert_eq!((&written[..], file.metadata().unwrap().len()), (content, content.len() as u64));
        }
    }

    #[test]
    fn the_length_of_a_snapshot_is_bounded() {
        let (mut requests, path, _folder) = pair();
        let file = tempfile::tempfile().unwrap();
        let requester = Requester::connect(&path).unwrap();
        let (number, _) = requests.accept().unwrap();
        let mut receiver = Receiver { socket: requester.0, file: &file, max: 100, received: 0 };
        let mut send = || {
            requests.send_part(number, 0, &[7; 50], soon()).unwrap();
            receiver.receive()
        };
        assert!((0..3).all(|_| matches!(send(), Ok(false))));
        assert!(matches!(send(), Err(ControlError::TooLong(58))));
    }

    #[test]
    fn the_number_of_programs_is_bounded() {
        let (mut requests, path, _folder) = pair();
        let programs: Vec<_> = (0..=CLIENTS_MAX)
            .map(|_| {
                let program = Requester::connect(&path).unwrap();
                assert!(requests.accept().is_some());
                program
            })
            .collect();
        assert_eq!(requests.clients.len(), CLIENTS_MAX);
        assert!(matches!(programs[0].ask(Query::Pause, soon()), Err(ControlError::Ended)));
        let program = &programs[CLIENTS_MAX];
        assert!(matches!(program.ask(Query::Pause, Instant::now()), Err(ControlError::Timeout)));
        let number = u32::try_from(CLIENTS_MAX).unwrap();
        assert_eq!(requests.receive(number), Some(Query::Pause));
        // An answer that is not read takes space in the socket; when the socket is full, the connection is closed.
        while !requests.clients.is_empty() && requests.clients.iter().any(|(known, _)| *known == number) {
            requests.answer(number, &Answer::Done);
        }
    }

    #[test]
    fn there_is_one_socket_of_a_name() {
        let (requests, path, _folder) = pair();
        assert_eq!(listen(&path).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(requests);
        let error = Requester::connect(&path).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    }
}
