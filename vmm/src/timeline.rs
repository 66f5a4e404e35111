//! When each step of a boot was reached, on the host's monotonic clock.

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;

/// Nanoseconds of CLOCK_MONOTONIC, the clock on which all times of a boot are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
pub struct Instant(pub u64);

impl Instant {
    /// The clock's time.
    #[must_use]
    pub fn now() -> Self {
        let time = clock_gettime(ClockId::Monotonic);
        // CLOCK_MONOTONIC starts at boot: neither part is negative.
        Self(time.tv_sec.unsigned_abs() * 1_000_000_000 + time.tv_nsec.unsigned_abs())
    }

    /// Nanoseconds since an earlier time; zero if it is not earlier.
    #[must_use]
    pub const fn since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// A step and when it was complete.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Step {
    /// What was complete.
    pub name: Cow<'static, str>,
    /// When.
    pub at: Instant,
}

/// The steps of one boot, in order.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Timeline {
    start: Instant,
    steps: Vec<Step>,
}

impl Timeline {
    /// A timeline that counts from `start`.
    #[must_use]
    pub const fn starting_at(start: Instant) -> Self {
        Self { start, steps: Vec::new() }
    }

    /// Records that a step is complete now.
    pub fn reached(&mut self, name: &'static str) {
        self.reached_at(name, Instant::now());
    }

    /// Records that a step was complete at a given time.
    pub fn reached_at(&mut self, name: &'static str, at: Instant) {
        self.steps.push(Step { name: name.into(), at });
    }

    /// The time from which the timeline counts.
    #[must_use]
    pub const fn start(&self) -> Instant {
        self.start
    }

    /// The steps so far.
    #[must_use]
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }
}
