//! The guest-physical memory map, the I/O ports and the interrupt lines of a machine.
//!
//! ```text
//!           0  +------------------------------+
//!    0x0_0500  | GDT                          |
//!    0x0_7000  | zero page                    |
//!    0x0_9000  | page tables (3 pages)        |
//!    0x2_0000  | kernel command line          |
//!    0x9_fc00  | MP table                     |
//!    0xa_0000  +------------------------------+
//!              | nothing (legacy VGA and ROM) |
//!   0x10_0000  +------------------------------+
//!              | kernel, at its own addresses |
//!              | initrd, directly after it    |
//!              | ...                          |
//! 0xc000_0000  +------------------------------+  RAM continues at 4 GiB
//! 0xd000_0000  | virtio-mmio devices          |
//! 0xfec0_0000  | I/O APIC                     |
//! 0xfee0_0000  | local APICs                  |
//! 0xfffb_c000  | KVM's own pages              |
//! 0x1_0000_0000+------------------------------+
//!              | RAM above 3 GiB              |
//!              +------------------------------+  at the next multiple of 128 MiB
//!              | mapped files (pmem)          |
//!              +------------------------------+
//! ```

use vm_memory::GuestAddress;

/// An interrupt line of the guest's I/O APIC (global system interrupt), which a device raises through an irqfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gsi(pub u32);

/// Bytes per MiB.
pub const MIB: u64 = 1 << 20;
/// Size of a page of guest or host memory in bytes.
pub const PAGE_SIZE: u64 = PAGE as u64;
/// The same, as the length of a buffer.
pub const PAGE: usize = 4096;

/// Size of a huge page of the host in bytes.
pub const HUGE_PAGE_SIZE: u64 = 2 * MIB;

/// Address of the GDT of the boot vCPU.
pub const GDT: GuestAddress = GuestAddress(0x500);
/// Address of the zero page: `struct boot_params` of the Linux boot protocol.
pub const ZERO_PAGE: GuestAddress = GuestAddress(0x7000);
/// Address of the page tables of the boot vCPU: a PML4, a page-directory-pointer table and a page directory.
pub const PAGE_TABLES: GuestAddress = GuestAddress(0x9000);
/// Address of the kernel command line, which ends with a NUL.
pub const COMMAND_LINE: GuestAddress = GuestAddress(0x2_0000);
/// Maximum length of the command line in bytes without its NUL: COMMAND_LINE_SIZE of arch/x86/include/asm/setup.h is
/// 2048.
pub const COMMAND_LINE_MAX: usize = 2047;
/// Address of the MP table: the start of the last KiB below 640 KiB, which the kernel searches (`mpparse_find_mptable`
/// in arch/x86/kernel/mpparse.c).
pub const MP_TABLE: GuestAddress = GuestAddress(0x9_fc00);
/// Maximum length of the MP table in bytes.
pub const MP_TABLE_MAX: u64 = 0x400;
/// End of the RAM below the legacy hole.
pub const LOW_MEMORY_END: GuestAddress = GuestAddress(0xa_0000);
/// Start of the RAM above the legacy hole, which is the lowest address of a kernel.
pub const HIGH_MEMORY: GuestAddress = GuestAddress(0x10_0000);
/// End of the identity mapping of the initial page tables, which the kernel uses until it has its own.
pub const IDENTITY_MAP_END: GuestAddress = GuestAddress(0x4000_0000);

/// Start of the device gap: RAM continues at [`RAM_ABOVE_GAP`].
pub const MMIO_GAP: GuestAddress = GuestAddress(0xc000_0000);
/// Start of the RAM above the device gap.
pub const RAM_ABOVE_GAP: GuestAddress = GuestAddress(0x1_0000_0000);
/// Address of the registers of the first virtio device; each device has one page.
pub const VIRTIO_MMIO: GuestAddress = GuestAddress(0xd000_0000);
/// Address of the registers of the I/O APIC (Intel 82093AA, section 3.0).
pub const IO_APIC: GuestAddress = GuestAddress(0xfec0_0000);
/// Address of the registers of the local APICs (Intel SDM, volume 3, section 11.4.1).
pub const LOCAL_APIC: GuestAddress = GuestAddress(0xfee0_0000);
/// Address of the page of KVM's identity map (`KVM_SET_IDENTITY_MAP_ADDR`).
pub const KVM_IDENTITY_MAP: GuestAddress = GuestAddress(0xfffb_c000);
/// Address of the three pages of KVM's task state segment (`KVM_SET_TSS_ADDR`).
pub const KVM_TSS: GuestAddress = GuestAddress(0xfffb_d000);

/// Number of pins of the I/O APIC, which are GSIs 0 to 23.
pub const IO_APIC_PINS: u8 = 24;
/// Interrupt line of the serial port: that of COM1 of a PC.
pub const SERIAL_GSI: Gsi = Gsi(4);
/// Interrupt line of the first virtio device; the others follow.
const VIRTIO_GSI: u32 = 5;
/// Maximum number of virtio devices of a machine: each has its own line of the I/O APIC.
pub const DEVICES_MAX: usize = IO_APIC_PINS as usize - VIRTIO_GSI as usize;

/// First of the eight ports of the serial port (COM1).
pub const SERIAL_PORT: u16 = 0x3f8;
/// Port of the status and command register of a keyboard controller, which only supports the reset.
pub const KEYBOARD_CONTROLLER_PORT: u16 = 0x64;
/// Port of the reset control register of a PC chipset.
pub const RESET_CONTROL_PORT: u16 = 0xcf9;
/// Port of the data register of the absent real-time clock.
pub const RTC_DATA_PORT: u16 = 0x71;

