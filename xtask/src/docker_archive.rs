//! Packs a folder as a container image: an archive in the format of `docker save`, with one layer.

use anyhow::Result;
use kindling_vmm::config::image::sha256_of;
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use xshell::{Shell, cmd};

/// Writes `image.tar` into `folder`. `config` is the `config` object of the image configuration.
pub(crate) fn write(folder: &Path, tree: &Path, config: &Value) -> Result<PathBuf> {
    let shell = Shell::new()?;
    shell.change_dir(folder);
    let attributes = ["--xattrs", "--xattrs-include=*", "--sparse", "--sort=name"];
    cmd!(
        shell,
        "tar --create --format=posix {attributes...} --numeric-owner --file layer.tar --directory {tree} ."
    )
    .quiet()
    .run()?;
    let digest = sha256_of(&folder.join("layer.tar"))?;
    let description = json!({
        "architecture": "amd64", "os": "linux", "config": config,
        "rootfs": { "diff_ids": [format!("sha256:{digest}")] },
    });
    fs::write(folder.join("config.json"), description.to_string())?;
    let manifest = json!([{ "Config": "config.json", "Layers": ["layer.tar"] }]);
    fs::write(folder.join("manifest.json"), manifest.to_string())?;
    cmd!(shell, "tar --create --file image.tar manifest.json config.json layer.tar").quiet().run()?;
    Ok(folder.join("image.tar"))
}
