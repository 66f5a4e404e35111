use super::*;
use crate::devices::virtio::driver::{Driver, Piece, Used};
use proptest::prelude::*;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

/// Constants restated from linux/fuse.h and section 5.11.
const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const READ: u32 = 15;
const INTERRUPT: u32 = 36;
const EIO: i32 = 5;

/// A request with a body, as a driver puts it into a chain.
fn request(opcode: u32, unique: u64, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(40 + body.len()).unwrap();
    let mut bytes = [length.to_le_bytes(), opcode.to_le_bytes()].concat();
    bytes.extend(unique.to_le_bytes());
    bytes.extend([7; 24]);
    bytes.extend(body);
    bytes
}

fn reply(error: i32, unique: u64, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(16 + body.len()).unwrap();
    [&length.to_le_bytes()[..], &error.to_le_bytes(), &unique.to_le_bytes(), body].concat()
}

/// A driver, and the server's end of the socket.
struct Pair {
    driver: Driver,
    server: UnixStream,
}

impl Pair {
    fn new() -> Self {
        let (ours, server) = UnixStream::pair().unwrap();
        let device = SharedFolder::with("tag", Some(Server::connected(ours)));
        Self { driver: Driver::started(device), server }
    }

    /// The next request at the server: opcode, number, body.
    fn next(&mut self) -> (u32, u64, Vec<u8>) {
        let mut header = [0; 40];
        self.server.read_exact(&mut header).unwrap();
        assert_eq!(header[16..], [7; 24]);
        let length = usize::try_from(u32::from_le_bytes(field(&header, 0))).unwrap();
        let mut body = vec![0; length - 40];
        self.server.read_exact(&mut body).unwrap();
        (u32::from_le_bytes(field(&header, 4)), u64::from_le_bytes(field(&header, 8)), body)
    }

    fn answer(&mut self, bytes: &[u8]) {
        self.server.write_all(bytes).unwrap();
        assert!(self.driver.run(Some(60_000)), "no event");
        while self.driver.run(Some(0)) {}
    }

    /// Makes a request whose chain accepts a reply of this many bytes.
    fn ask(&mut self, opcode: u32, unique: u64, room: u32) {
        self.driver
            .push(1, &[Piece::Out(request(opcode, unique, b"name\0")), Piece::In(16), Piece::In(room)]);
        self.driver.ring();
    }

    fn failure(&self) -> String {
        self.driver.transport.failure().unwrap_or_default()
    }
}

fn expect(used: Option<Used>, expected: &[u8]) {
    let used = used.expect("no reply");
    let length = usize::try_from(used.written).unwrap();
    assert_eq!(used.bytes[..length], *expected);
    assert!(used.bytes[length..].iter().all(|byte| *byte == 0), "more was written than reported");
}

#[test]
fn the_configuration_contains_the_tag() {
    let mut driver = Driver::new(SharedFolder::with("tag", None));
    let mut expected = [0; 40];
    expected[..3].copy_from_slice(b"tag");
    expected[36] = 1;
    assert_eq!(driver.configuration(0, 40), expected);
    assert_eq!((driver.read(0x008), driver.offered() & 0xff_ffff), (26, 0));
}

#[test]
fn replies_have_the_drivers_numbers() {
    let mut pair = Pair::new();
    pair.ask(LOOKUP, 1000, 128);
    pair.ask(READ, 1002, 4096);
    let (first, second) = (pair.next(), pair.next());
    assert_eq!((first.0, &*first.2, second.0), (LOOKUP, &b"name\0"[..], READ));
    assert_ne!(first.1, second.1);
    // In a different order.
    let data: Vec<u8> = (0..4000_u32).map(|number| number.to_le_bytes()[0]).collect();
    pair.answer(&[reply(0, second.1, &data), reply(-2, first.1, b"")].concat());
    expect(pair.driver.pop(1), &reply(0, 1002, &data));
    expect(pair.driver.pop(1), &reply(-2, 1000, b""));
    assert_eq!(pair.driver.interrupts(), 1);
    assert_eq!(pair.failure(), "");
}

#[test]
fn replies_in_one_read_are_all_delivered() {
    let mut pair = Pair::new();
    pair.ask(LOOKUP, 1, 8);
    pair.ask(LOOKUP, 2, 8);
    let (first, second) = (pair.next(), pair.next());
    // More than the budget of one call, all in the buffer.
    let mut all = reply(0, first.1, b"first");
    for _ in 0..400 {
        all.extend(reply(0, first.1, b""));
    }
    all.extend(reply(0, second.1, b"second"));
    pair.answer(&all);
    expect(pair.driver.pop(1), &reply(0, 1, b"first"));
    expect(pair.driver.pop(1), &reply(0, 2, b"second"));
}

