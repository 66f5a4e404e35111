//! Initramfs archives (cpio, "newc"). Entries are sorted, timestamps are zero, and root owns every file unless the
//! caller keeps the owners, so that equal inputs give equal bytes.

use anyhow::{Context, Result, bail};
use cpio::newc::{self, Builder};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

const DIRECTORY: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const LINK: u32 = 0o120_000;

const ROOT: (u32, u32) = (0, 0);

#[derive(Clone, Debug)]
enum Content {
    Directory,
    File(PathBuf),
    Bytes(Vec<u8>),
    Link(String),
    Special { kind: u32, major: u32, minor: u32 },
}

#[derive(Clone, Debug)]
struct Entry {
    permissions: u32,
    /// User and group.
    owner: (u32, u32),
    content: Content,
}

/// An archive under construction; entries are keyed by their path inside it.
#[derive(Debug, Default)]
pub(crate) struct Archive {
    entries: BTreeMap<String, Entry>,
    /// Whether files of the host keep their owners; root owns everything else.
    pub(crate) keeps_owners: bool,
}

impl Archive {
    /// Adds a directory.
    pub(crate) fn directory(&mut self, path: &str, permissions: u32) -> Result<()> {
        self.insert(path, Entry { permissions, owner: ROOT, content: Content::Directory })
    }

    /// Adds a file of the host, and its parent directories.
    pub(crate) fn file(&mut self, path: &str, source: &Path, permissions: u32) -> Result<()> {
        self.insert(path, Entry { permissions, owner: ROOT, content: Content::File(source.into()) })
    }

    /// Adds a file with this content.
    pub(crate) fn bytes(&mut self, path: &str, bytes: Vec<u8>) -> Result<()> {
        self.insert(path, Entry { permissions: 0o644, owner: ROOT, content: Content::Bytes(bytes) })
    }

    /// Adds the content of a host directory, with its permissions.
    pub(crate) fn tree(&mut self, prefix: &str, source: &Path) -> Result<()> {
        for entry in fs::read_dir(source).with_context(|| format!("cannot read {}", source.display()))? {
            let entry = entry?;
            let Ok(name) = entry.file_name().into_string() else {
                bail!(
                    "{} has a name that is not UTF-8, which this archive cannot hold",
                    entry.path().display()
                );
            };
            let path = format!("{prefix}/{name}");
            self.node(&path, &entry.path())
                .with_context(|| format!("cannot add {}", entry.path().display()))?;
        }
        Ok(())
    }

    fn node(&mut self, path: &str, source: &Path) -> Result<()> {
        let metadata = source.symlink_metadata()?;
        let kind = metadata.file_type();
        let permissions = metadata.permissions().mode() & 0o7777;
        let owner = if self.keeps_owners { (metadata.uid(), metadata.gid()) } else { ROOT };
        if kind.is_dir() {
            self.insert(path, Entry { permissions, owner, content: Content::Directory })?;
            return self.tree(path, source);
        }
        let content = if kind.is_file() {
            Content::File(source.into())
        } else if kind.is_symlink() {
            let Ok(target) = fs::read_link(source)?.into_os_string().into_string() else {
                bail!("the link's target is not UTF-8");
            };
            Content::Link(target)
        } else if kind.is_socket() {
            bail!("it is a socket, which an image cannot contain");
        } else {
            let device = metadata.rdev();
            Content::Special {
                kind: metadata.mode() & 0o170_000,
                major: rustix::fs::major(device),
                minor: rustix::fs::minor(device),
            }
        };
        self.insert(path, Entry { permissions, owner, content })
    }

    /// Adds or replaces an entry, and adds its parent directories.
    fn insert(&mut self, path: &str, entry: Entry) -> Result<()> {
        let path = path.trim_matches('/');
        if path.is_empty() || path.split('/').any(|part| part.is_empty() || part == "." || part == "..") {
            bail!("{path:?} is not a path inside an archive");
        }
        for (index, _) in path.match_indices('/') {
            let above = Entry { permissions: 0o755, owner: ROOT, content: Content::Directory };
            self.entries.entry(path[..index].to_owned()).or_insert(above);
        }
        self.entries.insert(path.to_owned(), entry);
        Ok(())
    }

    /// Writes the archive.
    pub(crate) fn write(&self, mut output: impl Write) -> Result<()> {
        for (number, (path, entry)) in (1..).zip(&self.entries) {
            write_entry(&mut output, number, path, entry)
                .with_context(|| format!("cannot archive {path}"))?;
        }
        newc::trailer(&mut output)?;
        output.flush()?;
        Ok(())
    }
}

