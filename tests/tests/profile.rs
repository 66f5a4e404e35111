//! `kindling boot --profile` records exits, marks and samples without changing the boot.

use serde_json::Value;
use std::process::Stdio;
use tests::machine_code::{elf, exit};
use tests::{Outcome, kindling, run, testbed};

/// Boots the default image with a profile; returns its outcome and the recorded data.
#[track_caller]
fn profile(more: &[&str]) -> (Outcome, Value) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("profile.json");
    let mut command = kindling();
    command.arg("boot").arg("--image").arg(testbed("images/default")).arg("--profile").arg(&path);
    let outcome = run(command.args(more).stdin(Stdio::null()));
    outcome.expect_status(0);
    assert!(outcome.stdout.starts_with("Hello from Kindling"), "{outcome}");
    (outcome, serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap())
}

/// The time of a step.
#[track_caller]
fn step(profile: &Value, name: &str) -> u64 {
    let steps = profile["report"]["steps"].as_array().unwrap();
    let step = steps.iter().find(|step| step["name"] == name);
    step.unwrap_or_else(|| panic!("the report has no step {name}"))["ns"].as_u64().unwrap()
}

/// A field of each record of a list.
fn column(profile: &Value, list: &str, field: usize) -> Vec<u64> {
    profile[list].as_array().unwrap().iter().map(|record| record[field].as_u64().unwrap()).collect()
}

#[test]
fn exits_and_the_kernels_log_are_recorded() {
    let (_, profile) = profile(&[]);
    let exits = column(&profile, "exits", 0);
    assert!(exits.is_sorted() && exits.len() > 50, "{exits:?}");
    let kinds: Vec<&str> =
        profile["exits"].as_array().unwrap().iter().map(|exit| exit[1].as_str().unwrap()).collect();
    let known = ["port read", "port write", "memory read", "memory write"];
    assert!(kinds.iter().all(|kind| known.contains(kind)), "{kinds:?}");
    let addresses = column(&profile, "exits", 2);
    assert!(addresses.contains(&0x3f8), "the serial port; {addresses:?}");
    assert!(!addresses.contains(&0x551), "exits of sending the log must not be recorded");
    let log = profile["kernel_log"].as_str().unwrap();
    assert!(log.contains("Linux version") && log.contains("Run /init as init process"), "{log}");
    assert!(column(&profile, "samples", 0).is_empty() && column(&profile, "marks", 0).is_empty());
}

#[test]
fn the_first_call_of_each_marked_function_is_recorded() {
    let list = testbed("functions");
    let (_, profile) = profile(&["--vcpus", "2", "--profile-functions", list.to_str().unwrap()]);
    let text = std::fs::read_to_string(&list).unwrap();
    let requested: Vec<(u64, &str)> = text
        .lines()
        .map(|line| line.split_once(' ').unwrap())
        .map(|(address, name)| (u64::from_str_radix(address, 16).unwrap(), name))
        .collect();
    let (times, called) = (column(&profile, "marks", 0), column(&profile, "marks", 2));
    assert!(times.is_sorted() && times[0] > step(&profile, "first instruction"), "{times:?}");
    assert!(called.len() > requested.len() * 9 / 10, "{} of {} were called", called.len(), requested.len());
    for (number, function) in called.iter().enumerate() {
        assert!(requested.iter().any(|(address, _)| address == function), "{function:#x} was not requested");
        assert!(!called[..number].contains(function), "{function:#x} was recorded twice");
    }
    let position = |name: &str| {
        let (address, _) = requested.iter().find(|(_, requested)| *requested == name).unwrap();
        called
            .iter()
            .position(|function| function == address)
            .unwrap_or_else(|| panic!("{name} was not called"))
    };
    // The order in init/main.c; in the initcall table the fs level precedes the device level.
    let order =
        ["start_kernel", "setup_arch", "sched_init", "smp_init", "inet_init", "ext4_init_fs", "free_initmem"];
    assert!(order.map(position).is_sorted(), "{:?}", order.map(position));
}

#[test]
fn samples_are_taken_until_the_log_is_sent() {
    // Labs with several processors stall for a while with a shorter interval.
    let (_, profile) = profile(&["--sample", "500"]);
    let (times, addresses) = (column(&profile, "samples", 0), column(&profile, "samples", 2));
    assert!(times.is_sorted());
    let (first, init) = (step(&profile, "first instruction"), step(&profile, "init: first instruction"));
    let in_kernel = times.iter().filter(|time| (first..init).contains(time)).count();
    assert!(in_kernel > 10, "{in_kernel} samples in {} us", (init - first) / 1000);
    let text = |address: &&u64| **address >= 0xffff_ffff_8000_0000;
    assert!(addresses.iter().filter(text).count() > in_kernel / 2, "{addresses:x?}");
    let stacks =
        profile["samples"].as_array().unwrap().iter().map(|sample| sample[3].as_array().unwrap().len());
    assert!(stacks.max() > Some(3), "no sample has callers");
}

#[test]
fn invalid_function_lists_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let refused = |list: &str, what: &[&str], expected: &str| {
        let path = directory.path().join("functions");
        std::fs::write(&path, list).unwrap();
        let mut command = kindling();
        command.args(["boot", "--profile", "/dev/null", "--profile-functions"]).arg(&path).args(what);
        let outcome = run(command.stdin(Stdio::null()));
        outcome.expect_status(2).expect_stderr(expected);
        assert_eq!(outcome.stderr.lines().count(), 1, "{outcome}");
    };
    let image = testbed("images/default");
    let image = ["--image", image.to_str().unwrap()];
    refused("start_kernel\n", &image, "line 1 does not begin with a hexadecimal address");
    refused("ffffffff00000000\n", &image, "0xffffffff00000000 is not an address in this kernel's segments");
    refused(&"ffffffff81000000\n".repeat(4097), &image, "4097 functions are too many");
    let kernel = directory.path().join("kernel");
    std::fs::write(&kernel, elf(&exit(0))).unwrap();
    refused("ffffffff80100000\n", &["--kernel", kernel.to_str().unwrap()], "in images only (--image)");
}
