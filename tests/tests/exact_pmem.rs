//! The exit time of a guest with a pmem device, in the exact lab.

use std::process::Stdio;
use tests::{kindling, run, testbed};

/// Limit of the time from the end of the vCPUs to the exit of the process in nanoseconds. Closing an inotify watch on
/// the file takes 6 to 15 ms, because the kernel waits for SRCU.
const LIMIT_NS: i64 = 4_000_000;

/// CLOCK_MONOTONIC in nanoseconds, the clock of `kindling`'s reports.
#[expect(unsafe_code, reason = "clock_gettime has no safe wrapper in std")]
fn now() -> i64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call fills the structure.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec * 1_000_000_000 + time.tv_nsec
}

#[test]
fn the_exit_does_not_wait_for_the_removal_of_the_inotify_watch() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(2 << 20).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("report.json");
    let mut command = kindling();
    command.args(["boot", "--console", "null", "--image"]).arg(testbed("images/pmem"));
    command.arg("--pmem").arg(file.path()).arg("--report-json").arg(&path).stdin(Stdio::null());
    run(&mut command).expect_status(0);
    let ended = now();
    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let steps = report["steps"].as_array().unwrap();
    let stopped = steps.iter().find(|step| step["name"] == "vCPUs stopped").unwrap();
    let stopped = report["start_ns"].as_i64().unwrap() + stopped["ns"].as_i64().unwrap();
    let ns = ended - stopped;
    assert!(ns <= LIMIT_NS, "{ns} ns from the end of the vCPUs to the end of the process; {report:#}");
}
