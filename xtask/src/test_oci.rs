//! Container images in tests: the root filesystem of `tests/tests/root.rs` once more, by way of one, and a registry.

use crate::{cargo, debian, docker_archive};
use anyhow::{Context, Result};
use kindling::config::image::{DESCRIPTION, Image, ImageFile, sha256};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use std::process::Command;

/// Puts what `tests/tests/on_host_oci.rs` uses into the testbed.
pub(crate) fn programs(testbed: &Path) -> Result<()> {
    fs::copy(cargo::release_binary("kindling-oci", "kindling-oci")?, testbed.join("kindling-oci"))?;
    let registry = debian::unpacked("docker-registry")?.join("usr/bin/docker-registry");
    fs::copy(registry, testbed.join("docker-registry"))?;
    Ok(())
}

/// Builds the image `oci`: all of the image `root`, but with what `kindling-oci` makes of a tree as one layer of an
/// archive of `docker save`.
pub(crate) fn build(images: &Path, tree: &Path) -> Result<()> {
    let place = tempfile::tempdir_in(images)?;
    let place = place.path();
    let archive = docker_archive::write(place, tree, &json!({}))?;
    let output = Command::new(cargo::release_binary("kindling-oci", "kindling-oci")?)
        .args(["prepare", "--cache"])
        .args([place, &archive])
        .output()?;
    anyhow::ensure!(output.status.success(), "kindling-oci: {}", String::from_utf8_lossy(&output.stderr));
    let prepared: Value = serde_json::from_slice(&output.stdout)?;
    let rootfs = prepared["rootfs"].as_str().context("kindling-oci names no filesystem")?;

    let (from, to) = (images.join("root"), images.join("oci"));
    fs::create_dir_all(&to)?;
    let mut image = Image::open(&from)?;
    for file in [&image.kernel.file, &image.initrd.file] {
        fs::copy(from.join(file), to.join(file))?;
    }
    let content = fs::read(rootfs)?;
    let size = u64::try_from(content.len())?;
    image.root = Some(ImageFile { file: "root.erofs".to_owned(), size, sha256: sha256(&content) });
    fs::write(to.join("root.erofs"), content)?;
    fs::write(to.join(DESCRIPTION), serde_json::to_vec(&image)?)?;
    Ok(())
}
