//! What a user may ask for: plain data, validated here and nowhere else.
//!
//! Names are those of Firecracker's JSON where it has the field.

pub mod devices;
pub mod image;
mod json;
mod limits;
mod network;
mod null;

pub use devices::Devices;
pub use guest_protocol::config::{BootInfo, Mount, MountKind, Network};
pub(crate) use json::read_bounded;
pub use json::{FileConfig, from_json_file};

use crate::layout::{COMMAND_LINE_MAX, DEVICES_MAX, VCPUS_MAX};
use guest_protocol::frame::FrameError;
use serde::{Deserialize, Serialize};
use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// What the guest runs and how. Strings are lists of bytes.
pub type GuestConfig = guest_protocol::config::GuestConfig<Vec<Vec<u8>>>;

/// Everything that makes one machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// What to boot.
    pub boot_source: BootSource,
    /// vCPUs and memory.
    pub machine: MachineConfig,
    /// Where the serial console leads.
    pub console: Console,
    /// Its virtio devices.
    pub devices: Devices,
    /// What init runs.
    pub guest: GuestConfig,
    /// What to record of the boot; nothing by default, because recording costs time.
    pub profile: Option<ProfileConfig>,
    /// File of a pre-booted kernel ([`crate::preboot::make`]), which the machine continues from where it
    /// exists and fits. Otherwise the machine boots.
    pub preboot: Option<PathBuf>,
}

/// Which interrupt controllers a machine has beside the local APICs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum InterruptControllers {
    /// Those of a PC: two 8259 and an I/O APIC, all inside KVM. Every kernel finds its interrupts.
    #[default]
    Pc,
    /// An I/O APIC alone. A kernel that reads the MP table or, without one, needs no interrupt line
    /// boots faster, because it does not set up what is not there.
    IoApic,
}

/// Kernel, initrd and command line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootSource {
    /// An uncompressed `vmlinux` or a `bzImage`.
    pub kernel_image_path: PathBuf,
    /// An initramfs, if any.
    pub initrd_path: Option<PathBuf>,
    /// The kernel command line; at most 2047 bytes.
    pub boot_args: String,
    /// What the kernel expects for its interrupt lines.
    pub interrupt_controllers: InterruptControllers,
    /// vCPUs that the kernel was built for.
    pub vcpus_max: u8,
    /// Digests of kernel and initrd where both come from an image, which names them.
    pub image_digests: Option<image::Digests>,
}

impl BootSource {
    /// A kernel with the default command line and no initrd.
    #[must_use]
    pub fn kernel(path: impl Into<PathBuf>) -> Self {
        Self {
            kernel_image_path: path.into(),
            initrd_path: None,
            boot_args: guest_protocol::DEFAULT_COMMAND_LINE.to_owned(),
            interrupt_controllers: InterruptControllers::default(),
            vcpus_max: VCPUS_MAX,
            image_digests: None,
        }
    }
}

/// vCPUs and memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineConfig {
    /// 1 to 16.
    pub vcpu_count: u8,
    /// MiB of memory: at least 16, at most what the host has.
    pub mem_size_mib: u64,
}

impl Default for MachineConfig {
    fn default() -> Self {
        Self { vcpu_count: 1, mem_size_mib: 128 }
    }
}

/// What to record beside exits and the kernel's log.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProfileConfig {
    /// How often to look where a vCPU is; not at all where there is none.
    pub sample_interval: Option<Duration>,
    /// Functions of the kernel whose first calls are recorded, by their addresses: at most
    /// [`FUNCTIONS_MAX`](crate::function_marks::FUNCTIONS_MAX).
    pub functions: Vec<u64>,
}

/// Where the serial console leads.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Console {
    /// Output to this process's standard output, input from its standard input.
    Stdio,
    /// Output to nowhere, no input.
    Null,
    /// Output to a file, which is created or emptied; no input.
    File(PathBuf),
}

