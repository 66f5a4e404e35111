//! Where the text of Kconfig files comes from.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// The largest Kconfig file that is read; the kernel's largest has 106 KiB.
pub const MAX_KCONFIG_BYTES: usize = 1 << 20;

/// Gives the bytes of a file of a kernel tree.
///
/// Closures are sources too, so that a test needs no files.
pub trait Source {
    /// Reads the file of this path, which is relative to the top of the tree and has no `..`.
    ///
    /// # Errors
    ///
    /// Whatever keeps the file from being read.
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
    /// The tree below this folder.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The folder.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }
}

impl Source for KernelTree {
    fn read(&self, path: &str) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        // One byte more than the limit, so that the reader sees that the file is too big.
        let limit = MAX_KCONFIG_BYTES as u64 + 1;
        File::open(self.root.join(path))?.take(limit).read_to_end(&mut bytes)?;
        Ok(bytes)
    }
}

/// The path of a sourced file from the top of the tree, free of `.` and `..`; `None` if it would
/// leave the tree. `folder` is what the name is relative to.
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
