//! The files of an image, merged from its layers, in memory: names and attributes, and where each file's data is.
//!
//! There is no filesystem that a name could escape to. Names are resolved in the tree: `/` and `..` never lead above
//! its root, and a symbolic link on the way leads where it would lead in the guest.

mod error;
mod node;
mod way;

use crate::erofs::{attributes_size, is_known_attribute};
use error::{
    ATTRIBUTE_COST, DIRECTORY_COST, MAX_ATTRIBUTES, MAX_METADATA, MAX_NAME, MAX_PATH, MAX_STEPS, NAME_COST,
    NODE_COST,
};
pub use error::{Error, Shown};
pub use node::{Attributes, Device, Kind, Node, NodeId, Time, Xattr};
use node::{Name, empty_directory};
use std::cell::Cell;
use std::collections::BTreeMap;
use way::{Way, normalise};

/// The merged tree.
#[derive(Debug)]
pub struct Tree {
    nodes: Vec<Node>,
    layer: u32,
    metadata: usize,
    /// Names that were looked up.
    steps: Cell<usize>,
    /// Files of this layer that have no name but aufs' own.
    pseudo_links: BTreeMap<Box<[u8]>, NodeId>,
}

/// What the name of a whiteout begins with.
const WHITEOUT: &[u8] = b".wh.";
/// What names begin with that aufs kept for itself.
const AUFS: &[u8] = b".wh..wh.";
/// Hides all that lower layers have in its directory.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Where aufs kept files that have several names.
const PSEUDO_LINKS: &[u8] = b".wh..wh.plnk";

/// Whether a file is one to which hard links of its layer lead, and nothing else of its name is wanted.
pub(crate) fn is_pseudo_link(path: &[u8]) -> bool {
    pseudo_link(path).is_some()
}

/// The name of a file in aufs' directory of files that have several names.
fn pseudo_link(path: &[u8]) -> Option<&[u8]> {
    let names = normalise(path);
    let (first, rest) = names.split_first()?;
    (*first == PSEUDO_LINKS).then(|| rest.last().copied())?
}

impl Default for Tree {
    fn default() -> Self {
        Self::new()
    }
}

impl Tree {
    /// A root and nothing in it.
    #[must_use]
    pub fn new() -> Self {
        Self {
            nodes: vec![Node { links: 2, ..empty_directory(NodeId::ROOT) }],
            layer: 0,
            metadata: 0,
            steps: Cell::new(0),
            pseudo_links: BTreeMap::new(),
        }
    }

    /// What follows belongs to the next layer.
    pub fn begin_layer(&mut self) {
        self.layer += 1;
        self.pseudo_links.clear();
    }

    /// Files there ever were.
    pub(crate) const fn len(&self) -> usize {
        self.nodes.len()
    }