/// What is wrong with a configuration.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A number of vCPUs that no machine has.
    #[error("vcpu_count is {0}; a machine has 1 to {VCPUS_MAX} vCPUs")]
    VcpuCount(u64),
    /// More vCPUs than the image's kernel can use.
    #[error(
        "vcpu_count is {asked}, but the kernel of this image was built for {max}; build an image without \
         the fragment that limits it (uniprocessor)"
    )]
    KernelVcpus {
        /// vCPUs asked for.
        asked: u8,
        /// vCPUs that the kernel can use.
        max: u8,
    },
    /// Less memory than a kernel needs.
    #[error("mem_size_mib is {0}; a Linux guest needs at least {MEMORY_MIN_MIB} MiB")]
    MemoryTooSmall(u64),
    /// More memory than the host has.
    #[error("mem_size_mib is {asked}, but this host has {host} MiB in all")]
    MemoryTooLarge {
        /// MiB asked for.
        asked: u64,
        /// MiB of memory of the host.
        host: u64,
    },
    /// A command line that no kernel takes.
    #[error("the kernel command line has {0} bytes; the kernel takes at most {COMMAND_LINE_MAX}")]
    CommandLineTooLong(usize),
    /// A NUL inside a string that ends with one.
    #[error("{0} has a NUL byte in it")]
    NulByte(&'static str),
    /// An environment entry without a name.
    #[error("the environment entry {0:?} is not of the form NAME=VALUE")]
    Environment(String),
    /// An id that stands for "leave it as it is".
    #[error("user and group ids go from 0 to 4294967294")]
    Id,
    /// Arguments and environment that Linux does not take, or a configuration that does not fit a frame.
    #[error(transparent)]
    Payload(#[from] FrameError),
    /// A configuration file or image that cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// A file that is far larger than any configuration.
    #[error("{} is larger than a configuration file can be ({limit} bytes)", path.display())]
    FileTooLarge {
        /// The file.
        path: PathBuf,
        /// Largest size in bytes.
        limit: u64,
    },
    /// A configuration file or image description that is not what it should be.
    #[error("{} is not valid: {message}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Which field, where, and what was expected.
        message: String,
    },
    /// A field whose value names something that does not exist yet.
    #[error("{field} = {value} is not supported; leave it out or set it to {supported}")]
    Unsupported {
        /// The field's name in the file.
        field: &'static str,
        /// The value that was asked for.
        value: String,
        /// A value that works.
        supported: &'static str,
    },
    /// More devices than a machine has lines for.
    #[error("{0} devices were asked for; a machine has at most {DEVICES_MAX}")]
    TooManyDevices(usize),
    /// A name of a device that cannot be one.
    #[error("{0:?} cannot be the name of a device: letters, digits, - and _ are allowed")]
    DeviceId(String),
    /// Two devices with one name.
    #[error("two devices are called {0:?}")]
    DeviceTwice(String),
    /// A drive without a file.
    #[error("drive {0} has no path_on_host")]
    NoDrivePath(String),
    /// Two devices that the kernel is to mount as its root.
    #[error("{first} and {second} are both the root device; a machine has one")]
    SecondRoot {
        /// The name of one.
        first: String,
        /// The name of another.
        second: String,
    },
    /// A device on the command line that cannot be understood.
    #[error("--{option} {value}: {what}")]
    DeviceOption {
        /// The option's name.
        option: &'static str,
        /// Its value.
        value: String,
        /// What is wrong, and what it may be.
        what: String,
    },
    /// A number that is not a guest's.
    #[error("guest_cid is {0}; those of guests go from 3 to 4294967294")]
    GuestCid(u32),
    /// A path that no Unix socket can have.
    #[error(
        "{} has {length} bytes; the path of a socket can have 96, and 11 for the port behind it; choose a shorter one",
        path.display()
    )]
    SocketPath {
        /// The path.
        path: PathBuf,
        /// Its length.
        length: usize,
    },
    /// A path at which the vsock's socket cannot be.
    #[error("{} cannot be the vsock's socket: {what}", path.display())]
    VsockSocket {
        /// The path.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A file that cannot be the one behind a device.
    #[error("{} cannot be a drive: {what}", path.display())]
    DriveFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A file that a guest cannot have as memory.
    #[error("{} cannot be memory of a guest: {what}", path.display())]
    PmemFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A folder that cannot be shared with a guest.
    #[error("cannot share {}: {what}", path.display())]
    SharedFolder {
        /// The folder.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A balloon that would take everything.
    #[error("a balloon of {asked} MiB is too large for a guest of {memory} MiB: it needs some itself")]
    BalloonTooLarge {
        /// MiB of the balloon.
        asked: u64,
        /// MiB of the guest.
        memory: u64,
    },
    /// An interface of the host that cannot be the other end of a network card.
    #[error("{name} cannot be the other end of a network card: {what}")]
    InterfaceDevice {
        /// Its name, or `user` for passt.
        name: String,
        /// What is wrong with it, and what to do.
        what: String,
    },
    /// A value of a network interface that none can have.
    #[error("network interface {id}: {what}")]
    Interface {
        /// The interface's name.
        id: String,
        /// What is wrong with it.
        what: String,
    },
    /// A file of an image that is not the one its description names.
    #[error("{} is not the file that image.json describes: {what}", path.display())]
    ImageFile {
        /// The file.
        path: PathBuf,
        /// How it differs.
        what: String,
    },
}

/// Less memory than this holds no Linux kernel with its page tables and an initramfs.
const MEMORY_MIN_MIB: u64 = 16;

impl Config {
    /// A machine of the default size that boots this, with its console on the standard streams.
    #[must_use]
    pub fn new(boot_source: BootSource) -> Self {
        Self {
            boot_source,
            machine: MachineConfig::default(),
            console: Console::Stdio,
            devices: Devices::default(),
            guest: GuestConfig::default(),
            profile: None,
            preboot: None,
        }
    }

    /// Checks everything that can be checked without opening a file.
    ///
    /// # Errors
    /// Names the first value that is wrong, and what it may be.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.validate_on_host(host_memory_mib())
    }

    fn validate_on_host(&self, host_mib: u64) -> Result<(), ConfigError> {
        let machine = &self.machine;
        if !(1..=VCPUS_MAX).contains(&machine.vcpu_count) {
            return Err(ConfigError::VcpuCount(machine.vcpu_count.into()));
        }
        let max = self.boot_source.vcpus_max;
        if machine.vcpu_count > max {
            return Err(ConfigError::KernelVcpus { asked: machine.vcpu_count, max });
        }
        if machine.mem_size_mib < MEMORY_MIN_MIB {
            return Err(ConfigError::MemoryTooSmall(machine.mem_size_mib));
        }
        if machine.mem_size_mib > host_mib {
            return Err(ConfigError::MemoryTooLarge { asked: machine.mem_size_mib, host: host_mib });
        }
        self.devices.validate(machine.mem_size_mib)?;
        let line = &self.boot_source.boot_args;
        let length = line.len() + crate::layout::announced(self.devices.count()).len();
        if length > COMMAND_LINE_MAX {
            return Err(ConfigError::CommandLineTooLong(length));
        }
        if line.contains('\0') {
            return Err(ConfigError::NulByte("the kernel command line"));
        }
        validate_guest(&self.guest)
    }
}

