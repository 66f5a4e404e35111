//! Container images become read-only root filesystems for guests.
//!
//! An image is a list of tar archives, the layers, each of which adds to and takes from those below. Here they are
//! merged into one EROFS, once for each image; no file of it is ever unpacked on the host. `docs/oci.md` is for
//! users.

#![forbid(unsafe_code)]

mod ahead;
mod cache;
mod compression;
mod convert;
mod digest;
mod disk;
mod erofs;
mod error;
mod inventory;
mod layer;
mod manifest;
mod names;
mod platform;
mod prepared;
mod reference;
mod registry;
mod source;
mod tarball;
mod tree;
mod user;

pub use cache::Stored;
pub use digest::Digest;
pub use error::Error;
pub use inventory::{list, prune, remove};
pub use prepared::{Config, Prepared};
pub use user::{User, Users};

use cache::{Cache, Entry};
use reference::Reference;
use source::Store;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// When a registry is asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pull {
    /// Where the name is not known yet.
    #[default]
    Missing,
    /// Each time, since a name may mean another image by now.
    Always,
    /// Not at all.
    Never,
}

/// How an image is to be prepared.
#[derive(Debug, Default)]
pub struct Options {
    /// Where converted images are kept, if not where the environment says.
    pub cache: Option<PathBuf>,
    /// When a registry is asked.
    pub pull: Pull,
    /// As whom it runs, if not as the user whom it names.
    pub user: Option<String>,
}

/// Converts an image, if that was not done before. `begin` is told of each layer: its number and their count.
///
/// # Errors
/// Where there is no such image, or it is not whole and sound.
pub fn prepare(
    image: &str,
    options: &Options,
    begin: &mut dyn FnMut(usize, usize),
) -> Result<Prepared, Error> {
    let cache = Cache::open(options.cache.as_deref())?;
    let entry = match locate(image, options.pull)? {
        Place::File(path, tag) => from_file(&cache, &path, tag, begin)?,
        Place::Registry(reference) => from_registry(&cache, reference, options.pull, begin)?,
    };
    cache.note_use(&entry, &name(image));
    entry.record.prepared(entry.rootfs, options.user.as_deref())
}

fn from_file(
    cache: &Cache,
    path: &Path,
    tag: Option<&str>,
    begin: &mut dyn FnMut(usize, usize),
) -> Result<Entry, Error> {
    // Of an archive that has been seen before nothing has to be read.
    let name = version(path, tag)?;
    let known = name.as_deref().and_then(|name| cache.get(cache.recall(name)?));
    match known {
        Some(entry) => Ok(entry),
        None => from_store(cache, &Store::open(path, cache.scratch())?, tag, name.as_deref(), begin),
    }
}

fn from_registry(
    cache: &Cache,
    reference: Reference,
    pull: Pull,
    begin: &mut dyn FnMut(usize, usize),
) -> Result<Entry, Error> {
    let name = format!("registry {reference}");
    let known = cache.recall(&name).and_then(|key| cache.get(key));
    match (known, pull) {
        (Some(entry), Pull::Missing | Pull::Never) => Ok(entry),
        (None, Pull::Never) => Err(Error::NotPulled),
        (None, Pull::Missing) | (_, Pull::Always) => {
            from_store(cache, &Store::registry(reference)?, None, Some(&name), begin)
        }
    }
}

/// Converts an image that may not have been converted before, and remembers the name that led to it.
fn from_store(
    cache: &Cache,
    store: &Store,
    tag: Option<&str>,
    name: Option<&str>,
    begin: &mut dyn FnMut(usize, usize),
) -> Result<Entry, Error> {
    let image = store.image(tag)?;
    let key = image.key();
    let entry = cache.get_or_make(key, |file| convert::convert(store, &image, file, begin))?;
    if let Some(name) = name {
        cache.remember(name, key)?;
    }
    Ok(entry)
}

