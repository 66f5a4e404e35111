//! The plan, which is sent to the machine that runs the guests, and the outcome, which it sends back.

use super::metric::Metric;
use super::run::Images;
use super::vmms::{Guest, Vmm};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// The measurements to make. Paths are those of the machine that runs the guests.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct Plan {
    /// The workload of the guests.
    pub(super) scenario: Scenario,
    /// The monitors, Kindling first.
    pub(super) vmms: Vec<Vmm>,
    /// The guest that all of them boot.
    pub(super) guest: Guest,
    /// The container images and programs of scenarios that run programs.
    pub(super) images: Option<Images>,
    /// The sizes of guests.
    pub(super) cases: Vec<Case>,
    /// Repetitions of each measurement.
    pub(super) runs: u32,
}

/// The workload of the guests.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize, ValueEnum)]
pub(super) enum Scenario {
    /// Boot to init, run a payload, exit
    Boot,
    /// Exercise devices
    Io,
    /// Run programs of container images, and stream data through one
    Run,
    /// Start a program from a pre-booted kernel, and let it idle
    Start,
    /// Start copies of templates, on request and parked ahead
    Clone,
    /// Run a program with and without the jail of the monitor, on a quiet and on a busy host
    Jail,
}

impl Scenario {
    /// The name in rows.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Boot => "boot",
            Self::Io => "io",
            Self::Run => "run",
            Self::Start => "start",
            Self::Clone => "clone",
            Self::Jail => "jail",
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

/// The result of a plan.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub(super) struct Outcome {
    /// The processor model and kernel release of the monitors' host.
    pub(super) machine: String,
    /// Every value of every run.
    pub(super) samples: Vec<Sample>,
    /// Monitors that failed, with the reason and their last output.
    pub(super) failures: Vec<Failure>,
    /// Measurements that could not be made, and why.
    pub(super) omitted: Vec<String>,
}

/// One value of one run.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub(super) struct Sample {
    /// The monitor's name.
    pub(super) vmm: String,
    /// The guest's size.
    pub(super) case: Case,
    /// The metric.
    pub(super) metric: Metric,
    /// The value in the metric's unit.
    pub(super) value: u64,
}

/// A monitor that failed.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct Failure {
    /// The monitor's name.
    pub(super) vmm: String,
    /// The guest's size.
    #[serde(flatten)]
    pub(super) case: Case,
    /// The error, with the monitor's last output.
    pub(super) what: String,
}