fn validate_guest(guest: &GuestConfig) -> Result<(), ConfigError> {
    let strings = guest
        .arguments
        .iter()
        .map(|bytes| ("an argument of the payload", bytes))
        .chain(guest.environment.iter().map(|bytes| ("an environment entry", bytes)))
        .chain(guest.working_directory.iter().map(|bytes| ("the working directory", bytes)))
        .chain(guest.hostname.iter().map(|bytes| ("the hostname", bytes)))
        .chain(guest.root_device.iter().map(|bytes| ("the root device", bytes)))
        .chain(guest.mounts.iter().map(|mount| ("the source of a mount", &mount.source)))
        .chain(guest.mounts.iter().map(|mount| ("the target of a mount", &mount.target)));
    for (what, bytes) in strings {
        if bytes.contains(&0) {
            return Err(ConfigError::NulByte(what));
        }
    }
    for entry in &guest.environment {
        if entry.iter().position(|&byte| byte == b'=').is_none_or(|at| at == 0) {
            return Err(ConfigError::Environment(String::from_utf8_lossy(entry).into_owned()));
        }
    }
    // setresuid takes the largest number for "unchanged", which would leave the payload root.
    if [guest.user_id, guest.group_id].contains(&u32::MAX) || guest.groups.contains(&u32::MAX) {
        return Err(ConfigError::Id);
    }
    guest.to_frame(&BootInfo::LONGEST)?;
    Ok(())
}

