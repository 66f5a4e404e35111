//! The measurements of scenario `clone`: copies of a template, made on request or parked ahead.

use super::measure::{Bench, LIMIT, SETTLE};
use super::metric::Metric;
use super::payload;
use super::process;
use super::run::{Images, READY};
use super::trace::{self, Traced, Tracer};
use anyhow::{Result, ensure};
use kindling_vmm::Instant;
use rustix::process::{Pid, WaitOptions, wait};
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::process::{Command, Stdio};
use std::thread;

/// Names of steps in the report of `kindling run`.
const REQUEST: &str = "configuration received";
const STARTED: &str = "payload started";
const ENDED: &str = "payload ended";
/// The names of the templates.
const HELLO: &str = "hello";
const BUSYBOX: &str = "busybox";

/// Number of copies that are started at once.
const AT_ONCE: usize = 25;

/// What is measured.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub(super) enum Span {
    /// From the receipt of the request in the monitor to the start of the payload.
    Payload,
    /// From there to the end of the payload.
    End,
    /// From the spawn of the command to its end.
    Exit,
}

/// How a copy is made.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub(super) enum Made {
    /// When it is requested.
    OnRequest,
    /// Ahead: it waits.
    Ahead,
}

impl Span {
    pub(super) const ALL: [Self; 3] = [Self::Payload, Self::End, Self::Exit];

    /// The name in files, of a copy that is made in this way.
    pub(super) const fn name(self, made: Made) -> &'static str {
        match (self, made) {
            (Self::Payload, Made::OnRequest) => "clone_to_payload",
            (Self::End, Made::OnRequest) => "clone_to_end",
            (Self::Exit, Made::OnRequest) => "clone_spawn_to_exit",
            (Self::Payload, Made::Ahead) => "parked_clone_to_payload",
            (Self::End, Made::Ahead) => "parked_clone_to_end",
            (Self::Exit, Made::Ahead) => "parked_clone_spawn_to_exit",
        }
    }

    /// The title of a column.
    pub(super) const fn title(self) -> &'static str {
        match self {
            Self::Payload => "payload, ms",
            Self::End => "its end, ms",
            Self::Exit => "exit, ms",
        }
    }
}

impl Made {
    pub(super) const ALL: [Self; 2] = [Self::OnRequest, Self::Ahead];

    /// The title of a table.
    pub(super) const fn title(self) -> &'static str {
        match self {
            Self::OnRequest => "copies of a template, made on request",
            Self::Ahead => "copies that are parked ahead",
        }
    }

    const fn options(self) -> &'static [&'static str] {
        match self {
            Self::OnRequest => &["--report"],
            Self::Ahead => &["--report", "--spare"],
        }
    }
}

