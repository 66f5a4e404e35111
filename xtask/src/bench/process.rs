//! One run of a monitor's process: spawns it, timestamps its output on the clock of all measurements, and guarantees
//! that it has ended.

use crate::profile::run::Step;
use anyhow::{Context, Result, anyhow, bail};
use kindling_vmm::Instant;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::time::Duration;

/// The result of a run.
#[derive(Debug)]
pub(super) struct Run {
    /// Just before the process was spawned.
    pub(super) spawned: Instant,
    /// When the first byte of the expected text was read.
    pub(super) seen: Instant,
    /// When the process ended.
    pub(super) ended: Instant,
    /// The user and system time of the process.
    pub(super) cpu_time: Duration,
    /// Standard output of the monitor, which includes the guest's console.
    pub(super) console: String,
    /// Its standard error.
    pub(super) messages: String,
}

impl Run {
    /// The time of a step in the report of a guest, since the start of the command, in nanoseconds.
    pub(super) fn step(&self, name: &str) -> Result<u64> {
        let mut steps = self.messages.lines().filter_map(Step::parse);
        let found = steps.find(|step| step.name == name);
        Ok(found.with_context(|| format!("no time of {name:?} in: {}", self.messages))?.ns)
    }
}

/// Time without output after which a progress line is printed: a lab whose clock has stopped prints nothing. Successful
/// runs rarely take this long, so the line disturbs few measurements. In the lab the time is on the lab's clock, of
/// which each second takes several seconds of real time.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(5);
/// Lines of output in an error message.
const LAST_LINES: usize = 12;
/// Limit of the output, far above that of a boot.
const OUTPUT_MAX: usize = 1 << 20;

/// Runs a monitor until it exits with status 0, within `limit`. When its output contains `text`, calls `on_text` with
/// its process id and writes a newline to its console. For an empty text `on_text` is called immediately and nothing is
/// written.
///
/// # Errors
/// When the monitor cannot be started, prints other output, hangs or fails; the error has its last output. The process
/// has then ended.
pub(super) fn run(
    mut command: Command,
    text: &str,
    limit: Duration,
    on_text: impl FnOnce(u32) -> Result<()>,
) -> Result<Run> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let _urgent = Urgent::new();
    let cpu_time_before = children_cpu_time();
    let spawned = Instant::now();
    let child = command.spawn().context("cannot start the monitor")?;
    let mut watched = Watched::new(child, spawned)?;
    let (seen, ended) = watched
        .watch(text, limit, on_text)
        .map_err(|error| anyhow!("{error:#}; {}", last_output(&watched.console, &watched.messages)))?;
    let cpu_time = children_cpu_time().saturating_sub(cpu_time_before);
    let console = String::from_utf8_lossy(&watched.console).into_owned();
    let messages = String::from_utf8_lossy(&watched.messages).into_owned();
    Ok(Run { spawned, seen, ended, cpu_time, console, messages })
}

/// A monitor's process, which is killed with its descendants on drop.
struct Watched {
    child: Child,
    exit: OwnedFd,
    stdin: Option<ChildStdin>,
    stdout: Option<ChildStdout>,
    stderr: Option<ChildStderr>,
    spawned: Instant,
    console: Vec<u8>,
    /// The arrival time of each chunk of console output, by the offset of its first byte.
    arrivals: Vec<(usize, Instant)>,
    messages: Vec<u8>,
}

impl Watched {
    fn new(mut child: Child, spawned: Instant) -> Result<Self> {
        let exit = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?;
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let (console, arrivals, messages) = (Vec::new(), Vec::new(), Vec::new());
        Ok(Self { child, exit, stdin, stdout, stderr, spawned, console, arrivals, messages })
    }

    /// Reads the output until the process exits with status 0; returns when the text arrived and when the process
    /// ended.
    fn watch(
        &mut self,
        text: &str,
        limit: Duration,
        on_text: impl FnOnce(u32) -> Result<()>,
    ) -> Result<(Instant, Instant)> {
        let (mut on_text, mut ended) = (Some(on_text), None);
        loop {
            let quiet = self.step(limit, &mut ended)?;
            let seen = self.arrival(text);
            if let (Some(_), None, Some(act)) = (seen, ended, on_text.take_if(|_| seen.is_some())) {
                act(self.child.id())?;
                if !text.is_empty() {
                    // The write fails if the monitor has already ended.
                    let _ = self.stdin.as_mut().map(|stdin| stdin.write_all(b"\n"));
                }
            }
            let Some(ended) = ended.filter(|_| quiet) else { continue };
            let status = self.child.wait()?;
            match seen {
                Some(seen) if status.success() => return Ok((seen, ended)),
                Some(_) => bail!("it ended with {}", describe_status(status)),
                None => bail!("it ended with {} before it printed {text:?}", describe_status(status)),
            }
        }
    }

