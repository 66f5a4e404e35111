//! Converts the layers of an image to one filesystem.

use crate::digest::Digest;
use crate::erofs::{self, BLOCK, BlockWriter};
use crate::error::Error;
use crate::layer;
use crate::prepared::Record;
use crate::source::{Image, Store};
use crate::tree::{Kind, Tree};
use crate::user::{self, Users};
use rustix::fs::FallocateFlags;
use std::fs::File;
use std::os::unix::fs::FileExt;

/// Writes an image's filesystem to an empty file. `begin` is called before each layer with its number and the number of
/// layers.
pub(crate) fn convert(
    store: &Store,
    image: &Image,
    file: &File,
    begin: &mut dyn FnMut(usize, usize),
) -> Result<Record, Error> {
    let mut tree = Tree::new();
    let mut data = BlockWriter::new(file, BLOCK);
    let count = image.layers.len();
    let mut left = layer::MAX_UNPACKED;
    for (number, layer) in (1..).zip(&image.layers) {
        begin(number, count);
        layer::apply(store.layer(layer)?, layer.check, &mut left, &mut tree, &mut data)
            .map_err(|source| Error::Layer { number, count, source })?;
    }
    let written = data.finish().map_err(erofs::Error::Write);
    let size = written.and_then(|end| erofs::write(&tree, file, end, uuid(image.id)));
    let size = size.map_err(Error::Filesystem)?;
    for (start, length) in tree.unused_data() {
        let length = length.next_multiple_of(BLOCK);
        // On a host filesystem that cannot punch holes, the unreferenced data stays.
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let _ = rustix::fs::fallocate(file, hole, start, length);
    }
    let users = Users { passwd: text(&tree, file, "/etc/passwd")?, group: text(&tree, file, "/etc/group")? };
    Ok(Record::new(image.id, size, image.config.config.clone().unwrap_or_default(), users))
}

/// The filesystem's UUID (RFC 9562, version 8), derived from the image's id so that equal images have equal
/// filesystems.
fn uuid(id: Digest) -> [u8; 16] {
    let mut uuid = id.bytes().first_chunk::<16>().copied().unwrap_or_default();
    uuid[6] = uuid[6] & 0x0f | 0x80;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    uuid
}

/// The content of a text file of the image, or an empty string if the image does not have it.
fn text(tree: &Tree, file: &File, path: &'static str) -> Result<String, Error> {
    let Some(Kind::File { start, size }) = tree.find(path.as_bytes()).map(|node| &node.kind) else {
        return Ok(String::new());
    };
    if *size > user::MAX_FILE {
        return Err(Error::LargeUserFile(path));
    }
    let mut content = vec![0; usize::try_from(*size).unwrap_or_default()];
    file.read_exact_at(&mut content, *start)
        .map_err(|source| Error::Filesystem(erofs::Error::Write(source)))?;
    Ok(String::from_utf8_lossy(&content).into_owned())
}
