//! Path resolution in the tree.

use super::error::{Error, Excerpt, MAX_LINKS};
use super::{Kind, NodeId, Tree};

/// A path that is being resolved, component by component.
#[derive(Debug)]
pub(super) struct PathWalk<'a> {
    path: &'a [u8],
    /// The node that has been reached.
    pub(super) at: NodeId,
    /// The remaining components, in reverse order.
    names: Vec<Vec<u8>>,
    links: usize,
}

impl<'a> PathWalk<'a> {
    /// Starts at the root, with the components of a path.
    pub(super) fn new(tree: &Tree, path: &'a [u8], names: Vec<&[u8]>) -> Result<Self, Error> {
        tree.count_lookups(names.len() + 1, path)?;
        let names = names.into_iter().rev().map(<[u8]>::to_vec).collect();
        Ok(Self { path, at: NodeId::ROOT, names, links: 0 })
    }

    /// The next component that is not `..`, which moves to the parent. The parent of the root is the root.
    pub(super) fn next(&mut self, tree: &Tree) -> Result<Option<Vec<u8>>, Error> {
        while let Some(name) = self.names.pop() {
            if name != b".." {
                return Ok(Some(name));
            }
            let Kind::Directory(directory) = &tree.node(self.at).kind else {
                return Err(Error::NotADirectory(Excerpt::new(self.path)));
            };
            self.at = directory.parent;
        }
        Ok(None)
    }

    /// Continues with the target of a symbolic link.
    pub(super) fn follow(&mut self, tree: &Tree, target: &[u8]) -> Result<(), Error> {
        self.links += 1;
        if self.links > MAX_LINKS {
            return Err(Error::TooManyLinks(Excerpt::new(self.path)));
        }
        if target.starts_with(b"/") {
            self.at = NodeId::ROOT;
        }
        let names = target.split(|&byte| byte == b'/').rev();
        tree.count_lookups(names.clone().count(), self.path)?;
        self.names.extend(names.filter(|name| !matches!(*name, b"" | b".")).map(<[u8]>::to_vec));
        Ok(())
    }
}

/// The components of a path, without `.` and `..`. `..` removes the component before it and stays below the root.
pub(super) fn normalise(path: &[u8]) -> Vec<&[u8]> {
    let mut names = Vec::new();
    for name in path.split(|&byte| byte == b'/') {
        match name {
            b"" | b"." => {}
            b".." => drop(names.pop()),
            name => names.push(name),
        }
    }
    names
}
