//! A file that is mapped such that a guest can use it as memory.

use super::BackingFile;
use crate::layout::HUGE_PAGE_SIZE;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, PoisonError};

/// A shared mapping of a complete file: all processes that map or read the file share its pages in the page cache.
/// Start and end are multiples of 2 MiB; after the end of the file the mapping contains zeroes.
#[derive(Debug)]
pub struct MappedFile {
    /// The reserved address range, including the padding before the mapping.
    reserved: *mut libc::c_void,
    reserved_size: usize,
    start: *mut libc::c_void,
    size: usize,
    /// Length of the file in bytes.
    length: usize,
    is_writable: bool,
    backing: Mutex<Arc<BackingFile>>,
}

// SAFETY: the mapping is not bound to a thread, and is not accessed through this structure.
unsafe impl Send for MappedFile {}
// SAFETY: as above; all methods but `drop` only read its address and size.
unsafe impl Sync for MappedFile {}

impl MappedFile {
    /// Maps the first `length` bytes, at least one, of a file.
    ///
    /// If another process truncates the file, a guest that accesses the lost pages ends ([`BackingFile`]).
    ///
    /// # Errors
    /// When the host refuses the mapping: the address space is exhausted, or the file does not support mappings.
    pub fn new(file: &File, length: u64, is_writable: bool) -> io::Result<Self> {
        Self::in_window(file, length, length, is_writable)
    }

