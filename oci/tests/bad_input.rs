//! Images that are damaged, cut off, exchanged or made to do harm: one line, nothing left behind.

mod support;

use kindling_oci::Digest;
use serde_json::{Value, json};
use std::fs;
use support::{Layer, Layout, Packing, Place};
use tar::EntryType;

/// The line about an image with one layer.
fn error_of_layer(layer: Layer) -> String {
    let place = Place::new();
    place.layout().write(vec![Layer::new(), layer], Packing::Plain);
    let (line, is_users) = place.error("image");
    assert!(is_users, "{line}");
    line
}

#[test]
fn entries_that_no_filesystem_holds_are_refused() {
    let is = |layer, expected: &str| assert_eq!(error_of_layer(layer), format!("layer 2 of 2: {expected}"));
    let name = "n".repeat(256);
    let shown = "n".repeat(200);
    let long_name = format!("{shown}: the name is longer than 255 bytes, or the path than 4096");
    is(Layer::new().pax(&[("path", name.as_bytes())]).file("x", ""), &long_name);
    let path = "d/".repeat(2100);
    let long_path = format!("{}: the name is longer than 255 bytes, or the path than 4096", &path[..200]);
    is(Layer::new().pax(&[("path", path.as_bytes())]).folder("x", 0o755), &long_path);
    is(Layer::new().pax(&[("path", b"a\0b")]).file("x", ""), "a\\x00b: the name has a zero byte");
    is(
        Layer::new().file("a", "").file("a/b", ""),
        "a/b: it would be below something that is not a directory",
    );
    is(Layer::new().file(".", ""), ".: the root is a directory");
    is(Layer::new().symlink("..", "x"), "..: the root is a directory");
    is(Layer::new().symlink("l", ""), "l: the symbolic link's target has 0 bytes; 1 to 4095 are possible");
    is(
        Layer::new().symlink("a", "b").symlink("b", "a").file("a/x", ""),
        "a/x: more than 40 symbolic links lead to it",
    );
    is(Layer::new().hard_link("l", "no"), "l: a hard link to no, which is not a file of the image");
    is(
        Layer::new().folder("d", 0o755).hard_link("l", "d"),
        "l: a hard link to d, which is not a file of the image",
    );
    let unknown = Layer::header(EntryType::new(b'V'), b"volume", 0o644, 0);
    is(Layer::new().raw(unknown, b""), "volume: an entry of the unknown kind 'V'");
    is(
        Layer::new().pax(&[("uid", b"4294967296")]).file("a", ""),
        "a: the owner in its header is not a number that it can be",
    );
    is(
        Layer::new().pax(&[("mtime", b"soon")]).file("a", ""),
        "byte 0: an extended header's record is damaged, or its value is none that it can have: 14 mtime=soon\\n",
    );
    let value = vec![b'v'; 65_536];
    is(
        Layer::new().pax(&[("SCHILY.xattr.user.a", &value)]).file("a", ""),
        "a: its extended attributes have more than 64 KiB",
    );
    let huge = vec![b'v'; (1 << 20) + 1];
    is(
        Layer::new().pax(&[("comment", &huge)]).file("a", ""),
        "byte 0: an extended header has more than 1024 KiB",
    );
    let sparse: &[(&str, &[u8])] =
        &[("GNU.sparse.name", b"s"), ("GNU.sparse.size", b"9"), ("GNU.sparse.map", b"8,3")];
    is(Layer::new().pax(sparse).file("x", "abc"), "s: the map of its holes is damaged");
    let terabytes: &[(&str, &[u8])] =
        &[("GNU.sparse.name", b"s"), ("GNU.sparse.size", b"9000000000000"), ("GNU.sparse.map", b"0,0")];
    is(Layer::new().pax(terabytes).file("x", ""), "the image's files have more than 1024 GiB");
}

#[test]
fn a_file_that_says_it_is_larger_than_its_layer_is_found_out() {
    let header = Layer::header(EntryType::Regular, b"a", 0o644, 1 << 32);
    let line = error_of_layer(Layer::new().raw(header, b"abc"));
    assert_eq!(line, "layer 2 of 2: the archive ends in the middle of a file");
    let line = error_of_layer(Layer::new().pax(&[("size", b"18446744073709551615")]).file("a", ""));
    assert_eq!(line, "layer 2 of 2: a: the size in its header is not a number that it can be");
}

