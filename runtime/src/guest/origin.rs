//! What a guest was started from: with its memory, it makes a template or a snapshot.

use crate::image::{Depends, Image, ImageConfig, Prepared};
use kindling_vmm::config::devices::{NetworkInterface, RootAccess, RootFilesystem};
use kindling_vmm::config::{BootSource, Config, Console, MachineConfig};
use serde::{Deserialize, Serialize};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// Image and machine of a guest without volumes, shared directories, tap devices and limits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Origin {
    /// Path of the root filesystem.
    pub(crate) rootfs: PathBuf,
    /// The image's id, and its configuration. The id is empty for a file that the user has given.
    pub(crate) digest: String,
    settings: ImageConfig,
    kernel: BootSource,
    pub(crate) machine: MachineConfig,
    /// How the guest accesses the root filesystem.
    access: RootAccess,
    /// The network card, if it has one.
    pub(crate) network: Option<NetworkInterface>,
}

impl Origin {
    pub(crate) fn new(config: &Config, prepared: &Prepared) -> Self {
        // Ports are those of each guest.
        let mut network = config.devices.network_interfaces.first().cloned();
        network.iter_mut().for_each(|card| card.forwards.clear());
        Self {
            rootfs: prepared.rootfs.clone(),
            digest: prepared.digest.clone(),
            settings: prepared.config.clone(),
            kernel: config.boot_source.clone(),
            machine: config.machine,
            access: config.devices.root.as_ref().map(|root| root.access).unwrap_or_default(),
            network,
        }
    }

    /// The text for a guest's record.
    pub(crate) fn to_text(&self) -> Option<String> {
        serde_json::to_string(self).ok()
    }

    /// Parses the text of a guest's record. `None` if it is that of another version.
    pub(crate) fn from_text(text: &str) -> Option<Self> {
        serde_json::from_str(text).ok()
    }

    /// The image with this root filesystem; `source` is its name, as the user wrote it.
    pub(crate) fn image(&self, source: OsString, rootfs: PathBuf) -> Image {
        let prepared = Prepared {
            rootfs,
            digest: self.digest.clone(),
            config: self.settings.clone(),
            depends: Depends::default(),
        };
        Image::of_template(source, prepared)
    }

    /// The configuration of a machine that continues from a snapshot, without what each guest has of its own.
    pub(crate) fn config(&self, snapshot: PathBuf, rootfs: &Path) -> Config {
        let mut config = Config::new(self.kernel.clone());
        config.machine = self.machine;
        config.console = Console::Null;
        config.snapshot = Some(snapshot);
        let mut root = RootFilesystem::new(rootfs);
        root.access = self.access;
        config.devices.root = Some(root);
        config.devices.network_interfaces.extend(self.network.clone());
        config
    }
}
