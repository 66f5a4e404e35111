//! Metrics: their names in files, units, and titles in tables and charts.

use super::clone::{self, Made};
use super::jail::{Span, Strength};
use super::plan::Scenario;
use clap::ValueEnum;
use io_payload::Operation;
use serde::{Deserialize, Serialize};

/// A metric.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(into = "String", try_from = "String")]
pub(super) enum Metric {
    /// From the spawn to the first instruction of init.
    SpawnToInit,
    /// From the spawn to the first byte that init writes on the serial console.
    SpawnToFirstByte,
    /// From the spawn to the first byte that the payload writes there.
    SpawnToOutput,
    /// From the spawn to the exit of the monitor's process.
    SpawnToExit,
    /// From the spawn to the first guest entry, plus from the last exit to the end of the process.
    VmmOnly,
    /// User and system time of the monitor's process, including its guest's.
    CpuTime,
    /// Private memory of the monitor's process, while a payload waits for input.
    VmmPrivateMemory,
    /// Proportional set size (PSS) of the monitor's process in the same state.
    VmmProportionalMemory,
    /// Exits from the guest to the monitor, until the payload's first output.
    UserExits,
    /// Page faults on guest memory handled by KVM, until the payload's first output.
    GuestPageFaults,
    /// The increase of [`Self::SpawnToFirstByte`] by devices.
    DevicesBoot,
    /// The increase of [`Self::VmmPrivateMemory`] by devices.
    DevicesMemory,
    /// From the spawn of `kindling run` to its exit, for a small static program.
    RunHello,
    /// The same for a busybox applet.
    RunBusybox,
    /// [`Self::RunBusybox`] with an existing volume.
    RunVolume,
    /// [`Self::RunBusybox`] with a shared folder of the host.
    RunFolder,
    /// [`Self::RunHello`] in a spare monitor.
    SpareHello,
    /// [`Self::RunBusybox`] in a spare monitor.
    SpareBusybox,
    /// Page faults on guest memory handled by KVM during [`Self::RunBusybox`].
    RunFaults,
    /// Private memory of the process of `kindling run`, including guest memory, while the program waits for input.
    IdleMemory,
    /// Private memory of front and monitor without guest memory, while the program waits for input.
    IdleOwnMemory,
    /// The same for a guest beside another one, with which it shares the pages of the programs.
    SecondOwnMemory,
    /// From the spawn of `kindling exec` to its exit, for a program that does nothing.
    ExecTrue,
    /// The time per MiB of a stream through `cat` in the guest.
    Stream,
    /// The growth of the monitor's memory, without guest memory, during the stream.
    StreamMemory,
    /// Of a copy of a template.
    Copy(clone::Span, Made),
    /// From the spawn of `kindling template create` to its exit.
    TemplateCreation,
    /// From the start of 25 copies to the end of a process, the median of them.
    CopiesAtOnce,
    /// The same, the 95th percentile.
    SlowCopyAtOnce,
    /// Page faults on guest memory handled by KVM, of a copy that is made on request.
    CopyFaults,
    /// Private memory of front and monitor, including the guest's, of a copy whose program waits for input.
    CopyMemory,
    /// From the spawn of `kindling snapshot`, of a guest that waits, to its exit.
    Snapshot,
    /// From the spawn of `kindling restore -d` to its exit, when the guest's processes have continued.
    Restore,
    /// From the spawn of `kindling run`, or of another monitor, with a jail.
    Jail(Span, Strength),
    /// A component of the cost of an operation on a device.
    Operation(Operation, Part),
}

/// A component of the cost of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// Guest and host together.
    Whole,
    /// Without the time in guest mode.
    Host,
    /// Exits per thousand operations, to KVM or to the monitor.
    Exits,
    /// Exits per thousand operations to the monitor.
    UserExits,
}

impl Part {
    const ALL: [Self; 4] = [Self::Whole, Self::Host, Self::Exits, Self::UserExits];

    /// The suffix of the metric's name.
    const fn suffix(self) -> &'static str {
        match self {
            Self::Whole => "",
            Self::Host => "_host",
            Self::Exits => "_exits_per_1000",
            Self::UserExits => "_user_exits_per_1000",
        }
    }

    /// The title of a table.
    const fn title(self) -> &'static str {
        match self {
            Self::Whole => "an operation, guest and host together, us",
            Self::Host => "the host's part of it, us",
            Self::Exits => "exits of the guest in an operation",
            Self::UserExits => "exits to the monitor in an operation",
        }
    }
}