    /// Waits for output or the end of the process, and reads available output. Returns whether there was none.
    fn step(&mut self, limit: Duration, ended: &mut Option<Instant>) -> Result<bool> {
        let passed = Duration::from_nanos(Instant::now().since(self.spawned));
        let left = limit.saturating_sub(passed);
        if left.is_zero() {
            bail!("timed out after {} s", limit.as_secs());
        }
        // Only buffered output is left after the end of the process.
        let left = if ended.is_some() { Duration::ZERO } else { left.min(PROGRESS_INTERVAL) };
        let mut polled = Vec::new();
        let pipes = [self.stdout.as_ref().map(AsFd::as_fd), self.stderr.as_ref().map(AsFd::as_fd)];
        for descriptor in pipes.into_iter().chain([Some(self.exit.as_fd())]) {
            // The pidfd takes the slot of a closed pipe, which is not read.
            polled.push(PollFd::from_borrowed_fd(descriptor.unwrap_or(self.exit.as_fd()), PollFlags::IN));
        }
        let events = poll(&mut polled, Some(&Timespec::try_from(left)?))?;
        if events == 0 && ended.is_none() {
            eprintln!("still running after {} s ...", passed.saturating_add(left).as_secs());
        }
        let now = Instant::now();
        let ready: Vec<bool> = polled.iter().map(|polled| !polled.revents().is_empty()).collect();
        drop(polled);
        if ready[2] {
            ended.get_or_insert(now);
        }
        let before = self.console.len() + self.messages.len();
        if ready[0] && self.stdout.is_some() {
            self.arrivals.push((self.console.len(), now));
            read_pipe(&mut self.stdout, &mut self.console)?;
        }
        if ready[1] {
            read_pipe(&mut self.stderr, &mut self.messages)?;
        }
        Ok(self.console.len() + self.messages.len() == before)
    }

    /// When the first byte of a text on the console arrived, if the text is complete.
    fn arrival(&self, text: &str) -> Option<Instant> {
        if text.is_empty() {
            return Some(self.spawned);
        }
        let at = self.console.windows(text.len()).position(|window| window == text.as_bytes())?;
        self.arrivals.iter().rev().find(|(offset, _)| *offset <= at).map(|(_, time)| *time)
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        // A process keeps its id until it is waited for.
        if let Ok(None) = self.child.try_wait() {
            kill_with_descendants(Pid::from_child(&self.child));
            let _ = self.child.wait();
        }
    }
}

/// Kills a process and its descendants. (A separate process group would be simpler, but would not receive Ctrl-C from
/// the terminal.)
fn kill_with_descendants(process: Pid) {
    let children = std::fs::read_to_string(format!("/proc/{process}/task/{process}/children"));
    let _ = kill_process(process, Signal::KILL);
    for child in children.unwrap_or_default().split_whitespace() {
        if let Some(child) = child.parse().ok().and_then(Pid::from_raw) {
            kill_with_descendants(child);
        }
    }
}

/// Reads available bytes from a pipe, and drops the pipe at its end.
fn read_pipe(pipe: &mut Option<impl Read>, bytes: &mut Vec<u8>) -> Result<()> {
    let mut buffer = [0; 4096];
    let length = pipe.as_mut().map_or(Ok(0), |pipe| pipe.read(&mut buffer))?;
    bytes.extend(&buffer[..length]);
    if length == 0 {
        *pipe = None;
    }
    if bytes.len() > OUTPUT_MAX {
        bail!("it printed more than {} KiB", OUTPUT_MAX >> 10);
    }
    Ok(())
}

fn describe_status(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("status {code}"),
        (None, signal) => format!("signal {}", signal.unwrap_or_default()),
    }
}

/// The last lines of output of a monitor and its guest, without control characters.
fn last_output(console: &[u8], messages: &[u8]) -> String {
    let text = [String::from_utf8_lossy(console), String::from_utf8_lossy(messages)].join("\n");
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    if lines.is_empty() {
        return "no output".to_owned();
    }
    let mut shown = String::from("its last output:");
    for line in &lines[lines.len().saturating_sub(LAST_LINES)..] {
        shown += "\n  | ";
        shown.extend(line.trim_end().chars().map(|c| if c.is_control() && c != '\t' { '.' } else { c }));
    }
    shown
}

