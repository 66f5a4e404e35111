//! Merging of layers, with the same result as unpacking them.

mod support;

use support::reader::{line, paths};
use support::{Layer, Packing, Workspace};
use tar::EntryType;

#[test]
fn files_of_every_type_keep_their_attributes() {
    let mut owned = Layer::header(EntryType::Regular, b"owned", 0o6755, 3);
    owned.set_uid(70_000);
    owned.set_gid(4_000_000_000);
    let mut device = Layer::header(EntryType::Char, b"null", 0o666, 0);
    device.set_device_major(1).unwrap();
    device.set_device_minor(3).unwrap();
    let mut disk = Layer::header(EntryType::Block, b"disk", 0o660, 0);
    disk.set_device_major(259).unwrap();
    disk.set_device_minor(0xf_1234).unwrap();
    let capability = b"\x01\0\0\x02\n\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    let long = "n".repeat(255);
    let layer = Layer::new()
        .folder("./", 0o750)
        .folder("folder/", 0o1777)
        .raw(owned, b"abc")
        .raw(device, b"")
        .raw(disk, b"")
        .raw(Layer::header(EntryType::Fifo, b"fifo", 0o600, 0), b"")
        .symlink("link", "/folder/../x")
        .file("empty", "")
        .hard_link("folder/other", "./owned")
        .pax(&[
            ("mtime", b"-1.5"),
            ("SCHILY.xattr.security.capability", capability),
            ("SCHILY.xattr.user.colour", b"blue=1\nred"),
            ("SCHILY.xattr.user.colour", b"blue=2\nred"),
            ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
            ("SCHILY.xattr.strange.attribute", b"y"),
        ])
        .file("attributes", "")
        .pax(&[("SCHILY.xattr.strange.attribute", b"y")])
        .file("none", "")
        .pax(&[("path", long.as_bytes()), ("uid", b"3000000000"), ("gid", b"7")])
        .file("short", "");
    let lines = Workspace::new().merged(vec![layer]);
    let mut expected = vec![
        "/ 40750 0:0 3 1700000000.0 folder".to_owned(),
        "/attributes 100644 0:0 1 -2.500000000 \"\" \
         security.capability=\"\\x01\\x00\\x00\\x02\\n\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\" \
         user.colour=\"blue=2\\nred\""
            .to_owned(),
        // new_encode_dev of linux/kdev_t.h: minor 0xf1234 of 20 bits around major 0x103.
        "/disk 60660 0:0 1 1700000000.0 device 0xf1210334".to_owned(),
        "/empty 100644 0:0 1 1700000000.0 \"\"".to_owned(),
        "/fifo 10600 0:0 1 1700000000.0 device 0x0".to_owned(),
        "/folder 41777 0:0 2 1700000000.0 folder".to_owned(),
        "/folder/other 106755 70000:4000000000 2 1700000000.0 \"abc\"".to_owned(),
        "/link 120777 0:0 1 1700000000.0 \"/folder/../x\"".to_owned(),
        "/none 100644 0:0 1 1700000000.0 \"\"".to_owned(),
        "/null 20666 0:0 1 1700000000.0 device 0x103".to_owned(),
        "/owned 106755 70000:4000000000 2 1700000000.0 \"abc\"".to_owned(),
        format!("/{long} 100644 3000000000:7 1 1700000000.0 \"\""),
    ];
    expected.sort();
    assert_eq!(lines, expected);
}

