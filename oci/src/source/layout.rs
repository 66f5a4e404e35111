//! Images of an OCI layout: an index that names manifests, and blobs named by their digests.

use super::{Image, Layer, Store, assemble, blob_name, parse};
use crate::error::Error;
use crate::layer::Check;
use crate::manifest::{Descriptor, Document, Manifest};
use std::collections::BTreeSet;

/// Indexes that name indexes.
const MAX_DEPTH: usize = 4;
/// Images that an index leads to.
const MAX_IMAGES: usize = 10_000;

/// The image in a layout, or that of a name.
pub(super) fn find(store: &Store, index: &[u8], tag: Option<&str>) -> Result<Image, Error> {
    let index: Document = parse("index.json", index)?;
    let all = index.manifests.unwrap_or_default();
    let named = |descriptor: &Descriptor| match (tag, descriptor.name()) {
        (None, _) => true,
        (Some(tag), Some(name)) => {
            name == tag || name.strip_suffix(tag).is_some_and(|name| name.ends_with(':'))
        }
        (Some(_), None) => false,
    };
    let names = || {
        let names: BTreeSet<&str> = all.iter().filter_map(Descriptor::name).collect();
        if names.is_empty() {
            "none with a name".to_owned()
        } else {
            names.into_iter().collect::<Vec<_>>().join(", ")
        }
    };
    let chosen: Vec<_> = all.iter().filter(|descriptor| named(descriptor)).cloned().collect();
    if let Some(tag) = tag
        && chosen.is_empty()
    {
        return Err(Error::NoTag { tag: tag.to_owned(), names: names() });
    }
    let mut manifests = choose_platform(chosen, &|descriptor| store.described(descriptor))?;
    manifests.dedup_by_key(|descriptor| descriptor.digest);
    match &*manifests {
        [manifest] => image(store, manifest),
        [] => Err(Error::NoImage),
        _ => Err(Error::Choose(names())),
    }
}

/// The manifests for this machine among those that indexes name, whose content `fetch` gets.
pub(super) fn choose_platform(
    descriptors: Vec<Descriptor>,
    fetch: &dyn Fn(&Descriptor) -> Result<Vec<u8>, Error>,
) -> Result<Vec<Descriptor>, Error> {
    let mut chosen = Vec::new();
    let mut others = BTreeSet::new();
    let mut left: Vec<_> = descriptors.into_iter().rev().map(|descriptor| (descriptor, 1)).collect();
    let mut seen = 0;
    while let Some((descriptor, depth)) = left.pop() {
        seen += 1;
        if seen > MAX_IMAGES {
            return Err(Error::Members(seen));
        }
        if let Some(platform) = &descriptor.platform
            && !platform.runs_here()
        {
            // Attestations are for the platform unknown/unknown.
            if platform.os != "unknown" {
                others.insert(format!("{}/{}", platform.os, platform.architecture));
            }
        } else if descriptor.is_index() && depth < MAX_DEPTH {
            let name = descriptor.digest.to_string();
            let index: Document = parse(&name, &fetch(&descriptor)?)?;
            left.extend(
                index.manifests.unwrap_or_default().into_iter().rev().map(|inner| (inner, depth + 1)),
            );
        } else {
            chosen.push(descriptor);
        }
    }
    if chosen.is_empty() && !others.is_empty() {
        return Err(Error::Platform(others.into_iter().collect::<Vec<_>>().join(", ")));
    }
    Ok(chosen)
}

fn image(store: &Store, descriptor: &Descriptor) -> Result<Image, Error> {
    let name = descriptor.digest.to_string();
    let document: Document = parse(&name, &store.described(descriptor)?)?;
    let manifest = document.into_manifest().ok_or(Error::Manifest(name))?;
    let config = store.described(&manifest.config)?;
    assemble(manifest.config.digest, &config, layers(&manifest)?)
}

/// A manifest's layers, whose types are known.
pub(super) fn layers(manifest: &Manifest) -> Result<Vec<Layer>, Error> {
    (1..)
        .zip(&manifest.layers)
        .map(|(number, layer)| {
            if !layer.is_known_layer() {
                return Err(Error::LayerType { number, media_type: layer.media_type.clone() });
            }
            Ok(Layer { name: blob_name(layer.digest), check: Check::Blob(layer.digest, layer.size) })
        })
        .collect()
}