/// While it exists, this thread runs before all others when it has something to do, if the host permits it: otherwise it
/// would see output, and the end of a process, up to a time slice late, 0.75 ms on one processor, if another thread runs.
struct Urgent;

impl Urgent {
    fn new() -> Self {
        // Not for processes that this thread starts.
        set_policy(libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK, 1);
        Self
    }
}

impl Drop for Urgent {
    fn drop(&mut self) {
        set_policy(libc::SCHED_OTHER, 0);
    }
}

/// Sets this thread's scheduling policy, for which a process without privileges has no permission.
#[expect(unsafe_code, reason = "sched_setscheduler has no safe wrapper in std or rustix")]
fn set_policy(policy: libc::c_int, priority: libc::c_int) {
    let parameters = libc::sched_param { sched_priority: priority };
    // SAFETY: the call reads the structure.
    unsafe { libc::sched_setscheduler(0, policy, &raw const parameters) };
}

/// User and system time of this process's children that have been waited for.
#[expect(unsafe_code, reason = "getrusage has no safe wrapper in std or rustix")]
fn children_cpu_time() -> Duration {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the call writes to the structure, whose integers may have any value.
    let usage = unsafe {
        libc::getrusage(libc::RUSAGE_CHILDREN, usage.as_mut_ptr());
        usage.assume_init()
    };
    [usage.ru_utime, usage.ru_stime]
        .into_iter()
        .map(|time| {
            Duration::new(time.tv_sec.unsigned_abs(), 0) + Duration::from_micros(time.tv_usec.unsigned_abs())
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(20);

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    fn failure(script: &str, limit: Duration) -> String {
        format!("{:#}", run(shell(script), "ready", limit, |_| Ok(())).unwrap_err())
    }

    #[test]
    fn a_run_is_timed_and_gets_a_newline_after_the_text() {
        let script = "printf 'noise\nrea'; sleep 0.2; printf 'dy\n'; read line; sleep 0.2";
        let mut asked = 0;
        let run = run(shell(script), "ready", LIMIT, |pid| {
            asked = pid;
            Ok(())
        })
        .unwrap();
        assert_ne!(asked, 0);
        // The text's first byte came before its last, and the end after both pauses.
        assert!(run.seen.since(run.spawned) < run.ended.since(run.seen), "{run:?}");
        assert!(run.ended.since(run.seen) >= 400_000_000, "{run:?}");
    }

    #[test]
    fn errors_have_the_status_and_the_last_output() {
        assert_eq!(
            failure("echo one; printf '\\033[2J two\\n' >&2; exit 3", LIMIT),
            "it ended with status 3 before it printed \"ready\"; its last output:\n  | one\n  | .[2J two"
        );
        assert_eq!(
            failure("kill -9 $$", LIMIT),
            "it ended with signal 9 before it printed \"ready\"; no output"
        );
        assert_eq!(
            failure("echo ready; exit 1", LIMIT),
            "it ended with status 1; its last output:\n  | ready"
        );
        let absent = run(Command::new("/absent"), "ready", LIMIT, |_| Ok(())).unwrap_err();
        assert!(format!("{absent:#}").starts_with("cannot start the monitor: "), "{absent:#}");
    }

    #[test]
    fn a_process_that_hangs_or_floods_is_killed_with_its_children() {
        let before = std::time::Instant::now();
        let text = failure("echo here; sleep 1000 & echo $!; sleep 1000", Duration::from_secs(1));
        let background = text.rsplit(' ').next().unwrap_or_default();
        let expected = format!("timed out after 1 s; its last output:\n  | here\n  | {background}");
        assert_eq!(text, expected);
        // The process has been killed and disappears when it has been reaped.
        let path = format!("/proc/{background}/stat");
        let lives = || std::fs::read_to_string(&path).is_ok_and(|stat| !stat.contains(") Z "));
        while lives() {
            assert!(before.elapsed() < LIMIT, "{path} is there");
            std::thread::sleep(Duration::from_millis(10));
        }
        let text = failure("yes", LIMIT);
        assert!(text.starts_with("it printed more than 1024 KiB; "), "{text}");
        assert!(before.elapsed() < LIMIT);
    }
}
