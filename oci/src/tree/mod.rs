//! The merged file tree of an image in memory: names, attributes, and the position of each file's data.
//!
//! Paths are resolved in this tree, never in a filesystem of the host: `/` and `..` stay below its root, and a symbolic
//! link in a path leads where it would lead in the guest.

mod error;
mod node;
mod path_walk;

use crate::erofs::{attributes_size, is_known_attribute};
use error::{
    ATTRIBUTE_COST, DIRECTORY_COST, MAX_ATTRIBUTES, MAX_LOOKUPS, MAX_METADATA, MAX_NAME, MAX_PATH, NAME_COST,
    NODE_COST,
};
pub use error::{Error, Excerpt};
pub use node::{Attributes, Device, Kind, Node, NodeId, Time, Xattr};
use node::{DirEntry, empty_directory};
use path_walk::{PathWalk, normalise};
use std::cell::Cell;
use std::collections::BTreeMap;

/// The merged tree.
#[derive(Debug)]
pub struct Tree {
    nodes: Vec<Node>,
    layer: u32,
    metadata: usize,
    /// The number of names that were looked up, limited by `MAX_LOOKUPS`.
    lookups: Cell<usize>,
    /// Files of the present layer in aufs' directory of hard links, by name.
    pseudo_links: BTreeMap<Box<[u8]>, NodeId>,
}

/// The prefix of whiteouts.
const WHITEOUT: &[u8] = b".wh.";
/// The prefix of aufs' internal files.
const AUFS: &[u8] = b".wh..wh.";
/// The opaque marker: hides everything that lower layers have in its directory.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// aufs' directory of pseudo-links, files with several names.
const PSEUDO_LINKS: &[u8] = b".wh..wh.plnk";

/// Whether an entry is a pseudo-link: it appears in the image only under the names of hard links to it.
pub(crate) fn is_pseudo_link(path: &[u8]) -> bool {
    pseudo_link(path).is_some()
}

/// The name of an entry in aufs' directory of pseudo-links.
fn pseudo_link(path: &[u8]) -> Option<&[u8]> {
    let names = normalise(path);
    let (first, rest) = names.split_first()?;
    (*first == PSEUDO_LINKS).then(|| rest.last().copied())?
}

/// The components of a path whose length, content and last component are valid.
fn checked_names(path: &[u8]) -> Result<Vec<&[u8]>, Error> {
    if path.len() > MAX_PATH {
        return Err(Error::LongName(Excerpt::new(path)));
    }
    if path.contains(&0) {
        return Err(Error::ZeroByte(Excerpt::new(path)));
    }
    let names = normalise(path);
    if names.last().is_some_and(|name| name.len() > MAX_NAME) {
        return Err(Error::LongName(Excerpt::new(path)));
    }
    Ok(names)
}

impl Default for Tree {
    fn default() -> Self {
        Self::new()
    }
}

impl Tree {
    /// A tree with an empty root directory.
    #[must_use]
    pub fn new() -> Self {
        Self {
            nodes: vec![Node { links: 2, ..empty_directory(NodeId::ROOT) }],
            layer: 0,
            metadata: 0,
            lookups: Cell::new(0),
            pseudo_links: BTreeMap::new(),
        }
    }

    /// Starts the next layer, to which all following changes belong.
    pub fn begin_layer(&mut self) {
        self.layer += 1;
        self.pseudo_links.clear();
    }

    /// The number of nodes, with those that were replaced or deleted.
    pub(crate) const fn len(&self) -> usize {
        self.nodes.len()
    }

