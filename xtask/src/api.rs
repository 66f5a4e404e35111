//! `cargo xtask api`: writes the public items of the libraries to docs/api.md, so that a change of them is seen in review.

use crate::cargo::target_directory;
use crate::host::workspace;
use anyhow::{Context, Result, ensure};
use clap::Args;
use public_api::Builder;
use std::fmt::Write;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

#[derive(Args, Debug)]
pub(crate) struct Arguments {
    /// Write nothing, and fail if docs/api.md is not current
    #[arg(long)]
    check: bool,
}

/// The libraries: package, crate and description.
const LIBRARIES: [(&str, &str, &str); 3] = [
    ("kindling", "kindling", "the library to embed (`docs/embedding.md`)"),
    ("oci-protocol", "oci_protocol", "images, which `kindling` exports as its own"),
    ("kindling-vmm", "kindling_vmm", "the monitor"),
];

/// Writes or checks the page.
pub(crate) fn run(arguments: &Arguments) -> Result<u8> {
    let path = workspace().join("docs/api.md");
    let page = page()?;
    if arguments.check {
        compare(&fs::read_to_string(&path).unwrap_or_default(), &page)?;
    } else {
        fs::write(&path, page).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(0)
}

/// Fails if the page is not current, and names the first line that differs.
fn compare(old: &str, new: &str) -> Result<()> {
    let differs = old.lines().zip(new.lines()).find(|(old, new)| old != new);
    let (old_line, new_line) = differs.unwrap_or_default();
    ensure!(
        old == new,
        "docs/api.md is not current: {old_line:?} is now {new_line:?}; run `cargo xtask api` and review the change"
    );
    Ok(())
}

fn page() -> Result<String> {
    let mut page = String::from(
        "# Public items\n\nEvery public item of the libraries, as `cargo xtask api` writes it. \
         `.ci/run` fails when the list is not current, so that every change of it is reviewed. \
         `cargo doc --package kindling --open` shows the documentation.\n",
    );
    for (package, name, what) in LIBRARIES {
        let _ = write!(page, "\n## `{package}`: {what}\n\n```text\n");
        let items = Builder::from_rustdoc_json(rustdoc_json(package, name)?)
            .omit_blanket_impls(true)
            .omit_auto_trait_impls(true)
            .omit_auto_derived_impls(true)
            .build()
            .with_context(|| format!("cannot read the items of {package}"))?;
        for item in items.items() {
            let _ = writeln!(page, "{}", short(&item.to_string()));
        }
        page.push_str("```\n");
    }
    Ok(page)
}

/// The standard library's types by the paths that programs write.
fn short(item: &str) -> String {
    let paths = [
        ("core::result::Result", "Result"),
        ("core::option::Option", "Option"),
        ("alloc::string::String", "String"),
        ("alloc::vec::Vec", "Vec"),
        ("alloc::boxed::Box", "Box"),
        ("alloc::sync::Arc", "Arc"),
        ("core::convert::AsRef", "AsRef"),
        ("core::convert::Into", "Into"),
        ("core::convert::From", "From"),
        ("std::ffi::os_str::", ""),
        ("std::path::", ""),
        ("std::io::error::", "std::io::"),
        ("std::os::fd::owned::", "std::os::fd::"),
        ("core::", "std::"),
    ];
    paths.iter().fold(item.to_owned(), |item, (long, short)| item.replace(long, short))
}

/// Runs rustdoc on a library; returns its JSON file. A warning, such as one for a broken link, is an error.
fn rustdoc_json(package: &str, name: &str) -> Result<PathBuf> {
    // The output format is unstable. The variable that enables it changes the fingerprint of all crates, so that a shared
    // target directory would be rebuilt.
    let target = target_directory().join("api");
    let status = Command::new("cargo")
        .args(["rustdoc", "--quiet", "--lib", "--package", package, "--target-dir"])
        .arg(&target)
        .args(["--", "--deny", "warnings", "-Z", "unstable-options", "--output-format", "json"])
        .env("RUSTC_BOOTSTRAP", "1")
        .current_dir(workspace())
        .status()
        .context("cannot run cargo rustdoc")?;
    ensure!(status.success(), "cargo rustdoc of {package} failed");
    let file = format!("doc/{name}.json");
    Ok(target.join("x86_64-unknown-linux-gnu").join(file))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stale_page_is_an_error_with_the_line() {
        compare("a\nb\n", "a\nb\n").unwrap();
        let error = compare("a\nb\n", "a\nc\n").unwrap_err().to_string();
        assert!(error.contains(r#""b" is now "c""#), "{error}");
        assert!(compare("a\n", "a\nc\n").is_err());
    }

    #[test]
    fn paths_are_those_that_programs_write() {
        assert_eq!(
            short("fn f() -> core::result::Result<alloc::string::String, core::fmt::Error>"),
            "fn f() -> Result<String, std::fmt::Error>"
        );
    }
}
