//! What is in the cache, and its removal. A guest that runs has its image open, and keeps it when its name is gone.

use crate::cache::{Cache, Stored};
use crate::error::Error;
use std::path::Path;
use std::time::{Duration, SystemTime};

/// Converted images, those that were used last in front.
///
/// # Errors
/// When the cache cannot be read.
pub fn list(cache: Option<&Path>) -> Result<Vec<Stored>, Error> {
    let mut images = Cache::open(cache)?.images()?;
    images.sort_by_key(|image| std::cmp::Reverse(image.used));
    Ok(images)
}

/// Removes the images that someone means: by a name, or by the first digits of an id.
///
/// # Errors
/// When there is none, or it cannot be removed.
pub fn remove(cache: Option<&Path>, image: &str) -> Result<Vec<Stored>, Error> {
    let cache = Cache::open(cache)?;
    let name = crate::name(image);
    let is_meant =
        |stored: &Stored| [&name, image].iter().any(|name| stored.is_called(name)) || stored.has_id(image);
    let meant: Vec<_> = cache.images()?.into_iter().filter(is_meant).collect();
    if meant.is_empty() {
        return Err(Error::NotStored);
    }
    meant.iter().try_for_each(|stored| cache.remove(stored))?;
    Ok(meant)
}

/// Removes the images that nobody has used for some time, and what conversions left that did not end.
///
/// # Errors
/// When something cannot be removed.
pub fn prune(cache: Option<&Path>, unused: Duration) -> Result<Vec<Stored>, Error> {
    let cache = Cache::open(cache)?;
    let now = SystemTime::now();
    let is_unused = |stored: &Stored| now.duration_since(stored.used).is_ok_and(|age| age >= unused);
    let old: Vec<_> = cache.images()?.into_iter().filter(is_unused).collect();
    old.iter().try_for_each(|stored| cache.remove(stored))?;
    cache.remove_leftovers()?;
    Ok(old)
}
