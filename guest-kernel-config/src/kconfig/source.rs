//! Sources of Kconfig files.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// Maximum size of a Kconfig file; the kernel's largest has 106 KiB.
pub const MAX_KCONFIG_BYTES: usize = 1 << 20;

/// Reads files of a kernel tree.
///
/// Closures implement it, so that tests need no files.
pub trait Source {
    /// Reads the file at this path, which is relative to the top of the tree and contains no `..`.
    ///
    /// # Errors
    ///
    /// When the file cannot be read.
    fn read(&self, path: &str) -> io::Result<Vec<u8>>;
}

impl<F: Fn(&str) -> io::Result<Vec<u8>>> Source for F {
    fn read(&self, path: &str) -> io::Result<Vec<u8>> {
        self(path)
    }
}

/// An unpacked kernel source tree.
#[derive(Debug, Clone)]
pub struct KernelTree {
    root: PathBuf,
}

impl KernelTree {
    /// The tree in this directory.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The directory.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }
}

impl Source for KernelTree {
    fn read(&self, path: &str) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        // One byte more than the limit, so that the reader detects files over the limit.
        let limit = MAX_KCONFIG_BYTES as u64 + 1;
        File::open(self.root.join(path))?.take(limit).read_to_end(&mut bytes)?;
        Ok(bytes)
    }
}

/// The path of a sourced file relative to the top of the tree, without `.` and `..`. Returns `None` if it is outside
/// the tree. The name is relative to `folder`.
pub(super) fn path_in_tree(folder: &str, name: &str) -> Option<String> {
    if name.starts_with('/') {
        return None;
    }
    let mut parts: Vec<&str> = Vec::new();
    for part in folder.split('/').chain(name.split('/')) {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop()?;
            }
            part => parts.push(part),
        }
    }
    (!parts.is_empty()).then(|| parts.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_reads_files_below_its_root() {
        let tree = KernelTree::new(env!("CARGO_MANIFEST_DIR"));
        assert!(tree.read("src/lib.rs").unwrap().starts_with(b"//! "));
        assert!(tree.read("no/such/file").is_err());
    }

    #[test]
    fn paths_stay_in_the_tree() {
        let cases = [
            ("", "net/Kconfig", Some("net/Kconfig")),
            ("", "./arch/x86/Kconfig", Some("arch/x86/Kconfig")),
            ("net/sched", "../Kconfig", Some("net/Kconfig")),
            ("", "../Kconfig", None),
            ("net", "../../Kconfig", None),
            ("", "/etc/passwd", None),
            ("", "", None),
        ];
        for (folder, name, path) in cases {
            assert_eq!(path_in_tree(folder, name).as_deref(), path, "{folder} {name}");
        }
    }
}
