//! The cache of converted images: one directory per image, named by the digest of everything the image was made from.
//!
//! A directory is written under a draft name and renamed when it is complete. The conversion holds a lock of the
//! directory's name, and removes the draft of an earlier conversion that did not finish.

use crate::digest::Digest;
use crate::error::Error;
use crate::prepared::Record;
use oci_protocol::CachedImage;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// The version of the cache, changed whenever the result of a conversion changes.
const FORMAT: &str = "v2";

const DRAFT: &str = ".draft-";
const ROOTFS: &str = "root.erofs";
const RECORD: &str = "image.json";
/// The names under which an image was requested, one per line. The file's modification time is the last use.
const NAMES: &str = "names";
/// Names that are recorded per image.
const MAX_NAMES: usize = 16;

/// The directory of converted images.
#[derive(Debug)]
pub struct Cache {
    folder: PathBuf,
}

/// A converted image of the cache.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) rootfs: PathBuf,
    pub(crate) record: Record,
}

/// The description of a converted image, for listings.
#[derive(Clone, Debug)]
pub struct StoredImage {
    key: Digest,
    /// The image's id: the digest of its configuration.
    pub id: Digest,
    /// The names under which it was requested.
    pub names: Vec<String>,
    /// Bytes on disk.
    pub bytes: u64,
    /// The time of the last use.
    pub used: SystemTime,
}

impl StoredImage {
    /// What is printed for the image.
    #[must_use]
    pub fn description(&self) -> CachedImage {
        let used = self.used.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        CachedImage { id: self.id.to_string(), names: self.names.clone(), bytes: self.bytes, used }
    }

    pub(crate) fn has_name(&self, name: &str) -> bool {
        self.names.iter().any(|known| known == name)
    }

    /// Whether the id begins with these digits, of which at least four are needed.
    pub(crate) fn has_id(&self, digits: &str) -> bool {
        const MIN_DIGITS: usize = 4;
        let digits = digits.strip_prefix("sha256:").unwrap_or(digits);
        digits.len() >= MIN_DIGITS && self.id.hex().starts_with(digits)
    }
}

impl Cache {
    /// Opens the cache in a directory, or in the one that the environment variables name. It is created if it is missing.
    ///
    /// # Errors
    /// If there is no such directory, or other users can change it.
    pub fn open(folder: Option<&Path>) -> Result<Self, Error> {
        let folder = match folder {
            Some(folder) => Some(folder.to_owned()),
            None => from_environment(|name| std::env::var_os(name).map(PathBuf::from)),
        };
        let folder = folder.ok_or(Error::NoCache)?;
        let folder = std::path::absolute(&folder).map_err(|source| Error::Cache { path: folder, source })?;
        let folder = folder.join("oci").join(FORMAT);
        // Guests run the files of the cache, and an image may be private.
        trusted_path::make_folder(&folder)?;
        Ok(Self { folder })
    }

    /// The directory in which all files are written, temporary ones included.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The image of a key. An image that is incomplete, because the machine crashed before its data was on disk, counts
    /// as missing.
    pub(crate) fn get(&self, key: Digest) -> Option<Entry> {
        let folder = self.folder.join(key.hex());
        let record: Record = serde_json::from_slice(&fs::read(folder.join(RECORD)).ok()?).ok()?;
        let rootfs = folder.join(ROOTFS);
        let size = fs::metadata(&rootfs).ok()?.len();
        (size == record.size).then_some(Entry { rootfs, record })
    }

