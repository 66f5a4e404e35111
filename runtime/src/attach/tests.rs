use super::*;
use guest_protocol::agent::{Hello, MESSAGE_HEADER_LEN, Message};
use rustix::event::{EventfdFlags, eventfd};
use std::cell::RefCell;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Mutex;
use std::thread::JoinHandle;

/// Signals that are pending when an eventfd is readable. The last of them ends the guest.
struct Signals {
    pending: OwnedFd,
    numbers: Vec<u8>,
}

impl Signals {
    fn new(numbers: &[u8]) -> Self {
        let count = u32::from(!numbers.is_empty());
        Self { pending: eventfd(count, EventfdFlags::NONBLOCK).unwrap(), numbers: numbers.to_vec() }
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pending.as_fd()
    }
}

impl SignalSource for Signals {
    fn forward(&mut self, process: Option<&Process>) -> Option<u8> {
        rustix::io::read(&self.pending, &mut [0; 8]).unwrap();
        let last = self.numbers.pop();
        self.numbers.iter().for_each(|&number| process.unwrap().signal(number));
        last
    }
}

/// Accepts a connection to a guest's agent.
fn accept(listener: &UnixListener) -> (UnixStream, Role) {
    let (stream, _) = listener.accept().unwrap();
    let mut reader = BufReader::with_capacity(1, &stream);
    reader.read_line(&mut String::new()).unwrap();
    let mut hello = [0; Hello::LEN];
    reader.read_exact(&mut hello).unwrap();
    (&stream).write_all(b"OK 1\n").unwrap();
    let role = Hello::from_bytes(hello).unwrap().role;
    (stream, role)
}

fn send(mut control: &UnixStream, message: Message<'_>) {
    let mut bytes = Vec::new();
    message.encode(&mut bytes);
    control.write_all(&bytes).unwrap();
}

/// Receives a message: its kind, and the first byte of its content.
fn receive(mut control: &UnixStream) -> (u8, Option<u8>) {
    let mut header = [0; MESSAGE_HEADER_LEN];
    control.read_exact(&mut header).unwrap();
    let mut content = vec![0; header[4].into()];
    control.read_exact(&mut content).unwrap();
    (header[0], content.first().copied())
}

const EXITED: fn(u8) -> Message<'static> = |status| Message::Exited { status, was_executed: true };

/// A guest with an agent that runs `agent` with the payload's control connection, and the payload.
fn guest(
    folder: &Path,
    agent: impl FnOnce(&UnixListener, UnixStream) + Send + 'static,
) -> (Process, JoinHandle<()>) {
    let socket = folder.join("vsock");
    let listener = UnixListener::bind(&socket).unwrap();
    let thread = std::thread::spawn(move || {
        let (control, role) = accept(&listener);
        assert_eq!(role, Role::Control);
        agent(&listener, control);
    });
    (Process::payload(&socket).unwrap(), thread)
}

/// Files for output and error, and no input.
fn streams(folder: &Path, output: &str) -> Streams {
    let open = |path: &Path| File::options().create(true).append(true).open(path).unwrap();
    let target = |path: &Path| OutputTarget::File(open(path));
    Streams { input: None, output: target(&folder.join(output)), error: target(&folder.join("error")) }
}

/// The messages for the user.
fn recorded() -> (Notify, Arc<Mutex<Vec<String>>>) {
    let messages = Arc::new(Mutex::new(Vec::new()));
    let list = Arc::clone(&messages);
    (Arc::new(move |message: &str| list.lock().unwrap().push(message.to_owned())), messages)
}

#[test]
fn output_is_delivered_before_the_exit_status_is_returned() {
    let folder = tempfile::tempdir().unwrap();
    let (process, agent) = guest(folder.path(), |listener, control| {
        // Its input is empty.
        assert_eq!(receive(&control), (7, None));
        for (role, text) in [(Role::Output, "out"), (Role::Error, "err")] {
            send(&control, Message::HasOutput(role));
            let (mut stream, connected) = accept(listener);
            assert_eq!(connected, role);
            stream.write_all(text.as_bytes()).unwrap();
        }
        send(&control, EXITED(3));
    });
    let (notify, messages) = recorded();
    let (mut signals, mut stop) = (Signals::new(&[]), |cause| panic!("{cause:?}"));
    let status =
        Attachment::new(&mut signals, &mut stop, notify).serve(process, streams(folder.path(), "output"));
    agent.join().unwrap();
    assert_eq!(status.unwrap(), 3);
    let read = |name: &str| std::fs::read_to_string(folder.path().join(name)).unwrap();
    assert_eq!((read("output"), read("error")), ("out".to_owned(), "err".to_owned()));
    assert_eq!(*messages.lock().unwrap(), [""; 0]);
}

#[test]
fn a_command_whose_output_cannot_be_written_has_failed() {
    let folder = tempfile::tempdir().unwrap();
    let (process, agent) = guest(folder.path(), |listener, control| {
        send(&control, Message::HasOutput(Role::Output));
        accept(listener).0.write_all(b"out").unwrap();
        send(&control, EXITED(0));
    });
    let (notify, messages) = recorded();
    let (mut signals, mut stop) = (Signals::new(&[]), |cause| panic!("{cause:?}"));
    let status =
        Attachment::new(&mut signals, &mut stop, notify).serve(process, streams(folder.path(), "/dev/full"));
    agent.join().unwrap();
    assert_eq!(status.unwrap(), 125);
    let messages = messages.lock().unwrap();
    assert_eq!(messages.len(), 1);
    assert!(messages[0].starts_with("cannot write the output of the command: "), "{messages:?}");
}