#[test]
fn upper_layers_replace_and_delete() {
    let lower = Layer::new()
        .folder("d", 0o700)
        .file("d/kept", "1")
        .file("d/replaced", "1")
        .file("d/gone", "1")
        .folder("tree", 0o755)
        .file("tree/a/b/c", "1")
        .folder("becomes-file", 0o755)
        .file("becomes-file/x", "1")
        .file("becomes-folder", "1")
        .symlink("link-becomes-folder", "d");
    let upper = Layer::new()
        .folder("d", 0o711)
        .file("d/replaced", "2")
        .file("d/.wh.gone", "")
        .file("d/.wh.never-there", "")
        .file("no/such/.wh.folder", "")
        .file(".wh.tree", "")
        .file("becomes-file", "2")
        .folder("becomes-folder", 0o755)
        .file("becomes-folder/y", "2")
        .folder("link-becomes-folder", 0o755)
        .file("link-becomes-folder/z", "2")
        .file(".wh..wh.plnk", "aufs");
    let lines = Workspace::new().merged(vec![lower, upper]);
    assert_eq!(
        paths(&lines),
        [
            "/",
            "/becomes-file",
            "/becomes-folder",
            "/becomes-folder/y",
            "/d",
            "/d/kept",
            "/d/replaced",
            "/link-becomes-folder",
            "/link-becomes-folder/z"
        ]
    );
    assert!(line(&lines, "/d").starts_with("/d 40711 "));
    assert!(line(&lines, "/d/replaced").ends_with(" \"2\""));
    assert!(line(&lines, "/").starts_with("/ 40755 0:0 5 "));
}

#[test]
fn opaque_markers_hide_lower_layers_at_any_position() {
    let lower = || {
        Layer::new()
            .folder("d", 0o755)
            .file("d/old", "1")
            .file("d/both", "1")
            .file("d/sub/old", "1")
            .file("d/sub/both", "1")
            .file("d/other/old", "1")
    };
    let upper = |first: bool| {
        let mark = |layer: Layer, now| if now { layer.file("d/.wh..wh..opq", "") } else { layer };
        let layer = mark(Layer::new().folder("d", 0o755), first);
        mark(layer.file("d/both", "2").folder("d/sub", 0o755).file("d/sub/both", "2"), !first)
    };
    for first in [true, false] {
        let lines = Workspace::new().merged(vec![lower(), upper(first)]);
        assert_eq!(paths(&lines), ["/", "/d", "/d/both", "/d/sub", "/d/sub/both"], "{first}");
        assert!(line(&lines, "/d/both").ends_with(" \"2\""));
        assert!(line(&lines, "/d/sub/both").ends_with(" \"2\""));
    }
}

#[test]
fn many_opaque_markers_take_linear_time() {
    // If each marker visited all names, 40,000 times 40,000 visits would take minutes.
    const MANY: usize = 40_000;
    let files = (0..MANY).fold(Layer::new(), |layer, number| layer.file(&format!("d/{number}"), ""));
    let both = (0..MANY).fold(files, |layer, _| layer.file("d/.wh..wh..opq", ""));
    let workspace = Workspace::new();
    workspace.layout().write(vec![Layer::new().file("d/old", ""), both], Packing::Plain);
    let prepared = workspace.prepare("image").unwrap();
    assert_eq!(support::reader::list(&prepared.rootfs).len(), 2 + MANY);
}

#[test]
fn a_whiteout_does_not_hide_files_of_its_own_layer() {
    let lower = || Layer::new().file("x", "1").file("d/old", "1");
    let before = Layer::new().file(".wh.x", "").file("x", "2").file(".wh.d", "").file("d/new", "2");
    let after = Layer::new().file("x", "2").file(".wh.x", "").file("d/new", "2").file(".wh.d", "");
    for upper in [before, after] {
        let lines = Workspace::new().merged(vec![lower(), upper]);
        assert_eq!(paths(&lines), ["/", "/d", "/d/new", "/x"]);
        assert!(line(&lines, "/x").ends_with(" \"2\""));
    }
}

#[test]
fn hard_links_reach_into_lower_layers_and_outlive_their_first_name() {
    let lower = Layer::new().file("a", "content").hard_link("b", "a").file("c", "gone");
    let upper =
        Layer::new().hard_link("d/e", "/b").file(".wh.a", "").hard_link("b", "b").hard_link("c", "d/e");
    let lines = Workspace::new().merged(vec![lower, upper]);
    assert_eq!(paths(&lines), ["/", "/b", "/c", "/d", "/d/e"]);
    for path in ["/b", "/c", "/d/e"] {
        assert!(line(&lines, path).ends_with(" 3 1700000000.0 \"content\""), "{lines:#?}");
    }
}

