//! Init's heap. Small allocations come from a fixed arena in bss, of which only touched pages use memory. Large
//! allocations, which are configuration frames and their strings, are mappings, so that freeing them returns the memory
//! to the kernel.
#![expect(unsafe_code, reason = "a global allocator hands out memory")]

use core::alloc::{GlobalAlloc, Layout};
use core::cell::UnsafeCell;
use core::ptr;
use linked_list_allocator::LockedHeap;
use rustix::mm::{MapFlags, MremapFlags, ProtFlags, mmap_anonymous, mremap, munmap};

/// Size of the arena: enough for the receive buffers of 256 sessions, other small allocations, and the allocator's own
/// bookkeeping.
const SIZE: usize = 10 * 1024 * 1024;
/// Minimum size of an allocation that is a mapping.
const LARGE: usize = 16 * 1024;
/// The alignment of a mapping.
const PAGE: usize = 4096;

#[repr(C, align(4096))]
struct Arena(UnsafeCell<[u8; SIZE]>);

// SAFETY: the bytes are accessed only through the allocator, which has a lock.
unsafe impl Sync for Arena {}

static ARENA: Arena = Arena(UnsafeCell::new([0; SIZE]));

struct Heap(LockedHeap);

#[global_allocator]
static HEAP: Heap = Heap(LockedHeap::empty());

/// Gives the allocator its memory. Called once, before the first allocation.
pub(crate) fn init() {
    // SAFETY: the arena is static, writable, used by nothing else, and passed on only here.
    unsafe { HEAP.0.lock().init(ARENA.0.get().cast(), SIZE) }
}

const fn is_mapped(layout: Layout) -> bool {
    layout.size() >= LARGE && layout.align() <= PAGE
}

/// Maps zeroed memory. Returns null on failure.
fn map(size: usize) -> *mut u8 {
    let (access, kind) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
    // SAFETY: a new mapping at an address that the kernel chooses.
    unsafe { mmap_anonymous(ptr::null_mut(), size, access, kind) }.map_or(ptr::null_mut(), <*mut _>::cast)
}

// SAFETY: the layout decides whether an allocation is a mapping, and is the same when it is freed; all others are the
// arena allocator's.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        match is_mapped(layout) {
            true => map(layout.size()),
            // SAFETY: the caller upholds the contract.
            false => unsafe { self.0.alloc(layout) },
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        match is_mapped(layout) {
            true => map(layout.size()),
            // SAFETY: the caller upholds the contract.
            false => unsafe { self.0.alloc_zeroed(layout) },
        }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        match is_mapped(layout) {
            // SAFETY: a mapping of this size, which the caller no longer uses.
            true => drop(unsafe { munmap(memory.cast(), layout.size()) }),
            // SAFETY: the caller upholds the contract.
            false => unsafe { self.0.dealloc(memory, layout) },
        }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller promises that the size is valid for a layout.
        let new = unsafe { Layout::from_size_align_unchecked(size, layout.align()) };
        if is_mapped(layout) && is_mapped(new) {
            // SAFETY: a mapping of this size, which the caller replaces by the new one.
            return unsafe { mremap(memory.cast(), layout.size(), size, MremapFlags::MAYMOVE) }
                .map_or(ptr::null_mut(), <*mut _>::cast);
        }
        // SAFETY: the caller upholds the contract; the copied range lies in both allocations.
        unsafe {
            let target = self.alloc(new);
            if !target.is_null() {
                ptr::copy_nonoverlapping(memory, target, layout.size().min(size));
                self.dealloc(memory, layout);
            }
            target
        }
    }
}