impl Metric {
    /// The tables of a scenario in the order of the report, with titles and columns.
    pub(super) fn tables(scenario: Scenario) -> Vec<(&'static str, Vec<Self>)> {
        /// As many as fit into about 100 characters.
        const COLUMNS: usize = 5;
        let mut tables = match scenario {
            Scenario::Boot => vec![
                (
                    "",
                    vec![
                        Self::SpawnToInit,
                        Self::SpawnToFirstByte,
                        Self::SpawnToOutput,
                        Self::SpawnToExit,
                        Self::VmmOnly,
                    ],
                ),
                (
                    "",
                    vec![
                        Self::CpuTime,
                        Self::VmmPrivateMemory,
                        Self::VmmProportionalMemory,
                        Self::UserExits,
                        Self::GuestPageFaults,
                    ],
                ),
            ],
            Scenario::Run => vec![
                ("", vec![Self::RunHello, Self::RunBusybox, Self::RunVolume, Self::RunFolder]),
                ("", vec![Self::SpareHello, Self::SpareBusybox]),
                ("", vec![Self::ExecTrue, Self::Stream, Self::StreamMemory]),
                ("", vec![Self::IdleOwnMemory, Self::SecondOwnMemory]),
            ],
            Scenario::Start => vec![("", vec![Self::RunBusybox, Self::RunFaults, Self::IdleMemory])],
            Scenario::Clone => {
                let columns = |made| clone::Span::ALL.map(|span| Self::Copy(span, made)).to_vec();
                let others = vec![
                    Self::TemplateCreation,
                    Self::CopiesAtOnce,
                    Self::SlowCopyAtOnce,
                    Self::CopyFaults,
                    Self::CopyMemory,
                    Self::Snapshot,
                    Self::Restore,
                ];
                let copies = Made::ALL.map(|made| (made.title(), columns(made)));
                copies.into_iter().chain([("", others)]).collect()
            }
            Scenario::Jail => {
                let columns = |span| Strength::ALL.map(|strength| Self::Jail(span, strength)).to_vec();
                Span::ALL.map(|span| (span.title(), columns(span))).to_vec()
            }
            Scenario::Io => vec![("what the devices add", vec![Self::DevicesBoot, Self::DevicesMemory])],
        };
        if scenario == Scenario::Io {
            for part in Part::ALL {
                for operations in Operation::ALL.chunks(COLUMNS) {
                    let columns = operations.iter().map(|&operation| Self::Operation(operation, part));
                    tables.push((part.title(), columns.collect()));
                }
            }
        }
        tables
    }

    /// All metrics of a scenario in the order of the report.
    pub(super) fn all(scenario: Scenario) -> impl Iterator<Item = Self> {
        Self::tables(scenario).into_iter().flat_map(|(_, metrics)| metrics)
    }

    /// The name in files.
    pub(super) fn name(self) -> String {
        match self {
            Self::SpawnToInit => "spawn_to_init",
            Self::SpawnToFirstByte => "spawn_to_first_byte",
            Self::SpawnToOutput => "spawn_to_output",
            Self::SpawnToExit => "spawn_to_exit",
            Self::VmmOnly => "vmm_only",
            Self::CpuTime => "cpu_time",
            Self::VmmPrivateMemory => "vmm_private_memory",
            Self::VmmProportionalMemory => "vmm_proportional_memory",
            Self::UserExits => "user_exits",
            Self::GuestPageFaults => "guest_page_faults",
            Self::DevicesBoot => "devices_boot",
            Self::DevicesMemory => "devices_memory",
            Self::RunHello => "run_hello",
            Self::RunBusybox => "run_busybox",
            Self::RunVolume => "run_volume",
            Self::RunFolder => "run_folder",
            Self::SpareHello => "spare_hello",
            Self::SpareBusybox => "spare_busybox",
            Self::RunFaults => "run_faults",
            Self::IdleMemory => "idle_memory",
            Self::IdleOwnMemory => "idle_own_memory",
            Self::SecondOwnMemory => "second_own_memory",
            Self::ExecTrue => "exec_true",
            Self::Stream => "stream",
            Self::StreamMemory => "stream_memory",
            Self::Copy(span, made) => span.name(made),
            Self::TemplateCreation => "template_creation",
            Self::CopiesAtOnce => "clones_at_once_median",
            Self::SlowCopyAtOnce => "clones_at_once_p95",
            Self::CopyFaults => "clone_page_faults",
            Self::CopyMemory => "clone_private_memory",
            Self::Snapshot => "snapshot",
            Self::Restore => "restore",
            Self::Jail(span, strength) => return format!("{}_{}", span.name(), strength.name()),
            Self::Operation(operation, part) => return operation.name().to_owned() + part.suffix(),
        }
        .to_owned()
    }

    /// The unit of its values.
    pub(super) const fn unit(self) -> Unit {
        match self {
            Self::VmmPrivateMemory
            | Self::VmmProportionalMemory
            | Self::DevicesMemory
            | Self::IdleMemory
            | Self::IdleOwnMemory
            | Self::SecondOwnMemory
            | Self::CopyMemory
            | Self::StreamMemory => Unit::Bytes,
            Self::UserExits
            | Self::GuestPageFaults
            | Self::RunFaults
            | Self::CopyFaults
            | Self::Operation(_, Part::Exits | Part::UserExits) => Unit::Count,
            _ => Unit::Nanoseconds,
        }
    }

