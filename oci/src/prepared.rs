//! The record of a converted image in the cache.

use crate::digest::Digest;
use crate::error::Error;
use crate::manifest::RunConfig;
use crate::user::Users;
use oci_protocol::{Depends, ImageConfig, Prepared, User};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// The image.json of a converted image: everything that [`Prepared`] needs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) digest: Digest,
    /// The size of the filesystem in bytes.
    pub(crate) size: u64,
    /// The configuration, whose user is looked up for each command.
    run: ImageConfig,
    user: String,
    users: Users,
}

impl Record {
    pub(crate) fn new(digest: Digest, size: u64, config: RunConfig, users: Users) -> Self {
        let text = |text: Option<String>| text.filter(|text| !text.is_empty());
        let working_dir = text(config.working_dir).unwrap_or_default();
        let run = ImageConfig {
            entrypoint: config.entrypoint.unwrap_or_default(),
            cmd: config.cmd.unwrap_or_default(),
            env: config.env.unwrap_or_default(),
            working_dir: if working_dir.starts_with('/') { working_dir } else { format!("/{working_dir}") },
            stop_signal: text(config.stop_signal),
            exposed_ports: config
                .exposed_ports
                .unwrap_or_default()
                .into_keys()
                .map(|port| port.to_lowercase())
                .map(|port| if port.contains('/') { port } else { port + "/tcp" })
                .collect(),
            user: User::default(),
        };
        Self { digest, size, run, user: config.user.unwrap_or_default(), users }
    }

    /// What is printed for the image, with the image's user or another one, and what decided which image it is.
    pub(crate) fn prepared(
        self,
        rootfs: PathBuf,
        user: Option<&str>,
        depends: Depends,
    ) -> Result<Prepared, Error> {
        let user = self.users.find(user.unwrap_or(&self.user))?;
        let config = ImageConfig { user, ..self.run };
        Ok(Prepared { rootfs, digest: self.digest.to_string(), config, depends })
    }
}
