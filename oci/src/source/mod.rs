//! Sources of images: a directory with an OCI layout, an archive, or a registry.

mod archive;
mod docker;
mod index;
mod layout;
mod registry;

use crate::digest::Digest;
use crate::error::Error;
use crate::json;
use crate::layer::Check;
use crate::manifest::{Descriptor, ImageConfig, MAX_DOCUMENT};
use crate::reference::Reference;
use crate::registry::Registry;
use archive::Archive;
use rustix::fs::OFlags;
use serde::de::DeserializeOwned;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// An image of a source.
#[derive(Debug)]
pub(crate) struct Image {
    /// The image id: the digest of its configuration.
    pub(crate) id: Digest,
    pub(crate) config: ImageConfig,
    pub(crate) layers: Vec<Layer>,
}

impl Image {
    /// The cache key: a digest of the digests of the configuration and of all layers.
    ///
    /// The digest of the configuration is not enough: a manifest can combine the configuration of another image with
    /// other layers.
    pub(crate) fn key(&self) -> Digest {
        let mut text = self.id.to_string();
        for layer in &self.layers {
            let (what, digest) = match layer.check {
                Check::Blob(digest, _) => ("blob", digest),
                Check::DiffId(digest) => ("content", digest),
            };
            text += &format!(" {what} {digest}");
        }
        Digest::of(text.as_bytes())
    }
}

/// A layer of an image.
#[derive(Debug)]
pub(crate) struct Layer {
    /// The path of its blob in a directory or an archive.
    pub(crate) name: String,
    pub(crate) check: Check,
}

/// A source of one or more images.
#[derive(Debug)]
pub(crate) enum Store {
    Folder(PathBuf),
    Archive(Archive),
    Registry(Registry),
}

impl Store {
    /// Opens a directory or an archive. A compressed archive is decompressed to an unnamed file in `scratch`.
    pub(crate) fn open(path: &Path, scratch: &Path) -> Result<Self, Error> {
        let failed = |source| Error::Read { path: path.into(), source };
        let file = File::open(path).map_err(failed)?;
        if file.metadata().map_err(failed)?.is_dir() {
            return Ok(Self::Folder(path.into()));
        }
        Ok(Self::Archive(Archive::open(file, path, scratch)?))
    }

    /// A registry; no request is made yet.
    pub(crate) fn registry(reference: Reference) -> Result<Self, Error> {
        Ok(Self::Registry(Registry::new(reference)?))
    }

    /// Finds the only image, or the one with a tag.
    pub(crate) fn image(&self, tag: Option<&str>) -> Result<Image, Error> {
        if let Self::Registry(registry) = self {
            return registry::find(registry);
        }
        let saved = match self {
            Self::Archive(_) => self.document("manifest.json")?,
            _ => None,
        };
        match (self.document("index.json")?, saved) {
            // `docker save` writes both. The image may be found in only one of them.
            (Some(index), Some(saved)) => layout::find(self, &index, tag)
                .or_else(|error| docker::find(self, &saved, tag).map_err(|_| error)),
            (Some(index), None) => layout::find(self, &index, tag),
            (None, Some(saved)) => docker::find(self, &saved, tag),
            (None, None) if self.file("repositories")?.is_some() => Err(Error::OldArchive),
            (None, None) => Err(Error::UnknownFormat),
        }
    }

