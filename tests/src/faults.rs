//! Fault injection: runs a program and its descendants under ptrace, and makes one of their system calls fail.
#![expect(unsafe_code, reason = "ptrace has no safe interface")]

use crate::Outcome;
use std::collections::HashSet;
use std::collections::hash_map::{Entry, HashMap};
use std::fmt;
use std::io::{self, Read, Seek};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitStatus};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

/// Timeout of a traced program. `kindling run` takes about a hundredth of it.
const TIMEOUT: Duration = Duration::from_secs(20);

/// A kind of system call: all calls of one kind have the same purpose, or nearly so.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Kind {
    /// The name of the thread that makes the call.
    pub thread: String,
    /// The number of the call on x86-64.
    pub number: u64,
    /// The argument that selects an operation (of ioctl, for instance), or 0 for calls without such an argument.
    pub operation: u64,
    /// Whether the call is never made to fail: reads and writes of eventfds do not fail, and the standard library panics if
    /// it cannot receive the result of a child's execve.
    pub is_exempt: bool,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {}", self.name(), self.thread)?;
        if self.operation == 0 { Ok(()) } else { write!(f, " ({:#x})", self.operation) }
    }
}

impl Kind {
    fn new(thread: &str, number: u64, arguments: [u64; 6]) -> Self {
        let operation = match i64::try_from(number).unwrap_or(-1) {
            libc::SYS_ioctl | libc::SYS_fcntl | libc::SYS_epoll_ctl => arguments[1],
            libc::SYS_prctl | libc::SYS_seccomp | libc::SYS_unshare | libc::SYS_prlimit64 => arguments[0],
            _ => 0,
        };
        let operation = operation & 0xffff_ffff;
        Self { thread: thread.to_owned(), number, operation, is_exempt: false }
    }

    /// The name of the call, as in its manual page.
    #[must_use]
    pub fn name(&self) -> &'static str {
        u32::try_from(self.number).ok().and_then(kindling_vmm::jail::name_of).unwrap_or("?")
    }

    /// The error of the call on a host that lacks a resource. `None` for calls that cannot fail, or whose failure the C
    /// library does not handle.
    #[must_use]
    pub fn error(&self) -> Option<i32> {
        if self.is_exempt {
            return None;
        }
        Some(match self.name() {
            "exit" | "exit_group" | "rt_sigreturn" | "brk" | "futex" | "sched_yield" | "getpid"
            | "gettid" | "getuid" | "geteuid" | "getgid" | "getegid" | "set_robust_list" | "rseq"
            | "set_tid_address" | "arch_prctl" | "rt_sigprocmask" | "rt_sigaction" | "sigaltstack"
            | "clock_gettime" | "sysinfo" | "munmap" | "restart_syscall" | "getrandom"
            | "sched_getaffinity" | "kill" | "tgkill" | "pidfd_send_signal" | "wait4" | "waitid"
            | "umask" | "close_range" | "poll" | "epoll_pwait" | "clock_nanosleep" | "?" => return None,
            "openat" | "openat2" | "open" | "socket" | "socketpair" | "accept4" | "dup" | "eventfd2"
            | "pipe2" | "epoll_create1" | "memfd_create" | "timerfd_create" | "inotify_init1"
            | "signalfd4" => libc::EMFILE,
            "mmap" | "mprotect" | "mremap" | "madvise" | "ioctl" | "epoll_ctl" => libc::ENOMEM,
            "clone" | "clone3" | "fork" | "vfork" => libc::EAGAIN,
            "write" | "writev" | "pwrite64" | "pwritev2" | "ftruncate" | "fallocate" | "mkdir"
            | "mkdirat" | "rename" | "renameat" | "renameat2" | "symlinkat" | "linkat" => libc::ENOSPC,
            "connect" => libc::ECONNREFUSED,
            "recvfrom" | "recvmsg" => libc::ECONNRESET,
            "sendto" | "sendmsg" => libc::ENOBUFS,
            "unlink" | "unlinkat" | "rmdir" | "chdir" | "fchdir" | "chmod" | "fchmod" | "prlimit64"
            | "setrlimit" | "setsid" | "chroot" => libc::EPERM,
            _ => libc::EIO,
        })
    }

    /// Whether the call takes effect even if it returns an error.
    fn has_effect(&self) -> bool {
        self.name() == "close"
    }
}

