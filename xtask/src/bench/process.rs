//! One run of a monitor: started, watched on the clock that everything is measured with, and ended
//! for certain.

use anyhow::{Context, Result, anyhow, bail};
use kindling_vmm::Instant;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::time::Duration;

/// What a run gave.
#[derive(Debug)]
pub(super) struct Run {
    /// Just before the process was spawned.
    pub(super) spawned: Instant,
    /// When the first byte of the awaited text was read.
    pub(super) seen: Instant,
    /// When the process had ended.
    pub(super) ended: Instant,
    /// Its user and system time.
    pub(super) cpu_time: Duration,
    /// What it and its guest said on standard output.
    pub(super) console: String,
}

/// After so long without output a line says that the measuring goes on: a lab whose clock stands says nothing. Runs
/// that succeed rarely take so long, so that the line is in few measured times. In the lab these are its own seconds, of
/// which each takes a few.
const PATIENCE: Duration = Duration::from_secs(5);
/// Lines of output that a failure shows.
const LAST_LINES: usize = 12;
/// More output than this is no boot's.
const OUTPUT_MAX: usize = 1 << 20;

/// Runs a monitor until it ends by itself with status 0, within `limit`. When its output has `text`, `at_text` is called
/// with its process id, and a line is written to its console. For an empty text that is at once, and nothing is written.
///
/// # Errors
/// When it does not start, says something else, hangs or fails, with its last output. It does not
/// run any more then.
pub(super) fn run(
    mut command: Command,
    text: &str,
    limit: Duration,
    at_text: impl FnOnce(u32) -> Result<()>,
) -> Result<Run> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let cpu_time_before = children_cpu_time();
    let spawned = Instant::now();
    let child = command.spawn().context("it cannot be started")?;
    let mut watched = Watched::new(child, spawned)?;
    let (seen, ended) = watched
        .watch(text, limit, at_text)
        .map_err(|error| anyhow!("{error:#}; {}", last_output(&watched.console, &watched.messages)))?;
    let cpu_time = children_cpu_time().saturating_sub(cpu_time_before);
    let console = String::from_utf8_lossy(&watched.console).into_owned();
    Ok(Run { spawned, seen, ended, cpu_time, console })
}

/// A monitor's process, which is killed with its children when this goes away.
struct Watched {
    child: Child,
    exit: OwnedFd,
    stdin: Option<ChildStdin>,
    stdout: Option<ChildStdout>,
    stderr: Option<ChildStderr>,
    spawned: Instant,
    console: Vec<u8>,
    /// When each piece of the console began to arrive, by the offset of its first byte.
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

    /// Reads what it says until it ends with status 0; when the text came, and when it had ended.
    fn watch(
        &mut self,
        text: &str,
        limit: Duration,
        at_text: impl FnOnce(u32) -> Result<()>,
    ) -> Result<(Instant, Instant)> {
        let (mut at_text, mut ended) = (Some(at_text), None);
        loop {
            let quiet = self.step(limit, &mut ended)?;
            let seen = self.arrival(text);
            if let (Some(_), None, Some(act)) = (seen, ended, at_text.take_if(|_| seen.is_some())) {
                act(self.child.id())?;
                if !text.is_empty() {
                    // A monitor that has ended by now reads nothing.
                    let _ = self.stdin.as_mut().map(|stdin| stdin.write_all(b"\n"));
                }
            }
            let Some(ended) = ended.filter(|_| quiet) else { continue };
            let status = self.child.wait()?;
            match seen {
                Some(seen) if status.success() => return Ok((seen, ended)),
                Some(_) => bail!("it ended with {}", in_words(status)),
                None => bail!("it ended with {} before {text:?} came", in_words(status)),
            }
        }
    }

    /// Waits for output or the end, and takes what there is. Whether there was no output.
    fn step(&mut self, limit: Duration, ended: &mut Option<Instant>) -> Result<bool> {
        let passed = Duration::from_nanos(Instant::now().since(self.spawned));
        let left = limit.saturating_sub(passed);
        if left.is_zero() {
            bail!("it had not ended after {} s", limit.as_secs());
        }
        // A process that has ended has nothing more to wait for.
        let left = if ended.is_some() { Duration::ZERO } else { left.min(PATIENCE) };
        let mut polled = Vec::new();
        let pipes = [self.stdout.as_ref().map(AsFd::as_fd), self.stderr.as_ref().map(AsFd::as_fd)];
        for descriptor in pipes.into_iter().chain([Some(self.exit.as_fd())]) {
            // The process's own descriptor stands for a pipe that is closed: it is not read.
            polled.push(PollFd::from_borrowed_fd(descriptor.unwrap_or(self.exit.as_fd()), PollFlags::IN));
        }
        let events = poll(&mut polled, Some(&Timespec::try_from(left)?))?;
        if events == 0 && ended.is_none() {
            eprintln!("it still runs after {} s ...", passed.saturating_add(left).as_secs());
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
            take(&mut self.stdout, &mut self.console)?;
        }
        if ready[1] {
            take(&mut self.stderr, &mut self.messages)?;
        }
        Ok(self.console.len() + self.messages.len() == before)
    }

