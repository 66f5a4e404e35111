//! Damaged, truncated, replaced and malicious images: the error is one line, and nothing is left in the cache.

mod support;

use kindling_oci::Digest;
use serde_json::{Value, json};
use std::fs;
use support::{Layer, Layout, Packing, Workspace};
use tar::EntryType;

/// The error message for an image with an empty layer and this one.
fn error_of_layer(layer: Layer) -> String {
    let workspace = Workspace::new();
    workspace.layout().write(vec![Layer::new(), layer], Packing::Plain);
    let (line, is_user_error) = workspace.error("image");
    assert!(is_user_error, "{line}");
    line
}

#[test]
fn entries_that_a_filesystem_cannot_hold_are_refused() {
    let is = |layer, expected: &str| assert_eq!(error_of_layer(layer), format!("layer 2 of 2: {expected}"));
    let name = "n".repeat(256);
    let shown = "n".repeat(200);
    let long_name = format!("{shown}: the name is longer than 255 bytes, or the path than 4096");
    is(Layer::new().pax(&[("path", name.as_bytes())]).file("x", ""), &long_name);
    let path = "d/".repeat(2100);
    let long_path = format!("{}: the name is longer than 255 bytes, or the path than 4096", &path[..200]);
    is(Layer::new().pax(&[("path", path.as_bytes())]).folder("x", 0o755), &long_path);
    is(Layer::new().pax(&[("path", b"a\0b")]).file("x", ""), "a\\x00b: the name contains a NUL byte");
    // The same holds for files whose names are only those of hard links to them.
    let pseudo_link = |name: &[u8]| {
        let path = [b".wh..wh.plnk/", name].concat();
        Layer::new().pax(&[("path", &path)]).file("x", "")
    };
    let refusal = "the name is longer than 255 bytes, or the path than 4096";
    is(pseudo_link(name.as_bytes()), &format!(".wh..wh.plnk/{}: {refusal}", &name[..187]));
    let path = format!("{}f", "d/".repeat(2100));
    is(pseudo_link(path.as_bytes()), &format!(".wh..wh.plnk/{}d: {refusal}", "d/".repeat(93)));
    is(pseudo_link(b"a\0b"), ".wh..wh.plnk/a\\x00b: the name contains a NUL byte");
    is(Layer::new().file("a", "").file("a/b", ""), "a/b: a component of the path is not a directory");
    is(Layer::new().file(".", ""), ".: the root must be a directory");
    is(Layer::new().symlink("..", "x"), "..: the root must be a directory");
    is(
        Layer::new().symlink("l", ""),
        "l: the target of the symbolic link has 0 bytes; it must have 1 to 4095",
    );
    is(
        Layer::new().symlink("a", "b").symlink("b", "a").file("a/x", ""),
        "a/x: more than 40 symbolic links in the path",
    );
    is(Layer::new().hard_link("l", "no"), "l: a hard link to no, which is not a file of the image");
    is(
        Layer::new().folder("d", 0o755).hard_link("l", "d"),
        "l: a hard link to d, which is not a file of the image",
    );
    let unknown = Layer::header(EntryType::new(b'V'), b"volume", 0o644, 0);
    is(Layer::new().raw(unknown, b""), "volume: unknown tar entry type 'V'");
    is(Layer::new().pax(&[("uid", b"4294967296")]).file("a", ""), "a: invalid owner in its header");
    is(
        Layer::new().pax(&[("mtime", b"soon")]).file("a", ""),
        "byte 0: invalid record in an extended header: 14 mtime=soon\\n",
    );
    let value = vec![b'v'; 65_536];
    is(
        Layer::new().pax(&[("SCHILY.xattr.user.a", &value)]).file("a", ""),
        "a: its extended attributes are larger than 64 KiB",
    );
    let huge = vec![b'v'; (1 << 20) + 1];
    is(
        Layer::new().pax(&[("comment", &huge)]).file("a", ""),
        "byte 0: an extended header is larger than 1024 KiB",
    );
    let sparse: &[(&str, &[u8])] =
        &[("GNU.sparse.name", b"s"), ("GNU.sparse.size", b"9"), ("GNU.sparse.map", b"8,3")];
    is(Layer::new().pax(sparse).file("x", "abc"), "s: invalid map of a sparse file");
    let terabytes: &[(&str, &[u8])] =
        &[("GNU.sparse.name", b"s"), ("GNU.sparse.size", b"9000000000000"), ("GNU.sparse.map", b"0,0")];
    is(Layer::new().pax(terabytes).file("x", ""), "the image's files have more than 1024 GiB");
}

