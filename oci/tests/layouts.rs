//! Indexes, archives of `docker save` and configurations of many programs: the selected image is the one that containerd
//! and docker select, and artifacts that are not images are reported.

mod support;

use kindling_oci::Digest;
use serde_json::{Value, json};
use std::fs;
use support::reader::{line, list};
use support::{Layer, Layout, Packing, Workspace};
use tar::{Builder, EntryType};

const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";

fn with(mut value: Value, key: &str, new: Value) -> Value {
    value[key] = new;
    value
}

fn platform(manifest: Value, os: &str, architecture: &str, variant: &str) -> Value {
    with(manifest, "platform", json!({ "os": os, "architecture": architecture, "variant": variant }))
}

fn named(manifest: Value, name: &str) -> Value {
    with(manifest, "annotations", json!({ "org.opencontainers.image.ref.name": name }))
}

/// Adds an image whose file `which` has this text.
fn image(layout: &Layout, text: &str) -> Value {
    image_with(layout, text, |config| config)
}

fn image_with(layout: &Layout, text: &str, change: impl FnOnce(Value) -> Value) -> Value {
    let (layer, digest) = layout.layer(&Layer::new().file("which", text).bytes(), Packing::Plain);
    layout.manifest(&change(layout.config(&[digest])), &[layer])
}

fn nested(layout: &Layout, manifests: &[Value]) -> Value {
    layout.document(INDEX, &json!({ "schemaVersion": 2, "manifests": manifests }))
}

/// Adds an attestation as buildx writes it.
fn attestation(layout: &Layout) -> Value {
    let statement = layout.blob("application/vnd.in-toto+json", b"{}");
    let config =
        json!({ "architecture": "unknown", "os": "unknown", "rootfs": { "diff_ids": [Digest::of(b"{}")] } });
    let manifest = platform(layout.manifest(&config, &[statement]), "unknown", "unknown", "");
    with(manifest, "annotations", json!({ "vnd.docker.reference.type": "attestation-manifest" }))
}

/// Adds an artifact as ORAS stores it.
fn artifact(layout: &Layout, kind: &str) -> Value {
    let config = layout.blob("application/vnd.oci.empty.v1+json", b"{}");
    let layer = layout.blob("text/plain", b"hello");
    let manifest = json!({ "schemaVersion": 2, "artifactType": kind, "config": config, "layers": [layer] });
    layout.document(MANIFEST, &manifest)
}

fn which(workspace: &Workspace, name: &str) -> String {
    let prepared = workspace.prepare(name).unwrap();
    support::check(&prepared.rootfs);
    let lines = list(&prepared.rootfs);
    line(&lines, "/which").rsplit('"').nth(1).unwrap().to_owned()
}

/// The text of the selected image of an index, or the error message.
fn outcome(tag: &str, index: impl FnOnce(&Layout) -> Vec<Value>) -> Result<String, String> {
    let workspace = Workspace::new();
    let layout = workspace.layout();
    layout.index(&index(&layout));
    let name = format!("image{tag}");
    match workspace.prepare(&name) {
        Ok(_) => Ok(which(&workspace, &name)),
        Err(_) => {
            let (line, is_user_error) = workspace.error(&name);
            assert!(is_user_error, "{line}");
            Err(line)
        }
    }
}

/// Checks that the image `right` of an index is selected, also if other indexes nest the index.
fn is_selected(what: &str, index: fn(&Layout) -> Vec<Value>) {
    for (tag, depth) in [("", 0), ("", 1), (":x", 1), (":x", 3)] {
        let found = outcome(tag, |layout| {
            let mut manifests = index(layout);
            for _ in 0..depth {
                manifests = vec![named(nested(layout, &manifests), "x")];
            }
            manifests
        });
        assert_eq!(found.as_deref(), Ok("right"), "{what}, {depth}");
    }
}

