//! The default image boots with various memory sizes, and its boot report is complete.

use tests::{expect_greeting, kindling, run, testbed};

#[test]
fn the_default_image_boots_with_128_mib() {
    expect_greeting(1, 128);
}

#[test]
fn the_default_image_boots_with_64_mib() {
    expect_greeting(1, 64);
}

#[test]
fn the_default_image_boots_with_memory_above_and_below_the_mmio_gap() {
    expect_greeting(1, 4096);
}

#[test]
fn the_default_image_boots_with_an_odd_number_of_mib() {
    expect_greeting(1, 129);
}

#[test]
fn the_boot_report_has_every_step_in_order() {
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