#[test]
fn two_requests_may_have_the_same_number() {
    let mut pair = Pair::new();
    pair.ask(LOOKUP, 1, 8);
    pair.ask(LOOKUP, 1, 8);
    let (first, second) = (pair.next(), pair.next());
    pair.answer(&reply(0, second.1, b"second"));
    pair.answer(&reply(0, first.1, b"first"));
    expect(pair.driver.pop(1), &reply(0, 1, b"second"));
    expect(pair.driver.pop(1), &reply(0, 1, b"first"));
}

#[test]
fn the_length_of_the_chain_is_used() {
    let mut pair = Pair::new();
    for said in [0, 39, 1 << 30, u32::MAX] {
        let mut lie = request(LOOKUP, 5, b"x");
        lie[..4].copy_from_slice(&said.to_le_bytes());
        pair.driver.push(1, &[Piece::Out(lie), Piece::In(16)]);
        pair.driver.ring();
        assert_eq!(pair.next().2, b"x");
    }
    assert_eq!(pair.failure(), "");
}

#[test]
fn forget_and_interrupt_have_no_reply() {
    let mut pair = Pair::new();
    for queue in [0, 1] {
        pair.driver.push(queue, &[Piece::Out(request(FORGET, 2, &[1; 8]))]);
        pair.driver.ring();
        assert_eq!(pair.driver.pop(queue).map(|used| used.written), Some(0));
        assert_eq!(pair.next().0, FORGET);
    }
    pair.driver.push(0, &[Piece::Out(request(INTERRUPT, 2, &[1; 8]))]);
    pair.driver.ring();
    assert_eq!(pair.driver.pop(0).map(|used| used.written), Some(0));
    pair.ask(LOOKUP, 3, 8);
    assert_eq!(pair.next().0, LOOKUP, "an interrupt of an unknown request is dropped");
}

/// The server receives the device's number of the interrupted request.
#[test]
fn interrupts_are_forwarded() {
    let mut pair = Pair::new();
    pair.ask(LOOKUP, 1000, 8);
    pair.ask(READ, 1002, 8);
    let (_, second) = (pair.next(), pair.next());
    for body in [&1002_u64.to_le_bytes()[..], &1004_u64.to_le_bytes(), &[1], &[1; 16]] {
        pair.driver.push(0, &[Piece::Out(request(INTERRUPT, 1003, body))]);
        pair.driver.ring();
        assert_eq!(pair.driver.pop(0).map(|used| used.written), Some(0));
    }
    assert_eq!(pair.next(), (INTERRUPT, 0, second.1.to_le_bytes().to_vec()));
    pair.ask(LOOKUP, 5, 8);
    assert_eq!(pair.next().0, LOOKUP, "the others are dropped");
    pair.answer(&reply(-4, second.1, b""));
    expect(pair.driver.pop(1), &reply(-4, 1002, b""));
    assert_eq!(pair.failure(), "");
}

#[test]
fn large_messages_go_through_a_small_socket() {
    let mut pair = Pair::new();
    let data: Vec<u8> = (0..1_u32 << 18).flat_map(u32::to_le_bytes).collect();
    let mut pieces = vec![Piece::Out(request(16, 8, &[]))];
    pieces.extend(data.chunks(4096).map(|page| Piece::Out(page.to_vec())));
    pieces.truncate(250);
    pieces.extend([Piece::In(16), Piece::In(8)]);
    let length = 249 * 4096;
    pair.driver.push(1, &pieces);
    pair.ask(LOOKUP, 9, 8);
    let (reader, mut server) = (pair.server.try_clone().unwrap(), pair.server.try_clone().unwrap());
    let received = std::thread::spawn(move || {
        let mut other = Pair { driver: Driver::new(SharedFolder::with("", None)), server: reader };
        let (large, small) = (other.next(), other.next());
        server.write_all(&reply(0, large.1, &[1; 8])).unwrap();
        server.write_all(&reply(0, small.1, b"")).unwrap();
        (large.2, small.0)
    });
    expect(Some(pair.driver.wait(1)), &reply(0, 8, &[1; 8]));
    expect(Some(pair.driver.wait(1)), &reply(0, 9, b""));
    let (large, small) = received.join().unwrap();
    assert!(large == data[..length], "{} bytes, or different content", large.len());
    assert_eq!(small, LOOKUP);

    // And back, into pages.
    let mut pieces = vec![Piece::Out(request(READ, 10, &[])), Piece::In(16)];
    pieces.extend(std::iter::repeat_n(Piece::In(4096), 249));
    pair.driver.push(1, &pieces);
    pair.driver.ring();
    let id = pair.next().1;
    let (mut server, sent) = (pair.server.try_clone().unwrap(), reply(0, id, &data[..length]));
    let writer = std::thread::spawn(move || server.write_all(&sent).unwrap());
    expect(Some(pair.driver.wait(1)), &reply(0, 10, &data[..length]));
    writer.join().unwrap();
}

