//! A payload is a real program: its exit status, streams, environment and signals are its own.

use std::io::Write;
use std::process::Stdio;
use tests::{Outcome, PATIENCE, boot, run, start};

/// Runs a shell script in a guest.
#[track_caller]
fn shell(script: &str) -> Outcome {
    run(boot().args(["--", "/bin/sh", "-c", script]))
}

#[test]
fn exit_codes_pass_through() {
    for code in [0, 3, 255] {
        shell(&format!("exit {code}")).expect_status(code);
    }
}

#[test]
fn a_signal_is_128_plus_its_number() {
    shell("kill -KILL $$").expect_status(128 + 9);
    shell("kill -TERM $$").expect_status(128 + 15);
}

#[test]
fn a_missing_program_is_127_and_named() {
    let outcome = run(boot().args(["--", "/no/such/program"]));
    assert_eq!(outcome.expect_status(127).stdout, "init: /no/such/program: not found\n");
    run(boot().args(["--", "no-such-program"])).expect_status(127);
}

#[test]
fn a_file_that_is_no_program_is_126() {
    let outcome = run(boot().args(["--", "/etc/data"])).expect_status(126).stdout.clone();
    assert_eq!(outcome, "init: /etc/data: cannot execute: permission denied\n");
    run(boot().args(["--", "/tmp"])).expect_status(126);
}

#[test]
fn as_many_arguments_as_linux_takes() {
    // Nine bytes each beside their own.
    let many = vec!["x"; 200_000];
    let outcome = run(boot().args(["--", "/bin/sh", "-c", "echo $#", "sh"]).args(&many));
    assert_eq!(outcome.expect_status(0).stdout, "200000\n");
}

#[test]
fn a_program_is_found_in_path() {
    assert_eq!(run(boot().args(["--", "echo", "found"])).expect_status(0).stdout, "found\n");
}

#[test]
fn environment_directory_user_and_hostname_are_as_asked() {
    let script = "echo $A; echo $EMPTY.; pwd; id -u; id -g; hostname; cat /proc/self/status | grep Groups";
    let outcome = run(boot()
        .args(["--env", "A=one two", "--env", "EMPTY=", "--workdir", "/usr", "--user", "1000:100"])
        .args(["--hostname", "box", "--", "/bin/sh", "-c", script]));
    let lines: Vec<&str> = outcome.expect_status(0).stdout.lines().map(str::trim_end).collect();
    assert_eq!(lines, ["one two", ".", "/usr", "1000", "100", "box", "Groups:"], "{outcome}");
}

#[test]
fn a_user_cannot_touch_the_ports_of_the_vmm() {
    // /dev/port would end the machine with status 7 (the exit port, four bytes).
    let script = "printf '\\007\\000\\000\\000' | dd of=/dev/port bs=4 count=1 seek=341 2>/dev/null; exit 3";
    run(boot().args(["--user", "1000", "--", "/bin/sh", "-c", script])).expect_status(3);
}

#[test]
fn the_system_is_set_up() {
    let script = "for d in /proc /dev /dev/pts /dev/shm /run /tmp; do grep -q \" $d \" /proc/mounts || echo missing $d; done; \
                  ifconfig lo | grep -c UP; ls -1 /dev/null /dev/ptmx; echo x > /tmp/f && cat /tmp/f";
    let outcome = shell(script);
    assert_eq!(outcome.expect_status(0).stdout, "1\n/dev/null\n/dev/ptmx\nx\n", "{outcome}");
}

#[test]
fn programs_can_name_their_own_descriptors() {
    let outcome = shell(
        "echo to > /dev/stdout; echo through | cat /dev/stdin; cat /dev/fd/3 3< /etc/passwd | head -c 4",
    );
    assert_eq!(outcome.expect_status(0).stdout, "to\nthrough\nroot", "{outcome}");
}

#[test]
fn init_reaps_orphans_and_outlives_none() {
    // The grandchild loses its parent, becomes init's child, and ends while the payload goes on.
    let script =
        "(sleep 0 & echo $! > /tmp/pid) ; while [ -d /proc/$(cat /tmp/pid) ]; do sleep 0; done; echo reaped";
    assert_eq!(shell(script).expect_status(0).stdout, "reaped\n");
    // A background process does not keep the machine alive.
    shell("sleep 1000 & exit 4").expect_status(4);
}

#[test]
fn init_passes_sigterm_on() {
    let script = "trap 'echo told; exit 9' TERM; kill -TERM 1; while :; do sleep 0; done";
    assert_eq!(shell(script).expect_status(9).stdout, "told\n");
}

#[test]
fn input_reaches_the_payload() {
    let mut command = boot();
    command.args(["--", "/bin/sh", "-c", "stty -echo; echo ready; read line; echo got $line"]);
    let mut started = start(command.stdin(Stdio::piped()));
    // Longer than the serial port's buffer, so that the event loop has to pause and go on.
    let long = "x".repeat(500);
    let mut input = started.child.stdin.take().unwrap();
    writeln!(input, "{long}").unwrap();
    let outcome = started.finish_within(PATIENCE);
    assert!(outcome.expect_status(0).stdout.contains(&format!("got {long}\n")), "{outcome}");
    drop(input);
}

#[test]
fn long_output_arrives_whole() {
    let outcome =
        shell("i=0; while [ $i -lt 512 ]; do echo 0123456789012345678901234567890; i=$((i+1)); done");
    assert_eq!(outcome.expect_status(0).stdout.len(), 16 * 1024, "{}", outcome.stderr);
}

#[test]
fn the_last_words_arrive() {
    // The payload ends at once after a long line, which the serial port has not sent by then.
    let script = "exec echo 0123456789012345678901234567890123456789012345678901234567890123456789";
    assert!(shell(script).expect_status(0).stdout.ends_with("0123456789\n"));
}

#[test]
fn the_command_line_names_a_payload_where_no_vmm_does() {
    // The VMM answers, so its answer counts and the command line's does not.
    let line = format!("{} -- /bin/sh -c \"exit 8\"", guest_protocol::DEFAULT_COMMAND_LINE);
    run(boot().args(["--cmdline", &line, "--", "/bin/sh", "-c", "exit 5"])).expect_status(5);
}
