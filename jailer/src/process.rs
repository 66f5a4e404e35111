//! The process of the program, and this process while it waits for that one.
#![expect(unsafe_code, reason = "fork, unshare, setns and execveat have no safe interfaces")]

use crate::arguments::Arguments;
use crate::jail::{self, JailDirectory};
use crate::{Error, STATUS_FAILURE};
use kindling_vmm::jail::Cgroup;
use kindling_vmm::with_causes;
use rustix::fs::{Mode, OFlags, open};
use rustix::process::{
    Gid, Pid, Resource, Rlimit, Signal, Uid, WaitId, WaitIdOptions, WaitOptions, chroot, fchdir, getpid,
    kill_process, set_child_subreaper, set_parent_process_death_signal, setrlimit, setsid, waitid, waitpid,
};
use rustix::thread::{
    CapabilitySet, CapabilitySets, set_capabilities, set_no_new_privs, set_thread_groups, set_thread_res_gid,
    set_thread_res_uid,
};
use std::ffi::CString;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

/// The signals that are passed on to the program.
const FORWARDED: [i32; 6] =
    [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT, libc::SIGUSR1, libc::SIGUSR2];

/// Starts the program, and waits for its end, unless it is to run in the background. Returns its exit status.
pub(crate) fn start(arguments: &Arguments, program: &OwnedFd, directory: JailDirectory) -> Result<u8, Error> {
    let signals = block_signals()?;
    if !arguments.daemonize && !arguments.new_pid_ns {
        return supervise(arguments, program, directory, &signals, || {});
    }
    // The process in the background reports with a byte that the program was started, or with a message that it was not.
    let (mut report, sender) = pipe()?;
    match fork()? {
        None => {
            drop(report);
            if arguments.daemonize {
                detach();
            }
            let mut sender = Some(sender);
            let started = || drop(sender.take().map(|mut sender| sender.write_all(STARTED)));
            let result = supervise(arguments, program, directory, &signals, started);
            let status = result.unwrap_or_else(|error| {
                sender.iter_mut().for_each(|sender| drop(sender.write_all(with_causes(&error).as_bytes())));
                error.status()
            });
            // SAFETY: all that has to be dropped is dropped.
            unsafe { libc::_exit(status.into()) }
        }
        Some(_) => {
            // The other process owns it now.
            std::mem::forget(directory);
            drop(sender);
            unblock_signals();
            let mut report_text = Vec::new();
            report.read_to_end(&mut report_text).map_err(|error| Error::Host("read a pipe", error))?;
            match report_text.as_slice() {
                STARTED => Ok(0),
                [] => Err(Error::Background("the process in the background was killed".to_owned())),
                text => Err(Error::Background(String::from_utf8_lossy(text).into_owned())),
            }
        }
    }
}

/// What the process in the background reports when the program was started.
const STARTED: &[u8] = b"+";

/// Enters a new session, with /dev/null as standard streams.
fn detach() {
    let _ = setsid();
    if let Ok(null) = open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()) {
        let _ = rustix::stdio::dup2_stdin(&null);
        let _ = rustix::stdio::dup2_stdout(&null);
        let _ = rustix::stdio::dup2_stderr(&null);
    }
}

/// Starts the program, calls `started`, and waits for the program's end. All that was created is removed then.
fn supervise(
    arguments: &Arguments,
    program: &OwnedFd,
    mut directory: JailDirectory,
    signals: &OwnedFd,
    started: impl FnOnce(),
) -> Result<u8, Error> {
    let namespace = arguments.netns.as_deref().map(jail::open_namespace).transpose()?;
    let (gate, opener) = pipe()?;
    let (mut failure, failed) = pipe()?;
    // What the program leaves becomes a child of this process.
    set_child_subreaper(Some(getpid()))
        .map_err(|error| Error::Host("adopt the program's processes", error.into()))?;
    let parent = getpid();
    if arguments.new_pid_ns {
        // For the next child of this process.
        unshare(libc::CLONE_NEWPID).map_err(|error| Error::Host("create a PID namespace", error))?;
    }
    let Some(child) = fork()? else {
        drop((opener, failure));
        let (what, error) =
            enter_and_execute(arguments, program, &directory, namespace.as_ref(), gate, parent);
        let _ = (&failed).write_all(format!("{what}: {error}").as_bytes());
        // SAFETY: the parent owns all that would be dropped.
        unsafe { libc::_exit(STATUS_FAILURE.into()) }
    };
    drop((gate, failed));
    let cgroup = limit(arguments, child);
    let prepared = match &cgroup {
        Ok(_) => directory.write_pid(arguments, child.as_raw_pid()),
        Err(_) => Ok(()),
    };
    if let (Ok(_), Ok(())) = (&cgroup, &prepared) {
        // If the child has ended, it has said why.
        let _ = (&opener).write_all(&[1]);
    }
    // Without a byte, the child ends.
    drop(opener);
    let mut text = String::new();
    let _ = failure.read_to_string(&mut text);
    // A child that a signal ends before it executes the program, for lack of memory for instance, writes nothing.
    let is_started = cgroup.is_ok() && prepared.is_ok() && text.is_empty() && !was_killed(child);
    if is_started {
        started();
    }
    let status = wait(child, signals);
    end_leftovers(cgroup.as_ref().ok().and_then(Option::as_ref));
    let _cgroup = cgroup?;
    prepared?;
    if text.is_empty() { Ok(status) } else { Err(Error::Program(text)) }
}