impl Bench<'_> {
    /// Measures copies of templates.
    pub(super) fn copies(&mut self, images: &Images, tracer: Option<&Tracer>, runs: u32) -> Result<()> {
        let create = |bench: &Self, name| {
            let mut command = bench.kindling("template");
            let image = if name == HELLO { images.hello() } else { images.busybox() };
            let memory = bench.case.memory_mib.to_string();
            let cpus = bench.case.vcpus.to_string();
            command.args(["create", "--memory", &memory, "--cpus", &cpus, &bench.template(name)]).arg(image);
            let run = process::run(command, "", LIMIT, |_| Ok(()))?;
            Ok::<_, anyhow::Error>(run.ended.since(run.spawned))
        };
        create(self, HELLO)?;
        let nanoseconds = create(self, BUSYBOX)?;
        self.add(Metric::TemplateCreation, nanoseconds);
        for made in Made::ALL {
            // The first leaves a parked copy.
            self.copy(made)?;
            for run in 1..=runs {
                eprintln!("{}: run {run} of {runs} ...", made.title());
                let run = self.copy(made)?;
                let request = run.step(REQUEST)?;
                for span in Span::ALL {
                    let value = match span {
                        Span::Payload => run.step(STARTED)?.saturating_sub(request),
                        Span::End => run.step(ENDED)?.saturating_sub(request),
                        Span::Exit => run.ended.since(run.spawned),
                    };
                    self.add(Metric::Copy(span, made), value);
                }
            }
        }
        for _ in 0..runs {
            let [median, slow] = self.copies_at_once()?;
            self.add(Metric::CopiesAtOnce, median);
            self.add(Metric::SlowCopyAtOnce, slow);
            if let Some(tracer) = tracer {
                tracer.start(&Traced::EVENTS)?;
                self.copy(Made::OnRequest)?;
                let faults = trace::page_faults(&tracer.finish()?);
                self.add(Metric::CopyFaults, faults);
            }
            let memory = self.memory_of_copy()?;
            self.add(Metric::CopyMemory, memory);
            let [snapshot, restore] = self.saved_guest(images)?;
            self.add(Metric::Snapshot, snapshot);
            self.add(Metric::Restore, restore);
        }
        Ok(())
    }

    /// Runs the small static program in a copy.
    fn copy(&self, made: Made) -> Result<process::Run> {
        thread::sleep(SETTLE);
        process::run(self.copy_command(made), payload::TEXT, LIMIT, |_| Ok(()))
    }

    fn copy_command(&self, made: Made) -> Command {
        let mut command = self.kindling("run");
        command.args(made.options()).args(["--template", &self.template(HELLO)]);
        command
    }

    /// Starts several copies at once. Returns the median of their times until the end of the process, and the 95th percentile.
    fn copies_at_once(&self) -> Result<[u64; 2]> {
        thread::sleep(SETTLE);
        let mut commands: Vec<_> = (0..AT_ONCE).map(|_| self.copy_command(Made::OnRequest)).collect();
        let began = Instant::now();
        let mut running = HashSet::new();
        for command in &mut commands {
            let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
            running.insert(Pid::from_child(&child));
        }
        let mut times = Vec::new();
        while times.len() < AT_ONCE {
            // In the lab, monitors become children of this process when their fronts have ended.
            let Some((pid, status)) = wait(WaitOptions::empty())? else { continue };
            if !running.remove(&pid) {
                continue;
            }
            ensure!(status.exit_status() == Some(0), "a copy ended with {status:?}");
            times.push(Instant::now().since(began));
        }
        times.sort_unstable();
        Ok([times[AT_ONCE / 2], times[AT_ONCE * 95 / 100]])
    }

    /// The times of a snapshot of a guest whose shell waits for input, and of the start of another guest from it.
    fn saved_guest(&self, images: &Images) -> Result<[u64; 2]> {
        let folder = tempfile::tempdir_in(self.scratch)?;
        let saved = folder.path().join("saved");
        let time = |command| {
            thread::sleep(SETTLE);
            let run = process::run(command, "", LIMIT, |_| Ok(()))?;
            Ok::<_, anyhow::Error>(run.ended.since(run.spawned))
        };
        let mut command = self.kindling("run");
        let (memory, cpus) = (self.case.memory_mib.to_string(), self.case.vcpus.to_string());
        command.args(["--name", "saved", "--memory", &memory, "--cpus", &cpus]).arg(images.busybox());
        // The other guest has no input, and does not end with it.
        command.args(["sh", "-c", &format!("echo {READY}; read -r line || sleep 1000")]);
        let mut times = [0; 2];
        process::run(command, READY, LIMIT, |_| {
            let mut snapshot = self.kindling("snapshot");
            snapshot.arg("saved").arg(&saved);
            let mut restore = self.kindling("restore");
            restore.args(["-d", "--rm", "--name", "restored"]).arg(&saved);
            let mut end = self.kindling("rm");
            end.args(["-f", "restored"]);
            times = [time(snapshot)?, time(restore)?];
            time(end).map(drop)
        })?;
        Ok(times)
    }

    /// The private memory of front and monitor, including the guest's, of a copy whose shell waits for input, beside another copy.
    fn memory_of_copy(&self) -> Result<u64> {
        let waiting = || {
            let mut command = self.kindling("run");
            let script = format!("echo {READY}; read -r line");
            command.args(["--template", &self.template(BUSYBOX), "sh", "-c", &script]);
            command
        };
        let mut memory = 0;
        process::run(waiting(), READY, LIMIT, |_| {
            process::run(waiting(), READY, LIMIT, |front| {
                thread::sleep(SETTLE);
                memory = Self::all_private_memory(front)?;
                Ok(())
            })?;
            Ok(())
        })?;
        Ok(memory)
    }

    /// The name of a template for guests of this size.
    fn template(&self, name: &str) -> String {
        format!("{name}-{}-{}", self.case.memory_mib, self.case.vcpus)
    }
}
