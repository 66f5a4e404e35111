//! Container images for tests: an image from the root filesystem of `tests/tests/root.rs`, and a registry.

use crate::build_image::{self, Arguments as Image};
use crate::{cargo, debian, docker_archive};
use anyhow::Result;
use serde_json::json;
use std::fs;
use std::path::Path;

/// Adds the programs of `tests/tests/on_host_oci.rs` to the testbed.
pub(crate) fn programs(testbed: &Path) -> Result<()> {
    fs::copy(cargo::release_binary("kindling-oci", "kindling-oci")?, testbed.join("kindling-oci"))?;
    let registry = debian::unpacked("docker-registry")?.join("usr/bin/docker-registry");
    fs::copy(registry, testbed.join("docker-registry"))?;
    Ok(())
}

/// Builds the image `oci` from a container image with a tree as its only layer and its own command.
pub(crate) fn build(images: &Path, tree: &Path) -> Result<()> {
    let scratch = tempfile::tempdir_in(images)?;
    let scratch = scratch.path();
    let config = json!({
        "Entrypoint": ["/bin/bash", "-c"], "Cmd": ["echo $WORD $OTHER $HOME; pwd; id -u; id -g"],
        "Env": ["WORD=word", "OTHER=image"], "User": "7:8", "WorkingDir": "/odd",
    });
    let archive = docker_archive::write(scratch, tree, &config)?;
    build_image::build(&Image {
        name: Some("oci".to_owned()),
        from: Some(archive.display().to_string()),
        // Test data must not fill the user's cache.
        from_cache: Some(scratch.to_owned()),
        out: Some(images.join("oci")),
        ..Image::default()
    })?;
    Ok(())
}
