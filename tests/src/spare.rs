//! Spare monitors: those that wait for a front.

use crate::{TIMEOUT, processes};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// The spare monitors whose pre-booted kernel is in this folder.
#[must_use]
pub fn spares_of(folder: &Path) -> Vec<u32> {
    let read = |pid: u32, name: &str| fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap_or_default();
    let is_in_folder = |path: PathBuf| path.starts_with(folder);
    let has_kernel = |pid: u32| {
        let links = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        links.filter_map(|link| fs::read_link(link.path()).ok()).any(is_in_folder)
    };
    // A monitor that has a guest filters system calls; one that is being prepared does not sleep in poll(2).
    let waits = |pid: u32| read(pid, "status").contains("Seccomp:\t0") && read(pid, "wchan").contains("poll");
    processes("kindling-vmm").into_iter().filter(|&pid| waits(pid) && has_kernel(pid)).collect()
}

/// Waits until a condition has a value.
///
/// # Panics
/// When it has none within [`TIMEOUT`].
#[track_caller]
pub fn wait_for<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + TIMEOUT;
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < end, "{what}");
        std::thread::yield_now();
    }
}
