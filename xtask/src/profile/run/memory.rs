//! What a kernel has at an address of the memory in which it was saved.

use crate::profile::kernel_image::{KERNEL_MAP, Symbols};
use anyhow::{Context, Result};
use kindling_vmm::preboot::SavedMemory;
use std::collections::BTreeMap;
use std::ops::Range;

/// The use of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Use {
    Text,
    ReadOnlyData,
    Data,
    Bss,
    PageTables,
    Slab,
    BootTime,
    Allocated,
    Free,
    Device,
}

impl Use {
    pub(super) const ALL: [Self; 10] = [
        Self::Text,
        Self::ReadOnlyData,
        Self::Data,
        Self::Bss,
        Self::PageTables,
        Self::Slab,
        Self::BootTime,
        Self::Allocated,
        Self::Free,
        Self::Device,
    ];

    pub(super) const fn title(self) -> &'static str {
        match self {
            Self::Text => "kernel text",
            Self::ReadOnlyData => "kernel read-only data",
            Self::Data => "kernel data",
            Self::Bss => "kernel bss",
            Self::PageTables => "page tables",
            Self::Slab => "slab",
            Self::BootTime => "boot-time memory",
            Self::Allocated => "other allocated pages",
            Self::Free => "free memory",
            Self::Device => "registers of devices",
        }
    }
}

/// Size of a page in bytes.
const PAGE: u64 = 4096;
/// The virtual address of the array of `struct page` (`__VMEMMAP_BASE_L4` in arch/x86/include/asm/pgtable_64_types.h),
/// unless the kernel moves it.
const VMEMMAP: u64 = 0xffff_ea00_0000_0000;
/// `sizeof(struct page)`, and the offsets of `flags`, `compound_head`, `private` and `page_type` (include/linux/mm_types.h).
const PAGE_STRUCT: u64 = 64;
const FLAGS: usize = 0;
const COMPOUND_HEAD: usize = 8;
const ORDER: usize = 40;
const TYPE: usize = 48;
/// Bit of `PG_reserved`, and types of pages (include/linux/page-flags.h).
const RESERVED: u64 = 1 << 13;
const BUDDY: u8 = 0xf0;
const TABLE: u8 = 0xf2;
const SLAB: u8 = 0xf5;

/// A map of all pages.
pub(super) struct Map {
    /// The parts of the kernel's image.
    image: Vec<(Range<u64>, Use)>,
    pages: BTreeMap<u64, Use>,
    size: u64,
}

impl Map {
    pub(super) fn new(memory: &SavedMemory, symbols: &Symbols) -> Result<Self> {
        let at = |name: &str| {
            let address = symbols.address(name).with_context(|| format!("System.map has no {name}"))?;
            Ok::<_, anyhow::Error>(address.wrapping_sub(KERNEL_MAP))
        };
        let image = vec![
            (at("_text")?..at("_etext")?, Use::Text),
            (at("__start_rodata")?..at("__end_rodata")?, Use::ReadOnlyData),
            (at("_sdata")?..at("_edata")?, Use::Data),
            (at("__bss_start")?..at("__bss_stop")?, Use::Bss),
        ];
        let reader = Reader { memory };
        let moved = symbols.address("vmemmap_base").and_then(|address| reader.word(address));
        let base = moved.filter(|&base| base != 0).unwrap_or(VMEMMAP);
        let pages = reader.uses(base)?;
        Ok(Self { image, pages, size: memory.size() })
    }

    /// The use of the page at a guest-physical address.
    pub(super) fn at(&self, address: u64) -> Use {
        if address >= self.size {
            return Use::Device;
        }
        let page = address & !(PAGE - 1);
        let in_image = |range: &Range<u64>| range.start < page + PAGE && page < range.end;
        let part = self.image.iter().find(|(range, _)| in_image(range));
        part.map(|(_, part)| *part).or_else(|| self.pages.get(&page).copied()).unwrap_or(Use::BootTime)
    }
}

/// Reads saved memory by virtual addresses of its kernel.
struct Reader<'a> {
    memory: &'a SavedMemory,
}

impl Reader<'_> {
    /// The uses of all pages, by their `struct page`.
    fn uses(&self, base: u64) -> Result<BTreeMap<u64, Use>> {
        let mut uses = BTreeMap::new();
        let pages = self.memory.size() / PAGE;
        let mut number = 0;
        while number < pages {
            let mut count = 1;
            let virtual_address = base + number * PAGE_STRUCT;
            if let Some(bytes) = self.page_struct(virtual_address) {
                let head = word(&bytes, COMPOUND_HEAD);
                // A page behind the first of a compound one names the first.
                let bytes = match head & 1 {
                    1 => self.page_struct(head - 1).unwrap_or(bytes),
                    _ => bytes,
                };
                let kind = bytes[TYPE + 3];
                if kind == BUDDY {
                    count = 1 << word(&bytes, ORDER).min(10);
                }
                let found = match kind {
                    BUDDY => Use::Free,
                    TABLE => Use::PageTables,
                    SLAB => Use::Slab,
                    _ if word(&bytes, FLAGS) & RESERVED != 0 => Use::BootTime,
                    _ => Use::Allocated,
                };
                uses.extend((number..number + count).map(|page| (page * PAGE, found)));
            }
            number += count;
        }
        anyhow::ensure!(
            uses.values().any(|found| *found == Use::Free) && uses.values().any(|found| *found == Use::Slab),
            "the array of struct page was not found in the saved memory"
        );
        Ok(uses)
    }

    fn page_struct(&self, virtual_address: u64) -> Option<[u8; 64]> {
        self.bytes(virtual_address)
    }

    fn word(&self, virtual_address: u64) -> Option<u64> {
        self.bytes(virtual_address).map(u64::from_le_bytes)
    }

    /// Bytes that do not cross the end of a page.
    fn bytes<const N: usize>(&self, virtual_address: u64) -> Option<[u8; N]> {
        let physical = self.translate(virtual_address)?;
        let at = usize::try_from(physical % PAGE).ok()?;
        // A page that the file does not have is zero.
        let page = self.memory.page(physical).unwrap_or([0; 4096]);
        page.get(at..at + N)?.try_into().ok()
    }

    /// Walks the page tables (Intel SDM, volume 3, "4-Level Paging").
    fn translate(&self, virtual_address: u64) -> Option<u64> {
        const PRESENT: u64 = 1;
        const LARGE: u64 = 1 << 7;
        const FRAME: u64 = 0x000f_ffff_ffff_f000;
        let mut table = self.memory.page_tables();
        for level in (0..4).rev() {
            let shift = 12 + 9 * level;
            let index = usize::try_from(virtual_address >> shift & 0x1ff).ok()?;
            let entry = word(&self.memory.page(table)?, 8 * index);
            if entry & PRESENT == 0 {
                return None;
            }
            if level == 0 || entry & LARGE != 0 {
                let offset = (1 << shift) - 1;
                return Some((entry & FRAME & !offset) | (virtual_address & offset));
            }
            table = entry & FRAME;
        }
        None
    }
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|index| bytes[at + index]))
}
