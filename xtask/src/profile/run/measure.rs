//! Runs a program beside the VMM, on this machine or in the lab, and records what happens.

use super::Step;
use crate::bench::trace::Tracer;
use anyhow::{Context, Result, bail};
use clap::Args;
use kindling_vmm::Instant;
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

#[derive(Args, Debug)]
pub(crate) struct Arguments {
    /// File with the plan
    plan: PathBuf,
    /// File to write the record to
    record: PathBuf,
    /// File to copy the pre-booted kernel to
    kernel: PathBuf,
}

impl From<[PathBuf; 3]> for Arguments {
    fn from([plan, record, kernel]: [PathBuf; 3]) -> Self {
        Self { plan, record, kernel }
    }
}

/// The program to run. Paths are those of the machine that runs it.
#[derive(Debug, Deserialize, Serialize)]
pub(super) struct Plan {
    pub(super) kindling: PathBuf,
    /// The guest kernel's image.
    pub(super) image: PathBuf,
    /// The container image.
    pub(super) root: PathBuf,
    pub(super) memory_mib: u64,
    pub(super) vcpus: u8,
    pub(super) program: Vec<String>,
    /// Whether the program gets a spare monitor.
    pub(super) spare: bool,
}

/// A run as it was reported.
#[derive(Debug, Deserialize, Serialize)]
pub(super) struct Run {
    /// When the command was started.
    pub(super) started: u64,
    /// When its process had ended, in nanoseconds since then.
    pub(super) ended: u64,
    pub(super) steps: Vec<Step>,
}

/// The record of a plan.
#[derive(Debug, Deserialize, Serialize)]
pub(super) struct Record {
    /// A run without tracing.
    pub(super) plain: Run,
    /// A run with tracing.
    pub(super) traced: Run,
    /// The trace, a line for each event.
    pub(super) trace: String,
}

/// Pause between runs, in which the host completes deferred work.
const SETTLE: Duration = Duration::from_millis(50);
/// Runs before the one that counts: the first converts the image and pre-boots the kernel, and later ones find files in the
/// host's memory.
const WARM_UP: u32 = 4;
/// The tracepoints to record.
const EVENTS: [&str; 2] = ["kvm_page_fault", "kvm_exit"];

/// The hidden command that runs inside the lab.
pub(crate) fn run(arguments: &Arguments) -> Result<u8> {
    let plan: Plan = serde_json::from_slice(&fs::read(&arguments.plan)?)?;
    let user = tempfile::tempdir()?;
    let record = plan.record(user.path())?;
    fs::write(&arguments.record, serde_json::to_vec(&record)?)?;
    fs::copy(kernel_in(&user.path().join("kindling/kernels"))?, &arguments.kernel)?;
    Ok(0)
}

/// The only pre-booted kernel in a cache: `KEY/VCPUS-MEMORY`.
fn kernel_in(cache: &Path) -> Result<PathBuf> {
    let mut path = cache.to_owned();
    while path.is_dir() {
        let entry = fs::read_dir(&path)?.next().with_context(|| format!("{} is empty", path.display()))?;
        path = entry?.path();
    }
    Ok(path)
}

impl Plan {
    fn record(&self, user: &Path) -> Result<Record> {
        // The processes of the runs are recorded, and those that they leave: a spare monitor serves the next run.
        let tracer = Tracer::new()?;
        for _ in 0..WARM_UP {
            self.run(user)?;
        }
        let plain = self.run(user)?;
        tracer.start(&EVENTS)?;
        let traced = self.run(user)?;
        Ok(Record { plain, traced, trace: tracer.finish()? })
    }

    fn run(&self, user: &Path) -> Result<Run> {
        std::thread::sleep(SETTLE);
        let mut command = Command::new(&self.kindling);
        command.args(["run", "--report", "--memory", &self.memory_mib.to_string()]);
        command.args(["--cpus", &self.vcpus.to_string()]).env("KINDLING_IMAGE", &self.image);
        command.args(self.spare.then_some("--spare"));
        for variable in ["XDG_RUNTIME_DIR", "XDG_CACHE_HOME", "XDG_DATA_HOME"] {
            command.env(variable, user);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let started = Instant::now();
        command.args(["--started-at", &started.0.to_string()]).arg(&self.root).args(&self.program);
        let output = command.spawn().context("cannot start kindling")?.wait_with_output()?;
        let ended = Instant::now().since(started);
        let messages = String::from_utf8_lossy(&output.stderr);
        if !output.status.success() {
            bail!("the program ended with {}: {messages}", output.status);
        }
        let steps: Vec<Step> = messages.lines().filter_map(Step::parse).collect();
        if steps.is_empty() {
            bail!("kindling printed no report: {messages}");
        }
        Ok(Run { started: started.0, ended, steps })
    }
}
