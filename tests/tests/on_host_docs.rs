//! What the documents name exists.

use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().into()
}

fn documents() -> Vec<(String, String)> {
    let mut files = vec![root().join("README.md")];
    files.extend(std::fs::read_dir(root().join("docs")).unwrap().map(|entry| entry.unwrap().path()));
    files.retain(|path| path.extension().is_some_and(|extension| extension == "md"));
    files
        .into_iter()
        .map(|path| (path.display().to_string(), std::fs::read_to_string(path).unwrap()))
        .collect()
}

/// The pieces of a text between single backticks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split("```").step_by(2).flat_map(|prose| prose.split('`').skip(1).step_by(2))
}

#[test]
fn every_path_exists() {
    let folders = [
        "vmm/",
        "guest-init/",
        "guest-kernel-config/",
        "oci/src/",
        "oci/tests/",
        "fs/src/",
        "fs/tests/",
        "xtask/",
        "tests/",
        "docs/",
        ".ci/",
        ".cargo/",
    ];
    for (name, text) in documents() {
        for path in quoted(&text).filter(|path| folders.iter().any(|folder| path.starts_with(folder))) {
            assert!(root().join(path).exists(), "{name} names {path}, which does not exist");
        }
    }
}

#[test]
fn every_command_is_one() {
    for (name, text) in documents() {
        let fenced = text.split("```").skip(1).step_by(2).flat_map(str::lines);
        for line in quoted(&text).chain(fenced) {
            if let Some(words) = line.trim().strip_prefix("cargo xtask ") {
                let command = words.split_whitespace().next().unwrap_or_default();
                let module = command.replace('-', "_");
                let file = format!("xtask/src/{module}.rs");
                let folder = format!("xtask/src/{module}/mod.rs");
                let exists = root().join(&file).exists() || root().join(&folder).exists();
                assert!(exists, "{name} names `cargo xtask {command}`, which is no command");
            }
            // More than one space is a column of a table, in which a monitor of that name has a row.
            if let Some(words) = line.trim().strip_prefix("kindling ").filter(|words| !words.starts_with(' '))
            {
                let command = words.split_whitespace().next().unwrap_or_default();
                let help =
                    Command::new(tests::testbed("kindling")).args([command, "--help"]).output().unwrap();
                assert!(help.status.success(), "{name} names `kindling {command}`, which is no command");
                for option in words
                    .split_whitespace()
                    .take_while(|word| *word != "--")
                    .filter(|word| word.starts_with("--"))
                {
                    let option = option.trim_matches(|c: char| !c.is_ascii_alphanumeric() && c != '-');
                    let known = String::from_utf8_lossy(&help.stdout).contains(option);
                    assert!(known, "{name} names {option} of `kindling {command}`, which has no such option");
                }
            }
        }
    }
}
