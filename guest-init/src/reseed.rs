//! Reseeding of a guest that continues from a pre-booted kernel: random numbers, the time and the partitions of disks
//! are set before the payload runs. A guest where this fails must not continue.
#![expect(unsafe_code, reason = "ioctls without a safe wrapper")]

use crate::panic::fatal;
use guest_protocol::config::Reseed;
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::ioctl::{NoArg, Opcode, Setter, ioctl};
use rustix::time::{ClockId, Timespec, clock_settime};

type Seed = [u8; Reseed::ENTROPY_LEN];

/// `struct rand_pool_info` of linux/random.h with a buffer for the seed.
#[repr(C)]
struct PoolInfo {
    entropy_bits: i32,
    length: i32,
    bytes: Seed,
}

/// Replaces state of the pre-booted kernel that guests must not share.
pub(crate) fn apply(reseed: &Reseed) {
    if let Err(error) = set_time(reseed.real_time) {
        fatal(format_args!("cannot set the time of the pre-booted kernel: {error}"));
    }
    if let Err(error) = seed(reseed.entropy) {
        fatal(format_args!("cannot reseed the random number generator of the pre-booted kernel: {error}"));
    }
    read_partitions();
}

/// Makes the kernel read the partition tables of all disks: it booted with placeholder disks, and has read only their
/// partitions. A disk without the signature of a master boot record, which precedes a GUID partition table too, has no
/// partitions and is skipped; the kernel would read such a disk ten times.
fn read_partitions() {
    const BLKRRPART: Opcode = 0x125f;
    const SIGNATURE: [u8; 2] = [0x55, 0xaa];
    for letter in b'a'..=b'z' {
        let path = [b"/dev/vd".as_slice(), &[letter]].concat();
        // Disks have consecutive letters.
        let Ok(disk) = open(path.as_slice(), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()) else { return };
        let mut record = [0; 512];
        if rustix::io::read(&disk, &mut record).is_err() || record[510..] != SIGNATURE {
            continue;
        }
        // SAFETY: BLKRRPART takes no argument. A failure leaves an unreadable disk without partitions.
        let _ = unsafe { ioctl(&disk, NoArg::<BLKRRPART>::new()) };
    }
}

fn set_time(nanoseconds: u64) -> Result<(), Errno> {
    const SECOND: u64 = 1_000_000_000;
    let number = |value: u64| i64::try_from(value).map_err(|_| Errno::INVAL);
    clock_settime(
        ClockId::Realtime,
        Timespec { tv_sec: number(nanoseconds / SECOND)?, tv_nsec: number(nanoseconds % SECOND)? },
    )
}

/// Mixes the bytes into the kernel's entropy pool, and makes the generator derive a new key from it (random(4)).
fn seed(bytes: Seed) -> Result<(), Errno> {
    const RNDADDENTROPY: Opcode = 0x4008_5203;
    const RNDRESEEDCRNG: Opcode = 0x5207;
    let length = i32::try_from(bytes.len()).map_err(|_| Errno::INVAL)?;
    let device = open("/dev/urandom", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    let info = PoolInfo { entropy_bits: 8 * length, length, bytes };
    // SAFETY: RNDADDENTROPY reads a struct rand_pool_info and the number of bytes that its length says, which
    // PoolInfo lays out; RNDRESEEDCRNG takes no argument.
    unsafe {
        ioctl(&device, Setter::<RNDADDENTROPY, _>::new(info))?;
        ioctl(&device, NoArg::<RNDRESEEDCRNG>::new())
    }
}
