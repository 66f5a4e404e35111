//! The measuring code, which runs on the same machine as the monitors: this machine or the lab.

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
    /// File with the plan to measure
    plan: PathBuf,
    /// File to write the outcome to
    outcome: PathBuf,
}

/// Timeout of a monitor. In the lab it is on the lab's clock; a guest that spins makes it last about a minute of real
/// time.
pub(super) const LIMIT: Duration = Duration::from_secs(10);
/// Attempts of a run until it succeeds: a guest in the lab can hang without a fault of the guest or its monitor
/// (docs/testing.md, "The lab").
const ATTEMPTS: u32 = 4;
/// Pause between two runs, and before a guest's memory is read, in which deferred work of the kernel completes.
pub(super) const SETTLE: Duration = Duration::from_millis(50);

/// The hidden command that runs inside the lab.
pub(crate) fn run(arguments: &Arguments) -> Result<u8> {
    let plan = fs::read(&arguments.plan)?;
    let outcome = measure(&serde_json::from_slice(&plan)?)?;
    fs::write(&arguments.outcome, serde_json::to_vec(&outcome)?)?;
    Ok(0)
}

/// Executes a plan. A monitor that fails is reported together with the values of the others.
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
        Scenario::Boot | Scenario::Run | Scenario::Start | Scenario::Clone | Scenario::Jail => {
            Peers::default()
        }
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
            let result = bench.preboot().and_then(|_kernel| bench.measure(plan, tracer.as_ref()));
            outcome.omitted.append(&mut bench.omitted);
            match result {
                Ok(()) => outcome.samples.append(&mut bench.samples),
                Err(error) => {
                    outcome.failures.push(Failure { vmm: vmm.name.clone(), case, what: format!("{error:#}") })
                }
            }
        }
        if let Some(containers) = plan.images.as_ref().and_then(|images| images.containers.as_ref()) {
            match containers.measure(case, plan.runs, scratch.path()) {
                Ok(mut samples) => outcome.samples.append(&mut samples),
                Err(error) => outcome.omitted.push(format!("containers: {error:#}")),
            }
        }
    }
    Ok(outcome)
}

/// The processor model and kernel release of the monitors' host.
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
    /// The devices of the next guests.
    pub(super) devices: Devices,
    /// The host side of network and vsock devices.
    pub(super) peers: &'a Peers,
    pub(super) scratch: &'a Path,
    samples: Vec<Sample>,
    /// Measurements that could not be made, and why.
    pub(super) omitted: Vec<String>,
}

impl Bench<'_> {
    /// Measures the scenario of a plan.
    fn measure(&mut self, plan: &Plan, tracer: Option<&Tracer>) -> Result<()> {
        let images = || plan.images.as_ref().context("the plan has no images");
        match plan.scenario {
            Scenario::Boot => self.boots(tracer, plan.runs),
            Scenario::Io => self.operations(tracer, plan.runs),
            Scenario::Run => self.programs(images()?, plan.runs),
            Scenario::Jail => self.jails(images()?, plan.runs),
            Scenario::Clone => self.copies(images()?, tracer, plan.runs),
            Scenario::Start => self.starts(images()?, tracer, plan.runs),
        }
    }

    /// Pre-boots the kernel for the following guests with these devices, if the monitor supports it. Dropping the
    /// result removes the pre-booted kernel, so that no other monitor uses it.
    pub(super) fn preboot(&self) -> Result<Option<Prebooted>> {
        let Some(mut command) = self.vmm.preboot(self.guest, self.case, &self.devices) else {
            return Ok(None);
        };
        let output = command.output().context("cannot start the monitor")?;
        let prebooted = self.guest.image.as_ref().map(|image| Prebooted(image.join("preboot")));
        if !output.status.success() {
            bail!("cannot pre-boot the kernel: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(prebooted)
    }

    pub(super) fn add(&mut self, metric: Metric, value: u64) {
        self.samples.push(Sample { vmm: self.vmm.name.clone(), case: self.case, metric, value });
    }

    pub(super) fn boot(
        &self,
        task: Task,
        report: Option<&Path>,
        mut on_text: impl FnMut(u32) -> Result<()>,
    ) -> Result<Run> {
        let mut attempt = 1;
        loop {
            std::thread::sleep(SETTLE);
            // Monitors create the socket, and some do not remove it.
            let _ = self.devices.vsock.as_ref().map(fs::remove_file);
            let command =
                self.vmm.command(self.guest, self.case, task, &self.devices, self.scratch, report)?;
            match process::run(command, task.text(), LIMIT, &mut on_text) {
                Err(error) if attempt < ATTEMPTS => {
                    attempt += 1;
                    eprintln!("{}: {error:#}; attempt {attempt} of {ATTEMPTS}", self.vmm.name);
                }
                result => return result,
            }
        }
    }
}

/// The folder of pre-booted kernels, which is removed on drop.
pub(super) struct Prebooted(PathBuf);

impl Drop for Prebooted {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
