//! The device with the test driver on one side, and Unix sockets on the other.

mod budget;

use super::*;
use crate::devices::virtio::driver::{Driver, Piece};
use crate::devices::virtio::file_io::tests::refusing;
use proptest::prelude::*;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

const GUEST: u64 = 3;
/// Length of the guest's receive chains in bytes, as in Linux: just under 4 KiB including the header.
const CHAIN: u32 = 3776;

// Constants restated from section 5.10.6.
const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RST: u16 = 3;
const SHUTDOWN: u16 = 4;
const RW: u16 = 5;
const CREDIT_UPDATE: u16 = 6;
const CREDIT_REQUEST: u16 = 7;

/// A guest, and the folder of its sockets.
struct Guest {
    driver: Driver,
    folder: tempfile::TempDir,
}

impl Guest {
    /// A guest with this many receive chains.
    fn new(chains: usize) -> Self {
        Self::with(chains, |_| {})
    }

    /// A guest whose device is changed before it is started.
    fn with(chains: usize, change: impl FnOnce(&mut Vsock)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let uds_path = folder.path().join("vsock");
        let config = Config { guest_cid: 3, uds_path, vsock_id: None };
        let mut device = Vsock::open(&config).unwrap();
        change(&mut device);
        let mut this = Self { driver: Driver::started(device), folder };
        this.offer(chains);
        this
    }

    fn path(&self, suffix: &str) -> PathBuf {
        self.folder.path().join(format!("vsock{suffix}"))
    }

    fn offer(&mut self, chains: usize) {
        for _ in 0..chains {
            self.driver.push(RX, &[Piece::In(CHAIN)]);
        }
        self.driver.ring();
    }

    /// Sends a packet and runs the device.
    fn send(&mut self, header: Header, data: &[u8]) {
        let mut bytes = header.to_bytes().to_vec();
        bytes.extend(data);
        self.driver.push(TX, &[Piece::Out(bytes)]);
        self.driver.ring();
        while self.driver.pop(TX).is_some() {}
    }

    /// Sends a packet from a port of the guest to one of the host, with ample credit.
    fn op(&mut self, op: u16, guest: u32, host: u32) {
        self.send(packet(op, guest, host), &[]);
    }

    fn data(&mut self, guest: u32, host: u32, data: &[u8]) {
        let header = Header { len: data.len().try_into().unwrap(), ..packet(RW, guest, host) };
        self.send(header, data);
    }

    /// The next packet for the guest, whose chain is made available again.
    fn poll(&mut self) -> Option<(Header, Vec<u8>)> {
        while self.driver.run(Some(0)) {}
        let used = self.driver.pop(RX)?;
        let (header, rest) = used.bytes.split_first_chunk().unwrap();
        let header = Header::from_bytes(header);
        assert_eq!(used.written as usize, HEADER_SIZE + header.len as usize);
        let data = rest[..header.len as usize].to_vec();
        self.offer(1);
        Some((header, data))
    }

    /// Waits for the next packet for the guest.
    #[track_caller]
    fn next(&mut self) -> (Header, Vec<u8>) {
        loop {
            if let Some(packet) = self.poll() {
                return packet;
            }
            assert!(self.driver.run(Some(60_000)), "no packet: {:?}", self.driver.transport.failure());
        }
    }

    #[track_caller]
    fn expect(&mut self, op: u16) -> Header {
        let (header, _) = self.next();
        assert_eq!(header.op, op, "{header:?}");
        assert_eq!((header.src_cid, header.dst_cid, header.kind), (HOST_CID, GUEST, STREAM));
        header
    }

    /// A program of the host that has connected to port 52, and its own port.
    fn program(&mut self) -> (UnixStream, u32) {
        let mut program = UnixStream::connect(self.path("")).unwrap();
        program.write_all(b"CONNECT 52\n").unwrap();
        let request = self.expect(REQUEST);
        assert_eq!(request.dst_port, 52);
        self.op(RESPONSE, 52, request.src_port);
        let expected = format!("OK {}\n", request.src_port);
        let mut line = vec![0; expected.len()];
        program.read_exact(&mut line).unwrap();
        assert_eq!(line, expected.as_bytes());
        (program, request.src_port)
    }

