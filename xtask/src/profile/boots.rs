//! The boots: run one after another beside the VMM, on this machine or inside the lab, and read back.

use crate::lab;
use anyhow::{Context, Result, bail};
use clap::Args;
use kindling_vmm::Instant;
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

#[derive(Args, Debug)]
pub(crate) struct Arguments {
    /// What to run
    plan: PathBuf,
    /// Where the times go
    times: PathBuf,
}

/// A boot that has not ended by then hangs. In the lab these are its own seconds.
const LIMIT: Duration = Duration::from_secs(20);
/// Between two boots: what the host does after the end of a guest is done.
const SETTLE: Duration = Duration::from_millis(50);

/// A boot to make.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct Boot {
    /// What a message calls it.
    pub(super) name: String,
    /// The program and its arguments.
    pub(super) command: Vec<String>,
}

/// The hidden command that runs inside the lab.
pub(crate) fn run(arguments: &Arguments) -> Result<u8> {
    let plan: Vec<Boot> = serde_json::from_slice(&fs::read(&arguments.plan)?)?;
    fs::write(&arguments.times, serde_json::to_vec(&make(&plan)?)?)?;
    Ok(0)
}

/// Makes the boots; how long each process was there, in nanoseconds.
pub(super) fn make(plan: &[Boot]) -> Result<Vec<u64>> {
    plan.iter().map(make_one).collect()
}

fn make_one(boot: &Boot) -> Result<u64> {
    std::thread::sleep(SETTLE);
    let (program, arguments) = boot.command.split_first().context("a boot without a program")?;
    let started = Instant::now();
    let child = Command::new(program)
        .args(arguments.iter().map(|argument| lab::with_time(argument)))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {program}"))?;
    let (ended, told) = mpsc::channel::<()>();
    let pid = Pid::from_child(&child);
    // Sleeps until the boot has ended, and disturbs it only where it has not.
    std::thread::spawn(move || {
        if told.recv_timeout(LIMIT) == Err(mpsc::RecvTimeoutError::Timeout) {
            let _ = kill_process(pid, Signal::TERM);
        }
    });
    let output = child.wait_with_output()?;
    let time = Instant::now().since(started);
    drop(ended);
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr);
        bail!("the {} boot failed ({}): {}", boot.name, output.status, words.trim());
    }
    Ok(time)
}

/// The report of a boot, as `kindling boot --report-json` writes it.
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct Report {
    pub(super) steps: Vec<Step>,
}

/// A step of it: a name, and when it was complete in nanoseconds since the start.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Step {
    pub(super) name: String,
    pub(super) ns: u64,
}

/// Where the guest begins, and where init does.
pub(super) const FIRST_INSTRUCTION: &str = "first instruction";
pub(super) const INIT: &str = "init: first instruction";

impl Report {
    /// When a step was complete.
    pub(super) fn at(&self, name: &str) -> Result<u64> {
        let step = self.steps.iter().find(|step| step.name == name);
        Ok(step.with_context(|| format!("the boot's report has no step {name:?}"))?.ns)
    }

    /// How long the kernel took.
    pub(super) fn kernel_time(&self) -> Result<u64> {
        Ok(self.at(INIT)?.saturating_sub(self.at(FIRST_INSTRUCTION)?))
    }
}

/// A sample: when, on which vCPU, its instruction pointer, words of its stack.
pub(super) type Sample = (u64, u8, u64, Vec<u64>);
/// A mark: when, on which vCPU, the function, for how long the VMM held the guest.
pub(super) type Mark = (u64, u8, u64, u64);

/// The records of a boot, as `kindling boot --profile` writes them.
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct Records {
    pub(super) report: Report,
    pub(super) samples: Vec<Sample>,
    /// When, what the guest did, the port or the address.
    pub(super) exits: Vec<(u64, String, u64)>,
    pub(super) marks: Vec<Mark>,
}

/// Everything that was measured.
#[derive(Clone, Debug, Default)]
pub(super) struct Measured {
    /// The boot of which nothing was recorded.
    pub(super) plain: Report,
    /// How long its process was there.
    pub(super) plain_time: u64,
    /// The one with marked functions.
    pub(super) marked: Records,
    /// The one with marked functions and samples.
    pub(super) sampled: Option<Records>,
}

/// Reads what `kindling` wrote.
pub(super) fn read<T: for<'a> Deserialize<'a>>(path: &Path) -> Result<T> {
    let text = fs::read(path).with_context(|| format!("the boot left no {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("{} cannot be read", path.display()))
}
