//! The forms in which images come, what is told about them, and the cache.

mod support;

use kindling_oci::Digest;
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use support::reader::{line, list};
use support::{Layer, Packing, Place};
use tar::Builder;

/// An archive of `docker save` of before its OCI layouts, with one image for each name.
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
    let place = Place::new();
    fs::write(place.path("one.tar"), saved(&["one"])).unwrap();
    let prepared = place.prepare("one.tar").unwrap();
    assert!(line(&list(&prepared.rootfs), "/name").ends_with("\"one\""));
    for packing in [Packing::Gzip, Packing::Zstd] {
        fs::write(place.path("packed"), packing.pack(&saved(&["one"]))).unwrap();
        assert_eq!(place.prepare("packed").unwrap().rootfs, prepared.rootfs);
        // From memory, the archive itself is not looked at.
        assert_eq!(place.prepare("packed").unwrap().rootfs, prepared.rootfs);
    }
    fs::write(place.path("two.tar"), saved(&["one", "two"])).unwrap();
    let (message, is_users) = place.error_beside_cache("two.tar");
    assert_eq!(message, "it has several images; add one of these to its name: example/one:1, example/two:1");
    assert!(is_users);
    assert_eq!(place.prepare("two.tar:example/one:1").unwrap().digest, prepared.digest);
    let two = place.prepare("two.tar:two:1").unwrap();
    assert!(line(&list(&two.rootfs), "/name").ends_with("\"two\""));
    let (message, _) = place.error_beside_cache("two.tar:three");
    assert_eq!(message, "it has no image \"three\"; it has example/one:1, example/two:1");
}

#[test]
fn damaged_archives_of_docker_save_are_refused() {
    let place = Place::new();
    let whole = saved(&["one"]);
    let at = |needle: &[u8]| whole.windows(needle.len()).position(|bytes| bytes == needle).unwrap();
    let content = at(b"one/layer.tar") + 1024;
    let mut exchanged = whole.clone();
    exchanged[content] ^= 0x20;
    fs::write(place.path("exchanged.tar"), &exchanged).unwrap();
    let (line, is_users) = place.error("exchanged.tar");
    assert!(line.starts_with("layer 1 of 2: its content has the digest sha256:"), "{line}");
    assert!(is_users);
    for length in [600, content + 10] {
        fs::write(place.path("cut.tar"), &whole[..length]).unwrap();
        let (line, is_users) = place.error("cut.tar");
        assert_eq!(
            line,
            "the archive is damaged; save the image again: the archive ends in the middle of a file"
        );
        assert!(is_users);
    }
    let packed = Packing::Gzip.pack(&whole);
    fs::write(place.path("cut.tar.gz"), &packed[..packed.len() / 2]).unwrap();
    let (line, is_users) = place.error("cut.tar.gz");
    assert!(line.starts_with("the archive is damaged; save the image again"), "{line}");
    assert!(is_users);
    fs::write(place.path("nolink.tar"), saved_with(&["one"], &[])).unwrap();
    assert_eq!(
        place.error("nolink.tar").0,
        "it is not whole: again-one/layer.tar is missing; save or pull it again"
    );
}

#[test]
fn an_archive_of_a_layout_is_read_as_one() {
    let place = Place::new();
    place.layout().write(vec![Layer::new().file("a", "b")], Packing::Gzip);
    let mut archive = Builder::new(fs::File::create(place.path("layout.tar")).unwrap());
    archive.append_dir_all(".", place.path("image")).unwrap();
    archive.finish().unwrap();
    let (folder, archive) = (place.prepare("image").unwrap(), place.prepare("layout.tar").unwrap());
    assert_eq!(folder.rootfs, archive.rootfs);
}

#[test]
fn an_index_of_several_images_is_asked_by_name_and_platform() {
    let place = Place::new();
    let layout = place.layout();
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
        let prepared = place.prepare(&format!("image:{tag}")).unwrap();
        assert!(line(&list(&prepared.rootfs), "/name").ends_with(&format!("{content:?}")), "{tag}");
    }
    let (line, _) = place.error_beside_cache("image");
    assert_eq!(line, "it has several images; add one of these to its name: 1, 3, docker.io/library/x:2");
    let (line, _) = place.error_beside_cache("image:4");
    assert_eq!(line, "it has no image \"4\"; it has 1, 3, docker.io/library/x:2");
}

