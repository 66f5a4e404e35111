//! The configuration device: init writes a nonce, and reads the handshake response and the configuration frame.

use crate::bus::{BusDevice, GuestRequest};
use crate::config::{BootInfo, GuestConfig};
use crate::timeline::Instant;
use guest_protocol::config::Reseed;
use guest_protocol::frame::FrameError;
use guest_protocol::handshake;

/// The device at the I/O ports `port::CONFIG_REQUEST` and `port::CONFIG_DATA`.
#[derive(Debug)]
pub struct Configuration {
    /// `None` in a spare machine, which stops at init's request.
    config: Option<GuestConfig>,
    /// The nonce of a request before the configuration is known.
    waiting: Option<u32>,
    vm_created: Instant,
    /// Whether init sends the kernel log.
    kernel_log: bool,
    /// Whether the guest continues from a pre-booted kernel.
    is_prebooted: bool,
    /// Random numbers for a pre-booted kernel, one set per response. They are generated with the device, because the seccomp
    /// filter of the vCPU threads, which respond, does not allow getrandom(2).
    entropy: Vec<[u8; Reseed::ENTROPY_LEN]>,
    /// Whether the guest may have been saved: it continues with its own random numbers.
    is_saved: bool,
    /// The response to the last nonce, and the frame.
    answer: Vec<u8>,
    position: usize,
}

impl Configuration {
    /// Creates a device that responds with `config`, and with the time since `vm_created`. If `is_prebooted` is set,
    /// the guest continues from a pre-booted kernel, and each of the first [`Self::RESEEDS_MAX`] responses has a
    /// [`Reseed`]; later ones are empty.
    ///
    /// # Errors
    /// When the configuration does not fit into a frame.
    pub fn new(
        config: GuestConfig,
        vm_created: Instant,
        kernel_log: bool,
        is_prebooted: bool,
    ) -> Result<Self, FrameError> {
        // The frame is encoded for each request, because it contains the age of the VM; encoding it here once checks
        // that the configuration fits.
        config.to_frame(&BootInfo::ALL_SET)?;
        let entropy = if is_prebooted { random_numbers() } else { Vec::new() };
        Ok(Self { config: Some(config), vm_created, kernel_log, is_prebooted, entropy, ..Self::unknown() })
    }

    /// Creates the device of a spare machine, which continues from a pre-booted kernel and stops at the first request.
    pub fn unknown() -> Self {
        Self {
            config: None,
            vm_created: Instant(0),
            kernel_log: false,
            is_prebooted: true,
            entropy: Vec::new(),
            is_saved: false,
            answer: Vec::new(),
            position: 0,
            waiting: None,
        }
    }

    /// Sets the configuration of a spare machine, which responds to the request at which it stopped when the guest continues, with
    /// the time of then. New random numbers are generated now.
    ///
    /// # Errors
    /// When the configuration does not fit into a frame.
    pub fn set(&mut self, config: GuestConfig, now: Instant) -> Result<(), FrameError> {
        let waiting = self.waiting.take();
        *self = Self { waiting, ..Self::new(config, now, false, true)? };
        Ok(())
    }

    /// Makes further responses those of a guest that may have been saved, and continues with its own random numbers.
    pub fn continue_saved(&mut self) {
        self.is_saved = true;
    }

    /// Maximum number of responses to a pre-booted kernel: init needs one.
    const RESEEDS_MAX: usize = 4;

    fn restart(&mut self, nonce: u32) {
        let vm_age = Some(Instant::now().since(self.vm_created));
        let is_saved = self.is_saved;
        let reseed = if is_saved { None } else { self.entropy.pop().map(reseed) };
        let boot = BootInfo { vm_age, kernel_log: self.kernel_log, reseed };
        // Init stops at an empty frame: no guest may run with the random numbers of another.
        let config = self.config.as_ref().filter(|_| !self.is_prebooted || is_saved || boot.reseed.is_some());
        let frame = config.and_then(|config| config.to_frame(&boot).ok()).unwrap_or_default();
        let length = u32::try_from(frame.len()).unwrap_or(0);
        self.answer = [&handshake::response(nonce, length), &*frame].concat();
        self.position = 0;
    }
}

