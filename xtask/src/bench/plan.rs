//! What is measured: the plan that goes to where the guests run, and what comes back from there.

use super::vmms::{Guest, Vmm};
use serde::{Deserialize, Serialize};

/// What to measure, with paths as they are where it is measured.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct Plan {
    /// The monitors, ours first.
    pub(super) vmms: Vec<Vmm>,
    /// What all of them boot.
    pub(super) guest: Guest,
    /// Sizes of guests.
    pub(super) cases: Vec<Case>,
    /// How often each of the measurements is made.
    pub(super) runs: u32,
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

/// What is measured of a boot.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Metric {
    /// From the spawn to the first instruction of init.
    SpawnToInit,
    /// From the spawn to the first byte that init writes on the serial console.
    SpawnToFirstByte,
    /// From the spawn to the first byte that the payload writes there.
    SpawnToOutput,
    /// From the spawn to the end of the monitor's process.
    SpawnToExit,
    /// From the spawn to the first entry of the guest, and from the last exit to the process's end.
    VmmOnly,
    /// User and system time of the monitor's process, with its guest's.
    CpuTime,
    /// Memory that only the monitor's process has, while a payload waits for input.
    VmmPrivateMemory,
    /// The same with its share of what several processes have.
    VmmProportionalMemory,
    /// Exits from the guest to the monitor, until the payload's first output.
    UserExits,
    /// Faults on guest memory that KVM handled, until the payload's first output.
    GuestPageFaults,
}

impl Metric {
    /// All of them, in the order of reports.
    pub(super) const ALL: [Self; 10] = [
        Self::SpawnToInit,
        Self::SpawnToFirstByte,
        Self::SpawnToOutput,
        Self::SpawnToExit,
        Self::VmmOnly,
        Self::CpuTime,
        Self::VmmPrivateMemory,
        Self::VmmProportionalMemory,
        Self::UserExits,
        Self::GuestPageFaults,
    ];

    /// The unit of its values.
    pub(super) const fn unit(self) -> Unit {
        match self {
            Self::VmmPrivateMemory | Self::VmmProportionalMemory => Unit::Bytes,
            Self::UserExits | Self::GuestPageFaults => Unit::Count,
            _ => Unit::Nanoseconds,
        }
    }

    /// What a chart is called.
    pub(super) const fn long_title(self) -> &'static str {
        match self {
            Self::SpawnToInit => "spawn to init's first instruction, ms",
            Self::SpawnToFirstByte => "spawn to init's first byte on the console, ms",
            Self::SpawnToOutput => "spawn to the payload's first output, ms",
            Self::SpawnToExit => "spawn to the end of the process, ms",
            Self::VmmOnly => "VMM before the guest's start and after its end, ms",
            Self::CpuTime => "CPU time of VMM and guest, ms",
            Self::VmmPrivateMemory => "private memory without the guest's, MiB",
            Self::VmmProportionalMemory => "proportional memory without the guest's, MiB",
            Self::UserExits => "exits to the VMM until the payload's first output",
            Self::GuestPageFaults => "faults on guest memory until then",
        }
    }

    /// What a column is called, with the unit in which it shows values.
    pub(super) const fn title(self) -> &'static str {
        match self {
            Self::SpawnToInit => "init, ms",
            Self::SpawnToFirstByte => "first byte, ms",
            Self::SpawnToOutput => "output, ms",
            Self::SpawnToExit => "exit, ms",
            Self::VmmOnly => "VMM only, ms",
            Self::CpuTime => "CPU time, ms",
            Self::VmmPrivateMemory => "private, MiB",
            Self::VmmProportionalMemory => "PSS, MiB",
            Self::UserExits => "user exits",
            Self::GuestPageFaults => "guest faults",
        }
    }
}

/// What a value counts.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub(super) enum Unit {
    /// Time.
    #[serde(rename = "ns")]
    Nanoseconds,
    /// Memory.
    #[serde(rename = "bytes")]
    Bytes,
    /// Events.
    #[serde(rename = "count")]
    Count,
}

impl Unit {
    /// A value as people read it, in the unit of [`Metric::title`].
    pub(super) fn show(self, value: u64) -> String {
        match self {
            Self::Nanoseconds => format!("{:.3}", self.scaled(value)),
            Self::Bytes => format!("{:.2}", self.scaled(value)),
            Self::Count => value.to_string(),
        }
    }

    /// A value in the unit of [`Metric::title`].
    #[expect(clippy::cast_precision_loss, reason = "for display")]
    pub(super) fn scaled(self, value: u64) -> f64 {
        let value = value as f64;
        match self {
            Self::Nanoseconds => value / 1e6,
            Self::Bytes => value / (1024.0 * 1024.0),
            Self::Count => value,
        }
    }
}
