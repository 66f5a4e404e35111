//! The default image boots with any number of vCPUs and any size of memory.

use tests::{kindling, run, testbed};

/// Boots the image without a payload and checks the greeting.
#[track_caller]
fn greets(vcpus: u32, memory_mib: u32) {
    let outcome = run(kindling()
        .args(["boot", "--vcpus", &vcpus.to_string(), "--memory", &memory_mib.to_string(), "--image"])
        .arg(testbed("images/default"))
        .stdin(std::process::Stdio::null()));
    outcome.expect_status(0);
    let words: Vec<&str> = outcome.stdout.split_whitespace().collect();
    let position = |word: &str| words.iter().position(|w| *w == word).unwrap_or_else(|| panic!("{outcome}"));
    assert_eq!(words[position("on") + 1], vcpus.to_string(), "{outcome}");
    // The kernel keeps a part of the memory for itself: about 16 MiB and 2 % of the whole.
    let usable: u32 = words[position("usable,") - 2].parse().unwrap();
    assert!(usable < memory_mib && usable > memory_mib - memory_mib / 40 - 24, "{outcome}");
    assert_eq!(outcome.stdout.lines().count(), 1, "a quiet kernel says nothing: {outcome}");
    assert_eq!(outcome.stderr, "", "{outcome}");
}

#[test]
fn one_vcpu_and_128_mib() {
    greets(1, 128);
}

#[test]
fn two_vcpus() {
    greets(2, 128);
}

#[test]
fn four_vcpus() {
    greets(4, 128);
}

#[test]
fn a_small_machine() {
    greets(1, 64);
}

#[test]
fn memory_on_both_sides_of_the_device_gap() {
    greets(1, 4096);
}

#[test]
fn an_odd_amount_of_memory() {
    greets(1, 129);
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
