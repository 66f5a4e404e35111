//! The process that runs a guest: signals for it, and its end.

use super::{Found, InstanceError, host, is_locked, read_record};
use crate::signals;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::time::{Duration, Instant};

/// The VMM of a guest.
#[derive(Debug)]
pub(super) struct Vmm(OwnedFd);

/// The exit status of a guest that nobody asked.
const STATUS_KILLED: u8 = 128 + 9;

/// SIGPWR, and what it is followed by where that does not help.
const POWER: u8 = 30;
const KILL: u8 = 9;

/// How long a VMM may take to end in order.
const PATIENCE: Duration = Duration::from_secs(2);

impl Found {
    /// Its VMM, if it lives. Another process may have got the number since it was written down: so the process is
    /// held first, and counts if the guest's lock is still taken and the same number still stands there.
    pub(super) fn vmm(&self) -> Result<Option<Vmm>, InstanceError> {
        let number = self.record.pid;
        let Some(pid) = i32::try_from(number).ok().and_then(Pid::from_raw) else {
            let starting = Err(InstanceError::Starting(self.name.clone()));
            return if is_locked(&self.folder) { starting } else { Ok(None) };
        };
        let process = match pidfd_open(pid, PidfdFlags::empty()) {
            Err(Errno::SRCH) => return Ok(None),
            result => result.map_err(|error| host("hold the VMM of", &self.folder)(error.into()))?,
        };
        let is_it = is_locked(&self.folder) && read_record(&self.folder).pid == number;
        Ok(is_it.then_some(Vmm(process)))
    }

    /// Ends the guest without asking it, and writes down that it was ended.
    pub(super) fn kill(&self) -> Result<(), InstanceError> {
        let Some(vmm) = self.vmm()? else { return Ok(()) };
        // `run/signals.rs` stops the machine, gives the terminal back and writes down the end.
        vmm.send(POWER);
        if !vmm.wait(Some(Instant::now() + PATIENCE)) {
            vmm.send(KILL);
            vmm.wait(None);
        }
        match self.take() {
            // It has removed its folder itself, or another did.
            Err(InstanceError::Unknown(_) | InstanceError::Runs(_)) => Ok(()),
            Err(error) => Err(error),
            Ok(instance) => {
                let record = read_record(&self.folder);
                match record.status {
                    _ if !record.is_kept => instance.remove(),
                    // It ended by itself meanwhile.
                    Some(_) => {}
                    None => instance.finish(STATUS_KILLED)?,
                }
                Ok(())
            }
        }
    }
}

impl Vmm {
    /// Sends it a signal, which it passes on to its guest's payload if it can.
    pub(super) fn send(&self, signal: u8) {
        signals::send(self.0.as_fd(), signal);
    }

    /// Waits for its end, until a time; whether it has ended.
    pub(super) fn wait(&self, until: Option<Instant>) -> bool {
        let mut fds = [PollFd::new(&self.0, PollFlags::IN)];
        loop {
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            match poll(&mut fds, left.and_then(timespec).as_ref()) {
                Ok(0) => return false,
                Ok(_) => return true,
                Err(Errno::INTR) => {}
                // Nothing is left to wait for with.
                Err(_) => return false,
            }
        }
    }
}

impl AsFd for Vmm {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn timespec(time: Duration) -> Option<Timespec> {
    Some(Timespec { tv_sec: i64::try_from(time.as_secs()).ok()?, tv_nsec: time.subsec_nanos().into() })
}
