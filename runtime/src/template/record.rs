//! The record of a template.

use super::{MEMORY, RECORD, ROOT, TemplateError};
use crate::guest::GuestRecord;
use crate::guest::origin::Origin;
use crate::image::Image;
use kindling_vmm::config::Config;
use serde::{Deserialize, Serialize};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// Maximum size in bytes.
const RECORD_MAX: u64 = 1 << 20;

/// The record of a template or a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    /// Image, as the user wrote it.
    pub(super) image: String,
    /// In seconds since 1970.
    pub(super) created: u64,
    pub(super) origin: Origin,
    /// The version of the root filesystem, which guests rely on.
    root: Version,
    /// The record of the guest whose command continues; `None` of a template, whose copies have commands of their own.
    pub(super) guest: Option<Box<GuestRecord>>,
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
    /// The record for a guest; its root filesystem is the file `root`.
    pub(super) fn new(
        origin: Origin,
        image: String,
        guest: Option<Box<GuestRecord>>,
        root: &Path,
    ) -> io::Result<Self> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let created = now.map_or(0, |time| time.as_secs());
        Ok(Self { image, created, origin, root: Version::of(root)?, guest })
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
        self.origin.image(OsString::from(&self.image), folder.join(ROOT))
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
        self.origin.config(folder.join(MEMORY), &folder.join(ROOT))
    }
}
