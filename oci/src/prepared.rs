//! Descriptions of converted images: the record in the cache, and the public description.

use crate::digest::Digest;
use crate::error::Error;
use crate::manifest::RunConfig;
use crate::user::{User, Users};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// The image.json of a converted image: everything that [`Prepared`] needs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) digest: Digest,
    /// The size of the filesystem in bytes.
    pub(crate) size: u64,
    run: Run,
    user: String,
    users: Users,
}

/// The execution parameters of the image, without the user.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Run {
    entrypoint: Vec<String>,
    cmd: Vec<String>,
    env: Vec<String>,
    working_dir: String,
    stop_signal: Option<String>,
    exposed_ports: Vec<String>,
}

/// A converted image, ready to be a guest's root filesystem.
#[derive(Clone, Debug, Serialize)]
pub struct Prepared {
    /// The path of the EROFS filesystem.
    pub rootfs: PathBuf,
    /// The image's id: the digest of its configuration.
    pub digest: Digest,
    /// The execution parameters.
    pub config: Config,
}

/// The execution parameters of an image.
#[derive(Clone, Debug, Serialize)]
pub struct Config {
    #[serde(flatten)]
    run: Run,
    /// The user that the program runs as.
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
                .map(|port| port.to_lowercase())
                .map(|port| if port.contains('/') { port } else { port + "/tcp" })
                .collect(),
        };
        Self { digest, size, run, user: config.user.unwrap_or_default(), users }
    }

    /// The public description, with the image's user or another one.
    pub(crate) fn prepared(self, rootfs: PathBuf, user: Option<&str>) -> Result<Prepared, Error> {
        let user = self.users.find(user.unwrap_or(&self.user))?;
        Ok(Prepared { rootfs, digest: self.digest, config: Config { run: self.run, user } })
    }
}