    /// When the first byte of a text on the console arrived, if all of it has.
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
        // A process that has not been waited for keeps its id.
        if let Ok(None) = self.child.try_wait() {
            kill_with_descendants(Pid::from_child(&self.child));
            let _ = self.child.wait();
        }
    }
}

/// Kills a process and what it started. (A process group of its own would be shorter, but Ctrl-C at
/// the terminal would not reach it.)
fn kill_with_descendants(process: Pid) {
    let children = std::fs::read_to_string(format!("/proc/{process}/task/{process}/children"));
    let _ = kill_process(process, Signal::KILL);
    for child in children.unwrap_or_default().split_whitespace() {
        if let Some(child) = child.parse().ok().and_then(Pid::from_raw) {
            kill_with_descendants(child);
        }
    }
}

/// Takes what a pipe has; a pipe that its writers have closed goes away.
fn take(pipe: &mut Option<impl Read>, bytes: &mut Vec<u8>) -> Result<()> {
    let mut buffer = [0; 4096];
    let length = pipe.as_mut().map_or(Ok(0), |pipe| pipe.read(&mut buffer))?;
    bytes.extend(&buffer[..length]);
    if length == 0 {
        *pipe = None;
    }
    if bytes.len() > OUTPUT_MAX {
        bail!("it says more than {} KiB", OUTPUT_MAX >> 10);
    }
    Ok(())
}

fn in_words(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("status {code}"),
        (None, signal) => format!("signal {}", signal.unwrap_or_default()),
    }
}

/// The last lines that a monitor and its guest said, without what would move a reader's cursor.
fn last_output(console: &[u8], messages: &[u8]) -> String {
    let text = [String::from_utf8_lossy(console), String::from_utf8_lossy(messages)].join("\n");
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    if lines.is_empty() {
        return "it said nothing".to_owned();
    }
    let mut shown = String::from("its last output:");
    for line in &lines[lines.len().saturating_sub(LAST_LINES)..] {
        shown += "\n  | ";
        shown.extend(line.trim_end().chars().map(|c| if c.is_control() && c != '\t' { '.' } else { c }));
    }
    shown
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
    fn a_run_is_timed_and_told_to_go_on() {
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
    fn failures_have_their_last_words() {
        assert_eq!(
            failure("echo one; printf '\\033[2J two\\n' >&2; exit 3", LIMIT),
            "it ended with status 3 before \"ready\" came; its last output:\n  | one\n  | .[2J two"
        );
        assert_eq!(
            failure("kill -9 $$", LIMIT),
            "it ended with signal 9 before \"ready\" came; it said nothing"
        );
        assert_eq!(
            failure("echo ready; exit 1", LIMIT),
            "it ended with status 1; its last output:\n  | ready"
        );
        let absent = run(Command::new("/absent"), "ready", LIMIT, |_| Ok(())).unwrap_err();
        assert!(format!("{absent:#}").starts_with("it cannot be started: "), "{absent:#}");
    }

    #[test]
    fn nobody_waits_for_what_hangs() {
        let before = std::time::Instant::now();
        let text = failure("echo here; sleep 1000 & echo $!; sleep 1000", Duration::from_secs(1));
        let background = text.rsplit(' ').next().unwrap_or_default();
        let expected = format!("it had not ended after 1 s; its last output:\n  | here\n  | {background}");
        assert_eq!(text, expected);
        // It is killed by now, and vanishes when somebody has waited for it.
        let path = format!("/proc/{background}/stat");
        let lives = || std::fs::read_to_string(&path).is_ok_and(|stat| !stat.contains(") Z "));
        while lives() {
            assert!(before.elapsed() < LIMIT, "{path} is there");
            std::thread::sleep(Duration::from_millis(10));
        }
        let text = failure("yes", LIMIT);
        assert!(text.starts_with("it says more than 1024 KiB; "), "{text}");
        assert!(before.elapsed() < LIMIT);
    }
}