#[test]
fn a_file_larger_than_its_layer_is_refused() {
    let header = Layer::header(EntryType::Regular, b"a", 0o644, 1 << 32);
    let line = error_of_layer(Layer::new().raw(header, b"abc"));
    assert_eq!(line, "layer 2 of 2: the archive ends in the middle of a file");
    let line = error_of_layer(Layer::new().pax(&[("size", b"18446744073709551615")]).file("a", ""));
    assert_eq!(line, "layer 2 of 2: a: invalid size in its header");
}

#[test]
fn chains_of_links_are_bounded() {
    // Each link doubles the number of names; the limit is 40 links.
    let mut layer = Layer::new().folder("l0", 0o755);
    for number in 1..60 {
        let below = number - 1;
        layer = layer.symlink(&format!("l{number}"), &format!("l{below}/../l{below}"));
    }
    assert_eq!(
        error_of_layer(layer.file("l59/x", "")),
        "layer 2 of 2: l59/x: more than 40 symbolic links in the path"
    );
}

#[test]
fn damaged_layers_are_refused() {
    for packing in [Packing::Plain, Packing::Gzip, Packing::Zstd] {
        let workspace = Workspace::new();
        let layout = workspace.layout();
        layout.write(vec![Layer::new().file("a", &"text ".repeat(10_000))], packing);
        let content = Layer::new().file("a", &"text ".repeat(10_000)).bytes();
        let packed = packing.pack(&content);
        let path = layout.blob_path(&Digest::of(&packed).to_string());
        for at in [0, packed.len() / 2, packed.len() - 1] {
            let mut changed = packed.clone();
            changed[at] ^= 1;
            fs::write(&path, &changed).unwrap();
            let (line, is_user_error) = workspace.error("image");
            let found = Digest::of(&changed);
            let expected = Digest::of(&packed);
            assert_eq!(line, format!("layer 1 of 1: the digest is {found}, expected {expected}"));
            assert!(is_user_error);
        }
        for length in [0, 1, packed.len() / 2, packed.len() - 1] {
            fs::write(&path, &packed[..length]).unwrap();
            let (line, is_user_error) = workspace.error("image");
            assert_eq!(line, format!("layer 1 of 1: the size is {length} bytes, expected {}", packed.len()));
            assert!(is_user_error);
        }
        fs::write(&path, [&packed[..], b"more"].concat()).unwrap();
        let (line, _) = workspace.error("image");
        assert_eq!(
            line,
            format!("layer 1 of 1: the size is {} bytes, expected {}", packed.len() + 1, packed.len())
        );
        fs::remove_file(&path).unwrap();
        let (line, is_user_error) = workspace.error("image");
        assert!(
            line.starts_with("incomplete image: blobs/sha256/")
                && line.ends_with("save or pull the image again")
        );
        assert!(is_user_error);
    }
}

