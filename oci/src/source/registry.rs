//! Images in a registry, whose documents are read with the registry client.

use super::{Image, check, check_digest, index, read_document};
use crate::digest::Digest;
use crate::error::Error;
use crate::manifest::{Descriptor, target_of};
use crate::reference::Version;
use crate::registry::{Registry, RegistryError};
use ureq::Body;
use ureq::http::Response;

/// Finds the image of the client's reference.
pub(super) fn find(registry: &Registry) -> Result<Image, Error> {
    let version = match &registry.reference.version {
        Version::Tag(tag) => tag.clone(),
        Version::Digest(digest) => digest.to_string(),
    };
    let response = registry.get(&format!("manifests/{version}"), true, 0)?;
    let header = response.headers().get("content-type").and_then(|value| value.to_str().ok());
    let media_type = header.unwrap_or_default().split(';').next().unwrap_or_default().trim();
    // Object storage, to which registries redirect, sends other types. Then the content decides.
    let mut media_type = media_type.to_ascii_lowercase();
    if target_of(&media_type).is_none() {
        media_type.clear();
    }
    let content = content(registry, response, &version)?;
    let digest = Digest::of(&content);
    if let Version::Digest(expected) = registry.reference.version {
        check_digest(expected, &content)?;
    }
    let top = Descriptor::new(media_type, digest);
    let manifest = |descriptor: &Descriptor| match descriptor.digest()? {
        known if known == digest => Ok(content.clone()),
        other => document(registry, descriptor, &format!("manifests/{other}"), true),
    };
    let blob = |descriptor: &Descriptor| {
        let digest = descriptor.digest()?;
        document(registry, descriptor, &format!("blobs/{digest}"), false)
    };
    index::choose(vec![top], &manifest, &blob)
}

/// Reads the target of a descriptor and checks its size and digest.
fn document(
    registry: &Registry,
    descriptor: &Descriptor,
    path: &str,
    is_manifest: bool,
) -> Result<Vec<u8>, Error> {
    let digest = descriptor.digest()?;
    let content = content(registry, registry.get(path, is_manifest, 0)?, &digest.to_string())?;
    check(descriptor, digest, &content)?;
    Ok(content)
}

fn content(registry: &Registry, response: Response<Body>, name: &str) -> Result<Vec<u8>, Error> {
    read_document(name, response.into_body().into_reader(), |error| {
        let url = format!("{}: {name}", registry.reference.host);
        RegistryError::Request { url, source: Box::new(error.into()) }.into()
    })
}
