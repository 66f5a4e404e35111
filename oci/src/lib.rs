//! Converts container images to read-only EROFS root filesystems for guests.
//!
//! An image is a list of tar archives, the layers. Each layer adds files to the layers below it and deletes files from
//! them. This crate merges the layers into one EROFS filesystem and caches it; no file of an image is ever unpacked on
//! the host. `docs/oci.md` is the documentation for users.

#![forbid(unsafe_code)]

mod cache;
mod compression;
mod convert;
mod digest;
mod disk;
mod erofs;
mod error;
mod inventory;
mod json;
mod layer;
mod manifest;
mod names;
mod platform;
mod prepared;
mod read_ahead;
mod reference;
mod registry;
mod source;
mod tarball;
mod tree;
mod user;

pub use cache::{Cache, StoredImage};
pub use digest::Digest;
pub use error::Error;
pub use inventory::{list, prune, remove};
pub use oci_protocol::{Depends, ImageConfig, Prepared, User};
pub use user::Users;

use cache::Entry;
use reference::Reference;
use source::Store;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// When an image is pulled from its registry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pull {
    /// If the cache has no image of this name.
    #[default]
    Missing,
    /// Always: the tag may refer to another image by now.
    Always,
    /// Never.
    Never,
}

/// Options of [`prepare`].
#[derive(Debug, Default)]
pub struct Options {
    /// When the image is pulled.
    pub pull: Pull,
    /// The user to run as, instead of the image's own.
    pub user: Option<String>,
}

/// What [`prepare`] reads outside of the cache.
#[derive(Debug, Default)]
pub struct Reads {
    /// The files and directories, some of which may be missing.
    pub paths: Vec<PathBuf>,
    /// Whether it may connect to a registry.
    pub registry: bool,
}

/// Finds what [`prepare`] reads of an image outside of the cache, and opens nothing of it: for a program that gives up
/// its other rights before.
///
/// # Errors
/// If the image is a path that does not exist, or an invalid reference.
pub fn reads(image: &str, pull: Pull) -> Result<Reads, Error> {
    Ok(match locate(image, pull)? {
        Location::File(path, _) => Reads { paths: vec![path], registry: false },
        Location::Registry(_) => Reads { paths: registry::files(), registry: true },
    })
}

/// Converts an image, unless the cache has it. `begin` is called before each layer with its number and the number of
/// layers.
///
/// # Errors
/// If the image does not exist, is incomplete or damaged, or cannot be converted.
pub fn prepare(
    cache: &Cache,
    image: &str,
    options: &Options,
    begin: &mut dyn FnMut(usize, usize),
) -> Result<Prepared, Error> {
    let location = locate(image, options.pull)?;
    let depends = depends(cache, image, &location);
    let entry = match location {
        Location::File(path, tag) => from_file(cache, &path, tag, begin)?,
        Location::Registry(reference) => from_registry(cache, reference, options.pull, begin)?,
    };
    cache.record_use(&entry, &name(image));
    entry.record.prepared(entry.rootfs, options.user.as_deref(), depends)
}

/// The files on which it depends which image these words name.
fn depends(cache: &Cache, image: &str, location: &Location<'_>) -> Depends {
    let absolute = |path: &Path| std::path::absolute(path).unwrap_or_default();
    let words = explicit_path(image).unwrap_or(image);
    let (source, found) = match location {
        Location::File(path, _) if path.is_dir() => (absolute(&path.join("index.json")), Some(path)),
        Location::File(path, _) => (absolute(path), Some(path)),
        Location::Registry(reference) => (cache.name_path(&name_of(reference)), None),
    };
    let before = splits(words)
        .map(|(path, _)| Path::new(path))
        .take_while(|path| Some(*path) != found.map(PathBuf::as_path));
    Depends { source, absent: before.map(absolute).collect() }
}

/// The name of a registry's image in the cache.
fn name_of(reference: &Reference) -> String {
    format!("registry {reference}")
}

fn from_file(
    cache: &Cache,
    path: &Path,
    tag: Option<&str>,
    begin: &mut dyn FnMut(usize, usize),
) -> Result<Entry, Error> {
    // An unchanged archive that was converted before is not read again.
    let name = archive_version(path, tag)?;
    let known = name.as_deref().and_then(|name| cache.get(cache.resolve_name(name)?));
    match known {
        Some(entry) => Ok(entry),
        None => from_store(cache, &Store::open(path, cache.folder())?, tag, name.as_deref(), begin),
    }
}

