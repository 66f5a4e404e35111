//! The measurements of scenario `boot`.

use super::measure::{Bench, SETTLE};
use super::metric::Metric;
use super::smaps;
use super::trace::{Traced, Tracer};
use super::vmms::Task;
use anyhow::{Context, Result};
use std::fs;

impl Bench<'_> {
    /// Runs each kind of measurement separately, so that none disturbs another. A first boot is not measured: it brings
    /// the monitor's files into the page cache, and a lab that has just booted still has background work (up to 15 ms).
    pub(super) fn boots(&mut self, tracer: Option<&Tracer>, runs: u32) -> Result<()> {
        self.boot(Task::Print, None, |_| Ok(()))?;
        for run in 1..=runs {
            eprintln!("run {run} of {runs} ...");
            self.greeting(tracer.is_none())?;
            self.payload()?;
            self.memory()?;
            if let Some(tracer) = tracer {
                self.traced(tracer)?;
            }
        }
        Ok(())
    }

    /// A guest without a payload, whose init prints a greeting: the time of init's first instruction and of its first
    /// output. For monitors without Kindling's boot mark port, the second value replaces the first.
    fn greeting(&mut self, vmm_only: bool) -> Result<()> {
        let path = self.scratch.join("report.json");
        let report = self.vmm.kind.is_kindling().then_some(path.as_path());
        let run = self.boot(Task::Greet, report, |_| Ok(()))?;
        let first_byte = run.seen.since(run.spawned);
        self.add(Metric::SpawnToFirstByte, first_byte);
        let Some(report) = report else {
            self.add(Metric::SpawnToInit, first_byte);
            return Ok(());
        };
        let text = fs::read(report).context("it wrote no report")?;
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

    /// A guest whose payload prints a line and exits.
    fn payload(&mut self) -> Result<()> {
        let run = self.boot(Task::Print, None, |_| Ok(()))?;
        self.add(Metric::SpawnToOutput, run.seen.since(run.spawned));
        self.add(Metric::SpawnToExit, run.ended.since(run.spawned));
        self.add(Metric::CpuTime, u64::try_from(run.cpu_time.as_nanos()).unwrap_or(u64::MAX));
        Ok(())
    }

    /// The same guest while KVM's tracepoints are recorded.
    fn traced(&mut self, tracer: &Tracer) -> Result<()> {
        tracer.start(&Traced::EVENTS)?;
        let run = self.boot(Task::Print, None, |_| Ok(()))?;
        let traced = Traced::of(&tracer.finish()?, &run)?;
        self.add(Metric::VmmOnly, traced.vmm_only);
        self.add(Metric::UserExits, traced.user_exits);
        self.add(Metric::GuestPageFaults, traced.page_faults);
        Ok(())
    }

    /// A guest whose payload waits while the monitor's memory is measured.
    fn memory(&mut self) -> Result<()> {
        let usage = self.memory_usage()?;
        self.add(Metric::VmmPrivateMemory, usage.private);
        self.add(Metric::VmmProportionalMemory, usage.proportional);
        Ok(())
    }

    pub(super) fn memory_usage(&self) -> Result<smaps::Usage> {
        let mut maps = String::new();
        self.boot(Task::Wait, None, |pid: u32| {
            std::thread::sleep(SETTLE);
            maps = fs::read_to_string(format!("/proc/{pid}/smaps")).context("cannot read its smaps")?;
            Ok(())
        })?;
        smaps::without_guest(&maps, self.case.memory_mib << 20)
            .context("its smaps show no memory of the guest's size")
    }
}

/// The steps of a boot report of Kindling.
struct Steps(serde_json::Value);

impl Steps {
    /// The time of a step on CLOCK_MONOTONIC.
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
