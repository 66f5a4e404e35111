//! Knowledge flows one way: between packages, and between the files of each. This reads their `use` lines.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Circles that are left, by the package and the files in each. The list only gets shorter.
const LEFT: &[(&str, &[&str])] = &[
    ("oci", &["extensions", "sparse", "tarball"]),
    ("oci", &["convert", "error", "layer", "prepared", "source"]),
    ("oci", &["source::layout", "source::registry"]),
];

/// Modules of a package and those that each uses, all by their paths from the package's root.
type Graph = BTreeMap<String, BTreeSet<String>>;

/// All files below a folder, with the paths of their modules. Tests may use what they test.
fn modules(folder: &Path, path: &str, found: &mut Vec<(String, PathBuf)>) {
    for entry in fs::read_dir(folder).expect("no folder") {
        let file = entry.expect("no entry").path();
        let name = file.file_stem().expect("no name").to_string_lossy().into_owned();
        let below = |name: &str| if path.is_empty() { name.to_owned() } else { format!("{path}::{name}") };
        if file.is_dir() {
            if !["tests", "bin"].contains(&&*name) {
                modules(&file, &below(&name), found);
            }
        } else if file.extension().is_some_and(|extension| extension == "rs") {
            match &*name {
                "tests" => {}
                "lib" | "main" | "mod" => found.push((path.to_owned(), file)),
                _ => found.push((below(&name), file)),
            }
        }
    }
}

