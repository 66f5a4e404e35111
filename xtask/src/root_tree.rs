//! The tree that becomes an image's root filesystem: what is in it, which form fits it, and the EROFS file.

use crate::debian;
use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use rustix::fs::{Access, access, statvfs};
use std::collections::HashSet;
use std::fs::{self, Metadata};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::process::{Command, Stdio};

/// What an image's root filesystem is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum RootType {
    /// Files in memory, unpacked by the kernel while it boots
    Initramfs,
    /// A read-only disk below a writable overlay in memory
    Erofs,
}

/// A tree of more bytes than this becomes a disk: unpacking it would cost more than finding and mounting one
/// (`cargo xtask root-prices`).
const INITRAMFS_MAX: u64 = 3 << 20;
/// The same for every image, so that equal trees give equal bytes; nothing finds a root by it.
const UUID: &str = "6b696e64-6c69-4e67-8000-726f6f740000";
/// Bytes of a page, by which files and directories are rounded up.
const BLOCK: u64 = 4096;

/// What a tree consists of.
#[derive(Debug, Default)]
pub(crate) struct Survey {
    /// Bytes of all files and links, each name with its own content.
    bytes: u64,
    /// Bytes of a filesystem in which all names of a file share its content.
    blocks: u64,
    /// What an initramfs would lose or could not hold.
    beyond_initramfs: Option<String>,
    /// Files with several names that were seen under one.
    linked: HashSet<(u64, u64)>,
}

impl Survey {
    /// Looks at everything below a folder.
    ///
    /// # Errors
    /// Names what cannot be read, or cannot be part of an image.
    pub(crate) fn of(root: &Path) -> Result<Self> {
        if !root.metadata().with_context(|| format!("--root {}", root.display()))?.is_dir() {
            bail!("--root {}: it is not a folder", root.display());
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
            bail!("it is a socket, which has no meaning in an image");
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
        if self.beyond_initramfs.is_none() {
            self.beyond_initramfs = beyond_initramfs(path, metadata)?;
        }
        Ok(())
    }

    /// The form that suits the tree.
    pub(crate) const fn root_type(&self) -> RootType {
        if self.bytes > INITRAMFS_MAX || self.beyond_initramfs.is_some() {
            RootType::Erofs
        } else {
            RootType::Initramfs
        }
    }

    /// What is lost, or cannot be built, if the tree becomes an initramfs.
    pub(crate) fn beyond_initramfs(&self) -> Option<&str> {
        self.beyond_initramfs.as_deref()
    }
}

fn beyond_initramfs(path: &Path, metadata: &Metadata) -> Result<Option<String>> {
    let reason = if path.file_name().is_some_and(|name| name.to_str().is_none()) {
        "has a name that is not UTF-8"
    } else if metadata.len() > u64::from(u32::MAX) {
        "has 4 GiB or more"
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

/// Makes `target` an EROFS filesystem with a tree in it, the same for equal trees; the version of the tool.
///
/// Files are not compressed and each starts at a page, so that a guest that sees the file as memory can use its
/// pages as they are.
pub(crate) fn make_erofs(root: &Path, survey: &Survey, keep_owners: bool, target: &Path) -> Result<String> {
    debian::ensure_erofs_tools()?;
    let root = root.canonicalize()?;
    let place = target.parent().context("a file without a folder")?.canonicalize()?;
    if place.starts_with(&root) {
        bail!("--root {} would contain the image itself; choose another --out", root.display());
    }
    let disk = statvfs(&place).context("cannot ask for the free room")?;
    let free = disk.f_bavail.saturating_mul(disk.f_frsize);
    if survey.blocks > free {
        bail!(
            "{} needs {} MiB, and {} has {} MiB free",
            root.display(),
            survey.blocks >> 20,
            place.display(),
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
        bail!("mkfs.erofs could not make {}: {}", target.display(), words.trim());
    }
    let words = String::from_utf8_lossy(&output.stdout);
    Ok(words.lines().next().unwrap_or_default().trim_start_matches("mkfs.erofs ").to_owned())
}