    /// A reader of a layer's blob.
    pub(crate) fn layer(&self, layer: &Layer) -> Result<Box<dyn Read + Send + '_>, Error> {
        if let (Self::Registry(registry), Check::Blob(digest, _)) = (self, layer.check) {
            return Ok(Box::new(registry.download(digest)?));
        }
        self.file(&layer.name)?.ok_or_else(|| Error::Missing(layer.name.clone()))
    }

    /// A reader of a file, or none if it does not exist.
    fn file(&self, name: &str) -> Result<Option<Box<dyn Read + Send + '_>>, Error> {
        match self {
            Self::Registry(_) => Ok(None),
            Self::Folder(folder) => {
                let path = folder.join(name);
                match open_file(&path) {
                    Ok(Some(file)) => Ok(Some(Box::new(file))),
                    Ok(None) => Err(Error::NotAFile(name.to_owned())),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
                    Err(source) => Err(Error::Read { path, source }),
                }
            }
            Self::Archive(archive) => {
                Ok(archive.member(name).map(|range| Box::new(range) as Box<dyn Read + Send + '_>))
            }
        }
    }

    /// The content of a document, or none if it does not exist.
    fn document(&self, name: &str) -> Result<Option<Vec<u8>>, Error> {
        let Some(file) = self.file(name)? else { return Ok(None) };
        let failed = |source| Error::Read { path: name.into(), source };
        read_document(name, file, failed).map(Some)
    }

    /// Reads the target of a descriptor and checks its size and digest.
    fn target(&self, descriptor: &Descriptor) -> Result<Vec<u8>, Error> {
        let digest = descriptor.digest()?;
        let name = blob_name(digest);
        let content = self.document(&name)?.ok_or(Error::Missing(name))?;
        check(descriptor, digest, &content)?;
        Ok(content)
    }
}

/// Reads a document to its end, up to `MAX_DOCUMENT` bytes. `failed` converts a read error.
fn read_document(
    name: &str,
    input: impl Read,
    failed: impl FnOnce(io::Error) -> Error,
) -> Result<Vec<u8>, Error> {
    let mut content = Vec::new();
    input.take(MAX_DOCUMENT + 1).read_to_end(&mut content).map_err(failed)?;
    if content.len() as u64 > MAX_DOCUMENT {
        return Err(Error::LargeDocument(name.to_owned()));
    }
    Ok(content)
}

/// Opens a regular file, or returns none for another type. O_NONBLOCK keeps the open of a FIFO from waiting for a
/// writer.
fn open_file(path: &Path) -> io::Result<Option<File>> {
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    let file = File::options().read(true).custom_flags(flags).open(path)?;
    Ok(file.metadata()?.is_file().then_some(file))
}

/// Checks the digest and the size of a document against its descriptor.
fn check(descriptor: &Descriptor, digest: Digest, content: &[u8]) -> Result<(), Error> {
    check_digest(digest, content)?;
    let found = content.len() as u64;
    match descriptor.size() {
        Some(expected) if expected != found => {
            Err(Error::DocumentSize { name: digest.to_string(), expected, found })
        }
        _ => Ok(()),
    }
}

fn check_digest(expected: Digest, content: &[u8]) -> Result<(), Error> {
    let found = Digest::of(content);
    if found == expected { Ok(()) } else { Err(Error::Digest { expected, found }) }
}

/// The path of a blob in an OCI layout.
fn blob_name(digest: Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

fn parse<T: DeserializeOwned>(name: &str, document: &[u8]) -> Result<T, Error> {
    json::parse(document).map_err(|source| Error::Document { name: name.to_owned(), source })
}

/// Creates an image from its configuration and layers, after checks of the platform and the number of layers.
fn assemble(id: Digest, config: &[u8], layers: Vec<Layer>) -> Result<Image, Error> {
    let config: ImageConfig = parse("configuration", config)?;
    let platform = config.platform();
    if platform.level().is_none() {
        return Err(Error::Platform(platform.to_string()));
    }
    let named = config.rootfs.diff_ids.as_deref().unwrap_or_default().len();
    if named != layers.len() {
        return Err(Error::LayerCount { layers: layers.len(), named });
    }
    Ok(Image { id, config, layers })
}

/// Returns the image if all results with an image have the same one. Errors count only if there is no image.
fn single(found: Vec<(String, Result<Image, Error>)>) -> Result<Image, Error> {
    let mut images: Vec<(String, Image)> = Vec::new();
    let mut failure = None;
    for (name, result) in found {
        match result {
            Ok(image) => images.push((name, image)),
            Err(error) => drop(failure.get_or_insert(error)),
        }
    }
    let Some((_, first)) = images.first() else { return Err(failure.unwrap_or(Error::UnknownFormat)) };
    let key = first.key();
    if images.iter().any(|(_, image)| image.key() != key) {
        let mut names: Vec<_> = images.into_iter().map(|(name, _)| name).collect();
        names.sort();
        names.dedup();
        return Err(Error::Ambiguous(names.join(", ")));
    }
    Ok(images.swap_remove(0).1)
}