#[test]
fn links_to_links_without_end_are_bounded() {
    // Each link doubles the names to walk; a walk ends at the fortieth.
    let mut layer = Layer::new().folder("l0", 0o755);
    for number in 1..60 {
        let below = number - 1;
        layer = layer.symlink(&format!("l{number}"), &format!("l{below}/../l{below}"));
    }
    assert_eq!(
        error_of_layer(layer.file("l59/x", "")),
        "layer 2 of 2: l59/x: more than 40 symbolic links lead to it"
    );
}

#[test]
fn damaged_layers_have_another_digest() {
    for packing in [Packing::Plain, Packing::Gzip, Packing::Zstd] {
        let place = Place::new();
        let layout = place.layout();
        layout.write(vec![Layer::new().file("a", &"text ".repeat(10_000))], packing);
        let content = Layer::new().file("a", &"text ".repeat(10_000)).bytes();
        let packed = packing.pack(&content);
        let path = layout.blob_path(&Digest::of(&packed).to_string());
        for at in [0, packed.len() / 2, packed.len() - 1] {
            let mut changed = packed.clone();
            changed[at] ^= 1;
            fs::write(&path, &changed).unwrap();
            let (line, is_users) = place.error("image");
            let found = Digest::of(&changed);
            let expected = Digest::of(&packed);
            assert_eq!(line, format!("layer 1 of 1: its content has the digest {found}, not {expected}"));
            assert!(is_users);
        }
        for length in [0, 1, packed.len() / 2, packed.len() - 1] {
            fs::write(&path, &packed[..length]).unwrap();
            let (line, is_users) = place.error("image");
            assert_eq!(line, format!("layer 1 of 1: it has {length} bytes, not {}", packed.len()));
            assert!(is_users);
        }
        fs::write(&path, [&packed[..], b"more"].concat()).unwrap();
        let (line, _) = place.error("image");
        assert_eq!(line, format!("layer 1 of 1: it has {} bytes, not {}", packed.len() + 1, packed.len()));
        fs::remove_file(&path).unwrap();
        let (line, is_users) = place.error("image");
        assert!(
            line.starts_with("it is not whole: blobs/sha256/") && line.ends_with("save or pull it again")
        );
        assert!(is_users);
    }
}

#[test]
fn a_layer_that_is_damaged_by_its_maker_is_named() {
    for (packing, layer) in [
        (Packing::Gzip, &b"\x1f\x8b\x08\0\0\0\0\0\0\0junk"[..]),
        (Packing::Zstd, b"\x28\xb5\x2f\xfd\xff\xff\xff\xff"),
        (Packing::Zstd, b"\x50\x2a\x4d\x18\xff\xff\xff\xff"),
    ] {
        let place = Place::new();
        let layout = place.layout();
        let layer = layout.blob("application/vnd.oci.image.layer.v1.tar", layer);
        layout.index(&[layout.manifest(&layout.config(&[Digest::of(b"")]), &[layer])]);
        let (line, is_users) = place.error("image");
        assert!(line.starts_with("layer 1 of 1: it is damaged or cut off: "), "{packing:?}: {line}");
        assert!(is_users);
    }
    let place = Place::new();
    place.layout().write_bytes(&[b"no archive ".repeat(100)], Packing::Plain);
    assert_eq!(
        place.error("image").0,
        "layer 1 of 1: byte 0 begins no file: not a tar archive, or a damaged one"
    );
}

/// The line about a layout that has been changed.
fn error_of(change: impl FnOnce(&Layout, Value, Value) -> Vec<Value>) -> String {
    let place = Place::new();
    let layout = place.layout();
    let (layer, digest) = layout.layer(&Layer::new().bytes(), Packing::Plain);
    let config = layout.config(&[digest]);
    let index = change(&layout, config, layer);
    layout.index(&index);
    let (line, is_users) = place.error("image");
    assert!(is_users, "{line}");
    line
}

fn with(mut value: Value, key: &str, new: Value) -> Value {
    value[key] = new;
    value
}