#[test]
fn a_reset_driver_gets_no_earlier_reply() {
    let mut pair = Pair::new();
    pair.ask(READ, 1, 9000);
    let old = pair.next();
    // The driver is reset when half of the reply has arrived.
    let late = reply(0, old.1, &[9; 9000]);
    pair.answer(&late[..5000]);
    assert!(pair.driver.transport.state().is_err(), "requests are in flight");
    pair.driver.start(u64::MAX);
    assert!(pair.driver.transport.state().is_ok());
    pair.ask(READ, 1, 9000);
    let new = pair.next();
    pair.answer(&[&late[5000..], &reply(0, new.1, b"new")].concat());
    expect(pair.driver.pop(1), &reply(0, 1, b"new"));
    assert!(pair.driver.pop(1).is_none());
    // A second reply is dropped as well.
    pair.answer(&reply(0, new.1, b"again"));
    assert!(pair.driver.pop(1).is_none());
    assert_eq!(pair.failure(), "");
}

#[test]
fn a_partly_sent_request_is_completed_after_a_reset() {
    let mut pair = Pair::new();
    let mut pieces = vec![Piece::Out(request(16, 8, &[]))];
    pieces.extend(std::iter::repeat_n(Piece::Out(vec![3; 4096]), 200));
    pieces.push(Piece::In(16));
    pair.driver.push(1, &pieces);
    pair.driver.ring();
    pair.driver.start(u64::MAX);
    // The memory is reused.
    pair.driver.memory.write(vm_memory::GuestAddress(8 << 20), &vec![0; 1 << 20]).unwrap();
    pair.ask(LOOKUP, 1, 8);
    let reader = pair.server.try_clone().unwrap();
    let received = std::thread::spawn(move || {
        let mut other = Pair { driver: Driver::new(SharedFolder::with("", None)), server: reader };
        (other.next().2, other.next().0)
    });
    while !received.is_finished() {
        pair.driver.run(Some(10));
    }
    let (large, small) = received.join().unwrap();
    assert!(large.len() == 200 * 4096 && large.iter().all(|byte| *byte == 3), "the request is torn");
    assert_eq!(small, LOOKUP);
}

#[test]
fn pending_requests_fail_when_the_server_ends() {
    let mut pair = Pair::new();
    pair.ask(LOOKUP, 1, 8);
    pair.ask(READ, 2, 9000);
    pair.next();
    let id = pair.next().1;
    // In the middle of a reply.
    pair.answer(&reply(0, id, &[1; 9000])[..4500]);
    pair.server.shutdown(std::net::Shutdown::Both).unwrap();
    while pair.driver.run(Some(0)) {}
    let mut answers: Vec<_> = std::iter::from_fn(|| pair.driver.pop(1)).collect();
    answers.sort_by_key(|used| used.bytes[8]);
    for (used, unique) in answers.iter().zip([1, 2]) {
        assert_eq!((used.written, &used.bytes[..16]), (16, &reply(-EIO, unique, b"")[..]));
    }
    assert_eq!(answers.len(), 2);
    assert_eq!(pair.failure(), "device: its server has ended");
    assert!(!pair.driver.needs_reset());
    // Later requests get the same error.
    pair.ask(LOOKUP, 3, 8);
    expect(pair.driver.pop(1), &reply(-EIO, 3, b""));
    pair.driver.push(0, &[Piece::Out(request(FORGET, 2, &[1; 8]))]);
    pair.driver.ring();
    assert!(pair.driver.pop(0).is_some());
    pair.driver.start(u64::MAX);
    pair.ask(LOOKUP, 4, 8);
    expect(pair.driver.pop(1), &reply(-EIO, 4, b""));
}

#[test]
fn a_server_that_ends_before_it_has_read_all_requests_has_ended() {
    let mut pair = Pair::new();
    pair.ask(LOOKUP, 1, 8);
    // Closes the socket, which resets the connection.
    pair.server = UnixStream::pair().unwrap().0;
    while pair.driver.run(Some(0)) {}
    expect(pair.driver.pop(1), &reply(-EIO, 1, b""));
    assert_eq!(pair.failure(), "device: its server has ended");
}