    /// A connection from the guest's port 1000 to a program on port 80.
    fn connection(&mut self) -> UnixStream {
        let listener = UnixListener::bind(self.path("_80")).unwrap();
        self.op(REQUEST, 1000, 80);
        self.expect(RESPONSE);
        let (socket, _) = listener.accept().unwrap();
        std::fs::remove_file(self.path("_80")).unwrap();
        socket
    }
}

/// A packet from the guest.
fn packet(op: u16, guest: u32, host: u32) -> Header {
    Header {
        src_cid: GUEST,
        dst_cid: HOST_CID,
        src_port: guest,
        dst_port: host,
        kind: STREAM,
        op,
        buf_alloc: 1 << 20,
        ..Header::default()
    }
}

#[track_caller]
fn expect_end(socket: &mut UnixStream) {
    let mut byte = [0];
    assert_eq!(socket.read(&mut byte).unwrap(), 0);
}

#[test]
fn a_program_reaches_a_port_of_the_guest() {
    let mut guest = Guest::new(8);
    let (mut program, port) = guest.program();
    program.write_all(b"hello").unwrap();
    let (header, data) = guest.next();
    assert_eq!((header.op, header.src_port, header.dst_port, &data[..]), (RW, port, 52, &b"hello"[..]));
    guest.data(52, port, b"goodbye");
    let mut answer = [0; 7];
    program.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"goodbye");
}

#[test]
fn bytes_after_the_request_are_data() {
    let mut guest = Guest::new(8);
    let mut program = UnixStream::connect(guest.path("")).unwrap();
    program.write_all(b"CONNECT 7\nearly").unwrap();
    program.shutdown(Shutdown::Write).unwrap();
    let request = guest.expect(REQUEST);
    assert_eq!(guest.poll(), None, "nothing before the guest has accepted");
    guest.op(RESPONSE, 7, request.src_port);
    assert_eq!(guest.next().1, b"early");
    assert_eq!(guest.expect(SHUTDOWN).flags, 2);
}

#[test]
fn a_port_that_the_guest_refuses_is_a_closed_socket() {
    let mut guest = Guest::new(8);
    let mut program = UnixStream::connect(guest.path("")).unwrap();
    program.write_all(b"CONNECT 52\n").unwrap();
    let request = guest.expect(REQUEST);
    guest.op(RST, 52, request.src_port);
    expect_end(&mut program);
    let mut program = UnixStream::connect(guest.path("")).unwrap();
    program.write_all(b"GET / HTTP/1.0\n").unwrap();
    while guest.driver.run(Some(0)) {}
    // The data was not read, so that the program may get ECONNRESET instead of EOF.
    assert!(matches!(program.read(&mut [0]), Ok(0)) || program.take_error().is_ok());
    assert_eq!(guest.poll(), None);
}

#[test]
fn a_program_that_closes_within_its_request_is_dropped() {
    let mut guest = Guest::new(8);
    let mut program = UnixStream::connect(guest.path("")).unwrap();
    program.write_all(b"CONNECT 5").unwrap();
    while guest.driver.run(Some(0)) {}
    program.shutdown(Shutdown::Write).unwrap();
    while guest.driver.run(Some(0)) {}
    program.set_nonblocking(true).unwrap();
    assert!(matches!(program.read(&mut [0]), Ok(0)) || program.write(b"2\n").is_err());
    assert_eq!(guest.poll(), None);
}

#[test]
fn the_guest_reaches_a_program() {
    let mut guest = Guest::new(8);
    let mut socket = guest.connection();
    guest.data(1000, 80, b"question");
    let mut bytes = [0; 8];
    socket.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"question");
    socket.write_all(b"answer").unwrap();
    assert_eq!(guest.next().1, b"answer");
}

#[test]
fn ports_without_a_listener_are_refused() {
    let mut guest = Guest::new(8);
    guest.op(REQUEST, 1000, 81);
    let reset = guest.expect(RST);
    assert_eq!((reset.src_port, reset.dst_port), (81, 1000));
    // So are packets of unknown connections, except for resets.
    for op in [RESPONSE, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST, 0, 8, u16::MAX] {
        guest.op(op, 1000, 81);
        guest.expect(RST);
    }
    guest.op(RST, 1000, 81);
    assert_eq!(guest.poll(), None);
}