/// Whether a signal has ended a child, which stays to be waited for.
fn was_killed(child: Pid) -> bool {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    let status = waitid(WaitId::Pid(child), options);
    status.is_ok_and(|status| status.is_some_and(|status| status.killed() || status.dumped()))
}

/// Kills the processes that the program has left, which became children of this one.
fn end_leftovers(cgroup: Option<&Cgroup>) {
    cgroup.into_iter().for_each(Cgroup::kill);
    let own = getpid().as_raw_pid().to_string();
    // The fields of /proc/PID/stat after the name are the state and the parent.
    let is_child = |process: &std::path::Path| {
        let text = std::fs::read_to_string(process.join("stat")).unwrap_or_default();
        text.rsplit_once(") ").is_some_and(|(_, fields)| fields.split(' ').nth(1) == Some(own.as_str()))
    };
    loop {
        let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten().map(|entry| entry.path());
        let children = processes
            .filter(|process| is_child(process))
            .filter_map(|process| process.file_name()?.to_str()?.parse().ok().and_then(Pid::from_raw));
        let children: Vec<_> = children.collect();
        if children.is_empty() {
            return;
        }
        for child in children {
            let _ = kill_process(child, Signal::KILL);
            let _ = waitpid(Some(child), WaitOptions::empty());
        }
    }
}

/// Moves the child into its cgroup, if it gets one.
fn limit(arguments: &Arguments, child: Pid) -> Result<Option<Cgroup>, Error> {
    let Some(parent) = &arguments.parent_cgroup else { return Ok(None) };
    Ok(Some(Cgroup::create_named(&parent.join(&arguments.id), &arguments.cgroup, child)?))
}

/// Waits for the child, and passes signals on to it. Returns its exit status.
fn wait(child: Pid, signals: &OwnedFd) -> u8 {
    loop {
        match waitpid(Some(child), WaitOptions::NOHANG) {
            Ok(Some((_, status))) => {
                let code =
                    status.exit_status().or_else(|| status.terminating_signal().map(|signal| 128 + signal));
                return code.and_then(|code| u8::try_from(code).ok()).unwrap_or(STATUS_FAILURE);
            }
            Ok(None) | Err(rustix::io::Errno::INTR) => {}
            Err(_) => return STATUS_FAILURE,
        }
        let mut bytes = [0; size_of::<libc::signalfd_siginfo>()];
        if rustix::io::read(signals, &mut bytes) != Ok(bytes.len()) {
            continue;
        }
        // SAFETY: the kernel has written a whole structure of integers.
        let info: libc::signalfd_siginfo = unsafe { std::ptr::read_unaligned(bytes.as_ptr().cast()) };
        let signal = i32::try_from(info.ssi_signo).ok().filter(|signal| FORWARDED.contains(signal));
        if let Some(signal) = signal.and_then(Signal::from_named_raw) {
            let _ = kill_process(child, signal);
        }
    }
}

/// Blocks the signals that are passed on, and that of a child's end. Returns a signalfd.
fn block_signals() -> Result<OwnedFd, Error> {
    use std::os::fd::FromRawFd;
    // SAFETY: the set is initialized by sigemptyset, and the descriptor is new.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for signal in FORWARDED.into_iter().chain([libc::SIGCHLD]) {
            libc::sigaddset(&raw mut set, signal);
        }
        libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
        // If the caller ignores it, the kernel would reap the child, and say nothing.
        libc::signal(libc::SIGCHLD, libc::SIG_DFL);
        match libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC) {
            -1 => Err(Error::Host("watch signals", io::Error::last_os_error())),
            fd => Ok(OwnedFd::from_raw_fd(fd)),
        }
    }
}