/// A call that is made to fail.
#[derive(Clone, Debug)]
pub struct Fault {
    /// The kind of the call.
    pub kind: Kind,
    /// Number of calls of this kind that succeed before it.
    pub after: usize,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, call {}", self.kind, self.after + 1)
    }
}

/// The record of a traced run.
#[derive(Debug)]
pub struct Traced {
    /// All calls of the program and its descendants, in the order of execution.
    pub calls: Vec<Kind>,
    /// Exit status and output of the program: 128 + signal if a signal killed it, as in a shell.
    pub outcome: Outcome,
    /// Whether the requested call was made, and failed.
    pub has_failed: bool,
    /// Whether all processes ended within `TIMEOUT`.
    pub is_in_time: bool,
}

/// The state of a traced thread.
#[derive(Default)]
struct Thread {
    /// The name of the thread, if it is known.
    name: Option<String>,
    /// The error that replaces the result of the current call.
    replaced: Option<i32>,
    /// Whether the thread has forked, and has not received the result of the child's execve yet.
    has_forked: bool,
}

/// Runs a program to the end of all processes that it started. A fault has the error of its kind.
///
/// # Panics
/// When the program cannot be traced.
#[must_use]
pub fn trace(command: &mut Command, fault: Option<&Fault>) -> Traced {
    let (mut out, mut err) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
    command.stdout(out.try_clone().unwrap()).stderr(err.try_clone().unwrap());
    // SAFETY: ptrace is a system call, which is allowed between fork and exec.
    unsafe {
        command.pre_exec(|| match libc::ptrace(libc::PTRACE_TRACEME) {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        })
    };
    let root = i32::try_from(command.spawn().unwrap().id()).unwrap();
    let live = Arc::new(Mutex::new(HashSet::from([root])));
    let (done, is_done) = mpsc::channel::<()>();
    let watchdog = std::thread::spawn({
        let live = Arc::clone(&live);
        move || {
            let is_in_time = is_done.recv_timeout(TIMEOUT) != Err(mpsc::RecvTimeoutError::Timeout);
            for &thread in live.lock().unwrap().iter() {
                // SAFETY: kill does not access memory.
                unsafe { libc::kill(thread, libc::SIGKILL) };
            }
            is_in_time
        }
    });
    let mut tracer =
        Tracer { fault, live, threads: HashMap::new(), calls: Vec::new(), count: 0, has_failed: false };
    let status = tracer.follow(root);
    drop(done);
    let is_in_time = watchdog.join().unwrap();
    let text = |file: &mut std::fs::File| {
        let mut bytes = Vec::new();
        file.rewind().and_then(|()| file.read_to_end(&mut bytes)).unwrap();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    let status = status.code().or(status.signal().map(|signal| 128 + signal));
    let outcome = Outcome { status, stdout: text(&mut out), stderr: text(&mut err) };
    Traced { calls: tracer.calls, outcome, has_failed: tracer.has_failed, is_in_time }
}

struct Tracer<'a> {
    fault: Option<&'a Fault>,
    live: Arc<Mutex<HashSet<i32>>>,
    threads: HashMap<i32, Thread>,
    calls: Vec<Kind>,
    /// The number of calls of the fault's kind.
    count: usize,
    has_failed: bool,
}

