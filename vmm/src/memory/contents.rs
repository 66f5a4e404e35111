//! What there is in guest memory, and putting it back.

use super::{GuestMemory, MemoryError};
use crate::layout::{self, PAGE, PAGE_SIZE};
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

/// Pages in a row that are worth keeping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// Guest-physical address of the first.
    pub start: u64,
    /// Number of pages of 4 KiB.
    pub pages: u32,
}

impl Extent {
    /// Bytes that the pages take.
    #[must_use]
    pub fn length(&self) -> u64 {
        u64::from(self.pages) * PAGE_SIZE
    }
}

/// So many pages without content between two extents become a part of one: an extent is a mapping, which
/// costs every guest 10 us (exact lab), and pages without content are holes of the file.
const GAP_PAGES: u64 = 4096;

impl GuestMemory {
    /// The pages that hold something else than zeroes.
    ///
    /// # Errors
    /// When the host does not say which pages it has.
    pub fn contents(&self) -> Result<Vec<Extent>, MemoryError> {
        let files = super::lock_ranges(&self.files).clone();
        let mut extents = Extents::default();
        for region in self.inner.iter() {
            let (start, length) = (region.start_addr().0, region.len());
            let kept = kept_pages(region.as_ptr(), length)
                .map_err(|source| MemoryError::Contents { address: start, source })?;
            for (number, is_kept) in (0..).zip(kept) {
                let address = start + number * PAGE_SIZE;
                // A page of a file has content whether the host has read it yet or not.
                let is_known = is_kept || files.iter().any(|range| range.contains(&address));
                if is_known && !self.is_zero(address)? {
                    extents.add(address, start);
                }
            }
        }
        Ok(extents.0)
    }

    fn is_zero(&self, address: u64) -> Result<bool, MemoryError> {
        let mut page = [0; PAGE];
        self.read(GuestAddress(address), &mut page)?;
        Ok(page == [0; PAGE])
    }

    /// Lays the pages of a file over guest memory, copy-on-write, those of each extent in turn.
    ///
    /// # Errors
    /// When an extent is not guest memory, or the host refuses.
    pub fn map_contents(&self, extents: &[Extent], file: &File, offset: u64) -> Result<(), MemoryError> {
        let mut position = offset;
        for extent in extents {
            self.map_file(GuestAddress(extent.start), file, position, extent.length())?;
            position += extent.length();
        }
        Ok(())
    }
}

impl GuestMemory {
    /// Reads the pages of a file into guest memory, those of each extent in turn; holes of the file are left
    /// out, and what is longest is mapped: the kernel's list of pages, 16 MiB for each GiB of memory, of which
    /// a start needs little.
    ///
    /// # Errors
    /// When an extent is not guest memory, or the file cannot be read.
    pub fn read_contents(&self, extents: &[Extent], file: &File, offset: u64) -> Result<(), MemoryError> {
        let mut position = offset;
        for extent in extents {
            let end = position + extent.length();
            let mut from = position;
            while let Some(data) = next_data(file, from, end) {
                let address = GuestAddress(extent.start + (data.start - position));
                let length = data.end - data.start;
                if length >= LONG {
                    self.map_file(address, file, data.start, length)?;
                } else {
                    self.read_file(address, file, data.start, length)?;
                }
                from = data.end;
            }
            position = end;
        }
        Ok(())
    }
}

/// Bytes in a row that are longer than anything that a kernel writes to all over.
const LONG: u64 = 8 * layout::MIB;

/// The next part of a file that is no hole, from `from` on and before `end`. A file system that does not know
/// its holes has none.
fn next_data(file: &File, from: u64, end: u64) -> Option<Range<u64>> {
    if from >= end {
        return None;
    }
    let start = match seek(file, SeekFrom::Data(from)) {
        Ok(start) => start,
        // There is nothing but a hole up to the end of the file.
        Err(Errno::NXIO) => return None,
        Err(_) => return Some(from..end),
    };
    let stop = seek(file, SeekFrom::Hole(start)).unwrap_or(end).min(end);
    (start < end).then_some(start..stop)
}

/// Extents under construction, from low addresses to high ones.
#[derive(Debug, Default)]
struct Extents(Vec<Extent>);

impl Extents {
    /// Adds a page of the region that starts at `region`.
    fn add(&mut self, address: u64, region: u64) {
        if let Some(last) = self.0.last_mut()
            && last.start >= region
            && address - (last.start + last.length()) <= GAP_PAGES * PAGE_SIZE
            && let Ok(pages) = u32::try_from((address - last.start) / PAGE_SIZE + 1)
        {
            last.pages = pages;
            return;
        }
        self.0.push(Extent { start: address, pages: 1 });
    }
}

/// For each page of a mapping, whether the host keeps it anywhere: in memory or in swap
/// (Documentation/admin-guide/mm/pagemap.rst).
fn kept_pages(address: *mut u8, length: u64) -> io::Result<Vec<bool>> {
    const PRESENT_OR_SWAPPED: u64 = 1 << 63 | 1 << 62;
    const ENTRY: usize = size_of::<u64>();
    let pages = usize::try_from(length.div_ceil(PAGE_SIZE)).map_err(io::Error::other)?;
    let mut entries = vec![0; pages * ENTRY];
    let first = address.addr() / PAGE * ENTRY;
    match File::open("/proc/self/pagemap") {
        Ok(file) => file.read_exact_at(&mut entries, first as u64)?,
        // A program with privileges of its own may not look. Then every page has to be.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Ok(vec![true; pages]),
        Err(error) => return Err(error),
    }
    let entries = entries.as_chunks::<ENTRY>().0;
    Ok(entries.iter().map(|entry| u64::from_le_bytes(*entry) & PRESENT_OR_SWAPPED != 0).collect())
}

