//! The formats of images, the output of the commands, and the cache.

mod support;

use kindling_oci::Digest;
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use support::reader::{line, list};
use support::{Layer, Packing, Workspace};
use tar::Builder;

/// An archive of `docker save` in the format before version 25, with an image for each name.
fn saved(names: &[&str]) -> Vec<u8> {
    saved_with(names, names)
}

fn saved_with(names: &[&str], linked: &[&str]) -> Vec<u8> {
    let mut archive = Builder::new(Vec::new());
    let mut add = |name: &str, content: &[u8]| {
        let mut header = Layer::header(tar::EntryType::Regular, name.as_bytes(), 0o644, content.len() as u64);
        header.set_cksum();
        archive.append(&header, content).unwrap();
    };
    let mut manifest = Vec::new();
    for name in names {
        let layer = Layer::new().file("name", name).bytes();
        let digests = [Digest::of(&layer), Digest::of(&layer)];
        let config = json!({
            "architecture": "amd64", "os": "linux",
            "config": { "Cmd": null, "Env": null, "User": "", "WorkingDir": "" },
            "rootfs": { "type": "layers", "diff_ids": digests },
        });
        let config = config.to_string();
        let id = Digest::of(config.as_bytes()).hex();
        add(&format!("{id}.json"), config.as_bytes());
        add(&format!("{name}/layer.tar"), &layer);
        manifest.push(json!({
            "Config": format!("{id}.json"), "RepoTags": [format!("example/{name}:1")],
            "Layers": [format!("{name}/layer.tar"), format!("again-{name}/layer.tar")],
        }));
    }
    add("manifest.json", Value::from(manifest).to_string().as_bytes());
    for name in linked {
        let mut header =
            Layer::header(tar::EntryType::Symlink, format!("again-{name}/layer.tar").as_bytes(), 0o777, 0);
        header.set_link_name(format!("../{name}/layer.tar")).unwrap();
        header.set_cksum();
        archive.append(&header, &b""[..]).unwrap();
    }
    archive.into_inner().unwrap()
}

#[test]
fn archives_of_docker_save_are_read() {
    let workspace = Workspace::new();
    fs::write(workspace.path("one.tar"), saved(&["one"])).unwrap();
    let prepared = workspace.prepare("one.tar").unwrap();
    assert!(line(&list(&prepared.rootfs), "/name").ends_with("\"one\""));
    for packing in [Packing::Gzip, Packing::Zstd] {
        fs::write(workspace.path("packed"), packing.pack(&saved(&["one"]))).unwrap();
        assert_eq!(workspace.prepare("packed").unwrap().rootfs, prepared.rootfs);
        // The second time, the archive is not read.
        assert_eq!(workspace.prepare("packed").unwrap().rootfs, prepared.rootfs);
    }
    fs::write(workspace.path("two.tar"), saved(&["one", "two"])).unwrap();
    let (message, is_user_error) = workspace.error_with_cache("two.tar");
    assert_eq!(message, "several images; append one of these to the name: example/one:1, example/two:1");
    assert!(is_user_error);
    assert_eq!(workspace.prepare("two.tar:example/one:1").unwrap().digest, prepared.digest);
    let two = workspace.prepare("two.tar:two:1").unwrap();
    assert!(line(&list(&two.rootfs), "/name").ends_with("\"two\""));
    let (message, _) = workspace.error_with_cache("two.tar:three");
    assert_eq!(message, "no image \"three\"; available: example/one:1, example/two:1");
}

#[test]
fn damaged_archives_of_docker_save_are_refused() {
    let workspace = Workspace::new();
    let whole = saved(&["one"]);
    let at = |needle: &[u8]| whole.windows(needle.len()).position(|bytes| bytes == needle).unwrap();
    let content = at(b"one/layer.tar") + 1024;
    let mut exchanged = whole.clone();
    exchanged[content] ^= 0x20;
    fs::write(workspace.path("exchanged.tar"), &exchanged).unwrap();
    let (line, is_user_error) = workspace.error("exchanged.tar");
    assert!(line.starts_with("layer 1 of 2: the digest is sha256:"), "{line}");
    assert!(is_user_error);
    for length in [600, content + 10] {
        fs::write(workspace.path("cut.tar"), &whole[..length]).unwrap();
        let (line, is_user_error) = workspace.error("cut.tar");
        assert_eq!(
            line,
            "the archive is damaged; save the image again: the archive ends in the middle of a file"
        );
        assert!(is_user_error);
    }
    let packed = Packing::Gzip.pack(&whole);
    fs::write(workspace.path("cut.tar.gz"), &packed[..packed.len() / 2]).unwrap();
    let (line, is_user_error) = workspace.error("cut.tar.gz");
    assert!(line.starts_with("the archive is damaged; save the image again"), "{line}");
    assert!(is_user_error);
    fs::write(workspace.path("nolink.tar"), saved_with(&["one"], &[])).unwrap();
    assert_eq!(
        workspace.error("nolink.tar").0,
        "incomplete image: again-one/layer.tar is missing; save or pull the image again"
    );
}

