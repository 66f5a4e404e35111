//! Dependencies are from crates.io and have compatible licenses, and their number is limited.

use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

/// Licenses that require no more than a notice.
const LICENSES: [&str; 10] = [
    "MIT",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "ISC",
    "Zlib",
    "Unicode-3.0",
    "bzip2-1.0.6",
    // The certificates of webpki-roots, which are data.
    "CDLA-Permissive-2.0",
];

/// Maximum number of packages in each program, including its own. Raising it is a decision for review.
const PACKAGES_MAX: [(&str, usize); 4] =
    [("kindling-vmm", 46), ("kindling", 49), ("kindling-fs", 35), ("kindling-oci", 77)];

/// Crates of which the monitor contains two versions, because its dependencies require different ones.
const TWICE: [&str; 3] = ["bitflags", "embedded-io", "syn"];

fn metadata() -> Value {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.toml");
    let output = Command::new("cargo")
        .args(["metadata", "--locked", "--offline", "--format-version", "1"])
        .args(["--filter-platform", "x86_64-unknown-linux-gnu", "--manifest-path"])
        .arg(manifest)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn text<'a>(value: &'a Value, name: &str) -> &'a str {
    value[name].as_str().unwrap_or_default()
}

/// Whether an SPDX expression can be satisfied with accepted licenses: one side of each OR, both sides of each AND.
fn is_accepted(expression: &str) -> bool {
    let is_known = |license: &str| LICENSES.contains(&license.trim());
    expression
        .split(" AND ")
        .all(|part| part.trim_matches(['(', ')']).replace('/', " OR ").split(" OR ").any(is_known))
}

#[test]
fn licenses_and_sources_are_accepted() {
    let metadata = metadata();
    let mut wrong = Vec::new();
    for package in metadata["packages"].as_array().unwrap() {
        let (name, license) = (text(package, "name"), text(package, "license"));
        if !is_accepted(license) {
            wrong.push(format!("{name}: license {license:?}"));
        }
        let source = text(package, "source");
        if !source.is_empty() && source != "registry+https://github.com/rust-lang/crates.io-index" {
            wrong.push(format!("{name}: from {source}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(!is_accepted("GPL-3.0-only") && !is_accepted("MIT AND GPL-2.0-only") && !is_accepted(""));
    assert!(is_accepted("(MIT OR GPL-3.0) AND Unicode-3.0"));
}

#[test]
fn programs_have_few_dependencies() {
    let metadata = metadata();
    let list = |value: &Value| value.as_array().unwrap().clone();
    let names: BTreeMap<String, String> = list(&metadata["packages"])
        .iter()
        .map(|package| (text(package, "id").to_owned(), text(package, "name").to_owned()))
        .collect();
    let nodes: BTreeMap<String, Value> = list(&metadata["resolve"]["nodes"])
        .into_iter()
        .map(|node| (text(&node, "id").to_owned(), node))
        .collect();
    for (program, max) in PACKAGES_MAX {
        let root = names.iter().find(|(_, name)| *name == program).unwrap().0;
        let (mut tree, mut waiting) = (BTreeSet::new(), vec![root.clone()]);
        while let Some(id) = waiting.pop() {
            if !tree.insert(id.clone()) {
                continue;
            }
            for dependency in list(&nodes[&id]["deps"]) {
                // Dependencies of tests and build scripts are not part of the program.
                if list(&dependency["dep_kinds"]).iter().any(|kind| kind["kind"].is_null()) {
                    waiting.push(text(&dependency, "pkg").to_owned());
                }
            }
        }
        assert!(tree.len() <= max, "{program} has {} packages", tree.len());
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        tree.iter().for_each(|id| *counts.entry(&names[id]).or_default() += 1);
        let twice: Vec<_> =
            counts.into_iter().filter(|(_, count)| *count > 1).map(|(name, _)| name).collect();
        let is_monitor = program == "kindling-vmm";
        assert!(!is_monitor || twice == TWICE, "{twice:?}");
    }
}
