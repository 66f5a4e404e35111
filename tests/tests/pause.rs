//! `kindling pause` and `resume`, and what they mean for other commands.

use std::fs;
use std::os::unix::net::UnixStream;
use tests::guest_console::GuestConsole;
use tests::spare::wait_for;
use tests::user::User;
use tests::{Outcome, TIMEOUT, processes, run, start};

/// A shell that computes, and ends with status 3 when it is requested to.
const COMPUTE: &str = "trap 'echo bye; exit 3' TERM; echo ready; while :; do i=$((i+1)); done";

/// A user with a guest in the foreground that computes.
fn computing(user: &User, options: &[&str]) -> GuestConsole {
    let options = [&["--name", "one"], options].concat();
    let mut guest = GuestConsole::start(user.run(&options).args(["sh", "-c", COMPUTE]));
    guest.expect("ready");
    guest
}

fn on_guest(user: &User, command: &str, name: &str) -> Outcome {
    run(user.command(command).arg(name))
}

/// The states of the threads of all vCPUs (`State` in proc_pid_status(5)), in this lab, which has one guest.
fn vcpu_states() -> Vec<char> {
    let [monitor] = processes("kindling-vmm")[..] else { panic!("there is not one guest") };
    let tasks = fs::read_dir(format!("/proc/{monitor}/task")).unwrap();
    let status = tasks.map(|task| fs::read_to_string(task.unwrap().path().join("status")).unwrap());
    let state = |status: String| {
        let is_vcpu = status.starts_with("Name:\tvcpu");
        is_vcpu.then(|| status.split("State:\t").nth(1).unwrap().chars().next().unwrap())
    };
    status.filter_map(state).collect()
}

fn state_in_list(user: &User) -> String {
    let list = run(&mut user.command("ps")).stdout;
    let row = list.lines().find(|line| line.starts_with("one")).unwrap_or_default();
    let state = row.split_whitespace().find(|word| ["running", "paused"].contains(word));
    state.unwrap_or_default().to_owned()
}

#[test]
fn a_paused_guest_runs_no_instruction_until_it_is_resumed() {
    for options in [&["--cpus", "1"][..], &["--cpus", "2", "--jail", "full"], &["--jail", "off"]] {
        let user = User::new();
        let mut guest = computing(&user, options);
        wait_for("no vCPU runs", || vcpu_states().contains(&'R').then_some(()));
        for _ in 0..2 {
            let outcome = on_guest(&user, "pause", "one");
            assert_eq!(outcome.expect_status(0).stdout, "one\n", "{outcome}");
            assert!(vcpu_states().iter().all(|&state| state == 'S'), "{:?}", vcpu_states());
            assert_eq!(state_in_list(&user), "paused");
        }
        let inspected = on_guest(&user, "inspect", "one").stdout;
        assert!(inspected.contains("\"state\": \"paused\""), "{inspected}");
        for _ in 0..2 {
            assert_eq!(on_guest(&user, "resume", "one").expect_status(0).stdout, "one\n");
            assert_eq!(state_in_list(&user), "running");
        }
        wait_for("no vCPU runs", || vcpu_states().contains(&'R').then_some(()));
        let exec = run(user.command("exec").args(["one", "echo", "runs"]));
        assert_eq!(exec.expect_status(0).stdout, "runs\n");
        on_guest(&user, "stop", "one").expect_status(0);
        guest.expect("bye");
        guest.expect_status(3);
        assert!(user.has_no_guests());
    }
}

#[test]
fn commands_that_need_a_response_name_the_pause() {
    let user = User::new();
    let mut guest = computing(&user, &[]);
    on_guest(&user, "pause", "one").expect_status(0);
    let message = "the guest one is paused; `kindling resume one` lets it continue";
    run(user.command("exec").args(["one", "true"])).expect_status(2).expect_stderr(message);
    run(user.command("cp").args(["one:/etc", "/tmp"])).expect_status(2).expect_stderr(message);
    // What the host knows is there all the same.
    run(user.command("stats").arg("one")).expect_stdout("one");
    // A guest that is requested to end continues, to be able to.
    on_guest(&user, "stop", "one").expect_status(0);
    guest.expect("bye");
    guest.expect_status(3);
    for command in ["pause", "resume"] {
        on_guest(&user, command, "one").expect_status(2).expect_stderr("no guest named one");
    }
}

#[test]
fn a_paused_guest_in_the_background_can_be_killed() {
    let user = User::new();
    run(user.run(&["-d", "--name", "one"]).args(["sh", "-c", COMPUTE])).expect_status(0);
    on_guest(&user, "pause", "one").expect_status(0);
    on_guest(&user, "kill", "one").expect_status(0);
    wait_for("the monitor runs", || processes("kindling-vmm").is_empty().then_some(()));
    for command in ["pause", "resume"] {
        on_guest(&user, command, "one").expect_status(2).expect_stderr("the guest one has ended");
    }
    run(user.command("ps").arg("-a")).expect_stdout("exited 137");
    on_guest(&user, "rm", "one").expect_status(0);
    assert!(user.has_no_guests());
}

/// Several programs request at the same time, and others connect and say nothing, or what is no request.
#[test]
fn requests_are_served_beside_each_other() {
    let user = User::new();
    let guest = computing(&user, &[]);
    let socket = user.folder().join("kindling/one/requests");
    assert!(socket.exists(), "{}", socket.display());
    // A stream socket cannot connect to it.
    assert!(UnixStream::connect(&socket).is_err());
    for _ in 0..10 {
        let asked: Vec<_> = (0..6)
            .map(|number| start(user.command(if number % 2 == 0 { "pause" } else { "resume" }).arg("one")))
            .collect();
        for asked in asked {
            asked.finish_within(TIMEOUT).expect_status(0);
        }
    }
    on_guest(&user, "resume", "one").expect_status(0);
    wait_for("no vCPU runs", || vcpu_states().contains(&'R').then_some(()));
    on_guest(&user, "stop", "one").expect_status(0);
    guest.expect_status(3);
}
