//! The tree of an image's root filesystem: its survey, the choice of its type, and the EROFS image.

use crate::debian;
use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use rustix::fs::{Access, access, statvfs};
use std::collections::HashSet;
use std::fs::{self, Metadata};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::process::{Command, Stdio};

/// The type of an image's root filesystem.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum RootType {
    /// Files in memory, unpacked by the kernel during boot
    Initramfs,
    /// A read-only disk under a writable overlay in memory
    Erofs,
}

/// Size in bytes above which a tree becomes a disk. A disk is faster for a boot at any size, an initramfs for a start
/// from a pre-booted kernel: `cargo xtask root-prices` measures both, and `docs/images.md` weighs them.
const INITRAMFS_MAX: u64 = 3 << 20;
/// The UUID of every image, so that equal trees give equal bytes; no root is looked up by UUID.
const UUID: &str = "6b696e64-6c69-4e67-8000-726f6f740000";
/// The block size, to which files and directories are rounded up.
const BLOCK: u64 = 4096;
/// The maximum length of a file name in bytes. The mkfs.erofs of Debian 12 (1.5) truncates such a name and then does
/// not find the file.
const LONG_NAME: usize = 255;

/// A survey of a tree.
#[derive(Debug, Default)]
pub(crate) struct Survey {
    /// Bytes of all files and links, counting hard links separately.
    bytes: u64,
    /// Bytes of a filesystem, counting hard links once.
    blocks: u64,
    /// The first entry that an initramfs cannot store completely, and why.
    initramfs_obstacle: Option<String>,
    /// A path whose name has [`LONG_NAME`] bytes.
    long_name: Option<String>,
    /// Files with several hard links that have been counted.
    linked: HashSet<(u64, u64)>,
}

impl Survey {
    /// Surveys the tree below a folder.
    ///
    /// # Errors
    /// Names the entry that cannot be read or stored in an image.
    pub(crate) fn of(root: &Path) -> Result<Self> {
        if !root.metadata().with_context(|| format!("--root {}", root.display()))?.is_dir() {
            bail!("--root {}: not a folder", root.display());
        }
        let mut survey = Self::default();
        let mut folders = vec![root.to_owned()];
        while let Some(folder) = folders.pop() {
            let unreadable = || format!("cannot read {}", folder.display());
            for entry in fs::read_dir(&folder).with_context(unreadable)? {
                let path = entry.with_context(unreadable)?.path();
                let found = || format!("--root: {}", path.display());
                let metadata = path.symlink_metadata().with_context(found)?;
                survey.add(&path, &metadata).with_context(found)?;
                if metadata.is_dir() {
                    folders.push(path);
                }
            }
        }
        Ok(survey)
    }

    fn add(&mut self, path: &Path, metadata: &Metadata) -> Result<()> {
        let kind = metadata.file_type();
        if kind.is_socket() {
            bail!("it is a socket, which an image cannot contain");
        }
        if kind.is_file() || kind.is_dir() {
            access(path, Access::READ_OK).context("it cannot be read")?;
        }
        let length = if kind.is_file() || kind.is_symlink() { metadata.len() } else { 0 };
        self.bytes = self.bytes.saturating_add(length);
        let is_another_name =
            kind.is_file() && metadata.nlink() > 1 && !self.linked.insert((metadata.dev(), metadata.ino()));
        if !is_another_name {
            self.blocks = self.blocks.saturating_add(length.next_multiple_of(BLOCK)).saturating_add(BLOCK);
        }
        if path.file_name().is_some_and(|name| name.len() >= LONG_NAME) {
            self.long_name = Some(path.display().to_string());
        }
        if self.initramfs_obstacle.is_none() {
            self.initramfs_obstacle = initramfs_obstacle(path, metadata)?;
        }
        Ok(())
    }

    /// The suitable type for the tree.
    pub(crate) const fn root_type(&self) -> RootType {
        if self.bytes > INITRAMFS_MAX || self.initramfs_obstacle.is_some() {
            RootType::Erofs
        } else {
            RootType::Initramfs
        }
    }

    /// The reason why an initramfs cannot store the tree completely.
    pub(crate) fn initramfs_obstacle(&self) -> Option<&str> {
        self.initramfs_obstacle.as_deref()
    }
}

