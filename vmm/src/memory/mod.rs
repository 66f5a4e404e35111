//! Guest memory: the host mapping of the guest's RAM.
//!
//! The memory is anonymous and not reserved: a page is allocated on the first access. Files can be mapped over it
//! copy-on-write, so that an initrd is neither read nor copied, and all guests of a host share its unmodified pages.
#![expect(unsafe_code, reason = "maps files over guest memory")]

mod backing;
mod contents;
mod mapped_file;

pub use backing::BackingFile;
pub(crate) use backing::watch;
pub(crate) use contents::page_map;
pub use contents::{Extent, are_valid};
pub use mapped_file::MappedFile;

use crate::layout::{self, PAGE_SIZE};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
};

/// An error of the allocation of guest memory or of an access to it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// The host refused to map guest memory.
    #[error("cannot map {mib} MiB of guest memory")]
    Map {
        /// Size of the mapping in MiB.
        mib: u64,
        /// The host's error.
        source: io::Error,
    },
    /// The host refused to map a file over guest memory.
    #[error("cannot map {length} bytes of a file at guest address {address:#x}")]
    MapFile {
        /// Guest-physical address of the mapping.
        address: u64,
        /// Length of the mapping in bytes.
        length: u64,
        /// The host's error.
        source: io::Error,
    },
    /// Pages of a mapped file could not be copied.
    #[error("cannot copy {length} bytes of a file at guest address {address:#x}")]
    Copy {
        /// Guest-physical address of the first page.
        address: u64,
        /// Length of the pages in bytes.
        length: u64,
        /// The host's error.
        source: io::Error,
    },
    /// A range that is not guest memory, or is not page-aligned where that is required.
    #[error("{length} bytes at guest address {address:#x} are outside guest memory")]
    Outside {
        /// Guest-physical address of the range.
        address: u64,
        /// Length of the range in bytes.
        length: u64,
    },
    /// The host does not report which pages are populated.
    #[error("cannot tell which pages of guest memory at {address:#x} are in use")]
    Contents {
        /// Guest-physical address of the region.
        address: u64,
        /// The host's error.
        source: io::Error,
    },
    /// A file could not be read into guest memory.
    #[error("cannot read {length} bytes of a file into guest address {address:#x}")]
    ReadFile {
        /// Guest-physical address of the destination.
        address: u64,
        /// Number of bytes to read.
        length: u64,
        /// The error of the host or the file.
        source: io::Error,
    },
}

/// The memory of one guest. Clones refer to the same memory.
#[derive(Clone, Debug)]
pub struct GuestMemory {
    inner: GuestMemoryMmap,
    /// Ranges over which files are mapped.
    files: Arc<Mutex<Vec<Range<u64>>>>,
    /// Files that are mapped beside the RAM (pmem devices).
    mapped: Arc<[PlacedFile]>,
    /// All files that are mapped over or beside the RAM.
    backing: Arc<Mutex<Vec<Arc<BackingFile>>>>,
}

/// A mapped file with its guest-physical address.
pub type PlacedFile = (GuestAddress, Arc<MappedFile>);

fn lock<T>(list: &Mutex<Vec<T>>) -> MutexGuard<'_, Vec<T>> {
    list.lock().unwrap_or_else(PoisonError::into_inner)
}

impl GuestMemory {
    /// Allocates anonymous memory of `bytes` bytes, at the addresses of [`layout::ram_ranges`].
    ///
    /// # Errors
    /// When the host refuses the mapping.
    pub fn anonymous(bytes: u64) -> Result<Self, MemoryError> {
        let failed = |source| MemoryError::Map { mib: bytes / layout::MIB, source };
        let mut regions = Vec::new();
        for (start, size) in layout::ram_ranges(bytes) {
            let size = usize::try_from(size).map_err(|_| failed(io::ErrorKind::OutOfMemory.into()))?;
            let mapping = MmapRegion::build(
                None,
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            )
            .map_err(|error| failed(io::Error::other(error)))?;
            prefer_huge_pages(&mapping);
            let region = GuestRegionMmap::new(mapping, start)
                .ok_or_else(|| failed(io::ErrorKind::OutOfMemory.into()))?;
            regions.push(region);
        }
        let inner =
            GuestMemoryMmap::from_regions(regions).map_err(|error| failed(io::Error::other(error)))?;
        Ok(Self { inner, files: Arc::default(), mapped: Arc::default(), backing: Arc::default() })
    }

