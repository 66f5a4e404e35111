//! The documents name only existing files, commands and options, and current figures.

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

/// The inline code spans of a Markdown text.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split("```").step_by(2).flat_map(|prose| prose.split('`').skip(1).step_by(2))
}

#[test]
fn every_path_in_the_documents_exists() {
    let folders = [
        "vmm/",
        "guest-init/",
        "guest-kernel-config/",
        "runtime/",
        "cli/",
        "oci/",
        "fs/",
        "xtask/",
        "tests/",
        "docs/",
        ".ci/",
        ".cargo/",
    ];
    for (name, text) in documents() {
        for path in quoted(&text).filter(|path| folders.iter().any(|folder| path.starts_with(folder))) {
            // A path may be followed by the name of a test.
            let path = path.split("::").next().unwrap_or_default();
            assert!(root().join(path).exists(), "{name} names {path}, which does not exist");
        }
    }
}

/// The lines of a text without their indentation.
fn unindented(text: &str) -> String {
    text.lines().map(|line| line.trim().to_owned() + "\n").collect()
}

/// A code block whose first line is a comment with the path of a file is a part of that file.
#[test]
fn code_in_the_documents_is_that_of_the_sources() {
    let mut found = 0;
    for (name, text) in documents() {
        for block in text.split("```").skip(1).step_by(2) {
            let Some((path, code)) = block
                .trim_start_matches("rust")
                .trim()
                .strip_prefix("// vmm/")
                .and_then(|rest| rest.split_once('\n'))
            else {
                continue;
            };
            let source = std::fs::read_to_string(root().join("vmm").join(path)).unwrap();
            assert!(
                unindented(&source).contains(&unindented(code.trim_end())),
                "{name}: {path} has no\n{code}"
            );
            found += 1;
        }
    }
    assert_eq!(found, 3, "blocks with code of a source file");
}

/// Whether a source file has a test of this name.
fn has_test(file: &str, test: &str) -> bool {
    let text = std::fs::read_to_string(root().join(file)).unwrap_or_default();
    let function = format!("fn {test}(");
    let mut tests = text.split("#[test]").skip(1);
    tests.any(|rest| {
        rest.lines().find(|line| line.contains("fn ")).is_some_and(|line| line.contains(&function))
    })
}

#[test]
fn every_test_in_the_documents_exists() {
    for (name, text) in documents() {
        for (file, test) in quoted(&text).filter_map(|span| span.split_once(".rs::")) {
            let file = format!("{file}.rs");
            assert!(has_test(&file, test), "{name} names {test}, which is no test of {file}");
        }
    }
}

/// The program that the documents tell readers to paste is the one that `tests/tests/embedding.rs` runs.
#[test]
fn the_program_in_the_documents_is_the_tested_one() {
    let program = std::fs::read_to_string(root().join("runtime/examples/first.rs")).unwrap();
    assert!(program.lines().count() <= 20, "it is no longer a short program");
    for name in ["README.md", "docs/embedding.md"] {
        let text = std::fs::read_to_string(root().join(name)).unwrap();
        let (_, rest) = text.split_once("```rust\n").unwrap();
        let (shown, _) = rest.split_once("```").unwrap();
        assert_eq!(shown, program, "{name} shows another program than runtime/examples/first.rs");
    }
}

/// docs/walk.md marks each return to a file, and has the numbers of files and returns.
#[test]
fn the_walk_names_existing_functions_and_counts_its_returns() {
    let text = std::fs::read_to_string(root().join("docs/walk.md")).unwrap();
    for section in text.split("\n## ").skip(1) {
        let (mut files, mut returns, mut steps) = (Vec::new(), 0, 0);
        for row in section.lines().filter_map(|line| line.strip_prefix("| ")) {
            let Some((number, cells)) = row.split_once(" | ") else { continue };
            if !number.starts_with(|first: char| first.is_ascii_digit()) {
                continue;
            }
            steps += 1;
            assert_eq!(number.split(' ').next(), Some(steps.to_string().as_str()), "{row}");
            let cell = cells.split(" | ").next().unwrap();
            let mut spans = quoted(cell);
            let file = spans.next().unwrap();
            let is_return = files.contains(&file);
            assert_eq!(cell.contains(" again: "), is_return, "{row}");
            returns += u32::from(is_return);
            if !is_return {
                files.push(file);
            }
            let source = std::fs::read_to_string(root().join(file)).unwrap();
            for function in spans {
                let exists = ['(', '<'].iter().any(|next| source.contains(&format!("fn {function}{next}")));
                assert!(exists, "docs/walk.md names {function}, which {file} does not have");
            }
        }
        let count = format!("On the way: {} files, {returns} returns.", files.len());
        assert!(section.contains(&count), "docs/walk.md should say: {count}");
    }
}

/// Each row of the table names a test, or the reason for which there is none.
#[test]
fn each_advisory_has_a_test_or_a_reason() {
    let text = std::fs::read_to_string(root().join("docs/advisories.md")).unwrap();
    let rows: Vec<Vec<&str>> = text
        .lines()
        .filter(|line| line.starts_with("| ") && line[2..].starts_with(|first: char| first.is_ascii_digit()))
        .map(|line| line.trim_matches('|').split(" | ").map(str::trim).collect())
        .collect();
    let numbers: Vec<String> = (1..=25).map(|number: u32| number.to_string()).collect();
    assert_eq!(rows.iter().map(|row| row[0]).collect::<Vec<_>>(), numbers);
    for row in rows {
        assert_eq!(row.len(), 4, "{row:?}");
        assert!(row[1].contains("CVE-") || row[1].contains("GHSA-"), "{row:?}");
        assert!(row[3].contains(".rs::") || row[3].starts_with("none: "), "{row:?}");
    }
}

