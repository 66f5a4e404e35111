//! Paths, and how they lead through the tree.

use super::error::{Error, MAX_LINKS, Shown};
use super::{Kind, NodeId, Tree};

/// A walk through the tree by a path's names.
#[derive(Debug)]
pub(super) struct Way<'a> {
    path: &'a [u8],
    pub(super) at: NodeId,
    /// Names to come, the next one last.
    names: Vec<Vec<u8>>,
    links: usize,
}

impl<'a> Way<'a> {
    /// Begins at the root with a path's names.
    pub(super) fn new(tree: &Tree, path: &'a [u8], names: Vec<&[u8]>) -> Result<Self, Error> {
        tree.spend(names.len() + 1, path)?;
        let names = names.into_iter().rev().map(<[u8]>::to_vec).collect();
        Ok(Self { path, at: NodeId::ROOT, names, links: 0 })
    }

    /// The next name that is one: `..` leads to the parent, and the root's is the root.
    pub(super) fn next(&mut self, tree: &Tree) -> Result<Option<Vec<u8>>, Error> {
        while let Some(name) = self.names.pop() {
            if name != b".." {
                return Ok(Some(name));
            }
            let Kind::Directory(directory) = &tree.node(self.at).kind else {
                return Err(Error::NotADirectory(Shown::new(self.path)));
            };
            self.at = directory.parent;
        }
        Ok(None)
    }

    /// Goes on with a symbolic link's target.
    pub(super) fn follow(&mut self, tree: &Tree, target: &[u8]) -> Result<(), Error> {
        self.links += 1;
        if self.links > MAX_LINKS {
            return Err(Error::TooManyLinks(Shown::new(self.path)));
        }
        if target.starts_with(b"/") {
            self.at = NodeId::ROOT;
        }
        let names = target.split(|&byte| byte == b'/').rev();
        tree.spend(names.clone().count(), self.path)?;
        self.names.extend(names.filter(|name| !matches!(*name, b"" | b".")).map(<[u8]>::to_vec));
        Ok(())
    }
}

/// The names of an entry's path. `..` takes the name before it away and never leads above the root.
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