#[test]
fn an_archive_of_a_layout_is_read_as_one() {
    let workspace = Workspace::new();
    workspace.layout().write(vec![Layer::new().file("a", "b")], Packing::Gzip);
    let mut archive = Builder::new(fs::File::create(workspace.path("layout.tar")).unwrap());
    archive.append_dir_all(".", workspace.path("image")).unwrap();
    archive.finish().unwrap();
    let (folder, archive) = (workspace.prepare("image").unwrap(), workspace.prepare("layout.tar").unwrap());
    assert_eq!(folder.rootfs, archive.rootfs);
}

#[test]
fn images_of_an_index_are_found_by_name_and_platform() {
    let workspace = Workspace::new();
    let layout = workspace.layout();
    let image = |content: &str| {
        let (layer, digest) = layout.layer(&Layer::new().file("name", content).bytes(), Packing::Plain);
        layout.manifest(&layout.config(&[digest]), &[layer])
    };
    let named = |mut manifest: Value, name: &str| {
        manifest["annotations"] = json!({ "org.opencontainers.image.ref.name": name });
        manifest
    };
    let for_platform = |mut manifest: Value, os: &str, architecture: &str| {
        manifest["platform"] = json!({ "os": os, "architecture": architecture });
        manifest
    };
    let inner = layout.document(
        "application/vnd.oci.image.index.v1+json",
        &json!({ "schemaVersion": 2, "manifests": [
            for_platform(image("arm"), "linux", "arm64"),
            for_platform(image("three"), "linux", "amd64"),
            for_platform(image("proof"), "unknown", "unknown"),
        ]}),
    );
    layout.index(&[
        named(image("one"), "1"),
        named(image("two"), "docker.io/library/x:2"),
        named(inner, "3"),
    ]);
    for (tag, content) in [("1", "one"), ("2", "two"), ("docker.io/library/x:2", "two"), ("3", "three")] {
        let prepared = workspace.prepare(&format!("image:{tag}")).unwrap();
        assert!(line(&list(&prepared.rootfs), "/name").ends_with(&format!("{content:?}")), "{tag}");
    }
    let (line, _) = workspace.error_with_cache("image");
    assert_eq!(line, "several images; append one of these to the name: 1, 3, docker.io/library/x:2");
    let (line, _) = workspace.error_with_cache("image:4");
    assert_eq!(line, "no image \"4\"; available: 1, 3, docker.io/library/x:2");
}

fn command(workspace: &Workspace, words: &[&str]) -> Output {
    subcommand(workspace, &[&["prepare"], words].concat())
}

fn subcommand(workspace: &Workspace, words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kindling-oci"))
        .args(words)
        .current_dir(workspace.folder.path())
        .env("KINDLING_CACHE", workspace.path("cache"))
        .output()
        .unwrap()
}