#[test]
fn other_cids_and_socket_types_are_refused() {
    let mut guest = Guest::new(8);
    guest.send(Header { kind: 2, ..packet(REQUEST, 1, 80) }, &[]);
    assert_eq!(guest.next().0.kind, 2);
    guest.send(Header { dst_cid: 9, ..packet(REQUEST, 1, 80) }, &[]);
    let (reset, _) = guest.next();
    assert_eq!((reset.op, reset.src_cid, reset.dst_cid), (RST, 9, GUEST));
    guest.send(Header { src_cid: 4, ..packet(REQUEST, 1, 80) }, &[]);
    assert_eq!(guest.poll(), None, "unknown CID");
    assert!(!guest.driver.needs_reset());
}

#[test]
fn each_side_can_shut_down_sending_and_still_receive() {
    let mut guest = Guest::new(8);
    let mut socket = guest.connection();
    guest.data(1000, 80, b"last words");
    guest.send(Header { flags: 2, ..packet(SHUTDOWN, 1000, 80) }, &[]);
    let mut text = String::new();
    socket.read_to_string(&mut text).unwrap();
    assert_eq!(text, "last words");
    socket.write_all(b"still here").unwrap();
    assert_eq!(guest.next().1, b"still here");
    drop(socket);
    assert_eq!(guest.expect(SHUTDOWN).flags, 3);
    guest.op(CREDIT_UPDATE, 1000, 80);
    guest.expect(RST);

    let mut socket = guest.connection();
    socket.write_all(b"x").unwrap();
    socket.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.next().1, b"x");
    assert_eq!(guest.expect(SHUTDOWN).flags, 2);
    guest.data(1000, 80, b"and an answer");
    guest.send(Header { flags: 3, ..packet(SHUTDOWN, 1000, 80) }, &[]);
    guest.expect(RST);
    let mut text = String::new();
    socket.read_to_string(&mut text).unwrap();
    assert_eq!(text, "and an answer");
}

#[test]
fn data_of_a_closed_program_is_delivered() {
    let mut guest = Guest::new(2);
    let mut socket = guest.connection();
    let bytes: Vec<u8> = (0..50_000_u32).map(|at| at.to_le_bytes()[0]).collect();
    socket.write_all(&bytes).unwrap();
    drop(socket);
    let mut got = Vec::new();
    while got.len() < bytes.len() {
        got.extend(guest.next().1);
    }
    assert!(got == bytes);
    assert_eq!(guest.expect(SHUTDOWN).flags, 3);
}

#[test]
fn no_data_is_read_after_the_guest_shuts_down_receiving() {
    let mut guest = Guest::new(8);
    let mut socket = guest.connection();
    guest.send(Header { flags: 1, ..packet(SHUTDOWN, 1000, 80) }, &[]);
    assert_eq!(socket.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
    guest.data(1000, 80, b"but it sends");
    let mut bytes = [0; 12];
    socket.read_exact(&mut bytes).unwrap();
    drop(socket);
    assert_eq!(guest.expect(SHUTDOWN).flags, 3);
}

#[test]
fn data_is_buffered_for_a_slow_program() {
    let mut guest = Guest::new(8);
    let mut socket = guest.connection();
    let sent = fill_up(&mut guest, 1000);
    // The guest closes; the device keeps the data that it has accepted.
    guest.send(Header { flags: 3, ..packet(SHUTDOWN, 1000, 80) }, &[]);
    guest.expect(RST);
    let reader = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        socket.read_to_end(&mut bytes).unwrap();
        bytes
    });
    while !reader.is_finished() {
        guest.driver.run(Some(1));
    }
    assert!(reader.join().unwrap() == sent);
}