    pub(crate) fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.index()]
    }

    fn names(&self, id: NodeId) -> Option<&BTreeMap<Box<[u8]>, Name>> {
        match &self.node(id).kind {
            Kind::Directory(directory) => Some(&directory.names),
            _ => None,
        }
    }

    fn names_mut(&mut self, id: NodeId) -> Option<&mut BTreeMap<Box<[u8]>, Name>> {
        match &mut self.nodes[id.index()].kind {
            Kind::Directory(directory) => Some(&mut directory.names),
            _ => None,
        }
    }

    /// Names in a directory, sorted.
    pub(crate) fn children(&self, directory: NodeId) -> impl Iterator<Item = (&[u8], NodeId)> {
        self.names(directory).into_iter().flatten().map(|(name, found)| (&**name, found.node))
    }

    /// Data of files that were replaced or deleted: where it begins and its length.
    pub(crate) fn dead_data(&self) -> impl Iterator<Item = (u64, u64)> {
        self.nodes.iter().filter_map(|node| match node.kind {
            Kind::File { start, size } if node.links == 0 && size > 0 => Some((start, size)),
            _ => None,
        })
    }

    /// The node of a path, all links followed.
    #[must_use]
    pub fn find(&self, path: &[u8]) -> Option<&Node> {
        let id = self.walk(path, normalise(path)).ok()?;
        Some(self.node(id))
    }

    /// The node of a path whose last name may be a symbolic link, which is not followed.
    fn named(&self, path: &[u8]) -> Result<Option<NodeId>, Error> {
        let mut names = normalise(path);
        let Some(name) = names.pop() else { return Ok(None) };
        match self.walk(path, names) {
            Ok(parent) => Ok(self.names(parent).and_then(|names| names.get(name)).map(|found| found.node)),
            Err(Error::NotADirectory(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Adds a file. What had its name is replaced, but a directory by a directory takes its attributes only.
    ///
    /// # Errors
    /// Where the name or the attributes are none that a filesystem has.
    pub fn insert(&mut self, path: &[u8], attributes: Attributes, mut kind: Kind) -> Result<(), Error> {
        let attributes = self.checked(path, attributes, &kind)?;
        if let Some(name) = pseudo_link(path) {
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
                    self.mention(parent, name);
                }
                return Ok(());
            }
            directory.parent = parent;
        }
        let Some(name) = name else { return Err(Error::Root(Shown::new(path))) };
        let id = self.add(Node { attributes, kind, links: 0 })?;
        self.put(parent, name, id);
        Ok(())
    }

    /// Gives a file another name.
    ///
    /// # Errors
    /// Where there is no such file.
    pub fn link(&mut self, path: &[u8], target: &[u8]) -> Result<(), Error> {
        let no_file = || Error::HardLink(Shown::new(path), Shown::new(target));
        let id = match pseudo_link(target) {
            Some(name) => self.pseudo_links.get(name).copied(),
            None => self.named(target)?,
        };
        let id = id.filter(|&id| self.names(id).is_none()).ok_or_else(no_file)?;
        let (parent, name) = self.parent_of(path)?;
        let Some(name) = name else { return Err(Error::Root(Shown::new(path))) };
        self.put(parent, name, id);
        Ok(())
    }

    /// Does what a layer wants with a name that is a request: `.wh.NAME` hides what lower layers have under NAME,
    /// `.wh..wh..opq` what they have in its directory. Other names with `.wh..wh.` in front are aufs' own and hide
    /// nothing. False for other names.
    ///
    /// # Errors
    /// For a file below a whiteout, and a whiteout that could hide more than a name.
    pub fn whiteout(&mut self, path: &[u8]) -> Result<bool, Error> {
        let mut names = normalise(path);
        let Some(last) = names.pop() else { return Ok(false) };
        if names.iter().any(|name| name.starts_with(AUFS)) {
            return Ok(true);
        }
        if names.iter().any(|name| name.starts_with(WHITEOUT)) {
            return Err(Error::BelowWhiteout(Shown::new(path)));
        }
        let Some(hidden) = last.strip_prefix(WHITEOUT) else { return Ok(false) };
        if matches!(hidden, b"" | b"." | b"..") {
            return Err(Error::Whiteout(Shown::new(path)));
        }
        let is_opaque = last == OPAQUE;
        if last.starts_with(AUFS) && !is_opaque {
            return Ok(true);
        }
        match self.walk(path, names) {
            Ok(parent) if is_opaque => self.hide_below(parent),
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
            self.hide_below(found.node);
        }
    }

    /// Hides what lower layers have in a directory.
    fn hide_below(&mut self, directory: NodeId) {
        let mut folders = vec![directory];
        while let Some(folder) = folders.pop() {
            let layer = self.layer;
            let Some(Kind::Directory(directory)) =
                self.nodes.get_mut(folder.index()).map(|node| &mut node.kind)
            else {
                continue;
            };
            // All that came since is this layer's own. Or else a layer of marks alone would take for ever.
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

    /// Puts a node under a name, in place of what was there.
    fn put(&mut self, parent: NodeId, name: &[u8], id: NodeId) {
        let is_directory = self.names(id).is_some();
        // First the new name, so that a file linked to itself is never without one.
        self.nodes[id.index()].links += if is_directory { 2 } else { 1 };
        if is_directory {
            self.nodes[parent.index()].links += 1;
        }
        let found = Name { node: id, layer: self.layer };
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

    /// A node lost its name in a directory; a directory loses all that is in it.
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

    /// The layer has said something about a name.
    fn mention(&mut self, parent: NodeId, name: &[u8]) {
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

    /// Counts names that are going to be looked up for a path.
    fn spend(&self, steps: usize, path: &[u8]) -> Result<(), Error> {
        self.steps.set(self.steps.get().saturating_add(steps));
        if self.steps.get() > MAX_STEPS { Err(Error::TooManySteps(Shown::new(path))) } else { Ok(()) }
    }

    /// Attributes that the filesystem can hold, in an order of their own.
    fn checked(&mut self, path: &[u8], mut attributes: Attributes, kind: &Kind) -> Result<Attributes, Error> {
        let xattrs = &mut attributes.xattrs;
        xattrs.retain(|xattr| is_known_attribute(&xattr.name));
        xattrs.sort_by(|a, b| a.name.cmp(&b.name));
        // Of two with one name the later counts.
        xattrs.reverse();
        xattrs.dedup_by(|later, earlier| later.name == earlier.name);
        xattrs.reverse();
        let size = attributes_size(xattrs);
        if size > MAX_ATTRIBUTES || xattrs.iter().any(|xattr| xattr.value.len() > u16::MAX.into()) {
            return Err(Error::LongAttributes(Shown::new(path)));
        }
        if let Kind::Symlink(target) = kind {
            if target.is_empty() || target.len() >= MAX_PATH {
                return Err(Error::LinkTarget(Shown::new(path), target.len()));
            }
            if target.contains(&0) {
                return Err(Error::ZeroByte(Shown::new(path)));
            }
            self.account(target.len())?;
        }
        self.account(usize::try_from(size).unwrap_or(usize::MAX) + attributes.xattrs.len() * ATTRIBUTE_COST)?;
        Ok(attributes)
    }

    /// The directory that a path's last name belongs to, which is made where it is missing, and the name; none for
    /// the root.
    fn parent_of<'p>(&mut self, path: &'p [u8]) -> Result<(NodeId, Option<&'p [u8]>), Error> {
        if path.len() > MAX_PATH {
            return Err(Error::LongName(Shown::new(path)));
        }
        if path.contains(&0) {
            return Err(Error::ZeroByte(Shown::new(path)));
        }
        let mut names = normalise(path);
        let name = names.pop();
        if name.is_some_and(|name| name.len() > MAX_NAME) {
            return Err(Error::LongName(Shown::new(path)));
        }
        let parent = self.make_way(path, names)?;
        self.account_name(name.unwrap_or_default())?;
        Ok((parent, name))
    }

    /// The directory of a path. What is missing is made; what is there has been mentioned by this layer.
    fn make_way(&mut self, path: &[u8], names: Vec<&[u8]>) -> Result<NodeId, Error> {
        let mut way = Way::new(self, path, names)?;
        while let Some(name) = way.next(self)? {
            let found = self.names(way.at).and_then(|names| names.get(&*name)).map(|found| found.node);
            match found.map(|id| (id, &self.node(id).kind)) {
                None => {
                    if name.len() > MAX_NAME {
                        return Err(Error::LongName(Shown::new(path)));
                    }
                    self.account_name(&name)?;
                    let id = self.add(empty_directory(way.at))?;
                    self.put(way.at, &name, id);
                    way.at = id;
                }
                Some((id, Kind::Directory(_))) => {
                    self.mention(way.at, &name);
                    way.at = id;
                }
                Some((_, Kind::Symlink(target))) => way.follow(self, target)?,
                Some(_) => return Err(Error::NotADirectory(Shown::new(path))),
            }
        }
        Ok(way.at)
    }

    /// The node of a path, all links followed; nothing is made.
    fn walk(&self, path: &[u8], names: Vec<&[u8]>) -> Result<NodeId, Error> {
        let not_there = || Error::NotADirectory(Shown::new(path));
        let mut way = Way::new(self, path, names)?;
        while let Some(name) = way.next(self)? {
            let found = self.names(way.at).and_then(|names| names.get(&*name)).ok_or_else(not_there)?;
            match &self.node(found.node).kind {
                Kind::Symlink(target) => way.follow(self, target)?,
                _ => way.at = found.node,
            }
        }
        Ok(way.at)
    }
}
