//! The examples of the library `kindling`: programs that start guests.

use std::process::{Command, Stdio};
use tests::user::User;
use tests::{TIMEOUT, run, start, testbed};

/// The program in README.md and docs/embedding.md.
#[test]
fn the_first_program_prints_what_a_command_wrote() {
    let user = User::new();
    let outcome = run(user.example("first").arg(testbed("busybox.erofs")));
    assert_eq!(outcome.expect_status(0).stdout, "42\n");
    assert!(user.has_no_guests());
}

#[test]
fn a_program_can_set_the_directories_of_programs_and_kernel() {
    let user = User::new();
    let mut program = user.example("installed");
    program.env("KINDLING_PROGRAMS", "/nonexistent").env("KINDLING_IMAGE", "/nonexistent");
    let outcome = run(program
        .arg(testbed("kindling").parent().unwrap())
        .arg(testbed("images/run"))
        .arg(testbed("busybox.erofs")));
    assert_eq!(outcome.expect_status(0).stdout, "it runs\n");
    // Inherited output that is lost is an error.
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let outcome = run_with_stdout(&mut program, full);
    outcome.expect_status(1).expect_stderr("cannot write the output of the command: No space left on device");
    assert!(user.has_no_guests());
}

/// Runs a program with this file as standard output.
fn run_with_stdout(command: &mut Command, stdout: std::fs::File) -> tests::Outcome {
    let output = command.stdout(stdout).stderr(Stdio::piped()).spawn().unwrap().wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    tests::Outcome { status: output.status.code(), stdout: String::new(), stderr }
}

#[test]
fn a_command_returns_its_output_or_its_status_and_stderr() {
    let user = User::new();
    let outcome = |words: &[&str]| run(user.example("output").arg(testbed("busybox.erofs")).args(words));
    assert_eq!(outcome(&["echo", "one", "two"]).expect_status(0).stdout, "one two\n");
    outcome(&["sh", "-c", "echo why >&2; exit 7"]).expect_status(1).expect_stderr("exit status: 7: why");
    outcome(&["missing"]).expect_status(1).expect_stderr("exit status: 127: init: missing: not found");
    // Dropping a guest removes it.
    assert!(user.has_no_guests(), "a dropped guest was not removed");
}

#[test]
fn a_pool_of_guests_works_in_parallel() {
    let user = User::new();
    let outcome = run(user.example("pool").arg(testbed("busybox.erofs")).arg("3"));
    let expected = "1 squared is 1\n2 squared is 4\n3 squared is 9\n";
    assert_eq!(outcome.expect_status(0).stdout, expected);
    assert!(user.has_no_guests());
}

#[test]
fn stopping_a_guest_from_outside_is_an_error_in_its_program() {
    let user = User::new();
    let mut program = start(user.example("output").arg(testbed("busybox.erofs")).args(["sleep", "1000"]));
    let name = loop {
        let rows = run(user.command("ps").arg("--json"));
        let guests: serde_json::Value = serde_json::from_str(&rows.stdout).expect("no JSON");
        if let Some(name) = guests[0]["name"].as_str().filter(|_| guests[0]["pid"].is_number()) {
            break name.to_owned();
        }
        assert!(program.child.try_wait().unwrap().is_none(), "the program has ended");
    };
    run(user.command("kill").args(["-s", "TERM", &name]))
        .expect_status(2)
        .expect_stderr("belongs to a program");
    run(user.command("stop").arg(&name)).expect_status(0);
    // The program may be starting the guest or running the command.
    program.finish_within(TIMEOUT).expect_status(1).expect_stderr("Error: ");
    assert!(user.has_no_guests());
}

#[test]
fn a_guest_is_paused_resumed_and_outlives_its_program() {
    let user = User::new();
    let mut program = user.example("detach");
    let outcome = run(program.arg(testbed("busybox.erofs")).arg("left"));
    outcome.expect_status(0).expect_stdout("paused: true\npaused: false, then exit status: 0\n");
    let kindling = |words: &[&str]| run(user.command(words[0]).args(&words[1..]));
    kindling(&["exec", "left", "ls", "/tmp"]).expect_status(0).expect_stdout("left\n");
    kindling(&["ps"]).expect_status(0).expect_stdout("running");
    let used = kindling(&["stats", "left"]);
    used.expect_status(0).expect_stdout("MiB");
    kindling(&["stop", "left"]).expect_status(0);
    kindling(&["ps", "-a"]).expect_status(0).expect_stdout("exited 0");
    kindling(&["wait", "left"]).expect_status(0);
    kindling(&["rm", "left"]).expect_status(0);
    assert!(user.has_no_guests());
}

#[test]
fn files_are_copied_into_and_out_of_a_guest() {
    let user = User::new();
    let [from, to] = ["words", "sorted"].map(|name| user.folder().join(name));
    std::fs::write(&from, "two\none\nthree\n").unwrap();
    let files = run(user.example("files").arg(testbed("busybox.erofs")).args([&from, &to]));
    files.expect_status(0).expect_stdout("ended by itself: true");
    assert_eq!(std::fs::read_to_string(&to).unwrap(), "one\nthree\ntwo\n");
    assert!(user.has_no_guests());
}

#[test]
fn a_guest_that_cannot_start_is_a_specific_error_and_leaves_nothing() {
    let user = User::new();
    let refused = |image: &str, expected: &str| {
        run(user.example("output").args([image, "true"])).expect_status(1).expect_stderr(expected);
    };
    refused("/nonexistent.erofs", "Refused");
    let mut elsewhere = user.example("output");
    elsewhere.env("KINDLING_PROGRAMS", user.folder()).arg(testbed("busybox.erofs")).arg("true");
    run(&mut elsewhere).expect_status(1).expect_stderr("NoMonitor");
    let mut kernel = user.example("output");
    kernel.env("KINDLING_IMAGE", "/nonexistent").arg(testbed("busybox.erofs")).arg("true");
    run(&mut kernel).expect_status(1).expect_stderr("NoKernelAt");
    assert!(user.has_no_guests());
}

#[test]
fn copies_of_a_template_have_its_files_and_random_numbers_of_their_own() {
    let user = User::new();
    let copies = tests::rounds(8);
    let mut program = user.example("template");
    program.env("XDG_CACHE_HOME", user.folder().join("cache"));
    let outcome = run(program.arg(testbed("busybox.erofs")).args(["t", &copies.to_string()]));
    let lines: Vec<_> = outcome.expect_status(0).stdout.lines().collect();
    assert_eq!(lines.len(), 3 * copies as usize, "{outcome}");
    for (number, what) in ["state", "urandom", "uuid"].into_iter().enumerate() {
        let mut values: Vec<_> = lines.iter().skip(number).step_by(3).collect();
        values.sort_unstable();
        values.dedup();
        assert_eq!(values.len(), if number == 0 { 1 } else { copies as usize }, "{what}: {values:?}");
    }
    assert!(user.has_no_guests());
    assert!(!user.folder().join("data/kindling/templates/t").exists());
}
