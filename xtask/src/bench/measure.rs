//! The measuring: beside the monitors, on this machine or inside the lab.

use super::metric::Metric;
use super::peer::Peers;
use super::plan::{Case, Failure, Outcome, Plan, Sample, Scenario};
use super::process::{self, Run};
use super::trace::Tracer;
use super::vmms::{Devices, Guest, Task, Vmm};
use anyhow::{Context, Result, bail};
use clap::Args;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

#[derive(Args, Debug)]
pub(crate) struct Arguments {
    /// What to measure
    plan: PathBuf,
    /// Where the values go
    outcome: PathBuf,
}

/// A monitor that has not ended by then hangs. In the lab these are its own seconds, and a guest
/// that turns in circles takes a minute for them.
pub(super) const LIMIT: Duration = Duration::from_secs(10);
/// How often a run is made until it succeeds: a guest in the lab can hang through no fault of its own or of its
/// monitor (docs/testing.md, "The lab").
const ATTEMPTS: u32 = 4;
/// Between two runs, and before a waiting guest's memory is read: what the kernel does later is done.
pub(super) const SETTLE: Duration = Duration::from_millis(50);

/// The hidden command that runs inside the lab.
pub(crate) fn run(arguments: &Arguments) -> Result<u8> {
    let plan = fs::read(&arguments.plan)?;
    let outcome = measure(&serde_json::from_slice(&plan)?)?;
    fs::write(&arguments.outcome, serde_json::to_vec(&outcome)?)?;
    Ok(0)
}

/// Carries a plan out. A monitor that fails is reported with the others' values.
pub(super) fn measure(plan: &Plan) -> Result<Outcome> {
    let scratch = tempfile::tempdir()?;
    let mut outcome = Outcome { machine: machine(), ..Outcome::default() };
    let tracer = match Tracer::new() {
        Ok(tracer) => Some(tracer),
        Err(error) => {
            outcome.omitted.push(format!("user exits and guest faults: {error:#}"));
            None
        }
    };
    let peers = match plan.scenario {
        Scenario::Boot | Scenario::Run | Scenario::Start => Peers::default(),
        Scenario::Io => Peers::new(scratch.path(), &mut outcome.omitted),
    };
    for &case in &plan.cases {
        for vmm in &plan.vmms {
            eprintln!("measuring {}, {case} ...", vmm.name);
            let mut bench = Bench {
                vmm,
                guest: &plan.guest,
                case,
                devices: Devices::default(),
                peers: &peers,
                scratch: scratch.path(),
                samples: Vec::new(),
                omitted: Vec::new(),
            };
            let result = bench.preboot().and_then(|_kernel| match plan.scenario {
                Scenario::Boot => bench.boots(tracer.as_ref(), plan.runs),
                Scenario::Io => bench.operations(tracer.as_ref(), plan.runs),
                Scenario::Run => {
                    bench.programs(plan.images.as_ref().context("the plan has no images")?, plan.runs)
                }
                Scenario::Start => {
                    let images = plan.images.as_ref().context("the plan has no images")?;
                    bench.starts(images, tracer.as_ref(), plan.runs)
                }
            });
            outcome.omitted.append(&mut bench.omitted);
            match result {
                Ok(()) => outcome.samples.append(&mut bench.samples),
                Err(error) => {
                    outcome.failures.push(Failure { vmm: vmm.name.clone(), case, what: format!("{error:#}") })
                }
            }
        }
    }
    Ok(outcome)
}

/// The processor and the kernel that the monitors run on.
fn machine() -> String {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let name = rustix::system::uname();
    let release = name.release().to_string_lossy();
    format!("{}, Linux {release}", model.map_or("unknown processor", |(_, model)| model))
}

/// One monitor with one size of guest.
pub(super) struct Bench<'a> {
    pub(super) vmm: &'a Vmm,
    pub(super) guest: &'a Guest,
    pub(super) case: Case,
    /// What the next guests have.
    pub(super) devices: Devices,
    /// Who is behind devices that lead to somebody.
    pub(super) peers: &'a Peers,
    pub(super) scratch: &'a Path,
    samples: Vec<Sample>,
    /// What could not be measured of it.
    pub(super) omitted: Vec<String>,
}

impl Bench<'_> {
    /// Boots the kernel once for the guests with these devices that follow, where they continue from it. That ends
    /// with the result, so that no other monitor finds it.
    pub(super) fn preboot(&self) -> Result<Option<Prebooted>> {
        let Some(mut command) = self.vmm.preboot(self.guest, self.case, &self.devices) else {
            return Ok(None);
        };
        let output = command.output().context("it cannot be started")?;
        let place = self.guest.image.as_ref().map(|image| Prebooted(image.join("preboot")));
        if !output.status.success() {
            bail!("it did not boot the kernel: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(place)
    }

    pub(super) fn add(&mut self, metric: Metric, value: u64) {
        self.samples.push(Sample { vmm: self.vmm.name.clone(), case: self.case, metric, value });
    }

    pub(super) fn boot(
        &self,
        task: Task,
        report: Option<&Path>,
        mut at_text: impl FnMut(u32) -> Result<()>,
    ) -> Result<Run> {
        let mut attempt = 1;
        loop {
            std::thread::sleep(SETTLE);
            // Monitors make it, and some leave it behind.
            let _ = self.devices.vsock.as_ref().map(fs::remove_file);
            let command =
                self.vmm.command(self.guest, self.case, task, &self.devices, self.scratch, report)?;
            match process::run(command, task.text(), LIMIT, &mut at_text) {
                Err(error) if attempt < ATTEMPTS => {
                    attempt += 1;
                    eprintln!("{}: {error:#}; attempt {attempt} of {ATTEMPTS}", self.vmm.name);
                }
                result => return result,
            }
        }
    }
}

/// Kernels that were booted before, as long as this exists.
pub(super) struct Prebooted(PathBuf);

impl Drop for Prebooted {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
