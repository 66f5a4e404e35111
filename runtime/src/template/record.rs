//! The record of a template.

use super::{MEMORY, RECORD, ROOT, TemplateError};
use crate::image::{Depends, Image, ImageConfig, Prepared};
use kindling_vmm::config::devices::{NetworkInterface, RootAccess, RootFilesystem};
use kindling_vmm::config::{BootSource, Config, Console, MachineConfig};
use serde::{Deserialize, Serialize};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// Maximum size in bytes.
const RECORD_MAX: u64 = 1 << 20;

/// The record of a template.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    /// Image, as the user wrote it.
    pub(super) image: String,
    /// The image's id, and its configuration.
    digest: String,
    settings: ImageConfig,
    /// In seconds since 1970.
    pub(super) created: u64,
    /// The kernel, which the snapshot has.
    kernel: BootSource,
    pub(super) machine: MachineConfig,
    /// How the guest accesses the root filesystem.
    access: RootAccess,
    /// The network card, if it has one.
    pub(super) network: Option<NetworkInterface>,
    /// The version of the root filesystem, which guests rely on.
    root: Version,
}

/// What changes when a file is rewritten.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Version {
    length: u64,
    /// Seconds and nanoseconds.
    modified: (i64, i64),
}

impl Version {
    fn of(path: &Path) -> io::Result<Self> {
        let metadata = path.metadata()?;
        Ok(Self { length: metadata.len(), modified: (metadata.mtime(), metadata.mtime_nsec()) })
    }
}

impl Record {
    /// The record of a template whose root filesystem is the file `root`.
    pub(super) fn new(config: Config, image: &Image, root: &Path) -> io::Result<Self> {
        let prepared = image.prepared();
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        Ok(Self {
            image: image.source().to_string_lossy().into_owned(),
            digest: prepared.digest.clone(),
            settings: prepared.config.clone(),
            created: now.map_or(0, |time| time.as_secs()),
            kernel: config.boot_source,
            machine: config.machine,
            network: config.devices.network_interfaces.into_iter().next(),
            access: config.devices.root.map(|root| root.access).unwrap_or_default(),
            root: Version::of(root)?,
        })
    }

    pub(super) fn write(&self, path: &Path) -> io::Result<()> {
        fs::write(path, serde_json::to_vec_pretty(self)?)
    }

    pub(super) fn read(folder: &Path, name: &str) -> Result<Self, TemplateError> {
        let path = folder.join(RECORD);
        let invalid = |what: String| TemplateError::Invalid { name: name.to_owned(), what };
        let file = match File::open(&path) {
            Err(_) if !folder.exists() => return Err(TemplateError::Unknown(name.to_owned())),
            result => result.map_err(super::host("open", &path))?,
        };
        let mut bytes = Vec::new();
        file.take(RECORD_MAX).read_to_end(&mut bytes).map_err(super::host("read", &path))?;
        serde_json::from_slice(&bytes).map_err(|error| invalid(format!("its record is invalid ({error})")))
    }

    /// The image, with the root filesystem of the template.
    pub(super) fn image(&self, folder: &Path) -> Image {
        let prepared = Prepared {
            rootfs: folder.join(ROOT),
            digest: self.digest.clone(),
            config: self.settings.clone(),
            depends: Depends::default(),
        };
        Image::of_template(OsString::from(&self.image), prepared)
    }

    /// Checks that the root filesystem is that of the template's guest, which has parts of it in memory.
    pub(super) fn check_root(&self, folder: &Path, name: &str) -> Result<(), TemplateError> {
        let path = folder.join(ROOT);
        let invalid = |what: &str| TemplateError::Invalid {
            name: name.to_owned(),
            what: format!("{} {what}", path.display()),
        };
        match Version::of(&path) {
            Ok(version) if version == self.root => Ok(()),
            Ok(_) => Err(invalid("was changed")),
            Err(error) => Err(invalid(&error.to_string())),
        }
    }

    /// The configuration of a copy.
    pub(super) fn config(&self, folder: &Path) -> Config {
        let mut config = Config::new(self.kernel.clone());
        config.machine = self.machine;
        config.console = Console::Null;
        config.snapshot = Some(folder.join(MEMORY));
        let mut root = RootFilesystem::new(folder.join(ROOT));
        root.access = self.access;
        config.devices.root = Some(root);
        config.devices.network_interfaces.extend(self.network.clone());
        config
    }
}
