//! Builds programs of the workspace with cargo.

use crate::host::workspace;
use anyhow::{Context, Result};
use std::path::PathBuf;
use xshell::{Shell, cmd};

/// A shell in the workspace's root.
pub(crate) fn shell() -> Result<Shell> {
    let shell = Shell::new()?;
    shell.change_dir(workspace());
    Ok(shell)
}

/// Builds a program in the release profile; returns its path.
pub(crate) fn release_binary(package: &str, binary: &str) -> Result<PathBuf> {
    let shell = shell()?;
    cmd!(shell, "cargo build --quiet --release --package {package} --bin {binary}")
        .env_remove("RUSTFLAGS")
        .quiet()
        .run()
        .with_context(|| format!("cannot build {package}"))?;
    Ok(target_directory().join("x86_64-unknown-linux-gnu/release").join(binary))
}

/// Cargo's target directory.
pub(crate) fn target_directory() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| workspace().join("target"), |path| workspace().join(path))
}
