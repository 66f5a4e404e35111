//! What is measured: the plan that goes to where the guests run, and what comes back from there.

use super::metric::Metric;
use super::run::Images;
use super::vmms::{Guest, Vmm};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// What to measure, with paths as they are where it is measured.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct Plan {
    /// What the guests do.
    pub(super) scenario: Scenario,
    /// The monitors, ours first.
    pub(super) vmms: Vec<Vmm>,
    /// What all of them boot.
    pub(super) guest: Guest,
    /// What programs come from, where guests run some.
    pub(super) images: Option<Images>,
    /// Sizes of guests.
    pub(super) cases: Vec<Case>,
    /// How often each of the measurements is made.
    pub(super) runs: u32,
}

/// What the guests do.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize, ValueEnum)]
pub(super) enum Scenario {
    /// Boot to init, run a payload, end
    Boot,
    /// Use devices
    Io,
    /// Run programs of container images, and stream through one
    Run,
    /// Start a program from a pre-booted kernel, and let it wait
    Start,
}

impl Scenario {
    /// What rows call it.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Boot => "boot",
            Self::Io => "io",
            Self::Run => "run",
            Self::Start => "start",
        }
    }
}

/// The size of a guest.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub(super) struct Case {
    /// MiB of memory.
    pub(super) memory_mib: u64,
    /// Virtual processors.
    pub(super) vcpus: u8,
}

impl std::fmt::Display for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let plural = if self.vcpus == 1 { "" } else { "s" };
        write!(f, "{} MiB, {} vCPU{plural}", self.memory_mib, self.vcpus)
    }
}

/// What came of a plan.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub(super) struct Outcome {
    /// The processor and the kernel under the monitors.
    pub(super) machine: String,
    /// Every value of every run.
    pub(super) samples: Vec<Sample>,
    /// Monitors that failed, each with why and its last output.
    pub(super) failures: Vec<Failure>,
    /// What could not be measured there, and why.
    pub(super) omitted: Vec<String>,
}

/// One value of one run.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub(super) struct Sample {
    /// The monitor's name.
    pub(super) vmm: String,
    /// The guest's size.
    pub(super) case: Case,
    /// What the value is.
    pub(super) metric: Metric,
    /// The value in the metric's unit.
    pub(super) value: u64,
}

/// A monitor that did not do what it should.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct Failure {
    /// The monitor's name.
    pub(super) vmm: String,
    /// The guest's size.
    #[serde(flatten)]
    pub(super) case: Case,
    /// What happened, and what the monitor said last.
    pub(super) what: String,
}
