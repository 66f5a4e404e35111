//! vsock connections between guest and host: both directions, shutdown, refusal, many connections and large streams.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;
use tests::vsock::{Pattern, check};
use tests::{Started, TIMEOUT, kindling, run, start, testbed};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// A folder with the sockets of a guest.
struct SocketFolder(tempfile::TempDir);

impl SocketFolder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, suffix: &str) -> PathBuf {
        self.0.path().join(format!("vsock{suffix}"))
    }

    /// Boots a guest that runs a shell script.
    fn boot(&self, script: &str) -> Command {
        let mut command = kindling();
        command.args(["boot", "--memory", "256", "--image"]).arg(testbed("images/vsock"));
        command.arg("--vsock").arg(self.path("")).args(["--", "/bin/sh", "-c", script]).stdin(Stdio::null());
        command
    }

    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.path(&format!("_{port}"))).unwrap()
    }

    /// Connects to a port of the guest; `None` if it is refused.
    fn connect(&self, port: u32) -> Option<UnixStream> {
        let mut socket = UnixStream::connect(self.path("")).unwrap();
        writeln!(socket, "CONNECT {port}").unwrap();
        let mut answer = Vec::new();
        let mut byte = [0];
        while answer.last() != Some(&b'\n') {
            match socket.read(&mut byte) {
                Ok(1) => answer.push(byte[0]),
                _ => return None,
            }
        }
        assert!(answer.starts_with(b"OK "), "{answer:?}");
        Some(socket)
    }
}

/// Starts a guest and waits until it listens.
fn listening(command: &mut Command) -> (std::process::Child, BufReader<std::process::ChildStdout>) {
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    output.read_line(&mut line).unwrap();
    assert_eq!(line.trim_end(), "listening");
    (child, output)
}

#[test]
fn a_guest_connects_to_the_host_and_each_direction_shuts_down_separately() {
    let folder = SocketFolder::new();
    let listener = folder.listen(80);
    let guest = start(&mut folder.boot("echo question | vsock-guest connect 80"));
    let (mut socket, _) = listener.accept().unwrap();
    let mut question = String::new();
    socket.read_to_string(&mut question).unwrap();
    assert_eq!(question, "question\n");
    // The guest has shut down its sending side, and can still receive.
    socket.write_all(b"answer\n").unwrap();
    drop(socket);
    let outcome = guest.finish_within(TIMEOUT);
    assert_eq!(outcome.expect_status(0).stdout, "answer\n");
    assert!(!folder.path("").exists(), "the socket must be removed with the guest");
}

#[test]
fn the_host_connects_to_a_listening_guest() {
    let folder = SocketFolder::new();
    let (mut child, mut output) = listening(&mut folder.boot("vsock-guest echo 52 2"));
    assert!(folder.connect(53).is_none(), "the guest does not listen on this port");
    for text in ["hello", "and again"] {
        let mut socket = folder.connect(52).unwrap();
        socket.write_all(text.as_bytes()).unwrap();
        socket.shutdown(Shutdown::Write).unwrap();
        let mut answer = String::new();
        socket.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, text);
    }
    let mut rest = String::new();
    output.read_to_string(&mut rest).unwrap();
    assert_eq!((child.wait().unwrap().code(), &rest[..]), (Some(0), ""));
}

#[test]
fn a_connection_to_a_port_without_a_listener_is_reset() {
    let folder = SocketFolder::new();
    let outcome = run(&mut folder.boot("vsock-guest connect 81"));
    assert!(outcome.expect_status(1).stdout.contains("Connection reset by peer"), "{outcome}");
}

/// Echoes the eight bytes that a guest sends.
fn echo(socket: &mut UnixStream) {
    let mut number = [0; 8];
    socket.read_exact(&mut number).unwrap();
    socket.write_all(&number).unwrap();
}

#[test]
fn a_guest_can_have_a_thousand_concurrent_connections() {
    let folder = SocketFolder::new();
    let listener = folder.listen(80);
    let guest = start(&mut folder.boot("vsock-guest many 80 1000"));
    let mut sockets: Vec<_> = (0..1000).map(|_| listener.accept().unwrap().0).collect();
    sockets.iter_mut().for_each(echo);
    guest.finish_within(TIMEOUT).expect_status(0);
    for mut socket in sockets {
        assert_eq!(socket.read(&mut [0]).unwrap(), 0);
    }
}

