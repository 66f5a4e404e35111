//! What a guest whose kernel was booted for another one makes its own, before the payload runs: random
//! numbers, the time and its disks' partitions. A guest that cannot do so must not go on.
#![expect(unsafe_code, reason = "ioctls without a safe wrapper")]

use crate::voice::give_up;
use guest_init::payload_spec::Renewal;
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::ioctl::{NoArg, Opcode, Setter, ioctl};
use rustix::time::{ClockId, Timespec, clock_settime};

/// Bytes of entropy that are taken: as many as the kernel's generator has for a key.
const SEED_LEN: i32 = 32;
const SEED_BITS: i32 = 8 * SEED_LEN;

/// `struct rand_pool_info` of linux/random.h with room for a seed.
#[repr(C)]
struct PoolInfo {
    entropy_bits: i32,
    length: i32,
    bytes: Seed,
}

type Seed = [u8; SEED_LEN.unsigned_abs() as usize];

/// Renews what the VMM asks to renew.
pub(crate) fn renew(renewal: &Renewal) {
    if let Some(nanoseconds) = renewal.real_time
        && let Err(error) = set_time(nanoseconds)
    {
        give_up(format_args!(
            "cannot set the time, which is that of the guest this kernel booted for: {error}"
        ));
    }
    let Some(bytes) = &renewal.entropy else { return };
    if let Err(error) = seed(bytes) {
        give_up(format_args!(
            "cannot seed the random numbers, which are those of the guest this kernel booted for: {error}"
        ));
    }
    read_partitions();
}

/// Looks for partitions on every disk: those that the kernel knows of are those of the blank disks with which it
/// booted. One without the signature of a master boot record, which a GUID partition table has in front too, has none;
/// the kernel would read a disk ten times to find that out.
fn read_partitions() {
    const BLKRRPART: Opcode = 0x125f;
    const SIGNATURE: [u8; 2] = [0x55, 0xaa];
    for letter in b'a'..=b'z' {
        let path = [b"/dev/vd".as_slice(), &[letter]].concat();
        // Disks have their letters one after the other.
        let Ok(disk) = open(path.as_slice(), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()) else { return };
        let mut record = [0; 512];
        if rustix::io::read(&disk, &mut record).is_err() || record[510..] != SIGNATURE {
            continue;
        }
        // SAFETY: BLKRRPART takes no argument. A disk that cannot be read has no partitions.
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

/// Mixes the bytes into the kernel's pool, and makes it take a new key from there (random(4)).
fn seed(bytes: &[u8]) -> Result<(), Errno> {
    const RNDADDENTROPY: Opcode = 0x4008_5203;
    const RNDRESEEDCRNG: Opcode = 0x5207;
    let bytes: Seed = bytes.try_into().map_err(|_| Errno::INVAL)?;
    let device = open("/dev/urandom", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    let info = PoolInfo { entropy_bits: SEED_BITS, length: SEED_LEN, bytes };
    // SAFETY: RNDADDENTROPY reads a struct rand_pool_info with as many bytes as it says, which PoolInfo
    // lays out; RNDRESEEDCRNG takes no argument.
    unsafe {
        ioctl(&device, Setter::<RNDADDENTROPY, _>::new(info))?;
        ioctl(&device, NoArg::<RNDRESEEDCRNG>::new())
    }
}