/// The name by which an image is known later, from wherever it is asked for.
fn name(image: &str) -> String {
    match locate(image, Pull::Missing) {
        Ok(Place::File(path, tag)) => {
            let path = path.canonicalize().unwrap_or(path).display().to_string();
            tag.map_or(path.clone(), |tag| format!("{path}:{tag}"))
        }
        Ok(Place::Registry(reference)) => reference.to_string(),
        Err(_) => image.to_owned(),
    }
}

/// Where an image is.
#[derive(Debug)]
enum Place<'a> {
    File(PathBuf, Option<&'a str>),
    Registry(Reference),
}

/// What stands in front of a path.
const TRANSPORTS: [&str; 3] = ["oci:", "oci-archive:", "docker-archive:"];
/// How the names of archives end.
const ARCHIVES: [&str; 9] =
    [".tar", ".tar.gz", ".tgz", ".tar.zst", ".tzst", ".tar.xz", ".txz", ".tar.bz2", ".tbz2"];

/// Takes `PATH`, `PATH:TAG` or the name of an image in a registry for what it is.
///
/// A name that a registry may have is a registry's, whatever is in this folder: who has made the folder must not decide
/// what `busybox` is. Archives are known by the end of their names.
fn locate(image: &str, pull: Pull) -> Result<Place<'_>, Error> {
    if let Some(path) = explicit_path(image) {
        return at_path(path);
    }
    let is_archive = |path: &Path, text: &str| {
        let name = text.to_lowercase();
        ARCHIVES.iter().any(|end| name.ends_with(end)) && path.is_file()
    };
    if pull != Pull::Always
        && !image.contains('@')
        && let Some((path, tag)) = splits(image).find(|(text, _)| is_archive(Path::new(text), text))
    {
        return Ok(Place::File(path.into(), tag));
    }
    Ok(Place::Registry(Reference::parse(image.strip_prefix("docker://").unwrap_or(image))?))
}

/// The path, with or without a tag, where an image is one by its first characters.
fn explicit_path(image: &str) -> Option<&str> {
    let path = TRANSPORTS.iter().find_map(|transport| image.strip_prefix(transport));
    path.or_else(|| image.starts_with(['/', '.']).then_some(image))
}

/// All ways to take a text for a path and a tag.
fn splits(text: &str) -> impl Iterator<Item = (&str, Option<&str>)> {
    let tagged = text.match_indices(':').map(|(at, _)| (&text[..at], Some(&text[at + 1..])));
    std::iter::once((text, None)).chain(tagged)
}

fn at_path(text: &str) -> Result<Place<'_>, Error> {
    let is_image = |path: &Path| path.is_file() || path.join("index.json").exists();
    match splits(text).find(|(path, _)| is_image(Path::new(path))) {
        Some((path, tag)) => Ok(Place::File(path.into(), tag)),
        None if Path::new(text).exists() => Err(Error::NoImage),
        None => Err(Error::NotFound),
    }
}

/// The folder or file that may have been meant by a name that was taken for a registry's.
#[must_use]
pub fn file_of_that_name(image: &str) -> Option<&str> {
    let is_name = explicit_path(image).is_none() && !image.contains('@');
    splits(image).map(|(path, _)| path).find(|path| is_name && !path.is_empty() && Path::new(path).exists())
}

/// What tells a version of an archive from others; none of a folder, whose index says it.
fn version(path: &Path, tag: Option<&str>) -> Result<Option<String>, Error> {
    let failed = |source| Error::Read { path: path.into(), source };
    let metadata = fs::metadata(path).map_err(failed)?;
    if metadata.is_dir() {
        return Ok(None);
    }
    let path = path.canonicalize().map_err(failed)?;
    let times = (metadata.mtime(), metadata.mtime_nsec(), metadata.ctime(), metadata.ctime_nsec());
    let file = (metadata.dev(), metadata.ino(), metadata.len(), times);
    Ok(Some(format!("archive {} {file:?} {tag:?}", path.display())))
}
