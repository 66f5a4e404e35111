//! Loading of the initrd.

use super::{BootError, kernel_limit, length};
use crate::layout::{self, HUGE_PAGE_SIZE, PAGE_SIZE};
use crate::memory::GuestMemory;
use std::fs::File;
use std::path::Path;
use vm_memory::GuestAddress;

/// An initrd in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Initrd {
    pub(super) address: GuestAddress,
    pub(super) size: u32,
}

/// Maximum size of an initrd that is read: mapping pays off only for larger ones, whose pages are shared.
const READ_MAX: u64 = layout::MIB;

/// Loads an initrd directly after the kernel. A small one is read into huge pages that the kernel's last segment has
/// populated already; a large one is mapped copy-on-write from the page cache, into separate huge pages. Other monitors
/// place it at the end of memory, where the kernel allocates first: a mapped file would split those huge pages, and
/// each page of 4 KiB would cause a page fault. An empty file counts as no initrd.
pub(super) fn load(
    memory: &GuestMemory,
    file: File,
    path: &Path,
    kernel_end: GuestAddress,
) -> Result<Option<Initrd>, BootError> {
    let size = length(&file, path)?;
    if size == 0 {
        return Ok(None);
    }
    let limit = kernel_limit(memory);
    let next_page = kernel_end.0.next_multiple_of(PAGE_SIZE);
    let free = limit.saturating_sub(next_page);
    let too_large = || BootError::InitrdTooLarge { path: path.into(), size, free };
    if size > free {
        return Err(too_large());
    }
    let is_mapped = size > READ_MAX;
    let next_huge_page = kernel_end.0.next_multiple_of(HUGE_PAGE_SIZE);
    // If memory is scarce, it shares a huge page with the kernel.
    let start = if is_mapped && next_huge_page + size <= limit { next_huge_page } else { next_page };
    let whole = if is_mapped { size - size % PAGE_SIZE } else { 0 };
    if whole > 0 {
        memory.map_file(GuestAddress(start), &file, 0, whole)?;
    }
    memory.read_file(GuestAddress(start + whole), &file, whole, size - whole)?;
    let size = u32::try_from(size).map_err(|_| too_large())?;
    Ok(Some(Initrd { address: GuestAddress(start), size }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    const MIB: u64 = 1 << 20;

    fn load_bytes(bytes: &[u8], kernel_end: u64) -> Result<(GuestMemory, Option<Initrd>), BootError> {
        let memory = GuestMemory::anonymous(16 * MIB).unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        let initrd = load(&memory, file.reopen().unwrap(), file.path(), GuestAddress(kernel_end))?;
        Ok((memory, initrd))
    }

    #[test]
    fn the_initrd_is_loaded_after_the_kernel() {
        for size in [1_u32, 4095, 4096, 4097, 10_000, 1 << 20, (1 << 20) + 1, 3 << 20] {
            let bytes: Vec<u8> = (0..size).map(|index| index.to_le_bytes()[0]).collect();
            let (memory, initrd) = load_bytes(&bytes, MIB + 1).unwrap();
            let initrd = initrd.unwrap();
            assert_eq!(initrd.size, size);
            let expected = if size <= 1 << 20 { MIB + 4096 } else { 2 * MIB };
            assert_eq!(initrd.address.0, expected);
            let mut seen = vec![0; bytes.len()];
            memory.inner().read_slice(&mut seen, initrd.address).unwrap();
            assert_eq!(seen, bytes);
        }
    }

    #[test]
    fn an_empty_file_counts_as_no_initrd() {
        assert_eq!(load_bytes(&[], MIB).unwrap().1, None);
    }

    #[test]
    fn an_initrd_that_does_not_fit_is_refused() {
        assert!(load_bytes(&[1; 8192], 16 * MIB - 8192).is_ok());
        let error = load_bytes(&[1; 8193], 16 * MIB - 8192).unwrap_err();
        assert!(matches!(error, BootError::InitrdTooLarge { size: 8193, free: 8192, .. }), "{error}");
        let error = load_bytes(&vec![1; 17 << 20], MIB).unwrap_err();
        assert!(matches!(error, BootError::InitrdTooLarge { .. }), "{error}");
    }

    #[test]
    fn irregular_files_are_refused() {
        let open = |path: &str| super::super::open(Path::new(path)).unwrap_err().to_string();
        assert_eq!(open("/dev/zero"), "/dev/zero is not a file");
        assert_eq!(open("/"), "/ is not a file");
        assert_eq!(open("/nonexistent"), "cannot read /nonexistent");
    }
}