#[test]
fn the_image_for_this_machine_is_selected_from_an_index() {
    let is = is_selected;
    is("another entry needs another processor", |layout| {
        let plain = platform(image(layout, "right"), "linux", "amd64", "");
        vec![platform(image(layout, "no"), "linux", "amd64", "v9"), plain]
    });
    is("the same platform twice, with other spellings", |layout| {
        let right = platform(image(layout, "right"), "Linux", "x86_64", "v1");
        vec![right, platform(image(layout, "no"), "linux", "amd64", "")]
    });
    is("an entry with a platform before one without", |layout| {
        vec![
            named(image(layout, "no"), "n"),
            named(platform(image(layout, "right"), "linux", "amd64", ""), "n"),
        ]
    });
    is("entries without a platform, whose configurations have one", |layout| {
        let arm = image_with(layout, "no", |config| with(config, "architecture", json!("arm64")));
        vec![named(arm, "n"), named(image(layout, "right"), "n")]
    });
    is("attestations and artifacts first", |layout| {
        let right = platform(image(layout, "right"), "linux", "amd64", "");
        let unknown = layout.document("application/vnd.example.sbom+json", &json!({ "x": 1 }));
        let helm = layout.blob("application/vnd.cncf.helm.config.v1+json", b"{}");
        let chart = layout.document(MANIFEST, &json!({ "schemaVersion": 2, "config": helm, "layers": [] }));
        vec![attestation(layout), artifact(layout, "application/vnd.example.report"), unknown, chart, right]
    });
    is("a missing image, and digests of other algorithms", |layout| {
        let missing = json!({ "mediaType": MANIFEST, "size": 7, "digest": Digest::of(b"nothing") });
        let foreign =
            json!({ "mediaType": MANIFEST, "size": -7, "digest": format!("sha512:{}", "ab".repeat(64)) });
        vec![
            platform(foreign.clone(), "linux", "arm64", "v8"),
            named(platform(foreign, "linux", "amd64", ""), "n"),
            named(platform(missing, "linux", "amd64", ""), "n"),
            named(platform(image(layout, "right"), "linux", "amd64", ""), "n"),
        ]
    });
    is("entries without a media type", |layout| vec![with(image(layout, "right"), "mediaType", Value::Null)]);
    is("fields that are null", |layout| {
        let null = with(with(image(layout, "right"), "platform", Value::Null), "annotations", Value::Null);
        vec![with(null, "artifactType", Value::Null)]
    });
}

#[test]
fn damaged_entries_without_a_platform_are_skipped() {
    is_selected("damaged entries without a platform", |layout| {
        let damaged = |content: &[u8]| {
            let entry = layout.blob(MANIFEST, content);
            fs::write(layout.blob_path(entry["digest"].as_str().unwrap()), "other").unwrap();
            entry
        };
        let config = layout.blob(CONFIG, b"[]");
        let manifest = json!({ "schemaVersion": 2, "config": config, "layers": [] });
        let mut entries = vec![
            layout.blob(MANIFEST, b"{"),
            layout.document(MANIFEST, &json!({ "schemaVersion": 2 })),
            layout.document(MANIFEST, &manifest),
            damaged(b"other digest"),
            damaged(b"size!"),
            with(damaged(b"no size"), "size", Value::Null),
            with(damaged(b"text"), "digest", json!("sha256:text")),
            layout.blob(MANIFEST, &vec![b' '; (8 << 20) + 1]),
            Value::Null,
        ];
        // Of a type that may be an index or a manifest, too.
        entries.extend(entries.clone().into_iter().map(|mut entry| {
            entry["mediaType"] = json!("application/json");
            entry
        }));
        entries.push(image(layout, "right"));
        entries.into_iter().map(|entry| named(entry, "n")).collect()
    });
    is_selected("entries of every type for files", |layout| {
        let right = nested(layout, &[image(layout, "right")]);
        vec![with(right, "mediaType", json!("binary/octet-stream"))]
    });
}

#[test]
fn the_best_variant_for_this_processor_is_selected() {
    // The unit tests of `platform.rs` cover the requirements of each variant; every present processor has the second.
    let expected = if std::arch::is_x86_feature_detected!("sse4.2") { "v2" } else { "v1" };
    for turned in [false, true] {
        let found = outcome("", |layout| {
            let variant = |variant| platform(image(layout, variant), "linux", "amd64", variant);
            let mut all = vec![variant("v1"), variant("v2"), variant("v9")];
            if turned {
                all.reverse();
            }
            vec![named(nested(layout, &all), "10")]
        });
        assert_eq!(found.as_deref(), Ok(expected));
    }
}