#[test]
fn input_is_forwarded_to_its_end() {
    let folder = tempfile::tempdir().unwrap();
    let (process, agent) = guest(folder.path(), |listener, control| {
        let (mut stream, role) = accept(listener);
        assert_eq!(role, Role::Input);
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        assert_eq!(text, "in");
        send(&control, EXITED(0));
    });
    let (read, write) = std::io::pipe().unwrap();
    (&write).write_all(b"in").unwrap();
    drop(write);
    let (mut signals, mut stop) = (Signals::new(&[]), |cause| panic!("{cause:?}"));
    let streams = Streams { input: Some(OwnedFd::from(read).into()), ..streams(folder.path(), "output") };
    let status = Attachment::new(&mut signals, &mut stop, recorded().0).serve(process, streams);
    agent.join().unwrap();
    assert_eq!(status.unwrap(), 0);
}

#[test]
fn signals_are_forwarded_and_the_last_stops_the_guest() {
    let folder = tempfile::tempdir().unwrap();
    let (process, agent) = guest(folder.path(), |_, control| {
        assert_eq!(receive(&control), (7, None));
        assert_eq!(receive(&control), (2, Some(10)));
        send(&control, EXITED(143));
    });
    let causes = RefCell::new(Vec::new());
    let mut stop = |cause| causes.borrow_mut().push(cause);
    let mut signals = Signals::new(&[10, 15]);
    let status = Attachment::new(&mut signals, &mut stop, recorded().0)
        .serve(process, streams(folder.path(), "output"));
    agent.join().unwrap();
    assert_eq!(status.unwrap(), 143);
    assert_eq!(*causes.borrow(), [StopCause::Signal(15)]);
}

#[test]
fn a_stopped_guest_has_a_second_to_deliver_output() {
    let folder = tempfile::tempdir().unwrap();
    let (ended, wait) = std::sync::mpsc::channel::<()>();
    // The agent neither reports the end of the process nor closes the connection.
    let (process, agent) = guest(folder.path(), move |_, _control| {
        let _ = wait.recv();
    });
    let causes = RefCell::new(Vec::new());
    let mut stop = |cause| causes.borrow_mut().push(cause);
    let mut signals = Signals::new(&[]);
    let mut attachment = Attachment::new(&mut signals, &mut stop, recorded().0);
    let start = Instant::now();
    attachment.set_deadline(Some(start));
    let status = attachment.serve(process, streams(folder.path(), "output"));
    assert!(matches!(status, Err(AgentError::Lost)), "{status:?}");
    assert!(start.elapsed() >= DRAIN_TIMEOUT);
    assert_eq!(*causes.borrow(), [StopCause::Timeout]);
    drop(ended);
    agent.join().unwrap();
}

#[test]
fn the_start_of_a_program_is_waited_for_and_output_before_it_is_kept() {
    for is_found in [true, false] {
        let folder = tempfile::tempdir().unwrap();
        let (process, agent) = guest(folder.path(), move |listener, control| {
            assert_eq!(receive(&control), (4, None));
            send(&control, Message::HasOutput(Role::Error));
            if is_found {
                send(&control, Message::Started);
            } else {
                send(&control, Message::Exited { status: 127, was_executed: false });
            }
            accept(listener).0.write_all(b"text").unwrap();
            if is_found {
                send(&control, EXITED(127));
            }
        });
        let (mut signals, mut stop) = (Signals::new(&[]), |cause| panic!("{cause:?}"));
        let mut attachment = Attachment::new(&mut signals, &mut stop, recorded().0);
        let mut process = process;
        assert_eq!(attachment.wait_for_start(&mut process).unwrap(), is_found);
        assert_eq!(attachment.serve(process, streams(folder.path(), "output")).unwrap(), 127);
        agent.join().unwrap();
        assert_eq!(std::fs::read(folder.path().join("error")).unwrap(), b"text");
    }
}

#[test]
fn a_lost_connection_leaves_the_earlier_deadline() {
    let (mut signals, mut stop) = (Signals::new(&[]), |_| {});
    let mut attachment = Attachment::new(&mut signals, &mut stop, recorded().0);
    attachment.abandon(&AgentError::Lost);
    let (until, cause) = attachment.deadline.unwrap();
    assert!(until > Instant::now() && cause == StopCause::Lost);
    let earlier = Instant::now();
    attachment.set_deadline(Some(earlier));
    attachment.abandon(&AgentError::Lost);
    assert_eq!(attachment.deadline, Some((earlier, StopCause::Timeout)));
}

#[test]
fn a_monitor_that_exits_is_an_error() {
    let (mut signals, mut stop) = (Signals::new(&[]), |cause| panic!("{cause:?}"));
    let mut attachment = Attachment::new(&mut signals, &mut stop, recorded().0);
    let monitor = Monitor::spawn(Path::new("/bin/true")).unwrap();
    let event = attachment.event(&monitor);
    assert!(matches!(event, Err(ControlError::Disconnected)), "{event:?}");
}
