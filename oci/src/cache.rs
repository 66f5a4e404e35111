//! Converted images on disk, each in a folder named by the digest of everything it was made from.
//!
//! A folder appears by renaming, whole or not at all. Who makes one holds the lock of its name, and removes the draft
//! that someone before left behind.

use crate::digest::Digest;
use crate::error::Error;
use crate::prepared::Record;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// Changes with everything that changes what an image becomes.
const FORMAT: &str = "v1";

const ROOTFS: &str = "root.erofs";
const RECORD: &str = "image.json";

/// Where converted images are.
#[derive(Debug)]
pub(crate) struct Cache {
    folder: PathBuf,
}

/// A converted image.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) rootfs: PathBuf,
    pub(crate) record: Record,
}

impl Cache {
    /// The cache in a folder, or where the environment says.
    pub(crate) fn open(folder: Option<&Path>) -> Result<Self, Error> {
        let folder = match folder {
            Some(folder) => Some(folder.to_owned()),
            None => from_environment(|name| std::env::var_os(name).map(PathBuf::from)),
        };
        let folder = folder.ok_or(Error::NoCache)?;
        let folder = std::path::absolute(&folder).map_err(|source| Error::Cache { path: folder, source })?;
        let folder = folder.join("oci").join(FORMAT);
        // An image may be one that not everybody can have.
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder);
        made.map_err(|source| Error::Cache { path: folder.clone(), source })?;
        Ok(Self { folder })
    }

    /// A place for files without names.
    pub(crate) fn scratch(&self) -> &Path {
        &self.folder
    }

    /// What is there under a key. What is not whole, since the machine stopped before all was on disk, is not there.
    pub(crate) fn get(&self, key: Digest) -> Option<Entry> {
        let folder = self.folder.join(key.hex());
        let record: Record = serde_json::from_slice(&fs::read(folder.join(RECORD)).ok()?).ok()?;
        let rootfs = folder.join(ROOTFS);
        let size = fs::metadata(&rootfs).ok()?.len();
        (size == record.size).then_some(Entry { rootfs, record })
    }

    /// What is there under a key, or what `make` makes: it writes the filesystem into a file.
    pub(crate) fn get_or_make(
        &self,
        key: Digest,
        make: impl FnOnce(&File) -> Result<Record, Error>,
    ) -> Result<Entry, Error> {
        if let Some(entry) = self.get(key) {
            return Ok(entry);
        }
        let failed = |path: &Path, source| Error::Cache { path: path.into(), source };
        let lock = self.folder.join(format!("{}.lock", key.hex()));
        let locked = File::create(&lock).and_then(|file| file.lock().map(|()| file));
        let _lock = locked.map_err(|error| failed(&lock, error))?;
        if let Some(entry) = self.get(key) {
            return Ok(entry);
        }
        let draft = self.folder.join(format!(".draft-{}", key.hex()));
        remove(&draft).and_then(|()| fs::create_dir(&draft)).map_err(|error| failed(&draft, error))?;
        let result = self.make(key, &draft, make);
        if result.is_err() {
            // That a draft stays does no harm: the next one removes it.
            let _ = remove(&draft);
        }
        result
    }

    fn make(
        &self,
        key: Digest,
        draft: &Path,
        make: impl FnOnce(&File) -> Result<Record, Error>,
    ) -> Result<Entry, Error> {
        let failed = |path: &Path, source| Error::Cache { path: path.into(), source };
        let rootfs = draft.join(ROOTFS);
        let file = File::options().read(true).write(true).create_new(true).open(&rootfs);
        let record = make(&file.map_err(|error| failed(&rootfs, error))?)?;
        let text = serde_json::to_vec(&record).map_err(io::Error::from);
        text.and_then(|text| fs::write(draft.join(RECORD), text))
            .map_err(|error| failed(&draft.join(RECORD), error))?;
        let target = self.folder.join(key.hex());
        remove(&target).and_then(|()| fs::rename(draft, &target)).map_err(|error| failed(&target, error))?;
        Ok(Entry { rootfs: target.join(ROOTFS), record })
    }

    /// The key that a name led to.
    pub(crate) fn recall(&self, name: &str) -> Option<Digest> {
        fs::read_to_string(self.name(name)).ok()?.parse().ok()
    }

    /// Remembers what a name leads to.
    pub(crate) fn remember(&self, name: &str, key: Digest) -> Result<(), Error> {
        let path = self.name(name);
        let write = || -> io::Result<()> {
            let draft = tempfile::NamedTempFile::new_in(&self.folder)?;
            fs::write(draft.path(), key.to_string())?;
            draft.persist(&path)?;
            Ok(())
        };
        write().map_err(|source| Error::Cache { path: path.clone(), source })
    }

    fn name(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{}.name", Digest::of(name.as_bytes()).hex()))
    }
}

/// Removes a folder, if it is there.
fn remove(folder: &Path) -> io::Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn from_environment(variable: impl Fn(&str) -> Option<PathBuf>) -> Option<PathBuf> {
    let set = |name| variable(name).filter(|path| !path.as_os_str().is_empty());
    if let Some(folder) = set("KINDLING_CACHE") {
        return Some(folder);
    }
    // The XDG specification says that relative paths are to be ignored.
    let base = set("XDG_CACHE_HOME").filter(|path| path.is_absolute());
    base.or_else(|| Some(set("HOME")?.join(".cache"))).map(|base| base.join("kindling"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_says_where() {
        let folder = |variables: &[(&str, &str)]| {
            from_environment(|name| {
                variables.iter().find(|(set, _)| *set == name).map(|(_, value)| PathBuf::from(value))
            })
        };
        assert_eq!(folder(&[]), None);
        assert_eq!(folder(&[("HOME", "/h")]), Some("/h/.cache/kindling".into()));
        assert_eq!(folder(&[("HOME", "/h"), ("XDG_CACHE_HOME", "x")]), Some("/h/.cache/kindling".into()));
        assert_eq!(folder(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")]), Some("/x/kindling".into()));
        assert_eq!(folder(&[("XDG_CACHE_HOME", "/x"), ("KINDLING_CACHE", "/k")]), Some("/k".into()));
    }
}
