//! Records which functions of programs a run executes, with ptrace: a breakpoint on each function, removed when hit.

use super::Plan;
use crate::bench::peer::Peers;
use anyhow::{Context, Result, bail};
use clap::Args;
use nix::errno::Errno;
use nix::sys::ptrace::{self, Event, Options};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

#[derive(Args, Debug)]
pub(crate) struct Arguments {
    /// File with the plan to run
    plan: PathBuf,
    /// File to write the reached addresses to
    reached: PathBuf,
}

/// Link-time addresses of functions, by the file name of their program.
pub(super) type Functions = BTreeMap<String, BTreeSet<u64>>;

/// Placeholder in a command line for the options of the devices of `bench --scenario io`.
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
    let command = |line: &str| {
        let line = line.replace(DEVICES, &devices);
        let mut command = Command::new("kindling");
        command.args(line.split_whitespace()).envs(plan.environment.clone()).stdin(Stdio::null());
        command
    };
    let mut reached = Vec::new();
    for run in &plan.runs {
        let others = |lines: &[String]| {
            lines.iter().try_for_each(|line| {
                let status = command(line).status()?;
                if status.success() { Ok(()) } else { bail!("kindling {line}: {status}") }
            })
        };
        others(&run.before)?;
        let mut of_run = Functions::new();
        for line in &run.commands {
            let (input, mut writer) = std::io::pipe()?;
            writer.write_all(b"a line\n")?;
            drop(writer);
            let mut command = command(line);
            command.stdin(input);
            let functions = follow(command, &plan.programs).with_context(|| format!("kindling {line}"))?;
            for (program, addresses) in functions {
                of_run.entry(program).or_default().extend(addresses);
            }
        }
        reached.push(of_run);
        others(&run.after)?;
        // The monitor leaves the socket behind, and the next one could not bind it.
        let _ = fs::remove_file(vsock);
    }
    fs::write(&arguments.reached, serde_json::to_vec(&reached)?)?;
    Ok(0)
}

/// Runs the command, and returns which of the functions it and its descendants executed, when all of them have ended.
#[expect(unsafe_code, reason = "PTRACE_TRACEME between fork and exec")]
fn follow(mut command: Command, functions: &Functions) -> Result<Functions> {
    // SAFETY: PTRACE_TRACEME is one system call, which allocates nothing and takes no lock.
    unsafe { command.pre_exec(|| Ok(ptrace::traceme()?)) };
    let child = command.spawn().context("cannot start it")?;
    let first = Pid::from_raw(i32::try_from(child.id())?);
    // A traced program stops after exec.
    let WaitStatus::Stopped(..) = waitpid(first, None)? else { bail!("it did not stop after exec") };
    let options = Options::PTRACE_O_TRACECLONE
        | Options::PTRACE_O_TRACEFORK
        | Options::PTRACE_O_TRACEVFORK
        | Options::PTRACE_O_TRACEEXEC
        | Options::PTRACE_O_EXITKILL;
    ptrace::setoptions(first, options)?;
    let mut traced = Traced { functions, processes: BTreeMap::new(), reached: Functions::new() };
    traced.executed(first)?;
    ptrace::cont(first, None)?;
    let mut is_successful = false;
    loop {
        // A thread that has been killed cannot be continued.
        let proceed = |thread, signal| match ptrace::cont(thread, signal) {
            Err(Errno::ESRCH) => Ok(()),
            result => result,
        };
        match waitpid(None, Some(WaitPidFlag::__WALL)) {
            Ok(WaitStatus::Stopped(thread, Signal::SIGTRAP)) => {
                traced.hit(thread)?;
                proceed(thread, None)?;
            }
            // A new thread or process starts with SIGSTOP.
            Ok(WaitStatus::Stopped(thread, Signal::SIGSTOP)) => proceed(thread, None)?,
            Ok(WaitStatus::Stopped(thread, signal)) => proceed(thread, Some(signal))?,
            Ok(WaitStatus::PtraceEvent(thread, _, event)) => {
                if event == Event::PTRACE_EVENT_EXEC as i32 {
                    traced.executed(thread)?;
                }
                proceed(thread, None)?;
            }
            Ok(WaitStatus::Exited(process, status)) if process == first => is_successful = status == 0,
            Ok(_) => {}
            // All have ended.
            Err(Errno::ECHILD) if is_successful => return Ok(traced.reached),
            Err(Errno::ECHILD) => bail!("the command failed"),
            Err(error) => return Err(error.into()),
        }
    }
}

