//! Construction and conversion of test images.
#![allow(dead_code, reason = "each test program uses some of it")]

pub mod reader;

use kindling_oci::{Cache, Digest, Error, Options, Prepared, prepare};
use serde_json::{Value, json};
use std::error::Error as _;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use tar::{Builder, EntryType, Header};
use tempfile::TempDir;

/// A layer under construction.
pub struct Layer(Builder<Vec<u8>>);

impl Layer {
    pub fn new() -> Self {
        Self(Builder::new(Vec::new()))
    }

    /// A header with any bytes in its name.
    pub fn header(kind: EntryType, name: &[u8], mode: u32, size: u64) -> Header {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_700_000_000);
        header.set_size(size);
        header.as_old_mut().name[..name.len()].copy_from_slice(name);
        header
    }

    pub fn raw(mut self, mut header: Header, content: &[u8]) -> Self {
        header.set_cksum();
        self.0.append(&header, content).unwrap();
        self
    }

    pub fn file(self, name: &str, content: &str) -> Self {
        let header = Self::header(EntryType::Regular, name.as_bytes(), 0o644, content.len() as u64);
        self.raw(header, content.as_bytes())
    }

    pub fn folder(self, name: &str, mode: u32) -> Self {
        self.raw(Self::header(EntryType::Directory, name.as_bytes(), mode, 0), b"")
    }

    pub fn link(self, kind: EntryType, name: &str, target: &str) -> Self {
        let mut header = Self::header(kind, name.as_bytes(), 0o777, 0);
        header.as_old_mut().linkname[..target.len()].copy_from_slice(target.as_bytes());
        self.raw(header, b"")
    }

    pub fn symlink(self, name: &str, target: &str) -> Self {
        self.link(EntryType::Symlink, name, target)
    }

    pub fn hard_link(self, name: &str, target: &str) -> Self {
        self.link(EntryType::Link, name, target)
    }

    /// An extended header for the next file.
    pub fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let mut content = Vec::new();
        for (key, value) in records {
            let rest = key.len() + value.len() + 3;
            let mut length = rest + 1;
            while length != rest + length.to_string().len() {
                length += 1;
            }
            content.extend_from_slice(format!("{length} {key}=").as_bytes());
            content.extend_from_slice(value);
            content.push(b'\n');
        }
        let header = Self::header(EntryType::XHeader, b"pax", 0o644, content.len() as u64);
        self.raw(header, &content)
    }

    pub fn bytes(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }

    /// The archive without the two records of zeroes at its end.
    pub fn without_end(self) -> Vec<u8> {
        let mut bytes = self.bytes();
        bytes.truncate(bytes.len() - 1024);
        bytes
    }
}

/// The compression of layers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Packing {
    Plain,
    Gzip,
    Zstd,
}

impl Packing {
    pub fn pack(self, bytes: &[u8]) -> Vec<u8> {
        match self {
            Self::Plain => bytes.to_vec(),
            Self::Gzip => {
                let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                encoder.write_all(bytes).unwrap();
                encoder.finish().unwrap()
            }
            Self::Zstd => {
                ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest)
            }
        }
    }

    const fn media_type(self) -> &'static str {
        match self {
            Self::Plain => "application/vnd.oci.image.layer.v1.tar",
            Self::Gzip => "application/vnd.oci.image.layer.v1.tar+gzip",
            Self::Zstd => "application/vnd.oci.image.layer.v1.tar+zstd",
        }
    }
}

/// A temporary directory for an image and a cache.
pub struct Workspace {
    pub folder: TempDir,
}

