//! Every way a guest can fail has its exit status and a report of one screen.

use std::process::Stdio;
use tests::machine_code::{FOREVER, exit, kernel};
use tests::{Outcome, PATIENCE, boot, kindling, run, start, testbed};

#[track_caller]
fn code(code: &[u8]) -> Outcome {
    let kernel = kernel(code);
    run(kindling().args(["boot", "--kernel"]).arg(kernel.path()).stdin(Stdio::null()))
}

#[test]
fn a_guest_of_ten_bytes_ends_with_its_code() {
    code(&exit(42)).expect_status(42);
}

#[test]
fn init_panic_is_120() {
    code(&exit(0x100)).expect_status(120).expect_stderr("init failed");
}

#[test]
fn an_exit_status_that_is_none_does_not_end_the_guest() {
    let both = [exit(0x0002_0000), exit(5)].concat();
    code(&both).expect_status(5);
}

#[test]
fn triple_fault_is_122() {
    // ud2 without an interrupt table.
    let outcome = code(&[0x0f, 0x0b]);
    outcome.expect_status(122).expect_stderr("triple fault");
    // On Intel's processors the registers are still there, on AMD's KVM has reset them.
    let known = ["rip 0x0000000000100000", "KVM on AMD processors resets them"];
    assert!(known.iter().any(|text| outcome.stderr.contains(text)), "{outcome}");
    outcome.expect_stderr("the console is empty").expect_stderr("last stage reached: first instruction");
}

#[test]
fn a_reset_is_119() {
    // mov al, 0xfe; out 0x64, al
    code(&[0xb0, 0xfe, 0xe6, 0x64]).expect_status(119).expect_stderr("reset the machine");
    // mov al, 6; mov dx, 0xcf9; out dx, al
    code(&[0xb0, 0x06, 0x66, 0xba, 0xf9, 0x0c, 0xee]).expect_status(119);
    run(boot().args(["--", "reboot", "-f"])).expect_status(119);
}

#[test]
fn a_kernel_panic_is_123_and_its_words_are_shown() {
    let outcome = run(kindling()
        .args(["boot", "--kernel"])
        .arg(testbed("images/default/vmlinux"))
        .stdin(Stdio::null()));
    outcome.expect_status(123).expect_stderr("the guest's kernel panicked");
    outcome.expect_stderr("| ").expect_stderr("Kernel panic - not syncing: VFS: Unable to mount root fs");
    assert!(outcome.stderr.lines().count() <= 40, "one screen: {outcome}");
}

#[test]
fn sigterm_and_sigint_stop_a_guest_at_once() {
    let kernel = kernel(&FOREVER);
    for (signal, status) in [(libc::SIGTERM, 143), (libc::SIGINT, 130), (libc::SIGHUP, 129)] {
        let mut command = kindling();
        command
            .args(["boot", "--vcpus", "2", "--report", "--kernel"])
            .arg(kernel.path())
            .stdin(Stdio::null());
        let started = start(&mut command);
        wait_until_running(&started);
        started.signal(signal);
        let outcome = started.finish_within(PATIENCE);
        outcome.expect_status(status).expect_stderr("boot report");
    }
}

/// Waits until the VMM has installed its signal handlers: it sleeps in `epoll_wait` afterwards.
fn wait_until_running(started: &tests::Started) {
    let path = format!("/proc/{}/syscall", started.child.id());
    const EPOLL_WAIT: [&str; 2] = ["232 ", "281 "];
    while !std::fs::read_to_string(&path)
        .is_ok_and(|call| EPOLL_WAIT.iter().any(|number| call.starts_with(number)))
    {
        std::thread::yield_now();
    }
}
