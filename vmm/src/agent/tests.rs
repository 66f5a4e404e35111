use super::*;
use proptest::prelude::*;

fn process(place: Place, here: UnixStream) -> Process {
    Process::with(place, Outgoing::new(here, Vec::new()), None)
}

/// What a process says in pieces, and whether that ended in an error.
fn news<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> (Vec<News>, bool) {
    let (here, mut there) = UnixStream::pair().unwrap();
    let place = Place { socket: PathBuf::new(), token: 1 };
    let mut process = process(place, here);
    let mut seen = Vec::new();
    for piece in pieces {
        there.write_all(piece).unwrap();
        loop {
            match process.news() {
                Ok(Some(news)) => seen.push(news),
                Ok(None) => break,
                Err(_) => return (seen, true),
            }
        }
    }
    (seen, false)
}

#[test]
fn news_come_whole_in_whatever_pieces() {
    let exited = Message::Exited { status: 7, was_executed: true };
    let messages = [Message::Started, Message::HasOutput(Role::Error), exited].map(encoded).concat();
    let bytes = [b"OK 1073741824\n", &messages[..]].concat();
    let expected =
        [News::Started, News::HasOutput(Role::Error), News::Exited { status: 7, was_executed: true }];
    for length in 1..=bytes.len() {
        assert_eq!(news(bytes.chunks(length)), (expected.to_vec(), false), "{length}");
    }
}

#[test]
fn words_that_only_the_host_has_are_none_of_a_guests() {
    for message in [Message::Start(b""), Message::Signal(9), Message::ReportStart, Message::EndInput] {
        assert_eq!(news([&b"OK 1\n"[..], &encoded(message)]), (Vec::new(), true), "{message:?}");
    }
    // A message that would never end.
    assert!(news([&b"OK 1\n"[..], &[1, 0, 0, 0, 0, 1, 0, 0], &[0; 64]]).1);
    assert!(news([&b"OK, no\n"[..]]).1);
    // What it has said already.
    let started = encoded(Message::Started);
    assert_eq!(news([&b"OK 1\n"[..], &started, &started]), (vec![News::Started], true));
    assert!(news([&[b'1'; LONGEST_ANSWER][..]]).1);
}

#[test]
fn news_that_were_put_back_come_first() {
    let (here, mut there) = UnixStream::pair().unwrap();
    let place = Place { socket: PathBuf::new(), token: 1 };
    let mut process = process(place, here);
    there.write_all(b"OK 1\n").unwrap();
    there.write_all(&encoded(Message::Started)).unwrap();
    assert_eq!(process.wait_for_news().unwrap(), News::Started);
    there.write_all(&encoded(Message::HasOutput(Role::Error))).unwrap();
    process.put_back([News::HasOutput(Role::Output), News::Started]);
    for expected in [News::HasOutput(Role::Output), News::Started, News::HasOutput(Role::Error)] {
        assert_eq!(process.wait_for_news().unwrap(), expected);
    }
    drop(there);
    assert!(process.wait_for_news().is_err());
}

proptest! {
    /// A guest may say anything.
    #[test]
    fn any_guest_is_heard(pieces in prop::collection::vec(prop::collection::vec(0_u8..20, 1..64), 0..4)) {
        let pieces = pieces.iter().map(Vec::as_slice);
        let bytes = pieces.clone().collect::<Vec<_>>().concat();
        let (seen, is_error) = news([&b"OK 1\n"[..]].into_iter().chain(pieces));
        prop_assert!(seen.len() * MESSAGE_HEADER_LEN <= bytes.len());
        prop_assert!(is_error || Message::split(&bytes).is_ok());
    }

    #[test]
    fn any_answer_is_read_to_its_line(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
        let answered = |bytes: &[u8]| {
            let (mut here, mut there) = UnixStream::pair().unwrap();
            there.write_all(bytes).unwrap();
            drop(there);
            let is_ok = expect_accepted(&here).is_ok();
            let mut rest = Vec::new();
            here.read_to_end(&mut rest).unwrap();
            (is_ok, rest)
        };
        let (is_ok, rest) = answered(&bytes);
        prop_assert!(bytes.len() - rest.len() <= 32);
        prop_assert!(!is_ok || bytes.starts_with(b"OK "));
        prop_assert_eq!(answered(&[&b"OK 7\n"[..], &bytes].concat()), (true, bytes));
    }
}

/// A guest whose Unix socket takes connections, and which never answers.
fn silent_guest() -> (tempfile::TempDir, Place) {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("vsock");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    // Connections wait in its backlog as long as it is open.
    std::mem::forget(listener);
    (folder, Place { socket, token: 1 })
}

#[test]
fn a_guest_that_never_takes_a_stream_is_not_waited_for() {
    let (_folder, place) = silent_guest();
    for role in [Role::Input, Role::Output, Role::Error] {
        let error = place.connect_within(role, Duration::from_millis(1)).unwrap_err();
        assert!(matches!(error, AgentError::Silent { .. }), "{error}");
        assert!(error.to_string().contains("does not answer"), "{error}");
    }
}

#[test]
fn a_guest_that_does_not_take_a_process_is_not_waited_for() {
    let (_folder, place) = silent_guest();
    // More than any socket takes.
    let outgoing = Outgoing::new(place.dial().unwrap(), vec![0; 64 << 20]);
    let mut process = Process::with(place, outgoing, Some(Duration::ZERO));
    let (flags, limit) = process.wants();
    assert_eq!((flags, limit), (PollFlags::IN | PollFlags::OUT, Some(Duration::ZERO)));
    process.signal(15);
    assert!(matches!(process.news(), Err(AgentError::Silent { .. })));
}

#[test]
fn a_process_that_was_taken_may_be_quiet_for_ever() {
    let (here, mut there) = UnixStream::pair().unwrap();
    let place = Place { socket: PathBuf::new(), token: 1 };
    let mut process = Process::with(place, Outgoing::new(here, b"start".to_vec()), Some(ANSWER_TIMEOUT));
    assert!(process.wants().1.is_some());
    there.write_all(b"OK 1\n").unwrap();
    assert_eq!(process.news().unwrap(), None);
    assert_eq!(process.wants(), (PollFlags::IN, None));
}
