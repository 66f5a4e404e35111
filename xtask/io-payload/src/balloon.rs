//! Timing of free page reporting through the balloon.
//!
//! A program cannot request it: the guest kernel reports free pages to the balloon two seconds after pages were freed
//! (`PAGE_REPORTING_DELAY` in mm/page_reporting.c). The measuring thread sleeps until shortly before the report and
//! then busy-loops on the clock. The time that the loop misses is the time that guest kernel, monitor and host spend on
//! the report.

use anyhow::{Result, ensure};
use std::hint::black_box;
use std::thread::sleep;
use std::time::{Duration, Instant};

const MIB: usize = 1 << 20;
/// Sleep before the busy loop. The kernel's timer for its two seconds has a granularity of 80 ms (kernel/time/timer.c,
/// 100 Hz).
const SLEEP: Duration = Duration::from_millis(1950);
/// Length of the busy loop.
const BUSY_LOOP: Duration = Duration::from_millis(250);
/// Upper bound of the time of one clock read.
const CLOCK_READ_MAX: Duration = Duration::from_micros(2);

/// Returns how long reporting `mib` MiB of free memory takes.
pub(crate) fn time_of_reports(mib: u32) -> Result<Duration> {
    // The allocation keeps these pages in use while the kernel reports the pages that are free since boot.
    let memory = black_box(vec![1_u8; mib as usize * MIB]);
    let ticks = time_not_running();
    sleep(SLEEP + BUSY_LOOP);
    drop(memory);
    sleep(SLEEP);
    let whole = time_not_running();
    ensure!(whole > ticks, "the kernel reported no free pages");
    Ok(whole.saturating_sub(ticks))
}

/// The time during [`BUSY_LOOP`] in which this thread did not run.
fn time_not_running() -> Duration {
    let start = Instant::now();
    let (mut last, mut not_running) = (start, Duration::ZERO);
    while last - start < BUSY_LOOP {
        let now = Instant::now();
        let passed = now - last;
        if passed > CLOCK_READ_MAX {
            not_running += passed;
        }
        last = now;
    }
    not_running
}
