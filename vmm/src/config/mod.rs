//! The configuration of a machine: plain data, which is validated in this module only.
//!
//! Names are those of Firecracker's configuration where it has an equivalent field.

pub mod devices;
pub mod image;
pub(crate) mod jail;
mod json;
mod null;

pub use devices::Devices;
pub use guest_protocol::config::{BootInfo, Mount, MountKind, Network};
pub(crate) use json::read_bounded;
pub use json::{FileConfig, from_json_file};

use crate::layout::{COMMAND_LINE_MAX, DEVICES_MAX, VCPUS_MAX};
use guest_protocol::frame::FrameError;
use jail::Jail;
use serde::{Deserialize, Serialize};
use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// The configuration for init: payload, environment, mounts, network. Strings are lists of bytes.
pub type GuestConfig = guest_protocol::config::GuestConfig<Vec<Vec<u8>>>;

/// The configuration of one machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Config {
    /// The kernel to boot.
    pub boot_source: BootSource,
    /// Number of vCPUs and memory size.
    pub machine: MachineConfig,
    /// Destination of the serial console.
    pub console: Console,
    /// The virtio devices.
    pub devices: Devices,
    /// The payload, which init runs.
    pub guest: GuestConfig,
    /// What to record during the boot; `None` by default, because recording slows the boot down.
    pub profile: Option<ProfileConfig>,
    /// Path of a pre-booted kernel ([`crate::control::Monitor::start_preboot`]). The machine continues from it if the
    /// file exists and matches the configuration and the host; otherwise it boots.
    pub preboot: Option<PathBuf>,
    /// Path of a snapshot ([`crate::control::Monitor::start_for_snapshot`]), from which the machine continues instead. If that is
    /// not possible, the machine does not start.
    pub snapshot: Option<PathBuf>,
    /// The jail of `kindling-vmm`. A machine in the calling process has none.
    pub jail: Jail,
}

/// The interrupt controllers of a machine in addition to the local APICs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum InterruptControllers {
    /// Those of a PC: two 8259 and an I/O APIC, all emulated by KVM. They work with every kernel.
    #[default]
    Pc,
    /// Only an I/O APIC. Kernels boot faster, because they do not initialize the 8259 controllers. The kernel must read
    /// the MP table, or need no interrupt line.
    IoApic,
}

/// The kernel, its initrd and its command line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct BootSource {
    /// Path of the kernel: an uncompressed ELF `vmlinux`, or a `bzImage`.
    pub kernel_image_path: PathBuf,
    /// Path of the initramfs; `None` without one.
    pub initrd_path: Option<PathBuf>,
    /// The kernel command line: at most 2047 bytes.
    pub boot_args: String,
    /// The interrupt controllers that the kernel requires.
    pub interrupt_controllers: InterruptControllers,
    /// Maximum number of vCPUs that the kernel supports.
    pub vcpus_max: u8,
    /// Digests of kernel and initrd, if both come from an image.
    pub image_digests: Option<image::Digests>,
}

impl BootSource {
    /// A kernel with the default command line and without an initrd.
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

/// Number of vCPUs and memory size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineConfig {
    /// Number of vCPUs: 1 to 16.
    pub vcpu_count: u8,
    /// Memory size in MiB: at least 16, and at most the memory of the host.
    pub mem_size_mib: u64,
}

impl Default for MachineConfig {
    fn default() -> Self {
        Self { vcpu_count: 1, mem_size_mib: 128 }
    }
}

/// What to record during a boot, in addition to VM exits and the kernel log.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProfileConfig {
    /// Interval between two samples of the instruction pointer of each vCPU; `None` disables sampling.
    pub sample_interval: Option<Duration>,
    /// Addresses of kernel functions whose first call is recorded: at most
    /// [`FUNCTIONS_MAX`](crate::function_marks::FUNCTIONS_MAX).
    pub functions: Vec<u64>,
}