    /// The title of a chart.
    pub(super) fn long_title(self) -> String {
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
            Self::DevicesBoot => "what devices add to the boot, ms",
            Self::DevicesMemory => "what devices add to private memory, MiB",
            Self::RunHello => "kindling run of a small program, ms",
            Self::RunBusybox => "kindling run of a program of busybox, ms",
            Self::RunVolume => "the same with a volume, ms",
            Self::RunFolder => "the same with a folder of the host, ms",
            Self::SpareHello => "kindling run of a small program in a spare monitor, ms",
            Self::SpareBusybox => "kindling run of a program of busybox in a spare monitor, ms",
            Self::RunFaults => "page faults on guest memory",
            Self::IdleMemory => "private memory of a guest that waits, its monitor included, MiB",
            Self::IdleOwnMemory => "private memory of front and monitor without guest memory, MiB",
            Self::SecondOwnMemory => "the same for a second guest, MiB",
            Self::ExecTrue => "kindling exec of true, ms",
            Self::Stream => "a MiB into cat and back, ms",
            Self::StreamMemory => "growth of memory without guest memory during the stream, MiB",
            Self::Copy(_, made) => return format!("{}: {}", self.title(), made.title()),
            Self::TemplateCreation => "creation of a template, ms",
            Self::CopiesAtOnce => "25 copies at once, median, ms",
            Self::SlowCopyAtOnce => "25 copies at once, 95th percentile, ms",
            Self::CopyFaults => "page faults on guest memory of a copy",
            Self::CopyMemory => "private memory of a copy that waits, its monitor included, MiB",
            Self::Snapshot => "kindling snapshot of a guest that waits, ms",
            Self::Restore => "kindling restore -d, ms",
            Self::Jail(span, _) => return format!("{}: {}", self.title(), span.title()),
            Self::Operation(_, part) => return format!("{}: {}", self.title(), part.title()),
        }
        .to_owned()
    }

    /// The title of a column, with its unit unless the table's title has it.
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
            Self::DevicesBoot => "boot, ms",
            Self::DevicesMemory => "private, MiB",
            Self::RunHello => "hello, ms",
            Self::RunBusybox => "busybox, ms",
            Self::RunVolume => "volume, ms",
            Self::RunFolder => "folder, ms",
            Self::SpareHello => "hello, spare, ms",
            Self::SpareBusybox => "busybox, spare, ms",
            Self::RunFaults => "guest faults",
            Self::IdleMemory => "idle, MiB",
            Self::IdleOwnMemory => "own, MiB",
            Self::SecondOwnMemory => "second, MiB",
            Self::ExecTrue => "exec true, ms",
            Self::Stream => "stream, ms/MiB",
            Self::StreamMemory => "growth, MiB",
            Self::Copy(span, _) => span.title(),
            Self::TemplateCreation => "create, ms",
            Self::CopiesAtOnce => "25: median, ms",
            Self::SlowCopyAtOnce => "p95, ms",
            Self::CopyFaults => "guest faults",
            Self::CopyMemory => "private, MiB",
            Self::Snapshot => "snapshot, ms",
            Self::Restore => "restore, ms",
            Self::Jail(_, strength) => strength.title(),
            Self::Operation(operation, _) => operation.title(),
        }
    }

    /// Formats a value in the unit of the title.
    pub(super) fn show(self, value: u64) -> String {
        let digits = match self {
            Self::Operation(..) => 2,
            _ => match self.unit() {
                Unit::Nanoseconds => 3,
                Unit::Bytes => 2,
                Unit::Count => 0,
            },
        };
        format!("{:.digits$}", self.scaled(value))
    }

    /// A value in the unit of the title.
    #[expect(clippy::cast_precision_loss, reason = "for display")]
    pub(super) fn scaled(self, value: u64) -> f64 {
        let value = value as f64;
        match (self, self.unit()) {
            (Self::Operation(..), _) => value / 1e3,
            (_, Unit::Nanoseconds) => value / 1e6,
            (_, Unit::Bytes) => value / (1024.0 * 1024.0),
            (_, Unit::Count) => value,
        }
    }
}

impl From<Metric> for String {
    fn from(metric: Metric) -> Self {
        metric.name()
    }
}

impl TryFrom<String> for Metric {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        let mut all = Scenario::value_variants().iter().flat_map(|&scenario| Self::all(scenario));
        all.find(|metric| metric.name() == name).ok_or(name)
    }
}

/// The unit of a value.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_is_found_by_its_name() {
        for metric in Scenario::value_variants().iter().flat_map(|&scenario| Metric::all(scenario)) {
            assert_eq!(Metric::try_from(metric.name()), Ok(metric));
        }
        assert!(Metric::try_from("block_read_4k_".to_owned()).is_err());
    }

    #[test]
    fn boots_are_shown_in_milliseconds_and_operations_in_microseconds() {
        assert_eq!(Metric::SpawnToInit.show(20_238_400), "20.238");
        assert_eq!(Metric::Operation(Operation::BlockRead4k, Part::Host).show(20_238), "20.24");
        assert_eq!(Metric::Operation(Operation::BlockRead4k, Part::Exits).show(2_010), "2.01");
        assert_eq!(Metric::UserExits.show(7), "7");
    }
}