/// Sends until the credit is exhausted; returns the data.
fn fill_up(guest: &mut Guest, port: u32) -> Vec<u8> {
    let mut sent = Vec::new();
    let (mut fwd_cnt, mut buf_alloc) = (0, 0);
    loop {
        let length = (buf_alloc - (sent.len() - fwd_cnt)).min(10_007);
        if length == 0 {
            guest.op(CREDIT_REQUEST, port, 80);
            let update = guest.expect(CREDIT_UPDATE);
            let credit = (update.fwd_cnt as usize, update.buf_alloc as usize);
            if credit == (fwd_cnt, buf_alloc) {
                return sent;
            }
            (fwd_cnt, buf_alloc) = credit;
            continue;
        }
        let bytes: Vec<u8> = (sent.len()..sent.len() + length).map(|at| (at / 7).to_le_bytes()[0]).collect();
        guest.data(port, 80, &bytes);
        sent.extend(bytes);
        while let Some((header, _)) = guest.poll() {
            assert_eq!(header.op, CREDIT_UPDATE);
            fwd_cnt = header.fwd_cnt as usize;
        }
    }
}

#[test]
fn a_guest_that_exceeds_its_credit_is_reset() {
    let mut guest = Guest::new(8);
    let socket = guest.connection();
    fill_up(&mut guest, 1000);
    guest.data(1000, 80, b"x");
    guest.expect(RST);
    drop(socket);
    assert_eq!(guest.poll(), None);
}

/// The header of a packet with this credit.
fn with(op: u16, buf_alloc: u32, fwd_cnt: u32) -> Header {
    Header { buf_alloc, fwd_cnt, ..packet(op, 1000, 80) }
}

/// A guest that has received as much as its buffer of 100 bytes takes, and the socket of the program, which has sent 250.
fn guest_without_credit() -> (Guest, UnixStream) {
    let mut guest = Guest::new(64);
    let listener = UnixListener::bind(guest.path("_80")).unwrap();
    guest.send(with(REQUEST, 100, 0), &[]);
    guest.expect(RESPONSE);
    let mut socket = listener.accept().unwrap().0;
    socket.write_all(&[1; 250]).unwrap();
    assert_eq!(guest.next().1.len(), 100);
    (guest, socket)
}

#[test]
fn the_guest_gets_no_more_than_its_credit() {
    let (mut guest, mut socket) = guest_without_credit();
    for (buf_alloc, fwd_cnt, expected) in [(100, 30, 30), (150, 100, 120)] {
        guest.expect(CREDIT_REQUEST);
        assert_eq!(guest.poll(), None, "one credit request");
        guest.send(with(CREDIT_UPDATE, buf_alloc, fwd_cnt), &[]);
        assert_eq!(guest.next().1.len(), expected);
    }
    // Invalid values: more consumed than sent, then no space at all, then more than there is memory.
    socket.write_all(&[2; 50]).unwrap();
    guest.expect(CREDIT_REQUEST);
    guest.send(with(CREDIT_UPDATE, 100, 251), &[]);
    assert_eq!(guest.poll(), None, "no repeated credit requests");
    guest.send(with(CREDIT_UPDATE, 0, 250), &[]);
    assert_eq!(guest.poll(), None);
    guest.send(with(CREDIT_UPDATE, u32::MAX, 250), &[]);
    assert_eq!(guest.next().1, [2; 50]);
    // The guest has sent an unsolicited update, and will do so again.
    guest.send(with(CREDIT_UPDATE, 10, 300), &[]);
    socket.write_all(&[3; 30]).unwrap();
    for taken in [310, 320, 330] {
        assert_eq!(guest.next().1, [3; 10]);
        assert_eq!(guest.poll(), None, "a credit request");
        guest.send(with(CREDIT_UPDATE, 10, taken), &[]);
    }
}

/// The space minus the bytes in flight is below zero.
#[test]
fn a_guest_that_shrinks_its_buffer_gets_no_credit() {
    let (mut guest, _socket) = guest_without_credit();
    guest.expect(CREDIT_REQUEST);
    for buf_alloc in [0, 1, 50, 99] {
        guest.send(with(CREDIT_UPDATE, buf_alloc, 0), &[]);
        assert_eq!(guest.poll(), None, "{buf_alloc} bytes of space and 100 in flight");
    }
    guest.send(with(CREDIT_UPDATE, 50, 60), &[]);
    assert_eq!(guest.next().1.len(), 10);
}

