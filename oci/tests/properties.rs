//! Random trees: `fsck.erofs` accepts them, and they agree with a simple model.

mod support;

use proptest::prelude::*;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::{Command, Stdio};
use support::reader::list;
use support::{Layer, Packing, Workspace};
use tar::{Builder, EntryType};

#[derive(Clone, Debug)]
enum Step {
    File(String, String),
    Folder(String, u32),
    Whiteout(String, String),
    Opaque(String),
}

fn path() -> impl Strategy<Value = String> {
    prop::collection::vec(prop::sample::select(&["a", "b", "c"][..]), 1..4).prop_map(|names| names.join("/"))
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (path(), "[a-z]{0,9}").prop_map(|(path, content)| Step::File(format!("{path}/file"), content)),
        // A file at the path of a directory in other layers.
        1 => (path(), "[a-z]{0,9}").prop_map(|(path, content)| Step::File(path, content)),
        2 => (path(), 0_u32..0o10000).prop_map(|(path, mode)| Step::Folder(path, mode)),
        1 => (path(), prop::sample::select(&["a", "b", "file"][..]))
            .prop_map(|(folder, name)| Step::Whiteout(folder, name.to_owned())),
        1 => path().prop_map(Step::Opaque),
    ]
}

/// The type of each path, and the last layer that set it.
type Model = BTreeMap<String, (String, usize)>;

/// Creates the parent directories of a path, or returns none if one of them is a file.
fn make_way(model: &mut Model, path: &str, layer: usize) -> Option<()> {
    for (end, _) in path.match_indices('/') {
        let entry = model.entry(path[..end].to_owned()).or_insert(("folder 40755".to_owned(), layer));
        entry.1 = layer;
        if !entry.0.starts_with("folder") {
            return None;
        }
    }
    Some(())
}

fn hide(model: &mut Model, path: &str, itself: bool, layer: usize) {
    let below = format!("{path}/");
    model.retain(|name, (_, said)| *said == layer || !(name.starts_with(&below) || (itself && name == path)));
}

fn apply(model: &mut Model, step: &Step, layer: usize) -> Option<()> {
    match step {
        Step::File(path, content) => {
            make_way(model, path, layer)?;
            let below = format!("{path}/");
            model.retain(|name, _| !name.starts_with(&below));
            model.insert(path.clone(), (format!("file {content:?}"), layer));
        }
        Step::Folder(path, mode) => {
            make_way(model, path, layer)?;
            model.insert(path.clone(), (format!("folder {:o}", 0o40000 | mode), layer));
        }
        Step::Whiteout(folder, name) => hide(model, &format!("{folder}/{name}"), true, layer),
        Step::Opaque(folder) => hide(model, folder, false, layer),
    }
    Some(())
}

