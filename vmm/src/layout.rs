//! Where everything is: the guest-physical memory map, the I/O ports and the interrupt lines.
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
//!              | kernel, where its file says  |
//!              | initrd, right behind it      |
//!              | ...                          |
//! 0xc000_0000  +------------------------------+  RAM above 3 GiB goes on at 4 GiB
//! 0xd000_0000  | virtio-mmio devices          |
//! 0xfec0_0000  | I/O APIC                     |
//! 0xfee0_0000  | local APICs                  |
//! 0xfffb_c000  | KVM's own pages              |
//! 0x1_0000_0000+------------------------------+
//!              | RAM above 3 GiB              |
//!              +------------------------------+  at the next multiple of 128 MiB
//!              | files as memory (pmem)       |
//!              +------------------------------+
//! ```

use vm_memory::GuestAddress;

/// Interrupt line of the guest's I/O APIC, which a device raises through an irqfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gsi(pub u32);

/// Bytes in a MiB.
pub const MIB: u64 = 1 << 20;
/// Size of a page of guest or host memory in bytes.
pub const PAGE_SIZE: u64 = PAGE as u64;
/// The same as the length of a buffer.
pub const PAGE: usize = 4096;

/// Size of a huge page of the host in bytes.
pub const HUGE_PAGE_SIZE: u64 = 2 * MIB;

/// The GDT of the first vCPU.
pub const GDT: GuestAddress = GuestAddress(0x500);
/// The zero page: `struct boot_params` of the Linux boot protocol.
pub const ZERO_PAGE: GuestAddress = GuestAddress(0x7000);
/// Page-map level 4, followed by one page-directory-pointer table and one page directory.
pub const PAGE_TABLES: GuestAddress = GuestAddress(0x9000);
/// The kernel command line and its NUL.
pub const COMMAND_LINE: GuestAddress = GuestAddress(0x2_0000);
/// Longest command line in bytes without its NUL: COMMAND_LINE_SIZE of
/// arch/x86/include/asm/setup.h is 2048.
pub const COMMAND_LINE_MAX: usize = 2047;
/// The MP table, at the start of the last KiB below 640 KiB, where the kernel looks for it
/// (`mpparse_find_mptable` in arch/x86/kernel/mpparse.c).
pub const MP_TABLE: GuestAddress = GuestAddress(0x9_fc00);
/// Bytes that the MP table may take.
pub const MP_TABLE_MAX: u64 = 0x400;
/// End of the memory below the legacy hole.
pub const LOW_MEMORY_END: GuestAddress = GuestAddress(0xa_0000);
/// Start of the memory above the legacy hole; nothing of a kernel may lie below it.
pub const HIGH_MEMORY: GuestAddress = GuestAddress(0x10_0000);
/// End of what the page tables of the first vCPU map, one to one, until the kernel has its own.
pub const IDENTITY_MAP_END: GuestAddress = GuestAddress(0x4000_0000);

/// RAM stops here and goes on at [`RAM_ABOVE_GAP`]; devices live between.
pub const MMIO_GAP: GuestAddress = GuestAddress(0xc000_0000);
/// RAM above the device gap.
pub const RAM_ABOVE_GAP: GuestAddress = GuestAddress(0x1_0000_0000);
/// Registers of the first virtio device; each has a page, one after the other.
pub const VIRTIO_MMIO: GuestAddress = GuestAddress(0xd000_0000);
/// Registers of the I/O APIC (Intel 82093AA, section 3.0).
pub const IO_APIC: GuestAddress = GuestAddress(0xfec0_0000);
/// Registers of the local APICs (Intel SDM, volume 3, section 11.4.1).
pub const LOCAL_APIC: GuestAddress = GuestAddress(0xfee0_0000);
/// One page for KVM's identity map (`KVM_SET_IDENTITY_MAP_ADDR`).
pub const KVM_IDENTITY_MAP: GuestAddress = GuestAddress(0xfffb_c000);
/// Three pages for KVM's task state segment (`KVM_SET_TSS_ADDR`).
pub const KVM_TSS: GuestAddress = GuestAddress(0xfffb_d000);