fn initramfs_obstacle(path: &Path, metadata: &Metadata) -> Result<Option<String>> {
    let reason = if path.file_name().is_some_and(|name| name.to_str().is_none()) {
        "has a name that is not UTF-8"
    } else if metadata.is_symlink() && fs::read_link(path)?.to_str().is_none() {
        "has a target that is not UTF-8"
    } else if metadata.len() > u64::from(u32::MAX) {
        "is 4 GiB or larger"
    } else if has_attributes(path)? {
        "has extended attributes"
    } else {
        return Ok(None);
    };
    Ok(Some(format!("{} {reason}", path.display())))
}

fn has_attributes(path: &Path) -> Result<bool> {
    match rustix::fs::llistxattr(path, &mut [0_u8; 0][..]) {
        Ok(length) => Ok(length > 0),
        Err(rustix::io::Errno::OPNOTSUPP) => Ok(false),
        Err(error) => Err(error).context("its extended attributes cannot be read"),
    }
}

/// Creates an EROFS image of a tree, with the same bytes for equal trees; returns the version of the tool.
///
/// Files are uncompressed and page-aligned, so that a guest that maps the image as memory (pmem, DAX) can use its pages
/// directly.
pub(crate) fn make_erofs(root: &Path, survey: &Survey, keep_owners: bool, target: &Path) -> Result<String> {
    debian::ensure_erofs_tools()?;
    let root = root.canonicalize()?;
    let location = target.parent().context("the target has no parent folder")?.canonicalize()?;
    if location.starts_with(&root) {
        bail!("--root {} would contain the image itself; choose another --out", root.display());
    }
    let disk = statvfs(&location).context("cannot determine the free space")?;
    let free = disk.f_bavail.saturating_mul(disk.f_frsize);
    if survey.blocks > free {
        bail!(
            "{} needs {} MiB, and {} has {} MiB free",
            root.display(),
            survey.blocks >> 20,
            location.display(),
            free >> 20
        );
    }
    let owners = (!keep_owners).then_some("--all-root");
    let output = Command::new("mkfs.erofs")
        .args(["-T0", "-U", UUID, "-E", "noinline_data"])
        .args(owners)
        .arg(target)
        .arg(&root)
        .stdin(Stdio::null())
        .output()
        .context("cannot run mkfs.erofs")?;
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr);
        // A process killed by a signal prints nothing.
        let status = output.status.to_string();
        let why = [words.trim(), &status].into_iter().find(|words| !words.is_empty()).unwrap_or_default();
        let hint = survey.long_name.as_ref().map(|path| {
            format!("; mkfs.erofs 1.5 does not support names of {LONG_NAME} bytes, such as {path}")
        });
        let hint = hint.unwrap_or_default();
        bail!("mkfs.erofs could not create {}: {why}{hint}", target.display());
    }
    let words = String::from_utf8_lossy(&output.stdout);
    Ok(words.lines().next().unwrap_or_default().trim_start_matches("mkfs.erofs ").to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsStr;
    use std::fs::File;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::symlink;

    #[test]
    fn trees_above_the_limit_become_erofs() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("d")).unwrap();
        let file = File::create(root.path().join("d/file")).unwrap();
        file.set_len(INITRAMFS_MAX).unwrap();
        assert_eq!(Survey::of(root.path()).unwrap().root_type(), RootType::Initramfs);
        fs::write(root.path().join("more"), "x").unwrap();
        assert_eq!(Survey::of(root.path()).unwrap().root_type(), RootType::Erofs);
    }

    #[test]
    fn hard_links_count_once_in_a_filesystem() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("a"), vec![1; 10_000]).unwrap();
        fs::hard_link(root.path().join("a"), root.path().join("b")).unwrap();
        let survey = Survey::of(root.path()).unwrap();
        assert_eq!((survey.bytes, survey.blocks), (20_000, 4 * BLOCK));
    }

    #[test]
    fn a_tree_that_an_initramfs_cannot_store_becomes_erofs() {
        let not_utf8 = OsStr::from_bytes(b"\xff");
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join(not_utf8), "").unwrap();
        let survey = Survey::of(root.path()).unwrap();
        assert_eq!(survey.root_type(), RootType::Erofs);
        assert!(survey.initramfs_obstacle().unwrap().ends_with("has a name that is not UTF-8"));
        let root = tempfile::tempdir().unwrap();
        symlink(not_utf8, root.path().join("link")).unwrap();
        assert!(
            Survey::of(root.path()).unwrap().initramfs_obstacle().unwrap().ends_with("that is not UTF-8")
        );
    }

    #[test]
    fn an_error_names_the_entry_that_cannot_be_in_a_root() {
        let root = tempfile::tempdir().unwrap();
        let error = |path: &Path| format!("{:#}", Survey::of(path).unwrap_err());
        assert!(error(&root.path().join("none")).ends_with("none: No such file or directory (os error 2)"));
        fs::write(root.path().join("file"), "").unwrap();
        assert!(error(&root.path().join("file")).ends_with("file: not a folder"));
        let _socket = std::os::unix::net::UnixListener::bind(root.path().join("socket")).unwrap();
        assert!(error(root.path()).ends_with("socket: it is a socket, which an image cannot contain"));
    }

    fn erofs(root: &Path, keep_owners: bool) -> Result<Vec<u8>> {
        let location = tempfile::tempdir()?;
        let target = location.path().join("root.erofs");
        make_erofs(root, &Survey::of(root)?, keep_owners, &target)?;
        Ok(fs::read(target)?)
    }

    #[test]
    fn equal_trees_give_equal_bytes() {
        let names = ["a", "b", "c"];
        let tree = |order: [usize; 3]| {
            let root = tempfile::tempdir().unwrap();
            for number in order {
                fs::write(root.path().join(names[number]), names[number].repeat(5000)).unwrap();
            }
            root
        };
        let (first, second) = (tree([0, 1, 2]), tree([2, 0, 1]));
        let later = std::time::SystemTime::now() + std::time::Duration::from_secs(99);
        File::options().write(true).open(second.path().join("a")).unwrap().set_modified(later).unwrap();
        let bytes = erofs(first.path(), false).unwrap();
        assert_eq!(bytes.len() % 4096, 0);
        assert!(bytes == erofs(second.path(), false).unwrap());
        fs::write(second.path().join("a"), "another").unwrap();
        assert!(bytes != erofs(second.path(), false).unwrap());
    }

    #[test]
    fn an_image_inside_its_own_tree_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let survey = Survey::of(root.path()).unwrap();
        let error = make_erofs(root.path(), &survey, false, &root.path().join("root.erofs")).unwrap_err();
        assert!(
            error.to_string().ends_with("would contain the image itself; choose another --out"),
            "{error}"
        );
    }

    #[test]
    fn a_tree_larger_than_the_free_space_is_refused_before_writing() {
        let root = tempfile::tempdir().unwrap();
        // Its content is a hole.
        File::create(root.path().join("large")).unwrap().set_len(1 << 42).unwrap();
        let error = erofs(root.path(), false).unwrap_err().to_string();
        assert!(error.contains(" needs 4194304 MiB, and "), "{error}");
    }

    #[test]
    #[ignore = "slow: cargo test --package xtask 100_000 -- --ignored"]
    fn a_tree_of_100_000_files_becomes_erofs() {
        let root = tempfile::tempdir().unwrap();
        for folder in 0..100 {
            let folder = root.path().join(folder.to_string());
            fs::create_dir(&folder).unwrap();
            for file in 0..1000 {
                fs::write(folder.join(file.to_string()), file.to_string()).unwrap();
            }
        }
        let survey = Survey::of(root.path()).unwrap();
        let location = tempfile::tempdir().unwrap();
        let target = location.path().join("root.erofs");
        make_erofs(root.path(), &survey, false, &target).unwrap();
        assert!(fs::metadata(&target).unwrap().len() <= survey.blocks + (1 << 20));
        let output = |program: &str, option: &str| {
            let output = Command::new(program).arg(option).arg(&target).output().unwrap();
            assert!(output.status.success(), "{output:?}");
            String::from_utf8(output.stdout).unwrap()
        };
        output("fsck.erofs", "-d1");
        let found = output("dump.erofs", "-S");
        let line = found.lines().find(|line| line.contains("regular file count")).unwrap();
        assert!(line.ends_with("100000"), "{line}");
    }
}