impl Tracer<'_> {
    /// Follows all threads until the last one has ended. Returns the status of the first process.
    fn follow(&mut self, root: i32) -> ExitStatus {
        let mut root_status = None;
        loop {
            let mut status = 0;
            // Only what this thread started: other tests have processes too.
            let flags = libc::__WALL | libc::__WNOTHREAD;
            // SAFETY: the status is a local variable.
            let thread = unsafe { libc::waitpid(-1, &raw mut status, flags) };
            if thread < 0 {
                assert_eq!(io::Error::last_os_error().raw_os_error(), Some(libc::ECHILD));
                return root_status.expect("the first process has ended");
            }
            if libc::WIFSTOPPED(status) {
                let signal = self.stopped(thread, status);
                // SAFETY: resumes a stopped tracee; if it was killed in the meantime, this fails.
                unsafe { libc::ptrace(libc::PTRACE_SYSCALL, thread, 0, i64::from(signal)) };
            } else {
                self.threads.remove(&thread);
                self.live.lock().unwrap().remove(&thread);
                if thread == root {
                    root_status = Some(ExitStatus::from_raw(status));
                }
            }
        }
    }

    /// Handles a stop; returns the signal to deliver.
    fn stopped(&mut self, thread: i32, status: i32) -> i32 {
        const OPTIONS: i32 = libc::PTRACE_O_TRACESYSGOOD
            | libc::PTRACE_O_TRACEFORK
            | libc::PTRACE_O_TRACEVFORK
            | libc::PTRACE_O_TRACECLONE
            | libc::PTRACE_O_TRACEEXEC
            | libc::PTRACE_O_EXITKILL;
        let signal = libc::WSTOPSIG(status);
        if let Entry::Vacant(new) = self.threads.entry(thread) {
            new.insert(Thread::default());
            self.live.lock().unwrap().insert(thread);
            // SAFETY: the thread is a stopped tracee. Its children have the same options.
            unsafe { libc::ptrace(libc::PTRACE_SETOPTIONS, thread, 0, i64::from(OPTIONS)) };
            return 0;
        }
        match (signal, status >> 16) {
            (_, event) if event != 0 => {
                self.threads.entry(thread).or_default().name = None;
                0
            }
            (signal, _) if signal == libc::SIGTRAP | 0x80 => {
                self.call(thread);
                0
            }
            (signal, _) => signal,
        }
    }

    /// Handles the start or the end of a system call.
    fn call(&mut self, thread: i32) {
        // SAFETY: a plain structure of integers.
        let mut info: libc::ptrace_syscall_info = unsafe { std::mem::zeroed() };
        let size = size_of_val(&info);
        // SAFETY: the kernel writes at most `size` bytes.
        let written = unsafe { libc::ptrace(libc::PTRACE_GET_SYSCALL_INFO, thread, size, &raw mut info) };
        if written <= 0 {
            return;
        }
        let state = self.threads.entry(thread).or_default();
        if info.op == libc::PTRACE_SYSCALL_INFO_EXIT {
            if let Some(error) = state.replaced.take() {
                set_register(thread, libc::RAX, i64::from(-error));
            }
            return;
        }
        if info.op != libc::PTRACE_SYSCALL_INFO_ENTRY {
            return;
        }
        // SAFETY: at the start of a call, the kernel has filled in this variant.
        let entry = unsafe { info.u.entry };
        let name = state.name.get_or_insert_with(|| comm(thread));
        let mut kind = Kind::new(name, entry.nr, entry.args);
        kind.is_exempt = match kind.name() {
            "read" | "write" => is_eventfd(thread, entry.args[0]),
            "recvfrom" => std::mem::take(&mut state.has_forked),
            _ => false,
        };
        state.has_forked |= kind.name() == "clone";
        if kind.name() == "prctl" {
            // The call may change the thread's name.
            state.name = None;
        }
        if let Some(fault) = self.fault.filter(|fault| fault.kind == kind) {
            self.count += 1;
            if self.count == fault.after + 1 {
                if !kind.has_effect() {
                    // The call becomes one without effect that all seccomp filters allow. They would kill the process for
                    // the number -1.
                    set_register(thread, libc::ORIG_RAX, libc::SYS_restart_syscall);
                }
                state.replaced = kind.error();
                self.has_failed = true;
            }
        }
        self.calls.push(kind);
    }
}

fn is_eventfd(thread: i32, descriptor: u64) -> bool {
    let target = std::fs::read_link(format!("/proc/{thread}/fd/{descriptor}"));
    target.is_ok_and(|target| target.as_os_str() == "anon_inode:[eventfd]")
}

