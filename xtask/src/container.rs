//! Root filesystems from container images, converted by `kindling-oci`.

use crate::cargo;
use anyhow::{Context, Result, bail};
use kindling_vmm::config::image::Container;
use oci_protocol::Prepared;
use std::path::Path;
use std::process::{Command, Stdio};

/// Converts an image unless it is cached.
pub(crate) fn prepare(image: &str, cache: Option<&Path>) -> Result<Prepared> {
    let mut command = Command::new(cargo::release_binary("kindling-oci", "kindling-oci")?);
    command.arg("prepare");
    if let Some(cache) = cache {
        command.arg("--cache").arg(cache);
    }
    let output = command.args(["--", image]).stdin(Stdio::null()).stderr(Stdio::inherit()).output()?;
    if !output.status.success() {
        // kindling-oci has printed the reason.
        bail!("--from {image}: cannot convert the image to a root filesystem");
    }
    serde_json::from_slice(&output.stdout).context("cannot parse the output of kindling-oci")
}

/// The command, environment and user of an image, for image.json.
pub(crate) fn container(prepared: Prepared) -> Container {
    let Prepared { digest, config, .. } = prepared;
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
