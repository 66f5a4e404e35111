//! Container images in tests: the root filesystem of `tests/tests/root.rs` once more, by way of one, and a registry.

use crate::build_image::{self, Arguments as Image};
use crate::{cargo, debian};
use anyhow::Result;
use kindling::config::image::sha256_of;
use serde_json::json;
use std::fs;
use std::path::Path;
use xshell::{Shell, cmd};

/// Puts what `tests/tests/on_host_oci.rs` uses into the testbed.
pub(crate) fn programs(testbed: &Path) -> Result<()> {
    fs::copy(cargo::release_binary("kindling-oci", "kindling-oci")?, testbed.join("kindling-oci"))?;
    let registry = debian::unpacked("docker-registry")?.join("usr/bin/docker-registry");
    fs::copy(registry, testbed.join("docker-registry"))?;
    Ok(())
}

/// Builds the image `oci` from a container image with a tree as its one layer, and a command of its own.
pub(crate) fn build(images: &Path, tree: &Path) -> Result<()> {
    let place = tempfile::tempdir_in(images)?;
    let place = place.path();
    let shell = Shell::new()?;
    shell.change_dir(place);
    let attributes = ["--xattrs", "--xattrs-include=*", "--sparse", "--sort=name"];
    cmd!(
        shell,
        "tar --create --format=posix {attributes...} --numeric-owner --file layer.tar --directory {tree} ."
    )
    .quiet()
    .run()?;
    let digest = sha256_of(&place.join("layer.tar"))?;
    let config = json!({
        "architecture": "amd64", "os": "linux", "rootfs": { "diff_ids": [format!("sha256:{digest}")] },
        "config": {
            "Entrypoint": ["/bin/bash", "-c"], "Cmd": ["echo $WORD $OTHER $HOME; pwd; id -u; id -g"],
            "Env": ["WORD=word", "OTHER=image"], "User": "7:8", "WorkingDir": "/odd",
        },
    });
    fs::write(place.join("config.json"), config.to_string())?;
    fs::write(
        place.join("manifest.json"),
        json!([{ "Config": "config.json", "Layers": ["layer.tar"] }]).to_string(),
    )?;
    cmd!(shell, "tar --create --file image.tar manifest.json config.json layer.tar").quiet().run()?;
    build_image::build(&Image {
        name: "oci".to_owned(),
        from: Some(place.join("image.tar").display().to_string()),
        // The user's cache is no place for it.
        from_cache: Some(place.to_owned()),
        out: Some(images.join("oci")),
        ..Image::default()
    })?;
    Ok(())
}
