//! The payload's exit status, streams, environment and signals.

use std::io::Write;
use std::process::Stdio;
use tests::{Outcome, TIMEOUT, boot, run, start};

/// Runs a shell script in a guest.
#[track_caller]
fn shell(script: &str) -> Outcome {
    run(boot().args(["--", "/bin/sh", "-c", script]))
}

#[test]
fn the_exit_status_of_the_payload_is_passed_on() {
    for code in [0, 3, 255] {
        shell(&format!("exit {code}")).expect_status(code);
    }
}

#[test]
fn a_payload_killed_by_a_signal_has_status_128_plus_its_number() {
    shell("kill -KILL $$").expect_status(128 + 9);
    shell("kill -TERM $$").expect_status(128 + 15);
}

#[test]
fn a_missing_program_is_status_127_and_named() {
    let outcome = run(boot().args(["--", "/no/such/program"]));
    assert_eq!(outcome.expect_status(127).stdout, "init: /no/such/program: not found\n");
    run(boot().args(["--", "no-such-program"])).expect_status(127);
}

#[test]
fn a_file_that_is_not_executable_is_status_126() {
    let outcome = run(boot().args(["--", "/etc/data"])).expect_status(126).stdout.clone();
    assert_eq!(outcome, "init: /etc/data: cannot execute: permission denied\n");
    run(boot().args(["--", "/tmp"])).expect_status(126);
}

#[test]
fn a_payload_can_have_200000_arguments() {
    // Each argument takes nine bytes in addition to its text.
    let many = vec!["x"; 200_000];
    let outcome = run(boot().args(["--", "/bin/sh", "-c", "echo $#", "sh"]).args(&many));
    assert_eq!(outcome.expect_status(0).stdout, "200000\n");
}

#[test]
fn a_program_is_looked_up_in_path() {
    assert_eq!(run(boot().args(["--", "echo", "found"])).expect_status(0).stdout, "found\n");
}

#[test]
fn environment_working_directory_user_and_hostname_are_set() {
    let script = "echo $A; echo $EMPTY.; pwd; id -u; id -g; hostname; cat /proc/self/status | grep Groups";
    let outcome = run(boot()
        .args(["--env", "A=one two", "--env", "EMPTY=", "--workdir", "/usr", "--user", "1000:100"])
        .args(["--hostname", "box", "--", "/bin/sh", "-c", script]));
    let lines: Vec<&str> = outcome.expect_status(0).stdout.lines().map(str::trim_end).collect();
    assert_eq!(lines, ["one two", ".", "/usr", "1000", "100", "box", "Groups:"], "{outcome}");
}

#[test]
fn an_unprivileged_user_cannot_access_the_vmms_ports() {
    // /dev/port would end the machine with status 7 (the exit port, four bytes).
    let script = "printf '\\007\\000\\000\\000' | dd of=/dev/port bs=4 count=1 seek=341 2>/dev/null; exit 3";
    run(boot().args(["--user", "1000", "--", "/bin/sh", "-c", script])).expect_status(3);
}

#[test]
fn init_mounts_filesystems_and_configures_loopback_and_devices() {
    let script = "for d in /proc /dev /dev/pts /dev/shm /run /tmp; do grep -q \" $d \" /proc/mounts || echo missing $d; done; \
                  ifconfig lo | grep -c UP; ls -1 /dev/null /dev/ptmx; echo x > /tmp/f && cat /tmp/f";
    let outcome = shell(script);
    assert_eq!(outcome.expect_status(0).stdout, "1\n/dev/null\n/dev/ptmx\nx\n", "{outcome}");
}

#[test]
fn programs_can_open_their_descriptors_by_name() {
    let outcome = shell(
        "echo to > /dev/stdout; echo through | cat /dev/stdin; cat /dev/fd/3 3< /etc/passwd | head -c 4",
    );
    assert_eq!(outcome.expect_status(0).stdout, "to\nthrough\nroot", "{outcome}");
}

#[test]
fn init_reaps_orphans_and_does_not_wait_for_background_processes() {
    // The grandchild is reparented to init, and exits while the payload is running.
    let script =
        "(sleep 0 & echo $! > /tmp/pid) ; while [ -d /proc/$(cat /tmp/pid) ]; do sleep 0; done; echo reaped";
    assert_eq!(shell(script).expect_status(0).stdout, "reaped\n");
    // A background process does not keep the machine alive.
    shell("sleep 1000 & exit 4").expect_status(4);
}

#[test]
fn init_forwards_sigterm_to_the_payload() {
    let script = "trap 'echo told; exit 9' TERM; kill -TERM 1; while :; do sleep 0; done";
    assert_eq!(shell(script).expect_status(9).stdout, "told\n");
}

#[test]
fn console_input_reaches_the_payload() {
    let mut command = boot();
    command.args(["--", "/bin/sh", "-c", "stty -echo; echo ready; read line; echo got $line"]);
    let mut started = start(command.stdin(Stdio::piped()));
    // Longer than the serial port's buffer, so that the event loop has to pause and resume.
    let long = "x".repeat(500);
    let mut input = started.child.stdin.take().unwrap();
    writeln!(input, "{long}").unwrap();
    let outcome = started.finish_within(TIMEOUT);
    assert!(outcome.expect_status(0).stdout.contains(&format!("got {long}\n")), "{outcome}");
    drop(input);
}

#[test]
fn long_output_arrives_completely() {
    let outcome =
        shell("i=0; while [ $i -lt 512 ]; do echo 0123456789012345678901234567890; i=$((i+1)); done");
    assert_eq!(outcome.expect_status(0).stdout.len(), 16 * 1024, "{}", outcome.stderr);
}

#[test]
fn output_before_an_immediate_exit_arrives() {
    // The payload exits immediately after a long line, most of which is still in the serial port's queue.
    let script = "exec echo 0123456789012345678901234567890123456789012345678901234567890123456789";
    assert!(shell(script).expect_status(0).stdout.ends_with("0123456789\n"));
}

#[test]
fn the_vmms_payload_overrides_that_of_the_kernel_command_line() {
    // The VMM's configuration has precedence over the kernel command line.
    let line = format!("{} -- /bin/sh -c \"exit 8\"", guest_protocol::DEFAULT_COMMAND_LINE);
    run(boot().args(["--cmdline", &line, "--", "/bin/sh", "-c", "exit 5"])).expect_status(5);
}