#[test]
fn queued_resets_are_limited() {
    let mut guest = Guest::new(0);
    for _ in 0..RESETS_MAX + 10 {
        guest.driver.push(TX, &[Piece::Out(packet(RW, 1, 1).to_bytes().to_vec())]);
        guest.driver.ring();
    }
    let mut taken = 0;
    while guest.driver.pop(TX).is_some() {
        taken += 1;
    }
    assert_eq!(taken, RESETS_MAX, "the others stay in the queue");
    guest.offer(1);
    for _ in 0..RESETS_MAX + 10 {
        guest.expect(RST);
    }
    assert_eq!(guest.poll(), None);
}

#[test]
fn connections_are_limited() {
    let mut guest = Guest::new(8);
    let listener = UnixListener::bind(guest.path("_80")).unwrap();
    let mut sockets = Vec::new();
    let mut promised = 0;
    for port in 0..1024 {
        guest.op(REQUEST, port, 80);
        promised += guest.expect(RESPONSE).buf_alloc;
        sockets.push(listener.accept().unwrap().0);
    }
    assert_eq!(promised, 64 * (128 << 10) + 960 * (8 << 10));
    guest.op(REQUEST, 5000, 80);
    guest.expect(RST);
    let mut program = UnixStream::connect(guest.path("")).unwrap();
    while guest.driver.run(Some(0)) {}
    expect_end(&mut program);
    sockets.pop();
    assert_eq!(guest.expect(SHUTDOWN).flags, 3);
    guest.op(REQUEST, 5000, 80);
    guest.expect(RESPONSE);
}

#[test]
fn buffered_data_is_limited() {
    let mut guest = Guest::new(8);
    let listener = UnixListener::bind(guest.path("_80")).unwrap();
    let connect = |guest: &mut Guest, port| {
        guest.op(REQUEST, port, 80);
        (guest.expect(RESPONSE).buf_alloc, listener.accept().unwrap().0)
    };
    let mut programs = Vec::new();
    for port in 0..64 {
        let (promised, program) = connect(&mut guest, port);
        assert_eq!(promised, 128 << 10);
        programs.push(program);
        fill_up(&mut guest, port);
        // The data of the guest is still buffered for the program.
        guest.send(Header { flags: 3, ..packet(SHUTDOWN, port, 80) }, &[]);
        guest.expect(RST);
    }
    let (promised, mut program) = connect(&mut guest, 1000);
    assert_eq!(promised, 8 << 10);
    let sent = fill_up(&mut guest, 1000);
    let mut received = vec![0; sent.len()];
    let reader = std::thread::spawn(move || {
        program.read_exact(&mut received).unwrap();
        (program, received)
    });
    while !reader.is_finished() {
        guest.driver.run(Some(1));
    }
    let (_program, received) = reader.join().unwrap();
    assert!(received == sent);
    // When one of the others closes, its credit is available again.
    drop(programs.pop());
    while guest.poll().is_some() {}
    assert_eq!(connect(&mut guest, 1001).0, 128 << 10);
}

#[test]
fn accept_is_retried_after_a_lack_of_descriptors() {
    for error in [libc::EMFILE, libc::ENFILE, libc::ENOBUFS, libc::ENOMEM] {
        let mut guest = Guest::new(8);
        let mut program = UnixStream::connect(guest.path("")).unwrap();
        program.write_all(b"CONNECT 52\n").unwrap();
        refusing(libc::SYS_accept4, error, || {
            let turns = (0..10).take_while(|_| guest.driver.run(Some(0))).count();
            assert!(turns < 10, "the device spins");
            guest.driver.transport.serve_deadline();
            assert!(guest.driver.run(Some(0)), "accept is retried");
        });
        assert!(guest.driver.transport.deadline().is_some(), "error {error}: no retry");
        guest.driver.transport.serve_deadline();
        assert_eq!(guest.expect(REQUEST).dst_port, 52);
        assert_eq!(guest.driver.transport.deadline(), None);
    }
}

