//! System calls that fail, each of a run: the run says so or does without, and nothing is left.

use std::collections::HashMap;
use std::process::Command;
use tests::faults::{Fault, Kind, trace};
use tests::user::User;

/// Number of calls that fail, spread over a run; more by the environment variable of `tests::rounds`.
const FAULTS: u32 = 24;
/// Maximum number of calls of a kind that fail: the same code executes most of the others.
const OF_A_KIND: usize = 3;

/// The calls of a run that can fail.
fn faults(calls: Vec<Kind>) -> Vec<Fault> {
    let mut counts: HashMap<Kind, usize> = HashMap::new();
    let mut faults = Vec::new();
    for kind in calls.into_iter().filter(|kind| kind.error().is_some()) {
        let count = counts.entry(kind.clone()).or_default();
        if *count < OF_A_KIND {
            faults.push(Fault { kind, after: *count });
        }
        *count += 1;
    }
    faults
}

/// Lets calls of a command fail, one in each run of it, and checks its end. `is_left` names what is left then.
fn each_call_fails(command: impl Fn() -> Command, output: &str, is_left: impl Fn(&Fault) -> Option<String>) {
    let whole = trace(&mut command(), None);
    assert!(whole.is_in_time && whole.outcome.status == Some(0), "{}", whole.outcome);
    assert_eq!(whole.outcome.stdout, output, "{}", whole.outcome);
    let faults = faults(whole.calls);
    let rounds = tests::rounds(FAULTS) as usize;
    let step = faults.len().div_ceil(rounds.min(faults.len()));
    let mut wrong = Vec::new();
    for (number, fault) in faults.iter().enumerate().step_by(step) {
        if number % (step * 20) == 0 {
            tests::print_progress(&format!("call {number} of {}: {fault}", faults.len()));
        }
        let traced = trace(&mut command(), Some(fault));
        let outcome = &traced.outcome;
        let is_whole = outcome.status == Some(0) && outcome.stdout == output;
        let is_reported = matches!(outcome.status, Some(1..=127)) && !outcome.stderr.is_empty();
        // The guest's command got SIGPIPE, because the connection for its output ended.
        let is_reported = is_reported || outcome.status == Some(141);
        let is_panic = outcome.stderr.contains("panicked");
        let mut say = |what: &str| wrong.push(format!("{fault}: {what}; {outcome}"));
        if !traced.is_in_time {
            say("a process did not end");
        } else if !is_whole && !is_reported {
            say("no error");
        } else if is_panic {
            say("panic");
        }
        // What cannot be removed stays. It is no guest any more if its name has a dot.
        if let Some(left) =
            is_left(fault).filter(|left| outcome.status != Some(0) || !left.starts_with("left: [\"."))
        {
            say(&left);
        }
    }
    assert!(wrong.is_empty(), "{} of {} calls:\n{}", wrong.len(), faults.len(), wrong.join("\n"));
}

/// The guests' folders that are left of a user.
fn left_of(user: &User) -> Option<String> {
    let entries = std::fs::read_dir(user.folder().join("kindling")).unwrap();
    let names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
    for name in &names {
        let _ = std::fs::remove_dir_all(user.folder().join("kindling").join(name));
    }
    (!names.is_empty()).then(|| format!("left: {names:?}"))
}

#[test]
fn a_run_whose_system_calls_fail_says_so_and_leaves_nothing() {
    let user = User::new();
    // The first run pre-boots the kernel.
    assert!(user.shell("true").output().unwrap().status.success());
    each_call_fails(|| user.shell("echo done"), "done\n", |_| left_of(&user));
}

#[test]
fn a_run_with_a_folder_whose_system_calls_fail_says_so_and_leaves_nothing() {
    let user = User::new();
    let command = || {
        let mut run = user.run(&["-v", "/tests:/tests:ro"]);
        run.args(["sh", "-c", "ls /tests >/dev/null && echo done"]);
        run
    };
    assert!(command().output().unwrap().status.success());
    each_call_fails(command, "done\n", |_| left_of(&user));
}