impl Workspace {
    pub fn new() -> Self {
        Self { folder: tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn layout(&self) -> Layout {
        Layout::new(self.path("image"))
    }

    pub fn prepare(&self, image: &str) -> Result<Prepared, Error> {
        self.prepare_as(image, None)
    }

    pub fn prepare_as(&self, image: &str, user: Option<&str>) -> Result<Prepared, Error> {
        let options = Options { user: user.map(str::to_owned), ..Options::default() };
        let cache = Cache::open(Some(&self.path("cache")))?;
        prepare(&cache, &self.path(image).display().to_string(), &options, &mut |_, _| {})
    }

    /// The error message, and whether it is a user error. Checks that nothing is left in the cache.
    pub fn error(&self, image: &str) -> (String, bool) {
        let found = self.error_with_cache(image);
        assert!(self.drafts().is_empty(), "{:?}", self.drafts());
        found
    }

    /// The same, without the check, for a cache with other images.
    pub fn error_with_cache(&self, image: &str) -> (String, bool) {
        let error = self.prepare(image).unwrap_err();
        let is_user_error = error.is_user_error();
        let mut line = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            line += &format!(": {error}");
            cause = error.source();
        }
        (line, is_user_error)
    }

    /// The entries of the cache, except for locks and names.
    pub fn drafts(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.path("cache/oci/v2")) else { return Vec::new() };
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| !name.ends_with(".lock") && !name.ends_with(".name")).collect()
    }

    /// The error message for an image of uncompressed layers. Checks that it is a user error.
    pub fn refused(layers: &[Vec<u8>]) -> String {
        let workspace = Self::new();
        workspace.layout().write_bytes(layers, Packing::Plain);
        let (line, is_user_error) = workspace.error("image");
        assert!(is_user_error, "{line}");
        line
    }

    /// The listing of an image of uncompressed layers.
    pub fn listed(layers: &[Vec<u8>]) -> Vec<String> {
        let workspace = Self::new();
        workspace.layout().write_bytes(layers, Packing::Plain);
        let prepared = workspace.prepare("image").unwrap();
        check(&prepared.rootfs);
        reader::list(&prepared.rootfs)
    }

    /// The listing of the merged layers.
    pub fn merged(&self, layers: Vec<Layer>) -> Vec<String> {
        self.layout().write(layers, Packing::Plain);
        let prepared = self.prepare("image").unwrap();
        check(&prepared.rootfs);
        reader::list(&prepared.rootfs)
    }
}

/// Checks a filesystem with fsck.erofs.
pub fn check(image: &Path) {
    let output = Command::new("fsck.erofs").arg(image).stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{}: {output:?}", image.display());
}

/// An OCI layout under construction.
pub struct Layout {
    pub folder: PathBuf,
}

impl Layout {
    pub fn new(folder: PathBuf) -> Self {
        fs::create_dir_all(folder.join("blobs/sha256")).unwrap();
        fs::write(folder.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        Self { folder }
    }

    pub fn blob_path(&self, digest: &str) -> PathBuf {
        self.folder.join("blobs/sha256").join(digest.trim_start_matches("sha256:"))
    }

    pub fn blob(&self, media_type: &str, content: &[u8]) -> Value {
        let digest = Digest::of(content).to_string();
        fs::write(self.blob_path(&digest), content).unwrap();
        json!({ "mediaType": media_type, "digest": digest, "size": content.len() })
    }

    pub fn document(&self, media_type: &str, content: &Value) -> Value {
        self.blob(media_type, content.to_string().as_bytes())
    }

    pub fn layer(&self, content: &[u8], packing: Packing) -> (Value, Digest) {
        (self.blob(packing.media_type(), &packing.pack(content)), Digest::of(content))
    }

    pub fn config(&self, digests: &[Digest]) -> Value {
        json!({
            "architecture": "amd64", "os": "linux",
            "config": { "Cmd": ["sh"], "Env": ["PATH=/bin"] },
            "rootfs": { "type": "layers", "diff_ids": digests },
        })
    }

    /// Adds a manifest and returns its descriptor.
    pub fn manifest(&self, config: &Value, layers: &[Value]) -> Value {
        let config = self.document("application/vnd.oci.image.config.v1+json", config);
        let manifest = json!({ "schemaVersion": 2, "config": config, "layers": layers });
        self.document("application/vnd.oci.image.manifest.v1+json", &manifest)
    }

    pub fn index(&self, manifests: &[Value]) {
        let index = json!({ "schemaVersion": 2, "manifests": manifests }).to_string();
        fs::write(self.folder.join("index.json"), index).unwrap();
    }

    pub fn write(&self, layers: Vec<Layer>, packing: Packing) {
        self.write_bytes(&layers.into_iter().map(Layer::bytes).collect::<Vec<_>>(), packing);
    }

    pub fn write_bytes(&self, layers: &[Vec<u8>], packing: Packing) {
        let (layers, digests): (Vec<_>, Vec<_>) =
            layers.iter().map(|layer| self.layer(layer, packing)).unzip();
        self.index(&[self.manifest(&self.config(&digests), &layers)]);
    }
}