#[test]
fn an_index_without_an_image_for_this_machine_lists_its_platforms() {
    let refused = |index: fn(&Layout) -> Vec<Value>| outcome("", index).unwrap_err();
    let line = refused(|layout| {
        let variant = |variant| platform(image(layout, variant), "linux", "amd64", variant);
        vec![variant("v8"), platform(image(layout, "arm"), "linux", "arm64", "v8"), attestation(layout)]
    });
    assert_eq!(line, "no image for linux/amd64, only for linux/amd64/v8, linux/arm64/v8");
    let line = refused(|layout| vec![attestation(layout)]);
    assert_eq!(line, "not a container image; its type is attestation-manifest");
    let line = refused(|_| {
        vec![json!({ "mediaType": MANIFEST, "size": 7, "digest": format!("sha512:{}", "ab".repeat(64)) })]
    });
    assert!(line.ends_with("is not a digest of the form sha256:<64 hexadecimal digits>"), "{line}");
    let line = refused(|layout| vec![image(layout, "one"), image(layout, "two")]);
    assert!(line.starts_with("several images; append one of these to the name: sha256:"), "{line}");
}

#[test]
fn an_image_without_a_name_is_found_by_digest() {
    let workspace = Workspace::new();
    let layout = workspace.layout();
    let (one, two) = (image(&layout, "one"), image(&layout, "two"));
    layout.index(&[one.clone(), two]);
    assert_eq!(which(&workspace, &format!("image:{}", one["digest"].as_str().unwrap())), "one");
    assert!(
        workspace
            .error_with_cache("image:sha256:12")
            .0
            .starts_with("no image \"sha256:12\"; available: only unnamed images")
    );
}

/// Writes an archive as `docker save` does since version 25: with an index and a manifest.json of the same images.
fn saved(workspace: &Workspace, images: &[(&[&str], &str)], with_index: bool) {
    let mut archive = Builder::new(fs::File::create(workspace.path("saved.tar")).unwrap());
    let mut add = |name: &str, content: &[u8]| {
        let mut header = Layer::header(EntryType::Regular, name.as_bytes(), 0o644, content.len() as u64);
        header.set_cksum();
        archive.append(&header, content).unwrap();
        json!({ "digest": Digest::of(content), "size": content.len() })
    };
    let mut blob = |content: &[u8]| {
        let name = format!("blobs/sha256/{}", Digest::of(content).hex());
        (add(&name, content), name)
    };
    let (mut index, mut manifest) = (Vec::new(), Vec::new());
    for (names, text) in images {
        let content = Layer::new().file("which", text).bytes();
        let config = json!({
            "architecture": "amd64", "os": "linux", "rootfs": { "diff_ids": [Digest::of(&content)] }
        });
        let (config, config_name) = blob(config.to_string().as_bytes());
        // The containerd image store saves layers compressed as they were pulled.
        let (layer, layer_name) = blob(&Packing::Gzip.pack(&content));
        let config = with(config, "mediaType", json!(CONFIG));
        let layer = with(layer, "mediaType", json!("application/vnd.oci.image.layer.v1.tar+gzip"));
        let document = json!({ "schemaVersion": 2, "config": config, "layers": [layer] });
        let (descriptor, _) = blob(document.to_string().as_bytes());
        for name in *names {
            index.push(with(
                with(descriptor.clone(), "mediaType", json!(MANIFEST)),
                "annotations",
                json!({
                    "io.containerd.image.name": format!("docker.io/{name}"),
                    "org.opencontainers.image.ref.name": name.rsplit(':').next(),
                }),
            ));
        }
        let tags: Vec<_> = names.iter().map(|name| name.trim_start_matches("library/")).collect();
        manifest.push(json!({ "Config": config_name, "RepoTags": tags, "Layers": [layer_name] }));
    }
    if with_index {
        add("index.json", json!({ "schemaVersion": 2, "manifests": index }).to_string().as_bytes());
    }
    add("manifest.json", Value::from(manifest).to_string().as_bytes());
    archive.finish().unwrap();
}

#[test]
fn images_with_the_same_tag_in_two_repositories_are_found_by_name() {
    for with_index in [true, false] {
        let workspace = Workspace::new();
        saved(
            &workspace,
            &[(&["library/one:latest"], "one"), (&["library/two:latest", "team/two:3"], "two")],
            with_index,
        );
        for name in
            ["two:latest", "two", "library/two:latest", "docker.io/library/two:latest", "team/two:3", "3"]
        {
            assert_eq!(which(&workspace, &format!("saved.tar:{name}")), "two", "{name}");
        }
        assert_eq!(which(&workspace, "saved.tar:one:latest"), "one");
        for name in ["saved.tar", "saved.tar:latest"] {
            let (line, is_user_error) = workspace.error_with_cache(name);
            assert!(line.starts_with("several images; append one of these to the name: "), "{line}");
            assert!(line.contains("one:latest") && line.contains("two:latest") && is_user_error, "{line}");
        }
        let (line, _) = workspace.error_with_cache("saved.tar:three");
        assert!(line.starts_with("no image \"three\"; available: ") && line.contains("two:latest"), "{line}");
        let workspace = Workspace::new();
        saved(&workspace, &[(&["library/one:latest", "team/app:latest"], "one")], with_index);
        for name in ["", ":one:latest", ":team/app:latest", ":team/app", ":latest"] {
            assert_eq!(which(&workspace, &format!("saved.tar{name}")), "one", "{name}");
        }
    }
}

