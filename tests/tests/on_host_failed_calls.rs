//! Fault injection: a conversion whose system calls fail, one in each run, reports an error or succeeds without the call,
//! and leaves no partial image.

use serde_json::json;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use tests::faults::each_call_fails;
use tests::{run, testbed};

/// Creates the archive of an image with one layer, as `docker save` does.
fn archive(scratch: &Path) -> PathBuf {
    let write = |name: &str, bytes: &[u8]| fs::write(scratch.join(name), bytes).unwrap();
    let tar = |arguments: &[&str]| {
        run(Command::new("tar").current_dir(scratch).args(arguments)).expect_status(0);
    };
    fs::create_dir(scratch.join("bin")).unwrap();
    write("bin/a", &[7; 10_000]);
    tar(&["-cf", "layer.tar", "bin"]);
    let digest = kindling_vmm::config::image::sha256(&fs::read(scratch.join("layer.tar")).unwrap());
    let config = json!({
        "os": "linux",
        "architecture": "amd64",
        "config": { "Cmd": ["a"] },
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{digest}")] },
    });
    write("config.json", config.to_string().as_bytes());
    let manifest = json!([{ "Config": "config.json", "RepoTags": ["a:b"], "Layers": ["layer.tar"] }]);
    write("manifest.json", manifest.to_string().as_bytes());
    tar(&["-cf", "image.tar", "manifest.json", "config.json", "layer.tar"]);
    scratch.join("image.tar")
}

/// All files below a directory, with their contents.
fn files(directory: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(directory).into_iter().flatten().map(Result::unwrap) {
        match entry.file_type().unwrap().is_dir() {
            true => all.extend(files(&entry.path())),
            false => drop(all.insert(entry.path(), fs::read(entry.path()).unwrap())),
        }
    }
    all
}

#[test]
fn a_conversion_whose_system_calls_fail_says_so_and_leaves_nothing() {
    let scratch = tempfile::tempdir().unwrap();
    let image = archive(scratch.path());
    let cache = scratch.path().join("cache");
    let command = || {
        let _ = fs::remove_dir_all(&cache);
        fs::create_dir(&cache).unwrap();
        let mut command = Command::new(testbed("kindling-oci"));
        command.arg("prepare").arg("--cache").args([&cache, &image]).stdin(Stdio::null());
        command
    };
    let mut whole = None;
    each_call_fails(command, |_| {
        let files = files(&cache);
        let whole = whole.get_or_insert_with(|| files.clone());
        // The name of an image may be missing, if it could not be added; `kindling image ls` lists the image without it.
        let is_right = |(path, bytes): (&PathBuf, &Vec<u8>)| {
            whole.get(path) == Some(bytes) || path.ends_with("names") && bytes.is_empty()
        };
        let left: Vec<_> = files.iter().filter(|entry| !is_right(*entry)).map(|(path, _)| path).collect();
        (!left.is_empty()).then(|| format!("left, or with other bytes: {left:?}"))
    });
}