fn set_register(thread: i32, register: i32, value: i64) {
    // SAFETY: writes a register of a stopped tracee.
    unsafe { libc::ptrace(libc::PTRACE_POKEUSER, thread, i64::from(register) * 8, value) };
}

fn comm(thread: i32) -> String {
    std::fs::read_to_string(format!("/proc/{thread}/comm")).unwrap_or_default().trim_end().to_owned()
}

/// Default number of faults per command, evenly spread over its calls; [`crate::rounds`] overrides it.
const DEFAULT_FAULTS: u32 = 16;
/// Maximum number of faults per kind of call: most further calls of a kind are made by the same code.
const MAX_FAULTS_PER_KIND: usize = 3;

/// The faults to inject, from the calls of a run.
fn faults_of(calls: Vec<Kind>) -> Vec<Fault> {
    let mut counts: HashMap<Kind, usize> = HashMap::new();
    let mut faults = Vec::new();
    for kind in calls.into_iter().filter(|kind| kind.error().is_some()) {
        let count = counts.entry(kind.clone()).or_default();
        if *count < MAX_FAULTS_PER_KIND {
            faults.push(Fault { kind, after: *count });
        }
        *count += 1;
    }
    faults
}

/// Runs a command repeatedly, with one failing call in each run, and checks that it reports an error or succeeds as
/// without the fault. `leftovers` is called with the exit status after each run, and describes what the run left behind.
///
/// # Panics
/// When a run hangs, panics, succeeds with other output, or leaves something behind.
pub fn each_call_fails(
    mut command: impl FnMut() -> Command,
    mut leftovers: impl FnMut(Option<i32>) -> Option<String>,
) {
    let whole = trace(&mut command(), None);
    assert!(whole.is_in_time && whole.outcome.status == Some(0), "{}", whole.outcome);
    let output = whole.outcome.stdout;
    assert_eq!(leftovers(Some(0)), None, "after a run without a fault");
    let faults = faults_of(whole.calls);
    let rounds = crate::rounds(DEFAULT_FAULTS) as usize;
    let step = faults.len().div_ceil(rounds.min(faults.len()));
    let (mut wrong, mut tried, mut unreached) = (Vec::new(), 0, Vec::new());
    for (number, fault) in faults.iter().enumerate().step_by(step) {
        if number % (step * 20) == 0 {
            crate::print_progress(&format!("call {number} of {}: {fault}", faults.len()));
        }
        let traced = trace(&mut command(), Some(fault));
        tried += 1;
        if !traced.has_failed {
            unreached.push(fault.to_string());
        }
        let outcome = &traced.outcome;
        // Digits are not compared, because the output contains a guest's age.
        let words = |text: &str| text.replace(|char: char| char.is_ascii_digit(), "");
        let is_whole = outcome.status == Some(0) && words(&outcome.stdout) == words(&output);
        let is_reported = matches!(outcome.status, Some(0..=127)) && !outcome.stderr.is_empty();
        // The guest's command was killed by SIGPIPE, because the connection of its output was closed.
        let is_reported = is_reported || outcome.status == Some(141);
        let left = leftovers(outcome.status);
        // The standard library panics if it cannot set up the signal stack of a thread.
        if outcome.stderr.contains("/stack_overflow.rs:") {
            continue;
        }
        let is_panic = outcome.stderr.contains("panicked");
        let mut say = |what: &str| wrong.push(format!("{fault}: {what}; {outcome}"));
        if !traced.is_in_time {
            say("a process did not end");
        } else if !is_whole && !is_reported {
            say("no error");
        } else if is_panic {
            say("panic");
        }
        if let Some(left) = left {
            say(&left);
        }
    }
    // The order of calls of different threads varies, so that a run may end before it makes the call.
    assert!(
        unreached.len() * 4 <= tried,
        "{} of {tried} calls were not reached: {unreached:?}",
        unreached.len()
    );
    assert!(wrong.is_empty(), "{} of {} calls:\n{}", wrong.len(), faults.len(), wrong.join("\n"));
}