fn archive(steps: &[Step]) -> Layer {
    steps.iter().fold(Layer::new(), |layer, step| match step {
        Step::File(path, content) => layer.file(path, content),
        Step::Folder(path, mode) => layer.folder(path, *mode),
        Step::Whiteout(folder, name) => layer.file(&format!("{folder}/.wh.{name}"), ""),
        Step::Opaque(folder) => layer.file(&format!("{folder}/.wh..wh..opq"), ""),
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn merged_layers_agree_with_a_model(
        layers in prop::collection::vec(prop::collection::vec(step(), 0..12), 1..4)
    ) {
        let mut model = Model::new();
        let outcome = (1..).zip(&layers).try_for_each(|(number, steps)| {
            steps.iter().try_for_each(|step| apply(&mut model, step, number))
        });
        let workspace = Workspace::new();
        workspace.layout().write(layers.iter().map(|steps| archive(steps)).collect(), Packing::Plain);
        if outcome.is_none() {
            let (line, is_user_error) = workspace.error("image");
            prop_assert!(is_user_error && line.ends_with("a component of the path is not a directory"), "{}", line);
            return Ok(());
        }
        let prepared = workspace.prepare("image").unwrap();
        support::check(&prepared.rootfs);
        let found: Vec<_> = list(&prepared.rootfs)
            .iter()
            .filter(|line| !line.starts_with("/ "))
            .map(|line| {
                let words: Vec<_> = line.split(' ').collect();
                let what = if words[5] == "folder" {
                    format!("folder {}", words[1])
                } else {
                    format!("file {}", words[5])
                };
                (words[0][1..].to_owned(), what)
            })
            .collect();
        let mut expected: Vec<_> = model.into_iter().map(|(path, (what, _))| (path, what)).collect();
        expected.sort_by_key(|(path, what)| format!("/{path} {what}"));
        let mut found = found;
        found.sort_by_key(|(path, what)| format!("/{path} {what}"));
        prop_assert_eq!(found, expected);
    }

    #[test]
    fn trees_of_any_shape_are_valid_filesystems(
        files in prop::collection::vec(("[!-.0-~]{1,100}", 0_usize..20_000, any::<bool>()), 0..200),
        target in "[a-z/]{1,4000}",
        value in prop::collection::vec(any::<u8>(), 0..5000),
    ) {
        let mut layer = Layer::new();
        for (name, size, nested) in &files {
            let name = if *nested { format!("d/{name}") } else { name.clone() };
            // Whiteouts have other tests.
            if !name.trim_start_matches("d/").starts_with('.') && name != "d" && name != "0" {
                layer = layer.pax(&[("path", name.as_bytes())]).file("x", &"x".repeat(*size));
            }
        }
        layer = layer
            .pax(&[("path", b"0/link"), ("linkpath", target.as_bytes()), ("SCHILY.xattr.trusted.a", &value)])
            .symlink("x", "y")
            .pax(&[("SCHILY.xattr.user.a", &value)])
            .folder("0/folder", 0o700);
        let lines = Workspace::new().merged(vec![layer]);
        let shown = format!("trusted.a=\"{}\"", value.escape_ascii());
        prop_assert!(support::reader::line(&lines, "/0/link").ends_with(&shown));
    }

    #[test]
    fn archives_with_changed_bytes_are_handled(at in 0_usize..6000, bytes in prop::collection::vec(any::<u8>(), 1..30)) {
        let mut sparse = Layer::header(EntryType::GNUSparse, b"sparse", 0o644, 3);
        sparse.as_gnu_mut().unwrap().set_real_size(3);
        sparse.as_gnu_mut().unwrap().sparse[0].set_offset(0);
        sparse.as_gnu_mut().unwrap().sparse[0].set_length(3);
        let mut layer = Layer::new()
            .raw(sparse, b"xyz")
            .pax(&[("path", b"long"), ("SCHILY.xattr.user.a", b"b"), ("mtime", b"1.5")])
            .file("short", &"content".repeat(100))
            .symlink("link", "long")
            .hard_link("hard", "long")
            .bytes();
        let end = layer.len().min(at + bytes.len());
        let at = at.min(end);
        layer[at..end].copy_from_slice(&bytes[..end - at]);
        // The checksums are corrected, so that the headers are accepted.
        for header in layer.chunks_exact_mut(512).filter(|block| block[257..262] == *b"ustar") {
            header[148..156].fill(b' ');
            let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
            header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
        let workspace = Workspace::new();
        workspace.layout().write_bytes(&[layer], Packing::Plain);
        match workspace.prepare("image") {
            Ok(prepared) => support::check(&prepared.rootfs),
            Err(error) => prop_assert!(error.is_user_error(), "{:?}", error),
        }
    }
}

/// The lines without the attributes that a tar archive does not keep.
fn without_times(lines: &[String]) -> Vec<String> {
    let words = |line: &String| {
        line.split(' ')
            .enumerate()
            .filter(|(at, _)| *at != 4)
            .map(|(_, word)| word.to_owned())
            .collect::<Vec<_>>()
    };
    lines.iter().map(|line| words(line).join(" ")).collect()
}

#[test]
fn a_tree_agrees_with_mkfs_erofs() {
    let workspace = Workspace::new();
    let tree = workspace.path("tree");
    fs::create_dir_all(tree.join("a/b")).unwrap();
    fs::create_dir(tree.join("many")).unwrap();
    for number in 0..1000 {
        fs::write(tree.join(format!("many/{number}")), number.to_string().repeat(number)).unwrap();
    }
    for (name, mode) in [("executable", 0o755), ("setuid", 0o4711), ("secret", 0o600), ("-first", 0o644)] {
        fs::write(tree.join(name), name).unwrap();
        fs::set_permissions(tree.join(name), fs::Permissions::from_mode(mode)).unwrap();
    }
    symlink("a/b", tree.join("link")).unwrap();
    symlink("x".repeat(3000), tree.join("long")).unwrap();
    let mut layer = Builder::new(Vec::new());
    layer.follow_symlinks(false);
    layer.append_dir_all(".", &tree).unwrap();
    workspace.layout().write_bytes(&[layer.into_inner().unwrap()], Packing::Gzip);
    let prepared = workspace.prepare("image").unwrap();
    support::check(&prepared.rootfs);
    let other = workspace.path("mkfs.erofs");
    let mut mkfs = Command::new("mkfs.erofs");
    let output =
        mkfs.args(["-E", "noinline_data"]).arg(&other).arg(&tree).stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let (found, expected) = (list(&prepared.rootfs), list(&other));
    assert_eq!(found.len(), 1010);
    assert_eq!(without_times(&found), without_times(&expected));
}
