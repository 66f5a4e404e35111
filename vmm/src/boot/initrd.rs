//! The initrd, at the end of memory.

use super::{BootError, kernel_limit, open};
use crate::layout::PAGE_SIZE;
use crate::memory::GuestMemory;
use std::path::Path;
use vm_memory::GuestAddress;

/// An initrd in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Initrd {
    pub(super) address: GuestAddress,
    pub(super) size: u32,
}

/// Maps an initrd as high as the first page tables reach. Its pages come from the page cache,
/// like the kernel's. An empty file is no initrd.
pub(super) fn load(
    memory: &GuestMemory,
    path: &Path,
    kernel_end: GuestAddress,
) -> Result<Option<Initrd>, BootError> {
    let (file, size) = open(path)?;
    if size == 0 {
        return Ok(None);
    }
    let limit = kernel_limit(memory);
    let too_large = || BootError::InitrdTooLarge {
        path: path.into(),
        size,
        free: limit.saturating_sub(kernel_end.0.next_multiple_of(PAGE_SIZE)),
    };
    let pages = size.checked_next_multiple_of(PAGE_SIZE).ok_or_else(too_large)?;
    let start = limit.checked_sub(pages).filter(|&start| start >= kernel_end.0).ok_or_else(too_large)?;
    let address = GuestAddress(start);
    let whole = size - size % PAGE_SIZE;
    if whole > 0 {
        memory.map_file(address, &file, 0, whole)?;
    }
    memory.read_file(GuestAddress(start + whole), &file, whole, size - whole)?;
    let size = u32::try_from(size).map_err(|_| too_large())?;
    Ok(Some(Initrd { address, size }))
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
        let initrd = load(&memory, file.path(), GuestAddress(kernel_end))?;
        Ok((memory, initrd))
    }

    #[test]
    fn it_lies_at_the_end_of_memory() {
        for size in [1_u32, 4095, 4096, 4097, 10_000] {
            let bytes: Vec<u8> = (0..size).map(|index| index.to_le_bytes()[0]).collect();
            let (memory, initrd) = load_bytes(&bytes, MIB).unwrap();
            let initrd = initrd.unwrap();
            assert_eq!(initrd.size, size);
            assert_eq!(initrd.address.0, 16 * MIB - u64::from(size).next_multiple_of(4096));
            let mut seen = vec![0; bytes.len()];
            memory.inner().read_slice(&mut seen, initrd.address).unwrap();
            assert_eq!(seen, bytes);
        }
    }

    #[test]
    fn an_empty_file_is_no_initrd() {
        assert_eq!(load_bytes(&[], MIB).unwrap().1, None);
    }

    #[test]
    fn one_that_does_not_fit_behind_the_kernel_is_refused() {
        assert!(load_bytes(&[1; 8192], 16 * MIB - 8192).is_ok());
        let error = load_bytes(&[1; 8193], 16 * MIB - 8192).unwrap_err();
        assert!(matches!(error, BootError::InitrdTooLarge { size: 8193, free: 8192, .. }), "{error}");
        let error = load_bytes(&vec![1; 17 << 20], MIB).unwrap_err();
        assert!(matches!(error, BootError::InitrdTooLarge { .. }), "{error}");
    }

    #[test]
    fn what_is_not_a_file_is_refused() {
        let memory = GuestMemory::anonymous(16 * MIB).unwrap();
        let open = |path: &str| load(&memory, Path::new(path), GuestAddress(MIB)).unwrap_err().to_string();
        assert_eq!(open("/dev/zero"), "/dev/zero is not a file");
        assert_eq!(open("/"), "/ is not a file");
        assert_eq!(open("/nonexistent"), "cannot read /nonexistent");
    }
}
