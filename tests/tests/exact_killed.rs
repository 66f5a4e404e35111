//! A process of a run is killed at any moment: the other processes end, with an exit status and a reason, and leave nothing
//! behind.

use std::io::Read;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};
use tests::user::User;
use tests::{TIMEOUT, processes};

/// Default number of moments at which a process is killed, evenly spread over a run; `tests::rounds` overrides it.
const DEFAULT_MOMENTS: u32 = 30;
/// Upper bound of the time of a run in the exact lab.
const RUN_TIME: Duration = Duration::from_millis(40);

/// Waits until all monitors and helper programs have ended.
fn wait_for_all() {
    let start = Instant::now();
    while ["kindling-vmm", "kindling-fs", "kindling-oci"].iter().any(|name| !processes(name).is_empty()) {
        assert!(start.elapsed() < TIMEOUT, "a process is left");
        std::thread::yield_now();
    }
}

/// Waits for a process. Returns its exit status, standard output and standard error.
fn wait_for(mut child: Child) -> (Option<i32>, String, String) {
    let (mut out, mut err) = (String::new(), String::new());
    child.stdout.take().unwrap().read_to_string(&mut out).unwrap();
    child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
    (child.wait().unwrap().code(), out, err)
}

fn start(user: &User) -> Child {
    let mut run = user.run(&["-v", "/tests:/tests:ro"]);
    run.args(["sh", "-c", "echo begun; cat /tests/* >/dev/null; echo done"]);
    run.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Runs guests, and calls `kill` at a different moment of each run. `check` receives the outcome of the run.
fn at_each_moment(kill: fn(&Child), check: fn(&User, (Option<i32>, String, String))) {
    let user = User::new();
    // The first run pre-boots the kernel.
    assert_eq!(wait_for(start(&user)).0, Some(0));
    let moments = tests::rounds(DEFAULT_MOMENTS);
    for moment in 0..moments {
        let begun = Instant::now();
        let child = start(&user);
        std::thread::sleep((RUN_TIME * moment / moments).saturating_sub(begun.elapsed()));
        kill(&child);
        check(&user, wait_for(child));
        wait_for_all();
        if moment % 20 == 0 {
            tests::print_progress(&format!("moment {moment} of {moments}"));
        }
    }
}

/// The remaining guest folders of a user.
fn remaining_folders(user: &User) -> Vec<std::ffi::OsString> {
    let entries = std::fs::read_dir(user.folder().join("kindling")).unwrap();
    entries.map(|entry| entry.unwrap().file_name()).collect()
}

#[test]
fn a_monitor_that_is_killed_ends_its_run_with_a_reason() {
    at_each_moment(
        |_| processes("kindling-vmm").into_iter().for_each(|id| tests::kill(id, libc::SIGKILL)),
        |user, (status, out, err)| {
            let is_whole = status == Some(0) && out == "begun\ndone\n" && err.is_empty();
            let is_reported = status == Some(125) && err.lines().count() == 1 && err.contains("kindling-vmm");
            assert!(is_whole || is_reported, "{status:?}, {out:?}, {err:?}");
            assert_eq!(remaining_folders(user), [""; 0]);
        },
    );
}

#[test]
fn a_front_that_is_killed_leaves_no_process() {
    at_each_moment(
        |front| tests::kill(front.id(), libc::SIGKILL),
        |user, _| {
            wait_for_all();
            // A folder that was being created or removed goes when guests are listed.
            assert!(user.command("ps").output().unwrap().status.success());
            // The guest's folder remains, and the guest is listed as dead, until `kindling rm` removes it.
            for name in remaining_folders(user) {
                let removed = user.command("rm").arg(&name).output().unwrap();
                assert!(removed.status.success(), "{}", String::from_utf8_lossy(&removed.stderr));
            }
            assert_eq!(remaining_folders(user), [""; 0]);
        },
    );
}

#[test]
fn a_file_server_that_is_killed_fails_its_folder_only() {
    at_each_moment(
        |_| processes("kindling-fs").into_iter().for_each(|id| tests::kill(id, libc::SIGKILL)),
        |user, (status, _, err)| {
            assert!(matches!(status, Some(0 | 1 | 125)), "{status:?}, {err:?}");
            assert_eq!(remaining_folders(user), [""; 0]);
        },
    );
    assert!(Path::new("/tests").is_dir());
}
