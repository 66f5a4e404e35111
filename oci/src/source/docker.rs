//! Images of `docker save` and `podman save`: a manifest.json that names configurations and layers.

use super::{Image, Layer, Store, assemble, parse};
use crate::digest::Digest;
use crate::error::Error;
use crate::layer::Check;
use crate::manifest::{ImageConfig, Saved};

/// The image in an archive, or that of a name.
pub(super) fn find(store: &Store, manifest: &[u8], tag: Option<&str>) -> Result<Image, Error> {
    let all: Vec<Saved> = parse("manifest.json", manifest)?;
    let named = |image: &Saved| {
        tag.is_none_or(|tag| {
            let names = image.repo_tags.as_deref().unwrap_or_default();
            names.iter().any(|name| {
                name == tag || name.strip_suffix(tag).is_some_and(|name| name.ends_with([':', '/']))
            })
        })
    };
    let names = || {
        let names: Vec<_> = all.iter().flat_map(|image| image.repo_tags.iter().flatten()).cloned().collect();
        if names.is_empty() { "none with a name".to_owned() } else { names.join(", ") }
    };
    let chosen: Vec<_> = all.iter().filter(|image| named(image)).collect();
    let saved = match (&*chosen, tag) {
        ([saved], _) => saved,
        ([], Some(tag)) => return Err(Error::NoTag { tag: tag.to_owned(), names: names() }),
        ([], None) => return Err(Error::NoImage),
        _ => return Err(Error::Choose(names())),
    };
    let config = store.document(&saved.config)?.ok_or_else(|| Error::Missing(saved.config.clone()))?;
    let parsed: ImageConfig = parse("configuration", &config)?;
    let names = saved.layers.as_deref().unwrap_or_default();
    let digests = parsed.rootfs.diff_ids.unwrap_or_default();
    if names.len() != digests.len() {
        return Err(Error::LayerCount { layers: names.len(), named: digests.len() });
    }
    let layers = names
        .iter()
        .zip(digests)
        .map(|(name, digest)| Layer { name: name.clone(), check: Check::Content(digest) })
        .collect();
    assemble(Digest::of(&config), &config, layers)
}
