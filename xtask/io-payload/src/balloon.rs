//! Memory that this guest gives back to its host.
//!
//! No program asks for it: the guest's kernel names free memory to its balloon, which gives it back, two seconds after
//! some became free (`PAGE_REPORTING_DELAY` in mm/page_reporting.c). This one sleeps meanwhile and then turns in
//! circles: what guest, monitor and host do for it is time that is missing here.

use anyhow::{Result, ensure};
use std::hint::black_box;
use std::thread::sleep;
use std::time::{Duration, Instant};

const MIB: usize = 1 << 20;
/// The kernel's timer for its two seconds has steps of 80 ms (kernel/time/timer.c, 100 Hz).
const BEFORE: Duration = Duration::from_millis(1950);
const SPAN: Duration = Duration::from_millis(250);
/// A look at the clock takes less.
const LOOK: Duration = Duration::from_micros(2);

/// What giving so many MiB back takes.
pub(crate) fn time_of_reports(mib: u32) -> Result<Duration> {
    // It is in use while the kernel names what is free since the boot.
    let memory = black_box(vec![1_u8; mib as usize * MIB]);
    let ticks = time_of_others();
    sleep(BEFORE + SPAN);
    drop(memory);
    sleep(BEFORE);
    let whole = time_of_others();
    ensure!(whole > ticks, "the kernel gave nothing back");
    Ok(whole.saturating_sub(ticks))
}

/// The time for which everybody else had the processor during [`SPAN`].
fn time_of_others() -> Duration {
    let start = Instant::now();
    let (mut last, mut others) = (start, Duration::ZERO);
    while last - start < SPAN {
        let now = Instant::now();
        let passed = now - last;
        if passed > LOOK {
            others += passed;
        }
        last = now;
    }
    others
}
