//! The documents of an image: index, manifest and configuration of the OCI image specification, and Docker's, which
//! differ in the media types.
//!
//! `json.rs` parses them. The names of fields are in lower case, since those of documents match in any case.

use crate::digest::{Digest, InvalidDigest};
use crate::json::Value;
use crate::platform::Platform;
use serde::de::value::SeqAccessDeserializer;
use serde::de::{IgnoredAny, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use std::collections::BTreeMap;
use std::fmt::{self, Formatter};

/// Maximum size of a manifest, an index or a configuration: twice what registries accept.
pub(crate) const MAX_DOCUMENT: u64 = 8 << 20;

pub(crate) const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub(crate) const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(crate) const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
pub(crate) const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
/// Schema 1 manifests, from before 2016.
const DOCKER_SCHEMA_1: &str = "application/vnd.docker.distribution.manifest.v1+";

/// Media types of image configurations. Old registries returned the last four for images, too.
const CONFIGS: [&str; 6] = [
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
    "application/octet-stream",
    "application/json",
    "text/html",
    "",
];

/// The annotation of an index for an image's name.
const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// The annotation for the complete name. containerd and `docker save` write only the tag to `REF_NAME`.
const IMAGE_NAME: &str = "io.containerd.image.name";
/// The annotation that marks a manifest as an attestation and not an image.
const REFERENCE_TYPE: &str = "vnd.docker.reference.type";

/// A content descriptor. All fields are optional, since an index may have descriptors of anything besides images.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Descriptor {
    #[serde(rename = "mediatype")]
    media_type: Option<String>,
    digest: Option<String>,
    #[serde(deserialize_with = "size_or_none")]
    size: Option<u64>,
    annotations: Option<BTreeMap<String, Option<String>>>,
    pub(crate) platform: Option<Platform>,
    #[serde(rename = "artifacttype")]
    artifact_type: Option<String>,
}

/// The type of a descriptor's target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    Index,
    Manifest,
    /// An index or a manifest, depending on the content.
    Either,
    /// Not an image.
    Other,
}

/// The target of a media type that images have.
pub(crate) fn target_of(media_type: &str) -> Option<Target> {
    match media_type {
        OCI_INDEX | DOCKER_INDEX => Some(Target::Index),
        OCI_MANIFEST | DOCKER_MANIFEST => Some(Target::Manifest),
        schema_1 if schema_1.starts_with(DOCKER_SCHEMA_1) => Some(Target::Manifest),
        _ => None,
    }
}

impl Descriptor {
    pub(crate) fn new(media_type: String, digest: Digest) -> Self {
        Self { media_type: Some(media_type), digest: Some(digest.to_string()), ..Self::default() }
    }

    pub(crate) fn media_type(&self) -> &str {
        self.media_type.as_deref().unwrap_or_default()
    }

    pub(crate) fn digest(&self) -> Result<Digest, InvalidDigest> {
        self.digest_text().parse()
    }

    pub(crate) fn digest_text(&self) -> &str {
        self.digest.as_deref().unwrap_or_default()
    }

    pub(crate) const fn size(&self) -> Option<u64> {
        self.size
    }

    pub(crate) fn target(&self) -> Target {
        match self.media_type() {
            _ if self.annotation(REFERENCE_TYPE).is_some() => Target::Other,
            kind if let Some(target) = target_of(kind) => target,
            ""
            | "application/json"
            | "application/octet-stream"
            | "binary/octet-stream"
            | "text/plain"
            | "text/html" => Target::Either,
            _ => Target::Other,
        }
    }

    /// The type of a target that is not an image, for messages.
    pub(crate) fn artifact_type(&self) -> &str {
        let kinds = [self.artifact_type.as_deref(), self.annotation(REFERENCE_TYPE)];
        kinds.into_iter().flatten().find(|kind| !kind.is_empty()).unwrap_or_else(|| self.media_type())
    }

    fn annotation(&self, name: &str) -> Option<&str> {
        self.annotations.as_ref()?.get(name)?.as_deref()
    }