#[test]
fn every_command_and_option_in_the_documents_exists() {
    for (name, text) in documents() {
        let fenced = text.split("```").skip(1).step_by(2).flat_map(str::lines);
        for line in quoted(&text).chain(fenced) {
            if let Some(words) = line.trim().strip_prefix("cargo xtask ") {
                let command = words.split_whitespace().next().unwrap_or_default();
                let module = command.replace('-', "_");
                let file = format!("xtask/src/{module}.rs");
                let folder = format!("xtask/src/{module}/mod.rs");
                let exists = root().join(&file).exists() || root().join(&folder).exists();
                assert!(exists, "{name} names `cargo xtask {command}`, which does not exist");
            }
            // Several spaces separate the columns of a table, in which `kindling` is the name of a row.
            if let Some(words) = line.trim().strip_prefix("kindling ").filter(|words| !words.starts_with(' '))
            {
                let command = words.split_whitespace().next().unwrap_or_default();
                let help =
                    Command::new(tests::testbed("kindling")).args([command, "--help"]).output().unwrap();
                assert!(help.status.success(), "{name} names `kindling {command}`, which does not exist");
                for option in words
                    .split_whitespace()
                    .take_while(|word| *word != "--")
                    .filter(|word| word.starts_with("--"))
                {
                    let option = option.trim_matches(|c: char| !c.is_ascii_alphanumeric() && c != '-');
                    let known = String::from_utf8_lossy(&help.stdout).contains(option);
                    assert!(known, "{name} names {option} of `kindling {command}`, which does not exist");
                }
            }
        }
    }
}

/// Checks a figure in a document within 5 %: sizes are rounded, and small changes need no edit.
fn expect_figure(name: &str, before: &str, after: &str, actual: f64) {
    let text = std::fs::read_to_string(root().join(name)).unwrap();
    let written = text.split(before).skip(1).find_map(|rest| {
        let number: f64 = rest.split(after).next()?.trim().parse().ok()?;
        Some(number)
    });
    let written = written.unwrap_or_else(|| panic!("{name} has no {before:?} with a number and {after:?}"));
    let is_current = (written - actual).abs() <= actual * 0.05;
    assert!(is_current, "{name} says {before}{written}{after}; now it is {actual:.2}");
}

#[expect(clippy::cast_precision_loss, reason = "sizes of files are far below 2^53")]
fn size_of(file: &str) -> f64 {
    std::fs::metadata(tests::testbed(file)).unwrap().len() as f64
}

#[test]
fn sizes_in_the_documents_are_current() {
    let (kib, mib, mb) = (1024.0, 1_048_576.0, 1_000_000.0);
    let (init, kindling) = (size_of("init"), size_of("kindling"));
    let (kernel, root) = (size_of("images/default/vmlinux"), size_of("images/default/initramfs.cpio"));
    for name in ["README.md", "docs/architecture.md"] {
        expect_figure(name, "an init of ", " KiB", init / kib);
    }
    expect_figure("README.md", "Init has ", " KiB", init / kib);
    expect_figure("README.md", "`kindling` ", " MB", kindling / mb);
    expect_figure("README.md", "an image's kernel ", " MiB", kernel / mib);
    expect_figure("README.md", "(Linux 6.12.117, ", " KiB kernel", kernel / kib);
    expect_figure("README.md", " KiB kernel, ", " KiB root filesystem", root / kib);
}

/// README.md has the times of docs/bench.md, and both are within 10 % of the budget. The process of the budget's guest
/// exits up to 25 % later, because that guest prints a greeting.
#[test]
fn times_in_the_documents_match_the_budget() {
    let budget = std::fs::read_to_string(root().join("tests/boot-budget.json")).unwrap();
    let budget: serde_json::Value = serde_json::from_str(&budget).unwrap();
    let millisecond = |kind: &str, figure: &str| budget[kind][figure].as_f64().unwrap() / 1e6;
    let readme = std::fs::read_to_string(root().join("README.md")).unwrap();
    let bench = std::fs::read_to_string(root().join("docs/bench.md")).unwrap();
    let section = bench.split("boot: 128 MiB, 1 vCPU").nth(1).unwrap();
    for (monitor, column, kind) in [("kindling ", 1, "boot"), ("kindling-preboot ", 0, "preboot")] {
        for (row, word, figure, margin) in [
            ("spawn to init's first instruction", 1, "spawn_to_init_ns", 1.1),
            ("spawn to the end of the process", 7, "spawn_to_exit_ns", 1.25),
        ] {
            let budget = millisecond(kind, figure);
            let cells = readme.lines().find_map(|line| line.strip_prefix("| ")?.strip_prefix(row));
            let cell = cells.unwrap().trim_start_matches(" | ").split(" | ").nth(column).unwrap();
            let line = section.lines().find(|line| line.starts_with(monitor)).unwrap();
            // The name, then numbers, each but the first followed by its ratio.
            let measured = line.split_whitespace().nth(word).unwrap();
            for (name, written) in [("README.md", cell.trim_end_matches(" ms")), ("docs/bench.md", measured)]
            {
                let written: f64 = written.parse().unwrap();
                let is_current = written <= budget * 1.02 && budget <= written * margin;
                assert!(
                    is_current,
                    "{name}: {monitor}{row} {written} ms; {budget} in tests/boot-budget.json"
                );
            }
            let exact: f64 = measured.parse().unwrap();
            assert_eq!(cell, format!("{exact:.1} ms"), "README.md: {monitor}{row}; {exact} in docs/bench.md");
        }
    }
}
