//! Why an image cannot be had.

use crate::digest::Digest;
use crate::source::RegistryError;
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
    #[error("its {0} is not the manifest of an image; images in Docker's format of before 2016 are not read")]
    Manifest(String),
    /// A document is too large.
    #[error("its {0} has more than {max} MiB", max = crate::source::MAX_DOCUMENT >> 20)]
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
    #[error("it is neither a path, as ./NAME is, nor the name of an image in a registry")]
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
