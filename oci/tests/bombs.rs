//! Small images that expand: the memory, time and disk space of a conversion are bounded.

mod support;

use std::process::{Command, Stdio};
use support::{Layer, Packing, Workspace};
use tar::EntryType;

#[test]
fn chains_of_links_are_bounded() {
    // Each path has 39 links, and the target of each has 2,000 directories.
    let there_and_back = "d/../".repeat(800);
    let mut layer = Layer::new().folder("d", 0o755).folder("l0", 0o755);
    for number in 1..40 {
        let target = format!("{there_and_back}l{}", number - 1);
        layer = layer.pax(&[("linkpath", target.as_bytes())]).symlink(&format!("l{number}"), "x");
    }
    let files = (0..40_000).fold(layer, |layer, number| layer.file(&format!("l39/{number}"), ""));
    let line = Workspace::refused(&[files.bytes()]);
    let expected = "resolving the paths of the image's layers takes more than 50 million lookups";
    assert!(line.ends_with(expected), "{line}");
}

#[test]
fn chains_of_links_to_whiteouts_are_bounded() {
    // The target of a whiteout may be missing, which is not an error, but its path is resolved.
    let target = format!("l/{}", "x/".repeat(2040));
    let mut layer = Layer::new().folder("l", 0o755);
    for number in 1..39 {
        let target = format!("l{}/{}", number - 1, "x/".repeat(2000));
        layer = layer.pax(&[("linkpath", target.as_bytes())]).symlink(&format!("l{number}"), "x");
    }
    layer = layer.pax(&[("linkpath", target.as_bytes())]).symlink("l0", "x");
    let marks = (0..40_000).fold(layer, |layer, number| layer.file(&format!("l38/.wh.{number}"), ""));
    let line = Workspace::refused(&[marks.bytes()]);
    assert!(line.contains("takes more than 50 million lookups"), "{line}");
}

/// The memory of a process in KiB in which directories and attributes up to the limit are converted: a third of the
/// sandbox's limit. Names of 255 bytes need 50 MiB more.
const ENOUGH: usize = (1 << 20) + (256 << 10);

/// The exit status and the message of a conversion in a process with this memory in KiB.
fn converted_in(memory: usize, layer: Vec<u8>) -> (Option<i32>, String) {
    let workspace = Workspace::new();
    workspace.layout().write_bytes(&[layer], Packing::Plain);
    prepared_in(memory, &workspace)
}

fn prepared_in(memory: usize, workspace: &Workspace) -> (Option<i32>, String) {
    let script = format!("ulimit -v {memory} && exec \"$0\" prepare --cache \"$1\" \"$2\"");
    let output = Command::new("sh")
        .args(["-c", &script, env!("CARGO_BIN_EXE_kindling-oci")])
        .args([workspace.path("cache"), workspace.path("image")])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

/// A directory with 2,000 directories, each in the one before.
fn folders(number: usize) -> Vec<u8> {
    let path = format!("{number}{}", "/a".repeat(2000));
    Layer::new().pax(&[("path", path.as_bytes())]).folder("x", 0o755).without_end()
}

/// Empty files with 3,000 extended attributes each.
fn attributes(files: usize) -> Vec<u8> {
    let keys: Vec<_> = (0..3000).map(|number| format!("SCHILY.xattr.user.{number}")).collect();
    let records: Vec<_> = keys.iter().map(|key| (&**key, &b""[..])).collect();
    let records = Layer::new().pax(&records).without_end();
    let file =
        |number: usize| [&records[..], &Layer::new().file(&number.to_string(), "").without_end()].concat();
    (0..files).flat_map(file).collect()
}

#[test]
fn the_largest_tree_is_converted_in_bounds() {
    // One more directory or file exceeds the limit.
    let most_folders: Vec<u8> = (0..786).flat_map(folders).collect();
    let more_folders = [&most_folders[..], &folders(786)].concat();
    let expected = "the names and attributes of the image's files take more than 1024 MiB of memory\n";
    let image = |what, layer, status| {
        let (code, line) = converted_in(ENOUGH, layer);
        assert_eq!(code, Some(status), "{what}: {line}");
        assert!(line.ends_with(if status == 0 { "" } else { expected }), "{what}: {line}");
    };
    image("most folders", most_folders, 0);
    image("more folders", more_folders, 2);
    image("most attributes", attributes(2629), 0);
    image("more attributes", attributes(2630), 2);
}

#[test]
fn documents_of_many_small_values_are_read_in_bounds() {
    let workspace = Workspace::new();
    let layout = workspace.layout();
    let (layer, digest) = layout.layer(&Layer::new().bytes(), Packing::Plain);
    // 8 MiB of objects with one key each.
    let ports = vec![r#"{"":0}"#; 1_190_000].join(",");
    let config =
        format!(r#"{{"rootfs":{{"diff_ids":["{digest}"]}},"config":{{"ExposedPorts":{{"1":[{ports}]}}}}}}"#);
    let config = layout.blob("application/vnd.oci.image.config.v1+json", config.as_bytes());
    let manifest = serde_json::json!({ "schemaVersion": 2, "config": config, "layers": [layer] });
    layout.index(&[layout.document("application/vnd.oci.image.manifest.v1+json", &manifest)]);
    let (code, line) = prepared_in(512 << 10, &workspace);
    assert_eq!(code, Some(0), "{line}");
}

#[test]
fn dropped_attributes_take_no_memory() {
    // 35,000 attributes that the filesystem cannot hold, or all but one of which are replaced.
    for key in ["SCHILY.xattr.x", "SCHILY.xattr.user.x"] {
        let records = Layer::new().pax(&vec![(key, &b""[..]); 35_000]).without_end();
        let file = |number: usize| {
            [&records[..], &Layer::new().file(&number.to_string(), "").without_end()].concat()
        };
        let (code, line) = converted_in(384 << 10, (0..150).flat_map(file).collect());
        assert_eq!(code, Some(0), "{line}");
    }
}

#[test]
#[expect(clippy::print_stdout, reason = "says which test is skipped")]
fn the_disk_is_not_filled() {
    // In a separate mount namespace with a separate filesystem.
    const NAMESPACE: [&str; 3] = ["--user", "--map-root-user", "--mount"];
    let may_mount = Command::new("unshare").args(NAMESPACE).arg("true").status();
    if !may_mount.is_ok_and(|status| status.success()) {
        println!("no small disk: this user may not make namespaces");
        return;
    }
    let workspace = Workspace::new();
    let header = Layer::header(EntryType::Regular, b"large", 0o644, 40 << 20);
    let layer = Layer::new().raw(header, &vec![b'x'; 40 << 20]);
    workspace.layout().write(vec![layer], Packing::Gzip);
    std::fs::create_dir(workspace.path("disk")).unwrap();
    let convert = |size: &str| {
        let script =
            "mount -t tmpfs -o size=\"$1\" tmpfs \"$2\" && \"$0\" prepare --cache \"$2\" \"$3\" && echo ok";
        let output = Command::new("unshare")
            .args(NAMESPACE)
            .args(["sh", "-c", script])
            .args([env!("CARGO_BIN_EXE_kindling-oci"), size])
            .args([workspace.path("disk"), workspace.path("image")])
            .stdin(Stdio::null())
            .output()
            .unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    // 41 MiB of 42 leave too little free space, 41 MiB of 48 leave enough.
    let (status, line) = convert("42m");
    assert!(status == Some(1) && line.contains("full but for 5 % or 2 GiB"), "{status:?} {line}");
    assert_eq!(convert("48m").0, Some(0));
}
