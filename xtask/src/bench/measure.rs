//! The measuring: beside the monitors, on this machine or inside the lab.

use super::plan::{Case, Failure, Metric, Outcome, Plan, Sample};
use super::process::{self, Run};
use super::smaps;
use super::trace::Tracer;
use super::vmms::{Guest, Task, Vmm};
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
/// that turns in circles takes half a minute for them.
const LIMIT: Duration = Duration::from_secs(5);
/// How often a run is made until it succeeds: a guest in the lab can hang through no fault of its own or of its
/// monitor (docs/architecture.md, "The lab").
const ATTEMPTS: u32 = 4;
/// Between two runs, and before a waiting guest's memory is read: what the kernel does later is done.
const SETTLE: Duration = Duration::from_millis(50);

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
    for &case in &plan.cases {
        for vmm in &plan.vmms {
            eprintln!("measuring {}, {case} ...", vmm.name);
            let guest = &plan.guest;
            let mut bench = Bench { vmm, guest, case, scratch: scratch.path(), samples: Vec::new() };
            match bench.preboot().and_then(|_kernel| bench.all(tracer.as_ref(), plan.runs)) {
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
struct Bench<'a> {
    vmm: &'a Vmm,
    guest: &'a Guest,
    case: Case,
    scratch: &'a Path,
    samples: Vec<Sample>,
}

impl Bench<'_> {
    /// Each kind of run by itself, so that none disturbs what another measures. Before them the
    /// host meets the monitor once, which does not count: its files are in memory then, and a lab
    /// that has just started has more to do than the run (15 ms were seen).
    fn all(&mut self, tracer: Option<&Tracer>, runs: u32) -> Result<()> {
        self.boot(Task::Speak, None, |_| Ok(()))?;
        for _ in 0..runs {
            self.greeting(tracer.is_none())?;
            self.payload()?;
            self.memory()?;
            if let Some(tracer) = tracer {
                self.traced(tracer)?;
            }
        }
        Ok(())
    }

    /// Boots the kernel once for the guests that follow, where they continue from it. That ends with the
    /// result, so that no other monitor finds it.
    fn preboot(&self) -> Result<Option<Prebooted>> {
        let Some(mut command) = self.vmm.preboot(self.guest, self.case) else { return Ok(None) };
        let output = command.output().context("it cannot be started")?;
        let place = self.guest.image.as_ref().map(|image| Prebooted(image.join("preboot")));
        if !output.status.success() {
            bail!("it did not boot the kernel: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(place)
    }

    fn add(&mut self, metric: Metric, value: u64) {
        self.samples.push(Sample { vmm: self.vmm.name.clone(), case: self.case, metric, value });
    }

    fn boot(
        &self,
        task: Task,
        report: Option<&Path>,
        mut at_text: impl FnMut(u32) -> Result<()>,
    ) -> Result<Run> {
        let mut attempt = 1;
        loop {
            std::thread::sleep(SETTLE);
            let command = self.vmm.command(self.guest, self.case, task, self.scratch, report)?;
            match process::run(command, task.text(), LIMIT, &mut at_text) {
                Err(error) if attempt < ATTEMPTS => {
                    attempt += 1;
                    eprintln!("{}: {error:#}; attempt {attempt} of {ATTEMPTS}", self.vmm.name);
                }
                result => return result,
            }
        }
    }

    /// A guest without a payload, whose init greets: when init began, and when it first spoke. A
    /// monitor without our ports cannot tell the first, so the second stands for it.
    fn greeting(&mut self, vmm_only: bool) -> Result<()> {
        let path = self.scratch.join("report.json");
        let report = self.vmm.kind.is_ours().then_some(path.as_path());
        let run = self.boot(Task::Greet, report, |_| Ok(()))?;
        let first_byte = run.seen.since(run.spawned);
        self.add(Metric::SpawnToFirstByte, first_byte);
        let Some(report) = report else {
            self.add(Metric::SpawnToInit, first_byte);
            return Ok(());
        };
        let text = fs::read(report).context("it left no report")?;
        let steps = Steps(serde_json::from_slice(&text).context("its report is not JSON")?);
        let init = steps.at("init: first instruction")?;
        self.add(Metric::SpawnToInit, init.saturating_sub(run.spawned.0));
        if vmm_only {
            let before = steps.at("first instruction")?.saturating_sub(run.spawned.0);
            let after = run.ended.0.saturating_sub(steps.at("guest ended")?);
            self.add(Metric::VmmOnly, before + after);
        }
        Ok(())
    }

    /// A guest whose payload speaks and ends.
    fn payload(&mut self) -> Result<()> {
        let run = self.boot(Task::Speak, None, |_| Ok(()))?;
        self.add(Metric::SpawnToOutput, run.seen.since(run.spawned));
        self.add(Metric::SpawnToExit, run.ended.since(run.spawned));
        self.add(Metric::CpuTime, u64::try_from(run.cpu_time.as_nanos()).unwrap_or(u64::MAX));
        Ok(())
    }

    /// The same again while KVM's events are recorded.
    fn traced(&mut self, tracer: &Tracer) -> Result<()> {
        tracer.start()?;
        let run = self.boot(Task::Speak, None, |_| Ok(()))?;
        let traced = tracer.finish(&run)?;
        self.add(Metric::VmmOnly, traced.vmm_only);
        self.add(Metric::UserExits, traced.user_exits);
        self.add(Metric::GuestPageFaults, traced.page_faults);
        Ok(())
    }

    /// A guest whose payload waits while the monitor's memory is counted.
    fn memory(&mut self) -> Result<()> {
        let mut maps = String::new();
        self.boot(Task::Wait, None, |pid: u32| {
            std::thread::sleep(SETTLE);
            maps = fs::read_to_string(format!("/proc/{pid}/smaps")).context("cannot read its smaps")?;
            Ok(())
        })?;
        let usage = smaps::without_guest(&maps, self.case.memory_mib << 20)
            .context("its smaps show no memory of the guest's size")?;
        self.add(Metric::VmmPrivateMemory, usage.private);
        self.add(Metric::VmmProportionalMemory, usage.proportional);
        Ok(())
    }
}

/// Kernels that were booted before, as long as this exists.
struct Prebooted(PathBuf);

impl Drop for Prebooted {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The report of one of our own boots.
struct Steps(serde_json::Value);

impl Steps {
    /// When a step was reached, on CLOCK_MONOTONIC.
    fn at(&self, name: &str) -> Result<u64> {
        let steps = self.0["steps"].as_array().map_or(&[][..], Vec::as_slice);
        let step = steps.iter().find(|step| step["name"] == name);
        let time = step.and_then(|step| Some(self.0["start_ns"].as_u64()? + step["ns"].as_u64()?));
        time.with_context(|| format!("its report has no step {name:?}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_found_by_name() {
        let text = r#"{"start_ns": 100, "steps": [{"name": "a", "ns": 1}, {"name": "b", "ns": 5}]}"#;
        let steps = Steps(serde_json::from_str(text).unwrap());
        assert_eq!(steps.at("b").unwrap(), 105);
        assert_eq!(steps.at("c").unwrap_err().to_string(), "its report has no step \"c\"");
    }
}
