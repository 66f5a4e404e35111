//! System calls that fail, each of a run: the run says so or does without, and nothing is left.

use tests::faults::each_call_fails;
use tests::user::User;

/// The guests' folders that are left of a user.
fn left_of(user: &User) -> Option<String> {
    let entries = std::fs::read_dir(user.folder().join("kindling")).unwrap();
    let names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
    for name in &names {
        let _ = std::fs::remove_dir_all(user.folder().join("kindling").join(name));
    }
    (!names.is_empty()).then(|| format!("left: {names:?}"))
}

/// What is left of a run with this status. What cannot be removed stays: it is no guest any more if its name has a dot.
fn unexpected(user: &User, status: Option<i32>) -> Option<String> {
    left_of(user).filter(|left| status != Some(0) || !left.starts_with("left: [\"."))
}

#[test]
fn a_run_whose_system_calls_fail_says_so_and_leaves_nothing() {
    let user = User::new();
    // The first run pre-boots the kernel.
    assert!(user.shell("true").output().unwrap().status.success());
    each_call_fails(|| user.shell("echo done"), |status| unexpected(&user, status));
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
    each_call_fails(command, |status| unexpected(&user, status));
}
