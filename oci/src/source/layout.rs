//! Images in an OCI layout: an index of manifests, and blobs that are named by their digests.

use super::index::choose;
use super::{Image, Store, parse, single};
use crate::error::Error;
use crate::manifest::{Descriptor, Document};
use crate::names;
use std::collections::BTreeSet;

/// Finds the only image of a layout, or the one with a tag.
pub(super) fn find(store: &Store, index: &[u8], tag: Option<&str>) -> Result<Image, Error> {
    let index: Document = parse("index.json", index)?;
    let all = index.manifests.unwrap_or_default();
    let names = |descriptor: &Descriptor| {
        let digest = [descriptor.digest_text()].into_iter().filter(|digest| !digest.is_empty());
        descriptor.names().chain(digest).map(str::to_owned).collect()
    };
    let chosen = match tag {
        None => all.iter().collect(),
        Some(tag) => names::matching(tag, &all, names),
    };
    if let Some(tag) = tag
        && chosen.is_empty()
    {
        let names: BTreeSet<_> = all.iter().filter_map(|descriptor| descriptor.names().next()).collect();
        return Err(Error::no_tag(tag, names));
    }
    let fetch = |descriptor: &Descriptor| store.target(descriptor);
    let images = groups(chosen).into_iter().map(|(name, group)| (name, choose(group, &fetch, &fetch)));
    single(images.collect())
}

/// Groups descriptors into images, each with its name. Descriptors with the same name are one image for several
/// platforms, and so are descriptors without a name that have a platform.
fn groups(descriptors: Vec<&Descriptor>) -> Vec<(String, Vec<Descriptor>)> {
    let mut groups: Vec<(String, Option<&str>, Vec<Descriptor>)> = Vec::new();
    for descriptor in descriptors {
        let name = descriptor.names().next();
        let is_part = name.is_some() || descriptor.platform.is_some();
        match groups.iter_mut().find(|(_, known, group)| {
            is_part && *known == name && (name.is_some() || group[0].platform.is_some())
        }) {
            Some((.., group)) => group.push(descriptor.clone()),
            None => {
                let shown = name.unwrap_or_else(|| descriptor.digest_text());
                groups.push((shown.to_owned(), name, vec![descriptor.clone()]));
            }
        }
    }
    groups.into_iter().map(|(shown, _, group)| (shown, group)).collect()
}
