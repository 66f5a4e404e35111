//! Saving and restoring the content of guest memory.

use super::{GuestMemory, MemoryError};
use crate::layout::{PAGE, PAGE_SIZE};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

/// A sequence of pages with content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// Guest-physical address of the first page.
    pub start: u64,
    /// Number of pages of 4 KiB.
    pub pages: u32,
}

impl Extent {
    /// Length of the pages in bytes.
    #[must_use]
    pub fn length(&self) -> u64 {
        u64::from(self.pages) * PAGE_SIZE
    }
}

/// Up to this number of zero pages between two extents become a part of one extent: each extent is a mapping, which
/// costs every guest 10 us (exact lab), and zero pages are holes in the file.
const GAP_PAGES: u64 = 4096;

impl GuestMemory {
    /// The pages whose content is not only zeroes.
    ///
    /// # Errors
    /// When the host does not report which pages are populated.
    pub fn contents(&self) -> Result<Vec<Extent>, MemoryError> {
        self.contents_of(Pages::of)
    }

    /// The same, for a process that cannot open its page map. It reads pages that are not populated, for which the host has one page
    /// of zeroes.
    ///
    /// # Errors
    /// When memory cannot be read.
    pub(crate) fn contents_read(&self) -> Result<Vec<Extent>, MemoryError> {
        self.contents_of(|_, length| Pages::all_present(length))
    }

    fn contents_of(
        &self,
        pages: impl Fn(*mut u8, u64) -> io::Result<Pages>,
    ) -> Result<Vec<Extent>, MemoryError> {
        let files = super::lock(&self.files).clone();
        let mut extents = Extents::default();
        for region in self.inner.iter() {
            let (start, length) = (region.start_addr().0, region.len());
            let pages = pages(region.as_ptr(), length)
                .map_err(|source| MemoryError::Contents { address: start, source })?;
            for (number, is_populated) in (0..).zip(pages.entries().map(Pages::is_populated)) {
                let address = start + number * PAGE_SIZE;
                // A page of a mapped file has content even if it has not been read.
                let may_have_content = is_populated || files.iter().any(|range| range.contains(&address));
                if may_have_content && !self.is_zero(address)? {
                    extents.add(address, start, GAP_PAGES);
                }
            }
        }
        Ok(extents.0)
    }

    /// The pages of mapped files that have been copied because the guest or a device wrote to them. All pages if this
    /// process may not read its page map.
    ///
    /// # Errors
    /// When the host does not report the state of the pages.
    pub fn copied(&self) -> Result<Vec<Extent>, MemoryError> {
        let mut files = super::lock(&self.files).clone();
        files.sort_unstable_by_key(|file| file.start);
        self.pages_in(&files, Pages::is_private)
    }

    /// The pages that belong to this guest alone: copied ones of mapped files, and all others that are populated.
    ///
    /// # Errors
    /// When the host does not report the state of the pages.
    pub(crate) fn used(&self) -> Result<Vec<Extent>, MemoryError> {
        self.pages_in(&self.regions(), Pages::is_private)
    }

    /// Makes the host map each page of these extents by itself: it would otherwise map up to 15 pages around a page that is read, if
    /// they belong to the same mapping (`do_fault_around` in mm/memory.c). Of large extents, several pages are mapped together.
    pub(crate) fn separate_pages(&self, extents: &[Extent]) {
        /// Fewer than a process may have (`vm.max_map_count`, 65,530 by default).
        const MAPPINGS_MAX: u64 = 30_000;
        let all: u64 = extents.iter().map(|extent| u64::from(extent.pages)).sum();
        let unit = all.div_ceil(MAPPINGS_MAX).max(1) * PAGE_SIZE;
        for extent in extents {
            let ends = extent.start + extent.length();
            let mut start = extent.start;
            while start < ends {
                let length = unit.min(ends - start);
                if let Ok((host, size)) = self.host_range(start, length) {
                    // SAFETY: the range is this guest's own mapping. MADV_DONTFORK only matters for children, of which this process
                    // has none. If the host refuses, more pages count as read.
                    unsafe { libc::madvise(host.cast(), size, libc::MADV_DONTFORK) };
                }
                // The next one keeps its flags, so that the two are not merged.
                start += 2 * unit;
            }
        }
    }

