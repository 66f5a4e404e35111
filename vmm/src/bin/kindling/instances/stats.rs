//! `kindling stats`: what guests use of the host.

use super::{Found, InstanceError, view};
use crate::{complain, say};
use clap::Args;
use serde::Serialize;

#[derive(Args, Debug, PartialEq, Eq)]
pub(crate) struct Arguments {
    /// Names of the guests [default: all that run]
    #[arg(value_name = "NAME")]
    names: Vec<String>,
}

/// What a guest and its VMM use, by the VMM's process.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Use {
    /// Memory that is in use, in KiB; of what is shared with other processes its part (PSS).
    memory_kib: u64,
    /// Milliseconds that processors of the host worked for it.
    cpu_ms: u64,
}

impl Found {
    /// What it uses, if it runs.
    pub(super) fn host_use(&self) -> Result<Option<Use>, InstanceError> {
        let Some(process) = self.vmm()? else { return Ok(None) };
        let file = |name: &str| std::fs::read_to_string(format!("/proc/{}/{name}", process.pid));
        let (Ok(memory), Ok(stat)) = (file("smaps_rollup"), file("stat")) else { return Ok(None) };
        // The number was its own while the files were read if it still lives now.
        if process.wait(Some(std::time::Instant::now())) {
            return Ok(None);
        }
        let memory_kib = pss(&memory).unwrap_or_default();
        let cpu_ms = ticks(&stat).unwrap_or_default() * 1000 / rustix::param::clock_ticks_per_second();
        Ok(Some(Use { memory_kib, cpu_ms }))
    }
}

/// `Pss:` of smaps_rollup, in KiB (Documentation/filesystems/proc.rst).
fn pss(text: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix("Pss:"))?.split_whitespace().next()?.parse().ok()
}

/// `utime` and `stime` of stat, its 14th and 15th field. The second is a name in brackets, which may have blanks.
fn ticks(text: &str) -> Option<u64> {
    let (_, rest) = text.rsplit_once(") ")?;
    let mut fields = rest.split(' ').skip(14 - 3);
    let mut next = || fields.next()?.parse::<u64>().ok();
    Some(next()?.saturating_add(next()?))
}

/// Prints a table; the exit status.
pub(crate) fn run(arguments: &Arguments) -> u8 {
    let mut names = arguments.names.clone();
    if names.is_empty() {
        match Found::all() {
            Ok(all) => {
                names = all.into_iter().filter(|guest| guest.is_alive).map(|guest| guest.name).collect()
            }
            Err(error) => {
                complain(&error);
                return error.status();
            }
        }
    }
    let mut rows = Vec::new();
    let status = super::each(&names, |name| {
        let used = Found::alive(name)?.host_use()?.ok_or_else(|| InstanceError::Ended(name.to_owned()))?;
        let memory = format!("{} MiB", used.memory_kib.div_ceil(1024));
        let time = format!("{}.{:03} s", used.cpu_ms / 1000, used.cpu_ms % 1000);
        rows.push([name.to_owned(), memory, time]);
        Ok(())
    });
    say(view::table(["NAME", "MEMORY", "CPU TIME"], &rows).as_bytes());
    status
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_files_are_understood() {
        let rollup = "55d0-7fff ---p 00000000 00:00 0    [rollup]\nRss:     1234 kB\nPss:      812 kB\nPss_Dirty: 1 kB\n";
        assert_eq!(pss(rollup), Some(812));
        let stat = "12 (a) b) S 1 12 12 0 -1 4194560 1 0 0 0 250 50 0 0 20 0 3 0 100 1 1";
        assert_eq!(ticks(stat), Some(300));
        assert_eq!((pss(""), ticks("")), (None, None));
    }
}