#[test]
fn archives_of_docker_before_1_10_are_refused() {
    let workspace = Workspace::new();
    let mut archive = Builder::new(fs::File::create(workspace.path("old.tar")).unwrap());
    for (name, content) in [("repositories", &b"{}"[..]), ("0123/json", b"{}"), ("0123/layer.tar", b"")] {
        let mut header = Layer::header(EntryType::Regular, name.as_bytes(), 0o644, content.len() as u64);
        header.set_cksum();
        archive.append(&header, content).unwrap();
    }
    archive.finish().unwrap();
    let (line, is_user_error) = workspace.error("old.tar");
    assert!(line.starts_with("an archive of `docker save` before version 1.10") && is_user_error, "{line}");
}

#[test]
fn configurations_come_in_many_forms() {
    let converted = |change: fn(Value) -> Value| {
        let workspace = Workspace::new();
        let layout = workspace.layout();
        layout.index(&[image_with(&layout, "right", change)]);
        let prepared = workspace.prepare("image").unwrap();
        let config = serde_json::to_value(&prepared.config).unwrap();
        (config["entrypoint"].clone(), config["cmd"].clone(), config["env"].clone())
    };
    let empty = (json!([]), json!([]), json!([]));
    let nulls = || {
        json!({
            "Env": null, "Cmd": null, "Entrypoint": null, "Volumes": null, "ExposedPorts": null, "Labels": null,
            "User": null, "WorkingDir": null, "StopSignal": null, "Healthcheck": null,
        })
    };
    assert_eq!(converted(|config| with(config, "config", Value::Null)), empty);
    assert_eq!(converted(|config| with(config, "config", json!({}))), empty);
    let mut with_nulls = None;
    let workspace = Workspace::new();
    let layout = workspace.layout();
    layout.index(&[image_with(&layout, "right", |config| with(config, "config", nulls()))]);
    with_nulls.replace(workspace.prepare("image").unwrap());
    assert_eq!(serde_json::to_value(&with_nulls.unwrap().config).unwrap()["cmd"], json!([]));
    let words = converted(|config| {
        with(config, "config", json!({ "cmd": "/hi", "ENTRYPOINT": ["/sh"], "env": ["A=b"] }))
    });
    assert_eq!(words, (json!(["/sh"]), json!(["/hi"]), json!(["A=b"])));
    for (key, value) in [
        ("architecture", json!("x86_64")),
        ("architecture", json!("X86-64")),
        ("architecture", json!("")),
        ("architecture", Value::Null),
        ("os", json!("Linux")),
        ("os", json!("")),
        ("os", Value::Null),
        ("variant", json!("v1")),
    ] {
        let workspace = Workspace::new();
        let layout = workspace.layout();
        layout.index(&[image_with(&layout, "right", |config| with(config, key, value.clone()))]);
        assert_eq!(which(&workspace, "image"), "right", "{key} {value}");
    }
    for (key, value) in [("architecture", "arm64"), ("os", "windows"), ("os", "unknown"), ("variant", "v9")] {
        let line =
            outcome("", |layout| vec![image_with(layout, "no", |config| with(config, key, json!(value)))]);
        let line = line.unwrap_err();
        assert!(line.starts_with("no image for linux/amd64, only for ") && line.contains(value), "{line}");
    }
}