#[test]
fn invalid_layers_with_the_right_digest_are_refused() {
    for (packing, layer) in [
        (Packing::Gzip, &b"\x1f\x8b\x08\0\0\0\0\0\0\0junk"[..]),
        (Packing::Zstd, b"\x28\xb5\x2f\xfd\xff\xff\xff\xff"),
        (Packing::Zstd, b"\x50\x2a\x4d\x18\xff\xff\xff\xff"),
    ] {
        let workspace = Workspace::new();
        let layout = workspace.layout();
        let layer = layout.blob("application/vnd.oci.image.layer.v1.tar", layer);
        layout.index(&[layout.manifest(&layout.config(&[Digest::of(b"")]), &[layer])]);
        let (line, is_user_error) = workspace.error("image");
        assert!(line.starts_with("layer 1 of 1: damaged or truncated: "), "{packing:?}: {line}");
        assert!(is_user_error);
    }
    let workspace = Workspace::new();
    workspace.layout().write_bytes(&[b"no archive ".repeat(100)], Packing::Plain);
    assert_eq!(
        workspace.error("image").0,
        "layer 1 of 1: byte 0: no valid header; not a tar archive, or a damaged one"
    );
}

/// The error message for a changed layout.
fn error_of(change: impl FnOnce(&Layout, Value, Value) -> Vec<Value>) -> String {
    let workspace = Workspace::new();
    let layout = workspace.layout();
    let (layer, digest) = layout.layer(&Layer::new().bytes(), Packing::Plain);
    let config = layout.config(&[digest]);
    let index = change(&layout, config, layer);
    layout.index(&index);
    let (line, is_user_error) = workspace.error("image");
    assert!(is_user_error, "{line}");
    line
}

fn with(mut value: Value, key: &str, new: Value) -> Value {
    value[key] = new;
    value
}

#[test]
fn documents_that_contradict_each_other_are_refused() {
    for kind in ["application/x-iso", "application/vnd.oci.image.layer.v1.tar+lz4", ""] {
        let line = error_of(|layout, config, layer| {
            vec![layout.manifest(&config, &[layer.clone(), with(layer, "mediaType", json!(kind))])]
        });
        assert_eq!(line, format!("layer 2 has the unknown media type {kind:?}"));
    }
    let line = error_of(|layout, config, layer| {
        let kind = json!("application/vnd.oci.image.layer.v1.tar+gzip+encrypted");
        vec![layout.manifest(&config, &[with(layer, "mediaType", kind)])]
    });
    assert!(line.starts_with("layer 1 has the unknown media type"), "{line}");
    let line = error_of(|layout, config, layer| {
        vec![layout.manifest(&with(config, "architecture", json!("arm64")), &[layer])]
    });
    assert_eq!(line, "no image for linux/amd64, only for linux/arm64");
    let line = error_of(|layout, config, layer| {
        let manifest = layout.manifest(&config, &[layer]);
        let platform = |os, architecture| json!({ "os": os, "architecture": architecture });
        vec![
            with(manifest.clone(), "platform", platform("linux", "arm64")),
            with(manifest.clone(), "platform", platform("unknown", "unknown")),
            with(manifest, "platform", platform("linux", "s390x")),
        ]
    });
    assert_eq!(line, "no image for linux/amd64, only for linux/arm64, linux/s390x");
    let line = error_of(|layout, config, _| vec![layout.manifest(&config, &[])]);
    assert_eq!(line, "the manifest has 0 layers, but the configuration has 1; save or pull the image again");
    let line =
        error_of(|layout, _, _| vec![layout.blob("application/vnd.oci.image.manifest.v1+json", b"no JSON")]);
    assert!(line.ends_with(": expected ident at line 1 column 2"), "{line}");
    let line = error_of(|layout, config, layer| {
        vec![with(layout.manifest(&config, &[layer]), "digest", json!("sha256:../../../../etc/passwd"))]
    });
    assert!(line.starts_with("\"sha256:../../../../etc/passwd\" is not a digest"), "{line}");
    let line = error_of(|layout, config, layer| {
        let manifest = layout.manifest(&config, &[layer]);
        let path = layout.blob_path(manifest["digest"].as_str().unwrap());
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, text.replace("schemaVersion", "schemaversion")).unwrap();
        vec![manifest]
    });
    assert!(line.contains("it is damaged or was replaced, save or pull the image again"), "{line}");
    // An entry for this platform is not replaced with a later one.
    let line = error_of(|layout, config, layer| {
        let platform = json!({ "os": "linux", "architecture": "amd64" });
        let damaged = with(layout.blob("", b"{"), "platform", platform);
        let name = json!({ "org.opencontainers.image.ref.name": "n" });
        let entries = [damaged, layout.manifest(&config, &[layer])];
        entries.map(|entry| with(entry, "annotations", name.clone())).to_vec()
    });
    assert!(line.contains("EOF while parsing"), "{line}");
    let line = error_of(|layout, _, _| {
        vec![layout.document("application/vnd.oci.image.manifest.v1+json", &json!({ "schemaVersion": 1 }))]
    });
    assert!(line.contains("is a schema 1 manifest, from before 2016"), "{line}");
    assert_eq!(
        error_of(|_, _, _| vec![]),
        "neither an OCI layout nor an archive of one or of `docker save`; create one with `skopeo copy` or `docker save`"
    );
}

