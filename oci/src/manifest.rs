//! The documents of an image: the OCI image specification's index, manifest and configuration, and Docker's, which
//! differ in names of types.

use crate::digest::Digest;
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;

pub(crate) const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub(crate) const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(crate) const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
pub(crate) const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";

/// The name that an index gives to an image.
pub(crate) const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// A blob and what it is.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Descriptor {
    #[serde(default)]
    pub(crate) media_type: String,
    pub(crate) digest: Digest,
    pub(crate) size: u64,
    #[serde(default)]
    pub(crate) annotations: Option<BTreeMap<String, String>>,
    pub(crate) platform: Option<Platform>,
}

impl Descriptor {
    pub(crate) fn is_index(&self) -> bool {
        matches!(&*self.media_type, OCI_INDEX | DOCKER_INDEX)
    }

    pub(crate) fn name(&self) -> Option<&str> {
        self.annotations.as_ref()?.get(REF_NAME).map(String::as_str)
    }

    /// Whether it is a layer of a type that is read here.
    pub(crate) fn is_known_layer(&self) -> bool {
        let plain = ["", "+gzip", "+zstd"];
        let is =
            |prefix: &str| self.media_type.strip_prefix(prefix).is_some_and(|suffix| plain.contains(&suffix));
        is("application/vnd.oci.image.layer.v1.tar")
            || is("application/vnd.oci.image.layer.nondistributable.v1.tar")
            || matches!(
                &*self.media_type,
                "application/vnd.docker.image.rootfs.diff.tar"
                    | "application/vnd.docker.image.rootfs.diff.tar.gzip"
                    | "application/vnd.docker.image.rootfs.diff.tar.zstd"
            )
    }
}

/// What an image runs on.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Platform {
    pub(crate) architecture: String,
    pub(crate) os: String,
}

/// A document that may be an index or a manifest.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Document {
    schema_version: Option<u32>,
    #[serde(default)]
    pub(crate) manifests: Option<Vec<Descriptor>>,
    config: Option<Descriptor>,
    #[serde(default)]
    layers: Option<Vec<Descriptor>>,
}

impl Document {
    /// The image's configuration and layers; none where it is no manifest of an image.
    pub(crate) fn into_manifest(self) -> Option<Manifest> {
        (self.schema_version == Some(2))
            .then_some(())
            .and_then(|()| Some(Manifest { config: self.config?, layers: self.layers.unwrap_or_default() }))
    }
}

/// An image's parts.
#[derive(Debug)]
pub(crate) struct Manifest {
    pub(crate) config: Descriptor,
    pub(crate) layers: Vec<Descriptor>,
}

/// What `docker save` writes of each image.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Saved {
    pub(crate) config: String,
    #[serde(default)]
    pub(crate) repo_tags: Option<Vec<String>>,
    #[serde(default)]
    pub(crate) layers: Option<Vec<String>>,
}

/// An image's configuration.
#[derive(Debug, Deserialize)]
pub(crate) struct ImageConfig {
    pub(crate) architecture: String,
    pub(crate) os: String,
    #[serde(default)]
    pub(crate) config: Option<RunConfig>,
    pub(crate) rootfs: RootFs,
}

/// The layers' uncompressed digests.
#[derive(Debug, Deserialize)]
pub(crate) struct RootFs {
    #[serde(default)]
    pub(crate) diff_ids: Option<Vec<Digest>>,
}

/// How an image is to be run.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(crate) struct RunConfig {
    pub(crate) user: Option<String>,
    pub(crate) env: Option<Vec<String>>,
    pub(crate) entrypoint: Option<Vec<String>>,
    pub(crate) cmd: Option<Vec<String>>,
    pub(crate) working_dir: Option<String>,
    pub(crate) stop_signal: Option<String>,
    pub(crate) exposed_ports: Option<BTreeMap<String, Value>>,
}