#[test]
fn no_path_leads_out_of_the_root() {
    let layer = Layer::new()
        .file("../../a", "")
        .file("/b", "")
        .file("x/../../../c", "")
        .symlink("up", "../../../..")
        .file("up/d", "")
        .symlink("top", "/")
        .file("top/e", "")
        .symlink("far", "/var/../../lib")
        .file("far/f", "")
        .symlink("chain", "far")
        .file("chain/g", "")
        .hard_link("h", "../../../b");
    let lines = Workspace::new().merged(vec![layer]);
    assert_eq!(
        paths(&lines),
        [
            "/", "/a", "/b", "/c", "/chain", "/d", "/e", "/far", "/h", "/lib", "/lib/f", "/lib/g", "/top",
            "/up", "/var"
        ]
    );
}

#[test]
fn paths_follow_links_of_lower_layers() {
    // Distributions moved /bin to /usr/bin, but layers still have files in /bin.
    let lower = Layer::new().folder("usr/bin", 0o755).symlink("bin", "usr/bin").file("usr/bin/old", "");
    let upper = Layer::new().file("bin/new", "").file("bin/.wh.old", "");
    let lines = Workspace::new().merged(vec![lower, upper]);
    assert_eq!(paths(&lines), ["/", "/bin", "/usr", "/usr/bin", "/usr/bin/new"]);
}

#[test]
fn sparse_files_have_their_holes() {
    // The formats of GNU tar: the map in the header, in pax records (0.1), and before the data (1.0).
    let mut old = Layer::header(EntryType::GNUSparse, b"old", 0o644, 3);
    {
        let gnu = old.as_gnu_mut().unwrap();
        gnu.set_real_size(20_000);
        gnu.sparse[0].set_offset(5000);
        gnu.sparse[0].set_length(3);
        gnu.sparse[1].set_offset(20_000);
        gnu.sparse[1].set_length(0);
    }
    let map = format!("{:\0<512}xyz", "1\n5000\n3\n");
    let layer = Layer::new()
        .raw(old, b"xyz")
        .pax(&[("GNU.sparse.name", b"first"), ("GNU.sparse.size", b"20000"), ("GNU.sparse.map", b"5000,3")])
        .file("GNUSparseFile.0/first", "xyz")
        .pax(&[
            ("GNU.sparse.major", b"1"),
            ("GNU.sparse.minor", b"0"),
            ("GNU.sparse.name", b"second"),
            ("GNU.sparse.realsize", b"20000"),
        ])
        .file("GNUSparseFile.0/second", &map);
    let mut content = vec![0; 20_000];
    content[5000..5003].copy_from_slice(b"xyz");
    let digest = kindling_oci::Digest::of(&content).to_string();
    let lines = Workspace::new().merged(vec![layer]);
    assert_eq!(paths(&lines), ["/", "/first", "/old", "/second"]);
    for path in ["/first", "/old", "/second"] {
        assert!(line(&lines, path).ends_with(&digest), "{lines:#?}");
    }
}

#[test]
fn large_directories_and_long_links_have_separate_blocks() {
    let long = "d/".repeat(2047);
    let mut layer = Layer::new().pax(&[("linkpath", long.as_bytes())]).symlink("long", "short");
    for number in 0..1000 {
        layer = layer.file(&format!("many/file-with-a-rather-long-name-{number}"), &number.to_string());
    }
    let lines = Workspace::new().merged(vec![layer]);
    assert_eq!(lines.len(), 1003);
    assert!(line(&lines, "/many/file-with-a-rather-long-name-999").ends_with("\"999\""));
    assert!(line(&lines, "/long").ends_with(&format!("\"{long}\"")));
}