#[test]
fn the_depth_of_nested_indexes_is_bounded() {
    let line = error_of(|layout, config, layer| {
        let index = "application/vnd.oci.image.index.v1+json";
        let mut inner = layout.manifest(&config, &[layer]);
        for _ in 0..6 {
            inner = layout.document(index, &json!({ "schemaVersion": 2, "manifests": [inner] }));
        }
        vec![inner]
    });
    assert!(line.contains("is not an image manifest"), "{line}");
}

#[test]
fn large_documents_are_refused() {
    let workspace = Workspace::new();
    let layout = workspace.layout();
    fs::File::create(layout.folder.join("index.json")).unwrap().set_len(1 << 40).unwrap();
    assert_eq!(workspace.error("image").0, "index.json is larger than 8 MiB");
}

#[test]
fn other_files_are_refused() {
    let workspace = Workspace::new();
    fs::write(workspace.path("text"), "text ".repeat(1000)).unwrap();
    fs::write(workspace.path("empty"), "").unwrap();
    fs::create_dir(workspace.path("folder")).unwrap();
    for image in ["text", "empty", "folder"] {
        let (line, is_user_error) = workspace.error(image);
        assert!(line.starts_with("neither an OCI layout nor an archive"), "{image}: {line}");
        assert!(is_user_error);
    }
    assert_eq!(workspace.error("nothing"), ("no such file or directory".to_owned(), true));
}

#[test]
fn the_same_configuration_with_other_layers_is_another_image() {
    // The cache must not return the forged layers for the original image, which has the same configuration.
    let workspace = Workspace::new();
    let original = workspace.layout();
    let (layer, digest) = original.layer(&Layer::new().file("a", "good").bytes(), Packing::Plain);
    let config = original.config(&[digest]);
    original.index(&[original.manifest(&config, &[layer])]);
    let forged = Layout::new(workspace.path("forged"));
    let (layer, _) = forged.layer(&Layer::new().file("a", "evil").bytes(), Packing::Plain);
    forged.index(&[forged.manifest(&config, &[layer])]);
    let evil = workspace.prepare("forged").unwrap();
    let good = workspace.prepare("image").unwrap();
    assert_eq!(evil.digest, good.digest);
    let line = |image: &std::path::Path| support::reader::list(image).pop().unwrap();
    assert!(line(&good.rootfs).ends_with("\"good\"") && line(&evil.rootfs).ends_with("\"evil\""));
}

#[test]
fn a_layer_of_100_000_files_is_converted() {
    let mut layer = Layer::new();
    for number in 0..100_000 {
        layer = layer.file(&format!("{}/{number}", number % 100), "x");
    }
    let workspace = Workspace::new();
    workspace.layout().write(vec![layer], Packing::Gzip);
    let prepared = workspace.prepare("image").unwrap();
    support::check(&prepared.rootfs);
    assert_eq!(support::reader::list(&prepared.rootfs).len(), 100_101);
}
