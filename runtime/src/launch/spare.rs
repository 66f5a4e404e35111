//! Spare monitors: machines for the next guests, which have come as far as init's request for its configuration.
//!
//! A spare belongs to one user. Its name is a digest of what it was made for: the pre-booted kernel, with the size and the
//! devices of the machine; the version of the programs; and what its process has inherited, such as limits, namespaces and
//! cgroup. So a front finds only spares that it could have started itself.

use super::inherited;
use super::program::monitor_program;
use kindling_vmm::config::Config;
use kindling_vmm::config::image::sha256;
use kindling_vmm::control::{Monitor, PROTOCOL};
use kindling_vmm::jail::Strictness;
use kindling_vmm::poll::wait_readable;
use rustix::fs::{Mode, OFlags, open};
use rustix::process::{PidfdFlags, geteuid, getpid, pidfd_open, setsid};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Child;
use std::time::Duration;

/// Time after which an unused spare ends.
const IDLE: Duration = Duration::from_secs(600);

/// The spare monitor that a guest leaves for the next guest of its kind. Nothing reports whether it can be made: without it,
/// the next guest starts as this one did.
#[derive(Debug)]
#[must_use = "a spare is started by `start` or `start_after_exit`"]
pub struct NextSpare {
    pub(super) config: Config,
    pub(super) name: String,
}

impl NextSpare {
    /// Starts the spare, unless there is one, in a thread that also reaps its process.
    #[inline(never)]
    pub fn start(self) {
        // Without a thread there is no spare.
        let _ = std::thread::Builder::new().name("spare".to_owned()).spawn(move || {
            let mut process = self.spawn();
            process.as_mut().map(Child::wait)
        });
    }

    /// The same for a process that exits now: the spare is started after its exit, so that programs that wait for the process do
    /// not wait for the spare. A process with several threads, which cannot be copied, starts it before.
    #[inline(never)]
    pub fn start_after_exit(self) {
        let (Ok(this), Ok((left, its_end))) = (pidfd_open(getpid(), PidfdFlags::empty()), io::pipe()) else {
            return;
        };
        if !has_one_thread() {
            return drop(self.spawn());
        }
        if fork() != 0 {
            drop(its_end);
            // Until the copy has left the streams, for whose end others wait.
            let _ = wait_readable(left.as_fd(), None);
            return;
        }
        // The copy of the process. It keeps the connection to the guest's monitor until the process has exited: the end of the
        // monitor, which frees the guest's memory, takes longer than that.
        let has_left = leave_streams().is_ok();
        drop(its_end);
        if has_left && wait_readable(this.as_fd(), None).is_ok() {
            kindling_vmm::entry::close_inherited();
            drop(self.spawn());
        }
        exit();
    }

    fn spawn(&self) -> Option<Child> {
        Monitor::spawn_spare(&monitor_program().ok()?, &self.config, &self.name, IDLE).ok()?
    }
}

fn has_one_thread() -> bool {
    std::fs::read_dir("/proc/self/task").is_ok_and(|threads| threads.count() == 1)
}

/// Leaves the session, whose terminal may close, and the standard streams, for whose end others wait.
fn leave_streams() -> io::Result<()> {
    let null = open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    dup2_stdin(&null)?;
    dup2_stdout(&null)?;
    dup2_stderr(&null)?;
    setsid()?;
    Ok(())
}

/// Copies the process. Returns 0 in the copy; -1, which also counts as no copy, if the host refuses.
#[expect(unsafe_code, reason = "the call has no safe interface")]
fn fork() -> i32 {
    // SAFETY: the caller's process has one thread, so that the copy holds no lock of another one.
    unsafe { libc::fork() }
}

/// Ends the copy, without what the process does at its end.
#[expect(unsafe_code, reason = "the call has no safe interface")]
fn exit() -> ! {
    // SAFETY: the call does not return.
    unsafe { libc::_exit(0) }
}

/// What differs between two files that had the same path one after the other.
fn version(path: &Path) -> Option<String> {
    let metadata = path.metadata().ok()?;
    Some(format!("{}:{}:{}.{}", metadata.dev(), metadata.ino(), metadata.mtime(), metadata.mtime_nsec()))
}

/// The name of a spare for this configuration. `None` if it cannot have one.
#[inline(never)]
pub(super) fn name(config: &Config) -> Option<String> {
    // A user namespace, which only root's monitors do without, hides from the spare who its fronts are.
    let hides_users = config.jail.strictness == Strictness::Full && !geteuid().is_root();
    if hides_users || !config.devices.pmem.is_empty() {
        return None;
    }
    // The path of a pre-booted kernel contains a digest of the kernel and its command line, the size of the machine, and its
    // devices. That of a snapshot may be used again for another one.
    let (path, version) = match &config.snapshot {
        Some(path) => (path, version(path)?),
        None => (config.preboot.as_ref()?, String::new()),
    };
    let path = path.to_str()?;
    let text = format!("{PROTOCOL} {:?} {:016x} {path} {version}", config.jail, inherited::digest()?);
    Some(format!("kindling-spare-{}", sha256(text.as_bytes())))
}