#[test]
fn a_second_request_resets_a_connection() {
    let mut guest = Guest::new(8);
    let mut socket = guest.connection();
    guest.op(REQUEST, 1000, 80);
    guest.expect(RST);
    expect_end(&mut socket);
}

#[test]
fn a_reset_closes_all_connections_and_keeps_the_listener() {
    let mut guest = Guest::new(8);
    let mut socket = guest.connection();
    let mut waiting = UnixStream::connect(guest.path("")).unwrap();
    while guest.driver.run(Some(0)) {}
    guest.driver.start(u64::MAX);
    expect_end(&mut socket);
    expect_end(&mut waiting);
    guest.offer(8);
    guest.program();
}

#[test]
fn programs_wait_until_the_driver_has_closed_the_connections_to_an_earlier_device() {
    let mut guest = Guest::with(8, |device| device.lose_peers(FIRST_PORT + 7));
    let mut program = UnixStream::connect(guest.path("")).unwrap();
    program.write_all(b"CONNECT 52\n").unwrap();
    assert!(guest.poll().is_none(), "the driver has not provided a buffer for an event");
    for _ in 0..3 {
        guest.driver.push(EVENTS, &[Piece::In(EVENT_LEN)]);
    }
    guest.driver.ring();
    let events = [(); 3].map(|()| guest.driver.wait(EVENTS));
    assert_eq!(events.each_ref().map(|event| event.written), [4, 0, 0]);
    assert_eq!(events[0].bytes, [0; 4]);
    assert!(guest.poll().is_none(), "the driver has not handled the event");
    guest.driver.push(EVENTS, &[Piece::In(EVENT_LEN)]);
    guest.driver.ring();
    let request = guest.expect(REQUEST);
    assert_eq!((request.dst_port, request.src_port), (52, FIRST_PORT + 7), "no port is used again");
}

#[test]
fn a_device_whose_driver_had_connections_says_so() {
    let mut guest = Guest::new(8);
    let has_peers = |guest: &Guest| guest.driver.transport.has_peers();
    assert!(!has_peers(&guest));
    let socket = guest.connection();
    drop(socket);
    assert!(has_peers(&guest));
    guest.driver.start(u64::MAX);
    assert!(!has_peers(&guest), "the driver has reset the device");
    assert!(has_peers(&Guest::with(8, |device| device.lose_peers(0))));
}

#[test]
fn malformed_packets_fail_the_device() {
    for bytes in [vec![0; 43], Header { len: 1, ..packet(RW, 1, 1) }.to_bytes().to_vec()] {
        let mut guest = Guest::new(8);
        guest.driver.push(TX, &[Piece::Out(bytes)]);
        guest.driver.ring();
        assert!(guest.driver.needs_reset());
    }
    let mut guest = Guest::new(0);
    guest.driver.push(RX, &[Piece::In(43)]);
    guest.op(RW, 1, 1);
    assert!(guest.driver.needs_reset(), "no space for a reply");
}

#[test]
fn the_path_is_removed_with_the_machine() {
    let mut guest = Guest::new(1);
    assert!(guest.path("").exists());
    guest.driver.transport.end();
    assert!(!guest.path("").exists());
}

#[test]
fn a_program_in_the_backlog_is_closed_with_the_machine() {
    let mut guest = Guest::new(1);
    let mut waiting = UnixStream::connect(guest.path("")).unwrap();
    waiting.set_nonblocking(true).unwrap();
    guest.driver.transport.end();
    expect_end(&mut waiting);
}

