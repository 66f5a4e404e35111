//! Records which functions of a program a run executes, with ptrace: a breakpoint on each function, removed when hit.

use crate::bench::peer::Peers;
use anyhow::{Context, Result, bail};
use clap::Args;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

#[derive(Args, Debug)]
pub(crate) struct Arguments {
    /// File with the plan to run
    plan: PathBuf,
    /// File to write the reached addresses to
    reached: PathBuf,
}

/// The runs, and the addresses of breakpoints.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct Plan {
    /// Link-time addresses of the functions.
    pub(crate) addresses: Vec<u64>,
    /// Options and payload of each run of `kindling boot`.
    pub(crate) runs: Vec<String>,
}

/// The path of the image in the lab.
pub(super) const IMAGE: &str = "/images/bench";
/// Placeholder in a run for the options of the devices of `bench --scenario io`.
pub(super) const DEVICES: &str = "{devices}";

/// The instruction INT3 (Intel SDM volume 2, "INT n/INTO/INT3/INT1").
const BREAKPOINT: u8 = 0xcc;

/// The hidden command that runs inside the lab.
pub(crate) fn run(arguments: &Arguments) -> Result<u8> {
    let plan: Plan = serde_json::from_slice(&fs::read(&arguments.plan)?)?;
    let folder = tempfile::tempdir()?;
    let mut omitted = Vec::new();
    let peers = Peers::new(folder.path(), &mut omitted);
    let (Some(tap), Some(vsock)) = (&peers.tap, &peers.vsock) else {
        bail!("cannot set up devices: {}", omitted.join(", "))
    };
    let devices = format!("--drive disk --net {tap} --vsock {} --entropy --balloon 0", vsock.display());
    let mut reached = Vec::new();
    for run in &plan.runs {
        let run = run.replace(DEVICES, &devices);
        let (options, _) = run.split_once(" -- ").context("a run without a payload")?;
        if !options.contains("--cold") && !kindling("preboot", options).status()?.success() {
            bail!("kindling preboot {options}: the command failed");
        }
        let addresses = follow(kindling("boot", &run), &plan.addresses);
        reached.push(addresses.with_context(|| format!("kindling boot {run}"))?);
        // The monitor leaves the socket behind, and the next one could not bind it.
        let _ = fs::remove_file(vsock);
    }
    fs::write(&arguments.reached, serde_json::to_vec(&reached)?)?;
    Ok(0)
}

/// A `kindling` command; arguments are split at spaces.
fn kindling(command: &str, arguments: &str) -> Command {
    let mut kindling = Command::new("kindling");
    kindling.args([command, "--image", IMAGE]).args(arguments.split_whitespace()).stdin(Stdio::null());
    kindling
}

/// Runs the command and returns the breakpoint addresses that it hit.
#[expect(unsafe_code, reason = "PTRACE_TRACEME between fork and exec")]
fn follow(mut command: Command, addresses: &[u64]) -> Result<BTreeSet<u64>> {
    // SAFETY: PTRACE_TRACEME is one system call, which allocates nothing and takes no lock.
    unsafe { command.pre_exec(|| Ok(ptrace::traceme()?)) };
    let child = command.spawn().context("cannot start it")?;
    let first = pid(&child)?;
    // A traced program stops after exec.
    let WaitStatus::Stopped(..) = waitpid(first, None)? else { bail!("it did not stop after exec") };
    ptrace::setoptions(first, Options::PTRACE_O_TRACECLONE | Options::PTRACE_O_EXITKILL)?;
    let mut breakpoints = Breakpoints::set(first, addresses)?;
    ptrace::cont(first, None)?;
    loop {
        match waitpid(None, Some(WaitPidFlag::__WALL))? {
            WaitStatus::Stopped(thread, Signal::SIGTRAP) => {
                breakpoints.hit(thread)?;
                ptrace::cont(thread, None)?;
            }
            // A new thread starts with SIGSTOP.
            WaitStatus::Stopped(thread, Signal::SIGSTOP) => ptrace::cont(thread, None)?,
            WaitStatus::Stopped(thread, signal) => ptrace::cont(thread, signal)?,
            WaitStatus::PtraceEvent(thread, ..) => ptrace::cont(thread, None)?,
            WaitStatus::Exited(thread, 0) if thread == first => return Ok(breakpoints.addresses),
            WaitStatus::Exited(thread, status) if thread == first => bail!("it ended with status {status}"),
            WaitStatus::Signaled(thread, signal, _) if thread == first => bail!("it was killed by {signal}"),
            _ => {}
        }
    }
}

fn pid(child: &Child) -> Result<Pid> {
    Ok(Pid::from_raw(i32::try_from(child.id())?))
}

/// The breakpoints of a process that has just been executed.
struct Breakpoints {
    memory: File,
    /// The load offset: run-time minus link-time addresses.
    base: u64,
    /// The replaced byte of each breakpoint, by link-time address.
    instructions: BTreeMap<u64, u8>,
    /// Link-time addresses that were hit.
    addresses: BTreeSet<u64>,
}

impl Breakpoints {
    fn set(process: Pid, addresses: &[u64]) -> Result<Self> {
        let memory = File::options().read(true).write(true).open(format!("/proc/{process}/mem"))?;
        let maps = fs::read_to_string(format!("/proc/{process}/maps"))?;
        // The kernel maps the program first, so its base is the first mapping of a file.
        let line =
            maps.lines().find(|line| line.contains('/')).context("the process has no mapping of a file")?;
        let start = line.split('-').next().unwrap_or_default();
        let mut this = Self {
            memory,
            base: u64::from_str_radix(start, 16)?,
            instructions: BTreeMap::new(),
            addresses: BTreeSet::new(),
        };
        for &address in addresses {
            let mut byte = [0];
            this.memory.read_exact_at(&mut byte, this.base + address)?;
            this.memory.write_all_at(&[BREAKPOINT], this.base + address)?;
            this.instructions.insert(address, byte[0]);
        }
        Ok(this)
    }

    /// Handles a thread that stopped after a breakpoint: restores the instruction, which is executed next.
    fn hit(&mut self, thread: Pid) -> Result<()> {
        let mut registers = ptrace::getregs(thread)?;
        let address = registers.rip.wrapping_sub(1).wrapping_sub(self.base);
        let Some(&instruction) = self.instructions.get(&address) else { return Ok(()) };
        // Another thread may have hit the same breakpoint, which is harmless.
        self.memory.write_all_at(&[instruction], self.base + address)?;
        self.addresses.insert(address);
        registers.rip -= 1;
        Ok(ptrace::setregs(thread, registers)?)
    }
}