#[test]
fn a_guest_can_open_a_thousand_connections_in_sequence() {
    let folder = SocketFolder::new();
    let listener = folder.listen(80);
    let guest = start(&mut folder.boot("vsock-guest sequence 80 1000"));
    for _ in 0..1000 {
        let mut socket = listener.accept().unwrap().0;
        echo(&mut socket);
        assert_eq!(socket.read(&mut [0]).unwrap(), 0);
    }
    guest.finish_within(TIMEOUT).expect_status(0);
}

#[test]
fn the_host_can_have_a_thousand_concurrent_connections() {
    let folder = SocketFolder::new();
    let (mut child, _output) = listening(&mut folder.boot("vsock-guest echo 52 1000"));
    let mut sockets: Vec<_> = (0..1000).map(|_| folder.connect(52).unwrap()).collect();
    for (number, socket) in (0_u32..).zip(&mut sockets) {
        socket.write_all(&number.to_le_bytes()).unwrap();
        let mut answer = [0; 4];
        socket.read_exact(&mut answer).unwrap();
        assert_eq!(answer, number.to_le_bytes());
    }
    drop(sockets);
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

/// Resident memory of a process in KiB without guest memory, which is its largest mapping.
fn own_memory(guest: &Started) -> u64 {
    let maps = std::fs::read_to_string(format!("/proc/{}/smaps", guest.child.id())).unwrap();
    let fields = |name: &str| -> Vec<u64> {
        let lines = maps.lines().filter_map(|line| line.strip_prefix(name));
        lines.map(|rest| rest.trim().trim_end_matches(" kB").parse().unwrap()).collect()
    };
    let (sizes, resident) = (fields("Size:"), fields("Rss:"));
    let largest = *sizes.iter().max().unwrap();
    sizes.iter().zip(&resident).filter(|(size, _)| **size != largest).map(|(_, resident)| resident).sum()
}

/// The maximum growth of the VMM during a stream in KiB: buffers of a connection, and pages of its program that were
/// not mapped before.
const GROWTH_MAX: u64 = 512;

fn guest_sends(bytes: u64) {
    let folder = SocketFolder::new();
    let listener = folder.listen(80);
    let guest = start(&mut folder.boot(&format!("vsock-guest send 80 {bytes}")));
    let (mut socket, _) = listener.accept().unwrap();
    let before = own_memory(&guest);
    check(&mut socket, bytes).unwrap();
    let after = own_memory(&guest);
    drop(socket);
    guest.finish_within(Duration::from_secs(3600)).expect_status(0);
    assert!(after < before + GROWTH_MAX, "the VMM grew from {before} to {after} KiB");
}

fn guest_receives(bytes: u64) {
    let folder = SocketFolder::new();
    let listener = folder.listen(80);
    let guest = start(&mut folder.boot(&format!("vsock-guest receive 80 {bytes}")));
    let (mut socket, _) = listener.accept().unwrap();
    let before = own_memory(&guest);
    Pattern::default().write_to(&mut socket, bytes).unwrap();
    let after = own_memory(&guest);
    drop(socket);
    guest.finish_within(Duration::from_secs(3600)).expect_status(0);
    assert!(after < before + GROWTH_MAX, "the VMM grew from {before} to {after} KiB");
}

#[test]
fn a_stream_from_the_guest_arrives_unchanged() {
    guest_sends(32 * MIB);
}

#[test]
fn a_stream_to_the_guest_arrives_unchanged() {
    guest_receives(32 * MIB);
}

#[test]
#[ignore = "slow: cargo xtask test --ignored 1_gib"]
fn a_stream_of_1_gib_from_the_guest_arrives_unchanged() {
    guest_sends(GIB);
}

#[test]
#[ignore = "slow: cargo xtask test --ignored 1_gib"]
fn a_stream_of_1_gib_to_the_guest_arrives_unchanged() {
    guest_receives(GIB);
}

#[test]
#[ignore = "slow: cargo xtask test --ignored 10_gib"]
fn a_stream_of_10_gib_from_the_guest_arrives_unchanged() {
    guest_sends(10 * GIB);
}

#[test]
#[ignore = "slow: cargo xtask test --ignored 10_gib"]
fn a_stream_of_10_gib_to_the_guest_arrives_unchanged() {
    guest_receives(10 * GIB);
}