fn write_entry(output: &mut impl Write, number: u32, path: &str, entry: &Entry) -> Result<()> {
    let (user, group) = entry.owner;
    let builder =
        |kind: u32| Builder::new(path).ino(number).mode(kind | entry.permissions).uid(user).gid(group);
    let mut from_bytes = |builder: Builder, mut bytes: &[u8]| -> Result<()> {
        let mut writer = builder.write(&mut *output, u32::try_from(bytes.len())?);
        io::copy(&mut bytes, &mut writer)?;
        writer.finish()?;
        Ok(())
    };
    match &entry.content {
        Content::Directory => from_bytes(builder(DIRECTORY).nlink(2), &[]),
        Content::Bytes(bytes) => from_bytes(builder(FILE).nlink(1), bytes),
        Content::Link(target) => from_bytes(builder(LINK).nlink(1), target.as_bytes()),
        &Content::Special { kind, major, minor } => {
            from_bytes(builder(kind).nlink(1).rdev_major(major).rdev_minor(minor), &[])
        }
        Content::File(source) => {
            let mut file = File::open(source).with_context(|| format!("cannot read {}", source.display()))?;
            let size = u32::try_from(file.metadata()?.len()).context("files of 4 GiB and more do not fit")?;
            let mut writer = builder(FILE).nlink(1).write(&mut *output, size);
            // A file that grows while it is read must not spoil the archive.
            let copied = io::copy(&mut io::Read::take(&mut file, size.into()), &mut writer)?;
            if copied != u64::from(size) {
                bail!("{} changed while it was read", source.display());
            }
            writer.finish()?;
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let (mut rest, mut found) = (bytes, Vec::new());
        loop {
            let mut reader = newc::Reader::new(rest).unwrap();
            if reader.entry().is_trailer() {
                return found;
            }
            let (name, mode) = (reader.entry().name().to_owned(), reader.entry().mode());
            let mut content = Vec::new();
            io::Read::read_to_end(&mut reader, &mut content).unwrap();
            found.push((name, mode, content));
            rest = reader.finish().unwrap();
        }
    }

    #[test]
    fn equal_trees_give_equal_archives_in_path_order() {
        let source = tempfile::tempdir().unwrap();
        fs::create_dir_all(source.path().join("b/c")).unwrap();
        fs::write(source.path().join("b/c/x"), "hello").unwrap();
        fs::write(source.path().join("a"), "").unwrap();
        std::os::unix::fs::symlink("/b/c", source.path().join("l")).unwrap();
        fs::set_permissions(source.path().join("b/c/x"), fs::Permissions::from_mode(0o4755)).unwrap();
        let pack = || {
            let mut archive = Archive::default();
            archive.bytes("etc/deep/file", b"1".to_vec()).unwrap();
            archive.tree("", source.path()).unwrap();
            let mut bytes = Vec::new();
            archive.write(&mut bytes).unwrap();
            bytes
        };
        let first = pack();
        let found: Vec<_> = names(&first).into_iter().map(|(name, mode, _)| (name, mode)).collect();
        let expected = [
            ("a", 0o100_644),
            ("b", 0o040_755),
            ("b/c", 0o040_755),
            ("b/c/x", 0o104_755),
            ("etc", 0o040_755),
            ("etc/deep", 0o040_755),
            ("etc/deep/file", 0o100_644),
            ("l", 0o120_777),
        ];
        assert_eq!(found, expected.map(|(name, mode)| (name.to_owned(), mode)));
        assert_eq!(names(&first)[3].2, b"hello");
        let later = std::time::SystemTime::now() + std::time::Duration::from_secs(99);
        File::options().write(true).open(source.path().join("a")).unwrap().set_modified(later).unwrap();
        assert_eq!(first, pack(), "times do not matter");
    }

    #[test]
    fn owners_are_root_unless_they_are_kept() {
        let source = tempfile::tempdir().unwrap();
        let path = source.path().join("a");
        fs::write(&path, "").unwrap();
        // Only root may change the owner; for other users the file already has one that is not root.
        let _ = std::os::unix::fs::chown(&path, Some(1000), Some(100));
        let metadata = fs::metadata(&path).unwrap();
        for (keeps_owners, expected) in [(false, (0, 0)), (true, (metadata.uid(), metadata.gid()))] {
            let mut archive = Archive { keeps_owners, entries: BTreeMap::new() };
            archive.tree("", source.path()).unwrap();
            let mut bytes = Vec::new();
            archive.write(&mut bytes).unwrap();
            let reader = newc::Reader::new(&bytes[..]).unwrap();
            assert_eq!((reader.entry().uid(), reader.entry().gid()), expected);
        }
    }

    #[test]
    fn paths_outside_the_archive_are_refused() {
        let mut archive = Archive::default();
        for path in ["", "/", "..", "a/../b", "a//b", "./a"] {
            assert!(archive.bytes(path, vec![]).is_err(), "{path:?}");
        }
    }

    #[test]
    fn sockets_are_refused() {
        let source = tempfile::tempdir().unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(source.path().join("s")).unwrap();
        let error = Archive::default().tree("", source.path()).unwrap_err();
        assert!(format!("{error:#}").contains("it is a socket"), "{error:#}");
    }
}
