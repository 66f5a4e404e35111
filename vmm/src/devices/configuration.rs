//! The configuration ports: init writes a nonce, then reads the response to it and the configuration frame.

use crate::bus::{BusDevice, GuestRequest};
use crate::timeline::Instant;
use guest_protocol::agent::TerminalSize;
use guest_protocol::frame::{self, FrameError, Item, MountKind, Network};
use guest_protocol::handshake;
use std::io;

/// What the guest runs and how, in the guest's own terms.
///
/// Strings are bytes, as Linux has them; none may contain a NUL.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GuestConfig {
    /// Argument vector of the payload; empty for none.
    pub arguments: Vec<Vec<u8>>,
    /// Environment entries, `NAME=value`.
    pub environment: Vec<Vec<u8>>,
    /// Working directory, `/` by default.
    pub working_directory: Option<Vec<u8>>,
    /// Hostname, the kernel's default if none.
    pub hostname: Option<Vec<u8>>,
    /// User id.
    pub user_id: u32,
    /// Group id.
    pub group_id: u32,
    /// Device with an EROFS root filesystem, such as `/dev/vda`; that of the configuration's image where none is
    /// named and the image has one.
    pub root_device: Option<Vec<u8>>,
    /// Network cards that init gives an address; those of the machine's own configuration come before them.
    pub networks: Vec<Network>,
    /// Further group ids.
    pub groups: Vec<u32>,
    /// Size of the terminal that the payload gets from the agent; none where it gets pipes.
    pub terminal: Option<TerminalSize>,
    /// Whether the payload's streams lead to the agent (`guest_protocol::agent`), over vsock.
    pub agent: bool,
    /// Filesystems that init mounts before the payload runs, in this order.
    pub mounts: Vec<Mount>,
    /// Whether programs may only read the root filesystem.
    pub is_root_read_only: bool,
}

/// A filesystem that init mounts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// What it is.
    pub kind: MountKind,
    /// Whether the guest may only read.
    pub is_read_only: bool,
    /// The guest's name for the disk, such as `/dev/vda`, or the device's tag.
    pub source: Vec<u8>,
    /// An absolute path in the guest, where directories are made that are missing.
    pub target: Vec<u8>,
}

impl Mount {
    fn item(&self) -> Item<'_> {
        let Self { kind, is_read_only, source, target } = self;
        Item::Mount(frame::Mount { kind: *kind, is_read_only: *is_read_only, source, target })
    }
}

impl GuestConfig {
    /// The frame that says this to init.
    ///
    /// # Errors
    /// When arguments and environment are longer than Linux takes them.
    pub fn to_frame(
        &self,
        vm_age: u64,
        kernel_log: bool,
        renewal: Option<&Renewal>,
    ) -> Result<Vec<u8>, FrameError> {
        let renewed =
            renewal.map(|renewal| [Item::RealTime(renewal.real_time), Item::Entropy(&renewal.entropy)]);
        let items = self
            .arguments
            .iter()
            .map(|bytes| Item::Argument(bytes))
            .chain(self.environment.iter().map(|bytes| Item::Environment(bytes)))
            .chain(self.working_directory.iter().map(|bytes| Item::WorkingDirectory(bytes)))
            .chain(self.hostname.iter().map(|bytes| Item::Hostname(bytes)))
            .chain(self.root_device.iter().map(|bytes| Item::RootDevice(bytes)))
            .chain([Item::UserId(self.user_id), Item::GroupId(self.group_id), Item::VmAge(vm_age)])
            .chain(self.networks.iter().map(|network| Item::Network(*network)))
            .chain(self.groups.iter().map(|id| Item::Group(*id)))
            .chain(self.terminal.map(Item::Terminal))
            .chain(self.agent.then_some(Item::Agent))
            .chain(self.mounts.iter().map(Mount::item))
            .chain(self.is_root_read_only.then_some(Item::ReadOnlyRoot))
            .chain(kernel_log.then_some(Item::KernelLog))
            .chain(renewed.into_iter().flatten());
        let mut bytes = Vec::new();
        frame::encode(items, &mut bytes)?;
        Ok(bytes)
    }
}

/// What a guest sets anew whose kernel has booted before.
#[derive(Clone, Copy, Debug)]
pub struct Renewal {
    /// Nanoseconds since 1970.
    pub real_time: u64,
    /// Random bytes, never the same twice.
    pub entropy: [u8; 32],
}

impl Renewal {
    /// One that is as long as any, to see whether it fits a frame.
    pub const LENGTH: Self = Self { real_time: 0, entropy: [0; 32] };

