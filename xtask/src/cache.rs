//! The cache of downloads and built kernels, shared by all checkouts of the user.
//!
//! It is in `KINDLING_CACHE`, or in `kindling` in the XDG cache directory. Build results are keyed by the digest of all
//! inputs and published by rename, so that they are complete or absent.

use anyhow::{Context, Result, bail};
use kindling_vmm::config::image::sha256;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// The cache directory; created if necessary.
pub(crate) fn directory() -> Result<PathBuf> {
    let path = locate(|name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from))?;
    trusted_path::make_folder(&path).context("cannot use the cache")?;
    Ok(path)
}

/// The directory's path, from the environment.
fn locate(variable: impl Fn(&str) -> Option<PathBuf>) -> Result<PathBuf> {
    if let Some(path) = variable("KINDLING_CACHE") {
        return std::path::absolute(&path).with_context(|| format!("KINDLING_CACHE={}", path.display()));
    }
    // The XDG specification requires relative paths to be ignored.
    let base = variable("XDG_CACHE_HOME").filter(|path| path.is_absolute());
    match base.or_else(|| Some(variable("HOME")?.join(".cache"))) {
        Some(base) => Ok(base.join("kindling")),
        None => bail!("cannot locate the cache: neither KINDLING_CACHE nor HOME is set"),
    }
}

/// A subdirectory of the cache; created if necessary.
pub(crate) fn subdirectory(name: &str) -> Result<PathBuf> {
    let path = directory()?.join(name);
    fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
    Ok(path)
}

/// The cache key of a list of texts: their digest.
pub(crate) fn key(parts: &[&str]) -> String {
    // Lengths are included, so that different lists never concatenate to the same text.
    let text: String = parts.iter().map(|part| format!("{}\n{part}\n", part.len())).collect();
    sha256(text.as_bytes())[..32].to_owned()
}

/// A lock between processes, released on drop.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: File,
}

/// Acquires the lock with this name, and prints a message if it has to wait.
pub(crate) fn lock(name: &str) -> Result<Lock> {
    let path = subdirectory("locks")?.join(name);
    let file = trusted_path::lock_file(&path).with_context(|| format!("cannot create {}", path.display()))?;
    if file.try_lock().is_err() {
        eprintln!("waiting for another build to finish ...");
        file.lock().with_context(|| format!("cannot lock {}", path.display()))?;
    }
    Ok(Lock { _file: file })
}

/// A directory under construction, which is removed on drop unless it is [`Self::publish`]ed.
#[derive(Debug)]
pub(crate) struct Draft {
    directory: tempfile::TempDir,
}

impl Draft {
    /// Creates an empty directory beside `target`, so that it can be renamed to it. The caller holds a lock for
    /// `target`; drafts left by interrupted builds are removed.
    pub(crate) fn beside(target: &Path) -> Result<Self> {
        let parent = target.parent().context("a root directory cannot be replaced")?;
        let name = target.file_name().context("a root directory cannot be replaced")?.to_string_lossy();
        let prefix = format!(".draft-{name}-");
        fs::create_dir_all(parent).with_context(|| format!("cannot create {}", parent.display()))?;
        for entry in fs::read_dir(parent)? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(&prefix) {
                fs::remove_dir_all(entry.path())?;
            }
        }
        let directory = tempfile::Builder::new()
            .prefix(&prefix)
            .tempdir_in(parent)
            .with_context(|| format!("cannot create a directory in {}", parent.display()))?;
        Ok(Self { directory })
    }

    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Atomically renames the directory to `target`, replacing an existing one.
    pub(crate) fn publish(self, target: &Path) -> Result<()> {
        use rustix::fs::{CWD, RenameFlags, chmod, renameat_with};
        let failed = || format!("cannot replace {}", target.display());
        // Temporary directories have mode 0700.
        chmod(self.path(), rustix::fs::Mode::from_raw_mode(0o755)).with_context(failed)?;
        if fs::symlink_metadata(target).is_ok() {
            renameat_with(CWD, self.path(), CWD, target, RenameFlags::EXCHANGE).with_context(failed)?;
            // The previous target now has the draft's name and is removed.
            return self.directory.close().with_context(failed);
        }
        renameat_with(CWD, self.path(), CWD, target, RenameFlags::NOREPLACE).with_context(failed)?;
        let _ = self.directory.keep();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_locates_the_cache() {
        let with = |pairs: &[(&str, &str)]| {
            let found =
                |name: &str| pairs.iter().find(|(n, _)| *n == name).map(|(_, value)| PathBuf::from(value));
            locate(found).map(|path| path.display().to_string())
        };
        assert_eq!(with(&[("KINDLING_CACHE", "/c"), ("HOME", "/h")]).unwrap(), "/c");
        assert_eq!(with(&[("XDG_CACHE_HOME", "/x"), ("HOME", "/h")]).unwrap(), "/x/kindling");
        assert_eq!(with(&[("XDG_CACHE_HOME", "x"), ("HOME", "/h")]).unwrap(), "/h/.cache/kindling");
        assert!(with(&[]).is_err());
    }

    #[test]
    fn keys_depend_on_the_boundaries_between_parts() {
        assert_ne!(key(&["ab", "c"]), key(&["a", "bc"]));
        assert_eq!(key(&["a", "b"]), key(&["a", "b"]));
    }

    #[test]
    fn a_published_draft_replaces_the_target_and_an_abandoned_one_is_removed() {
        let scratch = tempfile::tempdir().unwrap();
        let target = scratch.path().join("image");
        for content in ["one", "two"] {
            let draft = Draft::beside(&target).unwrap();
            fs::write(draft.path().join(content), content).unwrap();
            draft.publish(&target).unwrap();
            let names: Vec<_> = fs::read_dir(&target).unwrap().map(|e| e.unwrap().file_name()).collect();
            assert_eq!(names, [content]);
        }
        // A build that was killed leaves its draft; the next one removes it.
        fs::create_dir(scratch.path().join(".draft-image-killed")).unwrap();
        drop(Draft::beside(&target).unwrap());
        let left: Vec<_> = fs::read_dir(scratch.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["image"]);
    }
}