#[test]
fn the_command_prints_one_line_of_json() {
    let workspace = Workspace::new();
    let layout = workspace.layout();
    let layer = Layer::new()
        .symlink("etc", "/usr/etc")
        .file("usr/etc/passwd", "root:x:0:0::/root:/bin/sh\nweb:x:33:34::/srv:/bin/sh\n")
        .file("usr/etc/group", "web:x:34:\nlog:x:5:web\n");
    let (layer, digest) = layout.layer(&layer.bytes(), Packing::Plain);
    let config = json!({
        "architecture": "amd64", "os": "linux",
        "config": {
            "User": "web", "Entrypoint": ["/bin/server"], "Cmd": ["--port", "80"], "Env": ["A=b"],
            "WorkingDir": "srv", "StopSignal": "SIGQUIT", "ExposedPorts": { "80/tcp": {}, "53/udp": {}, "9": {} },
        },
        "rootfs": { "type": "layers", "diff_ids": [digest] },
    });
    layout.index(&[layout.manifest(&config, &[layer])]);
    let output = command(&workspace, &["./image"]);
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(text.lines().count(), 1);
    let value: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(
        value["config"],
        json!({
            "entrypoint": ["/bin/server"], "cmd": ["--port", "80"], "env": ["A=b"],
            "user": { "uid": 33, "gid": 34, "groups": [34, 5], "home": "/srv", "name": "web" },
            "working_dir": "/srv", "stop_signal": "SIGQUIT", "exposed_ports": ["53/udp", "80/tcp", "9/tcp"],
        })
    );
    assert_eq!(value["digest"], Digest::of(config.to_string().as_bytes()).to_string());
    support::check(Path::new(value["rootfs"].as_str().unwrap()));
    let output = command(&workspace, &["--user", "7:log", "./image"]);
    let value: Value = serde_json::from_slice(&output.stdout).unwrap();
    let user = json!({ "uid": 7, "gid": 5, "groups": [5], "home": "/", "name": "" });
    assert_eq!(value["config"]["user"], user);
}