#[test]
fn documents_that_contradict_one_another_are_refused() {
    let line = error_of(|layout, config, layer| {
        vec![layout.manifest(&config, &[with(layer, "mediaType", json!("application/x-iso"))])]
    });
    assert_eq!(line, "layer 1 is of the type \"application/x-iso\", which is not known here");
    let line = error_of(|layout, config, layer| {
        vec![layout.manifest(&with(config, "architecture", json!("arm64")), &[layer])]
    });
    assert_eq!(line, "it has no image for linux/amd64, only for linux/arm64");
    let line = error_of(|layout, config, layer| {
        let manifest = layout.manifest(&config, &[layer]);
        let platform = |os, architecture| json!({ "os": os, "architecture": architecture });
        vec![
            with(manifest.clone(), "platform", platform("linux", "arm64")),
            with(manifest.clone(), "platform", platform("unknown", "unknown")),
            with(manifest, "platform", platform("linux", "s390x")),
        ]
    });
    assert_eq!(line, "it has no image for linux/amd64, only for linux/arm64, linux/s390x");
    let line = error_of(|layout, config, _| vec![layout.manifest(&config, &[])]);
    assert_eq!(line, "it has 0 layers, and its configuration names 1; save or pull it again");
    let line =
        error_of(|layout, _, _| vec![layout.blob("application/vnd.oci.image.manifest.v1+json", b"no JSON")]);
    assert!(line.ends_with(" is damaged: expected ident at line 1 column 2"), "{line}");
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
    assert!(line.contains("it was damaged or exchanged, save or pull it again"), "{line}");
    let line = error_of(|layout, _, _| {
        vec![layout.document("application/vnd.oci.image.manifest.v1+json", &json!({ "schemaVersion": 1 }))]
    });
    assert!(line.contains("is a manifest of version 1, of before 2016"), "{line}");
    assert_eq!(
        error_of(|_, _, _| vec![]),
        "it is neither an OCI layout nor an archive of one or of `docker save`; `skopeo copy` and `docker save` make them"
    );
}

#[test]
fn indexes_that_name_one_another_end() {
    let line = error_of(|layout, config, layer| {
        let index = "application/vnd.oci.image.index.v1+json";
        let mut inner = layout.manifest(&config, &[layer]);
        for _ in 0..6 {
            inner = layout.document(index, &json!({ "schemaVersion": 2, "manifests": [inner] }));
        }
        vec![inner]
    });
    assert!(line.contains("is not the manifest of an image"), "{line}");
}

#[test]
fn a_large_document_is_not_read() {
    let place = Place::new();
    let layout = place.layout();
    fs::File::create(layout.folder.join("index.json")).unwrap().set_len(1 << 40).unwrap();
    assert_eq!(place.error("image").0, "its index.json has more than 8 MiB");
}

#[test]
fn what_is_no_image_is_said() {
    let place = Place::new();
    fs::write(place.path("text"), "text ".repeat(1000)).unwrap();
    fs::write(place.path("empty"), "").unwrap();
    fs::create_dir(place.path("folder")).unwrap();
    for image in ["text", "empty", "folder"] {
        let (line, is_users) = place.error(image);
        assert!(line.starts_with("it is neither an OCI layout nor an archive"), "{image}: {line}");
        assert!(is_users);
    }
    assert_eq!(place.error("nothing"), ("there is no such file or folder".to_owned(), true));
}

#[test]
fn a_configuration_of_another_image_beside_other_layers_is_another_image() {
    // The cache must not hand out these layers for the image that the configuration belongs to.
    let place = Place::new();
    let honest = place.layout();
    let (layer, digest) = honest.layer(&Layer::new().file("a", "good").bytes(), Packing::Plain);
    let config = honest.config(&[digest]);
    honest.index(&[honest.manifest(&config, &[layer])]);
    let forged = Layout::new(place.path("forged"));
    let (layer, _) = forged.layer(&Layer::new().file("a", "evil").bytes(), Packing::Plain);
    forged.index(&[forged.manifest(&config, &[layer])]);
    let evil = place.prepare("forged").unwrap();
    let good = place.prepare("image").unwrap();
    assert_eq!(evil.digest, good.digest);
    let line = |image: &std::path::Path| support::reader::list(image).pop().unwrap();
    assert!(line(&good.rootfs).ends_with("\"good\"") && line(&evil.rootfs).ends_with("\"evil\""));
}

#[test]
fn a_layer_of_100_000_files_becomes_an_image() {
    let mut layer = Layer::new();
    for number in 0..100_000 {
        layer = layer.file(&format!("{}/{number}", number % 100), "x");
    }
    let place = Place::new();
    place.layout().write(vec![layer], Packing::Gzip);
    let prepared = place.prepare("image").unwrap();
    support::check(&prepared.rootfs);
    assert_eq!(support::reader::list(&prepared.rootfs).len(), 100_101);
}
