//! Dependencies are acyclic, between packages and between the modules of each. The tests parse `use` lines. They
//! also check the length of files, and that no program on the host mounts anything.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Known cycles, by package and modules. The list must only get shorter.
const KNOWN_CYCLES: &[(&str, &[&str])] = &[];

/// The modules of a package and the modules that each uses, by their paths from the crate root.
type Graph = BTreeMap<String, BTreeSet<String>>;

/// All source files below a folder, with their module paths. Test modules are exempt.
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

/// Expands a `use` tree: `a::{b, c::d}` becomes `a::b` and `a::c::d`.
fn expand(tree: &str) -> Vec<String> {
    let tree = tree.trim();
    let Some((before, rest)) = tree.split_once('{') else {
        return vec![tree.split(" as ").next().unwrap_or_default().to_owned()];
    };
    let inner = rest.strip_suffix('}').expect("an unterminated use tree");
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

/// The lines of a file without comments and unit tests.
fn code_lines(text: &str) -> Vec<&str> {
    let code = text.split("#[cfg(test)]\nmod").next().unwrap_or_default();
    code.lines().map(str::trim).filter(|line| !line.starts_with("//")).collect()
}

/// The paths of the `use` items among lines of code.
fn imports(lines: &[&str]) -> Vec<String> {
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
            tree += rest.next().expect("an unterminated use line");
        }
        paths.extend(expand(tree.trim_end_matches(';')));
    }
    paths
}

/// The paths that a file uses, from the crate root.
fn named(text: &str, module: &str) -> Vec<String> {
    let lines = code_lines(text);
    let mut paths = imports(&lines);
    let code = lines.join("\n");
    // Paths outside of `use` lines.
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
        // A module re-exports its submodules; that is not a dependency.
        let inside = format!("{module}::");
        let used = used.into_iter().filter(|other| other != module && !other.starts_with(&inside));
        graph.entry(module.clone()).or_default().extend(used.filter(|other| !other.is_empty()));
    }
    graph
}

/// Whether one module depends on another, directly or indirectly.
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

/// The cycles: groups of modules that depend on each other.
fn cycles(graph: &Graph) -> BTreeSet<Vec<String>> {
    let in_cycle = graph.keys().filter(|module| leads(graph, module, module));
    let group = |module: &String| -> Vec<String> {
        let others = graph.keys().filter(|other| leads(graph, module, other) && leads(graph, other, module));
        others.cloned().collect()
    };
    in_cycle.map(group).collect()
}

#[test]
fn use_lines_are_parsed() {
    assert_eq!(expand("a::b as c"), ["a::b"]);
    assert_eq!(expand("a::{self, b, c::{d, e as f}}"), ["a", "a::b", "a::c::d", "a::c::e"]);
    let text = "use super::x::Y;\nuse crate::{a,\n b::C};\nfn f() { crate::d::e() }\n// crate::no\n#[cfg(test)]\nmod tests { use crate::t; }";
    assert_eq!(named(text, "m::n"), ["m::x::Y", "a", "b::C", "d::e"]);
    let graph: Graph = [("a", "b"), ("b", "a"), ("c", "a")]
        .map(|(from, to)| (from.to_owned(), BTreeSet::from([to.to_owned()])))
        .into();
    assert_eq!(cycles(&graph), BTreeSet::from([vec!["a".to_owned(), "b".to_owned()]]));
}

#[test]
fn no_module_depends_on_itself() {
    for package in [
        "vmm",
        "vmm/trusted-path",
        "runtime",
        "cli",
        "fs",
        "oci",
        "oci/protocol",
        "jailer",
        "guest-init",
        "guest-init/protocol",
        "guest-init/copy",
    ] {
        let found = cycles(&graph(package));
        let known = KNOWN_CYCLES.iter().filter(|(name, _)| *name == package);
        let known: BTreeSet<Vec<String>> =
            known.map(|(_, cycle)| cycle.iter().map(|&module| module.to_owned()).collect()).collect();
        assert_eq!(found, known, "cycles in {package}; KNOWN_CYCLES lists the accepted ones");
    }
}

#[test]
fn the_configuration_knows_nothing_of_what_it_configures() {
    let known = ["config", "layout"];
    for (module, used) in graph("vmm").iter().filter(|(module, _)| module.starts_with("config")) {
        for other in used {
            let layer = other.split("::").next().unwrap_or_default();
            assert!(known.contains(&layer), "{module} uses {other}");
        }
    }
}

/// The maximum number of lines of a file, without its unit tests.
const LINES_MAX: usize = 500;

#[test]
fn no_file_exceeds_the_maximum_length() {
    for package in [
        "vmm",
        "vmm/trusted-path",
        "runtime",
        "cli",
        "fs",
        "oci",
        "oci/protocol",
        "jailer",
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
                "{} has {lines} lines; split it, the maximum is {LINES_MAX}",
                file.display()
            );
        }
    }
}

/// A path that is mounted or unmounted could lead elsewhere: a guest or another user may have replaced a part of it.
#[test]
fn no_program_on_the_host_mounts_anything() {
    /// Names of system calls, functions and programs that mount or unmount.
    const NAMES: &[&str] = &[
        "SYS_mount",
        "SYS_umount",
        "SYS_move_mount",
        "SYS_pivot_root",
        "libc::mount",
        "libc::umount",
        "rustix::mount",
        "Command::new(\"mount\")",
        "Command::new(\"umount\")",
        "fusermount",
    ];
    for package in ["vmm", "vmm/trusted-path", "runtime", "cli", "fs", "oci"] {
        let manifest = fs::read_to_string(root().join(package).join("Cargo.toml")).expect("no manifest");
        assert!(!manifest.contains("\"mount\""), "{package} has rustix's functions for mounts");
        let mut files = Vec::new();
        modules(&root().join(package).join("src"), "", &mut files);
        for (_, file) in files {
            let text = fs::read_to_string(&file).expect("cannot read");
            let name = NAMES.iter().find(|name| text.contains(**name));
            assert_eq!(name, None, "{}", file.display());
        }
    }
}

#[test]
fn no_package_depends_on_a_higher_layer() {
    for (package, forbidden) in [
        ("vmm", &["kindling.workspace", "kindling-cli", "kindling-oci", "kindling-fs", "clap"][..]),
        ("runtime", &["kindling-cli", "clap"]),
        // The command uses only the public library, like any other program.
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

/// What starts and serves a guest is in the library `kindling`, so that other programs have it too. Only the commands about
/// machines and hosts use the monitor's library.
#[test]
fn the_command_uses_the_monitor_only_for_machines_and_hosts() {
    // `devices` has the options of `boot` and `preboot`.
    const ALLOWED: &[&str] = &["boot", "preboot", "devices", "doctor", "report"];
    let mut files = Vec::new();
    modules(&root().join("cli/src"), "", &mut files);
    for (module, file) in files {
        if ALLOWED.contains(&module.split("::").next().unwrap_or_default()) {
            continue;
        }
        let text = fs::read_to_string(&file).expect("cannot read");
        let lines = code_lines(&text);
        let uses = imports(&lines).iter().any(|path| path.starts_with("kindling::vmm"))
            || lines.iter().any(|line| line.contains("kindling::vmm"));
        assert!(!uses, "{} uses kindling::vmm; use or add an item of kindling", file.display());
    }
}
