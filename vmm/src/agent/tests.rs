use super::*;
use proptest::prelude::*;

fn process(address: ProcessAddress, host: UnixStream) -> Process {
    Process::with(address, Sender::new(host, Vec::new()), None)
}

/// The events of a process that receives these bytes in pieces, and whether they ended in an error.
fn events<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> (Vec<ProcessEvent>, bool) {
    let (host, mut guest) = UnixStream::pair().unwrap();
    let address = ProcessAddress { socket: PathBuf::new(), token: 1 };
    let mut process = process(address, host);
    let mut events = Vec::new();
    for piece in pieces {
        guest.write_all(piece).unwrap();
        loop {
            match process.poll_event() {
                Ok(Some(event)) => events.push(event),
                Ok(None) => break,
                Err(_) => return (events, true),
            }
        }
    }
    (events, false)
}

#[test]
fn events_are_decoded_from_any_pieces() {
    let exited = Message::Exited { status: 7, was_executed: true };
    let messages = [Message::Started, Message::HasOutput(Role::Error), exited].map(encoded).concat();
    let bytes = [b"OK 1073741824\n", &messages[..]].concat();
    let expected = [
        ProcessEvent::Started,
        ProcessEvent::HasOutput(Role::Error),
        ProcessEvent::Exited { status: 7, was_executed: true },
    ];
    for length in 1..=bytes.len() {
        assert_eq!(events(bytes.chunks(length)), (expected.to_vec(), false), "{length}");
    }
}

#[test]
fn invalid_messages_of_a_guest_are_errors() {
    for message in [Message::Start(b""), Message::Signal(9), Message::ReportStart, Message::EndInput] {
        assert_eq!(events([&b"OK 1\n"[..], &encoded(message)]), (Vec::new(), true), "{message:?}");
    }
    // A message that is longer than any of a guest's.
    assert!(events([&b"OK 1\n"[..], &[1, 0, 0, 0, 0, 1, 0, 0], &[0; 64]]).1);
    assert!(events([&b"OK, no\n"[..]]).1);
    // A repeated event.
    let started = encoded(Message::Started);
    assert_eq!(events([&b"OK 1\n"[..], &started, &started]), (vec![ProcessEvent::Started], true));
    assert!(events([&[b'1'; MAX_ACCEPT_LINE_LEN][..]]).1);
}

#[test]
fn requeued_events_come_first() {
    let (host, mut guest) = UnixStream::pair().unwrap();
    let address = ProcessAddress { socket: PathBuf::new(), token: 1 };
    let mut process = process(address, host);
    guest.write_all(b"OK 1\n").unwrap();
    guest.write_all(&encoded(Message::Started)).unwrap();
    assert_eq!(process.wait_for_event().unwrap(), ProcessEvent::Started);
    guest.write_all(&encoded(Message::HasOutput(Role::Error))).unwrap();
    process.requeue([ProcessEvent::HasOutput(Role::Output), ProcessEvent::Started]);
    for expected in
        [ProcessEvent::HasOutput(Role::Output), ProcessEvent::Started, ProcessEvent::HasOutput(Role::Error)]
    {
        assert_eq!(process.wait_for_event().unwrap(), expected);
    }
    drop(guest);
    assert!(process.wait_for_event().is_err());
}

proptest! {
    /// A guest may send anything.
    #[test]
    fn any_bytes_are_decoded_or_an_error(pieces in prop::collection::vec(prop::collection::vec(0_u8..20, 1..64), 0..4)) {
        let pieces = pieces.iter().map(Vec::as_slice);
        let bytes = pieces.clone().collect::<Vec<_>>().concat();
        let (events, is_error) = events([&b"OK 1\n"[..]].into_iter().chain(pieces));
        prop_assert!(events.len() * MESSAGE_HEADER_LEN <= bytes.len());
        prop_assert!(is_error || Message::split(&bytes).is_ok());
    }

    #[test]
    fn nothing_after_the_accept_line_is_read(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
        let answered = |bytes: &[u8]| {
            let (mut host, mut guest) = UnixStream::pair().unwrap();
            guest.write_all(bytes).unwrap();
            drop(guest);
            let is_ok = expect_accepted(&host).is_ok();
            let mut rest = Vec::new();
            host.read_to_end(&mut rest).unwrap();
            (is_ok, rest)
        };
        let (is_ok, rest) = answered(&bytes);
        prop_assert!(bytes.len() - rest.len() <= 32);
        prop_assert!(!is_ok || bytes.starts_with(b"OK "));
        prop_assert_eq!(answered(&[&b"OK 7\n"[..], &bytes].concat()), (true, bytes));
    }
}

/// A guest whose Unix socket accepts connections, and which never responds.
fn silent_guest() -> (tempfile::TempDir, ProcessAddress) {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("vsock");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    // While the listener is open, connections stay in its backlog.
    std::mem::forget(listener);
    (folder, ProcessAddress { socket, token: 1 })
}

#[test]
fn connecting_to_a_stream_of_a_silent_guest_times_out() {
    let (_folder, address) = silent_guest();
    for role in [Role::Input, Role::Output, Role::Error] {
        let error = address.connect_within(role, Duration::from_millis(1)).unwrap_err();
        assert!(matches!(error, AgentError::Silent { .. }), "{error}");
        assert!(error.to_string().contains("does not answer"), "{error}");
    }
}

#[test]
fn starting_a_process_in_a_silent_guest_times_out() {
    let (_folder, address) = silent_guest();
    // More than any socket buffer.
    let sender = Sender::new(address.dial().unwrap(), vec![0; 64 << 20]);
    let mut process = Process::with(address, sender, Some(Duration::ZERO));
    let (flags, limit) = process.poll_interest();
    assert_eq!((flags, limit), (PollFlags::IN | PollFlags::OUT, Some(Duration::ZERO)));
    process.signal(15);
    assert!(matches!(process.poll_event(), Err(AgentError::Silent { .. })));
}

#[test]
fn an_accepted_process_has_no_deadline() {
    let (host, mut guest) = UnixStream::pair().unwrap();
    let address = ProcessAddress { socket: PathBuf::new(), token: 1 };
    let mut process = Process::with(address, Sender::new(host, b"start".to_vec()), Some(ANSWER_TIMEOUT));
    assert!(process.poll_interest().1.is_some());
    guest.write_all(b"OK 1\n").unwrap();
    assert_eq!(process.poll_event().unwrap(), None);
    assert_eq!(process.poll_interest(), (PollFlags::IN, None));
}
