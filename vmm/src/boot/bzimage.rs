//! Loading of a compressed kernel (bzImage), as distributions provide it. `linux-loader` parses it; the kernel
//! decompresses itself.
//!
//! The source is Documentation/arch/x86/boot.rst.

use super::{BootError, Kernel, kernel_limit, too_large};
use crate::layout;
use crate::memory::GuestMemory;
use linux_loader::loader::{BzImage, KernelLoader};
use std::fs::File;
use std::path::Path;
use vm_memory::GuestAddress;

pub(super) const MAGIC: [u8; 4] = *b"HdrS";
pub(super) const MAGIC_OFFSET: u64 = 0x202;

/// Offset of the 64-bit entry point from the start of the loaded kernel.
const ENTRY_64: u64 = 0x200;
/// First version of the boot protocol with the field `xloadflags`.
const VERSION_2_12: u16 = 0x20c;
/// Bit of `xloadflags`: the kernel has a 64-bit entry point.
const XLF_KERNEL_64: u16 = 1;

/// Loads a bzImage at the address in its header.
pub(super) fn load(
    memory: &GuestMemory,
    mut file: File,
    length: u64,
    path: &Path,
) -> Result<Kernel, BootError> {
    let broken = |problem: String| BootError::BzImage { path: path.into(), problem };
    if layout::HIGH_MEMORY.0 + length > kernel_limit(memory) {
        return Err(too_large(memory, layout::HIGH_MEMORY.0 + length));
    }
    let loaded = BzImage::load(memory.inner(), None, &mut file, Some(layout::HIGH_MEMORY))
        .map_err(|error| broken(error.to_string()))?;
    let header = loaded.setup_header.ok_or_else(|| broken("it has no setup header".into()))?;
    let (version, flags) = (header.version, header.xloadflags);
    if version < VERSION_2_12 || flags & XLF_KERNEL_64 == 0 {
        return Err(broken(format!(
            "its boot protocol {}.{} has no 64-bit entry point; kernels since 3.8 built for x86-64 have one",
            version >> 8,
            version & 0xff
        )));
    }
    // The kernel decompresses itself at its preferred address, or at its load address if that is higher, and needs
    // `init_size` bytes there before it reads the memory map.
    let (preferred, init_size) = (header.pref_address, header.init_size);
    let end = preferred.max(loaded.kernel_load.0).saturating_add(init_size.into()).max(loaded.kernel_end);
    if end > kernel_limit(memory) {
        return Err(too_large(memory, end));
    }
    let entry = loaded.kernel_load.0 + ENTRY_64;
    if entry >= loaded.kernel_end {
        return Err(broken("it is truncated: it ends before its entry point".into()));
    }
    Ok(Kernel { entry: GuestAddress(entry), end: GuestAddress(end), setup_header: Some(header) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    const MIB: u64 = 1 << 20;

    /// A bzImage with 5 setup sectors and 1000 bytes of kernel. Offsets are those of boot.rst.
    fn image() -> Vec<u8> {
        let mut bytes = vec![0; 5 * 512 + 1000];
        bytes[0x1f1] = 4;
        bytes[0x202..0x206].copy_from_slice(b"HdrS");
        bytes[0x206..0x208].copy_from_slice(&0x20f_u16.to_le_bytes());
        bytes[0x211] = 1;
        bytes[0x214..0x218].copy_from_slice(&0x10_0000_u32.to_le_bytes());
        bytes[0x236] = 1;
        bytes[0x258..0x260].copy_from_slice(&(2 * MIB).to_le_bytes());
        bytes[0x260..0x264].copy_from_slice(&0x1000_u32.to_le_bytes());
        bytes
    }

    fn load_with(at: usize, change: &[u8]) -> Result<Kernel, BootError> {
        let mut bytes = image();
        bytes[at..at + change.len()].copy_from_slice(change);
        let memory = GuestMemory::anonymous(16 * MIB).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        load(&memory, file, bytes.len() as u64, Path::new("bzImage"))
    }

    #[test]
    fn a_kernel_is_loaded_at_the_address_in_its_header() {
        let kernel = load_with(0, &[]).unwrap();
        assert_eq!(kernel.entry.0, MIB + 0x200);
        assert_eq!(kernel.end.0, 2 * MIB + 0x1000);
    }

    #[test]
    fn errors_name_the_invalid_field() {
        let message = |at, change: &[u8]| load_with(at, change).err().unwrap().to_string();
        for (at, change, expected) in [
            (0x206, &[0x0b, 0x02][..], "boot protocol 2.11 has no 64-bit entry"),
            (0x236, &[0], "has no 64-bit entry"),
            (0x211, &[0], "Invalid bzImage"),
            (0x1f1, &[0xff], "Underflow"),
            (0x214, &[0, 0, 0, 0], "invalid kernel start address"),
            (0x214, &[0, 0, 0, 0xff], "compressed kernel"),
            (0x260, &[0xff; 4], "the kernel needs 4098 MiB of memory"),
            (0x258, &[0xff; 8], "the kernel needs"),
        ] {
            let message = message(at, change);
            assert!(message.contains(expected), "{at:#x}: {message:?} should say {expected:?}");
        }
    }

    #[test]
    fn the_entry_point_is_in_memory() {
        // A kernel without a byte, at the end of memory.
        let mut bytes = image();
        bytes.truncate(5 * 512);
        bytes[0x214..0x218].copy_from_slice(&0xff_ff80_u32.to_le_bytes());
        bytes[0x260..0x264].copy_from_slice(&0x10_u32.to_le_bytes());
        let memory = GuestMemory::anonymous(16 * MIB).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        let error = load(&memory, file, bytes.len() as u64, Path::new("bzImage")).err().unwrap().to_string();
        assert!(error.contains("ends before its entry point"), "{error}");
    }

    #[test]
    fn no_truncation_causes_a_panic() {
        let memory = GuestMemory::anonymous(16 * MIB).unwrap();
        let bytes = image();
        for length in 0..bytes.len() {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(&bytes[..length]).unwrap();
            let result = load(&memory, file, length as u64, Path::new("bzImage"));
            assert!(result.is_ok() == (length > 5 * 512 + 0x200), "{length}");
        }
    }
}
