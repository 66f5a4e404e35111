//! What is known of a converted image, and what is told about it.

use crate::digest::Digest;
use crate::error::Error;
use crate::manifest::RunConfig;
use crate::user::{User, Users};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// A converted image's image.json: all that is needed later, without the image.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) digest: Digest,
    /// Bytes of the filesystem.
    pub(crate) size: u64,
    run: Run,
    user: String,
    users: Users,
}

/// How the image's program is started.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Run {
    entrypoint: Vec<String>,
    cmd: Vec<String>,
    env: Vec<String>,
    working_dir: String,
    stop_signal: Option<String>,
    exposed_ports: Vec<String>,
}

/// An image that a guest can have as its root.
#[derive(Clone, Debug, Serialize)]
pub struct Prepared {
    /// The filesystem, read-only EROFS.
    pub rootfs: PathBuf,
    /// The image's id: the digest of its configuration.
    pub digest: Digest,
    /// What it starts.
    pub config: Config,
}

/// What an image starts.
#[derive(Clone, Debug, Serialize)]
pub struct Config {
    #[serde(flatten)]
    run: Run,
    /// As whom.
    pub user: User,
}

impl Record {
    pub(crate) fn new(digest: Digest, size: u64, config: RunConfig, users: Users) -> Self {
        let text = |text: Option<String>| text.filter(|text| !text.is_empty());
        let working_dir = text(config.working_dir).unwrap_or_default();
        let run = Run {
            entrypoint: config.entrypoint.unwrap_or_default(),
            cmd: config.cmd.unwrap_or_default(),
            env: config.env.unwrap_or_default(),
            working_dir: if working_dir.starts_with('/') { working_dir } else { format!("/{working_dir}") },
            stop_signal: text(config.stop_signal),
            exposed_ports: config
                .exposed_ports
                .unwrap_or_default()
                .into_keys()
                .map(|port| if port.contains('/') { port } else { port + "/tcp" })
                .collect(),
        };
        Self { digest, size, run, user: config.user.unwrap_or_default(), users }
    }

    /// What is told, with the image's user or another one.
    pub(crate) fn prepared(self, rootfs: PathBuf, user: Option<&str>) -> Result<Prepared, Error> {
        let user = self.users.find(user.unwrap_or(&self.user))?;
        Ok(Prepared { rootfs, digest: self.digest, config: Config { run: self.run, user } })
    }
}
