//! Init's heap: a fixed piece of bss, of which only touched pages cost memory.
#![expect(unsafe_code, reason = "a global allocator is given its memory once")]

use core::cell::UnsafeCell;
use linked_list_allocator::LockedHeap;

/// Room for the largest configuration frame: its bytes, and for each of its up to 50,000 items a
/// vector, a string and a pointer with the allocator's own bookkeeping, while lists are copied to
/// grow.
const SIZE: usize = 10 * 1024 * 1024;

#[repr(C, align(4096))]
struct Arena(UnsafeCell<[u8; SIZE]>);

// SAFETY: the bytes are reached only through the allocator, which has a lock.
unsafe impl Sync for Arena {}

static ARENA: Arena = Arena(UnsafeCell::new([0; SIZE]));

#[global_allocator]
static HEAP: LockedHeap = LockedHeap::empty();

/// Gives the allocator its memory. Called once, before the first allocation.
pub(crate) fn init() {
    // SAFETY: the arena is static, writable, used by nothing else, and given away only here.
    unsafe { HEAP.lock().init(ARENA.0.get().cast(), SIZE) }
}