    /// The pages of mapped files that are in this process's page tables, and have not been copied: those that the guest or a device
    /// has read, after [`Self::separate_pages`].
    ///
    /// # Errors
    /// When the host does not report the state of the pages.
    pub(crate) fn read_pages(&self) -> Result<Vec<Extent>, MemoryError> {
        self.pages_in(&self.regions(), Pages::is_of_a_file)
    }

    fn regions(&self) -> Vec<Range<u64>> {
        self.inner.iter().map(|region| region.start_addr().0..region.start_addr().0 + region.len()).collect()
    }

    /// The pages of these ranges whose entry in the page map is such a one.
    fn pages_in(&self, ranges: &[Range<u64>], is_such: fn(u64) -> bool) -> Result<Vec<Extent>, MemoryError> {
        let mut extents = Extents::default();
        for range in ranges {
            let (host, size) = self.host_range(range.start, range.end - range.start)?;
            let pages = Pages::of(host, size as u64)
                .map_err(|source| MemoryError::Contents { address: range.start, source })?;
            for (number, _) in (0..).zip(pages.entries()).filter(|(_, entry)| is_such(*entry)) {
                extents.add(range.start + number * PAGE_SIZE, range.start, 0);
            }
        }
        Ok(extents.0)
    }

    fn is_zero(&self, address: u64) -> Result<bool, MemoryError> {
        let mut page = [0; PAGE];
        self.read(GuestAddress(address), &mut page)?;
        Ok(page == [0; PAGE])
    }

    /// Maps pages of a file over guest memory, copy-on-write: the page at address `A` is at `offset` plus `A`, in bytes.
    ///
    /// # Errors
    /// When an extent is not RAM, or the host refuses the mapping.
    pub fn map_contents(&self, extents: &[Extent], file: &File, offset: u64) -> Result<(), MemoryError> {
        let outside =
            |extent: &Extent| MemoryError::Outside { address: extent.start, length: extent.length() };
        for extent in extents {
            let position = extent.start.checked_add(offset).ok_or_else(|| outside(extent))?;
            self.map_range(GuestAddress(extent.start), file, position, extent.length())?;
        }
        match extents {
            [first, .., last] | [first @ last] => {
                let length = last.start + last.length() - first.start;
                self.add_backing_file(file, GuestAddress(first.start), length)
            }
            [] => Ok(()),
        }
    }

    /// Makes the host keep files that are mapped over this range in huge pages, for all that map them. Some hosts and
    /// filesystems cannot: before Linux 6.1, and on other filesystems than tmpfs most. Returns whether the host did.
    pub(crate) fn collapse(&self, range: Range<u64>) -> bool {
        let Ok((host, size)) = self.host_range(range.start, range.end - range.start) else { return false };
        // SAFETY: `host_range` returned `size` bytes of this guest's own mapping, and MADV_COLLAPSE does not change their
        // content.
        unsafe { libc::madvise(host.cast(), size, libc::MADV_COLLAPSE) == 0 }
    }
}

/// Extents under construction, in ascending order.
#[derive(Debug, Default)]
struct Extents(Vec<Extent>);

impl Extents {
    /// Adds a page of the region that starts at `region`, and up to `gap` pages between the page and the last extent.
    fn add(&mut self, address: u64, region: u64, gap: u64) {
        if let Some(last) = self.0.last_mut()
            && last.start >= region
            && address - (last.start + last.length()) <= gap * PAGE_SIZE
            && let Ok(pages) = u32::try_from((address - last.start) / PAGE_SIZE + 1)
        {
            last.pages = pages;
            return;
        }
        self.0.push(Extent { start: address, pages: 1 });
    }
}

