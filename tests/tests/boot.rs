//! The default image boots with any size of memory.

use tests::{expect_greeting, kindling, run, testbed};

#[test]
fn one_vcpu_and_128_mib() {
    expect_greeting(1, 128);
}

#[test]
fn a_small_machine() {
    expect_greeting(1, 64);
}

#[test]
fn memory_on_both_sides_of_the_device_gap() {
    expect_greeting(1, 4096);
}

#[test]
fn an_odd_amount_of_memory() {
    expect_greeting(1, 129);
}

#[test]
fn the_report_names_every_stage_in_order() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("report.json");
    let outcome = run(kindling()
        .args(["boot", "--report", "--report-json"])
        .arg(&path)
        .arg("--image")
        .arg(testbed("images/default"))
        .stdin(std::process::Stdio::null()));
    outcome.expect_status(0).expect_stderr("boot report").expect_stderr("exits to the VMM");
    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let steps: Vec<(&str, u64)> = report["steps"]
        .as_array()
        .unwrap()
        .iter()
        .map(|step| (step["name"].as_str().unwrap(), step["ns"].as_u64().unwrap()))
        .collect();
    let names: Vec<&str> = steps.iter().map(|(name, _)| *name).collect();
    let expected = [
        "command entered",
        "configuration checked",
        "kernel loaded",
        "KVM opened",
        "VM created",
        "devices built",
        "vCPUs created",
        "first instruction",
        "init: first instruction",
        "init: filesystems mounted",
        "init: hostname and loopback set",
        "init: configuration read",
        "guest ended",
        "vCPUs stopped",
    ];
    assert_eq!(names, expected);
    assert!(steps.is_sorted_by_key(|(_, ns)| *ns), "{steps:?}");
    assert_eq!(report["status"], 0);
}
