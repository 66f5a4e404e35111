//! Why an image cannot be had.

use crate::digest::{Digest, NoDigest};
use crate::manifest::MAX_DOCUMENT;
use crate::registry::RegistryError;
use crate::{erofs, layer, reference, tarball, user};
use std::io;
use std::path::PathBuf;

/// Why an image cannot be had. The command puts the image's name in front.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Nothing of that name.
    #[error("there is no such file or folder")]
    NotFound,
    /// A file or folder that is something else.
    #[error(
        "it is neither an OCI layout nor an archive of one or of `docker save`; \
         `skopeo copy` and `docker save` make them"
    )]
    NoImage,
    /// The archive of an image is damaged.
    #[error("the archive is damaged; save the image again")]
    Archive(#[source] tarball::Error),
    /// The archive of an image is damaged.
    #[error("{0} members are more than an image has")]
    Members(usize),
    /// A document is not what it should be.
    #[error("its {name} is damaged")]
    Document {
        /// The document.
        name: String,
        /// The cause.
        #[source]
        source: serde_json::Error,
    },
    /// A document is no manifest.
    #[error("its {0} is not the manifest of an image")]
    Manifest(String),
    /// A manifest of Docker's first format.
    #[error(
        "its {0} is a manifest of version 1, of before 2016, which is not read; push or save it by a newer docker"
    )]
    OldManifest(String),
    /// An archive of Docker's first format.
    #[error(
        "it is an archive of `docker save` before version 1.10, which is not read; save it by a newer docker"
    )]
    OldArchive,
    /// Something else than an image.
    #[error("it is no container image; its type is {0}")]
    NotAnImage(String),
    /// A document of another size.
    #[error(
        "its {name} has {found} bytes, not {expected}; it was damaged or exchanged, save or pull it again"
    )]
    DocumentSize {
        /// The document.
        name: String,
        /// What the image says.
        expected: u64,
        /// What there is.
        found: u64,
    },
    /// A digest that is no SHA-256.
    #[error(transparent)]
    Algorithm(#[from] NoDigest),
    /// A blob is a directory or a device.
    #[error("its {0} is not a file; save or pull it again")]
    NotAFile(String),
    /// A layer whose size is missing or negative.
    #[error("layer {0} has no size in its manifest, or one that no layer can have")]
    LayerSize(usize),
    /// A document is too large.
    #[error("its {0} has more than {max} MiB", max = MAX_DOCUMENT >> 20)]
    LargeDocument(String),
    /// Something is missing.
    #[error("it is not whole: {0} is missing; save or pull it again")]
    Missing(String),
    /// A document is another one.
    #[error("its {expected} has the digest {found}; it was damaged or exchanged, save or pull it again")]
    Digest {
        /// The digest that it should have.
        expected: Digest,
        /// The digest that it has.
        found: Digest,
    },
    /// Which of them?
    #[error("it has several images; add one of these to its name: {0}")]
    Choose(String),
    /// Not this one.
    #[error("it has no image {tag:?}; it has {names}")]
    NoTag {
        /// What was asked for.
        tag: String,
        /// What there is.
        names: String,
    },
    /// For other machines.
    #[error("it has no image for linux/amd64, only for {0}")]
    Platform(String),
    /// Layers and configuration disagree.
    #[error("it has {layers} layers, and its configuration names {named}; save or pull it again")]
    LayerCount {
        /// In the manifest.
        layers: usize,
        /// In the configuration.
        named: usize,
    },
    /// A layer of an unknown type.
    #[error("layer {number} is of the type {media_type:?}, which is not known here")]
    LayerType {
        /// Counted from 1.
        number: usize,
        /// What it says.
        media_type: String,
    },
    /// A layer cannot be used.
    #[error("layer {number} of {count}")]
    Layer {
        /// Counted from 1.
        number: usize,
        /// All of them.
        count: usize,
        /// The cause.
        #[source]
        source: layer::Error,
    },
    /// The filesystem could not be written.
    #[error("its filesystem")]
    Filesystem(#[source] erofs::Error),
    /// A list of users that is too long.
    #[error("its {0} has more than {max} MiB", max = user::MAX_FILE >> 20)]
    LargeUsers(&'static str),
    /// The user is not known.
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
    /// The cache is of no use.
    #[error("cannot write {path}")]
    Cache {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The cache is not this user's alone.
    #[error("the cache cannot be used")]
    Untrusted(#[from] trusted_path::Error),
    /// Nowhere to put files.
    #[error("none of --cache, KINDLING_CACHE, XDG_CACHE_HOME and HOME says where to keep images")]
    NoCache,
    /// Neither a file nor a reference.
    #[error("as the name of an image in a registry it is wrong")]
    Reference(#[from] reference::Error),
    /// Nothing to remove.
    #[error("no image of this name or id is kept; `kindling image ls` has those that are")]
    NotStored,
    /// Not to be pulled.
    #[error("it has not been pulled before; `--pull missing` pulls it")]
    NotPulled,
    /// The registry does not give it.
    #[error(transparent)]
    Registry(#[from] RegistryError),
}

impl Error {
    /// No image of this name among others.
    pub(crate) fn no_tag<T: AsRef<str>>(tag: &str, names: impl IntoIterator<Item = T>) -> Self {
        let names: Vec<_> = names.into_iter().map(|name| name.as_ref().to_owned()).collect();
        let names = if names.is_empty() { "none with a name".to_owned() } else { names.join(", ") };
        Self::NoTag { tag: tag.to_owned(), names }
    }

    /// Whether the one who asked can mend it: another name, another copy of the image.
    #[must_use]
    pub fn is_users(&self) -> bool {
        match self {
            Self::Layer { source, .. } => source.is_of_the_image(),
            Self::Archive(tarball::Error::Read(error)) => error.raw_os_error().is_none(),
            Self::Filesystem(source) => matches!(source, erofs::Error::TooLarge(_)),
            Self::Registry(source) => source.is_users(),
            Self::Cache { .. } | Self::Untrusted(trusted_path::Error::Host { .. }) => false,
            _ => true,
        }
    }
}