#[test]
fn a_server_that_violates_the_protocol_is_disconnected() {
    type Reply = fn(u64) -> Vec<u8>;
    let answers: [(&str, Reply); 6] = [
        ("was not made", |id| reply(0, id + 1, b"")),
        ("was not made", |_| reply(0, 0, b"a notification")),
        ("17 bytes where 16 were asked for", |id| reply(0, id, &[0; 17])),
        ("a reply of 15 bytes", |id| [&15_u32.to_le_bytes()[..], &reply(0, id, b"")[4..]].concat()),
        ("a reply of 0 bytes", |id| [&[0; 4][..], &reply(0, id, b"")[4..]].concat()),
        ("a reply of 4294967295 bytes", |id| [&[0xff; 4][..], &reply(0, id, b"")[4..]].concat()),
    ];
    for (expected, answer) in answers {
        let mut pair = Pair::new();
        pair.ask(LOOKUP, 1, 16);
        let id = pair.next().1;
        pair.answer(&answer(id));
        expect(pair.driver.pop(1), &reply(-EIO, 1, b""));
        assert!(pair.failure().contains(expected), "{:?} should say {expected:?}", pair.failure());
        assert_eq!(pair.server.read(&mut [0]).unwrap(), 0, "the server gets EOF");
    }
}

#[test]
fn invalid_chains_fail_the_device() {
    for (pieces, expected) in [
        (vec![Piece::Out(vec![0; 39]), Piece::In(16)], "too short"),
        (vec![Piece::In(16)], "too short"),
        (vec![Piece::Out(request(LOOKUP, 1, b""))], "no room for its reply's header"),
        (vec![Piece::Out(request(LOOKUP, 1, b"")), Piece::In(15)], "no room for its reply's header"),
        (vec![Piece::Out(request(LOOKUP, 1, &vec![0; 1 << 20])), Piece::Out(vec![0; 4096])], "FUSE has none"),
    ] {
        let mut pair = Pair::new();
        pair.driver.push(1, &pieces);
        pair.driver.ring();
        assert!(pair.driver.needs_reset());
        assert!(pair.failure().contains(expected), "{:?} should say {expected:?}", pair.failure());
        pair.driver.start(u64::MAX);
        pair.ask(LOOKUP, 2, 8);
        let id = pair.next().1;
        pair.answer(&reply(0, id, b"mended"));
        expect(pair.driver.pop(1), &reply(0, 2, b"mended"));
    }
}

#[test]
fn the_number_of_pending_requests_is_limited() {
    let mut pair = Pair::new();
    // The same descriptor repeatedly, as if each request had been completed.
    pair.driver.describe(1, 0, 0x80_0000, 40, 1, 1);
    pair.driver.describe(1, 1, 0x80_1000, 16, 2, 0);
    pair.driver.memory.write(vm_memory::GuestAddress(0x80_0000), &request(LOOKUP, 1, b"")).unwrap();
    for _ in 0..257 {
        pair.driver.offer(1, 0);
        pair.driver.ring();
    }
    assert!(pair.failure().contains("in flight, more than its size"), "{}", pair.failure());
}

#[test]
fn a_placeholder_replies_with_errors() {
    let mut driver = Driver::started(SharedFolder::with("x", None));
    driver.push(1, &[Piece::Out(request(26, 1, &[0; 16])), Piece::In(16), Piece::In(64)]);
    driver.ring();
    expect(driver.pop(1), &reply(-EIO, 1, b""));
    assert_eq!(driver.transport.failure(), None);
}

proptest! {
    #[test]
    fn no_driver_harms_the_host(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        let (ours, _server) = UnixStream::pair().unwrap();
        Driver::new(SharedFolder::with("tag", Some(Server::connected(ours)))).misbehave(&bytes);
    }

    #[test]
    fn no_server_harms_the_host(
        bytes in proptest::collection::vec(any::<u8>(), 0..200),
        lengths in proptest::collection::vec((0_u32..40, 1_u64..5), 0..5),
    ) {
        let mut pair = Pair::new();
        for unique in 0..3 {
            pair.ask(READ, unique, 24);
        }
        for (length, id) in lengths {
            let mut message = reply(0, id, &vec![1; usize::try_from(length).unwrap()]);
            message.extend(&bytes[..bytes.len().min(2)]);
            if pair.server.write_all(&message).is_ok() {
                while pair.driver.run(Some(0)) {}
            }
        }
        let _ = pair.server.write_all(&bytes);
        while pair.driver.run(Some(0)) {}
        let _ = pair.server.shutdown(std::net::Shutdown::Both);
        while pair.driver.run(Some(0)) {}
        // Each request is completed, whatever the reply.
        prop_assert_eq!(std::iter::from_fn(|| pair.driver.pop(1)).count(), 3);
    }
}