    /// The same memory, with files mapped beside the RAM. Devices can transfer data from and to these as well.
    #[must_use]
    pub fn with_files(&self, files: Vec<PlacedFile>) -> Self {
        lock(&self.backing).extend(files.iter().map(|(_, file)| file.backing()));
        Self { mapped: files.into(), ..self.clone() }
    }

    /// Replaces the record of the files that are mapped beside the RAM, after [`MappedFile::take_over`].
    pub(crate) fn record_files(&self, files: impl Iterator<Item = PlacedFile>) {
        let mut backing = lock(&self.backing);
        backing.retain(|file| !file.is_shared());
        backing.extend(files.map(|(_, file)| file.backing()));
    }

    /// The files that are mapped beside the RAM.
    #[must_use]
    pub fn mapped_files(&self) -> &[PlacedFile] {
        &self.mapped
    }

    /// All files that are mapped over or beside the RAM.
    #[must_use]
    pub fn backing_files(&self) -> Vec<Arc<BackingFile>> {
        lock(&self.backing).clone()
    }

    /// The host address of a range that lies within one mapped file, which is writable if `is_written`; otherwise
    /// `None`. The mapping exists as long as this memory.
    pub(crate) fn file_address(
        &self,
        address: GuestAddress,
        length: usize,
        is_written: bool,
    ) -> Option<*mut u8> {
        let end = address.0.checked_add(length as u64)?;
        let holds = |(start, file): &&PlacedFile| {
            *start <= address && end <= start.0 + file.size() && (file.is_writable() || !is_written)
        };
        let (start, file) = self.mapped.iter().find(holds)?;
        Some(file.as_ptr().wrapping_add(usize::try_from(address.0 - start.0).ok()?))
    }

    /// The guest-physical addresses over which files are mapped.
    #[must_use]
    pub(crate) fn file_ranges(&self) -> Vec<Range<u64>> {
        lock(&self.files).clone()
    }

    /// The RAM as a `vm-memory` object.
    #[must_use]
    pub const fn inner(&self) -> &GuestMemoryMmap {
        &self.inner
    }

    /// End of the RAM below the device gap.
    #[must_use]
    pub fn low_end(&self) -> GuestAddress {
        let first = self.inner.iter().next();
        GuestAddress(first.map_or(0, |region| region.start_addr().0 + region.len()))
    }

    /// Writes bytes to guest memory.
    ///
    /// # Errors
    /// When a part of the range is not RAM.
    pub fn write(&self, address: GuestAddress, bytes: &[u8]) -> Result<(), MemoryError> {
        self.inner
            .write_slice(bytes, address)
            .map_err(|_| MemoryError::Outside { address: address.0, length: bytes.len() as u64 })
    }

    /// Reads bytes of guest memory.
    ///
    /// # Errors
    /// When a part of the range is not RAM.
    pub fn read(&self, address: GuestAddress, bytes: &mut [u8]) -> Result<(), MemoryError> {
        let length = bytes.len() as u64;
        self.inner.read_slice(bytes, address).map_err(|_| MemoryError::Outside { address: address.0, length })
    }

