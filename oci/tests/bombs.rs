//! Small images that become large: what a conversion takes of memory, time and the disk has an end.

mod support;

use std::process::{Command, Stdio};
use support::{Layer, Packing, Place};
use tar::EntryType;

#[test]
fn links_to_links_take_no_time_without_end() {
    // Each name leads over 39 links, and each of them over 2,000 directories.
    let there_and_back = "d/../".repeat(800);
    let mut layer = Layer::new().folder("d", 0o755).folder("l0", 0o755);
    for number in 1..40 {
        let target = format!("{there_and_back}l{}", number - 1);
        layer = layer.pax(&[("linkpath", target.as_bytes())]).symlink(&format!("l{number}"), "x");
    }
    let files = (0..40_000).fold(layer, |layer, number| layer.file(&format!("l39/{number}"), ""));
    let line = Place::refused(&[files.bytes()]);
    let expected = "the names of the image's layers lead over more than 50 million directories and links";
    assert!(line.ends_with(expected), "{line}");
}

#[test]
fn whiteouts_over_links_take_no_time_without_end() {
    // What a whiteout hides may be missing: then nothing is said, but the way there is walked.
    let target = format!("l/{}", "x/".repeat(2040));
    let mut layer = Layer::new().folder("l", 0o755);
    for number in 1..39 {
        let target = format!("l{}/{}", number - 1, "x/".repeat(2000));
        layer = layer.pax(&[("linkpath", target.as_bytes())]).symlink(&format!("l{number}"), "x");
    }
    layer = layer.pax(&[("linkpath", target.as_bytes())]).symlink("l0", "x");
    let marks = (0..40_000).fold(layer, |layer, number| layer.file(&format!("l38/.wh.{number}"), ""));
    let line = Place::refused(&[marks.bytes()]);
    assert!(line.contains("lead over more than 50 million directories and links"), "{line}");
}

/// Converts an image in a process that may have little more memory than a conversion takes at most.
fn refused_in_bounds(layer: Vec<u8>) -> String {
    const MEMORY_KIB: usize = (1 << 20) + (256 << 10);
    let place = Place::new();
    place.layout().write_bytes(&[layer], Packing::Plain);
    let script = format!("ulimit -v {MEMORY_KIB} && exec \"$0\" prepare --cache \"$1\" \"$2\"");
    let output = Command::new("sh")
        .args(["-c", &script, env!("CARGO_BIN_EXE_kindling-oci")])
        .args([place.path("cache"), place.path("image")])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let line = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{line}");
    line
}

#[test]
fn memory_has_an_end_whatever_fills_it() {
    let expected = "names and attributes of the image's files take more than 1024 MiB\n";
    // A path of two thousand folders for each file, and thousands of attributes.
    let folders = |number: usize| {
        let path = format!("{number}{}", "/a".repeat(2000));
        Layer::new().pax(&[("path", path.as_bytes())]).folder("x", 0o755).without_end()
    };
    let keys: Vec<_> = (0..3000).map(|number| format!("SCHILY.xattr.user.{number}")).collect();
    let records: Vec<_> = keys.iter().map(|key| (&**key, &b""[..])).collect();
    let records = Layer::new().pax(&records).without_end();
    let attributes =
        |number: usize| [&records[..], &Layer::new().file(&number.to_string(), "").without_end()].concat();
    for (what, layer) in [
        ("folders", (0..1000).flat_map(folders).collect()),
        ("attributes", (0..3000).flat_map(attributes).collect::<Vec<u8>>()),
    ] {
        let line = refused_in_bounds(layer);
        assert!(line.ends_with(expected), "{what}: {line}");
    }
}

#[test]
#[expect(clippy::print_stdout, reason = "what is not tested is said")]
fn the_disk_is_not_filled() {
    // On a filesystem of its own, in a namespace of its own.
    const NAMESPACE: [&str; 3] = ["--user", "--map-root-user", "--mount"];
    let may_mount = Command::new("unshare").args(NAMESPACE).arg("true").status();
    if !may_mount.is_ok_and(|status| status.success()) {
        println!("no small disk: this user may not make namespaces");
        return;
    }
    let place = Place::new();
    let header = Layer::header(EntryType::Regular, b"large", 0o644, 40 << 20);
    let layer = Layer::new().raw(header, &vec![b'x'; 40 << 20]);
    place.layout().write(vec![layer], Packing::Gzip);
    std::fs::create_dir(place.path("disk")).unwrap();
    let convert = |size: &str| {
        let script =
            "mount -t tmpfs -o size=\"$1\" tmpfs \"$2\" && \"$0\" prepare --cache \"$2\" \"$3\" && echo ok";
        let output = Command::new("unshare")
            .args(NAMESPACE)
            .args(["sh", "-c", script])
            .args([env!("CARGO_BIN_EXE_kindling-oci"), size])
            .args([place.path("disk"), place.path("image")])
            .stdin(Stdio::null())
            .output()
            .unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    // With 41 MiB of 42 there is too little left, and with 41 of 48 there is enough.
    let (status, line) = convert("42m");
    assert!(status == Some(1) && line.contains("less than 5 % of the disk is free"), "{status:?} {line}");
    assert_eq!(convert("48m").0, Some(0));
}
