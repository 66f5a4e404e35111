//! Runs the boots one after another on the machine of the VMM (this machine or the lab), and reads their records.

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
    /// File with the boots to run
    plan: PathBuf,
    /// File to write the times to
    times: PathBuf,
}

/// Timeout of a boot. In the lab it is on the lab's clock.
const LIMIT: Duration = Duration::from_secs(20);
/// Pause between two boots, in which the host completes deferred work of the previous guest.
const SETTLE: Duration = Duration::from_millis(50);

/// A boot to run.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct Boot {
    /// The name in messages.
    pub(super) name: String,
    /// The program and its arguments.
    pub(super) command: Vec<String>,
}

/// The hidden command that runs inside the lab.
pub(crate) fn run(arguments: &Arguments) -> Result<u8> {
    let plan: Vec<Boot> = serde_json::from_slice(&fs::read(&arguments.plan)?)?;
    fs::write(&arguments.times, serde_json::to_vec(&run_all(&plan)?)?)?;
    Ok(0)
}

/// Runs the boots; returns the duration of each process in nanoseconds.
pub(super) fn run_all(plan: &[Boot]) -> Result<Vec<u64>> {
    plan.iter().map(run_one).collect()
}

fn run_one(boot: &Boot) -> Result<u64> {
    std::thread::sleep(SETTLE);
    let (program, arguments) = boot.command.split_first().context("the command of a boot is empty")?;
    let started = Instant::now();
    let child = Command::new(program)
        .args(arguments.iter().map(|argument| lab::with_time(argument)))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {program}"))?;
    let (end_sender, end_receiver) = mpsc::channel::<()>();
    let pid = Pid::from_child(&child);
    // The thread sleeps until the boot has ended, and kills it only after the timeout.
    std::thread::spawn(move || {
        if end_receiver.recv_timeout(LIMIT) == Err(mpsc::RecvTimeoutError::Timeout) {
            let _ = kill_process(pid, Signal::TERM);
        }
    });
    let output = child.wait_with_output()?;
    let time = Instant::now().since(started);
    drop(end_sender);
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

/// A step of a boot report: its name, and when it was complete in nanoseconds since the start.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Step {
    pub(super) name: String,
    pub(super) ns: u64,
}

/// The steps at which the guest and init start.
pub(super) const FIRST_INSTRUCTION: &str = "first instruction";
pub(crate) const INIT: &str = "init: first instruction";

impl Report {
    /// The time of a step.
    pub(super) fn at(&self, name: &str) -> Result<u64> {
        let step = self.steps.iter().find(|step| step.name == name);
        Ok(step.with_context(|| format!("the boot's report has no step {name:?}"))?.ns)
    }

    /// The duration of the kernel's boot.
    pub(super) fn kernel_time(&self) -> Result<u64> {
        Ok(self.at(INIT)?.saturating_sub(self.at(FIRST_INSTRUCTION)?))
    }
}

/// A sample: time, vCPU, instruction pointer, words of the stack.
pub(super) type Sample = (u64, u8, u64, Vec<u64>);
/// A mark: time, vCPU, address of the function, time for which the VMM held the guest.
pub(super) type Mark = (u64, u8, u64, u64);

/// The records of a boot, as `kindling boot --profile` writes them.
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct Records {
    pub(super) report: Report,
    pub(super) samples: Vec<Sample>,
    /// Time, kind of access, port or address.
    pub(super) exits: Vec<(u64, String, u64)>,
    pub(super) marks: Vec<Mark>,
}

/// All measurements.
#[derive(Clone, Debug, Default)]
pub(super) struct Measured {
    /// The boot without recording.
    pub(super) plain: Report,
    /// The duration of its process.
    pub(super) plain_time: u64,
    /// The boot with marked functions.
    pub(super) marked: Records,
    /// The boot with marked functions and samples.
    pub(super) sampled: Option<Records>,
}

/// Reads a JSON file that `kindling` wrote.
pub(super) fn read<T: for<'a> Deserialize<'a>>(path: &Path) -> Result<T> {
    let text = fs::read(path).with_context(|| format!("the boot did not write {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("cannot parse {}", path.display()))
}