/// Destination of the serial console.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Console {
    /// Standard output and standard input of this process.
    Stdio,
    /// Output is discarded, and there is no input.
    Null,
    /// Output to this file, which is created or truncated; no input.
    File(PathBuf),
}

/// An invalid configuration.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// An unsupported number of vCPUs.
    #[error("the number of vCPUs (vcpu_count) is {0}; a machine has 1 to {VCPUS_MAX}")]
    VcpuCount(u64),
    /// More vCPUs than the kernel of the image supports.
    #[error(
        "the number of vCPUs (vcpu_count) is {asked}, but the kernel of this image was built for {max}; build an image without \
         the fragment that limits it (uniprocessor)"
    )]
    KernelVcpus {
        /// The configured number of vCPUs.
        asked: u8,
        /// The number of vCPUs that the kernel supports.
        max: u8,
    },
    /// Less memory than a Linux guest needs, in MiB.
    #[error("the memory (mem_size_mib) is {0} MiB; a Linux guest needs at least {MEMORY_MIN_MIB} MiB")]
    MemoryTooSmall(u64),
    /// More memory than the host has.
    #[error("the memory (mem_size_mib) is {asked} MiB, but this host has {host} MiB in all")]
    MemoryTooLarge {
        /// The configured size in MiB.
        asked: u64,
        /// Memory of the host in MiB.
        host: u64,
    },
    /// A kernel command line that is too long, with its length in bytes.
    #[error("the kernel command line has {0} bytes; the kernel takes at most {COMMAND_LINE_MAX}")]
    CommandLineTooLong(usize),
    /// A NUL byte in a string that is NUL-terminated in the guest.
    #[error("{0} has a NUL byte in it")]
    NulByte(&'static str),
    /// An environment entry that is not of the form `NAME=value`.
    #[error("the environment entry {0:?} is not of the form NAME=VALUE")]
    Environment(String),
    /// The user or group id 4294967295, which means "unchanged" in system calls.
    #[error("user and group ids go from 0 to 4294967294")]
    Id,
    /// Arguments and environment that exceed the limits of Linux, or a configuration that does not fit into a frame.
    #[error(transparent)]
    Payload(#[from] FrameError),
    /// A configuration file or image that cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The host's error.
        source: io::Error,
    },
    /// A file that is too large for a configuration.
    #[error("{} is larger than a configuration file can be ({limit} bytes)", path.display())]
    FileTooLarge {
        /// The file.
        path: PathBuf,
        /// Maximum size in bytes.
        limit: u64,
    },
    /// A configuration file or image description that is not valid.
    #[error("{} is not valid: {message}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// The field, its position, and the expected value.
        message: String,
    },
    /// A field with a value that is not supported.
    #[error("{field} = {value} is not supported; leave it out or set it to {supported}")]
    Unsupported {
        /// The name of the field in the file.
        field: &'static str,
        /// The configured value.
        value: String,
        /// A supported value.
        supported: &'static str,
    },
    /// More devices than a machine has interrupt lines for.
    #[error("{0} devices are configured; a machine has at most {DEVICES_MAX}")]
    TooManyDevices(usize),
    /// An invalid device name.
    #[error("{0:?} cannot be the name of a device: letters, digits, - and _ are allowed")]
    DeviceId(String),
    /// Two devices with the same name.
    #[error("two devices are called {0:?}")]
    DeviceTwice(String),
    /// A drive without a file.
    #[error("drive {0} has no path_on_host")]
    NoDrivePath(String),
    /// Two root devices.
    #[error("{first} and {second} are both the root device; a machine has one")]
    SecondRoot {
        /// The name of the first.
        first: String,
        /// The name of the second.
        second: String,
    },
    /// A CID that is not valid for a guest.
    #[error("guest_cid is {0}; those of guests go from 3 to 4294967294")]
    GuestCid(u32),
    /// A path that is too long for a Unix socket.
    #[error(
        "{} has {length} bytes; the path of a socket has at most 96, and 11 for the port after it; choose a shorter one",
        path.display()
    )]
    SocketPath {
        /// The path.
        path: PathBuf,
        /// Length of the path in bytes.
        length: usize,
    },
    /// A balloon of the size of the guest's memory or larger.
    #[error("a balloon of {asked} MiB is too large for a guest of {memory} MiB: it needs some itself")]
    BalloonTooLarge {
        /// Size of the balloon in MiB.
        asked: u64,
        /// Memory of the guest in MiB.
        memory: u64,
    },
    /// An invalid value of a network interface.
    #[error("network interface {id}: {what}")]
    Interface {
        /// The name of the network interface.
        id: String,
        /// The problem.
        what: String,
    },
    /// A file of an image that differs from the image's description.
    #[error("{} is not the file that image.json describes: {what}", path.display())]
    ImageFile {
        /// The file.
        path: PathBuf,
        /// The difference.
        what: String,
    },
}

