//! Where an image comes from: a folder, an archive, a registry.

mod archive;
mod docker;
mod index;
mod layout;
mod registry;

use crate::digest::Digest;
use crate::error::Error;
use crate::layer::Check;
use crate::manifest::{self, Descriptor, ImageConfig, MAX_DOCUMENT};
use crate::reference::Reference;
use crate::registry::Registry;
use archive::Archive;
use rustix::fs::OFlags;
use serde::de::DeserializeOwned;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// An image whose layers can be read.
#[derive(Debug)]
pub(crate) struct Image {
    /// The digest of its configuration, by which people know it.
    pub(crate) id: Digest,
    pub(crate) config: ImageConfig,
    pub(crate) layers: Vec<Layer>,
}

impl Image {
    /// The digest of everything that a filesystem is made from, as far as it is checked.
    ///
    /// The configuration's digest alone would not do: whoever makes an image can name another's configuration beside
    /// layers of their own.
    pub(crate) fn key(&self) -> Digest {
        let mut text = self.id.to_string();
        for layer in &self.layers {
            let (what, digest) = match layer.check {
                Check::Blob(digest, _) => ("blob", digest),
                Check::Content(digest) => ("content", digest),
            };
            text += &format!(" {what} {digest}");
        }
        Digest::of(text.as_bytes())
    }
}

/// A layer.
#[derive(Debug)]
pub(crate) struct Layer {
    /// Its name in a folder or an archive.
    pub(crate) name: String,
    pub(crate) check: Check,
}

/// Files of one or more images.
#[derive(Debug)]
pub(crate) enum Store {
    Folder(PathBuf),
    Archive(Archive),
    Registry(Registry),
}

impl Store {
    /// Opens a folder or an archive. A compressed archive is unpacked into a file in `scratch` that has no name.
    pub(crate) fn open(path: &Path, scratch: &Path) -> Result<Self, Error> {
        let failed = |source| Error::Read { path: path.into(), source };
        let file = File::open(path).map_err(failed)?;
        if file.metadata().map_err(failed)?.is_dir() {
            return Ok(Self::Folder(path.into()));
        }
        Ok(Self::Archive(Archive::open(file, path, scratch)?))
    }

    /// A registry, of which nothing is asked yet.
    pub(crate) fn registry(reference: Reference) -> Result<Self, Error> {
        Ok(Self::Registry(Registry::new(reference)?))
    }

    /// The image in it, or that of a name.
    pub(crate) fn image(&self, tag: Option<&str>) -> Result<Image, Error> {
        if let Self::Registry(registry) = self {
            return registry::find(registry);
        }
        let saved = match self {
            Self::Archive(_) => self.document("manifest.json")?,
            _ => None,
        };
        match (self.document("index.json")?, saved) {
            // `docker save` writes both; where one does not lead to the image, the other may.
            (Some(index), Some(saved)) => layout::find(self, &index, tag)
                .or_else(|error| docker::find(self, &saved, tag).map_err(|_| error)),
            (Some(index), None) => layout::find(self, &index, tag),
            (None, Some(saved)) => docker::find(self, &saved, tag),
            (None, None) if self.file("repositories")?.is_some() => Err(Error::OldArchive),
            (None, None) => Err(Error::NoImage),
        }
    }

    /// A layer's content.
    pub(crate) fn layer(&self, layer: &Layer) -> Result<Box<dyn Read + Send + '_>, Error> {
        if let (Self::Registry(registry), Check::Blob(digest, _)) = (self, layer.check) {
            return Ok(Box::new(registry.download(digest)?));
        }
        self.file(&layer.name)?.ok_or_else(|| Error::Missing(layer.name.clone()))
    }

    /// A file's content; none where it does not exist.
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

    /// A small file's content.
    fn document(&self, name: &str) -> Result<Option<Vec<u8>>, Error> {
        let Some(file) = self.file(name)? else { return Ok(None) };
        let failed = |source| Error::Read { path: name.into(), source };
        read_document(name, file, failed).map(Some)
    }

    /// A document that is named by its digest.
    fn described(&self, descriptor: &Descriptor) -> Result<Vec<u8>, Error> {
        let digest = descriptor.digest()?;
        let name = blob_name(digest);
        let content = self.document(&name)?.ok_or(Error::Missing(name))?;
        check(descriptor, digest, &content)?;
        Ok(content)
    }
}

/// Reads a document to its end; `failed` makes the error of a read.
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

/// Opens a file without waiting for anybody; none where it is something else than a file.
fn open_file(path: &Path) -> io::Result<Option<File>> {
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    let file = File::options().read(true).custom_flags(flags).open(path)?;
    Ok(file.metadata()?.is_file().then_some(file))
}

/// Checks a document against what names it.
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

/// Where an OCI layout has a blob.
fn blob_name(digest: Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

fn parse<T: DeserializeOwned>(name: &str, document: &[u8]) -> Result<T, Error> {
    manifest::parse(document).map_err(|source| Error::Document { name: name.to_owned(), source })
}

/// The image of a configuration and its layers.
fn assemble(id: Digest, config: &[u8], layers: Vec<Layer>) -> Result<Image, Error> {
    let config: ImageConfig = parse("configuration", config)?;
    if config.platform.level().is_none() {
        return Err(Error::Platform(config.platform.to_string()));
    }
    let named = config.rootfs.diff_ids.as_deref().unwrap_or_default().len();
    if named != layers.len() {
        return Err(Error::LayerCount { layers: layers.len(), named });
    }
    Ok(Image { id, config, layers })
}

/// The only image among those of some names, or the same one several times. What is none does not count beside it.
fn single(found: Vec<(String, Result<Image, Error>)>) -> Result<Image, Error> {
    let mut images: Vec<(String, Image)> = Vec::new();
    let mut failure = None;
    for (name, result) in found {
        match result {
            Ok(image) => images.push((name, image)),
            Err(error) => drop(failure.get_or_insert(error)),
        }
    }
    let Some((_, first)) = images.first() else { return Err(failure.unwrap_or(Error::NoImage)) };
    let key = first.key();
    if images.iter().any(|(_, image)| image.key() != key) {
        let mut names: Vec<_> = images.into_iter().map(|(name, _)| name).collect();
        names.sort();
        names.dedup();
        return Err(Error::Choose(names.join(", ")));
    }
    Ok(images.swap_remove(0).1)
}
