//! Configuration of the virtio devices, with one file for each kind of device. The structures are the sections of
//! Firecracker's configuration file; fields that Firecracker does not have are optional.

mod balloon;
mod drive;
mod entropy;
mod folder;
mod limits;
mod network;
mod pmem;
mod vsock;

pub use balloon::Balloon;
pub use drive::{CacheType, Drive, IoEngine, RootAccess, RootFilesystem};
pub use entropy::Entropy;
pub use folder::SharedFolder;
pub use limits::{RateLimiter, TokenBucket};
pub use network::{InterfaceAddress, MacAddress, NetworkInterface, PortForward, Protocol, user_network};
pub use pmem::Pmem;
pub use vsock::Vsock;

use super::ConfigError;
use crate::layout::DEVICES_MAX;
use guest_protocol::config::Network;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// Generates [`Devices`] and [`DeviceConfig`], whose fields and variants are in the order of the list.
macro_rules! device_kinds {
    ($($(#[$doc:meta])* $field:ident: $container:ident<$kind:ident>,)*) => {
        /// The virtio devices of a machine, in the order in which the guest discovers them.
        #[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[non_exhaustive]
        pub struct Devices {
            $($(#[$doc])* pub $field: $container<$kind>,)*
        }

        /// The configuration of one device.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[non_exhaustive]
        pub enum DeviceConfig<'a> {
            $($(#[$doc])* $kind(&'a $kind),)*
        }

        impl Devices {
            /// All devices, in the order of their register addresses.
            pub fn iter(&self) -> impl Iterator<Item = DeviceConfig<'_>> {
                std::iter::empty()$(.chain(self.$field.iter().map(DeviceConfig::$kind)))*
            }
        }

        impl<'a> DeviceConfig<'a> {
            const fn kind(self) -> &'a dyn DeviceKind {
                match self {
                    $(Self::$kind(config) => config,)*
                }
            }
        }
    };
}

// The order is that of the devices' registers, and so part of what a pre-booted kernel depends on.
device_kinds! {
    /// Block devices: /dev/vda, /dev/vdb and so on in the guest.
    drives: Vec<Drive>,
    /// The image's root filesystem, which init mounts. It is the block device after the drives, so that the names of
    /// the drives do not depend on the image.
    root: Option<RootFilesystem>,
    /// Network devices: eth0, eth1 and so on in the guest.
    network_interfaces: Vec<NetworkInterface>,
    /// The socket device.
    vsock: Option<Vsock>,
    /// The entropy device.
    entropy: Option<Entropy>,
    /// The memory balloon device.
    balloon: Option<Balloon>,
    /// Persistent memory devices: /dev/pmem0, /dev/pmem1 and so on in the guest.
    pmem: Vec<Pmem>,
    /// Shared folders, which the guest mounts by their tags.
    shared_folders: Vec<SharedFolder>,
}

/// A kind of device, as far as its configuration determines it.
pub(super) trait DeviceKind {
    /// The properties of the device.
    fn describe(&self) -> Description<'_>;

    /// Checks what can be checked without opening a file. `memory` is the size of the guest's memory in MiB.
    fn validate(&self, _memory: u64) -> Result<(), ConfigError> {
        Ok(())
    }
}

/// What a machine has to know of a device, whatever its kind.
#[derive(Clone, Copy, Debug)]
pub(super) struct Description<'a> {
    /// The name of the device.
    name: &'a str,
    /// Whether the user chooses the name.
    is_named: bool,
    /// The letter of the kind. Names of pre-booted kernels contain those of all devices.
    letter: char,
    /// Whether no state of the device outlives the guest, see [`Devices::are_private`].
    is_private: bool,
    /// Whether the guest's kernel mounts the device as its root filesystem.
    is_root_device: bool,
}

impl<'a> DeviceConfig<'a> {
    /// The name of the device.
    #[must_use]
    pub fn name(self) -> &'a str {
        self.kind().describe().name
    }
}

impl Devices {
    /// The name in the guest of the block device with this number, from 0: /dev/vda, /dev/vdb and so on.
    #[must_use]
    pub fn drive_name(number: usize) -> String {
        // Validation refuses more devices than there are letters.
        let letter = ('a'..='z').nth(number).unwrap_or('z');
        format!("/dev/vd{letter}")
    }

    /// The name in the guest of the image's root filesystem, if there is one.
    pub(crate) fn root_name(&self) -> Option<String> {
        self.root.as_ref().map(|root| match root.access.window() {
            None => Self::drive_name(self.drives.len()),
            // It precedes the pmem devices.
            Some(_) => "/dev/pmem0".to_owned(),
        })
    }

    /// Whether the machine shares no state with others that outlives it: no disks, pmem files or folders, which the
    /// guest must leave in a consistent state, and no network devices, whose host interface may be reused.
    #[must_use]
    pub fn are_private(&self) -> bool {
        self.iter().all(|device| device.kind().describe().is_private)
    }

    /// Number of devices.
    #[must_use]
    pub fn count(&self) -> usize {
        self.iter().count()
    }

    /// One letter per device, for its kind: **d**isk, **r**ead-only disk, **n**etwork, **v**sock, **e**ntropy,
    /// **b**alloon, **m**emory (pmem), **f**older; **x** and **y** for the windows of a root filesystem.
    #[must_use]
    pub fn kinds(&self) -> String {
        self.iter().map(|device| device.kind().describe().letter).collect()
    }

    /// Checks everything that can be checked without opening a file. `memory` is the size of the guest's memory in MiB.
    pub(super) fn validate(&self, memory: u64) -> Result<(), ConfigError> {
        if self.count() > DEVICES_MAX {
            return Err(ConfigError::TooManyDevices(self.count()));
        }
        let (mut seen, mut root) = (BTreeSet::new(), None);
        for kind in self.iter().map(DeviceConfig::kind) {
            let Description { name, is_named, is_root_device, .. } = kind.describe();
            if is_named && !is_name(name) {
                return Err(ConfigError::DeviceId(name.to_owned()));
            }
            if is_named && !seen.insert(name) {
                return Err(ConfigError::DeviceTwice(name.to_owned()));
            }
            kind.validate(memory)?;
            if is_root_device && let Some(first) = root.replace(name) {
                return Err(ConfigError::SecondRoot { first: first.to_owned(), second: name.to_owned() });
            }
        }
        Ok(())
    }

    /// The network configuration for init.
    pub(crate) fn guest_networks(&self) -> Vec<Network> {
        (0..)
            .zip(&self.network_interfaces)
            .filter_map(|(card, interface)| interface.guest_network(card))
            .collect()
    }
}

fn is_name(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-".contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_root_filesystem_comes_after_the_drives() {
        let root = Some(RootFilesystem::new("root.erofs"));
        let mut devices = Devices { root, ..Devices::default() };
        assert_eq!((devices.root_name().as_deref(), devices.count()), (Some("/dev/vda"), 1));
        devices.drives.push(Drive::new("d", "file"));
        assert_eq!(devices.root_name().as_deref(), Some("/dev/vdb"));
        assert_eq!(devices.kinds(), "dr");
        assert_eq!(devices.iter().map(DeviceConfig::name).collect::<Vec<_>>(), ["d", "root"]);
        devices.root = None;
        assert_eq!(devices.root_name(), None);
    }
}
