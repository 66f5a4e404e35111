//! Spare monitors: machines for the next guests, which have come as far as init's request for its configuration.
//!
//! A spare belongs to one user. Its name is a digest of what it was made for: the pre-booted kernel, with the size and the
//! devices of the machine; the version of the programs; and what its process has inherited, such as limits, namespaces and
//! cgroup. So a front finds only spares that it could have started itself.

use super::start::monitor_program;
use kindling_vmm::config::Config;
use kindling_vmm::config::image::sha256;
use kindling_vmm::control::{Monitor, PROTOCOL};
use std::fs;
use std::path::Path;
use std::process::Child;
use std::time::Duration;

/// Time after which an unused spare ends.
const IDLE: Duration = Duration::from_secs(600);

/// Takes a spare monitor for this configuration, if there is one.
pub(super) fn take(config: &Config) -> Option<Monitor> {
    Monitor::take_spare(&name(config)?)
}

/// Starts a spare monitor for this configuration, unless there is one. Nothing is reported: without a spare, the next guest
/// starts as this one did. Returns the process, to be reaped.
pub(super) fn make(config: &Config) -> Option<Child> {
    Monitor::spawn_spare(&monitor_program().ok()?, config, &name(config)?, IDLE).ok()?
}

/// The name of a spare for this configuration. `None` if it cannot have one.
fn name(config: &Config) -> Option<String> {
    // Files that are guest memory are mapped before the guest runs.
    if !config.devices.pmem.is_empty() {
        return None;
    }
    let path = config.preboot.as_ref()?.to_str()?;
    let text = format!("{PROTOCOL}\n{path}\n{:?}\n{:?}\n{}", config.boot_source, config.jail, inherited()?);
    Some(format!("kindling-spare-{}", sha256(text.as_bytes())))
}

/// What a process inherits from the one that starts it, and cannot get rid of in part. `None` in a sandbox whose rules
/// cannot be compared: a process with `no_new_privs` may be confined by Landlock, which no file shows.
fn inherited() -> Option<String> {
    const NAMESPACES: [&str; 8] = ["cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"];
    /// Lines of /proc/self/status (proc(5)): users, capabilities, filters of system calls, processors and memory.
    const STATUS: [&str; 12] = [
        "Uid:", "Gid:", "Groups:", "CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:", "Seccomp", "Cpus_allowed:",
        "Mems_allowed:", "Speculation",
    ];
    let read = |name: &str| fs::read_to_string(Path::new("/proc/self").join(name));
    let status = read("status").ok()?;
    if status.lines().any(|line| line.starts_with("NoNewPrivs:") && !line.ends_with('0')) {
        return None;
    }
    let lines = status.lines().filter(|line| STATUS.iter().any(|name| line.starts_with(name)));
    let mut text = lines.collect::<Vec<_>>().join("\n");
    // Security modules may have no label, and older kernels no time namespaces.
    for name in ["cgroup", "limits", "oom_score_adj", "attr/current"] {
        text.push_str(&read(name).unwrap_or_default());
    }
    text.push_str(&scheduling(&read("stat").ok()?));
    let links = NAMESPACES.iter().map(|name| format!("ns/{name}")).chain(["root".to_owned()]);
    for link in links {
        let target = fs::read_link(Path::new("/proc/self").join(link)).unwrap_or_default();
        text.push_str(target.to_str()?);
    }
    Some(text)
}

/// Priority, nice value, real-time priority and policy: fields 18, 19, 40 and 41 of /proc/self/stat (proc(5)).
fn scheduling(stat: &str) -> String {
    // The name of the program, field 2, may contain anything.
    let fields: Vec<_> = stat.rsplit(") ").next().unwrap_or_default().split(' ').collect();
    [18, 19, 40, 41].map(|field| fields.get(field - 3).copied().unwrap_or_default()).join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scheduling_of_a_process_is_in_its_status() {
        let fields = (3..=52).map(|field| field.to_string()).collect::<Vec<_>>().join(" ");
        assert_eq!(scheduling(&format!("1 (a) b) {fields}")), "18 19 40 41");
    }

    #[test]
    fn what_processes_inherit_does_not_change_by_itself() {
        assert_eq!(inherited(), inherited());
    }
}