/// MiB of memory of this host.
fn host_memory_mib() -> u64 {
    let info = rustix::system::sysinfo();
    (info.totalram as u64).saturating_mul(info.mem_unit.into()) / crate::layout::MIB
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Config {
        Config { console: Console::Null, ..Config::new(BootSource::kernel("vmlinux")) }
    }

    fn error(change: impl FnOnce(&mut Config)) -> String {
        let mut config = config();
        change(&mut config);
        config.validate_on_host(1000).unwrap_err().to_string()
    }

    #[test]
    fn a_kernel_for_one_vcpu_is_not_given_two() {
        let mut config = config();
        config.boot_source.vcpus_max = 1;
        config.machine.vcpu_count = 1;
        config.validate_on_host(1024).unwrap();
        config.machine.vcpu_count = 2;
        let message = config.validate_on_host(1024).unwrap_err().to_string();
        assert!(
            message.contains("vcpu_count is 2, but the kernel of this image was built for 1"),
            "{message}"
        );
    }

    #[test]
    fn the_defaults_are_valid() {
        config().validate_on_host(1000).unwrap();
    }

    #[test]
    fn bad_values_are_named() {
        let table: [(&str, String); 12] = [
            ("ids go from 0 to 4294967294", error(|c| c.guest.user_id = u32::MAX)),
            ("ids go from 0 to 4294967294", error(|c| c.guest.group_id = u32::MAX)),
            ("vcpu_count is 0;", error(|c| c.machine.vcpu_count = 0)),
            ("vcpu_count is 17;", error(|c| c.machine.vcpu_count = 17)),
            ("mem_size_mib is 0;", error(|c| c.machine.mem_size_mib = 0)),
            ("mem_size_mib is 1;", error(|c| c.machine.mem_size_mib = 1)),
            ("mem_size_mib is 1001, but this host has 1000", error(|c| c.machine.mem_size_mib = 1001)),
            (
                "2048 bytes; the kernel takes at most 2047",
                error(|c| c.boot_source.boot_args = "x".repeat(2048)),
            ),
            ("the kernel command line has a NUL", error(|c| c.boot_source.boot_args = "a\0b".into())),
            ("an argument of the payload has a NUL", error(|c| c.guest.arguments = vec![b"\0".into()])),
            ("the environment entry \"=x\"", error(|c| c.guest.environment = vec![b"=x".into()])),
            (
                "has 131072 bytes; Linux takes at most",
                error(|c| c.guest.arguments = vec![vec![b'x'; 1 << 17]]),
            ),
        ];
        for (expected, message) in table {
            assert!(message.contains(expected), "{message:?} should say {expected:?}");
        }
    }

    #[test]
    fn the_limits_themselves_are_valid() {
        let mut config = config();
        config.machine = MachineConfig { vcpu_count: 16, mem_size_mib: 1000 };
        config.boot_source.boot_args = "x".repeat(2047);
        config.validate_on_host(1000).unwrap();
        config.machine = MachineConfig { vcpu_count: 1, mem_size_mib: 17 };
        config.validate_on_host(1000).unwrap();
    }
}
