//! `cargo xtask clean`: removes the cache.

use crate::cache;
use anyhow::{Context, Result};
use clap::Args;
use std::fs;
use std::path::Path;

#[derive(Args, Debug)]
pub(crate) struct Arguments {
    /// Print what would be removed, without removing it
    #[arg(long)]
    dry_run: bool,
}

/// Removes each entry of the cache and prints its path and size.
pub(crate) fn run(arguments: &Arguments) -> Result<u8> {
    let directory = cache::directory()?;
    let mut total = 0;
    let mut entries: Vec<_> = fs::read_dir(&directory)?.collect::<Result<_, _>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        let size = disk_usage(&path)?;
        total += size;
        println!("{:>8} MiB  {}", size >> 20, path.display());
        if !arguments.dry_run {
            remove(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
    }
    let verb = if arguments.dry_run { "would be freed" } else { "freed" };
    println!("{:>8} MiB  {verb}", total >> 20);
    Ok(0)
}

fn remove(path: &Path) -> std::io::Result<()> {
    if path.symlink_metadata()?.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }
}

/// Disk usage of a file or a directory tree in bytes.
fn disk_usage(path: &Path) -> Result<u64> {
    use std::os::unix::fs::MetadataExt;
    let metadata = path.symlink_metadata()?;
    let mut total = metadata.blocks() * 512;
    if metadata.is_dir() {
        for entry in fs::read_dir(path)? {
            total += disk_usage(&entry?.path())?;
        }
    }
    Ok(total)
}