/// A step of a random run.
#[derive(Clone, Debug)]
enum Step {
    Guest { op: u16, port: u32, host: u32, flags: u32, buf_alloc: u32, fwd_cnt: u32, data: usize },
    Chains(usize),
    Program,
    Write(usize, usize),
    Read(usize),
    Close(usize),
    Shutdown(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let number = || prop_oneof![Just(0), Just(100), Just(1 << 16), Just(u32::MAX), any::<u32>()];
    prop_oneof![
        4 => (0_u16..9, 0_u32..3, prop_oneof![Just(80_u32), Just(81), Just(FIRST_PORT)], 0_u32..5, number(), number(), 0_usize..9000)
            .prop_map(|(op, port, host, flags, buf_alloc, fwd_cnt, data)| Step::Guest { op, port, host, flags, buf_alloc, fwd_cnt, data }),
        2 => (0_usize..20).prop_map(Step::Chains),
        1 => Just(Step::Program),
        2 => (0_usize..4, 0_usize..20_000).prop_map(|(which, count)| Step::Write(which, count)),
        2 => (0_usize..4).prop_map(Step::Read),
        1 => (0_usize..4).prop_map(Step::Close),
        1 => (0_usize..4).prop_map(Step::Shutdown),
    ]
}

#[test]
fn a_reset_drops_chains_that_were_popped_when_the_device_failed() {
    let mut guest = Guest::new(0);
    let listener = UnixListener::bind(guest.path("_80")).unwrap();
    let connect = |guest: &mut Guest| {
        guest.op(REQUEST, 1000, 80);
        guest.expect(RESPONSE);
        listener.accept().unwrap().0
    };
    guest.offer(1);
    let mut program = connect(&mut guest);
    // A read that fills its chain makes the next read use two chains: one of them has no space for a header.
    program.write_all(&[1; 8 * CHAIN as usize]).unwrap();
    assert_eq!(guest.expect(RW).len + HEADER_LEN, CHAIN);
    guest.driver.push(RX, &[Piece::In(CHAIN)]);
    guest.driver.push(RX, &[Piece::In(1)]);
    guest.driver.ring();
    assert!(guest.driver.needs_reset());
    guest.driver.start(u64::MAX);
    guest.offer(4);
    let mut program = connect(&mut guest);
    program.write_all(b"hello").unwrap();
    // The first chain has been used for the response.
    let used = guest.driver.wait(RX);
    assert_eq!((used.head, &used.bytes[HEADER_SIZE..HEADER_SIZE + 5]), (1, &b"hello"[..]));
}

#[test]
fn a_placeholder_causes_no_repeated_events() {
    let config = Config { guest_cid: 3, uds_path: "unused".into(), vsock_id: None };
    let mut driver = Driver::started(Vsock::placeholder(&config).unwrap());
    let events = (0..10).take_while(|_| driver.run(Some(0))).count();
    assert!(events < 3, "a socket without a name causes one event");
    driver.push(TX, &[Piece::Out(packet(REQUEST, 1000, 80).to_bytes().to_vec())]);
    driver.push(RX, &[Piece::In(CHAIN)]);
    driver.ring();
    let header = *driver.wait(RX).bytes.first_chunk().unwrap();
    assert_eq!(Header::from_bytes(&header).op, RST);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// No sequence of packets fails a device whose driver follows the queue protocol, and none makes it spin.
    #[test]
    fn no_packets_fail_the_device(steps in proptest::collection::vec(step(), 1..120)) {
        let mut guest = Guest::new(4);
        let listener = UnixListener::bind(guest.path("_80")).unwrap();
        listener.set_nonblocking(true).unwrap();
        let mut sockets: Vec<UnixStream> = Vec::new();
        let mut free = usize::from(QUEUE_SIZES[RX]) - 4;
        for step in steps {
            match step {
                Step::Guest { op, port, host, flags, buf_alloc, fwd_cnt, data } => {
                    let data = if op == RW { data } else { 0 };
                    let len = data.try_into().unwrap();
                    guest.send(Header { flags, buf_alloc, fwd_cnt, len, ..packet(op, port, host) }, &vec![7; data]);
                }
                Step::Chains(count) => {
                    while guest.driver.pop(RX).is_some() {
                        free += 1;
                    }
                    let count = count.min(free);
                    free -= count;
                    guest.offer(count);
                }
                Step::Program => {
                    let mut program = UnixStream::connect(guest.path("")).unwrap();
                    program.set_nonblocking(true).unwrap();
                    program.write_all(b"CONNECT 1\n").unwrap();
                    sockets.push(program);
                }
                Step::Write(which, count) => {
                    let _ = sockets.get(which).map(|mut socket| socket.write(&vec![9; count]));
                }
                Step::Read(which) => {
                    let _ = sockets.get(which).map(|mut socket| socket.read(&mut vec![0; 20_000]));
                }
                Step::Close(which) if which < sockets.len() => drop(sockets.swap_remove(which)),
                Step::Shutdown(which) => {
                    let _ = sockets.get(which).map(|socket| socket.shutdown(Shutdown::Write));
                }
                Step::Close(_) => {}
            }
            let mut turns = 0;
            while guest.driver.run(Some(0)) {
                turns += 1;
                prop_assert!(turns < 1000, "the device spins");
            }
            while let Ok((socket, _)) = listener.accept() {
                socket.set_nonblocking(true).unwrap();
                sockets.push(socket);
            }
            prop_assert!(!guest.driver.needs_reset(), "{:?}", guest.driver.transport.failure());
        }
    }

    /// An arbitrary driver causes no panic, and a reset recovers the device.
    #[test]
    fn no_driver_harms_the_host(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        Guest::new(0).driver.misbehave(&bytes);
    }

    /// Bytes arrive complete and in order in both directions, whatever the sizes, and the guest is never sent more than
    /// its credit.
    #[test]
    fn bytes_arrive_complete_and_in_order(
        buf_alloc in 500_u32..20_000,
        chains in 1_usize..20,
        writes in proptest::collection::vec(1_usize..30_000, 1..8),
        packets in proptest::collection::vec(1_usize..20_000, 1..40),
        reads in proptest::collection::vec(1_usize..40_000, 1..20),
    ) {
        let mut guest = Guest::new(chains);
        let listener = UnixListener::bind(guest.path("_80")).unwrap();
        guest.send(Header { buf_alloc, ..packet(REQUEST, 1000, 80) }, &[]);
        guest.expect(RESPONSE);
        let mut socket = listener.accept().unwrap().0;
        socket.set_nonblocking(true).unwrap();
        let pattern = |start: usize, count: usize| -> Vec<u8> {
            (start..start + count).map(|at| (at % 251).to_le_bytes()[0] ^ (at / 251).to_le_bytes()[0]).collect()
        };
        let total_down: usize = writes.iter().sum();
        let total_up: usize = packets.iter().sum();
        let (mut written, mut got_down, mut taken) = (0, 0_usize, 0_u32);
        let (mut sent_up, mut got_up, mut known) = (0, 0, 0_u32);
        let (mut writes, mut reads, mut packets) = (writes.iter(), reads.iter().cycle(), packets.iter());
        let (mut to_write, mut to_send) = (0, 0);
        while got_down < total_down || got_up < total_up {
            if to_write == 0 {
                to_write = writes.next().copied().unwrap_or(0);
            }
            if to_write > 0 && let Ok(count) = socket.write(&pattern(written, to_write)) {
                written += count;
                to_write -= count;
            }
            if to_send == 0 {
                to_send = packets.next().copied().unwrap_or(0);
            }
            let in_flight = u32::try_from(sent_up).unwrap() - known;
            let space = (buffers::BUF_ALLOC - in_flight) as usize;
            let count = to_send.min(space);
            let header = Header { buf_alloc, fwd_cnt: taken, ..packet(CREDIT_UPDATE, 1000, 80) };
            if count > 0 {
                let len = count.try_into().unwrap();
                guest.send(Header { op: RW, len, ..header }, &pattern(sent_up, count));
                sent_up += count;
                to_send -= count;
            } else {
                guest.send(header, &[]);
            }
            while let Some((header, data)) = guest.poll() {
                prop_assert!([RW, CREDIT_UPDATE, CREDIT_REQUEST].contains(&header.op), "{header:?}");
                known = header.fwd_cnt;
                prop_assert!(data == pattern(got_down, data.len()));
                got_down += data.len();
                prop_assert!(got_down - taken as usize <= buf_alloc as usize, "more than the credit");
            }
            taken = u32::try_from(got_down).unwrap();
            let mut bytes = vec![0; *reads.next().unwrap()];
            if let Ok(count) = socket.read(&mut bytes) {
                prop_assert!(bytes[..count] == pattern(got_up, count));
                got_up += count;
            }
        }
    }
}