    /// The names that an index gives to the image, the complete one first.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        let names = [IMAGE_NAME, REF_NAME].into_iter().filter_map(|name| self.annotation(name));
        names.filter(|name| !name.is_empty())
    }

    /// Whether it is a layer of a supported media type.
    pub(crate) fn is_known_layer(&self) -> bool {
        let prefixes = [
            ("application/vnd.oci.image.layer.v1.tar", ["", "+gzip", "+zstd"]),
            ("application/vnd.oci.image.layer.nondistributable.v1.tar", ["", "+gzip", "+zstd"]),
            ("application/vnd.docker.image.rootfs.diff.tar", ["", ".gzip", ".zstd"]),
            ("application/vnd.docker.image.rootfs.foreign.diff.tar", ["", ".gzip", ".zstd"]),
        ];
        let is_type = |(prefix, suffixes): &(&str, [&str; 3])| {
            self.media_type().strip_prefix(prefix).is_some_and(|suffix| suffixes.contains(&suffix))
        };
        prefixes.iter().any(is_type)
    }

    /// Whether it is the content of an artifact. Its media type is neither missing nor one for layers, not even for layers
    /// in a format that is not supported.
    fn is_artifact(&self) -> bool {
        let is_layer = |prefix| self.media_type().starts_with(prefix);
        !["application/vnd.oci.image.layer.", "application/vnd.docker.image.rootfs."]
            .into_iter()
            .any(is_layer)
            && !self.media_type().is_empty()
    }

    fn is_known_config(&self) -> bool {
        CONFIGS.contains(&self.media_type())
    }
}

/// A document that may be an index or a manifest.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Document {
    #[serde(rename = "schemaversion")]
    schema_version: Option<i64>,
    #[serde(rename = "mediatype")]
    media_type: Option<String>,
    #[serde(rename = "artifacttype")]
    artifact_type: Option<String>,
    pub(crate) manifests: Option<Vec<Descriptor>>,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
}

/// Why a document is not the manifest of an image.
#[derive(Debug)]
pub(crate) enum ManifestError {
    /// A schema 1 manifest.
    Schema1,
    /// A document of this other type.
    OtherType(String),
    /// Neither a manifest nor a document with a type.
    Invalid,
}

impl Document {
    /// The entries of an index, or none for another document. Its own media type decides, or else its fields.
    pub(crate) fn into_entries(self) -> Option<Vec<Descriptor>> {
        let target = self.media_type.as_deref().and_then(target_of);
        self.manifests.filter(|_| target != Some(Target::Manifest))
    }

    /// The image's configuration and layers.
    pub(crate) fn into_manifest(self) -> Result<Manifest, ManifestError> {
        let given = |text: Option<String>| text.filter(|text| !text.is_empty());
        if self.schema_version == Some(1) {
            return Err(ManifestError::Schema1);
        }
        let artifact_type = given(self.artifact_type);
        let Some(config) = self.config else {
            let kind = artifact_type.or(given(self.media_type));
            let is_manifest = |kind: &String| matches!(&**kind, OCI_MANIFEST | DOCKER_MANIFEST);
            return Err(kind
                .filter(|kind| !is_manifest(kind))
                .map_or(ManifestError::Invalid, ManifestError::OtherType));
        };
        let layers = self.layers.unwrap_or_default();
        // Artifacts may have the configuration of an image: in-toto's and cosign's have.
        let content = match &layers[..] {
            _ if !config.is_known_config() => Some(&config),
            layers if layers.iter().all(Descriptor::is_artifact) => layers.first(),
            _ => None,
        };
        match content {
            Some(content) => Err(ManifestError::OtherType(
                artifact_type.unwrap_or_else(|| content.media_type().to_owned()),
            )),
            None => Ok(Manifest { config, layers }),
        }
    }
}

/// An image manifest.
#[derive(Debug)]
pub(crate) struct Manifest {
    pub(crate) config: Descriptor,
    pub(crate) layers: Vec<Descriptor>,
}

/// An entry of the manifest.json of `docker save`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct SavedImage {
    pub(crate) config: String,
    #[serde(rename = "repotags")]
    pub(crate) repo_tags: Option<Vec<String>>,
    pub(crate) layers: Option<Vec<String>>,
}

/// An image's configuration.
#[derive(Debug, Deserialize)]
pub(crate) struct ImageConfig {
    #[serde(default)]
    os: Option<String>,
    #[serde(default)]
    architecture: Option<String>,
    #[serde(default)]
    variant: Option<String>,
    #[serde(default)]
    pub(crate) config: Option<RunConfig>,
    pub(crate) rootfs: RootFs,
}

impl ImageConfig {
    pub(crate) fn platform(&self) -> Platform {
        Platform {
            os: self.os.clone(),
            architecture: self.architecture.clone(),
            variant: self.variant.clone(),
        }
    }
}

/// The digests of the uncompressed layers.
#[derive(Debug, Deserialize)]
pub(crate) struct RootFs {
    #[serde(default)]
    pub(crate) diff_ids: Option<Vec<String>>,
}

/// The execution parameters of an image.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct RunConfig {
    pub(crate) user: Option<String>,
    pub(crate) env: Option<Vec<String>>,
    #[serde(deserialize_with = "string_or_list")]
    pub(crate) entrypoint: Option<Vec<String>>,
    #[serde(deserialize_with = "string_or_list")]
    pub(crate) cmd: Option<Vec<String>>,
    #[serde(rename = "workingdir")]
    pub(crate) working_dir: Option<String>,
    #[serde(rename = "stopsignal")]
    pub(crate) stop_signal: Option<String>,
    #[serde(rename = "exposedports")]
    pub(crate) exposed_ports: Option<BTreeMap<String, IgnoredAny>>,
}