/// The paths that a tree of a `use` line names: `a::{b, c::d}` are `a::b` and `a::c::d`.
fn expand(tree: &str) -> Vec<String> {
    let tree = tree.trim();
    let Some((before, rest)) = tree.split_once('{') else {
        return vec![tree.split(" as ").next().unwrap_or_default().to_owned()];
    };
    let inner = rest.strip_suffix('}').expect("a tree without an end");
    let (mut parts, mut depth, mut part) = (Vec::new(), 0, String::new());
    for character in inner.chars() {
        match character {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if character == ',' && depth == 0 {
            parts.push(std::mem::take(&mut part));
        } else {
            part.push(character);
        }
    }
    parts.push(part);
    let parts = parts.iter().filter(|part| !part.trim().is_empty()).flat_map(|part| expand(part));
    parts
        .map(|part| {
            if part == "self" { before.trim_end_matches("::").to_owned() } else { format!("{before}{part}") }
        })
        .collect()
}

/// The paths that a file names, from the package's root on.
fn named(text: &str, module: &str) -> Vec<String> {
    let code = text.split("#[cfg(test)]\nmod").next().unwrap_or_default();
    let lines: Vec<_> = code.lines().map(str::trim).filter(|line| !line.starts_with("//")).collect();
    let mut paths = Vec::new();
    let mut rest = lines.iter();
    while let Some(line) = rest.next() {
        let Some(start) = ["use ", "pub use ", "pub(crate) use ", "pub(super) use "]
            .iter()
            .find_map(|words| line.strip_prefix(words))
        else {
            continue;
        };
        let mut tree = start.to_owned();
        while !tree.ends_with(';') {
            tree += rest.next().expect("a use line without an end");
        }
        paths.extend(expand(tree.trim_end_matches(';')));
    }
    let code = lines.join("\n");
    // Paths in the code itself.
    paths.extend(code.match_indices("crate::").map(|(at, _)| {
        let rest = &code[at..];
        let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_' && c != ':').unwrap_or(rest.len());
        rest[..end].trim_end_matches(':').to_owned()
    }));
    let from_root = |path: String| {
        if let Some(path) = path.strip_prefix("crate::") {
            return Some(path.to_owned());
        }
        let (mut base, mut rest) = (module, path.strip_prefix("super::")?);
        loop {
            base = base.rsplit_once("::").map_or("", |(base, _)| base);
            match rest.strip_prefix("super::") {
                Some(further) => rest = further,
                None => {
                    return Some(if base.is_empty() { rest.to_owned() } else { format!("{base}::{rest}") });
                }
            }
        }
    };
    paths.into_iter().filter_map(from_root).collect()
}

fn graph(package: &str) -> Graph {
    let mut files = Vec::new();
    modules(&root().join(package).join("src"), "", &mut files);
    let names: BTreeSet<String> = files.iter().map(|(name, _)| name.clone()).collect();
    let module_of = |mut path: &str| loop {
        if names.contains(path) {
            return Some(path.to_owned());
        }
        path = path.rsplit_once("::")?.0;
    };
    let mut graph = Graph::new();
    for (module, file) in &files {
        let text = fs::read_to_string(file).expect("cannot read");
        let used = named(&text, module).iter().filter_map(|path| module_of(path)).collect::<BTreeSet<_>>();
        // A module that has others inside gives their names on; it does not need them.
        let inside = format!("{module}::");
        let used = used.into_iter().filter(|other| other != module && !other.starts_with(&inside));
        graph.entry(module.clone()).or_default().extend(used.filter(|other| !other.is_empty()));
    }
    graph
}

/// Whether there is a way from one module to another.
fn leads(graph: &Graph, from: &str, to: &str) -> bool {
    let (mut seen, mut next) = (BTreeSet::new(), vec![from]);
    while let Some(module) = next.pop() {
        for other in graph.get(module).into_iter().flatten() {
            if other == to {
                return true;
            }
            if seen.insert(other.as_str()) {
                next.push(other);
            }
        }
    }
    false
}

/// Modules that lead to themselves, in groups that lead to one another.
fn circles(graph: &Graph) -> BTreeSet<Vec<String>> {
    let in_circle = graph.keys().filter(|module| leads(graph, module, module));
    let group = |module: &String| -> Vec<String> {
        let others = graph.keys().filter(|other| leads(graph, module, other) && leads(graph, other, module));
        others.cloned().collect()
    };
    in_circle.map(group).collect()
}

#[test]
fn trees_of_use_lines_are_understood() {
    assert_eq!(expand("a::b as c"), ["a::b"]);
    assert_eq!(expand("a::{self, b, c::{d, e as f}}"), ["a", "a::b", "a::c::d", "a::c::e"]);
    let text = "use super::x::Y;\nuse crate::{a,\n b::C};\nfn f() { crate::d::e() }\n// crate::no\n#[cfg(test)]\nmod tests { use crate::t; }";
    assert_eq!(named(text, "m::n"), ["m::x::Y", "a", "b::C", "d::e"]);
    let graph: Graph = [("a", "b"), ("b", "a"), ("c", "a")]
        .map(|(from, to)| (from.to_owned(), BTreeSet::from([to.to_owned()])))
        .into();
    assert_eq!(circles(&graph), BTreeSet::from([vec!["a".to_owned(), "b".to_owned()]]));
}

#[test]
fn no_file_leads_back_to_itself() {
    for package in [
        "vmm",
        "vmm/trusted-path",
        "runtime",
        "cli",
        "fs",
        "oci",
        "guest-init",
        "guest-init/protocol",
        "guest-init/copy",
    ] {
        let found = circles(&graph(package));
        let left = LEFT.iter().filter(|(name, _)| *name == package);
        let left: BTreeSet<Vec<String>> =
            left.map(|(_, circle)| circle.iter().map(|&module| module.to_owned()).collect()).collect();
        assert_eq!(found, left, "circles in {package}; those that are left stand in this test's list");
    }
}

/// Lines of a file without its tests.
const LINES_MAX: usize = 500;

#[test]
fn no_file_is_longer_than_a_room() {
    for package in [
        "vmm",
        "vmm/trusted-path",
        "runtime",
        "cli",
        "fs",
        "oci",
        "guest-init",
        "guest-init/protocol",
        "guest-init/copy",
        "guest-kernel-config",
        "xtask",
    ] {
        let mut files = Vec::new();
        modules(&root().join(package).join("src"), "", &mut files);
        for (_, file) in files {
            let text = fs::read_to_string(&file).expect("cannot read");
            let lines = text.split("#[cfg(test)]\nmod").next().unwrap_or_default().lines().count();
            assert!(
                lines <= LINES_MAX,
                "{} has {lines} lines; past {LINES_MAX} it is two files",
                file.display()
            );
        }
    }
}

#[test]
fn no_package_uses_one_above_it() {
    for (package, forbidden) in [
        ("vmm", &["kindling.workspace", "kindling-cli", "kindling-oci", "kindling-fs", "clap"][..]),
        ("runtime", &["kindling-cli", "clap"]),
        // The command has no door that a program with the library has not.
        ("cli", &["kindling-vmm", "guest-protocol", "guest-copy"]),
        ("guest-init/protocol", &["kindling"]),
    ] {
        let manifest = fs::read_to_string(root().join(package).join("Cargo.toml")).expect("no manifest");
        let dependencies = manifest.split("[dependencies]").nth(1).expect("no dependencies");
        for name in forbidden {
            let uses = dependencies.lines().any(|line| line.starts_with(name));
            assert!(!uses, "{package} uses {name}");
        }
    }
}