/// The page map of this process, which stays open: a process in a jail cannot open it. Returns `None` if this process may
/// not read it.
pub(crate) fn page_map() -> Option<&'static File> {
    static PAGE_MAP: OnceLock<Option<File>> = OnceLock::new();
    PAGE_MAP.get_or_init(|| File::open("/proc/self/pagemap").ok()).as_ref()
}

/// The page map entries of a mapping (Documentation/admin-guide/mm/pagemap.rst).
struct Pages(Vec<[u8; 8]>);

impl Pages {
    const PRESENT: u64 = 1 << 63;
    const SWAPPED: u64 = 1 << 62;
    const OF_A_FILE: u64 = 1 << 61;

    fn of(address: *mut u8, length: u64) -> io::Result<Self> {
        let mut pages = Self::all_present(length)?;
        // A process with elevated privileges may not read its page map. Then every page counts as populated.
        if let Some(file) = page_map() {
            file.read_exact_at(pages.0.as_flattened_mut(), (address.addr() / PAGE * 8) as u64)?;
        }
        Ok(pages)
    }

    fn all_present(length: u64) -> io::Result<Self> {
        let pages = usize::try_from(length.div_ceil(PAGE_SIZE)).map_err(io::Error::other)?;
        Ok(Self(vec![Self::PRESENT.to_le_bytes(); pages]))
    }

    fn entries(&self) -> impl Iterator<Item = u64> {
        self.0.iter().map(|entry| u64::from_le_bytes(*entry))
    }

    /// Whether a page is in memory or swapped out.
    const fn is_populated(entry: u64) -> bool {
        entry & (Self::PRESENT | Self::SWAPPED) != 0
    }

    /// Whether it is populated, and no page of a file: one of a private mapping of a file has been copied.
    const fn is_private(entry: u64) -> bool {
        Self::is_populated(entry) && entry & Self::OF_A_FILE == 0
    }

    /// Whether it is in memory, and a page of a file.
    const fn is_of_a_file(entry: u64) -> bool {
        entry & Self::PRESENT != 0 && entry & Self::OF_A_FILE != 0
    }
}

