//! The file format of a pre-booted kernel or a snapshot: state, then pages.
//!
//! ```text
//!      0  "KINDLING"  format: u32  length of the state: u32
//!     16  checksum of the state: u64
//!     24  state, in postcard's encoding
//!   2 Mi  guest memory: each page at 2 Mi plus its guest-physical address
//! ```
//! Integers are little-endian. Pages without content are holes. Offset and address differ by a multiple of 2 MiB, so that the
//! host can map huge pages of the file. The file appears by renaming, so that it is complete or absent.

use super::error::PrebootError;
use super::state::{FORMAT, State};
use crate::layout::{self, PAGE, PAGE_SIZE};
use crate::memory::{Extent, GuestMemory, MemoryError};
use rustix::fs::{FallocateFlags, Mode, OFlags};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use vm_memory::GuestAddress;

const MAGIC: [u8; 8] = *b"KINDLING";
const HEADER_LEN: usize = 24;
/// Maximum size in bytes of an encoded state: it takes 6 KiB, and 7 KiB for each of 16 vCPUs. Decoding a hostile state
/// takes up to 600 times its size in memory before it is rejected.
const STATE_MAX: u32 = 192 << 10;
/// Offset of the page at guest-physical address 0. It does not depend on the length of the state, which is written again
/// after the pages.
pub(super) const PAGES_OFFSET: u64 = 2 << 20;
const _: () = assert!(HEADER_LEN as u64 + STATE_MAX as u64 <= PAGES_OFFSET);

/// Opens a regular file. A symbolic link, or a file whose open or read could block, is an error.
pub(crate) fn open(path: &Path) -> Result<File, PrebootError> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let failed = |source| PrebootError::Read { path: path.into(), source };
    let not_a_file =
        || PrebootError::Invalid { path: path.into(), what: "it is not a regular file".to_owned() };
    let file = rustix::fs::open(path, flags, Mode::empty()).map(File::from);
    let file =
        file.map_err(|error| if error == Errno::LOOP { not_a_file() } else { failed(error.into()) })?;
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(not_a_file());
    }
    Ok(file)
}

/// Reads the state of a file, and checks that the file has all pages.
pub(super) fn read(file: &File, path: &Path) -> Result<State, PrebootError> {
    let failed = |source| PrebootError::Read { path: path.into(), source };
    let invalid = |what: &str| PrebootError::Invalid { path: path.into(), what: what.to_owned() };
    let length = file.metadata().map_err(failed)?.len();
    let mut header = [0; HEADER_LEN];
    file.read_exact_at(&mut header, 0).map_err(|_| invalid("it is shorter than its header"))?;
    let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    if header[..MAGIC.len()] != MAGIC {
        return Err(invalid("it has no valid magic number"));
    }
    if word(8) != FORMAT {
        return Err(invalid(&format!(
            "its format is version {}, but this program reads version {FORMAT}",
            word(8)
        )));
    }
    if word(12) > STATE_MAX {
        return Err(invalid("its state is too long"));
    }
    let mut bytes = vec![0; usize::try_from(word(12)).unwrap_or(0)];
    file.read_exact_at(&mut bytes, HEADER_LEN as u64).map_err(|_| invalid("it ends inside its state"))?;
    if header[16..] != checksum(&bytes).to_le_bytes() {
        return Err(invalid("its state does not match its checksum"));
    }
    let state: State = postcard::from_bytes(&bytes).map_err(|error| invalid(&error.to_string()))?;
    let ends = state.extents.iter().map(|extent| extent.start.saturating_add(extent.length()));
    if ends.max().unwrap_or(0).saturating_add(PAGES_OFFSET) > length {
        return Err(invalid("it ends before its last page"));
    }
    Ok(state)
}

/// Writes the state, over the previous one.
pub(super) fn write_state(file: &File, state: &State) -> io::Result<()> {
    file.write_all_at(&beginning(state)?, 0)
}

