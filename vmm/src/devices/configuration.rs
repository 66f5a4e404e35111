//! The configuration device: init writes a nonce, and reads the handshake response and the configuration frame.

use crate::bus::{BusDevice, GuestRequest};
use crate::config::{GuestConfig, Reseed};
use crate::timeline::Instant;
use guest_protocol::frame::FrameError;
use guest_protocol::handshake;

/// The device at the I/O ports `port::CONFIG_REQUEST` and `port::CONFIG_DATA`.
#[derive(Debug)]
pub struct Configuration {
    config: GuestConfig,
    vm_created: Instant,
    /// Whether init sends the kernel log.
    kernel_log: bool,
    /// Whether the kernel was booted for another guest (a preboot), so that the frame contains a new seed and the time.
    reseed: bool,
    /// The handshake response to the last nonce, followed by the frame.
    answer: Vec<u8>,
    position: usize,
}

impl Configuration {
    /// Creates a device that sends `config` and the age of the VM, which was created at `vm_created`. `kernel_log`
    /// makes init send the kernel log. `reseed` states that the kernel was booted for another guest, so that the guest
    /// needs the current time and new random numbers.
    ///
    /// # Errors
    /// When the configuration does not fit into a frame.
    pub fn new(
        config: GuestConfig,
        vm_created: Instant,
        kernel_log: bool,
        reseed: bool,
    ) -> Result<Self, FrameError> {
        // The frame is built for each request, because it contains the age of the VM; building it here shows that it
        // fits.
        config.to_frame(0, kernel_log, Some(&Reseed::PLACEHOLDER))?;
        Ok(Self { config, vm_created, kernel_log, reseed, answer: Vec::new(), position: 0 })
    }

    fn restart(&mut self, nonce: u32) {
        let age = Instant::now().since(self.vm_created);
        let reseed = self.reseed.then(Reseed::now).transpose();
        // Init rejects an empty frame, so that no guest runs with the random numbers of another.
        let frame = reseed
            .ok()
            .and_then(|reseed| self.config.to_frame(age, self.kernel_log, reseed.as_ref()).ok())
            .unwrap_or_default();
        let length = u32::try_from(frame.len()).unwrap_or(0);
        self.answer = [&handshake::response(nonce, length), &*frame].concat();
        self.position = 0;
    }
}

/// Offset of `port::CONFIG_DATA` from `port::CONFIG_REQUEST`.
const DATA: u16 = guest_protocol::port::CONFIG_DATA - guest_protocol::port::CONFIG_REQUEST;

impl BusDevice for Configuration {
    fn read(&mut self, offset: u16, data: &mut [u8]) {
        match (offset, data.len()) {
            // The init of earlier versions reads the length of its frame here. It rejects the length 0 with a message
            // that init and VMM are of different versions.
            (0, 4) => data.fill(0),
            (DATA, length) => {
                let rest = self.answer.get(self.position..).unwrap_or_default();
                let given = rest.len().min(length);
                data.fill(0);
                data[..given].copy_from_slice(&rest[..given]);
                self.position += given;
            }
            _ => {}
        }
    }

    fn write(&mut self, offset: u16, data: &[u8]) -> Option<GuestRequest> {
        if let (0, &[a, b, c, d]) = (offset, data) {
            self.restart(u32::from_le_bytes([a, b, c, d]));
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use guest_protocol::frame::{self, Item};

    fn read(device: &mut Configuration, offset: u16, length: usize) -> Vec<u8> {
        let mut data = vec![0xff; length];
        device.read(offset, &mut data);
        data
    }

    /// Writes the nonce and reads the answer in parts; returns the frame.
    fn request(device: &mut Configuration, nonce: u32) -> Vec<u8> {
        assert_eq!(device.write(0, &nonce.to_le_bytes()), None);
        let first = read(device, DATA, handshake::RESPONSE_LEN + 1);
        let (length, start) = handshake::accept(nonce, &first).unwrap();
        let rest = read(device, DATA, usize::try_from(length).unwrap() - start.len());
        [start, &rest].concat()
    }

    fn device() -> Configuration {
        let config =
            GuestConfig { arguments: vec![b"/bin/true".into()], user_id: 1000, ..GuestConfig::default() };
        Configuration::new(config, Instant::now(), false, false).unwrap()
    }

    #[test]
    fn the_frame_can_be_read_in_parts_and_requested_again() {
        let mut device = device();
        for nonce in [0, 0x1234_5678] {
            let bytes = request(&mut device, nonce);
            let items: Vec<_> = frame::decode(&bytes).unwrap().map(Result::unwrap).collect();
            assert_eq!(items[..3], [Item::Argument(b"/bin/true"), Item::UserId(1000), Item::GroupId(0)]);
            assert!(matches!(items[3], Item::VmAge(_)));
            assert_eq!(read(&mut device, DATA, 3), [0; 3], "zeroes after the end");
        }
    }

    #[test]
    fn a_preboot_gets_the_time_and_new_random_numbers() {
        let mut device = Configuration::new(GuestConfig::default(), Instant::now(), false, true).unwrap();
        let mut seeds = Vec::new();
        for nonce in 0..2 {
            let bytes = request(&mut device, nonce);
            let items: Vec<_> = frame::decode(&bytes).unwrap().map(Result::unwrap).collect();
            let [.., Item::RealTime(time), Item::Entropy(seed)] = items[..] else { panic!("{items:?}") };
            let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap();
            assert!(now.as_secs() - time / 1_000_000_000 <= 1);
            seeds.push(seed.to_vec());
        }
        assert_eq!(seeds[0].len(), 32);
        assert_ne!(seeds[0], seeds[1]);
    }

    #[test]
    fn unexpected_accesses_are_ignored() {
        let mut device = device();
        assert_eq!(read(&mut device, 0, 1), [0xff]);
        assert_eq!(read(&mut device, 0, 8), [0xff; 8]);
        assert_eq!(read(&mut device, 1, 4), [0xff; 4]);
        for (offset, data) in [(0, &[][..]), (0, &[1; 3]), (0, &[1; 8]), (1, &[1; 4]), (DATA, &[1; 4])] {
            assert_eq!(device.write(offset, data), None);
            assert_eq!(
                read(&mut device, DATA, 16),
                [0; 16],
                "{} bytes at {offset} are not a request",
                data.len()
            );
        }
        assert_eq!(device.write(0, &[0; 4]), None);
        assert_eq!(read(&mut device, DATA, 100_000).len(), 100_000);
        assert!(read(&mut device, DATA, 0).is_empty());
    }

    #[test]
    fn the_init_of_an_earlier_version_reads_length_zero() {
        assert_eq!(read(&mut device(), 0, 4), [0; 4]);
    }

    #[test]
    fn a_configuration_too_long_for_a_frame_is_refused() {
        let long = vec![b'x'; frame::MAX_FRAME];
        let config = GuestConfig { working_directory: Some(long), ..GuestConfig::default() };
        let error = Configuration::new(config, Instant::now(), false, false).unwrap_err();
        assert_eq!(error, FrameError::TooLong);
    }
}
