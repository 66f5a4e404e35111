//! How long a boot takes, in the exact lab: instructions, the same on every machine.

use std::process::Stdio;
use tests::{kindling, run, testbed};

/// Nanoseconds since boot of the clock that `kindling` reports in: CLOCK_MONOTONIC.
#[expect(unsafe_code, reason = "clock_gettime has no safe wrapper in std")]
fn now() -> i64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call fills the structure.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec * 1_000_000_000 + time.tv_nsec
}

#[test]
fn init_is_reached_within_40_ms_of_the_spawn() {
    const LIMIT_NS: u64 = 40_000_000;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("report.json");
    let mut command = kindling();
    command.args(["boot", "--image"]).arg(testbed("images/default")).arg("--report-json").arg(&path);
    command.args(["--vcpus", "1", "--memory", "128"]).stdin(Stdio::null());
    run(command.args(["--started-at", &now().to_string()])).expect_status(0);
    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let steps = report["steps"].as_array().unwrap();
    let init = steps.iter().find(|step| step["name"] == "init: first instruction").unwrap();
    let ns = init["ns"].as_u64().unwrap();
    assert!(ns <= LIMIT_NS, "{ns} instructions; {report:#}");
}
