//! The greeting of a guest without a payload.

use crate::configuration::{Configuration, now};
use crate::console;
use rustix::system::{sysinfo, uname};
use rustix::thread::sched_getaffinity;

/// Prints kernel version, vCPUs, memory and the time since the VM was created.
pub(crate) fn print(configuration: &Configuration) {
    let name = uname();
    let memory = sysinfo();
    let mib = memory.totalram * u64::from(memory.mem_unit) / (1024 * 1024);
    let cpus = sched_getaffinity(None).map_or(1, |set| set.count());
    let (age, since) = match configuration.boot.vm_age {
        Some(age) => (
            core::time::Duration::from_nanos(age) + now().saturating_sub(configuration.received),
            "the VM was created",
        ),
        None => (now(), "the kernel started its clock"),
    };
    console::print(format_args!(
        "Hello from Kindling: Linux {} on {cpus} vCPU{}, {mib} MiB usable, {}.{:03} ms after {since}.\n",
        name.release().to_str().unwrap_or("?"),
        if cpus == 1 { "" } else { "s" },
        age.as_millis(),
        age.subsec_micros() % 1000,
    ));
}
