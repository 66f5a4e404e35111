//! Root filesystems of container images: `kindling-oci` makes them.

use crate::cargo;
use anyhow::{Context, Result, bail};
use kindling_vmm::config::image::Container;
use serde::Deserialize;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What `kindling-oci` says of an image.
#[derive(Debug, Deserialize)]
pub(crate) struct Prepared {
    pub(crate) rootfs: PathBuf,
    digest: String,
    config: Config,
}

#[derive(Debug, Deserialize)]
struct Config {
    entrypoint: Vec<String>,
    cmd: Vec<String>,
    env: Vec<String>,
    working_dir: String,
    user: User,
}

#[derive(Debug, Deserialize)]
struct User {
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
    home: Option<String>,
}

/// Converts an image, if that was not done before.
pub(crate) fn prepare(image: &str, cache: Option<&Path>) -> Result<Prepared> {
    let mut command = Command::new(cargo::release_binary("kindling-oci", "kindling-oci")?);
    command.arg("prepare");
    if let Some(cache) = cache {
        command.arg("--cache").arg(cache);
    }
    let output = command.args(["--", image]).stdin(Stdio::null()).stderr(Stdio::inherit()).output()?;
    if !output.status.success() {
        // It has said why.
        bail!("--from {image}: no root filesystem can be made of it");
    }
    serde_json::from_slice(&output.stdout).context("kindling-oci says something else than before")
}

impl Prepared {
    /// What the image's guest runs.
    pub(crate) fn into_container(self) -> Container {
        let Self { digest, config, .. } = self;
        let mut environment = config.env;
        if let Some(home) =
            config.user.home.filter(|_| !environment.iter().any(|entry| entry.starts_with("HOME=")))
        {
            environment.push(format!("HOME={home}"));
        }
        Container {
            digest,
            arguments: [config.entrypoint, config.cmd].concat(),
            environment,
            working_directory: config.working_dir,
            user_id: config.user.uid,
            group_id: config.user.gid,
            groups: config.user.groups,
        }
    }
}