fn command(place: &Place, words: &[&str]) -> Output {
    subcommand(place, &[&["prepare"], words].concat())
}

fn subcommand(place: &Place, words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kindling-oci"))
        .args(words)
        .current_dir(place.folder.path())
        .env("KINDLING_CACHE", place.path("cache"))
        .output()
        .unwrap()
}

#[test]
fn the_command_prints_one_messageof_json() {
    let place = Place::new();
    let layout = place.layout();
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
    let output = command(&place, &["./image"]);
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
    let output = command(&place, &["--user", "7:log", "./image"]);
    let value: Value = serde_json::from_slice(&output.stdout).unwrap();
    let user = json!({ "uid": 7, "gid": 5, "groups": [5], "home": "/", "name": "" });
    assert_eq!(value["config"]["user"], user);
}

#[test]
fn the_commands_exit_status_says_who_can_mend_it() {
    let place = Place::new();
    let failed = |words: &[&str]| {
        let output = command(&place, words);
        assert!(output.stdout.is_empty(), "{output:?}");
        (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    assert_eq!(failed(&["./no"]), (2, "error: ./no: there is no such file or folder\n".to_owned()));
    place.layout().write(vec![Layer::new()], Packing::Plain);
    let no_user =
        "error: ./image: the image's /etc/passwd has no user \"web\"; a number needs no entry there\n";
    assert_eq!(failed(&["--user", "web", "./image"]), (2, no_user.to_owned()));
    fs::write(place.path("file"), "").unwrap();
    let (status, line) = failed(&["--cache", "file", "./image"]);
    assert_eq!(status, 1);
    assert!(line.ends_with("/file/oci: Not a directory (os error 20)\n"), "{line}");
    assert_eq!(failed(&["--pull"]).0, 2);
    fs::create_dir_all(place.path("debian/empty")).unwrap();
    let (status, line) = failed(&["./debian/empty"]);
    assert_eq!(status, 2);
    assert!(line.starts_with("error: ./debian/empty: it is neither an OCI layout nor an archive"), "{line}");
    let (status, line) = failed(&["--pull", "never", "fedora"]);
    assert_eq!(
        (status, &*line),
        (2, "error: fedora: it has not been pulled before; `--pull missing` pulls it\n")
    );
}

/// The current directory may be a stranger's checkout.
#[test]
fn no_file_or_folder_answers_for_a_name_of_a_registry() {
    let place = Place::new();
    let failed = |words: &[&str]| {
        let output = command(&place, words);
        assert!(output.stdout.is_empty(), "{words:?}: {output:?}");
        assert_eq!(output.status.code(), Some(2), "{words:?}: {output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    let pinned = format!("busybox@{}", Digest::of(b""));
    let layouts = ["busybox", "busybox:1", pinned.as_str(), "team/app", "host.example/app", "x.tar"];
    for name in layouts {
        let layout = support::Layout::new(place.path(name));
        layout.write(vec![Layer::new().file("evil", "")], Packing::Plain);
    }
    fs::write(place.path("archive"), saved(&["one"])).unwrap();
    for name in [&layouts[..], &["archive", "busybox:2", "team/app:1"]].concat() {
        let line = failed(&["--pull", "never", name]);
        assert!(line.ends_with("it has not been pulled before; `--pull missing` pulls it\n"), "{line}");
        let is_pinned = name.contains('@');
        assert_eq!(line.contains("what is here is called ./"), !is_pinned, "{line}");
    }
    for name in ["Busybox", "archive:one:1"] {
        let line = failed(&[name]);
        assert!(line.contains("as the name of an image in a registry it is wrong"), "{line}");
    }
    for name in
        ["./busybox", "./busybox:1", "oci:busybox", "oci:team/app", "oci:./busybox", &format!("./{pinned}")]
    {
        let output = command(&place, &["--pull", "never", name]);
        assert!(output.status.success(), "{name}: {output:?}");
    }
    assert_eq!(failed(&["oci:nothing"]), "error: oci:nothing: there is no such file or folder\n");
}

/// No repository is called `debian.tar`, so that its file needs no `./`, unless the registry is asked for.
#[test]
fn a_file_that_is_named_as_an_archive_is_one() {
    let place = Place::new();
    fs::create_dir(place.path("folder")).unwrap();
    for name in ["a.tar", "folder/a.tar", "a.tgz"] {
        fs::write(place.path(name), saved(&["one"])).unwrap();
        for name in [name.to_owned(), format!("{name}:one:1")] {
            let output = command(&place, &["--pull", "never", &name]);
            assert!(output.status.success(), "{name}: {output:?}");
        }
    }
    // Nothing listens there, so that the registry is asked in vain.
    fs::create_dir(place.path("127.0.0.1:1")).unwrap();
    let pinned = format!("127.0.0.1:1/a.tar@{}", Digest::of(b""));
    for (name, pull) in [("127.0.0.1:1/a.tar", "always"), (pinned.as_str(), "missing")] {
        fs::write(place.path(name), saved(&["one"])).unwrap();
        let output = command(&place, &["--pull", pull, name]);
        assert!(!output.status.success() && output.stdout.is_empty(), "{name}: {output:?}");
    }
}

#[test]
fn a_converted_image_is_found_again_without_its_layers() {
    let place = Place::new();
    let layout = place.layout();
    layout.write(vec![Layer::new().file("a", "b")], Packing::Plain);
    let first = place.prepare("image").unwrap();
    let layer = layout.blob_path(&Digest::of(&Layer::new().file("a", "b").bytes()).to_string());
    fs::remove_file(layer).unwrap();
    assert_eq!(place.prepare("image").unwrap().rootfs, first.rootfs);
}

#[test]
fn what_is_not_whole_is_made_again() {
    let place = Place::new();
    place.layout().write(vec![Layer::new().file("a", "b")], Packing::Plain);
    let rootfs = place.prepare("image").unwrap().rootfs;
    let content = fs::read(&rootfs).unwrap();
    fs::OpenOptions::new().write(true).open(&rootfs).unwrap().set_len(4096).unwrap();
    place.prepare("image").unwrap();
    assert!(fs::read(&rootfs).unwrap() == content);
    fs::write(rootfs.with_file_name("image.json"), "{").unwrap();
    place.prepare("image").unwrap();
    assert!(fs::read(&rootfs).unwrap() == content);
    // Someone was interrupted.
    let entry = rootfs.parent().unwrap();
    let draft = entry.with_file_name(format!(".draft-{}", entry.file_name().unwrap().display()));
    fs::rename(entry, &draft).unwrap();
    place.prepare("image").unwrap();
    assert!(fs::read(&rootfs).unwrap() == content);
    assert_eq!(place.drafts().len(), 1);
}

#[test]
fn images_are_listed_and_removed() {
    let place = Place::new();
    fs::write(place.path("one.tar"), saved(&["one"])).unwrap();
    place.layout().write(vec![Layer::new().file("a", "b")], Packing::Plain);
    let succeed = |words: &[&str]| {
        let output = subcommand(&place, words);
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let row_of = |name: &str| {
        let path = place.path(name).canonicalize().unwrap().display().to_string();
        succeed(&["ls"]).lines().find(|line| line.ends_with(&path)).map(str::to_owned)
    };
    let first = place.prepare("one.tar").unwrap();
    let second = place.prepare("image").unwrap();
    place.prepare("image").unwrap();
    assert_eq!(succeed(&["ls"]).lines().count(), 3);
    assert!(row_of("one.tar").unwrap().starts_with(&first.digest.hex()[..12]));
    assert!(row_of("image").unwrap().contains(" MiB       0 d  "), "{:?}", row_of("image"));

    let open = fs::File::open(&first.rootfs).unwrap();
    assert!(succeed(&["rm", "one.tar"]).starts_with(&first.digest.to_string()));
    assert_eq!((row_of("one.tar"), first.rootfs.exists()), (None, false));
    // Who has it open keeps it.
    assert!(std::os::unix::fs::FileExt::read_at(&open, &mut [0; 4096], 0).unwrap() == 4096);
    let output = subcommand(&place, &["rm", "one.tar", &second.digest.hex()[..3]]);
    assert_eq!(output.status.code(), Some(2));
    let unknown = "no image of this name or id is kept; `kindling image ls` has those that are";
    let lines = format!("error: one.tar: {unknown}\nerror: {}: {unknown}\n", &second.digest.hex()[..3]);
    assert_eq!(String::from_utf8(output.stderr).unwrap(), lines);
    assert!(place.prepare("one.tar").is_ok());
    succeed(&["rm", &first.digest.hex()[..4]]);

    // Someone was interrupted, and someone else is at work.
    let entry = second.rootfs.parent().unwrap();
    let beside = |name: &str| entry.with_file_name(name);
    fs::create_dir(beside(".draft-left")).unwrap();
    fs::create_dir(beside(".draft-busy")).unwrap();
    let busy = fs::File::create(beside("busy.lock")).unwrap();
    busy.lock().unwrap();
    assert_eq!(succeed(&["prune"]), "");
    assert!(row_of("image").is_some());
    assert_eq!(succeed(&["prune", "--unused", "0"]).lines().count(), 1);
    assert_eq!(place.drafts(), [".draft-busy"]);
    assert_eq!(succeed(&["ls"]).lines().count(), 1);
}

#[test]
fn several_at_once_convert_once() {
    let place = Place::new();
    place.layout().write(vec![Layer::new().file("a", &"b".repeat(1 << 20))], Packing::Gzip);
    let options = || kindling_oci::Options { cache: Some(place.path("cache")), ..Default::default() };
    let image = place.path("image").display().to_string();
    let converted = std::sync::atomic::AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let mut begin = |_, _| {
                    converted.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    // Nobody else can come in.
                    let mut files =
                        fs::read_dir(place.path("cache/oci/v2")).unwrap().map(|file| file.unwrap().path());
                    let lock =
                        files.find(|path| path.extension().is_some_and(|name| name == "lock")).unwrap();
                    assert!(matches!(
                        fs::File::open(lock).unwrap().try_lock(),
                        Err(fs::TryLockError::WouldBlock)
                    ));
                };
                kindling_oci::prepare(&image, &options(), &mut begin).unwrap();
            });
        }
    });
    assert_eq!(converted.into_inner(), 1);
}

