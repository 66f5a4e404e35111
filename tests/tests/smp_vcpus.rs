//! Guests with several vCPUs.

use tests::{Image, boot, expect_greeting, is_from_prebooted_kernel, run};

#[test]
fn the_default_image_boots_with_two_vcpus() {
    expect_greeting(2, 128);
}

#[test]
fn the_default_image_boots_with_four_vcpus() {
    expect_greeting(4, 128);
}

#[test]
fn the_guest_sees_all_of_its_vcpus() {
    let outcome = run(boot().args([
        "--vcpus",
        "2",
        "--",
        "/bin/sh",
        "-c",
        "nproc; cat /proc/cpuinfo | grep -c ^processor",
    ]));
    assert_eq!(outcome.expect_status(0).stdout, "2\n2\n");
}

#[test]
fn output_before_an_immediate_exit_arrives() {
    // The payload exits immediately after a long line, most of which is still in the serial port's queue.
    let script = "exec echo 0123456789012345678901234567890123456789012345678901234567890123456789";
    for vcpus in ["2", "4"] {
        let outcome = run(boot().args(["--vcpus", vcpus, "--", "/bin/sh", "-c", script]));
        assert!(outcome.expect_status(0).stdout.ends_with("0123456789\n"), "{vcpus} vCPUs: {outcome}");
    }
}

#[test]
fn all_vcpus_work_after_a_start_from_a_prebooted_kernel() {
    let image = Image::copy_of("busybox");
    let _ = image.preboot("4", "256");
    // Each process is pinned to a different vCPU, and all of them exit.
    let script = "nproc; for n in 0 1 2 3; do taskset -p $((1 << n)) $$ >/dev/null; \
                  sh -c 'i=0; while [ $i -lt 1000 ]; do i=$((i+1)); done; echo done'; done; \
                  sleep 0.05; cut -d' ' -f39 /proc/$$/stat";
    let outcome = image.prebooted_shell(&["--vcpus", "4", "--memory", "256"], script);
    assert_eq!(outcome.expect_status(0).stdout, "4\ndone\ndone\ndone\ndone\n3\n", "{outcome}");
}

/// The pages that guests write are copied before they start. If they were copied at the first write, vCPUs would wait
/// for each other, and these labs count every instruction of the waiting: 40 to 220 ms in most starts without the list
/// of pages, 1 to 3 ms with it.
#[test]
fn vcpus_started_from_a_prebooted_kernel_do_not_stall_on_page_copies() {
    const LIMIT_NS: u64 = 10_000_000;
    let image = Image::copy_of("default");
    let _ = image.preboot("2", "128");
    let path = image.path().join("report.json");
    let mut times = [(); 7].map(|()| {
        let mut command = image.command("boot");
        run(command.args(["--vcpus", "2", "--memory", "128", "--report-json"]).arg(&path)).expect_status(0);
        let report: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        let steps = report["steps"].as_array().unwrap();
        let at = |name| steps.iter().find(|step| step["name"] == name).unwrap()["ns"].as_u64().unwrap();
        assert!(is_from_prebooted_kernel(&path), "{report:#}");
        at("init: first instruction") - at("VM created")
    });
    times.sort_unstable();
    assert!(times[3] < LIMIT_NS, "{times:?}");
}