    /// Reads `length` bytes at `offset` of a file into guest memory.
    ///
    /// # Errors
    /// When a part of the range is not RAM, or the file is too short.
    pub fn read_file(
        &self,
        address: GuestAddress,
        file: &File,
        offset: u64,
        length: u64,
    ) -> Result<(), MemoryError> {
        use std::io::{Seek, SeekFrom};
        let failed = |source| MemoryError::ReadFile { address: address.0, length, source };
        let mut file = file;
        let size = usize::try_from(length).map_err(|_| failed(io::ErrorKind::InvalidInput.into()))?;
        file.seek(SeekFrom::Start(offset)).map_err(failed)?;
        // The host copies directly into guest memory.
        self.inner
            .read_exact_volatile_from(address, &mut file, size)
            .map_err(|error| failed(io::Error::other(error)))?;
        Ok(())
    }

    /// Excludes guest memory from core dumps of this process: it is private to the guest, and does not help to find the
    /// failure of this process. Files that are mapped later are not excluded.
    pub(crate) fn exclude_from_core_dumps(&self) {
        for region in self.inner.iter() {
            let Ok(size) = usize::try_from(region.len()) else { continue };
            // SAFETY: the range is this guest's own mapping, and MADV_DONTDUMP does not change its content. It cannot
            // fail for a valid mapping.
            unsafe { libc::madvise(region.as_ptr().cast(), size, libc::MADV_DONTDUMP) };
        }
    }

    /// Requests pages of 4 KiB for a sparsely accessed range: a huge page would be cleared completely on the first
    /// access. The range is truncated at the end of the RAM below the device gap.
    ///
    /// # Errors
    /// When the range is not RAM.
    pub fn use_small_pages(&self, range: Range<u64>) -> Result<(), MemoryError> {
        let end = range.end.min(self.low_end().0);
        let (target, size) = self.host_range(range.start, end.saturating_sub(range.start))?;
        // SAFETY: `host_range` returned `size` bytes of this guest's own mapping, and MADV_NOHUGEPAGE does not change
        // their content. Hosts without huge pages refuse it, which has the same effect.
        unsafe { libc::madvise(target.cast(), size, libc::MADV_NOHUGEPAGE) };
        Ok(())
    }

    /// Copies pages of files that are mapped over the RAM now instead of on the first write. On a host that does not
    /// support it (Linux before 5.14) they are copied on the first write.
    ///
    /// # Errors
    /// When an extent is not RAM, the files cannot be read, or the host is out of memory.
    pub fn copy_in_advance(&self, extents: &[Extent]) -> Result<(), MemoryError> {
        for extent in extents {
            let (host, size) = self.host_range(extent.start, extent.length())?;
            // SAFETY: `host_range` returned `size` bytes of this guest's own mapping, and MADV_POPULATE_WRITE does not
            // change their content.
            let result = unsafe { libc::madvise(host.cast(), size, libc::MADV_POPULATE_WRITE) };
            let error = io::Error::last_os_error();
            if result != 0 && error.raw_os_error() != Some(libc::EINVAL) {
                let address = extent.start;
                return Err(MemoryError::Copy { address, length: extent.length(), source: error });
            }
        }
        Ok(())
    }

    /// The host address and length of a contiguous range of RAM.
    fn host_range(&self, address: u64, length: u64) -> Result<(*mut u8, usize), MemoryError> {
        let outside = || MemoryError::Outside { address, length };
        let size = usize::try_from(length).map_err(|_| outside())?;
        let slice = self.inner.get_slice(GuestAddress(address), size).map_err(|_| outside())?;
        Ok((slice.ptr_guard_mut().as_ptr(), size))
    }

    /// Maps a part of a file over guest memory, copy-on-write: the guest sees the file's content, and its writes are
    /// private. `address`, `offset` and `length` are in bytes and multiples of the page size.
    ///
    /// If the file is truncated while the guest runs, the guest loses these pages ([`BackingFile`]); kernel files are
    /// therefore replaced by renaming, not rewritten.
    ///
    /// # Errors
    /// When the range is not page-aligned, contiguous RAM, or the host refuses the mapping.
    pub fn map_file(
        &self,
        address: GuestAddress,
        file: &File,
        offset: u64,
        length: u64,
    ) -> Result<(), MemoryError> {
        self.map_range(address, file, offset, length)?;
        self.add_backing_file(file, address, length)
    }

