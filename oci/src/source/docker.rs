//! Images in archives of `docker save` and `podman save`: a manifest.json with the names of configurations and layers.

use super::{Image, Layer, Store, assemble, parse, single};
use crate::digest::Digest;
use crate::error::Error;
use crate::layer::Check;
use crate::manifest::{ImageConfig, SavedImage};
use crate::names;

/// Finds the only image of an archive, or the one with a tag.
pub(super) fn find(store: &Store, manifest: &[u8], tag: Option<&str>) -> Result<Image, Error> {
    let all: Vec<SavedImage> = parse("manifest.json", manifest)?;
    let chosen = match tag {
        None => all.iter().collect(),
        Some(tag) => names::matching(tag, &all, names_of),
    };
    if let Some(tag) = tag
        && chosen.is_empty()
    {
        return Err(Error::no_tag(
            tag,
            all.iter().flat_map(|saved| saved.repo_tags.iter().flatten()).filter(|name| !name.is_empty()),
        ));
    }
    single(chosen.into_iter().map(|saved| (names_of(saved).join(", "), image(store, saved))).collect())
}

/// The names of an image, or its id if it has no name.
fn names_of(saved: &SavedImage) -> Vec<String> {
    let mut names = saved.repo_tags.clone().unwrap_or_default();
    names.retain(|name| !name.is_empty());
    if names.is_empty() { id(&saved.config).into_iter().collect() } else { names }
}

/// The digest of a configuration, taken from its file name.
fn id(config: &str) -> Option<String> {
    let name = config.rsplit('/').next()?;
    let digits = name.strip_suffix(".json").unwrap_or(name);
    format!("sha256:{digits}").parse().ok().map(|digest: Digest| digest.to_string())
}

fn image(store: &Store, saved: &SavedImage) -> Result<Image, Error> {
    let unnamed = |what| Error::Missing(format!("the file name of {what} in manifest.json"));
    if saved.config.is_empty() {
        return Err(unnamed("a configuration"));
    }
    let config = store.document(&saved.config)?.ok_or_else(|| Error::Missing(saved.config.clone()))?;
    let parsed: ImageConfig = parse("configuration", &config)?;
    let names = saved.layers.as_deref().unwrap_or_default();
    if names.iter().any(String::is_empty) {
        return Err(unnamed("a layer"));
    }
    let digests = parsed.rootfs.diff_ids.unwrap_or_default();
    if names.len() != digests.len() {
        return Err(Error::LayerCount { layers: names.len(), named: digests.len() });
    }
    let layers = names
        .iter()
        .zip(digests)
        .map(|(name, digest)| Ok(Layer { name: name.clone(), check: Check::DiffId(digest.parse()?) }));
    let layers = layers.collect::<Result<_, Error>>()?;
    assemble(Digest::of(&config), &config, layers)
}