#[test]
fn null_in_lists_of_manifest_json_is_the_empty_value() {
    let workspace = Workspace::new();
    let save = |name: &str, change: &dyn Fn(Value) -> Value| {
        let layer = Layer::new().file("a", "b").bytes();
        let config = json!({ "os": "linux", "rootfs": { "diff_ids": [Digest::of(&layer)] } }).to_string();
        let manifest =
            change(json!([{ "Config": "c.json", "RepoTags": ["one:latest"], "Layers": ["l.tar"] }]));
        let mut archive = Builder::new(fs::File::create(workspace.path(name)).unwrap());
        for (name, content) in [
            ("c.json", config.as_bytes()),
            ("l.tar", &layer),
            ("manifest.json", manifest.to_string().as_bytes()),
        ] {
            let mut header = Layer::header(EntryType::Regular, name.as_bytes(), 0o644, content.len() as u64);
            header.set_cksum();
            archive.append(&header, content).unwrap();
        }
        archive.finish().unwrap();
    };
    save("tags.tar", &|manifest| with_in_first(manifest, "RepoTags", json!([null, "one:latest", null])));
    workspace.prepare("tags.tar:one").unwrap();
    assert_eq!(workspace.error_with_cache("tags.tar:two").0, "no image \"two\"; available: one:latest");
    save("entry.tar", &|mut manifest| {
        manifest.as_array_mut().unwrap().insert(0, Value::Null);
        manifest
    });
    workspace.prepare("entry.tar").unwrap();
    save("entries.tar", &|_| json!([null]));
    save("layer.tar", &|manifest| with_in_first(manifest, "Layers", json!([null])));
    for (image, what) in [("entries.tar", "a configuration"), ("layer.tar", "a layer")] {
        let expected = format!(
            "incomplete image: the file name of {what} in manifest.json is missing; save or pull the image again"
        );
        assert_eq!(workspace.error_with_cache(image), (expected, true));
    }
}

/// Changes a field of the first element.
fn with_in_first(mut value: Value, key: &str, new: Value) -> Value {
    value[0][key] = new;
    value
}

