//! A guest has as many vCPUs as it was given, and they run at once.

use tests::{Image, boot, expect_greeting, has_continued, run};

#[test]
fn two_vcpus() {
    expect_greeting(2, 128);
}

#[test]
fn four_vcpus() {
    expect_greeting(4, 128);
}

#[test]
fn several_vcpus_run_at_once() {
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
fn the_last_words_arrive() {
    // The payload ends at once after a long line, which the serial port has not sent by then.
    let script = "exec echo 0123456789012345678901234567890123456789012345678901234567890123456789";
    for vcpus in ["2", "4"] {
        let outcome = run(boot().args(["--vcpus", vcpus, "--", "/bin/sh", "-c", script]));
        assert!(outcome.expect_status(0).stdout.ends_with("0123456789\n"), "{vcpus} vCPUs: {outcome}");
    }
}

#[test]
fn all_vcpus_of_a_prebooted_kernel_go_on() {
    let image = Image::copy_of("busybox");
    let _ = image.preboot("4", "256");
    // Each process is bound to a processor of its own, and all of them end.
    let script = "nproc; for n in 0 1 2 3; do taskset -p $((1 << n)) $$ >/dev/null; \
                  sh -c 'i=0; while [ $i -lt 1000 ]; do i=$((i+1)); done; echo done'; done; \
                  sleep 0.05; cut -d' ' -f39 /proc/$$/stat";
    let outcome = image.continued_shell(&["--vcpus", "4", "--memory", "256"], script);
    assert_eq!(outcome.expect_status(0).stdout, "4\ndone\ndone\ndone\ndone\n3\n", "{outcome}");
}

/// The pages that guests write to are there before they start. Where one is copied at the first write, vCPUs wait for
/// one another, and these labs count every instruction of the waiting: 40 to 220 ms in most starts without that list,
/// 1 to 3 ms with it.
#[test]
fn vcpus_of_a_prebooted_kernel_do_not_stand_still() {
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
        assert!(has_continued(&path), "{report:#}");
        at("init: first instruction") - at("VM created")
    });
    times.sort_unstable();
    assert!(times[3] < LIMIT_NS, "{times:?}");
}
