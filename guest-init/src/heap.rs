//! Init's heap: a fixed piece of bss for what is small, of which only touched pages cost memory, and mappings for what is
//! large: configuration frames and the strings in them, which are given back when they have been used.
#![expect(unsafe_code, reason = "a global allocator hands out memory")]

use core::alloc::{GlobalAlloc, Layout};
use core::cell::UnsafeCell;
use core::ptr;
use linked_list_allocator::LockedHeap;
use rustix::mm::{MapFlags, MremapFlags, ProtFlags, mmap_anonymous, mremap, munmap};

/// Room for what 256 sessions have received at a time, and all that is small, with the allocator's own bookkeeping.
const SIZE: usize = 10 * 1024 * 1024;
/// From this size on an allocation is a mapping.
const LARGE: usize = 16 * 1024;
/// The alignment of a mapping.
const PAGE: usize = 4096;

#[repr(C, align(4096))]
struct Arena(UnsafeCell<[u8; SIZE]>);

// SAFETY: the bytes are reached only through the allocator, which has a lock.
unsafe impl Sync for Arena {}

static ARENA: Arena = Arena(UnsafeCell::new([0; SIZE]));

struct Heap(LockedHeap);

#[global_allocator]
static HEAP: Heap = Heap(LockedHeap::empty());

/// Gives the allocator its memory. Called once, before the first allocation.
pub(crate) fn init() {
    // SAFETY: the arena is static, writable, used by nothing else, and given away only here.
    unsafe { HEAP.0.lock().init(ARENA.0.get().cast(), SIZE) }
}

const fn is_mapped(layout: Layout) -> bool {
    layout.size() >= LARGE && layout.align() <= PAGE
}

/// New memory of zeroes, or null.
fn map(size: usize) -> *mut u8 {
    let (access, kind) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
    // SAFETY: a new mapping, wherever the kernel has room for it.
    unsafe { mmap_anonymous(ptr::null_mut(), size, access, kind) }.map_or(ptr::null_mut(), <*mut _>::cast)
}

// SAFETY: what is mapped is found by its layout, which is the same when it is given back; the rest is the other
// allocator's.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        match is_mapped(layout) {
            true => map(layout.size()),
            // SAFETY: the caller's promises are passed on.
            false => unsafe { self.0.alloc(layout) },
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        match is_mapped(layout) {
            true => map(layout.size()),
            // SAFETY: the caller's promises are passed on.
            false => unsafe { self.0.alloc_zeroed(layout) },
        }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        match is_mapped(layout) {
            // SAFETY: a mapping of this size that the caller does not use any more.
            true => drop(unsafe { munmap(memory.cast(), layout.size()) }),
            // SAFETY: the caller's promises are passed on.
            false => unsafe { self.0.dealloc(memory, layout) },
        }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller promises that the size is one that a layout can have.
        let new = unsafe { Layout::from_size_align_unchecked(size, layout.align()) };
        if is_mapped(layout) && is_mapped(new) {
            // SAFETY: a mapping of this size, which the caller gives away for the new one.
            return unsafe { mremap(memory.cast(), layout.size(), size, MremapFlags::MAYMOVE) }
                .map_or(ptr::null_mut(), <*mut _>::cast);
        }
        // SAFETY: the caller's promises; what is copied lies in both.
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