/// Whether extents are ascending, not empty, page-aligned, not overlapping, and within the ranges `ram`.
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
    fn pages_with_content_are_saved_and_restored() {
        let memory = GuestMemory::anonymous(64 * MIB).unwrap();
        memory.write(GuestAddress(5 * PAGE_SIZE), &[1]).unwrap();
        memory.write(GuestAddress(7 * PAGE_SIZE + 4095), &[2]).unwrap();
        memory.write(GuestAddress(5000 * PAGE_SIZE), &[0]).unwrap();
        memory.write(GuestAddress(10_000 * PAGE_SIZE), &[3]).unwrap();
        let extents = memory.contents().unwrap();
        assert_eq!(extents, [extent(5, 3), extent(10_000, 1)]);

        let file = tempfile::tempfile().unwrap();
        for number in [5, 6, 7, 10_000] {
            let mut page = [0; PAGE];
            memory.read(GuestAddress(number * PAGE_SIZE), &mut page).unwrap();
            file.write_all_at(&page, (number + 1) * PAGE_SIZE).unwrap();
        }
        let copy = GuestMemory::anonymous(64 * MIB).unwrap();
        copy.map_contents(&extents, &file, PAGE_SIZE).unwrap();
        assert_eq!(copy.contents().unwrap(), extents);
        let mut byte = [0];
        copy.read(GuestAddress(7 * PAGE_SIZE + 4095), &mut byte).unwrap();
        assert_eq!(byte, [2]);
    }

    #[test]
    fn pages_of_a_mapped_file_have_content() {
        let memory = GuestMemory::anonymous(8 * MIB).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 2 * PAGE]).unwrap();
        memory.map_file(GuestAddress(MIB), &file, 0, 2 * PAGE_SIZE).unwrap();
        assert_eq!(memory.contents().unwrap(), [extent(256, 2)]);
    }

    #[test]
    fn written_pages_are_copied() {
        let memory = GuestMemory::anonymous(8 * MIB).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7; 9 * PAGE], 0).unwrap();
        let at = |page: u64| GuestAddress(page * PAGE_SIZE);
        // In descending order, because the result is sorted by address.
        memory.map_file(at(1000), &file, 0, 2 * PAGE_SIZE).unwrap();
        memory.map_file(at(256), &file, 0, 9 * PAGE_SIZE).unwrap();
        memory.read(at(258), &mut [0; PAGE]).unwrap();
        memory.write(at(100), &[1]).unwrap();
        for page in [1001, 264, 260, 261] {
            memory.write(at(page), &[1]).unwrap();
        }
        let copied = [extent(260, 2), extent(264, 1), extent(1001, 1)];
        assert_eq!(memory.copied().unwrap(), copied);
    }

    #[test]
    fn pages_can_be_copied_in_advance() {
        let memory = GuestMemory::anonymous(8 * MIB).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7; 4 * PAGE], 0).unwrap();
        memory.map_file(GuestAddress(MIB), &file, 0, 4 * PAGE_SIZE).unwrap();
        memory.copy_in_advance(&[extent(257, 2)]).unwrap();
        assert_eq!(memory.copied().unwrap(), [extent(257, 2)]);
        file.write_all_at(&[8; 4 * PAGE], 0).unwrap();
        let mut bytes = [0; 4 * PAGE];
        memory.read(GuestAddress(MIB), &mut bytes).unwrap();
        assert_eq!([0, 1, 2, 3].map(|page| bytes[page * PAGE]), [8, 7, 7, 8]);
        let outside = memory.copy_in_advance(&[extent(2048, 1)]);
        assert!(matches!(outside, Err(MemoryError::Outside { .. })), "{outside:?}");
    }

    #[test]
    fn a_write_to_a_huge_page_of_a_file_shows_nowhere_else() {
        // Files in memory.
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.write_all_at(&vec![7; 4 << 20], 0).unwrap();
        let guests = [(); 2].map(|()| GuestMemory::anonymous(8 * MIB).unwrap());
        for guest in &guests {
            guest.map_contents(&[extent(0, 1024)], &file, 0).unwrap();
        }
        // Some hosts cannot, and have the same pages in another size.
        let _ = guests[0].collapse(2 * MIB..4 * MIB);
        let byte = |guest: &GuestMemory, address| {
            let mut byte = [0];
            guest.read(GuestAddress(address), &mut byte).unwrap();
            byte[0]
        };
        let address = 3 * MIB;
        assert_eq!(guests.each_ref().map(|guest| byte(guest, address)), [7, 7]);
        guests[0].write(GuestAddress(address), &[8]).unwrap();
        assert_eq!(guests.each_ref().map(|guest| byte(guest, address)), [8, 7]);
        assert_eq!(guests.each_ref().map(|guest| byte(guest, address + PAGE_SIZE)), [7, 7]);
        let mut in_file = [0];
        file.read_exact_at(&mut in_file, address).unwrap();
        assert_eq!(in_file, [7]);
        assert!(!guests[0].collapse(8 * MIB..10 * MIB), "outside of memory");
    }

    /// A truncated file causes an error instead of a signal.
    #[test]
    fn pages_of_a_truncated_file_are_not_copied() {
        let memory = GuestMemory::anonymous(8 * MIB).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(2 * PAGE_SIZE).unwrap();
        memory.map_file(GuestAddress(MIB), &file, 0, 2 * PAGE_SIZE).unwrap();
        file.set_len(PAGE_SIZE).unwrap();
        let copied = memory.copy_in_advance(&[extent(256, 2)]);
        assert!(matches!(copied, Err(MemoryError::Copy { address: 0x10_0000, .. })), "{copied:?}");
    }

    #[test]
    fn invalid_extents_are_refused() {
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