/// The beginning of a file with this state.
pub(super) fn beginning(state: &State) -> io::Result<Vec<u8>> {
    let mut bytes = postcard::to_extend(state, vec![0; HEADER_LEN]).map_err(io::Error::other)?;
    let (header, state) = bytes.split_at_mut(HEADER_LEN);
    let length = u32::try_from(state.len()).ok().filter(|&length| length <= STATE_MAX);
    let length = length.ok_or_else(|| io::Error::other("the state is too long"))?;
    header[..8].copy_from_slice(&MAGIC);
    header[8..12].copy_from_slice(&FORMAT.to_le_bytes());
    header[12..16].copy_from_slice(&length.to_le_bytes());
    header[16..].copy_from_slice(&checksum(state).to_le_bytes());
    Ok(bytes)
}

/// The greatest length of a file for a guest with this many bytes of memory.
pub(super) fn length_max(memory: u64) -> u64 {
    let end = |(start, length): (GuestAddress, u64)| start.0.saturating_add(length);
    PAGES_OFFSET + layout::ram_ranges(memory).into_iter().map(end).max().unwrap_or(0)
}

/// Finds bytes that were changed by accident: each step (FNV-1a, with words instead of bytes) is a bijection of the value before it
/// and of the word, so that any change of one word is found. Who changes a file on purpose can change this, too.
fn checksum(bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks();
    let mut last = [0; 8];
    last[..rest.len()].copy_from_slice(rest);
    let words = words.iter().chain([&last]).map(|word| u64::from_le_bytes(*word));
    words.fold(bytes.len() as u64 ^ 0xcbf2_9ce4_8422_2325, |sum, word| {
        (sum ^ word).wrapping_mul(0x0100_0000_01b3)
    })
}

/// Writes the pages of the extents.
pub(super) fn write_pages(file: &File, extents: &[Extent], memory: &GuestMemory) -> Result<(), WriteError> {
    each_page(extents, memory, &mut |offset, page| Ok(file.write_all_at(page, offset)?))?;
    let end = extents.last().map_or(0, |extent| extent.start + extent.length()) + PAGES_OFFSET;
    // The last pages may be a hole.
    file.set_len(end)?;
    // In memory, a guest that reads a hole makes it a page, and is killed if there is no space left: the space is taken now.
    if rustix::fs::fstatfs(file).is_ok_and(|status| status.f_type == libc::TMPFS_MAGIC) {
        for extent in extents {
            let start = PAGES_OFFSET + extent.start;
            rustix::fs::fallocate(file, FallocateFlags::empty(), start, extent.length())
                .map_err(io::Error::from)?;
        }
    }
    Ok(())
}

/// What is done with a page of guest memory, at an offset of the file.
type PageAction<'a> = &'a mut dyn FnMut(u64, &[u8; PAGE]) -> Result<(), WriteError>;

/// Calls `action` for each page of the extents that has content, with its offset in the file.
pub(super) fn each_page(
    extents: &[Extent],
    memory: &GuestMemory,
    action: PageAction<'_>,
) -> Result<(), WriteError> {
    let mut page = [0; PAGE];
    for extent in extents {
        for number in 0..u64::from(extent.pages) {
            let address = extent.start + number * PAGE_SIZE;
            memory.read(GuestAddress(address), &mut page)?;
            if page != [0; PAGE] {
                action(PAGES_OFFSET + address, &page)?;
            }
        }
    }
    Ok(())
}

/// Why a file could not be written.
#[derive(Debug, thiserror::Error)]
pub(super) enum WriteError {
    #[error(transparent)]
    File(#[from] io::Error),
    #[error(transparent)]
    Memory(#[from] MemoryError),
}
/// Reads a file with this state, and pages without content.
#[cfg(fuzzing)]
pub(super) fn decode(state: &[u8]) {
    let file = rustix::fs::memfd_create("preboot", rustix::fs::MemfdFlags::CLOEXEC).map(File::from).unwrap();
    let length = u32::try_from(state.len()).unwrap();
    let sum = checksum(state).to_le_bytes();
    let header = [&MAGIC[..], &FORMAT.to_le_bytes(), &length.to_le_bytes(), &sum, state].concat();
    file.write_all_at(&header, 0).unwrap();
    file.set_len(PAGES_OFFSET + (1 << 30)).unwrap();
    let _ = read(&file, Path::new("file"));
}
