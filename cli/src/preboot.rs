//! `kindling preboot`: boots the kernel of an image once, for all later starts on this host.

use crate::command_line::{Command, Opt, Store, option};
use crate::devices::{DeviceArguments, DeviceOptions};
use crate::{STATUS_BAD_REQUEST, STATUS_FAILURE, print_stderr};
use kindling::launch::{self, LaunchError};
use kindling::vmm::config::image::Image;
use kindling::vmm::config::{ConfigError, MachineConfig};
use kindling::vmm::control::Monitor;
use std::path::PathBuf;

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Arguments {
    image: PathBuf,
    memory: u64,
    vcpus: u64,
    devices: DeviceArguments,
}

impl Default for Arguments {
    fn default() -> Self {
        let MachineConfig { vcpu_count, mem_size_mib } = MachineConfig::default();
        Self {
            image: PathBuf::new(),
            memory: mem_size_mib,
            vcpus: vcpu_count.into(),
            devices: DeviceArguments::default(),
        }
    }
}

impl AsMut<DeviceArguments> for Arguments {
    fn as_mut(&mut self) -> &mut DeviceArguments {
        &mut self.devices
    }
}

pub(crate) const COMMAND: Command<Arguments> =
    Command::new("preboot", "Pre-boot the kernel of an image, from which `kindling boot` continues", run)
        .options(OPTIONS)
        .more_options(DeviceOptions::TABLE)
        .check(check);

#[rustfmt::skip]
const OPTIONS: &[Opt<Arguments>] = &[
    option("", "image", "DIR", |all, word| all.image.store(word),
        "Image: a directory made by `cargo xtask build-image`; the pre-booted kernel is written to its \
         directory `preboot`"),
    option("", "memory", "MIB", |all, word| all.memory.store(word),
        "Memory of the guests in MiB [default: 128]"),
    option("", "vcpus", "N", |all, word| all.vcpus.store(word),
        "Number of vCPUs of the guests, 1 to 16 [default: 1]"),
];

fn check(arguments: &Arguments) -> Result<(), String> {
    if arguments.image.as_os_str().is_empty() { Err("--image is missing".to_owned()) } else { Ok(()) }
}

/// Exit status if the file was written.
const STATUS_SUCCESS: u8 = 0;

/// Writes the pre-booted kernel, and prints its path. Returns the exit status.
fn run(arguments: &Arguments, _: kindling::vmm::Instant) -> u8 {
    match make(arguments) {
        Ok(path) => {
            print_stderr(&format!("kindling: wrote {}; `kindling boot` continues from it\n", path.display()));
            STATUS_SUCCESS
        }
        Err(error) => {
            crate::print_launch_error(&error);
            if error.is_user_error() { STATUS_BAD_REQUEST } else { STATUS_FAILURE }
        }
    }
}

fn make(arguments: &Arguments) -> Result<PathBuf, LaunchError> {
    let vcpu_count = u8::try_from(arguments.vcpus).map_err(|_| ConfigError::VcpuCount(arguments.vcpus))?;
    let machine = MachineConfig { vcpu_count, mem_size_mib: arguments.memory };
    let image = Image::open(&arguments.image)?;
    image.verify(&arguments.image)?;
    let mut config = image.config(&arguments.image);
    config.machine = machine;
    arguments.devices.add_to(&mut config.devices)?;
    let path = Image::preboot_path(&arguments.image, &machine, &config.devices);
    launch::preboot(&config, &path, Monitor::next_event)?;
    Ok(path)
}