    /// The same at the start of a mapping of `window` bytes, at least `length`, rounded up to a multiple of 2 MiB.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn in_window(file: &File, length: u64, window: u64, is_writable: bool) -> io::Result<Self> {
        let too_large = |_| io::Error::from_raw_os_error(libc::EFBIG);
        let align = usize::try_from(HUGE_PAGE_SIZE).map_err(too_large)?;
        let length = usize::try_from(length).map_err(too_large)?;
        let window = usize::try_from(window.max(length as u64)).map_err(too_large)?;
        let size = window.checked_next_multiple_of(align);
        let size = size.ok_or_else(|| io::Error::from_raw_os_error(libc::EFBIG))?;
        let backing = Mutex::new(Arc::new(BackingFile::new(file, true)?));
        let protection = libc::PROT_READ | if is_writable { libc::PROT_WRITE } else { 0 };
        let reserved_size = size.saturating_add(align);
        // SAFETY: a mapping at an address of the kernel's choice replaces nothing.
        let reserved = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            libc::mmap(std::ptr::null_mut(), reserved_size, protection, flags, -1, 0)
        };
        if reserved == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = reserved.wrapping_byte_add(reserved.addr().next_multiple_of(align) - reserved.addr());
        let this = Self { reserved, reserved_size, start, size, length, is_writable, backing };
        // SAFETY: the file lies within the range that was just reserved and is not in use yet: the reservation is 2 MiB
        // larger than needed, so that the file fits after the first multiple of 2 MiB.
        let mapped = unsafe {
            let flags = libc::MAP_SHARED | libc::MAP_FIXED;
            libc::mmap(start, length, protection, flags, file.as_raw_fd(), 0)
        };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the range is this mapping's own, and MADV_DONTDUMP does not change its content. It excludes guest
        // memory from core dumps of this process.
        unsafe { libc::madvise(start, size, libc::MADV_DONTDUMP) };
        Ok(this)
    }

    /// Host address of the mapping, a multiple of 2 MiB.
    #[must_use]
    pub const fn as_ptr(&self) -> *mut u8 {
        self.start.cast()
    }

    /// Length of the mapping in bytes, including the zeroes after the end of the file; a multiple of 2 MiB.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.size as u64
    }

    /// The mapped file.
    #[must_use]
    pub fn backing(&self) -> Arc<BackingFile> {
        Arc::clone(&self.backing.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Maps the file of another mapping of the same size over this one, which guests keep as their memory: they see that file
    /// from here on.
    ///
    /// # Errors
    /// When the sizes differ, or the host refuses.
    pub(crate) fn take_over(&self, other: &Self) -> io::Result<()> {
        if (self.size, self.is_writable) != (other.size, other.is_writable) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let backing = other.backing();
        let protection = libc::PROT_READ | if self.is_writable { libc::PROT_WRITE } else { 0 };
        // SAFETY: the range is this mapping's own, of which the file has the first `length` bytes, and is replaced in place.
        let is_mapped = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
            let cleared = libc::mmap(self.start, self.size, protection, flags, -1, 0);
            let flags = libc::MAP_SHARED | libc::MAP_FIXED;
            let file = backing.file().as_raw_fd();
            cleared != libc::MAP_FAILED
                && libc::mmap(self.start, other.length, protection, flags, file, 0) != libc::MAP_FAILED
        };
        if !is_mapped {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: as in `in_window`.
        unsafe { libc::madvise(self.start, self.size, libc::MADV_DONTDUMP) };
        *self.backing.lock().unwrap_or_else(PoisonError::into_inner) = backing;
        Ok(())
    }

    /// Whether the mapping is writable; writes change the file.
    #[must_use]
    pub const fn is_writable(&self) -> bool {
        self.is_writable
    }
}

impl Drop for MappedFile {
    fn drop(&mut self) {
        // SAFETY: the range is exactly the one that `new` reserved, and code that has passed its address on guarantees
        // that it is not used any more.
        unsafe { libc::munmap(self.reserved, self.reserved_size) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::MIB;
    use std::os::unix::fs::FileExt;

    fn byte(file: &MappedFile, offset: usize) -> u8 {
        assert!(offset < file.size);
        // SAFETY: the offset is within the mapping, whose file is not truncated.
        unsafe { file.as_ptr().add(offset).read_volatile() }
    }

    #[test]
    fn a_file_ends_with_zeroes_at_a_multiple_of_2_mib() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7; 5000], 0).unwrap();
        let mapped = MappedFile::new(&file, 5000, false).unwrap();
        assert_eq!((mapped.size(), mapped.as_ptr().addr() % (2 << 20)), (2 * MIB, 0));
        for (offset, expected) in [(0, 7), (4999, 7), (5000, 0), (8192, 0), (2 * 1024 * 1024 - 1, 0)] {
            assert_eq!(byte(&mapped, offset), expected, "{offset}");
        }
    }

    #[test]
    fn the_mapping_is_shared_with_the_file() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4 * MIB).unwrap();
        let [reader, writer] =
            [false, true].map(|writable| MappedFile::new(&file, 4 * MIB, writable).unwrap());
        // SAFETY: the offset is within the writable mapping.
        unsafe { writer.as_ptr().add(3 << 20).write_volatile(9) };
        assert_eq!(byte(&reader, 3 << 20), 9);
        let mut read = [0];
        file.read_exact_at(&mut read, 3 * MIB).unwrap();
        assert_eq!(read, [9]);
    }

    /// KVM gives a guest no right that this process does not have.
    #[test]
    fn this_process_cannot_write_a_read_only_file() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7; 5000], 0).unwrap();
        for is_writable in [false, true] {
            let mapped = MappedFile::new(&file, 5000, is_writable).unwrap();
            // The file, and the zeroes after its end.
            for offset in [0, 8192, mapped.size - 4096] {
                let flags = crate::memory::tests::flags(mapped.as_ptr().wrapping_add(offset));
                assert_eq!(flags.contains(" wr "), is_writable, "{offset}: {flags}");
            }
        }
    }

    #[test]
    fn too_large_files_are_refused() {
        let file = tempfile::tempfile().unwrap();
        for length in [u64::MAX, u64::MAX - (4 << 20), 1 << 60] {
            assert!(MappedFile::new(&file, length, false).is_err(), "{length:#x}");
        }
    }
}