/// Whether extents are whole pages in ascending order that do not overlap, inside these ranges.
#[must_use]
pub fn are_valid(extents: &[Extent], ram: &[Range<u64>]) -> bool {
    let fits = |extent: &Extent| {
        let end = extent.start.checked_add(extent.length());
        extent.pages > 0
            && extent.start.is_multiple_of(PAGE_SIZE)
            && end.is_some_and(|end| ram.iter().any(|r| r.start <= extent.start && end <= r.end))
    };
    extents.iter().all(fits)
        && extents.windows(2).all(|pair| pair[0].start + pair[0].length() <= pair[1].start)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::MIB;
    use std::io::Write;

    const fn extent(page: u64, pages: u32) -> Extent {
        Extent { start: page * PAGE_SIZE, pages }
    }

    #[test]
    fn pages_with_content_are_found_and_put_back() {
        let memory = GuestMemory::anonymous(64 * MIB).unwrap();
        memory.write(GuestAddress(5 * PAGE_SIZE), &[1]).unwrap();
        memory.write(GuestAddress(7 * PAGE_SIZE + 4095), &[2]).unwrap();
        memory.write(GuestAddress(5000 * PAGE_SIZE), &[0]).unwrap();
        memory.write(GuestAddress(10_000 * PAGE_SIZE), &[3]).unwrap();
        let extents = memory.contents().unwrap();
        assert_eq!(extents, [extent(5, 3), extent(10_000, 1)]);

        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[0; PAGE]).unwrap();
        for number in [5, 6, 7, 10_000] {
            let mut page = [0; PAGE];
            memory.read(GuestAddress(number * PAGE_SIZE), &mut page).unwrap();
            file.write_all(&page).unwrap();
        }
        let copy = GuestMemory::anonymous(64 * MIB).unwrap();
        copy.map_contents(&extents, &file, PAGE_SIZE).unwrap();
        assert_eq!(copy.contents().unwrap(), extents);
        let mut byte = [0];
        copy.read(GuestAddress(7 * PAGE_SIZE + 4095), &mut byte).unwrap();
        assert_eq!(byte, [2]);
        let copy = GuestMemory::anonymous(64 * MIB).unwrap();
        copy.read_contents(&extents, &file, PAGE_SIZE).unwrap();
        assert_eq!(copy.contents().unwrap(), extents);
    }

    #[test]
    fn what_is_long_is_mapped() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![1; 9 << 20]).unwrap();
        let memory = GuestMemory::anonymous(16 * MIB).unwrap();
        memory.read_contents(&[extent(256, 2304)], &file, 0).unwrap();
        let mapped = super::super::lock_ranges(&memory.files).clone();
        assert!(
            !mapped.is_empty() && mapped.iter().all(|range| range.end - range.start >= LONG),
            "{mapped:?}"
        );
        assert_eq!(memory.contents().unwrap(), [extent(256, 2304)]);
    }

    #[test]
    fn holes_of_a_file_are_not_read() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[1; PAGE]).unwrap();
        file.set_len(9 * PAGE_SIZE).unwrap();
        file.write_all_at(&[2; PAGE], 6 * PAGE_SIZE).unwrap();
        assert_eq!(next_data(&file, 0, 9 * PAGE_SIZE), Some(0..PAGE_SIZE));
        assert_eq!(next_data(&file, PAGE_SIZE, 9 * PAGE_SIZE), Some(6 * PAGE_SIZE..7 * PAGE_SIZE));
        assert_eq!(next_data(&file, PAGE_SIZE, 6 * PAGE_SIZE), None);
        assert_eq!(next_data(&file, 7 * PAGE_SIZE, 9 * PAGE_SIZE), None);
        let memory = GuestMemory::anonymous(MIB).unwrap();
        memory.read_contents(&[extent(3, 9)], &file, 0).unwrap();
        assert_eq!(memory.contents().unwrap(), [extent(3, 7)]);
    }

    #[test]
    fn pages_of_a_mapped_file_are_content() {
        let memory = GuestMemory::anonymous(8 * MIB).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 2 * PAGE]).unwrap();
        memory.map_file(GuestAddress(MIB), &file, 0, 2 * PAGE_SIZE).unwrap();
        assert_eq!(memory.contents().unwrap(), [extent(256, 2)]);
    }

    #[test]
    fn extents_that_no_guest_has_are_not_valid() {
        let ram = [0..16 * PAGE_SIZE, 64 * PAGE_SIZE..80 * PAGE_SIZE];
        assert!(are_valid(&[], &ram));
        assert!(are_valid(&[extent(0, 2), extent(2, 14), extent(64, 16)], &ram));
        for wrong in [
            vec![extent(0, 0)],
            vec![extent(15, 2)],
            vec![extent(16, 1)],
            vec![extent(0, 2), extent(1, 1)],
            vec![extent(64, 1), extent(0, 1)],
            vec![Extent { start: 1, pages: 1 }],
            vec![Extent { start: u64::MAX - 4095, pages: u32::MAX }],
        ] {
            assert!(!are_valid(&wrong, &ram), "{wrong:?}");
        }
    }
}
