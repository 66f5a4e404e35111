//! Container images become read-only root filesystems for guests.
//!
//! An image is a list of tar archives, the layers, each of which adds to and takes from those below. Here they are
//! merged into one EROFS, once for each image; no file of it is ever unpacked on the host. `docs/oci.md` is for
//! users.

mod cache;
mod compression;
mod convert;
mod digest;
mod erofs;
mod error;
mod layer;
mod manifest;
mod prepared;
mod source;
mod sparse;
mod tarball;
mod tree;
mod user;

pub use digest::Digest;
pub use error::Error;
pub use prepared::{Config, Prepared};
pub use user::{User, Users};

use cache::Cache;
use source::Store;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// How an image is to be prepared.
#[derive(Debug, Default)]
pub struct Options {
    /// Where converted images are kept, if not where the environment says.
    pub cache: Option<PathBuf>,
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
    let (path, tag) = locate(image)?;
    let cache = Cache::open(options.cache.as_deref())?;
    let name = version(&path, tag)?;
    // Of an archive that has been seen before nothing has to be read.
    let known = name.as_deref().and_then(|name| cache.get(cache.recall(name)?));
    let entry = match known {
        Some(entry) => entry,
        None => {
            let store = Store::open(&path, cache.scratch())?;
            let image = store.image(tag)?;
            let key = convert::key(&image);
            let entry = cache.get_or_make(key, |file| convert::convert(&store, &image, file, begin))?;
            if let Some(name) = name {
                cache.remember(&name, key)?;
            }
            entry
        }
    };
    entry.record.prepared(entry.rootfs, options.user.as_deref())
}

/// The file or folder of an image, and the name of one in it: `PATH` or `PATH:TAG`.
fn locate(image: &str) -> Result<(PathBuf, Option<&str>), Error> {
    let ends = image.match_indices(':').map(|(at, _)| (at, Some(&image[at + 1..])));
    for (end, tag) in [(image.len(), None)].into_iter().chain(ends) {
        let path = Path::new(&image[..end]);
        if path.is_file() || path.join("index.json").exists() {
            return Ok((path.into(), tag));
        }
    }
    Err(if Path::new(image).exists() { Error::NoImage } else { Error::NotFound })
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
