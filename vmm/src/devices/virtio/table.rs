//! The table of device kinds: each configuration's way to its device.

use super::backend::Attach;
use crate::config::devices::DeviceConfig;

/// The configuration as its device's file implements it.
pub(crate) const fn kind(config: DeviceConfig<'_>) -> &dyn Attach {
    match config {
        DeviceConfig::Drive(drive) => drive,
        DeviceConfig::RootFilesystem(root) => root,
        DeviceConfig::NetworkInterface(interface) => interface,
        DeviceConfig::Vsock(vsock) => vsock,
        DeviceConfig::Entropy(entropy) => entropy,
        DeviceConfig::Balloon(balloon) => balloon,
        DeviceConfig::Pmem(pmem) => pmem,
        DeviceConfig::SharedFolder(folder) => folder,
    }
}