/// In the child: takes everything away from this process, and executes the program. Returns only if something fails: what, and
/// why.
fn enter_and_execute(
    arguments: &Arguments,
    program: &OwnedFd,
    directory: &JailDirectory,
    namespace: Option<&OwnedFd>,
    mut gate: io::PipeReader,
    parent: Pid,
) -> (&'static str, io::Error) {
    // A session of its own, so that the program has no controlling terminal, and cannot push input to the caller's shell.
    let _ = setsid();
    // Until the cgroup exists.
    if gate.read_exact(&mut [0]).is_err() {
        return ("wait for the parent", io::ErrorKind::BrokenPipe.into());
    }
    match take_away(arguments, directory, namespace, parent) {
        Err(error) => error,
        Ok(()) => ("execute the program", execute(arguments, program)),
    }
}

fn take_away(
    arguments: &Arguments,
    directory: &JailDirectory,
    namespace: Option<&OwnedFd>,
    parent: Pid,
) -> Result<(), (&'static str, io::Error)> {
    fn step<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> (&'static str, io::Error) {
        move |error| (what, error.into())
    }
    if let Some(namespace) = namespace {
        // SAFETY: the call affects no memory.
        if unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) } != 0 {
            return Err(("join the network namespace", io::Error::last_os_error()));
        }
    }
    unshare(libc::CLONE_NEWIPC | libc::CLONE_NEWUTS | libc::CLONE_NEWCGROUP)
        .map_err(step("create namespaces"))?;
    for (resource, limit) in &arguments.resource_limits {
        let limit = Rlimit { current: Some(*limit), maximum: Some(*limit) };
        setrlimit(*resource, limit).map_err(step("limit resources"))?;
    }
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })
        .map_err(step("limit resources"))?;
    fchdir(&directory.root).map_err(step("enter the root directory"))?;
    chroot(".").map_err(step("change the root directory"))?;
    let (user, group) = (Uid::from_raw(arguments.uid), Gid::from_raw(arguments.gid));
    set_thread_groups(&[]).map_err(step("drop groups"))?;
    set_thread_res_gid(group, group, group).map_err(step("change the group"))?;
    set_thread_res_uid(user, user, user).map_err(step("change the user"))?;
    let none = CapabilitySet::empty();
    // The user may be root, who would keep them.
    set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })
        .map_err(step("drop capabilities"))?;
    set_no_new_privs(true).map_err(step("set no_new_privs"))?;
    // The change of the user has cleared it. The program ends with the process that cleans up after it.
    set_parent_process_death_signal(Some(Signal::KILL)).map_err(step("end with the parent"))?;
    // In a new PID namespace, the parent has no number.
    if !arguments.new_pid_ns && rustix::process::getppid() != Some(parent) {
        return Err(("wait for the parent", io::ErrorKind::BrokenPipe.into()));
    }
    unblock_signals();
    // SAFETY: the handlers are the default ones. Rust's runtime ignores the signal.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    Ok(())
}

/// Executes the program with an empty environment. Descriptors above the standard streams are closed by it.
fn execute(arguments: &Arguments, program: &OwnedFd) -> io::Error {
    let words =
        std::iter::once(arguments.program_name()).chain(arguments.arguments.iter().map(AsRef::as_ref));
    let words: Result<Vec<_>, _> = words.map(|word| CString::new(word.as_bytes())).collect();
    let Ok(words) = words else { return io::ErrorKind::InvalidInput.into() };
    let mut pointers: Vec<_> = words.iter().map(|word| word.as_ptr()).collect();
    pointers.push(std::ptr::null());
    let environment = [std::ptr::null::<libc::c_char>()];
    // SAFETY: the lists end with null pointers, and point to strings that are alive. All descriptors become close-on-exec:
    // one of a directory would lead out of the root directory.
    unsafe {
        libc::syscall(libc::SYS_close_range, 3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC);
        libc::syscall(
            libc::SYS_execveat,
            program.as_fd().as_raw_fd(),
            c"".as_ptr(),
            pointers.as_ptr(),
            environment.as_ptr(),
            libc::AT_EMPTY_PATH,
        );
    }
    io::Error::last_os_error()
}

fn unblock_signals() {
    // SAFETY: the set is initialized by sigemptyset.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut());
    }
}

fn unshare(flags: i32) -> io::Result<()> {
    // SAFETY: these namespaces affect no memory.
    if unsafe { libc::unshare(flags) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Starts a copy of this process. Returns `None` in the copy.
fn fork() -> Result<Option<Pid>, Error> {
    // SAFETY: this process has one thread.
    match unsafe { libc::fork() } {
        -1 => Err(Error::Host("start a process", io::Error::last_os_error())),
        child => Ok(Pid::from_raw(child)),
    }
}

fn pipe() -> Result<(io::PipeReader, io::PipeWriter), Error> {
    io::pipe().map_err(|error| Error::Host("create a pipe", error))
}
