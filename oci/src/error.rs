//! The error of the public functions.

use crate::digest::{Digest, InvalidDigest};
use crate::manifest::MAX_DOCUMENT;
use crate::registry::RegistryError;
use crate::{erofs, layer, reference, tarball, user};
use std::io;
use std::path::PathBuf;

/// Why an image cannot be prepared. The command prefixes the message with the image's name.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file or directory does not exist.
    #[error("no such file or directory")]
    NotFound,
    /// The file or directory is not an image.
    #[error(
        "neither an OCI layout nor an archive of one or of `docker save`; create one with `skopeo copy` or `docker save`"
    )]
    UnknownFormat,
    /// The archive of an image is damaged.
    #[error("the archive is damaged; save the image again")]
    Archive(#[source] tarball::Error),
    /// An archive or an index has too many entries.
    #[error("too many entries for an image: {0}")]
    TooManyEntries(usize),
    /// A document cannot be parsed.
    #[error("invalid {name}")]
    Document {
        /// The document.
        name: String,
        /// The cause.
        #[source]
        source: serde_json::Error,
    },
    /// A document is not an image manifest.
    #[error("{0} is not an image manifest")]
    Manifest(String),
    /// A manifest of Docker's schema 1.
    #[error(
        "{0} is a schema 1 manifest, from before 2016, which is not supported; push or save the image with a newer docker"
    )]
    OldManifest(String),
    /// An archive of Docker's first format.
    #[error(
        "an archive of `docker save` before version 1.10, which is not supported; save the image with a newer docker"
    )]
    OldArchive,
    /// A manifest or an artifact of another type.
    #[error("not a container image; its type is {0}")]
    NotAnImage(String),
    /// The size of a document differs from its descriptor's.
    #[error(
        "{name} has {found} bytes, expected {expected}; it is damaged or was replaced, save or pull the image again"
    )]
    DocumentSize {
        /// The document.
        name: String,
        /// The size in the descriptor.
        expected: u64,
        /// The size of the document.
        found: u64,
    },
    /// A digest of another algorithm than SHA-256, or a malformed one.
    #[error(transparent)]
    Algorithm(#[from] InvalidDigest),
    /// A blob is a directory or a device.
    #[error("{0} is not a regular file; save or pull the image again")]
    NotAFile(String),
    /// A layer whose size is missing or negative.
    #[error("the manifest has no valid size for layer {0}")]
    LayerSize(usize),
    /// A document is too large.
    #[error("{0} is larger than {max} MiB", max = MAX_DOCUMENT >> 20)]
    LargeDocument(String),
    /// A blob or a file of the image is missing.
    #[error("incomplete image: {0} is missing; save or pull the image again")]
    Missing(String),
    /// The digest of a document differs from its descriptor's.
    #[error("{expected} has the digest {found}; it is damaged or was replaced, save or pull the image again")]
    Digest {
        /// The digest in the descriptor.
        expected: Digest,
        /// The digest of the document.
        found: Digest,
    },
    /// Several images match.
    #[error("several images; append one of these to the name: {0}")]
    Ambiguous(String),
    /// No image has this tag.
    #[error("no image {tag:?}; available: {names}")]
    NoTag {
        /// The requested tag.
        tag: String,
        /// The names of the available images.
        names: String,
    },
    /// The image is for other platforms only.
    #[error("no image for linux/amd64, only for {0}")]
    Platform(String),
    /// Manifest and configuration disagree.
    #[error(
        "the manifest has {layers} layers, but the configuration has {named}; save or pull the image again"
    )]
    LayerCount {
        /// The number of layers in the manifest.
        layers: usize,
        /// The number of layers in the configuration.
        named: usize,
    },
    /// A layer of an unknown media type.
    #[error("layer {number} has the unknown media type {media_type:?}")]
    LayerType {
        /// Counted from 1.
        number: usize,
        /// The media type.
        media_type: String,
    },
    /// A layer cannot be used.
    #[error("layer {number} of {count}")]
    Layer {
        /// Counted from 1.
        number: usize,
        /// The number of layers.
        count: usize,
        /// The cause.
        #[source]
        source: layer::Error,
    },
    /// The filesystem cannot be written.
    #[error("conversion to EROFS")]
    Filesystem(#[source] erofs::Error),
    /// A user or group database that is too large.
    #[error("the image's {0} is larger than {max} MiB", max = user::MAX_FILE >> 20)]
    LargeUserFile(&'static str),
    /// The user or group does not exist.
    #[error(transparent)]
    User(#[from] user::Error),
    /// A file of the image cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The cache cannot be written.
    #[error("cannot write {path}")]
    Cache {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Other users can change the cache.
    #[error("the cache cannot be used")]
    Untrusted(#[from] trusted_path::Error),
    /// No cache directory is configured.
    #[error("no cache directory; set --cache, KINDLING_CACHE, XDG_CACHE_HOME or HOME")]
    NoCache,
    /// Not a path and not a valid reference.
    #[error("invalid image reference")]
    Reference(#[from] reference::Error),
    /// The cache has no such image.
    #[error("no such image; `kindling image ls` lists the images in the cache")]
    NotStored,
    /// The image is not in the cache, and pulling is disabled.
    #[error("not in the cache; pull it with `--pull missing`")]
    NotPulled,
    /// A request to the registry failed.
    #[error(transparent)]
    Registry(#[from] RegistryError),
}

impl Error {
    /// The error for a tag that none of the images has.
    pub(crate) fn no_tag<T: AsRef<str>>(tag: &str, names: impl IntoIterator<Item = T>) -> Self {
        let names: Vec<_> = names.into_iter().map(|name| name.as_ref().to_owned()).collect();
        let names = if names.is_empty() { "only unnamed images".to_owned() } else { names.join(", ") };
        Self::NoTag { tag: tag.to_owned(), names }
    }

    /// Whether the image or its name is at fault, so that another name or another copy of the image helps.
    #[must_use]
    pub fn is_user_error(&self) -> bool {
        match self {
            Self::Layer { source, .. } => source.is_image_error(),
            Self::Archive(tarball::Error::Read(error)) => error.raw_os_error().is_none(),
            Self::Filesystem(source) => matches!(source, erofs::Error::TooLarge(_)),
            Self::Registry(source) => source.is_user_error(),
            Self::Cache { .. } | Self::Untrusted(trusted_path::Error::Host { .. }) => false,
            _ => true,
        }
    }
}
