//! Fault injection: commands whose system calls fail, one in each run, report an error or succeed without the call, and
//! leave nothing behind.

use std::path::Path;
use std::process::Stdio;
use tests::faults::each_call_fails;
use tests::user::User;
use tests::{run, testbed};

/// The remaining guest folders of a user, which are removed.
fn remaining_folders(user: &User) -> Option<String> {
    let entries = std::fs::read_dir(user.folder().join("kindling")).unwrap();
    let names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
    for name in &names {
        let _ = std::fs::remove_dir_all(user.folder().join("kindling").join(name));
    }
    (!names.is_empty()).then(|| format!("left: {names:?}"))
}

/// The guest folders that a run with this exit status should have removed. A folder whose name starts with a dot is not a
/// guest any more; it may remain after a run that could not remove it and was successful otherwise.
fn unexpected_folders(user: &User, status: Option<i32>) -> Option<String> {
    remaining_folders(user).filter(|left| status != Some(0) || !left.starts_with("left: [\"."))
}

#[test]
fn a_run_whose_system_calls_fail_says_so_and_leaves_nothing() {
    let user = User::new();
    // The first run pre-boots the kernel.
    assert!(user.shell("true").output().unwrap().status.success());
    each_call_fails(|| user.shell("echo done"), |status| unexpected_folders(&user, status));
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
    each_call_fails(command, |status| unexpected_folders(&user, status));
}

#[test]
fn a_boot_whose_system_calls_fail_says_so() {
    let command = || {
        let mut boot = tests::boot();
        boot.args(["--", "/bin/echo", "done"]);
        boot
    };
    each_call_fails(command, |_| None);
}

#[test]
fn commands_for_a_guest_whose_system_calls_fail_say_so_and_do_not_harm_it() {
    let user = User::new();
    let mut guest = user.run(&["-d", "--name", "guest"]);
    run(guest.args(["sh", "-c", "echo logged; sleep 100000"])).expect_status(0);
    let source = user.folder().join("source");
    std::fs::write(&source, "copied").unwrap();
    let works = |_| {
        let outcome = run(user.command("exec").args(["guest", "echo", "works"]));
        (outcome.stdout != "works\n").then(|| format!("the guest is broken: {outcome}"))
    };
    let exec = || {
        let mut exec = user.command("exec");
        exec.args(["guest", "sh", "-c", "echo done; echo error >&2"]).stdin(Stdio::null());
        exec
    };
    each_call_fails(exec, works);
    let copy = || {
        let mut copy = user.command("cp");
        copy.arg(&source).arg("guest:/tmp/copy");
        copy
    };
    each_call_fails(copy, works);
    for [name, argument] in [["ps", "-a"], ["logs", "guest"]] {
        let command = || {
            let mut command = user.command(name);
            command.arg(argument);
            command
        };
        each_call_fails(command, works);
    }
    run(user.command("rm").args(["--force", "guest"])).expect_status(0);
}

/// The files below a directory, with their paths in it.
fn files_below(directory: &Path) -> Vec<String> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(files_below(&path));
        } else {
            files.push(path.display().to_string());
        }
    }
    files
}

/// The first run with a kernel pre-boots it, which is a boot in a process of its own. If that fails, the guest boots.
#[test]
fn a_first_run_whose_system_calls_fail_leaves_no_half_made_kernel() {
    let user = User::new();
    let cache = user.folder().join("cache");
    let in_cache = |script: &str| {
        let mut run = user.shell(script);
        run.env("XDG_CACHE_HOME", &cache);
        run
    };
    let first_run = || {
        let _ = std::fs::remove_dir_all(&cache);
        in_cache("echo done")
    };
    each_call_fails(first_run, |status| {
        let drafts: Vec<_> =
            files_below(&cache).into_iter().filter(|path| path.contains(".draft-")).collect();
        let again = run(&mut in_cache("echo again"));
        let works = again.status == Some(0) && again.stdout == "again\n" && again.stderr.is_empty();
        let left = (!drafts.is_empty()).then(|| format!("left: {drafts:?}"));
        left.or_else(|| (!works).then(|| format!("the cache is broken: {again}")))
            .or_else(|| unexpected_folders(&user, status))
    });
}

#[test]
fn a_run_with_a_new_volume_whose_system_calls_fail_leaves_no_half_made_volume() {
    let user = User::new();
    let volumes = user.folder().join("data/kindling/volumes");
    let writes = |text: &str| {
        let mut run = user.run(&["-v", "data:/data"]);
        run.args(["sh", "-c", &format!("echo {text} > /data/{text} && cat /data/{text}")]);
        run
    };
    // The first run pre-boots the kernel.
    run(&mut writes("first")).expect_status(0);
    run(user.command("volume").args(["rm", "data"])).expect_status(0);
    each_call_fails(
        || writes("done"),
        |status| {
            let left = unexpected_folders(&user, status);
            let again = run(&mut writes("again"));
            let works = again.status == Some(0) && again.stdout == "again\n" && again.stderr.is_empty();
            run(user.command("volume").args(["rm", "data"])).expect_status(0);
            let files = files_below(&volumes);
            left.or_else(|| (!works).then(|| format!("the volume is broken: {again}")))
                .or_else(|| (!files.is_empty()).then(|| format!("left: {files:?}")))
        },
    );
}

#[test]
fn a_program_with_a_guest_whose_system_calls_fail_says_so_and_leaves_nothing() {
    let user = User::new();
    let [words, sorted] = ["words", "sorted"].map(|name| user.folder().join(name));
    std::fs::write(&words, "b\na\n").unwrap();
    let program = || {
        let _ = std::fs::remove_file(&sorted);
        let mut program = user.example("files");
        program.arg(testbed("busybox.erofs")).args([&words, &sorted]);
        program
    };
    // The first start pre-boots the kernel.
    run(&mut program()).expect_status(0);
    each_call_fails(program, |status| {
        // A file that could not be copied whole is not there.
        let copied = std::fs::read_to_string(&sorted).unwrap_or_else(|_| "a\nb\n".to_owned());
        let left = (copied != "a\nb\n").then(|| format!("left: a file with {copied:?}"));
        left.or_else(|| unexpected_folders(&user, status))
    });
}