#[test]
fn the_exit_status_distinguishes_bad_images_from_failures_of_the_host() {
    let workspace = Workspace::new();
    let failed = |words: &[&str]| {
        let output = command(&workspace, words);
        assert!(output.stdout.is_empty(), "{output:?}");
        (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    assert_eq!(failed(&["./no"]), (2, "error: ./no: no such file or directory\n".to_owned()));
    workspace.layout().write(vec![Layer::new()], Packing::Plain);
    let no_user =
        "error: ./image: no user \"web\" in the image's /etc/passwd; a numeric UID needs no entry\n";
    assert_eq!(failed(&["--user", "web", "./image"]), (2, no_user.to_owned()));
    fs::write(workspace.path("file"), "").unwrap();
    let (status, line) = failed(&["--cache", "file", "./image"]);
    assert_eq!(status, 1);
    assert!(line.ends_with("/file/oci: Not a directory (os error 20)\n"), "{line}");
    assert_eq!(failed(&["--pull"]).0, 2);
    fs::create_dir_all(workspace.path("debian/empty")).unwrap();
    let (status, line) = failed(&["./debian/empty"]);
    assert_eq!(status, 2);
    assert!(line.starts_with("error: ./debian/empty: neither an OCI layout nor an archive"), "{line}");
    let (status, line) = failed(&["--pull", "never", "fedora"]);
    assert_eq!((status, &*line), (2, "error: fedora: not in the cache; pull it with `--pull missing`\n"));
}

/// The current directory may be a checkout of an untrusted repository.
#[test]
fn local_files_do_not_shadow_references() {
    let workspace = Workspace::new();
    let failed = |words: &[&str]| {
        let output = command(&workspace, words);
        assert!(output.stdout.is_empty(), "{words:?}: {output:?}");
        assert_eq!(output.status.code(), Some(2), "{words:?}: {output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    let pinned = format!("busybox@{}", Digest::of(b""));
    let layouts = ["busybox", "busybox:1", pinned.as_str(), "team/app", "host.example/app", "x.tar"];
    for name in layouts {
        let layout = support::Layout::new(workspace.path(name));
        layout.write(vec![Layer::new().file("evil", "")], Packing::Plain);
    }
    fs::write(workspace.path("archive"), saved(&["one"])).unwrap();
    for name in [&layouts[..], &["archive", "busybox:2", "team/app:1"]].concat() {
        let line = failed(&["--pull", "never", name]);
        assert!(line.ends_with("not in the cache; pull it with `--pull missing`\n"), "{line}");
        let is_pinned = name.contains('@');
        assert_eq!(line.contains("to use the local path, write ./"), !is_pinned, "{line}");
    }
    for name in ["Busybox", "archive:one:1"] {
        let line = failed(&[name]);
        assert!(line.contains("invalid image reference"), "{line}");
    }
    for name in
        ["./busybox", "./busybox:1", "oci:busybox", "oci:team/app", "oci:./busybox", &format!("./{pinned}")]
    {
        let output = command(&workspace, &["--pull", "never", name]);
        assert!(output.status.success(), "{name}: {output:?}");
    }
    assert_eq!(failed(&["oci:nothing"]), "error: oci:nothing: no such file or directory\n");
}

/// The suffix of an archive makes a name a path, without `./`, except with `--pull always` or a digest.
#[test]
fn archives_are_recognized_by_their_suffix() {
    let workspace = Workspace::new();
    fs::create_dir(workspace.path("folder")).unwrap();
    for name in ["a.tar", "folder/a.tar", "a.tgz"] {
        fs::write(workspace.path(name), saved(&["one"])).unwrap();
        for name in [name.to_owned(), format!("{name}:one:1")] {
            let output = command(&workspace, &["--pull", "never", &name]);
            assert!(output.status.success(), "{name}: {output:?}");
        }
    }
    // Nothing listens on the port, so that the request to the registry fails.
    fs::create_dir(workspace.path("127.0.0.1:1")).unwrap();
    let pinned = format!("127.0.0.1:1/a.tar@{}", Digest::of(b""));
    for (name, pull) in [("127.0.0.1:1/a.tar", "always"), (pinned.as_str(), "missing")] {
        fs::write(workspace.path(name), saved(&["one"])).unwrap();
        let output = command(&workspace, &["--pull", pull, name]);
        assert!(!output.status.success() && output.stdout.is_empty(), "{name}: {output:?}");
    }
}

#[test]
fn a_cached_image_does_not_need_its_layers() {
    let workspace = Workspace::new();
    let layout = workspace.layout();
    layout.write(vec![Layer::new().file("a", "b")], Packing::Plain);
    let first = workspace.prepare("image").unwrap();
    let layer = layout.blob_path(&Digest::of(&Layer::new().file("a", "b").bytes()).to_string());
    fs::remove_file(layer).unwrap();
    assert_eq!(workspace.prepare("image").unwrap().rootfs, first.rootfs);
}

#[test]
fn incomplete_images_are_converted_again() {
    let workspace = Workspace::new();
    workspace.layout().write(vec![Layer::new().file("a", "b")], Packing::Plain);
    let rootfs = workspace.prepare("image").unwrap().rootfs;
    let content = fs::read(&rootfs).unwrap();
    fs::OpenOptions::new().write(true).open(&rootfs).unwrap().set_len(4096).unwrap();
    workspace.prepare("image").unwrap();
    assert!(fs::read(&rootfs).unwrap() == content);
    fs::write(rootfs.with_file_name("image.json"), "{").unwrap();
    workspace.prepare("image").unwrap();
    assert!(fs::read(&rootfs).unwrap() == content);
    // A conversion was interrupted.
    let entry = rootfs.parent().unwrap();
    let draft = entry.with_file_name(format!(".draft-{}", entry.file_name().unwrap().display()));
    fs::rename(entry, &draft).unwrap();
    workspace.prepare("image").unwrap();
    assert!(fs::read(&rootfs).unwrap() == content);
    assert_eq!(workspace.drafts().len(), 1);
}

#[test]
fn images_are_listed_and_removed() {
    let workspace = Workspace::new();
    fs::write(workspace.path("one.tar"), saved(&["one"])).unwrap();
    workspace.layout().write(vec![Layer::new().file("a", "b")], Packing::Plain);
    let succeed = |words: &[&str]| {
        let output = subcommand(&workspace, words);
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let row_of = |name: &str| {
        let path = workspace.path(name).canonicalize().unwrap().display().to_string();
        succeed(&["ls"]).lines().find(|line| line.ends_with(&path)).map(str::to_owned)
    };
    let hex = |digest: &str| digest.strip_prefix("sha256:").unwrap().to_owned();
    let first = workspace.prepare("one.tar").unwrap();
    let second = workspace.prepare("image").unwrap();
    workspace.prepare("image").unwrap();
    assert_eq!(succeed(&["ls"]).lines().count(), 3);
    assert!(row_of("one.tar").unwrap().starts_with(&hex(&first.digest)[..12]));
    assert!(row_of("image").unwrap().contains(" MiB       0 d  "), "{:?}", row_of("image"));

    let images: serde_json::Value = serde_json::from_str(&succeed(&["ls", "--json"])).unwrap();
    let ids: Vec<_> = images.as_array().unwrap().iter().map(|image| image["id"].as_str().unwrap()).collect();
    // The most recently used image comes first.
    assert_eq!(ids, [second.digest.to_string(), first.digest.to_string()]);
    assert!(images[0]["names"][0].as_str().unwrap().ends_with("image"));
    assert!(images[0]["bytes"].as_u64().unwrap() > 0 && images[0]["used"].as_u64().unwrap() > 1_700_000_000);

    let open = fs::File::open(&first.rootfs).unwrap();
    assert!(succeed(&["rm", "one.tar"]).starts_with(&first.digest.to_string()));
    assert_eq!((row_of("one.tar"), first.rootfs.exists()), (None, false));
    // An open file stays readable.
    assert!(std::os::unix::fs::FileExt::read_at(&open, &mut [0; 4096], 0).unwrap() == 4096);
    let output = subcommand(&workspace, &["rm", "one.tar", &hex(&second.digest)[..3]]);
    assert_eq!(output.status.code(), Some(2));
    let unknown = "no such image; `kindling image ls` lists the images in the cache";
    let lines = format!("error: one.tar: {unknown}\nerror: {}: {unknown}\n", &hex(&second.digest)[..3]);
    assert_eq!(String::from_utf8(output.stderr).unwrap(), lines);
    assert!(workspace.prepare("one.tar").is_ok());
    succeed(&["rm", &hex(&first.digest)[..4]]);

    // One conversion was interrupted, and another one is running.
    let entry = second.rootfs.parent().unwrap();
    let beside = |name: &str| entry.with_file_name(name);
    fs::create_dir(beside(".draft-left")).unwrap();
    fs::create_dir(beside(".draft-busy")).unwrap();
    let busy = fs::File::create(beside("busy.lock")).unwrap();
    busy.lock().unwrap();
    assert_eq!(succeed(&["prune"]), "");
    assert!(row_of("image").is_some());
    assert_eq!(succeed(&["prune", "--unused", "0"]).lines().count(), 1);
    assert_eq!(workspace.drafts(), [".draft-busy"]);
    assert_eq!(succeed(&["ls"]).lines().count(), 1);
}

#[test]
fn the_last_of_a_repeated_option_applies() {
    let workspace = Workspace::new();
    workspace.layout().write(vec![Layer::new().file("a", "b")], Packing::Plain);
    let output = |words: &[&str]| {
        let output = subcommand(&workspace, words);
        assert!(output.status.success(), "{words:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    // Neither the cache nor the user of the first option exists.
    let text = output(&[
        "prepare",
        "--pull=always",
        "--pull=never",
        "--cache=image/index.json",
        "--cache=cache",
        "--user=nobody-here",
        "--user=7",
        "--progress",
        "--progress",
        "--for=0",
        &format!("--for={}", std::process::id()),
        "./image",
    ]);
    assert!(text.contains("\"uid\":7"), "{text}");
    output(&["prepare", "--quiet", "--quiet", "./image"]);
    for words in [&["ls"][..], &["prune", "--unused=0", "--unused=30"]] {
        let words = [words, &["--json", "--json", "--cache=image/index.json", "--cache=cache"]].concat();
        assert!(output(&words).starts_with('['), "{words:?}");
    }
    // Operands are a list, and options with opposite effects still exclude each other.
    assert_eq!(subcommand(&workspace, &["prepare", "./image", "./image"]).status.code(), Some(2));
    assert_eq!(
        subcommand(&workspace, &["prepare", "--quiet", "--progress", "./image"]).status.code(),
        Some(2)
    );
    let removed = subcommand(&workspace, &["rm", "--json", "--json", "./image", "./other"]);
    assert!(
        removed.stdout.starts_with(b"[") && removed.stderr.starts_with(b"error: ./other: "),
        "{removed:?}"
    );
}

#[test]
fn concurrent_requests_convert_an_image_once() {
    let workspace = Workspace::new();
    workspace.layout().write(vec![Layer::new().file("a", &"b".repeat(1 << 20))], Packing::Gzip);
    let cache = kindling_oci::Cache::open(Some(&workspace.path("cache"))).unwrap();
    let image = workspace.path("image").display().to_string();
    let converted = std::sync::atomic::AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let mut begin = |_, _| {
                    converted.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    // The lock keeps other conversions out.
                    let mut files = fs::read_dir(workspace.path("cache/oci/v2"))
                        .unwrap()
                        .map(|file| file.unwrap().path());
                    let lock =
                        files.find(|path| path.extension().is_some_and(|name| name == "lock")).unwrap();
                    assert!(matches!(
                        fs::File::open(lock).unwrap().try_lock(),
                        Err(fs::TryLockError::WouldBlock)
                    ));
                };
                kindling_oci::prepare(&cache, &image, &kindling_oci::Options::default(), &mut begin).unwrap();
            });
        }
    });
    assert_eq!(converted.into_inner(), 1);
}

#[test]
fn local_paths_need_a_prefix_or_a_suffix() {
    // A checkout of an untrusted repository must not decide what `busybox` is.
    let workspace = Workspace::new();
    let digest = Digest::of(b"an image");
    let names = [
        "busybox",
        "busybox:1",
        "busybox@sha256",
        "team/app",
        "app.tar",
        "localhost:5000/app",
        "oci",
        "docker-archive",
    ];
    let layout = workspace.layout();
    layout.write(vec![Layer::new().file("a", "b")], Packing::Plain);
    for name in names {
        fs::create_dir_all(workspace.path(name).parent().unwrap()).unwrap();
        let copied = Command::new("cp")
            .arg("-r")
            .args([workspace.path("image"), workspace.path(name)])
            .status()
            .unwrap();
        assert!(copied.success());
    }
    fs::write(workspace.path("busybox@sha256:").with_file_name(format!("busybox@{digest}")), saved(&["one"]))
        .unwrap();
    fs::write(workspace.path("alpine"), saved(&["one"])).unwrap();
    fs::write(workspace.path("alpine.tar"), saved(&["one"])).unwrap();
    let refused = |words: &[&str]| {
        let output = command(&workspace, words);
        assert_eq!(output.status.code(), Some(2), "{words:?}: {output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    let pinned = format!("busybox@{digest}");
    for name in ["busybox", "busybox:1", "team/app", "app.tar", "localhost:5000/app", "alpine", "oci"] {
        let line = refused(&["--pull", "never", name]);
        let start = format!("error: {name}: to use the local path, write ./");
        assert!(line.starts_with(&start) && line.contains("not in the cache"), "{line}");
    }
    assert!(refused(&["--pull", "never", &pinned]).contains("not in the cache"));
    let line = refused(&["--pull", "never", "alpine:example/one:1"]);
    assert!(line.contains("write ./alpine") && line.contains("invalid image reference"), "{line}");
    // Paths are recognized by their prefix, and archives by their suffix.
    let (path, image) = (workspace.path("team/app"), format!("oci:{}", workspace.path("image").display()));
    for name in ["./busybox", "./busybox@sha256", "oci:team/app", "alpine.tar", "alpine.tar:one:1", &image]
        .into_iter()
        .chain(path.to_str())
        .chain([&*format!("./{pinned}"), "docker-archive:alpine", "./localhost:5000/app", "../alpine.tar"])
    {
        let name = if name == "../alpine.tar" { "team/../alpine.tar" } else { name };
        let output = command(&workspace, &["--pull", "never", name]);
        assert!(output.status.success(), "{name}: {output:?}");
    }
}

#[test]
fn pull_always_contacts_the_registry() {
    let workspace = Workspace::new();
    fs::write(workspace.path("app.tar"), saved(&["one"])).unwrap();
    // Nothing listens on this port: the error shows that the registry was contacted.
    let output = Command::new(env!("CARGO_BIN_EXE_kindling-oci"))
        .args(["prepare", "--pull", "always", "localhost:1/app.tar"])
        .current_dir(workspace.folder.path())
        .env("KINDLING_CACHE", workspace.path("cache"))
        .output()
        .unwrap();
    let line = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{line}");
    assert!(line.contains("request to http://localhost:1/v2/app.tar/manifests/latest"), "{line}");
    assert!(command(&workspace, &["--pull", "always", "./app.tar"]).status.success());
}

#[test]
fn archives_and_layers_have_every_compression_of_docker() {
    let workspace = Workspace::new();
    let whole = saved(&["one"]);
    fs::write(workspace.path("plain.tar"), &whole).unwrap();
    let expected = workspace.prepare("plain.tar").unwrap().rootfs;
    for (program, options) in [
        ("gzip", &["-1"][..]),
        ("xz", &["-1"]),
        ("xz", &["-1", "--block-size=4096"]),
        ("xz", &["-1", "--check=sha256"]),
        ("bzip2", &["-1"]),
    ] {
        let name = format!("{program}{}.tar", options.len());
        fs::write(workspace.path("whole"), &whole).unwrap();
        let output = Command::new(program)
            .args(options)
            .arg("--stdout")
            .arg(workspace.path("whole"))
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        // These programs also accept two concatenated streams.
        fs::write(workspace.path(&name), &output.stdout).unwrap();
        assert_eq!(workspace.prepare(&name).unwrap().rootfs, expected, "{program}");
        fs::write(workspace.path("cut.tar"), &output.stdout[..output.stdout.len() / 2]).unwrap();
        let (line, is_user_error) = workspace.error_with_cache("cut.tar");
        assert!(
            line.starts_with("the archive is damaged; save the image again") && is_user_error,
            "{program}: {line}"
        );
    }
}

#[test]
fn the_window_of_zstandard_is_limited() {
    // A frame with one raw block, and a window of two to this power.
    let frame = |data: &[u8], log: u8| {
        let block = u32::try_from(data.len()).unwrap() << 3 | 1;
        [&b"\x28\xb5\x2f\xfd\x00"[..], &[(log - 10) << 3], &block.to_le_bytes()[..3], data].concat()
    };
    let archive = saved(&["one"]);
    let workspace = Workspace::new();
    fs::write(workspace.path("large.tar"), frame(&archive, 29)).unwrap();
    workspace.prepare("large.tar").unwrap();
    fs::write(workspace.path("larger.tar"), frame(&archive, 30)).unwrap();
    let (line, is_user_error) = workspace.error_with_cache("larger.tar");
    assert!(line.contains("Requested: 1073741824, Max: 536870912") && is_user_error, "{line}");
}

#[test]
fn the_dictionary_of_xz_is_limited() {
    let workspace = Workspace::new();
    fs::write(workspace.path("whole"), saved(&["one"])).unwrap();
    let output = Command::new("xz").args(["-1", "--stdout"]).arg(workspace.path("whole")).output().unwrap();
    // The block header behind the stream header of 12 bytes: its size in words, flags, the filter LZMA2 with one byte of
    // properties, padding and a checksum.
    let with_dictionary = |code: u8| {
        let mut packed = output.stdout.clone();
        let end = 12 + 4 * (usize::from(packed[12]) + 1);
        assert_eq!(packed[14..16], [0x21, 1]);
        packed[16] = code;
        let mut sum = flate2::Crc::new();
        sum.update(&packed[12..end - 4]);
        packed[end - 4..end].copy_from_slice(&sum.sum().to_le_bytes());
        packed
    };
    let (half_a_gib, three_quarters) = (34, 35);
    fs::write(workspace.path("large.tar"), with_dictionary(half_a_gib)).unwrap();
    workspace.prepare("large.tar").unwrap();
    fs::write(workspace.path("larger.tar"), with_dictionary(three_quarters)).unwrap();
    let (line, is_user_error) = workspace.error_with_cache("larger.tar");
    assert!(line.ends_with(": the dictionary of xz is larger than 512 MiB") && is_user_error, "{line}");
}

#[test]
fn a_long_list_of_users_is_read_completely() {
    let user = |number: u32| format!("user{number}:x:{number}:{number}::/home/{number}:/bin/sh\n");
    let workspace = Workspace::new();
    let passwd: String = (1000..60_000).map(user).collect();
    assert!(passwd.len() > 2 << 20);
    workspace.layout().write(vec![Layer::new().file("etc/passwd", &passwd)], Packing::Plain);
    let prepared = workspace.prepare_as("image", Some("user59999")).unwrap();
    assert_eq!(prepared.config.user.uid, 59_999);
    let workspace = Workspace::new();
    workspace.layout().write(vec![Layer::new().file("etc/group", &"x".repeat(17 << 20))], Packing::Plain);
    assert_eq!(workspace.error("image"), ("the image's /etc/group is larger than 16 MiB".to_owned(), true));
}