    /// The image of a key, which `make` writes to a file if the cache does not have it.
    pub(crate) fn get_or_create(
        &self,
        key: Digest,
        make: impl FnOnce(&File) -> Result<Record, Error>,
    ) -> Result<Entry, Error> {
        if let Some(entry) = self.get(key) {
            return Ok(entry);
        }
        let failed = |path: &Path, source| Error::Cache { path: path.into(), source };
        let _lock = self.lock(&key.hex())?;
        if let Some(entry) = self.get(key) {
            return Ok(entry);
        }
        let draft = self.draft(&key.hex());
        remove(&draft).and_then(|()| fs::create_dir(&draft)).map_err(|error| failed(&draft, error))?;
        let result = self.make(key, &draft, make);
        if result.is_err() {
            // A draft that remains is harmless: the next conversion removes it.
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
        let file = file.map_err(|error| failed(&rootfs, error))?;
        let record = make(&file)?;
        // After a crash of the machine, the size of the filesystem would not show that its data is missing. A damaged
        // record does not parse.
        file.sync_all().map_err(|error| failed(&rootfs, error))?;
        let text = serde_json::to_vec(&record).map_err(io::Error::from);
        text.and_then(|text| fs::write(draft.join(RECORD), text))
            .map_err(|error| failed(&draft.join(RECORD), error))?;
        let target = self.folder.join(key.hex());
        remove(&target).and_then(|()| fs::rename(draft, &target)).map_err(|error| failed(&target, error))?;
        Ok(Entry { rootfs: target.join(ROOTFS), record })
    }

    /// Records a use of an image and the name under which it was requested. A failure to write is ignored.
    pub(crate) fn record_use(&self, entry: &Entry, name: &str) {
        let path = entry.rootfs.with_file_name(NAMES);
        let known = fs::read_to_string(&path).unwrap_or_default();
        if known.lines().any(|line| line == name) || known.lines().count() >= MAX_NAMES || name.contains('\n')
        {
            let _ = File::open(&path).and_then(|file| file.set_modified(SystemTime::now()));
        } else if let Ok(mut file) = File::options().append(true).create(true).open(&path) {
            let _ = writeln!(file, "{name}");
        }
    }

    /// All complete images.
    pub(crate) fn images(&self) -> Result<Vec<StoredImage>, Error> {
        let names = self.entries()?;
        Ok(names.iter().filter_map(|name| self.stored(format!("sha256:{name}").parse().ok()?)).collect())
    }

    fn stored(&self, key: Digest) -> Option<StoredImage> {
        let entry = self.get(key)?;
        let names = entry.rootfs.with_file_name(NAMES);
        let used = names.metadata().or_else(|_| entry.rootfs.metadata()).and_then(|file| file.modified());
        Some(StoredImage {
            key,
            id: entry.record.digest,
            names: fs::read_to_string(names).unwrap_or_default().lines().map(str::to_owned).collect(),
            bytes: entry.rootfs.metadata().ok()?.blocks() * 512,
            used: used.ok()?,
        })
    }

    fn entries(&self) -> Result<Vec<String>, Error> {
        let failed = |source| Error::Cache { path: self.folder.clone(), source };
        let entries = fs::read_dir(&self.folder).map_err(failed)?;
        Ok(entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect())
    }

    /// Removes an image and the names that refer to it.
    pub(crate) fn remove(&self, stored: &StoredImage) -> Result<(), Error> {
        let key = stored.key.hex();
        let _lock = self.lock(&key)?;
        let (folder, draft) = (self.folder.join(&key), self.draft(&key));
        // The rename removes the image for other processes atomically; then its files are deleted.
        remove(&draft)
            .and_then(|()| fs::rename(&folder, &draft))
            .and_then(|()| remove(&draft))
            .map_err(|source| Error::Cache { path: folder, source })?;
        self.remove_names()
    }

    /// Removes names that refer to no image.
    fn remove_names(&self) -> Result<(), Error> {
        for name in self.entries()?.iter().filter(|name| name.ends_with(".name")) {
            let path = self.folder.join(name);
            let key: Option<Digest> = fs::read_to_string(&path).ok().and_then(|text| text.parse().ok());
            if key.is_none_or(|key| self.get(key).is_none()) {
                let _ = fs::remove_file(path);
            }
        }
        Ok(())
    }

    /// Removes the drafts of unfinished conversions, and names that refer to no image.
    pub(crate) fn remove_leftovers(&self) -> Result<(), Error> {
        for key in self.entries()?.iter().filter_map(|name| name.strip_prefix(DRAFT)) {
            let draft = self.draft(key);
            let lock = trusted_path::lock_file(&self.lock_path(key));
            // A draft whose lock is held is being written.
            if lock.is_ok_and(|lock| lock.try_lock().is_ok() && remove(&draft).is_err()) {
                return Err(Error::Cache { path: draft, source: io::ErrorKind::Other.into() });
            }
        }
        self.remove_names()
    }

    fn draft(&self, key: &str) -> PathBuf {
        self.folder.join(format!("{DRAFT}{key}"))
    }

    fn lock_path(&self, key: &str) -> PathBuf {
        self.folder.join(format!("{key}.lock"))
    }

    fn lock(&self, key: &str) -> Result<File, Error> {
        let path = self.lock_path(key);
        let locked = trusted_path::lock_file(&path).and_then(|file| file.lock().map(|()| file));
        locked.map_err(|source| Error::Cache { path, source })
    }

    /// The key that is stored for a name.
    pub(crate) fn resolve_name(&self, name: &str) -> Option<Digest> {
        fs::read_to_string(self.name_path(name)).ok()?.parse().ok()
    }

    /// Stores the key that a name refers to.
    pub(crate) fn store_name(&self, name: &str, key: Digest) -> Result<(), Error> {
        let path = self.name_path(name);
        let write = || -> io::Result<()> {
            let draft = tempfile::NamedTempFile::new_in(&self.folder)?;
            fs::write(draft.path(), key.to_string())?;
            draft.persist(&path)?;
            Ok(())
        };
        write().map_err(|source| Error::Cache { path: path.clone(), source })
    }

    /// The file that stores which image a name refers to. It is replaced when the name refers to another image.
    pub(crate) fn name_path(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{}.name", Digest::of(name.as_bytes()).hex()))
    }
}

/// Removes a directory, if it exists.
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
    // Relative paths are ignored, as the XDG base directory specification requires.
    let base = set("XDG_CACHE_HOME").filter(|path| path.is_absolute());
    base.or_else(|| Some(set("HOME")?.join(".cache"))).map(|base| base.join("kindling"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_directory_comes_from_the_environment() {
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
