//! The times at which the steps of a boot completed, on the host's monotonic clock.

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;

/// A point in time: nanoseconds of CLOCK_MONOTONIC, the clock of all times of a boot. It is comparable only within one
/// boot of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
pub struct Instant(pub u64);

impl Instant {
    /// The current time.
    #[must_use]
    pub fn now() -> Self {
        let time = clock_gettime(ClockId::Monotonic);
        // CLOCK_MONOTONIC starts at boot: neither part is negative.
        Self(time.tv_sec.unsigned_abs() * 1_000_000_000 + time.tv_nsec.unsigned_abs())
    }

    /// Nanoseconds since an earlier time; 0 if `earlier` is later.
    #[must_use]
    pub const fn since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// A step of a boot and its completion time.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Step {
    /// Name of the step.
    pub name: Cow<'static, str>,
    /// Time of its completion.
    pub at: Instant,
}

/// The steps of one boot, in the order of their recording.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Timeline {
    start: Instant,
    steps: Vec<Step>,
}

impl Timeline {
    /// Creates an empty timeline. `start` is the reference of its times, usually the start of the process.
    #[must_use]
    pub const fn starting_at(start: Instant) -> Self {
        Self { start, steps: Vec::new() }
    }

    /// Records that a step completes now.
    pub fn reached(&mut self, name: &'static str) {
        self.reached_at(name, Instant::now());
    }

    /// Records that a step completed at a given time.
    pub fn reached_at(&mut self, name: &'static str, at: Instant) {
        self.steps.push(Step { name: name.into(), at });
    }

    /// The reference of the timeline.
    #[must_use]
    pub const fn start(&self) -> Instant {
        self.start
    }

    /// The steps recorded so far.
    #[must_use]
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }
}
