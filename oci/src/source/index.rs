//! Selection of the image for this machine from the descriptors of an index, for layouts and registries alike.

use super::{Image, Layer, assemble, blob_name, parse};
use crate::error::Error;
use crate::layer::Check;
use crate::manifest::{Descriptor, Document, Manifest, ManifestError, Target};
use crate::platform::Platform;
use crate::registry::RegistryError;
use std::cmp::Reverse;
use std::collections::BTreeSet;

/// Maximum depth of nested indexes.
const MAX_DEPTH: usize = 4;
/// Maximum number of descriptors in an index and its nested indexes.
const MAX_IMAGES: usize = 10_000;

/// A function that reads the content of a descriptor's target.
pub(super) type Fetch<'a> = &'a dyn Fn(&Descriptor) -> Result<Vec<u8>, Error>;

/// Selects the image for this machine: the one for the highest microarchitecture level that this processor has, and of
/// several with this level the first. `manifest` reads manifests and indexes, `blob` reads configurations.
pub(super) fn choose(
    descriptors: Vec<Descriptor>,
    manifest: Fetch<'_>,
    blob: Fetch<'_>,
) -> Result<Image, Error> {
    let (mut candidates, mut rejections) = candidates(descriptors, manifest)?;
    // Images without a platform come last.
    let level = |descriptor: &Descriptor| descriptor.platform.as_ref().and_then(Platform::level);
    candidates.sort_by_key(|descriptor| Reverse(level(descriptor)));
    for candidate in candidates {
        match image(&candidate, manifest, blob) {
            Err(error) if is_skipped(&candidate, &error) => rejections.add(error),
            result => return result,
        }
    }
    Err(rejections.error())
}

/// Whether the next image is tried after this error.
///
/// A damaged entry for this platform is reported. One without a platform may be anything, so that it does not keep
/// others from being used. A registry that refuses an entry is an error: the user may have to log in.
fn is_skipped(descriptor: &Descriptor, error: &Error) -> bool {
    let is_refused = matches!(error, Error::Registry(RegistryError::Denied(_)));
    descriptor.platform.is_none() && error.is_user_error() && !is_refused
        || matches!(
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

/// Why the images of an index were rejected.
#[derive(Debug, Default)]
struct Rejections {
    platforms: BTreeSet<String>,
    kinds: BTreeSet<String>,
    first: Option<Error>,
}

impl Rejections {
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
            None => Error::UnknownFormat,
        }
    }
}

/// The manifests that may be for this machine, in order, and why the others were rejected.
fn candidates(
    descriptors: Vec<Descriptor>,
    manifest: Fetch<'_>,
) -> Result<(Vec<Descriptor>, Rejections), Error> {
    let mut found = Vec::new();
    let mut rejections = Rejections::default();
    let mut queue: Vec<_> = descriptors.into_iter().rev().map(|descriptor| (descriptor, 1)).collect();
    let mut seen = 0;
    while let Some((descriptor, depth)) = queue.pop() {
        seen += 1;
        if seen > MAX_IMAGES {
            return Err(Error::TooManyEntries(seen));
        }
        let platform = descriptor.platform.as_ref().filter(|platform| platform.level().is_none());
        let target = descriptor.target();
        if let Some(platform) = platform.filter(|platform| !platform.is_unknown()) {
            rejections.add(Error::Platform(platform.to_string()));
        } else if platform.is_some() || target == Target::Other {
            rejections.add(Error::NotAnImage(descriptor.artifact_type().to_owned()));
        } else if target == Target::Manifest || depth > MAX_DEPTH {
            found.push(descriptor);
        } else {
            match nested(&descriptor, manifest) {
                Ok(Some(inner)) => queue.extend(inner.into_iter().rev().map(|inner| (inner, depth + 1))),
                Ok(None) => found.push(descriptor),
                Err(error) if is_skipped(&descriptor, &error) => rejections.add(error),
                Err(error) => return Err(error),
            }
        }
    }
    Ok((found, rejections))
}

/// The descriptors of an index, or none for a document that is not an index.
fn nested(descriptor: &Descriptor, manifest: Fetch<'_>) -> Result<Option<Vec<Descriptor>>, Error> {
    let index: Document = parse(descriptor.digest_text(), &manifest(descriptor)?)?;
    Ok(index.into_entries())
}

/// Reads the image of a manifest.
fn image(descriptor: &Descriptor, manifest: Fetch<'_>, blob: Fetch<'_>) -> Result<Image, Error> {
    let name = descriptor.digest_text();
    let document: Document = parse(name, &manifest(descriptor)?)?;
    let manifest = document.into_manifest().map_err(|reason| match reason {
        ManifestError::Schema1 => Error::OldManifest(name.to_owned()),
        ManifestError::OtherType(kind) => Error::NotAnImage(kind),
        ManifestError::Invalid => Error::Manifest(name.to_owned()),
    })?;
    let config = blob(&manifest.config)?;
    assemble(manifest.config.digest()?, &config, layers(&manifest)?)
}

/// The layers of a manifest, whose media types and sizes are checked.
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
