//! The network device with the test driver on one side, and a socket in place of passt or a tap device on the other.

use super::Net;
use super::passt::Passt;
use crate::config::devices::{NetworkInterface, RateLimiter, TokenBucket};
use crate::devices::virtio::driver::{Driver, Piece, Used};
use crate::timeline::Instant;
use proptest::prelude::*;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};
use std::os::fd::OwnedFd;

const RX: usize = 0;
const TX: usize = 1;
const DOORBELL: usize = 0x050;
// Feature bits restated from section 5.1.3.
const GUEST_CSUM: u64 = 1 << 1;
const MRG_RXBUF: u64 = 1 << 15;
const GUEST_TSO4: u64 = 1 << 7;

fn pair(kind: SocketType) -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::UNIX, kind, SocketFlags::NONBLOCK, None).unwrap()
}

fn interface() -> NetworkInterface {
    serde_json::from_str(r#"{"iface_id": "net0", "host_dev_name": "tap0"}"#).unwrap()
}

fn passt_with(interface: &NetworkInterface, features: u64) -> (Driver, OwnedFd) {
    let (ours, peer) = pair(SocketType::STREAM);
    let mut driver = Driver::new(Net::on_stream(ours, interface));
    driver.start(features);
    (driver, peer)
}

fn passt() -> (Driver, OwnedFd) {
    passt_with(&interface(), u64::MAX)
}

fn tap_with(interface: &NetworkInterface, features: u64) -> (Driver, OwnedFd) {
    let (ours, peer) = pair(SocketType::SEQPACKET);
    let mut driver = Driver::new(Net::on_datagrams(ours, interface));
    driver.start(features);
    (driver, peer)
}

fn tap(features: u64) -> (Driver, OwnedFd) {
    tap_with(&interface(), features)
}

/// A frame whose content depends on the seed.
fn frame(length: usize, seed: u8) -> Vec<u8> {
    (0..length).map(|at| (at * 7 + at / 251).to_le_bytes()[0] ^ seed).collect()
}

fn framed(frame: &[u8]) -> Vec<u8> {
    [&u32::try_from(frame.len()).unwrap().to_be_bytes()[..], frame].concat()
}

fn put(socket: &OwnedFd, bytes: &[u8]) {
    assert_eq!(send(socket, bytes, SendFlags::empty()).unwrap(), bytes.len());
}

/// Reads all bytes that are available in a socket.
fn drain(socket: &OwnedFd) -> Vec<u8> {
    let (mut all, mut part) = (Vec::new(), vec![0; 100_000]);
    while let Ok((count @ 1.., _)) = recv(socket, &mut part[..], RecvFlags::DONTWAIT) {
        all.extend(&part[..count]);
    }
    all
}

fn settle(driver: &mut Driver) {
    while driver.run(Some(0)) {}
}

/// A frame as the driver sends it.
fn outgoing(frame: &[u8]) -> Vec<Piece> {
    vec![Piece::Out(vec![0; 12]), Piece::Out(frame.to_vec())]
}

/// The next frame that the driver has received: its header and its bytes.
fn received(driver: &mut Driver) -> Option<(Vec<u8>, Vec<u8>)> {
    let data = |used: &Used| used.bytes[..usize::try_from(used.written).unwrap()].to_vec();
    let mut bytes = data(&driver.pop(RX)?);
    let header = bytes[..12].to_vec();
    for _ in 1..u16::from_le_bytes([header[10], header[11]]) {
        bytes.extend(data(&driver.pop(RX).expect("a frame is incomplete")));
    }
    Some((header, bytes.split_off(12)))
}

#[test]
fn the_configuration_has_address_and_features() {
    let mut interface = interface();
    interface.guest_mac = Some("06:00:ac:10:00:02".parse().unwrap());
    interface.mtu = Some(9000);
    let (mut driver, _its) = passt_with(&interface, u64::MAX);
    assert_eq!(driver.read(8), 1);
    assert_eq!(driver.configuration(0, 12), [6, 0, 0xac, 0x10, 0, 2, 1, 0, 1, 0, 0x28, 0x23]);
    assert_eq!(
        driver.offered() & (1 << 3 | 1 << 5 | 1 << 7 | 1 << 11),
        1 << 3 | 1 << 5,
        "passt does not segment"
    );
    let (mut driver, _its) = tap(u64::MAX);
    assert_eq!(driver.offered() & (1 << 3 | 1 << 5 | 1 << 7 | 1 << 11), 1 << 5 | 1 << 7 | 1 << 11);
}

#[test]
fn frames_are_sent_after_their_length() {
    let (mut driver, peer) = passt();
    let (first, second) = (frame(60, 1), frame(65_535, 2));
    driver.push(TX, &outgoing(&first));
    driver.push(
        TX,
        &[Piece::Out([vec![0; 12], second[..100].to_vec()].concat()), Piece::Out(second[100..].to_vec())],
    );
    driver.ring();
    assert!(driver.pop(TX).is_some() && driver.pop(TX).is_some());
    assert_eq!(driver.interrupts(), 1, "one for both");
    assert_eq!(drain(&peer), [framed(&first), framed(&second)].concat());
}

#[test]
fn the_mac_is_announced_to_passt_before_the_guest_sends() {
    let (ours, peer) = pair(SocketType::STREAM);
    let mut passt = Passt::connected(ours);
    passt.announce("06:00:0a:00:02:0f".parse().unwrap()).unwrap();
    // As defined in RFC 826: to broadcast, from the device, ARP; Ethernet, IPv4, lengths, request; sender; target.
    let announcement = [
        &[0xff; 6][..],
        &[6, 0, 10, 0, 2, 15],
        &[0x08, 0x06],
        &[0, 1, 0x08, 0x00, 6, 4, 0, 1],
        &[6, 0, 10, 0, 2, 15, 10, 0, 2, 15],
        &[0, 0, 0, 0, 0, 0, 10, 0, 2, 15],
    ];
    assert_eq!(drain(&peer), framed(&announcement.concat()));
    let mut driver = Driver::new(Net::new(Box::new(passt), &interface()));
    driver.start(u64::MAX);
    let next = frame(60, 1);
    driver.request(TX, &outgoing(&next));
    assert_eq!(drain(&peer), framed(&next), "the guest's own frames follow");
}

#[test]
fn checksums_are_computed_for_the_driver() {
    let (mut driver, peer) = passt();
    let mut open = frame(74, 3);
    open[50..52].copy_from_slice(&[0, 0]);
    let mut header = vec![0; 12];
    header[0] = 1;
    header[6] = 34;
    header[8] = 16;
    driver.request(TX, &[Piece::Out(header), Piece::Out(open.clone())]);
    let sent = drain(&peer);
    assert_ne!(sent[4 + 50..4 + 52], [0, 0]);
    let words = sent[4 + 34..].chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    assert_eq!(words.sum::<u32>() % 0xffff, 0, "the sum over all of it is zero (RFC 1071)");
    open[50..52].copy_from_slice(&sent[4 + 50..4 + 52]);
    assert_eq!(sent[4..], open);
}

#[test]
fn an_invalid_frame_is_dropped_and_the_next_one_is_sent() {
    for (mut driver, peer) in [passt(), tap(u64::MAX)] {
        let segmented = [vec![0, 1], vec![0; 10]].concat();
        let outside = [vec![1, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff], vec![0; 2]].concat();
        let is_passt = driver.offered() & GUEST_TSO4 == 0;
        let mut wrong = vec![
            vec![Piece::Out(vec![0; 1])],
            vec![Piece::Out(vec![0; 12])],
            vec![Piece::Out(vec![0; 25])],
            vec![Piece::In(100)],
            vec![Piece::Out(vec![0; 12]), Piece::Out(vec![0; 65_554])],
            vec![Piece::Out(vec![0; 12]), Piece::Out(vec![0; 200_000])],
        ];
        if is_passt {
            // A tap device leaves these to the kernel.
            wrong.extend(
                [segmented, outside].map(|header| vec![Piece::Out(header), Piece::Out(frame(100, 1))]),
            );
        }
        for pieces in &wrong {
            driver.request(TX, pieces);
            assert!(drain(&peer).is_empty(), "{pieces:?}");
        }
        driver.request(TX, &outgoing(&frame(60, 9)));
        assert!(drain(&peer).ends_with(&frame(60, 9)));
        assert!(!driver.needs_reset());
    }
}

#[test]
fn a_frame_may_be_split_anywhere_in_the_stream() {
    let (mut driver, peer) = passt();
    driver.push(RX, &[Piece::In(1526)]);
    driver.push(RX, &[Piece::In(1526)]);
    driver.ring();
    let stream = [framed(&frame(60, 1)), framed(&frame(61, 2))].concat();
    for byte in &stream {
        put(&peer, &[*byte]);
        settle(&mut driver);
    }
    let (header, first) = received(&mut driver).unwrap();
    assert_eq!((header, first), (vec![2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0], frame(60, 1)));
    assert_eq!(received(&mut driver).unwrap().1, frame(61, 2));
    assert_eq!(received(&mut driver), None);
}

#[test]
fn a_large_frame_takes_as_many_buffers_as_it_needs() {
    for (mut driver, peer) in [passt(), tap(u64::MAX)] {
        let is_passt = driver.offered() & GUEST_TSO4 == 0;
        for _ in 0..100 {
            driver.push(RX, &[Piece::In(7), Piece::In(900)]);
        }
        driver.ring();
        driver.interrupts();
        let large = frame(50_000, 5);
        put(&peer, &if is_passt { framed(&large) } else { [vec![0; 12], large.clone()].concat() });
        settle(&mut driver);
        let (header, bytes) = received(&mut driver).unwrap();
        assert_eq!(u16::from_le_bytes([header[10], header[11]]), 56, "of 907 bytes each");
        assert_eq!(bytes, large);
        assert_eq!(driver.interrupts(), 1);
    }
}

#[test]
fn without_merging_each_frame_has_one_buffer() {
    for (mut driver, peer) in [passt_with(&interface(), !MRG_RXBUF), tap(!MRG_RXBUF)] {
        let is_passt = driver.offered() & GUEST_TSO4 == 0;
        let put =
            |frame: &[u8]| put(&peer, &if is_passt { framed(frame) } else { [&[0; 12], frame].concat() });
        driver.push(RX, &[Piece::In(1526)]);
        driver.push(RX, &[Piece::In(70_000)]);
        driver.ring();
        put(&frame(1514, 1));
        put(&frame(60_000, 2));
        settle(&mut driver);
        assert_eq!(received(&mut driver).unwrap().1, frame(1514, 1));
        assert_eq!(received(&mut driver).unwrap().1, frame(60_000, 2));
        driver.push(RX, &[Piece::In(1526)]);
        driver.ring();
        put(&frame(1515, 3));
        put(&frame(100, 4));
        settle(&mut driver);
        assert_eq!(received(&mut driver).unwrap().1, frame(100, 4), "the frame before did not fit");
    }
}

#[test]
fn without_receive_buffers_frames_wait_without_events() {
    for (mut driver, peer) in [passt(), tap(u64::MAX)] {
        let is_passt = driver.offered() & GUEST_TSO4 == 0;
        settle(&mut driver);
        for seed in 0..10 {
            let frame = frame(600, seed);
            put(&peer, &if is_passt { framed(&frame) } else { [vec![0; 12], frame].concat() });
        }
        assert!(!driver.run(Some(0)), "the link is not watched");
        for seed in 0..10 {
            assert_eq!(received(&mut driver), None);
            driver.push(RX, &[Piece::In(1526)]);
            driver.ring();
            assert_eq!(received(&mut driver).unwrap().1, frame(600, seed));
        }
        assert!(!driver.run(Some(0)));
    }
}

/// The host's queue is full because the driver's is, and each continues when the driver makes room.
#[test]
fn two_full_rings_do_not_freeze_reception() {
    for (mut driver, peer) in [passt(), tap(u64::MAX)] {
        let is_passt = driver.offered() & GUEST_TSO4 == 0;
        let packed = |frame: &[u8]| if is_passt { framed(frame) } else { [&[0; 12], frame].concat() };
        for _ in 0..256 {
            driver.push(RX, &[Piece::In(1526)]);
        }
        driver.ring();
        // Sends frames until the socket is full; returns the number of complete ones. The next call sends the rest.
        let (mut sent, mut part) = (0_u32, Vec::new());
        let mut fill = |driver: &mut Driver| {
            loop {
                if part.is_empty() {
                    part = packed(&frame(600, sent.to_le_bytes()[0]));
                    sent += 1;
                }
                match send(&peer, &part, SendFlags::empty()) {
                    Ok(count) => drop(part.drain(..count)),
                    Err(_) => return sent - 1,
                }
                settle(driver);
            }
        };
        let expected = fill(&mut driver);
        assert!(expected > 256, "{expected} frames fill the driver's ring only");
        assert!(!driver.run(Some(0)), "the link is not watched");
        for seed in 0..expected {
            assert_eq!(received(&mut driver).unwrap().1, frame(600, seed.to_le_bytes()[0]), "{seed}");
            driver.push(RX, &[Piece::In(1526)]);
            driver.ring();
        }
        let more = fill(&mut driver);
        assert!(more > expected + 256, "{more} frames after {expected}");
        assert_eq!(received(&mut driver).unwrap().1, frame(600, expected.to_le_bytes()[0]));
    }
}

#[test]
fn long_frames_are_complete_whatever_arrived_before() {
    // Also with buffers whose first segment of seven bytes is shorter than the header.
    for first in [1526, 7] {
        let (mut driver, peer) = tap(u64::MAX);
        // Enough for the longest frame, and at most one descriptor per slot of the queue.
        let mut missing = 80;
        // Unexpected, expected, between short ones, and after so many short ones that no long one is expected.
        let lengths = [50_000, 60_000, 60, 40_000, 1518, 1519, 60, 60, 60, 60, 60, 60, 60, 60, 60, 30_000];
        for (length, seed) in lengths.into_iter().zip(0..) {
            for _ in 0..missing {
                driver.push(RX, &[Piece::In(first), Piece::In(900), Piece::In(600)]);
            }
            driver.ring();
            put(&peer, &[&[0; 12], &frame(length, seed)[..]].concat());
            settle(&mut driver);
            let (header, bytes) = received(&mut driver).unwrap();
            assert!(bytes == frame(length, seed), "{length} bytes, {seed}");
            missing = u16::from_le_bytes([header[10], header[11]]);
        }
    }
}

#[test]
fn a_partly_placed_frame_waits_for_buffers() {
    for with_reset in [false, true] {
        let (mut driver, peer) = tap(u64::MAX);
        driver.push(RX, &[Piece::In(1526)]);
        driver.ring();
        put(&peer, &[&[0; 12], &frame(4000, 1)[..]].concat());
        put(&peer, &[&[0; 12], &frame(700, 2)[..]].concat());
        settle(&mut driver);
        assert_eq!(received(&mut driver), None, "the frame is incomplete");
        assert!(!driver.run(Some(0)), "and only the driver resumes it");
        if with_reset {
            driver.start(u64::MAX);
        }
        driver.push(RX, &[Piece::In(1526)]);
        driver.ring();
        if !with_reset {
            assert_eq!(received(&mut driver), None);
            driver.push(RX, &[Piece::In(100), Piece::In(1900)]);
            driver.ring();
            let (header, bytes) = received(&mut driver).unwrap();
            assert_eq!(u16::from_le_bytes([header[10], header[11]]), 3);
            assert!(bytes == frame(4000, 1));
            driver.push(RX, &[Piece::In(1526)]);
            driver.ring();
        }
        assert!(received(&mut driver).unwrap().1 == frame(700, 2), "a reset drops a partly placed frame");
    }
}

#[test]
fn a_frame_larger_than_all_receive_buffers_is_dropped() {
    let (mut driver, peer) = tap(u64::MAX);
    for _ in 0..256 {
        driver.push(RX, &[Piece::In(20)]);
    }
    driver.ring();
    put(&peer, &[vec![0; 12], frame(10_000, 1)].concat());
    put(&peer, &[vec![0; 12], frame(100, 2)].concat());
    settle(&mut driver);
    assert_eq!(received(&mut driver).unwrap().1, frame(100, 2));
}

#[test]
fn a_driver_sees_no_offload_that_it_did_not_accept() {
    let (mut driver, peer) = tap(!(GUEST_CSUM | GUEST_TSO4 | 1 << 8 | 1 << 9 | 1 << 10));
    for _ in 0..60 {
        driver.push(RX, &[Piece::In(1526)]);
    }
    driver.ring();
    for first in [[1, 0], [0, 1], [0, 4], [0, 0x81], [0, 77]] {
        put(&peer, &[&first, &[0; 10][..], &frame(60, 1)].concat());
    }
    put(&peer, &[&[2, 0], &[0; 10][..], &frame(60, 2)].concat());
    settle(&mut driver);
    let (header, bytes) = received(&mut driver).unwrap();
    assert_eq!((header[0], bytes), (0, frame(60, 2)));
}

#[test]
fn a_full_stream_delays_the_driver_and_loses_nothing() {
    let (mut driver, peer) = passt();
    let frames: Vec<_> = (0..40).map(|seed| frame(20_000, seed)).collect();
    for frame in &frames {
        driver.push(TX, &outgoing(frame));
    }
    driver.ring();
    let mut done = 0;
    let mut count = |driver: &mut Driver| {
        done += std::iter::from_fn(|| driver.pop(TX)).count();
        done
    };
    assert!(count(&mut driver) < 40, "800 kB do not fit into the socket");
    assert!(!driver.run(Some(0)), "no events while it is full");
    let mut bytes = Vec::new();
    while count(&mut driver) < 40 {
        bytes.extend(drain(&peer));
        assert!(driver.run(Some(60_000)));
    }
    settle(&mut driver);
    bytes.extend(drain(&peer));
    settle(&mut driver);
    bytes.extend(drain(&peer));
    assert!(bytes == frames.iter().flat_map(|frame| framed(frame)).collect::<Vec<_>>());
    assert!(!driver.run(Some(0)), "nothing is left to send");
}

#[test]
fn the_link_is_down_after_the_end_of_passt() {
    let (mut driver, peer) = passt();
    driver.push(RX, &[Piece::In(100_000)]);
    driver.ring();
    drop(peer);
    settle(&mut driver);
    assert_eq!(driver.configuration(6, 2), [0, 0]);
    driver.request(TX, &outgoing(&frame(60, 1)));
    assert!(!driver.needs_reset());
    assert!(!driver.run(Some(0)), "no more events");
    driver.start(u64::MAX);
    driver.request(TX, &outgoing(&frame(60, 1)));
    assert_eq!(driver.configuration(6, 2), [0, 0], "a reset does not reconnect the link");
}

#[test]
fn invalid_lengths_end_the_stream() {
    for length in [0_u32, 13, 65_536, u32::MAX] {
        let (mut driver, peer) = passt();
        driver.push(RX, &[Piece::In(100_000)]);
        driver.ring();
        put(&peer, &[&length.to_be_bytes()[..], &[0; 100]].concat());
        settle(&mut driver);
        assert_eq!(driver.configuration(6, 2), [0, 0], "{length}");
        assert_eq!(driver.pop(RX), None);
    }
}

#[test]
fn a_buffer_shorter_than_the_header_fails_the_device() {
    let (mut driver, _its) = passt();
    driver.push(RX, &[Piece::In(11)]);
    driver.ring();
    assert!(driver.needs_reset());
    driver.start(u64::MAX);
    driver.push(RX, &[Piece::In(12)]);
    driver.ring();
    assert!(!driver.needs_reset());
    // Section 5.1.3.1: segmentation requires checksum offload.
    let (driver, _its) = tap(!GUEST_CSUM);
    assert!(driver.needs_reset());
}

#[test]
fn a_call_ends_after_64_frames() {
    for (mut driver, peer) in [passt(), tap(u64::MAX)] {
        let is_passt = driver.offered() & GUEST_TSO4 == 0;
        for seed in 0..100 {
            driver.push(TX, &outgoing(&frame(60, seed)));
        }
        driver.write(DOORBELL, 0);
        for expected in [64, 36] {
            assert!(driver.run(Some(0)));
            assert_eq!(std::iter::from_fn(|| driver.pop(TX)).count(), expected, "sent");
        }
        assert!(!driver.run(Some(0)));
        drain(&peer);
        for seed in 0..100 {
            driver.push(RX, &[Piece::In(100)]);
            let frame = frame(60, seed);
            put(&peer, &if is_passt { framed(&frame) } else { [vec![0; 12], frame].concat() });
        }
        driver.write(DOORBELL, 0);
        assert!(driver.run(Some(0)));
        let first = std::iter::from_fn(|| received(&mut driver)).count();
        assert!((60..=64).contains(&first), "received {first}");
        settle(&mut driver);
        assert_eq!(first + std::iter::from_fn(|| received(&mut driver)).count(), 100);
    }
}

/// Runs a rate-limited device until ten frames of 60 bytes have passed in both directions; returns the duration of each
/// direction.
fn pace((mut driver, peer): (Driver, OwnedFd)) -> [u64; 2] {
    let is_passt = driver.offered() & GUEST_TSO4 == 0;
    for seed in 0..10 {
        let frame = frame(60, seed);
        driver.push(TX, &outgoing(&frame));
        driver.push(RX, &[Piece::In(70_000)]);
        put(&peer, &if is_passt { framed(&frame) } else { [vec![0; 12], frame].concat() });
    }
    let start = Instant::now().0;
    driver.ring();
    let (mut counts, mut took) = ([0; 2], [0; 2]);
    loop {
        counts[TX] += std::iter::from_fn(|| driver.pop(TX)).count();
        counts[RX] += std::iter::from_fn(|| received(&mut driver)).count();
        for (count, took) in counts.iter().zip(&mut took) {
            if *count == 10 && *took == 0 {
                *took = Instant::now().0 - start;
            }
        }
        if counts == [10; 2] {
            assert!(!drain(&peer).is_empty());
            return took;
        }
        assert!(
            driver.transport.deadline().is_some(),
            "without a deadline the frames would hang: {counts:?}"
        );
        driver.transport.serve_deadline();
    }
}

#[test]
fn limits_hold_in_each_direction() {
    // Two frames or twice 60 bytes pass immediately, and the next ones after 10 ms each. The first one that finds
    // tokens in a bucket passes as well, so that all take 70 ms: a lower bound holds on any machine.
    let bucket = |size| Some(TokenBucket { size, one_time_burst: None, refill_time: 20 });
    let operations = RateLimiter { ops: bucket(2), bandwidth: None };
    let bandwidth = RateLimiter { ops: None, bandwidth: bucket(120) };
    for limiter in [operations, bandwidth].map(Some) {
        for limited in [RX, TX] {
            let mut interface = interface();
            let place =
                if limited == RX { &mut interface.rx_rate_limiter } else { &mut interface.tx_rate_limiter };
            *place = limiter;
            for end in [passt_with(&interface, u64::MAX), tap_with(&interface, u64::MAX)] {
                assert!(pace(end)[limited] > 60_000_000, "{limited} {limiter:?}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Frames arrive complete and in order, whatever the sizes of frames and buffers.
    #[test]
    fn frames_arrive_whole_and_in_order(
        is_passt: bool,
        sizes in prop::collection::vec(prop_oneof![14_usize..200, 14_usize..3000, 14_usize..60_000], 1..12),
        buffers in prop::collection::vec(prop::collection::vec(1_u32..3000, 1..4), 1..40),
    ) {
        let (mut driver, peer) = if is_passt { passt() } else { tap(u64::MAX) };
        let mut buffers = buffers.iter().cycle();
        let mut given = 0;
        for (size, seed) in sizes.iter().zip(0..) {
            let expected = frame(*size, seed);
            put(&peer, &if is_passt { framed(&expected) } else { [vec![0; 12], expected.clone()].concat() });
            settle(&mut driver);
            let got = loop {
                if let Some((_, bytes)) = received(&mut driver) {
                    break bytes;
                }
                given += 1;
                prop_assert!(given < 30_000);
                let mut pieces: Vec<_> = buffers.next().unwrap().iter().map(|size| Piece::In(*size)).collect();
                // 256 descriptors, at most four per chain, must hold the largest frame.
                pieces.push(Piece::In(1000));
                driver.push(RX, &pieces);
                driver.ring();
            };
            prop_assert!(got == expected);
        }
        prop_assert!(!driver.needs_reset());
    }

    #[test]
    fn no_driver_harms_the_host(is_passt: bool, bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        let (mut driver, peer) = if is_passt { passt() } else { tap(u64::MAX) };
        let noise = frame(3000, bytes.first().copied().unwrap_or(0));
        put(&peer, &if is_passt { framed(&noise) } else { noise });
        driver.misbehave(&bytes);
    }
}
