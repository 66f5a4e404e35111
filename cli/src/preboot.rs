//! `kindling preboot`: boots the kernel of an image once, for all later starts on this host.

use crate::devices::DeviceArguments;
use crate::{STATUS_BAD_REQUEST, STATUS_FAILURE, print_stderr};
use clap::Args;
use kindling::launch::{self, LaunchError};
use kindling::vmm::config::image::Image;
use kindling::vmm::config::{Config, ConfigError, MachineConfig};
use kindling::vmm::control::Monitor;
use std::path::PathBuf;

#[derive(Args, Debug, PartialEq, Eq)]
pub(crate) struct Arguments {
    /// Image: a directory made by `cargo xtask build-image`; the pre-booted kernel is written to its directory `preboot`
    #[arg(long, value_name = "DIR")]
    image: PathBuf,
    /// Memory of the guests in MiB
    #[arg(long, value_name = "MIB", default_value_t = MachineConfig::default().mem_size_mib)]
    memory: u64,
    /// Number of vCPUs of the guests, 1 to 16
    #[arg(long, value_name = "N", default_value_t = MachineConfig::default().vcpu_count.into())]
    vcpus: u64,
    #[command(flatten)]
    devices: DeviceArguments,
}

/// Exit status if the file was written.
const STATUS_SUCCESS: u8 = 0;

/// Writes the pre-booted kernel, and prints its path. Returns the exit status.
pub(crate) fn run(arguments: &Arguments) -> u8 {
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
    let mut config = Config { machine, ..image.config(&arguments.image) };
    arguments.devices.add_to(&mut config.devices)?;
    let path = Image::preboot_path(&arguments.image, &machine, &config.devices);
    launch::preboot(&config, &path, Monitor::next_event)?;
    Ok(path)
}
