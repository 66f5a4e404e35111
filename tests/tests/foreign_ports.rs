//! Under other monitors, which lack Kindling's I/O ports, init takes its payload from the kernel command line, whatever
//! those ports return, and does not write to them once it has detected the monitor.

use guest_protocol::{BootMark, port};
use kindling_vmm::config::Console;
use kindling_vmm::config::image::Image;
use kindling_vmm::{BusDevice, GuestRequest};
use kindling_vmm::{ExitReason, Instant, Machine, Timeline};
use std::sync::{Arc, Mutex};
use tests::testbed;

/// The result of reading an unassigned port.
#[derive(Clone, Copy, Debug)]
enum Answer {
    /// These bytes, repeated.
    Constant(&'static [u8]),
    /// The last write, repeated: a monitor without a handler leaves the buffer unchanged.
    LastWrite,
    /// The last write, followed by zeroes.
    LastWriteThenZeroes,
    /// The last write with all bits inverted.
    Inverted,
    /// Random bytes.
    Random,
}

/// The ports of another monitor.
#[derive(Debug)]
struct Ports {
    answer: Answer,
    last_write: Vec<u8>,
    random: u64,
    writes: Vec<(u16, Vec<u8>)>,
    reads: usize,
}

impl Ports {
    /// The range of Kindling's ports and adjacent ones.
    const FIRST: u16 = 0x550;
    const LAST: u16 = 0x55f;

    fn new(answer: Answer, random: u64) -> Self {
        Self { answer, last_write: vec![0], random, writes: Vec::new(), reads: 0 }
    }

    fn random(&mut self) -> u8 {
        // xorshift64
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random.to_le_bytes()[3]
    }
}

impl BusDevice for Ports {
    fn read(&mut self, _offset: u16, data: &mut [u8]) {
        self.reads += 1;
        let last = self.last_write.clone();
        for (at, byte) in data.iter_mut().enumerate() {
            *byte = match self.answer {
                Answer::Constant(bytes) => bytes[at % bytes.len()],
                Answer::LastWrite => last[at % last.len()],
                Answer::LastWriteThenZeroes => last.get(at).copied().unwrap_or(0),
                Answer::Inverted => !last[at % last.len()],
                Answer::Random => self.random(),
            };
        }
    }

    fn write(&mut self, offset: u16, data: &[u8]) -> Option<GuestRequest> {
        self.last_write = data.into();
        self.writes.push((Self::FIRST + offset, data.into()));
        None
    }
}

#[track_caller]
fn takes_its_payload_from_the_command_line(answer: Answer, seed: u64) {
    let directory = testbed("images/busybox");
    let console = tempfile::NamedTempFile::new().unwrap();
    let mut config = Image::open(&directory).unwrap().config(&directory);
    config.console = Console::File(console.path().into());
    config.boot_source.boot_args += " -- /bin/sh -c \"echo it runs; exit 3\"";
    let mut machine = Machine::new(&config, Timeline::starting_at(Instant::now())).unwrap();
    let ports = Arc::new(Mutex::new(Ports::new(answer, seed)));
    machine.add_port_device(Ports::FIRST..=Ports::LAST, ports.clone());
    let exit = machine.start().unwrap().wait();

    let console = String::from_utf8(std::fs::read(console.path()).unwrap()).unwrap().replace('\r', "");
    assert!(console.contains("it runs\ninit: exit status 3\n"), "{answer:x?}: {console}");
    assert_eq!(exit.reason, ExitReason::Reset, "{answer:x?}");
    let ports = ports.lock().unwrap();
    let mark = |mark: BootMark| (port::BOOT_MARK, vec![mark as u8]);
    let before = [BootMark::InitEntered, BootMark::FilesystemsMounted, BootMark::SystemReady].map(mark);
    assert_eq!(ports.writes[..3], before, "{answer:x?}");
    assert_eq!(ports.writes[3..].len(), 1, "init may only write the nonce: {ports:x?}");
    assert_eq!(ports.writes[3].0, port::CONFIG_REQUEST, "{ports:x?}");
    assert_eq!(ports.reads, 1, "{answer:x?}");
}

#[test]
fn all_ones_and_zeroes_are_not_taken_for_kindling() {
    takes_its_payload_from_the_command_line(Answer::Constant(&[0xff]), 1);
    takes_its_payload_from_the_command_line(Answer::Constant(&[0]), 1);
}

#[test]
fn an_echo_of_the_last_write_is_not_taken_for_kindling() {
    takes_its_payload_from_the_command_line(Answer::LastWrite, 1);
    takes_its_payload_from_the_command_line(Answer::LastWriteThenZeroes, 1);
    takes_its_payload_from_the_command_line(Answer::Inverted, 1);
}

#[test]
fn a_small_number_and_an_invalid_frame_are_not_taken_for_kindling() {
    takes_its_payload_from_the_command_line(Answer::Constant(&[12, 0, 0, 0]), 1);
    takes_its_payload_from_the_command_line(Answer::Constant(b"KNDL\x01\0\0\0\0\0\0\0"), 1);
}

#[test]
fn random_bytes_are_not_taken_for_kindling() {
    for seed in 1..=3 {
        takes_its_payload_from_the_command_line(Answer::Random, seed);
    }
}