    /// Records a file that is mapped at this address, and possibly at others.
    fn add_backing_file(&self, file: &File, address: GuestAddress, length: u64) -> Result<(), MemoryError> {
        let failed = |source| MemoryError::MapFile { address: address.0, length, source };
        lock(&self.backing).push(Arc::new(BackingFile::new(file, false).map_err(failed)?));
        Ok(())
    }

    fn map_range(
        &self,
        address: GuestAddress,
        file: &File,
        offset: u64,
        length: u64,
    ) -> Result<(), MemoryError> {
        let outside = || MemoryError::Outside { address: address.0, length };
        if [address.0, offset, length].iter().any(|value| value % PAGE_SIZE != 0) || length == 0 {
            return Err(outside());
        }
        let (target, size) = self.host_range(address.0, length)?;
        let failed = |source| MemoryError::MapFile { address: address.0, length, source };
        let offset = libc::off_t::try_from(offset).map_err(|_| failed(io::ErrorKind::InvalidInput.into()))?;
        // SAFETY: `host_range` returned `size` bytes of this guest's own mapping, which stay mapped as long as `self`;
        // MAP_FIXED replaces exactly those pages, in the same address range and with the same access, so every pointer
        // into the mapping stays valid. Guest memory is only accessed through volatile slices, never through
        // references.
        let result = unsafe {
            libc::mmap(
                target.cast(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                offset,
            )
        };
        if result == libc::MAP_FAILED {
            return Err(failed(io::Error::last_os_error()));
        }
        lock(&self.files).push(address.0..address.0 + length);
        Ok(())
    }
}

/// Requests huge pages, which take one page fault instead of 512. Hosts without them ignore it.
fn prefer_huge_pages(mapping: &MmapRegion) {
    // SAFETY: the range is this mapping's own, and MADV_HUGEPAGE does not change its content.
    unsafe { libc::madvise(mapping.as_ptr().cast(), mapping.size(), libc::MADV_HUGEPAGE) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::MIB;
    use std::io::Write;

    fn file_of(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    fn read(memory: &GuestMemory, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        memory.inner().read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    #[test]
    fn a_mapped_file_is_copied_on_write() {
        let memory = GuestMemory::anonymous(4 * MIB).unwrap();
        let mut bytes = vec![0xaa; 8192];
        bytes[4096..].fill(0xbb);
        let file = file_of(&bytes);
        memory.map_file(GuestAddress(0x10_1000), &file, 4096, 4096).unwrap();
        assert_eq!(read(&memory, 0x10_0fff, 2), [0, 0xbb]);
        memory.write(GuestAddress(0x10_1000), &[1]).unwrap();
        assert_eq!(read(&memory, 0x10_1000, 2), [1, 0xbb]);
        use std::os::unix::fs::FileExt;
        let mut unchanged = [0];
        file.read_exact_at(&mut unchanged, 4096).unwrap();
        assert_eq!(unchanged, [0xbb]);
    }

    #[test]
    fn ranges_outside_memory_are_refused() {
        let memory = GuestMemory::anonymous(4 * MIB).unwrap();
        let file = file_of(&[1; 8192]);
        for (address, offset, length) in [
            (4 * MIB, 0, 4096),
            (4 * MIB - 4096, 0, 8192),
            (0x1001, 0, 4096),
            (0x1000, 1, 4096),
            (0x1000, 0, 1),
            (0x1000, 0, 0),
            (u64::MAX - 4095, 0, 4096),
        ] {
            let result = memory.map_file(GuestAddress(address), &file, offset, length);
            assert!(matches!(result, Err(MemoryError::Outside { .. })), "{address:#x} {offset} {length}");
        }
        assert!(memory.write(GuestAddress(4 * MIB - 1), &[0, 0]).is_err());
    }

    #[test]
    fn a_file_that_is_too_short_is_an_error() {
        let memory = GuestMemory::anonymous(4 * MIB).unwrap();
        let result = memory.read_file(GuestAddress(0), &file_of(&[1; 10]), 5, 6);
        assert!(matches!(result, Err(MemoryError::ReadFile { length: 6, .. })));
        memory.read_file(GuestAddress(0), &file_of(&[7; 10]), 5, 5).unwrap();
        assert_eq!(read(&memory, 0, 6), [7, 7, 7, 7, 7, 0]);
    }

    #[test]
    fn mapped_files_are_found_by_address() {
        let mapped = |writable| Arc::new(MappedFile::new(&file_of(&[7; 4096]), 4096, writable).unwrap());
        let (read_only, writable) = (mapped(false), mapped(true));
        let files =
            vec![(GuestAddress(1 << 32), read_only.clone()), (GuestAddress(2 << 32), writable.clone())];
        let memory = GuestMemory::anonymous(4 * MIB).unwrap().with_files(files);
        let found =
            |address, length, is_written| memory.file_address(GuestAddress(address), length, is_written);
        assert_eq!(found(1 << 32, 2 << 20, false), Some(read_only.as_ptr()));
        assert_eq!(found((2 << 32) + 5, 1, true), Some(writable.as_ptr().wrapping_add(5)));
        for (address, length, is_written) in [
            (1 << 32, 1, true),
            (1 << 32, (2 << 20) + 1, false),
            ((1 << 32) + (2 << 20), 1, false),
            ((1 << 32) - 1, 2, false),
            (0, 1, false),
            (u64::MAX, 2, false),
        ] {
            assert_eq!(found(address, length, is_written), None, "{address:#x} {length}");
        }
    }

    /// The flags of the mapping of this process at this address, from /proc/self/smaps.
    pub(super) fn flags(address: *const u8) -> String {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut is_in = false;
        for line in smaps.lines() {
            let range = line.split(' ').next().and_then(|range| range.split_once('-'));
            if let Some((start, end)) = range
                && let (Ok(start), Ok(end)) =
                    (usize::from_str_radix(start, 16), usize::from_str_radix(end, 16))
            {
                is_in = (start..end).contains(&address.addr());
            }
            if let Some(flags) = line.strip_prefix("VmFlags:").filter(|_| is_in) {
                return format!("{flags} ");
            }
        }
        panic!("{address:p} is not mapped")
    }

    #[test]
    fn core_dumps_exclude_guest_memory() {
        let file = file_of(&[1; 8192]);
        let memory = GuestMemory::anonymous(4096 * MIB).unwrap();
        memory.map_file(GuestAddress(MIB), &file, 0, 8192).unwrap();
        memory.exclude_from_core_dumps();
        for address in [0, MIB, MIB + 4096, 2 * MIB, layout::RAM_ABOVE_GAP.0] {
            let (host, _) = memory.host_range(address, 1).unwrap();
            assert!(flags(host).contains(" dd "), "{address:#x}: {}", flags(host));
        }
        for is_writable in [false, true] {
            let mapped = MappedFile::new(&file, 8192, is_writable).unwrap();
            // In the file, and beyond its end.
            for offset in [0, 8192] {
                let flags = flags(mapped.as_ptr().wrapping_add(offset));
                assert!(flags.contains(" dd "), "{offset}: {flags}");
            }
        }
    }

    #[test]
    fn memory_continues_above_the_device_gap() {
        let memory = GuestMemory::anonymous(4096 * MIB).unwrap();
        assert_eq!(memory.low_end(), layout::MMIO_GAP);
        memory.write(GuestAddress(layout::RAM_ABOVE_GAP.0 + 1024 * MIB - 1), &[1]).unwrap();
        assert!(memory.write(GuestAddress(layout::MMIO_GAP.0), &[1]).is_err());
    }
}
