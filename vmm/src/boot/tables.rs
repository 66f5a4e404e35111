//! The initial GDT and page tables of the boot vCPU. The page tables map the first GiB to itself. The kernel replaces
//! both within microseconds.

use crate::layout::{self, GDT, PAGE_SIZE, PAGE_TABLES};
use crate::memory::{GuestMemory, MemoryError};
use vm_memory::GuestAddress;
use x86_64::PhysAddr;
use x86_64::structures::gdt::DescriptorFlags;
use x86_64::structures::paging::page_table::{PageTable, PageTableFlags};

/// Index in the GDT of the 64-bit code segment that the boot protocol calls `__BOOT_CS`.
pub(crate) const CODE_SEGMENT: u16 = 2;
/// Index in the GDT of the data segment that the boot protocol calls `__BOOT_DS`.
pub(crate) const DATA_SEGMENT: u16 = 3;

/// The entries of the GDT: two unused ones, then code and data.
pub(crate) const GDT_ENTRIES: [u64; 4] =
    [0, 0, DescriptorFlags::KERNEL_CODE64.bits(), DescriptorFlags::KERNEL_DATA.bits()];

const LARGE_PAGE: u64 = 2 << 20;

/// Writes the GDT and the page tables.
pub(crate) fn write(memory: &GuestMemory) -> Result<(), MemoryError> {
    memory.write(GDT, GDT_ENTRIES.map(u64::to_le_bytes).as_flattened())?;
    let table = |index: u64| PAGE_TABLES.0 + index * PAGE_SIZE;
    let present = PageTableFlags::PRESENT | PageTableFlags::WRITABLE;

    let mut top = PageTable::new();
    top[0].set_addr(PhysAddr::new(table(1)), present);
    let mut pointers = PageTable::new();
    pointers[0].set_addr(PhysAddr::new(table(2)), present);
    let mut directory = PageTable::new();
    for (entry, address) in directory.iter_mut().zip((0..layout::IDENTITY_MAP_END.0).step_by(1 << 21)) {
        debug_assert!(address % LARGE_PAGE == 0);
        entry.set_addr(PhysAddr::new(address), present | PageTableFlags::HUGE_PAGE);
    }
    for (index, page) in (0..).zip([&top, &pointers, &directory]) {
        write_table(memory, GuestAddress(table(index)), page)?;
    }
    Ok(())
}

fn write_table(memory: &GuestMemory, address: GuestAddress, table: &PageTable) -> Result<(), MemoryError> {
    let bytes: Vec<u8> =
        table.iter().flat_map(|entry| (entry.addr().as_u64() | entry.flags().bits()).to_le_bytes()).collect();
    memory.write(address, &bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn the_first_gib_is_mapped_to_itself() {
        let memory = GuestMemory::anonymous(16 << 20).unwrap();
        write(&memory).unwrap();
        let entry = |address: u64| memory.inner().read_obj::<u64>(GuestAddress(address)).unwrap();
        // Present and writable are bits 0 and 1, a large page is bit 7 (Intel SDM, vol. 3, 4.5).
        assert_eq!(entry(0x9000), 0xa003);
        assert_eq!(entry(0xa000), 0xb003);
        assert_eq!(entry(0xb000), 0x83);
        assert_eq!(entry(0xb008), 0x20_0083);
        assert_eq!(entry(0xbff8), 0x3fe0_0083);
    }

    #[test]
    fn segments_have_the_selectors_of_the_boot_protocol() {
        // __BOOT_CS is 0x10 and __BOOT_DS is 0x18 (boot.rst, "64-bit boot protocol"). Code: long
        // mode, present, ring 0, execute and read; data: present, ring 0, read and write.
        assert_eq!(CODE_SEGMENT << 3, 0x10);
        assert_eq!(DATA_SEGMENT << 3, 0x18);
        assert_eq!(GDT_ENTRIES[2] & 0x0060_9a00_0000_0000, 0x0020_9a00_0000_0000);
        assert_eq!(GDT_ENTRIES[3] & 0x0000_9200_0000_0000, 0x0000_9200_0000_0000);
    }
}
