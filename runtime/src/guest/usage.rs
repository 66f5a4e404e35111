//! Memory and processor time that a guest uses on the host.

use super::{Guest, GuestError, Process};
use serde::Serialize;

/// Memory and processor time of a guest's processes: front and monitor.
#[derive(Clone, Copy, Debug, Serialize)]
#[non_exhaustive]
pub struct Usage {
    /// Resident memory in KiB: that of the guest, and of the programs. Pages that several processes map count for each.
    pub memory_kib: u64,
    /// Processor time in milliseconds, of user and kernel mode.
    pub cpu_ms: u64,
}

impl Guest {
    /// Returns what the guest uses of the host. `None` if the guest has ended.
    ///
    /// # Errors
    /// Those of [`Self::monitor`].
    pub fn usage(&self) -> Result<Option<Usage>, GuestError> {
        let processes = [self.front()?, self.monitor()?];
        let all = processes.into_iter().flatten().map(|process| Usage::of(&process));
        let sum = |a: Usage, b: Usage| Usage {
            memory_kib: a.memory_kib.saturating_add(b.memory_kib),
            cpu_ms: a.cpu_ms.saturating_add(b.cpu_ms),
        };
        Ok(all.collect::<Option<Vec<_>>>().and_then(|all| all.into_iter().reduce(sum)))
    }
}

impl Usage {
    fn of(process: &Process) -> Option<Self> {
        let file = |name: &str| std::fs::read_to_string(format!("/proc/{}/{name}", process.pid)).ok();
        // Not smaps: the monitor is not dumpable, so that only root can read its smaps.
        let (memory, stat) = (file("statm")?, file("stat")?);
        // If the process still runs, its ID was not reused while the files were read.
        if process.wait(Some(std::time::Instant::now())) {
            return None;
        }
        let page_kib = u64::try_from(rustix::param::page_size() / 1024).unwrap_or_default();
        let memory_kib = resident(&memory).unwrap_or_default() * page_kib;
        let cpu_ms = ticks(&stat).unwrap_or_default() * 1000 / rustix::param::clock_ticks_per_second();
        Some(Self { memory_kib, cpu_ms })
    }
}

/// `resident` of statm, in pages (Documentation/filesystems/proc.rst).
fn resident(text: &str) -> Option<u64> {
    text.split_whitespace().nth(1)?.parse().ok()
}

/// Sum of `utime` and `stime`, the 14th and 15th field of stat. The second field is a name in brackets, which may contain
/// spaces.
fn ticks(text: &str) -> Option<u64> {
    let (_, rest) = text.rsplit_once(") ")?;
    let mut fields = rest.split(' ').skip(14 - 3);
    let mut next = || fields.next()?.parse::<u64>().ok();
    Some(next()?.saturating_add(next()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_proc_are_parsed() {
        assert_eq!(resident("1234 203 90 1 0 300 0\n"), Some(203));
        let stat = "12 (a) b) S 1 12 12 0 -1 4194560 1 0 0 0 250 50 0 0 20 0 3 0 100 1 1";
        assert_eq!(ticks(stat), Some(300));
        assert_eq!((resident(""), ticks("")), (None, None));
    }
}