/// Pins of the I/O APIC, which are GSIs 0 to 23.
pub const IO_APIC_PINS: u8 = 24;
/// Interrupt of the serial port, the one a PC's first port has.
pub const SERIAL_GSI: Gsi = Gsi(4);
/// Interrupt of the first virtio device; the others follow.
const VIRTIO_GSI: u32 = 5;
/// virtio devices that a machine can have: each has a line of the I/O APIC.
pub const DEVICES_MAX: usize = IO_APIC_PINS as usize - VIRTIO_GSI as usize;

/// The eight registers of the serial port.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Status and command register of a keyboard controller, of which only "reset" works.
pub const KEYBOARD_CONTROLLER_PORT: u16 = 0x64;
/// Reset control register of a PC chipset.
pub const RESET_CONTROL_PORT: u16 = 0xcf9;
/// Data register of a real-time clock, which is not there.
pub const RTC_DATA_PORT: u16 = 0x71;

/// vCPUs that a machine can have at most; the guest kernel is built for as many.
pub const VCPUS_MAX: u8 = 16;

const fn precedes(first: GuestAddress, size: u64, next: GuestAddress) -> bool {
    first.0 + size <= next.0
}

// The drawing above and the constants agree, and nothing overlaps.
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

/// Registers and interrupt of a virtio device, counted from zero; there are at most [`DEVICES_MAX`].
#[must_use]
pub const fn virtio_device(number: usize) -> (GuestAddress, Gsi) {
    #[expect(clippy::cast_possible_truncation, reason = "numbers are below DEVICES_MAX")]
    let line = VIRTIO_GSI + number as u32;
    (GuestAddress(VIRTIO_MMIO.0 + number as u64 * PAGE_SIZE), Gsi(line))
}

/// The RAM of a machine as start and size of one or two ranges.
///
/// The second range exists where the memory does not fit below [`MMIO_GAP`].
#[must_use]
pub fn ram_ranges(bytes: u64) -> Vec<(GuestAddress, u64)> {
    let below = bytes.min(MMIO_GAP.0);
    let mut ranges = vec![(GuestAddress(0), below)];
    if bytes > below {
        ranges.push((RAM_ABOVE_GAP, bytes - below));
    }
    ranges
}

/// Alignment of what is memory and no RAM: a section of the guest's kernel (SECTION_SIZE_BITS in
/// arch/x86/include/asm/sparsemem.h), so that its page structures are not mixed with those of RAM.
const SECTION: u64 = 128 * MIB;

/// Where memory that is no RAM starts in a machine with this much RAM, always above 4 GiB.
#[must_use]
pub fn behind_ram(ram: u64) -> GuestAddress {
    let above = ram.saturating_sub(MMIO_GAP.0);
    behind(RAM_ABOVE_GAP, above)
}

/// The next place behind one of this many bytes. What no guest can reach is refused when it is given to KVM.
#[must_use]
pub const fn behind(start: GuestAddress, size: u64) -> GuestAddress {
    let end = start.0.saturating_add(size);
    GuestAddress(end.saturating_add(SECTION - 1) / SECTION * SECTION)
}

/// The words that tell the kernel of the virtio devices (`vm_cmdline_set` in drivers/virtio/virtio_mmio.c). They
/// come first, because a line may end with arguments of init's.
#[must_use]
pub fn announced(devices: usize) -> String {
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
    fn files_lie_in_sections_of_their_own_behind_ram() {
        assert_eq!(behind_ram(128 * MIB), RAM_ABOVE_GAP);
        assert_eq!(behind_ram(3072 * MIB), RAM_ABOVE_GAP);
        assert_eq!(behind_ram(3073 * MIB).0, (4096 + 128) * MIB);
        assert_eq!(behind_ram(8192 * MIB).0, 9216 * MIB);
        assert_eq!(behind(GuestAddress(4096 * MIB), 2 * MIB).0, 4224 * MIB);
        assert_eq!(behind(GuestAddress(4096 * MIB), 128 * MIB).0, 4224 * MIB);
        assert!(behind(GuestAddress(4096 * MIB), u64::MAX).0 > 1 << 63);
    }

    #[test]
    fn ram_leaves_the_device_gap_free() {
        assert_eq!(ram_ranges(128 * MIB), [(GuestAddress(0), 128 * MIB)]);
        assert_eq!(ram_ranges(3072 * MIB), [(GuestAddress(0), 3072 * MIB)]);
        assert_eq!(
            ram_ranges(4096 * MIB),
            [(GuestAddress(0), 3072 * MIB), (GuestAddress(1 << 32), 1024 * MIB)]
        );
    }
}