/// Maximum number of vCPUs of a machine, which is also the limit of the guest kernel's configuration.
pub const VCPUS_MAX: u8 = 16;

const fn precedes(first: GuestAddress, size: u64, next: GuestAddress) -> bool {
    first.0 + size <= next.0
}

// The drawing above matches the constants, and nothing overlaps.
const _: () = {
    assert!(precedes(GDT, 4 * 8, ZERO_PAGE));
    assert!(precedes(ZERO_PAGE, PAGE_SIZE, PAGE_TABLES));
    assert!(precedes(PAGE_TABLES, 3 * PAGE_SIZE, COMMAND_LINE));
    assert!(precedes(COMMAND_LINE, COMMAND_LINE_MAX as u64 + 1, MP_TABLE));
    assert!(precedes(MP_TABLE, MP_TABLE_MAX, LOW_MEMORY_END));
    assert!(precedes(LOW_MEMORY_END, 0, HIGH_MEMORY));
    assert!(precedes(HIGH_MEMORY, 0, IDENTITY_MAP_END));
    assert!(precedes(MMIO_GAP, 0, VIRTIO_MMIO));
    assert!(precedes(VIRTIO_MMIO, DEVICES_MAX as u64 * PAGE_SIZE, IO_APIC));
    assert!(precedes(IO_APIC, PAGE_SIZE, LOCAL_APIC));
    assert!(precedes(LOCAL_APIC, PAGE_SIZE, KVM_IDENTITY_MAP));
    assert!(precedes(KVM_IDENTITY_MAP, PAGE_SIZE, KVM_TSS));
    assert!(precedes(KVM_TSS, 3 * PAGE_SIZE, RAM_ABOVE_GAP));
};

/// Register address and interrupt line of a virtio device. `number` starts at 0 and is less than [`DEVICES_MAX`].
#[must_use]
pub const fn virtio_device(number: usize) -> (GuestAddress, Gsi) {
    #[expect(clippy::cast_possible_truncation, reason = "numbers are below DEVICES_MAX")]
    let line = VIRTIO_GSI + number as u32;
    (GuestAddress(VIRTIO_MMIO.0 + number as u64 * PAGE_SIZE), Gsi(line))
}

/// The RAM of a machine with `bytes` bytes: start and size in bytes of one or two ranges.
///
/// The second range exists if the RAM does not fit below [`MMIO_GAP`].
#[must_use]
pub fn ram_ranges(bytes: u64) -> Vec<(GuestAddress, u64)> {
    let below = bytes.min(MMIO_GAP.0);
    let mut ranges = vec![(GuestAddress(0), below)];
    if bytes > below {
        ranges.push((RAM_ABOVE_GAP, bytes - below));
    }
    ranges
}

/// Alignment of memory that is not RAM: a memory section of the guest's kernel (SECTION_SIZE_BITS in
/// arch/x86/include/asm/sparsemem.h), so that its `struct page` arrays do not overlap those of RAM.
const SECTION: u64 = 128 * MIB;

/// First address for memory that is not RAM in a machine with `ram` bytes of RAM; always above 4 GiB.
#[must_use]
pub fn above_ram(ram: u64) -> GuestAddress {
    let above = ram.saturating_sub(MMIO_GAP.0);
    next_section(RAM_ABOVE_GAP, above)
}

/// First section boundary after a range of `size` bytes at `start`. KVM refuses addresses that the guest cannot reach.
#[must_use]
pub const fn next_section(start: GuestAddress, size: u64) -> GuestAddress {
    let end = start.0.saturating_add(size);
    GuestAddress(end.saturating_add(SECTION - 1) / SECTION * SECTION)
}

/// The kernel parameters that announce the virtio devices (`vm_cmdline_set` in drivers/virtio/virtio_mmio.c). They are
/// at the start of the command line, because its end may be arguments of init.
#[must_use]
pub fn virtio_mmio_parameters(devices: usize) -> String {
    let word = |number| {
        let (registers, line) = virtio_device(number);
        format!("virtio_mmio.device=4K@{:#x}:{} ", registers.0, line.0)
    };
    (0..devices).map(word).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_start_at_section_boundaries_above_ram() {
        assert_eq!(above_ram(128 * MIB), RAM_ABOVE_GAP);
        assert_eq!(above_ram(3072 * MIB), RAM_ABOVE_GAP);
        assert_eq!(above_ram(3073 * MIB).0, (4096 + 128) * MIB);
        assert_eq!(above_ram(8192 * MIB).0, 9216 * MIB);
        assert_eq!(next_section(GuestAddress(4096 * MIB), 2 * MIB).0, 4224 * MIB);
        assert_eq!(next_section(GuestAddress(4096 * MIB), 128 * MIB).0, 4224 * MIB);
        assert!(next_section(GuestAddress(4096 * MIB), u64::MAX).0 > 1 << 63);
    }

    #[test]
    fn ram_does_not_overlap_the_device_gap() {
        assert_eq!(ram_ranges(128 * MIB), [(GuestAddress(0), 128 * MIB)]);
        assert_eq!(ram_ranges(3072 * MIB), [(GuestAddress(0), 3072 * MIB)]);
        assert_eq!(
            ram_ranges(4096 * MIB),
            [(GuestAddress(0), 3072 * MIB), (GuestAddress(1 << 32), 1024 * MIB)]
        );
    }
}
