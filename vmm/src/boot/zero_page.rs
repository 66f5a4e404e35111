//! The zero page: the information that the boot loader passes to the kernel (Documentation/arch/x86/zero-page.rst).

use super::Kernel;
use super::initrd::Initrd;
use crate::layout;
use crate::memory::GuestMemory;
use crate::memory::MemoryError;
use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

/// The loader type "undefined", for a loader without an assigned id.
const LOADER_UNDEFINED: u8 = 0xff;
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = u32::from_le_bytes(super::bzimage::MAGIC);
/// Protocol version in the header for an ELF kernel, which has no setup header.
const VERSION: u16 = 0x20f;
const KERNEL_ALIGNMENT: u32 = 0x20_0000;

const E820_RAM: u32 = 1;

/// Writes the zero page for a loaded kernel.
pub(super) fn write(
    memory: &GuestMemory,
    kernel: &Kernel,
    initrd: Option<Initrd>,
    command_line: &str,
) -> Result<(), MemoryError> {
    let mut header = kernel.setup_header.unwrap_or_else(|| setup_header {
        boot_flag: BOOT_FLAG,
        header: HEADER_MAGIC,
        version: VERSION,
        kernel_alignment: KERNEL_ALIGNMENT,
        ..setup_header::default()
    });
    header.type_of_loader = LOADER_UNDEFINED;
    header.cmd_line_ptr = below_4_gib(layout::COMMAND_LINE);
    header.cmdline_size = u32::try_from(command_line.len()).unwrap_or(0);
    if let Some(initrd) = initrd {
        header.ramdisk_image = below_4_gib(initrd.address);
        header.ramdisk_size = initrd.size;
    }
    let mut params = boot_params { hdr: header, ..boot_params::default() };
    let map = memory_map(memory);
    params.e820_entries = u8::try_from(map.len()).unwrap_or(0);
    params.e820_table[..map.len()].copy_from_slice(&map);
    memory
        .inner()
        .write_obj(params, layout::ZERO_PAGE)
        .map_err(|_| MemoryError::Outside { address: layout::ZERO_PAGE.0, length: layout::PAGE_SIZE })
}

/// Converts the address of a boot table, which is below 4 GiB according to the memory map.
fn below_4_gib(address: GuestAddress) -> u32 {
    u32::try_from(address.0).unwrap_or(u32::MAX)
}

/// The memory map: RAM without the legacy hole. The MP table is in RAM: a kernel that reads it reserves it
/// (`mpparse_find_mptable`), and the kernel scans the entries a thousand times while it maps its memory
/// (`e820__mapped_any`), so that there is no separate entry.
fn memory_map(memory: &GuestMemory) -> Vec<boot_e820_entry> {
    let ram = |start: u64, end: u64| boot_e820_entry { addr: start, size: end - start, r#type: E820_RAM };
    let mut map = vec![ram(0, layout::LOW_MEMORY_END.0), ram(layout::HIGH_MEMORY.0, memory.low_end().0)];
    for region in memory.inner().iter().skip(1) {
        let start = region.start_addr().0;
        map.push(ram(start, start + region.len()));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(mib: u64, initrd: Option<Initrd>) -> boot_params {
        let memory = GuestMemory::anonymous(mib << 20).unwrap();
        let kernel = Kernel { entry: GuestAddress(0), end: GuestAddress(0), setup_header: None };
        write(&memory, &kernel, initrd, "quiet").unwrap();
        memory.inner().read_obj(GuestAddress(0x7000)).unwrap()
    }

    #[test]
    fn memory_and_command_line_are_in_the_zero_page() {
        let params = written(128, None);
        let header = params.hdr;
        assert_eq!({ header.header }, 0x5372_6448);
        assert_eq!({ header.cmd_line_ptr }, 0x2_0000);
        assert_eq!({ header.ramdisk_size }, 0);
        let map: Vec<_> = params.e820_table[..usize::from(params.e820_entries)]
            .iter()
            .map(|entry| ({ entry.addr }, { entry.size }, { entry.r#type }))
            .collect();
        assert_eq!(map, [(0, 0xa_0000, 1), (0x10_0000, 0x7f0_0000, 1)]);
    }

    #[test]
    fn memory_above_the_device_gap_is_a_separate_entry() {
        let params = written(4096, None);
        assert_eq!(params.e820_entries, 3);
        let entry = params.e820_table[2];
        assert_eq!(({ entry.addr }, { entry.size }), (1 << 32, 1 << 30));
    }

    #[test]
    fn the_initrd_is_in_the_zero_page() {
        let initrd = Initrd { address: GuestAddress(0x7ff_f000), size: 77 };
        let header = written(128, Some(initrd)).hdr;
        assert_eq!(({ header.ramdisk_image }, { header.ramdisk_size }), (0x7ff_f000, 77));
    }
}
