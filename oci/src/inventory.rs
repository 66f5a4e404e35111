//! Listing and removing cached images. A running guest has its image open, so the image stays usable after its removal.

use crate::cache::{Cache, StoredImage};
use crate::error::Error;
use std::time::{Duration, SystemTime};

/// Lists the converted images, most recently used first.
///
/// # Errors
/// If the cache cannot be read.
pub fn list(cache: &Cache) -> Result<Vec<StoredImage>, Error> {
    let mut images = cache.images()?;
    images.sort_by_key(|image| std::cmp::Reverse(image.used));
    Ok(images)
}

/// Removes the images that have a name, or whose id begins with these digits.
///
/// # Errors
/// If there is no such image, or it cannot be removed.
pub fn remove(cache: &Cache, image: &str) -> Result<Vec<StoredImage>, Error> {
    let name = crate::name(image);
    let is_match = |stored: &StoredImage| {
        [&name, image].iter().any(|name| stored.has_name(name)) || stored.has_id(image)
    };
    let matching: Vec<_> = cache.images()?.into_iter().filter(is_match).collect();
    if matching.is_empty() {
        return Err(Error::NotStored);
    }
    matching.iter().try_for_each(|stored| cache.remove(stored))?;
    Ok(matching)
}

/// Removes the images that have not been used for some time, and the drafts of unfinished conversions.
///
/// # Errors
/// If an image or a draft cannot be removed.
pub fn prune(cache: &Cache, unused: Duration) -> Result<Vec<StoredImage>, Error> {
    let now = SystemTime::now();
    let is_unused = |stored: &StoredImage| now.duration_since(stored.used).is_ok_and(|age| age >= unused);
    let old: Vec<_> = cache.images()?.into_iter().filter(is_unused).collect();
    old.iter().try_for_each(|stored| cache.remove(stored))?;
    cache.remove_leftovers()?;
    Ok(old)
}
