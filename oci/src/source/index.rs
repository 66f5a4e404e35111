//! The image for this machine among those that an index names, whatever the index and its blobs are read from.

use super::{Image, Layer, assemble, blob_name, parse};
use crate::error::Error;
use crate::layer::Check;
use crate::manifest::{Descriptor, Document, Manifest, NoManifest, Target};
use crate::platform::Platform;
use crate::registry::RegistryError;
use std::cmp::Reverse;
use std::collections::BTreeSet;

/// Indexes that name indexes.
const MAX_DEPTH: usize = 4;
/// Images that an index leads to.
const MAX_IMAGES: usize = 10_000;

/// What gets the content of a blob that a descriptor names.
pub(super) type Fetch<'a> = &'a dyn Fn(&Descriptor) -> Result<Vec<u8>, Error>;

/// The image for this machine among those that indexes name: of the highest level of processor that this machine
/// has, then the first. `manifest` and `blob` get content.
pub(super) fn choose(
    descriptors: Vec<Descriptor>,
    manifest: Fetch<'_>,
    blob: Fetch<'_>,
) -> Result<Image, Error> {
    let (mut candidates, mut obstacles) = candidates(descriptors, manifest)?;
    // Those that do not say their platform come last.
    let level = |descriptor: &Descriptor| descriptor.platform.as_ref().and_then(Platform::level);
    candidates.sort_by_key(|descriptor| Reverse(level(descriptor)));
    for candidate in candidates {
        match image(&candidate, manifest, blob) {
            Err(error) if is_passed_over(&error) => obstacles.add(error),
            result => return result,
        }
    }
    Err(obstacles.error())
}

/// Whether another image of an index may do where this one does not.
const fn is_passed_over(error: &Error) -> bool {
    matches!(
        error,
        Error::NotAnImage(_)
            | Error::Platform(_)
            | Error::Missing(_)
            | Error::Algorithm(_)
            | Error::OldManifest(_)
            | Error::LayerType { .. }
            | Error::Registry(RegistryError::NotFound(_))
    )
}

/// Why none of an index's images does.
#[derive(Debug, Default)]
struct Obstacles {
    platforms: BTreeSet<String>,
    kinds: BTreeSet<String>,
    first: Option<Error>,
}

impl Obstacles {
    fn add(&mut self, error: Error) {
        match error {
            Error::Platform(platform) => drop(self.platforms.insert(platform)),
            Error::NotAnImage(kind) => drop(self.kinds.insert(kind)),
            error => drop(self.first.get_or_insert(error)),
        }
    }

    fn error(self) -> Error {
        let list = |names: BTreeSet<String>| names.into_iter().collect::<Vec<_>>().join(", ");
        match self.first {
            Some(error) => error,
            None if !self.platforms.is_empty() => Error::Platform(list(self.platforms)),
            None if !self.kinds.is_empty() => Error::NotAnImage(list(self.kinds)),
            None => Error::NoImage,
        }
    }
}

/// The manifests that may be of an image for this machine, in order, and why others are not.
fn candidates(
    descriptors: Vec<Descriptor>,
    manifest: Fetch<'_>,
) -> Result<(Vec<Descriptor>, Obstacles), Error> {
    let mut found = Vec::new();
    let mut obstacles = Obstacles::default();
    let mut left: Vec<_> = descriptors.into_iter().rev().map(|descriptor| (descriptor, 1)).collect();
    let mut seen = 0;
    while let Some((descriptor, depth)) = left.pop() {
        seen += 1;
        if seen > MAX_IMAGES {
            return Err(Error::Members(seen));
        }
        let platform = descriptor.platform.as_ref().filter(|platform| platform.level().is_none());
        let target = descriptor.target();
        if let Some(platform) = platform.filter(|platform| !platform.is_unknown()) {
            obstacles.add(Error::Platform(platform.to_string()));
        } else if platform.is_some() || target == Target::Other {
            obstacles.add(Error::NotAnImage(descriptor.kind().to_owned()));
        } else if target == Target::Manifest || depth > MAX_DEPTH {
            found.push(descriptor);
        } else {
            match nested(&descriptor, manifest) {
                Ok(Some(inner)) => left.extend(inner.into_iter().rev().map(|inner| (inner, depth + 1))),
                Ok(None) => found.push(descriptor),
                Err(error) if is_passed_over(&error) => obstacles.add(error),
                Err(error) => return Err(error),
            }
        }
    }
    Ok((found, obstacles))
}

/// What an index names; none where it is no index.
fn nested(descriptor: &Descriptor, manifest: Fetch<'_>) -> Result<Option<Vec<Descriptor>>, Error> {
    let index: Document = parse(descriptor.digest_text(), &manifest(descriptor)?)?;
    Ok(index.manifests)
}

/// The image of a manifest.
fn image(descriptor: &Descriptor, manifest: Fetch<'_>, blob: Fetch<'_>) -> Result<Image, Error> {
    let name = descriptor.digest_text();
    let document: Document = parse(name, &manifest(descriptor)?)?;
    let manifest = document.into_manifest().map_err(|reason| match reason {
        NoManifest::Old => Error::OldManifest(name.to_owned()),
        NoManifest::Other(kind) => Error::NotAnImage(kind),
        NoManifest::Damaged => Error::Manifest(name.to_owned()),
    })?;
    let config = blob(&manifest.config)?;
    assemble(manifest.config.digest()?, &config, layers(&manifest)?)
}

/// A manifest's layers, whose types are known.
fn layers(manifest: &Manifest) -> Result<Vec<Layer>, Error> {
    (1..)
        .zip(&manifest.layers)
        .map(|(number, layer)| {
            if !layer.is_known_layer() {
                return Err(Error::LayerType { number, media_type: layer.media_type().to_owned() });
            }
            let digest = layer.digest()?;
            let size = layer.size().ok_or(Error::LayerSize(number))?;
            Ok(Layer { name: blob_name(digest), check: Check::Blob(digest, size) })
        })
        .collect()
}