fn from_registry(
    cache: &Cache,
    reference: Reference,
    pull: Pull,
    begin: &mut dyn FnMut(usize, usize),
) -> Result<Entry, Error> {
    let name = name_of(&reference);
    let known = cache.resolve_name(&name).and_then(|key| cache.get(key));
    match (known, pull) {
        (Some(entry), Pull::Missing | Pull::Never) => Ok(entry),
        (None, Pull::Never) => Err(Error::NotPulled),
        (None, Pull::Missing) | (_, Pull::Always) => {
            from_store(cache, &Store::registry(reference)?, None, Some(&name), begin)
        }
    }
}

/// Converts an image, unless the cache has its key, and stores the name under which it was found.
fn from_store(
    cache: &Cache,
    store: &Store,
    tag: Option<&str>,
    name: Option<&str>,
    begin: &mut dyn FnMut(usize, usize),
) -> Result<Entry, Error> {
    let image = store.image(tag)?;
    let key = image.key();
    let entry = cache.get_or_create(key, |file| convert::convert(store, &image, file, begin))?;
    if let Some(name) = name {
        cache.store_name(name, key)?;
    }
    Ok(entry)
}

/// The canonical name of an image: an absolute path, or a complete registry reference.
fn name(image: &str) -> String {
    match locate(image, Pull::Missing) {
        Ok(Location::File(path, tag)) => {
            let path = path.canonicalize().unwrap_or(path).display().to_string();
            tag.map_or(path.clone(), |tag| format!("{path}:{tag}"))
        }
        Ok(Location::Registry(reference)) => reference.to_string(),
        Err(_) => image.to_owned(),
    }
}

/// Where an image is stored.
#[derive(Debug)]
enum Location<'a> {
    File(PathBuf, Option<&'a str>),
    Registry(Reference),
}

/// Prefixes that mark the rest of the text as a path.
const TRANSPORTS: [&str; 3] = ["oci:", "oci-archive:", "docker-archive:"];
/// File name suffixes of archives.
const ARCHIVE_SUFFIXES: [&str; 9] =
    [".tar", ".tar.gz", ".tgz", ".tar.zst", ".tzst", ".tar.xz", ".txz", ".tar.bz2", ".tbz2"];

/// Decides whether a text is `PATH`, `PATH:TAG` or the reference of an image in a registry.
///
/// A valid reference is always looked up in the registry, even if the working directory has a directory of that name:
/// the owner of a directory must not decide what `busybox` is. The exception is archives, which are recognized by their
/// suffix.
fn locate(image: &str, pull: Pull) -> Result<Location<'_>, Error> {
    if let Some(path) = explicit_path(image) {
        return at_path(path);
    }
    let is_archive = |path: &Path, text: &str| {
        let name = text.to_lowercase();
        ARCHIVE_SUFFIXES.iter().any(|suffix| name.ends_with(suffix)) && path.is_file()
    };
    if pull != Pull::Always
        && !image.contains('@')
        && let Some((path, tag)) = splits(image).find(|(text, _)| is_archive(Path::new(text), text))
    {
        return Ok(Location::File(path.into(), tag));
    }
    Ok(Location::Registry(Reference::parse(image.strip_prefix("docker://").unwrap_or(image))?))
}

/// The path, with or without a tag, of an image that is marked as a path by its first characters.
fn explicit_path(image: &str) -> Option<&str> {
    let path = TRANSPORTS.iter().find_map(|transport| image.strip_prefix(transport));
    path.or_else(|| image.starts_with(['/', '.']).then_some(image))
}

/// All ways to split a text into a path and a tag.
fn splits(text: &str) -> impl Iterator<Item = (&str, Option<&str>)> {
    let tagged = text.match_indices(':').map(|(at, _)| (&text[..at], Some(&text[at + 1..])));
    std::iter::once((text, None)).chain(tagged)
}

fn at_path(text: &str) -> Result<Location<'_>, Error> {
    let is_image = |path: &Path| path.is_file() || path.join("index.json").exists();
    match splits(text).find(|(path, _)| is_image(Path::new(path))) {
        Some((path, tag)) => Ok(Location::File(path.into(), tag)),
        None if Path::new(text).exists() => Err(Error::UnknownFormat),
        None => Err(Error::NotFound),
    }
}

/// The local file or directory that the user may have meant by a registry reference.
#[must_use]
pub fn local_file_named(image: &str) -> Option<&str> {
    let is_name = explicit_path(image).is_none() && !image.contains('@');
    splits(image).map(|(path, _)| path).find(|path| is_name && !path.is_empty() && Path::new(path).exists())
}

/// A name for the present version of an archive: its path, inode, size and times. A directory has none, since its index
/// is read each time.
fn archive_version(path: &Path, tag: Option<&str>) -> Result<Option<String>, Error> {
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