    pub(crate) fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.index()]
    }

    fn names(&self, id: NodeId) -> Option<&BTreeMap<Box<[u8]>, DirEntry>> {
        match &self.node(id).kind {
            Kind::Directory(directory) => Some(&directory.names),
            _ => None,
        }
    }

    fn names_mut(&mut self, id: NodeId) -> Option<&mut BTreeMap<Box<[u8]>, DirEntry>> {
        match &mut self.nodes[id.index()].kind {
            Kind::Directory(directory) => Some(&mut directory.names),
            _ => None,
        }
    }

    /// The entries of a directory, sorted by name.
    pub(crate) fn children(&self, directory: NodeId) -> impl Iterator<Item = (&[u8], NodeId)> {
        self.names(directory).into_iter().flatten().map(|(name, found)| (&**name, found.node))
    }

    /// Offset and length of the data of files that were replaced or deleted.
    pub(crate) fn unused_data(&self) -> impl Iterator<Item = (u64, u64)> {
        self.nodes.iter().filter_map(|node| match node.kind {
            Kind::File { start, size } if node.links == 0 && size > 0 => Some((start, size)),
            _ => None,
        })
    }

    /// Finds the node of a path and follows all symbolic links.
    #[must_use]
    pub fn find(&self, path: &[u8]) -> Option<&Node> {
        let id = self.walk(path, normalise(path)).ok()?;
        Some(self.node(id))
    }

    /// Finds the node of a path, without following a symbolic link in its last component.
    fn find_no_follow(&self, path: &[u8]) -> Result<Option<NodeId>, Error> {
        let mut names = normalise(path);
        let Some(name) = names.pop() else { return Ok(None) };
        match self.walk(path, names) {
            Ok(parent) => Ok(self.names(parent).and_then(|names| names.get(name)).map(|found| found.node)),
            Err(Error::NotADirectory(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Adds a file, which replaces the one at its path. A directory over a directory only changes the attributes.
    ///
    /// # Errors
    /// If the filesystem cannot hold the path or the attributes.
    pub fn insert(&mut self, path: &[u8], attributes: Attributes, mut kind: Kind) -> Result<(), Error> {
        let attributes = self.checked_attributes(path, attributes, &kind)?;
        if let Some(name) = pseudo_link(path) {
            checked_names(path)?;
            self.account_name(name)?;
            let id = self.add(Node { attributes, kind, links: 0 })?;
            self.pseudo_links.insert(name.into(), id);
            return Ok(());
        }
        let (parent, name) = self.parent_of(path)?;
        let old = match &name {
            Some(name) => self.names(parent).and_then(|names| names.get(*name)).map(|found| found.node),
            None => Some(NodeId::ROOT),
        };
        if let Kind::Directory(directory) = &mut kind {
            if let Some(old) = old.filter(|&old| self.names(old).is_some()) {
                self.nodes[old.index()].attributes = attributes;
                if let Some(name) = name {
                    self.claim(parent, name);
                }
                return Ok(());
            }
            directory.parent = parent;
        }
        let Some(name) = name else { return Err(Error::Root(Excerpt::new(path))) };
        let id = self.add(Node { attributes, kind, links: 0 })?;
        self.put(parent, name, id);
        Ok(())
    }

    /// Adds a hard link to a file.
    ///
    /// # Errors
    /// If the target does not exist or is a directory.
    pub fn link(&mut self, path: &[u8], target: &[u8]) -> Result<(), Error> {
        let no_file = || Error::HardLink(Excerpt::new(path), Excerpt::new(target));
        let id = match pseudo_link(target) {
            Some(name) => self.pseudo_links.get(name).copied(),
            None => self.find_no_follow(target)?,
        };
        let id = id.filter(|&id| self.names(id).is_none()).ok_or_else(no_file)?;
        let (parent, name) = self.parent_of(path)?;
        let Some(name) = name else { return Err(Error::Root(Excerpt::new(path))) };
        self.put(parent, name, id);
        Ok(())
    }

    /// Applies a whiteout: `.wh.NAME` hides what lower layers have at NAME, `.wh..wh..opq` what they have in its
    /// directory. Other names with the prefix `.wh..wh.` are internal files of aufs and are ignored. Returns false for
    /// all other paths.
    ///
    /// # Errors
    /// For a file below a whiteout, and for a whiteout of no name, `.` or `..`.
    pub fn whiteout(&mut self, path: &[u8]) -> Result<bool, Error> {
        let mut names = normalise(path);
        let Some(last) = names.pop() else { return Ok(false) };
        if names.iter().any(|name| name.starts_with(AUFS)) {
            return Ok(true);
        }
        if names.iter().any(|name| name.starts_with(WHITEOUT)) {
            return Err(Error::BelowWhiteout(Excerpt::new(path)));
        }
        let Some(hidden) = last.strip_prefix(WHITEOUT) else { return Ok(false) };
        if matches!(hidden, b"" | b"." | b"..") {
            return Err(Error::Whiteout(Excerpt::new(path)));
        }
        let is_opaque = last == OPAQUE;
        if last.starts_with(AUFS) && !is_opaque {
            return Ok(true);
        }
        match self.walk(path, names) {
            Ok(parent) if is_opaque => self.hide_children(parent),
            Ok(parent) => self.hide(parent, hidden),
            Err(Error::NotADirectory(_)) => {}
            Err(error) => return Err(error),
        }
        Ok(true)
    }

    fn hide(&mut self, parent: NodeId, name: &[u8]) {
        let Some(found) = self.names(parent).and_then(|names| names.get(name)).copied() else { return };
        if found.layer < self.layer {
            self.remove(parent, name);
        } else {
            self.hide_children(found.node);
        }
    }

    /// Removes the entries of lower layers from a directory.
    fn hide_children(&mut self, directory: NodeId) {
        let mut folders = vec![directory];
        while let Some(folder) = folders.pop() {
            let layer = self.layer;
            let Some(Kind::Directory(directory)) =
                self.nodes.get_mut(folder.index()).map(|node| &mut node.kind)
            else {
                continue;
            };
            // Everything that was added since belongs to this layer. Without this check, a layer with many opaque
            // markers would take quadratic time.
            if std::mem::replace(&mut directory.cleared, layer) == layer {
                continue;
            }
            let hidden: Vec<_> = directory.names.extract_if(.., |_, found| found.layer < layer).collect();
            folders.extend(directory.names.values().map(|found| found.node));
            for (_, found) in hidden {
                self.unlink(folder, found.node);
            }
        }
    }

    /// Adds a directory entry for a node, and unlinks the node of an earlier entry.
    fn put(&mut self, parent: NodeId, name: &[u8], id: NodeId) {
        let is_directory = self.names(id).is_some();
        // The new name is counted first, so that a file which is linked to itself never has zero links.
        self.nodes[id.index()].links += if is_directory { 2 } else { 1 };
        if is_directory {
            self.nodes[parent.index()].links += 1;
        }
        let found = DirEntry { node: id, layer: self.layer };
        let old = self.names_mut(parent).and_then(|names| names.insert(name.into(), found));
        if let Some(old) = old {
            self.unlink(parent, old.node);
        }
    }

    fn remove(&mut self, parent: NodeId, name: &[u8]) {
        let old = self.names_mut(parent).and_then(|names| names.remove(name));
        if let Some(old) = old {
            self.unlink(parent, old.node);
        }
    }

    /// Uncounts the name of a node in a directory, and of everything below it if it is a directory.
    fn unlink(&mut self, parent: NodeId, id: NodeId) {
        let mut gone = vec![(parent, id)];
        while let Some((parent, id)) = gone.pop() {
            let node = &mut self.nodes[id.index()];
            if let Kind::Directory(directory) = &mut node.kind {
                node.links = 0;
                gone.extend(std::mem::take(&mut directory.names).into_values().map(|found| (id, found.node)));
                let links = &mut self.nodes[parent.index()].links;
                *links = links.saturating_sub(1);
            } else {
                node.links -= 1;
            }
        }
    }

    /// Marks a name as belonging to the present layer, which protects it from the layer's own whiteouts.
    fn claim(&mut self, parent: NodeId, name: &[u8]) {
        let layer = self.layer;
        if let Some(found) = self.names_mut(parent).and_then(|names| names.get_mut(name)) {
            found.layer = layer;
        }
    }

    fn add(&mut self, node: Node) -> Result<NodeId, Error> {
        self.account(match node.kind {
            Kind::Directory(_) => NODE_COST + DIRECTORY_COST,
            _ => NODE_COST,
        })?;
        let id = u32::try_from(self.nodes.len()).map_err(|_| Error::TooMuchMetadata)?;
        self.nodes.push(node);
        Ok(NodeId(id))
    }

    fn account_name(&mut self, name: &[u8]) -> Result<(), Error> {
        self.account(2 * name.len() + NAME_COST)
    }

    fn account(&mut self, bytes: usize) -> Result<(), Error> {
        self.metadata = self.metadata.saturating_add(bytes);
        if self.metadata > MAX_METADATA { Err(Error::TooMuchMetadata) } else { Ok(()) }
    }

    /// Counts the lookups of a path against `MAX_LOOKUPS`.
    fn count_lookups(&self, lookups: usize, path: &[u8]) -> Result<(), Error> {
        self.lookups.set(self.lookups.get().saturating_add(lookups));
        if self.lookups.get() > MAX_LOOKUPS { Err(Error::TooManyLookups(Excerpt::new(path))) } else { Ok(()) }
    }

    /// Drops extended attributes that EROFS cannot hold, sorts the others, and checks all limits.
    fn checked_attributes(
        &mut self,
        path: &[u8],
        mut attributes: Attributes,
        kind: &Kind,
    ) -> Result<Attributes, Error> {
        let xattrs = &mut attributes.xattrs;
        xattrs.retain(|xattr| is_known_attribute(&xattr.name));
        xattrs.sort_by(|a, b| a.name.cmp(&b.name));
        // Of two with the same name, the later counts.
        xattrs.reverse();
        xattrs.dedup_by(|later, earlier| later.name == earlier.name);
        xattrs.reverse();
        // Otherwise the memory of the dropped ones would stay allocated without being counted.
        xattrs.shrink_to_fit();
        let size = attributes_size(xattrs);
        if size > MAX_ATTRIBUTES || xattrs.iter().any(|xattr| xattr.value.len() > u16::MAX.into()) {
            return Err(Error::LongAttributes(Excerpt::new(path)));
        }
        if let Kind::Symlink(target) = kind {
            if target.is_empty() || target.len() >= MAX_PATH {
                return Err(Error::LinkTarget(Excerpt::new(path), target.len()));
            }
            if target.contains(&0) {
                return Err(Error::ZeroByte(Excerpt::new(path)));
            }
            self.account(target.len())?;
        }
        self.account(usize::try_from(size).unwrap_or(usize::MAX) + attributes.xattrs.len() * ATTRIBUTE_COST)?;
        Ok(attributes)
    }

    /// The parent directory of a path, which is created if it is missing, and the last component, which the root does
    /// not have.
    fn parent_of<'p>(&mut self, path: &'p [u8]) -> Result<(NodeId, Option<&'p [u8]>), Error> {
        let mut names = checked_names(path)?;
        let name = names.pop();
        let parent = self.make_directories(path, names)?;
        self.account_name(name.unwrap_or_default())?;
        Ok((parent, name))
    }

    /// Walks to a directory, creates missing directories and marks existing ones as belonging to the present layer.
    fn make_directories(&mut self, path: &[u8], names: Vec<&[u8]>) -> Result<NodeId, Error> {
        let mut walk = PathWalk::new(self, path, names)?;
        while let Some(name) = walk.next(self)? {
            let found = self.names(walk.at).and_then(|names| names.get(&*name)).map(|found| found.node);
            match found.map(|id| (id, &self.node(id).kind)) {
                None => {
                    if name.len() > MAX_NAME {
                        return Err(Error::LongName(Excerpt::new(path)));
                    }
                    self.account_name(&name)?;
                    let id = self.add(empty_directory(walk.at))?;
                    self.put(walk.at, &name, id);
                    walk.at = id;
                }
                Some((id, Kind::Directory(_))) => {
                    self.claim(walk.at, &name);
                    walk.at = id;
                }
                Some((_, Kind::Symlink(target))) => walk.follow(self, target)?,
                Some(_) => return Err(Error::NotADirectory(Excerpt::new(path))),
            }
        }
        Ok(walk.at)
    }

    /// Finds the node of a path and follows all symbolic links.
    fn walk(&self, path: &[u8], names: Vec<&[u8]>) -> Result<NodeId, Error> {
        let not_there = || Error::NotADirectory(Excerpt::new(path));
        let mut walk = PathWalk::new(self, path, names)?;
        while let Some(name) = walk.next(self)? {
            let found = self.names(walk.at).and_then(|names| names.get(&*name)).ok_or_else(not_there)?;
            match &self.node(found.node).kind {
                Kind::Symlink(target) => walk.follow(self, target)?,
                _ => walk.at = found.node,
            }
        }
        Ok(walk.at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_counted() {
        let mut tree = Tree::new();
        let file = || Kind::File { start: 0, size: 0 };
        let mut counted = |path: &[u8]| {
            let before = tree.metadata;
            tree.insert(path, Attributes::default(), file()).unwrap();
            tree.metadata - before
        };
        assert_eq!(counted(b"name"), NODE_COST + NAME_COST + 8);
        assert_eq!(counted(b".wh..wh.plnk/name"), NODE_COST + NAME_COST + 8);
        let before = tree.metadata;
        tree.link(b"link", b".wh..wh.plnk/name").unwrap();
        assert_eq!(tree.metadata - before, NAME_COST + 8);
    }
}