/// With less memory, a Linux kernel with its page tables and an initramfs does not fit.
const MEMORY_MIN_MIB: u64 = 16;

impl Config {
    /// A machine of the default size with this kernel, and with its console on the standard streams.
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
            snapshot: None,
            jail: Jail::default(),
        }
    }

    /// Checks everything that can be checked without opening a file.
    ///
    /// # Errors
    /// Names the first invalid value, and the valid values.
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
        let length = line.len() + crate::layout::virtio_mmio_parameters(self.devices.count()).len();
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
    // setresuid(2) interprets the largest number as "unchanged", which would run the payload as root.
    if [guest.user_id, guest.group_id].contains(&u32::MAX) || guest.groups.contains(&u32::MAX) {
        return Err(ConfigError::Id);
    }
    guest.to_frame(&BootInfo::ALL_SET)?;
    Ok(())
}

/// Memory of this host in MiB.
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
    fn a_kernel_for_one_vcpu_refuses_two() {
        let mut config = config();
        config.boot_source.vcpus_max = 1;
        config.machine.vcpu_count = 1;
        config.validate_on_host(1024).unwrap();
        config.machine.vcpu_count = 2;
        let message = config.validate_on_host(1024).unwrap_err().to_string();
        assert!(
            message
                .contains("number of vCPUs (vcpu_count) is 2, but the kernel of this image was built for 1"),
            "{message}"
        );
    }

    #[test]
    fn the_defaults_are_valid() {
        config().validate_on_host(1000).unwrap();
    }

    #[test]
    fn errors_name_the_invalid_value() {
        let table: [(&str, String); 12] = [
            ("ids go from 0 to 4294967294", error(|c| c.guest.user_id = u32::MAX)),
            ("ids go from 0 to 4294967294", error(|c| c.guest.group_id = u32::MAX)),
            ("number of vCPUs (vcpu_count) is 0;", error(|c| c.machine.vcpu_count = 0)),
            ("number of vCPUs (vcpu_count) is 17;", error(|c| c.machine.vcpu_count = 17)),
            ("memory (mem_size_mib) is 0 MiB;", error(|c| c.machine.mem_size_mib = 0)),
            ("memory (mem_size_mib) is 1 MiB;", error(|c| c.machine.mem_size_mib = 1)),
            (
                "memory (mem_size_mib) is 1001 MiB, but this host has 1000",
                error(|c| c.machine.mem_size_mib = 1001),
            ),
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
    fn values_at_the_limits_are_valid() {
        let mut config = config();
        config.machine = MachineConfig { vcpu_count: 16, mem_size_mib: 1000 };
        config.boot_source.boot_args = "x".repeat(2047);
        config.validate_on_host(1000).unwrap();
        config.machine = MachineConfig { vcpu_count: 1, mem_size_mib: 17 };
        config.validate_on_host(1000).unwrap();
    }
}