/// Random numbers for [`Configuration::RESEEDS_MAX`] responses; for fewer if the host returns no more.
fn random_numbers() -> Vec<[u8; Reseed::ENTROPY_LEN]> {
    let fill = |mut bytes: [u8; Reseed::ENTROPY_LEN]| {
        let count = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
        (count == Ok(bytes.len())).then_some(bytes)
    };
    (0..Configuration::RESEEDS_MAX).map_while(|_| fill([0; _])).collect()
}

/// The host's time, with these random numbers.
fn reseed(entropy: [u8; Reseed::ENTROPY_LEN]) -> Reseed {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    let [seconds, nanoseconds] = [time.tv_sec, time.tv_nsec].map(|part| u64::try_from(part).unwrap_or(0));
    Reseed { real_time: seconds * 1_000_000_000 + nanoseconds, entropy }
}

/// Offset of `port::CONFIG_DATA` from the device's first port.
const DATA: u16 = guest_protocol::port::CONFIG_DATA - guest_protocol::port::CONFIG_REQUEST;

impl BusDevice for Configuration {
    fn read(&mut self, offset: u16, data: &mut [u8]) {
        match (offset, data.len()) {
            // The init of earlier versions reads the length of its frame here. It rejects the length 0 with a message
            // that init and VMM are of different versions.
            (0, 4) => data.fill(0),
            (DATA, length) => {
                if self.config.is_some()
                    && let Some(nonce) = self.waiting.take()
                {
                    self.restart(nonce);
                }
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
            let nonce = u32::from_le_bytes([a, b, c, d]);
            if self.config.is_none() {
                self.waiting = Some(nonce);
                return Some(GuestRequest::Capture);
            }
            self.restart(nonce);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use guest_protocol::frame;

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
            let (config, boot) = GuestConfig::from_frame(&request(&mut device, nonce)).unwrap();
            assert_eq!((config.arguments, config.user_id), (vec![b"/bin/true".to_vec()], 1000));
            assert!(boot.vm_age.is_some());
            assert_eq!((boot.kernel_log, boot.reseed), (false, None));
            assert_eq!(read(&mut device, DATA, 3), [0; 3], "behind the end are zeroes");
        }
    }

    #[test]
    fn a_guest_from_a_prebooted_kernel_gets_the_time_and_new_random_numbers() {
        let mut device = Configuration::new(GuestConfig::default(), Instant::now(), false, true).unwrap();
        let mut seeds = Vec::new();
        for nonce in 0..2 {
            let (_, boot) = GuestConfig::from_frame(&request(&mut device, nonce)).unwrap();
            let reseed = boot.reseed.unwrap();
            let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap();
            assert!(now.as_secs() - reseed.real_time / 1_000_000_000 <= 1);
            seeds.push(reseed.entropy);
        }
        assert_ne!(seeds[0], seeds[1]);
        for _ in seeds.len()..Configuration::RESEEDS_MAX {
            GuestConfig::from_frame(&request(&mut device, 7)).unwrap();
        }
        device.write(0, &8_u32.to_le_bytes());
        let empty = read(&mut device, DATA, handshake::RESPONSE_LEN + 1);
        assert_eq!(handshake::accept(8, &empty).unwrap().0, 0, "random numbers are used twice");
        // A guest that was saved and continues has its own.
        device.continue_saved();
        for nonce in 9..12 {
            assert_eq!(GuestConfig::from_frame(&request(&mut device, nonce)).unwrap().1.reseed, None);
        }
    }

    #[test]
    fn a_spare_machine_stops_at_the_request_and_gets_the_answer_later() {
        let mut device = Configuration::unknown();
        assert_eq!(device.write(0, &7_u32.to_le_bytes()), Some(GuestRequest::Capture));
        let config = GuestConfig { user_id: 1000, ..GuestConfig::default() };
        device.set(config, Instant::now()).unwrap();
        let first = read(&mut device, DATA, handshake::RESPONSE_LEN);
        let (length, _) = handshake::accept(7, &first).unwrap();
        let frame = read(&mut device, DATA, usize::try_from(length).unwrap());
        let (config, boot) = GuestConfig::from_frame(&frame).unwrap();
        assert_eq!((config.user_id, boot.reseed.is_some()), (1000, true));
        assert_eq!(device.write(0, &8_u32.to_le_bytes()), None, "later requests are answered immediately");
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
