//! Which functions of a program a run executes: a breakpoint on each, taken away when it is reached.

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
    /// What to run
    plan: PathBuf,
    /// Where the addresses go
    reached: PathBuf,
}

/// What to run, and where breakpoints go.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct Plan {
    /// Addresses of the functions, as the program is linked.
    pub(crate) addresses: Vec<u64>,
    /// Options and payload of each boot.
    pub(crate) runs: Vec<String>,
}

/// Where the image is.
pub(super) const IMAGE: &str = "/images/bench";
/// Stands in a run for options that give the guest the devices of `bench --scenario io`, with somebody behind them.
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
        bail!("no devices: {}", omitted.join(", "))
    };
    let devices = format!("--drive disk --net {tap} --vsock {} --entropy --balloon 0", vsock.display());
    let mut reached = Vec::new();
    for run in &plan.runs {
        let run = run.replace(DEVICES, &devices);
        let (options, _) = run.split_once(" -- ").context("a run without a payload")?;
        if !options.contains("--cold") && !kindling("preboot", options).status()?.success() {
            bail!("kindling preboot {options}: it failed");
        }
        let addresses = follow(kindling("boot", &run), &plan.addresses);
        reached.push(addresses.with_context(|| format!("kindling boot {run}"))?);
        // A socket stays, where a later guest's would have to be.
        let _ = fs::remove_file(vsock);
    }
    fs::write(&arguments.reached, serde_json::to_vec(&reached)?)?;
    Ok(0)
}

/// A command of the VMM with arguments that have no spaces in them.
fn kindling(command: &str, arguments: &str) -> Command {
    let mut kindling = Command::new("kindling");
    kindling.args([command, "--image", IMAGE]).args(arguments.split_whitespace()).stdin(Stdio::null());
    kindling
}

/// The addresses that a run of the command reaches.
#[expect(unsafe_code, reason = "a program becomes traced between fork and exec")]
fn follow(mut command: Command, addresses: &[u64]) -> Result<BTreeSet<u64>> {
    // SAFETY: PTRACE_TRACEME is one system call, which allocates nothing and takes no lock.
    unsafe { command.pre_exec(|| Ok(ptrace::traceme()?)) };
    let child = command.spawn().context("it cannot be started")?;
    let first = pid(&child)?;
    // The program stops when it has been loaded.
    let WaitStatus::Stopped(..) = waitpid(first, None)? else { bail!("it did not stop at its start") };
    ptrace::setoptions(first, Options::PTRACE_O_TRACECLONE | Options::PTRACE_O_EXITKILL)?;
    let mut breakpoints = Breakpoints::set(first, addresses)?;
    ptrace::cont(first, None)?;
    loop {
        match waitpid(None, Some(WaitPidFlag::__WALL))? {
            WaitStatus::Stopped(thread, Signal::SIGTRAP) => {
                breakpoints.reached(thread)?;
                ptrace::cont(thread, None)?;
            }
            // A new thread begins with it.
            WaitStatus::Stopped(thread, Signal::SIGSTOP) => ptrace::cont(thread, None)?,
            WaitStatus::Stopped(thread, signal) => ptrace::cont(thread, signal)?,
            WaitStatus::PtraceEvent(thread, ..) => ptrace::cont(thread, None)?,
            WaitStatus::Exited(thread, 0) if thread == first => return Ok(breakpoints.addresses),
            WaitStatus::Exited(thread, status) if thread == first => bail!("it ended with status {status}"),
            WaitStatus::Signaled(thread, signal, _) if thread == first => bail!("{signal} ended it"),
            _ => {}
        }
    }
}

fn pid(child: &Child) -> Result<Pid> {
    Ok(Pid::from_raw(i32::try_from(child.id())?))
}

/// The breakpoints of a process that has just been loaded.
struct Breakpoints {
    memory: File,
    /// How far from where it was linked the program is.
    base: u64,
    /// What each replaces, by linked address.
    instructions: BTreeMap<u64, u8>,
    /// Those that were reached.
    addresses: BTreeSet<u64>,
}

impl Breakpoints {
    fn set(process: Pid, addresses: &[u64]) -> Result<Self> {
        let memory = File::options().read(true).write(true).open(format!("/proc/{process}/mem"))?;
        let maps = fs::read_to_string(format!("/proc/{process}/maps"))?;
        // The kernel loads the program before anything else, so that its start is the first mapping of a file.
        let line = maps.lines().find(|line| line.contains('/')).context("it has no mapping of a file")?;
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

    /// A thread stopped behind a breakpoint: the instruction comes back, and is executed next.
    fn reached(&mut self, thread: Pid) -> Result<()> {
        let mut registers = ptrace::getregs(thread)?;
        let address = registers.rip.wrapping_sub(1).wrapping_sub(self.base);
        let Some(&instruction) = self.instructions.get(&address) else { return Ok(()) };
        // Another thread may have been here at the same time, which does no harm.
        self.memory.write_all_at(&[instruction], self.base + address)?;
        self.addresses.insert(address);
        registers.rip -= 1;
        Ok(ptrace::setregs(thread, registers)?)
    }
}