/// Deserializes a list of strings, or a single string as a list of one, as docker does.
fn string_or_list<'de, D: Deserializer<'de>>(input: D) -> Result<Option<Vec<String>>, D::Error> {
    struct Words;
    impl<'de> Visitor<'de> for Words {
        type Value = Option<Vec<String>>;

        fn expecting(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
            formatter.write_str("a string or a list of strings")
        }

        fn visit_unit<E>(self) -> Result<Self::Value, E> {
            Ok(None)
        }

        fn visit_str<E>(self, word: &str) -> Result<Self::Value, E> {
            Ok(Some(vec![word.to_owned()]))
        }

        fn visit_seq<A: SeqAccess<'de>>(self, words: A) -> Result<Self::Value, A::Error> {
            Vec::deserialize(SeqAccessDeserializer::new(words)).map(Some)
        }
    }
    input.deserialize_any(Words)
}

/// Deserializes the size of a blob, or none for every other value: an index may have descriptors of anything.
fn size_or_none<'de, D: Deserializer<'de>>(input: D) -> Result<Option<u64>, D::Error> {
    Ok(match Value::deserialize(input)? {
        Value::Number(size) => size.as_u64(),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::json::parse;

    #[test]
    fn configurations_are_read_as_go_reads_them() {
        let config = |text: &str| parse::<ImageConfig>(text.as_bytes());
        let run = |text: &str| {
            let run: RunConfig = parse(text.as_bytes()).unwrap();
            (run.entrypoint.unwrap_or_default(), run.cmd.unwrap_or_default(), run.env.unwrap_or_default())
        };
        let words = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect::<Vec<_>>();
        let level = |text| config(text).unwrap().platform().level();
        assert_eq!(level(r#"{"os":"plan9","os":"linux","architecture":"amd64","rootfs":{}}"#), Some(1));
        assert_eq!(level(r#"{"OS":null,"rootfs":{"diff_ids":null}}"#), Some(1));
        assert_eq!(level(r#"{"os":"linux","architecture":"riscv64","rootfs":{}}"#), None);
        assert!(config(r#"{"os":"linux"}"#).is_err() && config("[]").is_err() && config("null").is_err());
        assert_eq!(
            run(r#"{"cmd":["/hi"],"ENV":["A=b"],"Entrypoint":"/bin/sh","X":{"y":[1]}}"#),
            (words(&["/bin/sh"]), words(&["/hi"]), words(&["A=b"]))
        );
        assert_eq!(run(r#"{"Cmd":null,"Env":null}"#), (vec![], vec![], vec![]));
        assert_eq!(
            run(r#"{"Entrypoint":[null],"Cmd":["a",null],"Env":[null]}"#),
            (words(&[""]), words(&["a", ""]), words(&[""]))
        );
        assert_eq!(run(r#"{"CMD":["a"],"cmd":["b"],"Cmd":["c"]}"#).1, words(&["c"]));
        assert!(parse::<RunConfig>(br#"{"Cmd":7}"#).is_err());
    }

    #[test]
    fn other_documents_than_manifests_are_reported_with_their_type() {
        let of = |text: &str| match parse::<Document>(text.as_bytes()).unwrap().into_manifest() {
            Ok(_) => "image".to_owned(),
            Err(ManifestError::Schema1) => "old".to_owned(),
            Err(ManifestError::Invalid) => "damaged".to_owned(),
            Err(ManifestError::OtherType(kind)) => kind,
        };
        for kind in CONFIGS {
            assert_eq!(of(&format!(r#"{{"schemaVersion":2,"config":{{"mediaType":"{kind}"}}}}"#)), "image");
        }
        assert_eq!(of(r#"{"config":{}}"#), "image");
        assert_eq!(of(r#"{"schemaVersion":1,"fsLayers":[]}"#), "old");
        assert_eq!(of(r#"{"schemaVersion":-1,"config":{}}"#), "image");
        assert_eq!(of(r#"{"schemaVersion":2}"#), "damaged");
        let helm = "application/vnd.cncf.helm.config.v1+json";
        assert_eq!(of(&format!(r#"{{"schemaVersion":2,"config":{{"mediaType":"{helm}"}}}}"#)), helm);
        let artifact = r#"{"config":{"mediaType":"application/vnd.oci.empty.v1+json"},"artifactType":"a/b"}"#;
        assert_eq!(of(artifact), "a/b");
        let before = r#"{"mediaType":"application/vnd.oci.artifact.manifest.v1+json","artifactType":"c/d"}"#;
        assert_eq!(of(before), "c/d");
    }
}