#[test]
fn an_image_without_layers_and_a_layer_without_files_are_empty() {
    assert_eq!(paths(&Workspace::new().merged(vec![])), ["/"]);
    assert_eq!(paths(&Workspace::new().merged(vec![Layer::new(), Layer::new()])), ["/"]);
}

#[test]
fn data_of_deleted_files_takes_no_disk_space() {
    use std::os::unix::fs::MetadataExt;
    let large = "x".repeat(8 << 20);
    let workspace = Workspace::new();
    let layers = vec![Layer::new().file("large", &large), Layer::new().file(".wh.large", "")];
    workspace.layout().write(layers, Packing::Plain);
    let prepared = workspace.prepare("image").unwrap();
    let blocks = std::fs::metadata(&prepared.rootfs).unwrap().blocks();
    assert!(blocks * 512 < 1 << 20, "{blocks} blocks of 512 bytes");
}

#[test]
fn the_compression_of_a_layer_makes_no_difference() {
    let layers = || {
        vec![
            Layer::new().file("a", &"text ".repeat(100_000)).bytes(),
            Layer::new().file(".wh.a", "").file("b", &"more ".repeat(50_000)).bytes(),
        ]
    };
    let images = [Packing::Plain, Packing::Gzip, Packing::Zstd].map(|packing| {
        let workspace = Workspace::new();
        workspace.layout().write_bytes(&layers(), packing);
        let prepared = workspace.prepare("image").unwrap();
        support::check(&prepared.rootfs);
        (prepared.digest, std::fs::read(&prepared.rootfs).unwrap())
    });
    assert!(images[0] == images[1] && images[1] == images[2]);
}

#[test]
fn internal_files_of_aufs_are_removed_except_for_hard_links() {
    let layer = Layer::new()
        .folder(".wh..wh.plnk", 0o700)
        .folder(".wh..wh.orph", 0o700)
        .file(".wh..wh.aufs", "")
        .file(".wh..wh.plnk/103.1234", "tool")
        .file(".wh..wh.plnk/unused", &"x".repeat(10_000))
        .folder(".wh..wh.plnk/folder", 0o700)
        .hard_link(".wh..wh.plnk/link", "bin/one")
        .hard_link("bin/one", ".wh..wh.plnk/103.1234")
        .hard_link("bin/two", "/.wh..wh.plnk/103.1234")
        .file(".wh..wh.orph/x", "x")
        .file("a/.wh..wh.plnk", "")
        .file("a/.wh..wh.plnk/y", "y")
        .file("a/x", "x");
    let lines = Workspace::new().merged(vec![layer]);
    assert_eq!(paths(&lines), ["/", "/a", "/a/x", "/bin", "/bin/one", "/bin/two"]);
    for path in ["/bin/one", "/bin/two"] {
        assert!(line(&lines, path).ends_with(" 2 1700000000.0 \"tool\""), "{lines:#?}");
    }
}

#[test]
fn pseudo_links_of_aufs_belong_to_one_layer() {
    let lower = Layer::new().file(".wh..wh.plnk/1", "tool").bytes();
    let upper = Layer::new().hard_link("tool", ".wh..wh.plnk/1").bytes();
    assert_eq!(
        Workspace::refused(&[lower, upper]),
        "layer 2 of 2: tool: a hard link to .wh..wh.plnk/1, which is not a file of the image"
    );
}

#[test]
fn whiteouts_need_a_name_and_have_no_files_below_them() {
    let refused = |layer: Layer| Workspace::refused(&[layer.bytes()]).replace("layer 1 of 1: ", "");
    for name in ["a/.wh.", "a/.wh..", "a/.wh..."] {
        assert_eq!(refused(Layer::new().file(name, "")), format!("{name}: a whiteout without a file name"));
    }
    let below = "a component of the path is a whiteout, which only hides a file of lower layers";
    for layer in
        [Layer::new().file(".wh.a/b", ""), Layer::new().folder(".wh.a", 0o755).folder(".wh.a/b/c", 0o755)]
    {
        assert!(refused(layer).ends_with(below));
    }
}