    /// The host's time and some of its random numbers.
    ///
    /// # Errors
    /// When the host gives no random numbers.
    pub fn now() -> io::Result<Self> {
        let mut entropy = [0; 32];
        let length = rustix::rand::getrandom(&mut entropy, rustix::rand::GetRandomFlags::empty())?;
        if length < entropy.len() {
            return Err(io::Error::other("the host gave too few random bytes"));
        }
        let time = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
        let [seconds, nanoseconds] = [time.tv_sec, time.tv_nsec].map(|part| u64::try_from(part).unwrap_or(0));
        Ok(Self { real_time: seconds * 1_000_000_000 + nanoseconds, entropy })
    }
}

/// The device behind `port::CONFIG_REQUEST` and `port::CONFIG_DATA`.
#[derive(Debug)]
pub struct Configuration {
    config: GuestConfig,
    vm_created: Instant,
    /// Whether init is asked for the kernel's log.
    kernel_log: bool,
    /// Whether the kernel has booted for another guest.
    renew: bool,
    /// The response to the last nonce, and the frame.
    answer: Vec<u8>,
    position: usize,
}

impl Configuration {
    /// A device that answers with `config`, and with the time since `vm_created`. `renew` says that the
    /// guest's kernel has booted for another guest.
    ///
    /// # Errors
    /// When the configuration does not fit a frame.
    pub fn new(
        config: GuestConfig,
        vm_created: Instant,
        kernel_log: bool,
        renew: bool,
    ) -> Result<Self, FrameError> {
        // The frame is made anew for each question, because it says how old the VM is; making it
        // once here shows that it can be made.
        config.to_frame(0, kernel_log, Some(&Renewal::LENGTH))?;
        Ok(Self { config, vm_created, kernel_log, renew, answer: Vec::new(), position: 0 })
    }

    fn restart(&mut self, nonce: u32) {
        let age = Instant::now().since(self.vm_created);
        let renewal = self.renew.then(Renewal::now).transpose();
        // Init does not go on with an empty frame: no guest may run with the random numbers of another.
        let frame = renewal
            .ok()
            .and_then(|renewal| self.config.to_frame(age, self.kernel_log, renewal.as_ref()).ok())
            .unwrap_or_default();
        let length = u32::try_from(frame.len()).unwrap_or(0);
        self.answer = [&handshake::response(nonce, length), &*frame].concat();
        self.position = 0;
    }
}

/// Offset of `port::CONFIG_DATA` from the device's first port.
const DATA: u16 = guest_protocol::port::CONFIG_DATA - guest_protocol::port::CONFIG_REQUEST;

impl BusDevice for Configuration {
    fn read(&mut self, offset: u16, data: &mut [u8]) {
        match (offset, data.len()) {
            // The init of earlier versions reads the length of its frame here. It does not take an empty
            // frame for one, and says that init and VMM are of different versions.
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

    fn read(device: &mut Configuration, offset: u16, length: usize) -> Vec<u8> {
        let mut data = vec![0xff; length];
        device.read(offset, &mut data);
        data
    }

    /// Writes the nonce and reads the answer in pieces; the frame.
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
    fn the_frame_is_read_in_pieces_and_can_be_read_again() {
        let mut device = device();
        for nonce in [0, 0x1234_5678] {
            let bytes = request(&mut device, nonce);
            let items: Vec<_> = frame::decode(&bytes).unwrap().map(Result::unwrap).collect();
            assert_eq!(items[..3], [Item::Argument(b"/bin/true"), Item::UserId(1000), Item::GroupId(0)]);
            assert!(matches!(items[3], Item::VmAge(_)));
            assert_eq!(read(&mut device, DATA, 3), [0; 3], "behind the end are zeroes");
        }
    }

    #[test]
    fn a_kernel_that_booted_before_renews_its_time_and_its_random_numbers() {
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
    fn odd_accesses_do_no_harm() {
        let mut device = device();
        assert_eq!(read(&mut device, 0, 1), [0xff]);
        assert_eq!(read(&mut device, 0, 8), [0xff; 8]);
        assert_eq!(read(&mut device, 1, 4), [0xff; 4]);
        for (offset, data) in [(0, &[][..]), (0, &[1; 3]), (0, &[1; 8]), (1, &[1; 4]), (DATA, &[1; 4])] {
            assert_eq!(device.write(offset, data), None);
            assert_eq!(
                read(&mut device, DATA, 16),
                [0; 16],
                "{} bytes at {offset} are no request",
                data.len()
            );
        }
        assert_eq!(device.write(0, &[0; 4]), None);
        assert_eq!(read(&mut device, DATA, 100_000).len(), 100_000);
        assert!(read(&mut device, DATA, 0).is_empty());
    }

    #[test]
    fn the_init_of_an_earlier_version_reads_an_empty_frame() {
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
