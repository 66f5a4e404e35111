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
mod erofs;
mod error;
mod extensions;
mod header;
mod inventory;
mod layer;
mod manifest;
mod prepared;
mod reference;
mod source;
mod sparse;
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
            from_store(cache, &Store::registry(reference), None, Some(&name), begin)
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
    let key = convert::key(&image);
    let entry = cache.get_or_make(key, |file| convert::convert(store, &image, file, begin))?;
    if let Some(name) = name {
        cache.remember(name, key)?;
    }
    Ok(entry)
}

/// The name by which an image is known later, from wherever it is asked for.
fn name(image: &str) -> String {
    match locate(image, Pull::default()) {
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

/// The prefix that names an OCI layout, as skopeo and podman have it.
const LAYOUT: &str = "oci:";

/// Names of files that are archives of images. No repository of a registry has such a name.
const ARCHIVES: [&str; 9] =
    [".tar", ".tar.gz", ".tgz", ".tar.zst", ".tzst", ".tar.xz", ".txz", ".tar.bz2", ".tbz2"];

/// Decides by its form what a name means. The current directory may be a stranger's, so that nothing in it answers for
/// a name of a registry: only `/...`, `./...`, `../...`, `oci:...` and files named as archives are paths.
fn locate(image: &str, pull: Pull) -> Result<Place<'_>, Error> {
    let (text, is_path) = match image.strip_prefix(LAYOUT) {
        Some(layout) => (layout, true),
        None => (image, image.starts_with(['/', '.'])),
    };
    let is_pulled = pull == Pull::Always || image.contains("@sha256:");
    let ends = text.match_indices(':').map(|(at, _)| (at, Some(&text[at + 1..])));
    for (end, tag) in [(text.len(), None)].into_iter().chain(ends) {
        let (name, path) = (&text[..end], Path::new(&text[..end]));
        let is_archive = || ARCHIVES.iter().any(|ending| name.ends_with(ending)) && path.is_file();
        let is_here = if is_path {
            path.is_file() || path.join("index.json").exists()
        } else {
            !is_pulled && is_archive()
        };
        if is_here {
            return Ok(Place::File(path.into(), tag));
        }
    }
    match is_path {
        true if Path::new(text).exists() => Err(Error::NoImage),
        true => Err(Error::NotFound),
        false => Ok(Place::Registry(Reference::parse(image)?)),
    }
}

/// A file or folder of the current directory that a registry's name could be mistaken for.
#[must_use]
pub fn namesake(image: &str) -> Option<&str> {
    let is_here = |name: &&str| !name.is_empty() && !name.starts_with(['/', '.']) && Path::new(name).exists();
    let ends = image.match_indices(':').map(|(at, _)| at);
    [image.len()].into_iter().chain(ends).map(|end| &image[..end]).find(is_here)
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
