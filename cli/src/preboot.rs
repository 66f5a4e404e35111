//! `kindling preboot`: boots an image's kernel once, for all later starts on this host.

use crate::devices::DeviceArguments;
use crate::{STATUS_BAD_REQUEST, STATUS_FAILURE, tell};
use clap::Args;
use kindling::launch::{self, LaunchError};
use kindling::vmm::config::image::Image;
use kindling::vmm::config::{Config, ConfigError, MachineConfig};
use kindling::vmm::control::Monitor;
use std::path::PathBuf;

#[derive(Args, Debug, PartialEq, Eq)]
pub(crate) struct Arguments {
    /// Folder made by `cargo xtask build-image`; the result goes into its subfolder `preboot`
    #[arg(long, value_name = "DIR")]
    image: PathBuf,
    /// Memory of the guests in MiB
    #[arg(long, value_name = "MIB", default_value_t = MachineConfig::default().mem_size_mib)]
    memory: u64,
    /// Virtual processors of the guests, 1 to 16
    #[arg(long, value_name = "N", default_value_t = MachineConfig::default().vcpu_count.into())]
    vcpus: u64,
    #[command(flatten)]
    devices: DeviceArguments,
}

/// The exit status where the file is there.
const STATUS_MADE: u8 = 0;

/// Makes the file and names it.
pub(crate) fn run(arguments: &Arguments) -> u8 {
    match make(arguments) {
        Ok(path) => {
            tell(&format!("kindling: {} is there for `kindling boot`\n", path.display()));
            STATUS_MADE
        }
        Err(error) => {
            crate::complain_of_launch(&error);
            if error.is_users() { STATUS_BAD_REQUEST } else { STATUS_FAILURE }
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
