//! Images as OCI layouts in memory, which `kindling-oci` converts.

use kindling_oci::{Cache, Digest, Options, Pull, prepare};
use std::fs::{File, create_dir_all, write};
use std::io::Read;
use std::path::Path;
use tempfile::TempDir;

pub const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG_TYPE: &str = "application/vnd.oci.image.config.v1+json";
const LAYER_TYPE: &str = "application/vnd.oci.image.layer.v1.tar";

/// A layout in a temporary directory.
pub struct Layout(TempDir);

impl Layout {
    pub fn new() -> Self {
        let layout = Self(tempfile::tempdir_in("/dev/shm").unwrap());
        create_dir_all(layout.path().join("blobs/sha256")).unwrap();
        write(layout.path().join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        layout
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Adds a blob. Returns its descriptor in JSON.
    pub fn blob(&self, kind: &str, bytes: &[u8]) -> String {
        let digest = Digest::of(bytes).hex();
        write(self.path().join("blobs/sha256").join(&digest), bytes).unwrap();
        format!(r#"{{"mediaType":"{kind}","digest":"sha256:{digest}","size":{}}}"#, bytes.len())
    }

    pub fn config(&self, layers: &[&[u8]]) -> String {
        let ids: Vec<_> = layers.iter().map(|layer| format!("\"sha256:{}\"", Digest::of(layer).hex())).collect();
        let ids = ids.join(",");
        let config = format!(
            r#"{{"os":"linux","architecture":"amd64","config":{{"Cmd":["a"]}},"rootfs":{{"type":"layers","diff_ids":[{ids}]}}}}"#
        );
        self.blob(CONFIG_TYPE, config.as_bytes())
    }

    pub fn layer(&self, tar: &[u8]) -> String {
        self.blob(LAYER_TYPE, tar)
    }

    pub fn manifest(&self, config: &str, layers: &[String]) -> String {
        let manifest = format!(
            r#"{{"schemaVersion":2,"mediaType":"{MANIFEST_TYPE}","config":{config},"layers":[{}]}}"#,
            layers.join(",")
        );
        self.blob(MANIFEST_TYPE, manifest.as_bytes())
    }

    pub fn index(&self, manifests: &[String]) {
        let index = format!(r#"{{"schemaVersion":2,"manifests":[{}]}}"#, manifests.join(","));
        write(self.path().join("index.json"), index).unwrap();
    }

    /// An image of these layers.
    pub fn image(layers: &[&[u8]]) -> Self {
        let layout = Self::new();
        let blobs: Vec<_> = layers.iter().map(|layer| layout.layer(layer)).collect();
        let config = layout.config(layers);
        layout.index(&[layout.manifest(&config, &blobs)]);
        layout
    }

    /// Converts the image, or refuses it. What is converted is an EROFS filesystem of whole blocks.
    pub fn convert(&self) -> Option<File> {
        convert(self.path())
    }
}

/// Converts an image at a path.
pub fn convert(image: &Path) -> Option<File> {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let cache = Cache::open(Some(folder.path())).unwrap();
    let options = Options { pull: Pull::Never, user: None };
    let prepared = prepare(&cache, image.to_str().unwrap(), &options, &mut |_, _| {}).ok()?;
    let mut file = File::open(prepared.rootfs).unwrap();
    let mut head = vec![0; 2048];
    file.read_exact(&mut head).unwrap();
    assert_eq!(head[1024..1028], 0xe0f5_e1e2_u32.to_le_bytes());
    assert_eq!(file.metadata().unwrap().len() % 4096, 0);
    Some(file)
}
