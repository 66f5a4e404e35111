//! Each failure of a guest has its own exit status and a report of at most one screen.

use std::process::Stdio;
use tests::machine_code::{INFINITE_LOOP, exit, kernel};
use tests::{Outcome, TIMEOUT, boot, kindling, run, start, testbed};

#[track_caller]
fn code(code: &[u8]) -> Outcome {
    let kernel = kernel(code);
    run(kindling().args(["boot", "--kernel"]).arg(kernel.path()).stdin(Stdio::null()))
}

#[test]
fn the_exit_port_sets_the_exit_status() {
    code(&exit(42)).expect_status(42);
}

#[test]
fn a_failure_of_init_is_status_120() {
    code(&exit(0x100)).expect_status(120).expect_stderr("init failed");
}

#[test]
fn an_invalid_value_at_the_exit_port_is_ignored() {
    let both = [exit(0x0002_0000), exit(5)].concat();
    code(&both).expect_status(5);
}

#[test]
fn a_triple_fault_is_status_122() {
    // ud2 without an IDT.
    let outcome = code(&[0x0f, 0x0b]);
    outcome.expect_status(122).expect_stderr("triple fault");
    // Intel processors keep the registers; KVM on AMD processors resets them.
    let known = ["rip 0x0000000000100000", "KVM on AMD processors resets them"];
    assert!(known.iter().any(|text| outcome.stderr.contains(text)), "{outcome}");
    outcome.expect_stderr("the console is empty").expect_stderr("last stage reached: first instruction");
}

#[test]
fn a_reset_is_status_119() {
    // mov al, 0xfe; out 0x64, al
    code(&[0xb0, 0xfe, 0xe6, 0x64]).expect_status(119).expect_stderr("reset the machine");
    // mov al, 6; mov dx, 0xcf9; out dx, al
    code(&[0xb0, 0x06, 0x66, 0xba, 0xf9, 0x0c, 0xee]).expect_status(119);
    run(boot().args(["--", "reboot", "-f"])).expect_status(119);
}

#[test]
fn a_kernel_panic_is_status_123_and_the_report_shows_its_message() {
    let outcome = run(kindling()
        .args(["boot", "--kernel"])
        .arg(testbed("images/default/vmlinux"))
        .stdin(Stdio::null()));
    outcome.expect_status(123).expect_stderr("the guest's kernel panicked");
    outcome.expect_stderr("| ").expect_stderr("Kernel panic - not syncing: VFS: Unable to mount root fs");
    assert!(outcome.stderr.lines().count() <= 40, "longer than one screen: {outcome}");
}

#[test]
fn sigterm_sigint_and_sighup_stop_a_guest() {
    let kernel = kernel(&INFINITE_LOOP);
    for (signal, status) in [(libc::SIGTERM, 143), (libc::SIGINT, 130), (libc::SIGHUP, 129)] {
        let mut command = kindling();
        command
            .args(["boot", "--vcpus", "2", "--report", "--kernel"])
            .arg(kernel.path())
            .stdin(Stdio::null());
        let started = start(&mut command);
        wait_until_running(&started);
        started.signal(signal);
        let outcome = started.finish_within(TIMEOUT);
        outcome.expect_status(status).expect_stderr("boot report");
    }
}

/// Waits until the VMM sleeps in `epoll_wait`, after it has installed its signal handlers.
fn wait_until_running(started: &tests::Started) {
    let path = format!("/proc/{}/syscall", started.child.id());
    const EPOLL_WAIT: [&str; 2] = ["232 ", "281 "];
    while !std::fs::read_to_string(&path)
        .is_ok_and(|call| EPOLL_WAIT.iter().any(|number| call.starts_with(number)))
    {
        std::thread::yield_now();
    }
}