/// The traced processes, and the functions that they have executed.
struct Traced<'a> {
    functions: &'a Functions,
    /// The processes, by their IDs. `None` for other programs.
    processes: BTreeMap<i32, Option<Breakpoints>>,
    reached: Functions,
}

impl Traced<'_> {
    /// Sets the breakpoints of a process that has executed a program.
    fn executed(&mut self, process: Pid) -> Result<()> {
        let program = fs::read_link(format!("/proc/{process}/exe"))?;
        let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let breakpoints = match self.functions.get(&name) {
            Some(functions) => Some(Breakpoints::set(process, &name, functions)?),
            None => None,
        };
        self.processes.insert(process.as_raw(), breakpoints);
        Ok(())
    }

    /// Handles a thread that stopped after a breakpoint: restores the instruction, which is executed next.
    fn hit(&mut self, thread: Pid) -> Result<()> {
        let [process, parent] = ["Tgid:", "PPid:"].map(|field| status(thread, field));
        let process = process?;
        if !self.processes.contains_key(&process) {
            // Before it executes a program, a new process has the memory of its parent, or a copy.
            let of_parent = self.processes.get(&parent?).and_then(Option::as_ref);
            let breakpoints = of_parent.map(|parent| parent.of_child(process)).transpose()?;
            self.processes.insert(process, breakpoints);
        }
        let Some(Some(breakpoints)) = self.processes.get(&process) else { return Ok(()) };
        let mut registers = ptrace::getregs(thread)?;
        let address = registers.rip.wrapping_sub(1).wrapping_sub(breakpoints.base);
        let Some(&instruction) = breakpoints.instructions.get(&address) else { return Ok(()) };
        // Another thread may have hit the same breakpoint, which is harmless.
        breakpoints.memory.write_all_at(&[instruction], breakpoints.base + address)?;
        self.reached.entry(breakpoints.program.clone()).or_default().insert(address);
        registers.rip -= 1;
        Ok(ptrace::setregs(thread, registers)?)
    }
}

/// A number in /proc/THREAD/status.
fn status(thread: Pid, field: &str) -> Result<i32> {
    let text = fs::read_to_string(format!("/proc/{thread}/status"))?;
    let value = text.lines().find_map(|line| line.strip_prefix(field)).context("an unknown thread")?;
    Ok(value.trim().parse()?)
}

/// The breakpoints of a process.
struct Breakpoints {
    program: String,
    memory: File,
    /// The load offset: run-time minus link-time addresses.
    base: u64,
    /// The replaced byte of each breakpoint, by link-time address.
    instructions: BTreeMap<u64, u8>,
}

impl Breakpoints {
    /// Sets breakpoints in a process that has just executed the program.
    fn set(process: Pid, program: &str, addresses: &BTreeSet<u64>) -> Result<Self> {
        let memory = memory(process.as_raw())?;
        let maps = fs::read_to_string(format!("/proc/{process}/maps"))?;
        // The kernel maps the program first, so its base is the first mapping of a file.
        let line =
            maps.lines().find(|line| line.contains('/')).context("the process has no mapping of a file")?;
        let base = u64::from_str_radix(line.split('-').next().unwrap_or_default(), 16)?;
        let mut instructions = BTreeMap::new();
        for &address in addresses {
            let mut byte = [0];
            memory.read_exact_at(&mut byte, base + address)?;
            memory.write_all_at(&[BREAKPOINT], base + address)?;
            instructions.insert(address, byte[0]);
        }
        Ok(Self { program: program.to_owned(), memory, base, instructions })
    }

    /// The same breakpoints in a child that has executed nothing.
    fn of_child(&self, process: i32) -> Result<Self> {
        let (program, instructions) = (self.program.clone(), self.instructions.clone());
        Ok(Self { program, memory: memory(process)?, base: self.base, instructions })
    }
}

/// The memory of a process.
fn memory(process: i32) -> Result<File> {
    let path = format!("/proc/{process}/mem");
    File::options().read(true).write(true).open(Path::new(&path)).context(path)
}