#[test]
fn documents_are_read_as_go_reads_them() {
    let workspace = Workspace::new();
    let layout = workspace.layout();
    let (layer, digest) = layout.layer(&Layer::new().bytes(), Packing::Plain);
    let start = format!(r#"{{"rootfs":{{"diff_ids":["{digest}"]}},"config":"#);
    let env = b"{\"Env\":[\"A=\\ud800\",null,\"B=\xff\"],";
    let commands = br#""Cmd":["one"],"CMD":["two",null],"cmd":["three"],"CmD":["four"]}}"#;
    let config = layout.blob(CONFIG, &[start.as_bytes(), env, commands].concat());
    let manifest = json!({ "schemaVersion": 2, "config": config, "layers": [layer] });
    layout.index(&[layout.document(MANIFEST, &manifest), Value::Null]);
    let config = serde_json::to_value(workspace.prepare("image").unwrap().config).unwrap();
    assert_eq!(config["cmd"], json!(["four"]));
    assert_eq!(config["env"], json!(["A=\u{fffd}", "", "B=\u{fffd}"]));
}

#[test]
fn artifacts_are_refused_with_their_type() {
    let of_config = |kind: &str, content: &[u8]| {
        outcome("", |layout| {
            let config = layout.blob(kind, content);
            let layer = layout.blob("application/vnd.oci.image.layer.v1.tar", &Layer::new().bytes());
            vec![
                layout
                    .document(MANIFEST, &json!({ "schemaVersion": 2, "config": config, "layers": [layer] })),
            ]
        })
        .unwrap_err()
    };
    for kind in [
        "application/vnd.cncf.helm.config.v1+json",
        "application/vnd.devcontainers",
        "application/vnd.wasm.config.v0+json",
        "application/vnd.oci.empty.v1+json",
        "application/vnd.sylabs.sif.config.v1+json",
    ] {
        assert_eq!(of_config(kind, b"{}"), format!("not a container image; its type is {kind}"));
    }
    let kind = "application/vnd.example.report";
    let expected = Err(format!("not a container image; its type is {kind}"));
    assert_eq!(outcome("", |layout| vec![artifact(layout, kind)]), expected);
    // The artifact manifest of a draft of image specification 1.1.
    let before = "application/vnd.oci.artifact.manifest.v1+json";
    let index = |layout: &Layout| {
        let document = json!({ "mediaType": before, "artifactType": kind, "blobs": [] });
        vec![with(layout.document(before, &document), "artifactType", json!(kind))]
    };
    assert_eq!(outcome("", index), expected);
    let old = json!({ "schemaVersion": 1, "name": "x", "fsLayers": [{ "blobSum": Digest::of(b"") }] });
    for kind in [
        "application/vnd.docker.distribution.manifest.v1+prettyjws",
        "application/vnd.docker.distribution.manifest.v1+json",
        MANIFEST,
        "",
    ] {
        let line = outcome("", |layout| vec![layout.document(kind, &old)]).unwrap_err();
        assert!(line.contains("is a schema 1 manifest, from before 2016"), "{kind}: {line}");
    }
}

#[test]
fn artifacts_with_the_configuration_of_an_image_are_refused_with_their_type() {
    // in-toto and cosign store a configuration of an image, which may be for this platform or missing.
    for kind in ["application/vnd.in-toto+json", "application/vnd.dev.cosign.simplesigning.v1+json"] {
        let line = outcome("", |layout| {
            let statement = layout.blob(kind, b"{}");
            let config = layout.config(&[Digest::of(b"{}")]);
            vec![layout.manifest(&config, &[statement.clone(), statement])]
        });
        assert_eq!(line, Err(format!("not a container image; its type is {kind}")));
        let manifest = |layout: &Layout, artifact_type: &str| {
            let config = json!({ "mediaType": CONFIG, "digest": Digest::of(b"missing"), "size": 7 });
            let layers = [layout.blob(kind, b"{}")];
            let manifest = json!({
                "schemaVersion": 2, "artifactType": artifact_type, "config": config, "layers": layers,
            });
            layout.document(MANIFEST, &manifest)
        };
        let line = outcome("", |layout| vec![manifest(layout, "")]);
        assert_eq!(line, Err(format!("not a container image; its type is {kind}")));
        let line = outcome("", |layout| vec![manifest(layout, "application/x-report")]);
        assert_eq!(line, Err("not a container image; its type is application/x-report".to_owned()));
    }
    let line = outcome("", |layout| vec![attestation(layout)]);
    assert_eq!(line, Err("not a container image; its type is attestation-manifest".to_owned()));
}

#[test]
fn blobs_that_contradict_the_manifest_are_refused() {
    let changed = |change: fn(&Layout, &mut Value)| {
        outcome("", |layout| {
            let content = Layer::new().file("which", "right").bytes();
            let (layer, digest) = layout.layer(&content, Packing::Plain);
            let config = layout.document(CONFIG, &layout.config(&[digest]));
            let mut manifest = json!({ "schemaVersion": 2, "config": config, "layers": [layer] });
            change(layout, &mut manifest);
            vec![layout.document(MANIFEST, &manifest)]
        })
    };
    let size = "the manifest has no valid size for layer 1";
    for value in [json!(-1), json!(1.5), Value::Null, json!("10")] {
        let line = outcome("", |layout| {
            let (layer, digest) = layout.layer(&Layer::new().bytes(), Packing::Plain);
            vec![layout.manifest(&layout.config(&[digest]), &[with(layer, "size", value)])]
        });
        assert_eq!(line.unwrap_err(), size);
    }
    let line = changed(|_, manifest| manifest["config"]["size"] = json!(7)).unwrap_err();
    assert!(line.starts_with("sha256:") && line.contains("bytes, expected 7; it is damaged"), "{line}");
    let line =
        changed(|_, manifest| manifest["layers"][0]["digest"] = json!(format!("sha512:{}", "ab".repeat(64))));
    assert!(line.unwrap_err().starts_with("\"sha512:abab"));
    let folder = |kind: &'static str| {
        move |layout: &Layout, manifest: &mut Value| {
            let path = layout.blob_path(match kind {
                "config" => manifest["config"]["digest"].as_str().unwrap(),
                _ => manifest["layers"][0]["digest"].as_str().unwrap(),
            });
            fs::remove_file(&path).unwrap();
            if kind == "pipe" {
                rustix::fs::mkfifoat(rustix::fs::CWD, &path, rustix::fs::Mode::RWXU).unwrap();
            } else {
                fs::create_dir(&path).unwrap();
            }
        }
    };
    for kind in ["config", "layer", "pipe"] {
        let line = outcome("", |layout| {
            let (layer, digest) = layout.layer(&Layer::new().file("which", "x").bytes(), Packing::Plain);
            let config = layout.document(CONFIG, &layout.config(&[digest]));
            let mut manifest = json!({ "schemaVersion": 2, "config": config, "layers": [layer] });
            folder(kind)(layout, &mut manifest);
            vec![layout.document(MANIFEST, &manifest)]
        });
        assert!(line.unwrap_err().ends_with("is not a regular file; save or pull the image again"), "{kind}");
    }
    // Docker's foreign layers are read if their blobs exist.
    for end in ["", ".gzip"] {
        let found = outcome("", |layout| {
            let (layer, digest) = layout.layer(&Layer::new().file("which", "right").bytes(), Packing::Gzip);
            let kind = format!("application/vnd.docker.image.rootfs.foreign.diff.tar{end}");
            vec![layout.manifest(&layout.config(&[digest]), &[with(layer, "mediaType", json!(kind))])]
        });
        assert_eq!(found.as_deref(), Ok("right"));
    }
}