#[test]
fn a_registrys_name_is_no_file_of_this_folder() {
    // A checkout of somebody else must not decide what `busybox` is.
    let place = Place::new();
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
    let layout = place.layout();
    layout.write(vec![Layer::new().file("a", "b")], Packing::Plain);
    for name in names {
        fs::create_dir_all(place.path(name).parent().unwrap()).unwrap();
        let copied =
            Command::new("cp").arg("-r").args([place.path("image"), place.path(name)]).status().unwrap();
        assert!(copied.success());
    }
    fs::write(place.path("busybox@sha256:").with_file_name(format!("busybox@{digest}")), saved(&["one"]))
        .unwrap();
    fs::write(place.path("alpine"), saved(&["one"])).unwrap();
    fs::write(place.path("alpine.tar"), saved(&["one"])).unwrap();
    let refused = |words: &[&str]| {
        let output = command(&place, words);
        assert_eq!(output.status.code(), Some(2), "{words:?}: {output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    let pinned = format!("busybox@{digest}");
    for name in ["busybox", "busybox:1", "team/app", "app.tar", "localhost:5000/app", "alpine", "oci"] {
        let line = refused(&["--pull", "never", name]);
        let start = format!("error: {name}: what is here is called ./");
        assert!(line.starts_with(&start) && line.contains("has not been pulled before"), "{line}");
    }
    assert!(refused(&["--pull", "never", &pinned]).contains("has not been pulled before"));
    let line = refused(&["--pull", "never", "alpine:example/one:1"]);
    assert!(
        line.contains("called ./alpine") && line.contains("name of an image in a registry it is wrong"),
        "{line}"
    );
    // A path is one by its first characters, and an archive by its last ones.
    let (path, image) = (place.path("team/app"), format!("oci:{}", place.path("image").display()));
    for name in ["./busybox", "./busybox@sha256", "oci:team/app", "alpine.tar", "alpine.tar:one:1", &image]
        .into_iter()
        .chain(path.to_str())
        .chain([&*format!("./{pinned}"), "docker-archive:alpine", "./localhost:5000/app", "../alpine.tar"])
    {
        let name = if name == "../alpine.tar" { "team/../alpine.tar" } else { name };
        let output = command(&place, &["--pull", "never", name]);
        assert!(output.status.success(), "{name}: {output:?}");
    }
}

#[test]
fn pull_always_asks_the_registry_whatever_is_here() {
    let place = Place::new();
    fs::write(place.path("app.tar"), saved(&["one"])).unwrap();
    // Nothing listens on this port: the name is a registry's, and the registry is asked.
    let output = Command::new(env!("CARGO_BIN_EXE_kindling-oci"))
        .args(["prepare", "--pull", "always", "localhost:1/app.tar"])
        .current_dir(place.folder.path())
        .env("KINDLING_CACHE", place.path("cache"))
        .output()
        .unwrap();
    let line = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{line}");
    assert!(line.contains("cannot ask http://localhost:1/v2/app.tar/manifests/latest"), "{line}");
    assert!(command(&place, &["--pull", "always", "./app.tar"]).status.success());
}

#[test]
fn archives_and_layers_may_be_packed_in_every_way_that_docker_reads() {
    let place = Place::new();
    let whole = saved(&["one"]);
    fs::write(place.path("plain.tar"), &whole).unwrap();
    let expected = place.prepare("plain.tar").unwrap().rootfs;
    for (program, options) in [
        ("gzip", &["-1"][..]),
        ("xz", &["-1"]),
        ("xz", &["-1", "--block-size=4096"]),
        ("xz", &["-1", "--check=sha256"]),
        ("bzip2", &["-1"]),
    ] {
        let name = format!("{program}{}.tar", options.len());
        fs::write(place.path("whole"), &whole).unwrap();
        let output =
            Command::new(program).args(options).arg("--stdout").arg(place.path("whole")).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        // Twice in a row is what these programs take, too.
        fs::write(place.path(&name), &output.stdout).unwrap();
        assert_eq!(place.prepare(&name).unwrap().rootfs, expected, "{program}");
        fs::write(place.path("cut.tar"), &output.stdout[..output.stdout.len() / 2]).unwrap();
        let (line, is_users) = place.error_beside_cache("cut.tar");
        assert!(
            line.starts_with("the archive is damaged; save the image again") && is_users,
            "{program}: {line}"
        );
    }
}

#[test]
fn a_window_of_zstandard_has_a_limit_that_is_named() {
    // A frame of one block that is stored as it is, with a window of two to the power of this.
    let frame = |data: &[u8], log: u8| {
        let block = u32::try_from(data.len()).unwrap() << 3 | 1;
        [&b"\x28\xb5\x2f\xfd\x00"[..], &[(log - 10) << 3], &block.to_le_bytes()[..3], data].concat()
    };
    let archive = saved(&["one"]);
    let place = Place::new();
    fs::write(place.path("large.tar"), frame(&archive, 29)).unwrap();
    place.prepare("large.tar").unwrap();
    fs::write(place.path("larger.tar"), frame(&archive, 30)).unwrap();
    let (line, is_users) = place.error_beside_cache("larger.tar");
    assert!(line.contains("Requested: 1073741824, Max: 536870912") && is_users, "{line}");
}

#[test]
fn a_long_list_of_users_is_read_to_its_end() {
    let user = |number: u32| format!("user{number}:x:{number}:{number}::/home/{number}:/bin/sh\n");
    let place = Place::new();
    let passwd: String = (1000..60_000).map(user).collect();
    assert!(passwd.len() > 2 << 20);
    place.layout().write(vec![Layer::new().file("etc/passwd", &passwd)], Packing::Plain);
    let prepared = place.prepare_as("image", Some("user59999")).unwrap();
    assert_eq!(prepared.config.user.uid, 59_999);
    let place = Place::new();
    place.layout().write(vec![Layer::new().file("etc/group", &"x".repeat(17 << 20))], Packing::Plain);
    assert_eq!(place.error("image"), ("its /etc/group has more than 16 MiB".to_owned(), true));
}
