//! Shared folders (`kindling run -v /HOST:/GUEST`): file operations behave as on a local disk, and nothing outside of
//! the folder is accessible.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};
use tests::user::User;
use tests::{Outcome, kill, run, testbed};

/// A shared folder.
struct Shared {
    user: User,
    folder: tempfile::TempDir,
}

impl Shared {
    fn new() -> Self {
        Self { user: User::new(), folder: tempfile::tempdir().unwrap() }
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn command(&self, options: &[&str], mode: &str) -> Command {
        let volume = format!("{}:/shared{mode}", self.path().display());
        let options = [&["-v", &volume], options].concat();
        self.user.run(&options)
    }

    /// Runs a shell script in a guest that has the folder as /shared.
    fn shell(&self, script: &str) -> Outcome {
        run(self.command(&[], "").args(["sh", "-c", script]))
    }
}

#[test]
fn file_operations_in_a_shared_folder_behave_as_on_a_disk() {
    let shared = Shared::new();
    fs::copy(testbed("folder-guest"), shared.path().join("folder-guest")).unwrap();
    let outcome = shared.shell("/shared/folder-guest /shared 1000");
    outcome.expect_status(0);
    assert_eq!(outcome.stdout.lines().count(), 16, "{outcome}");
    // For another user of the guest, the files belong to that user.
    let outcome =
        run(shared.command(&["-u", "1000:100"], "").args(["/shared/folder-guest", "/shared", "1000"]));
    outcome.expect_status(0);
    assert_eq!(fs::read_dir(shared.path()).unwrap().count(), 1);
}

#[test]
fn guest_and_host_read_each_others_files() {
    let shared = Shared::new();
    fs::write(shared.path().join("from host"), "hello").unwrap();
    fs::set_permissions(shared.path().join("from host"), fs::Permissions::from_mode(0o600)).unwrap();
    let outcome = shared.shell(
        "cd /shared; cat 'from host'; stat -c ' %a %u:%g %s' 'from host'; umask 027; echo back > new; mkdir -p a/b; \
         mv new a/b/c; ln -s ../x a/link; grep shared /proc/mounts",
    );
    outcome.expect_status(0);
    let mount = "folder0 /shared virtiofs rw,nosuid,nodev,relatime 0 0";
    assert_eq!(outcome.stdout, format!("hello 600 0:0 5\n{mount}\n"), "{outcome}");
    let file = shared.path().join("a/b/c");
    assert_eq!(fs::read_to_string(&file).unwrap(), "back\n");
    assert_eq!(fs::metadata(&file).unwrap().mode() & 0o7777, 0o640);
    assert_eq!(fs::read_link(shared.path().join("a/link")).unwrap(), Path::new("../x"));
    assert!(shared.user.has_no_guests());
}

#[test]
fn a_directory_can_have_thousands_of_entries() {
    let shared = Shared::new();
    for number in 0..3_000 {
        fs::File::create(shared.path().join(format!("a file with the number {number}"))).unwrap();
    }
    let outcome = shared.shell("cd /shared; ls | sort -u | wc -l; rm *9; ls | wc -l");
    assert_eq!(outcome.expect_status(0).stdout, "3000\n2700\n", "{outcome}");
    assert_eq!(fs::read_dir(shared.path()).unwrap().count(), 2_700);
}

#[test]
fn changes_on_the_host_are_visible_in_the_guest() {
    let shared = Shared::new();
    let file = shared.path().join("file");
    fs::write(&file, "old").unwrap();
    let script = "cat /shared/file; echo; ls /shared; \
                  until [ -e /shared/next ]; do usleep 20000; done; cat /shared/file; \
                  until ! [ -e /shared/gone ]; do usleep 20000; done; echo; \
                  exec 3< /shared/file; until [ \"$(stat -c %s /shared/file)\" = 6 ]; do usleep 20000; done; cat <&3";
    fs::write(shared.path().join("gone"), "").unwrap();
    let mut child =
        shared.command(&[], "").args(["sh", "-c", script]).stdout(Stdio::piped()).spawn().unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let mut line = || {
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        line
    };
    assert_eq!((line(), line(), line()), ("old\n".into(), "file\n".into(), "gone\n".into()));
    fs::write(&file, "new").unwrap();
    fs::write(shared.path().join("next"), "").unwrap();
    fs::remove_file(shared.path().join("gone")).unwrap();
    assert_eq!(line(), "new\n");
    fs::write(&file, "longer").unwrap();
    let mut rest = String::new();
    output.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "longer");
    assert!(child.wait().unwrap().success());
}

/// Opening a file revalidates its length, however recently it was cached.
#[test]
fn opening_a_file_shows_its_current_length() {
    let shared = Shared::new();
    fs::write(shared.path().join("file"), "0").unwrap();
    let mut command = shared.command(&[], "");
    command.args(["sh", "-c", "while cat /shared/file && echo && read line; do :; done"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let (mut input, mut output) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
    for length in 1..20 {
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        assert_eq!(line, "0".repeat(length) + "\n");
        // Alternates between writing in place and replacing the file, as editors do.
        let name = if length % 2 == 0 { "file" } else { "new" };
        fs::write(shared.path().join(name), "0".repeat(length + 1)).unwrap();
        fs::rename(shared.path().join(name), shared.path().join("file")).unwrap();
        input.write_all(b"\n").unwrap();
    }
    drop(input);
    assert!(child.wait().unwrap().success());
}

/// Programs of two guests and of the host exclude each other, and wait for each other.
#[test]
fn flock_works_across_guests_and_the_host() {
    let shared = Shared::new();
    let file = fs::File::create(shared.path().join("lock")).unwrap();
    file.lock().unwrap();
    // A non-blocking and a blocking request; another request of the guest is served during the latter.
    fs::copy(testbed("folder-guest"), shared.path().join("folder-guest")).unwrap();
    let script = "cd /shared; ./folder-guest try-flock lock && echo free; echo ready; \
                  ./folder-guest flock lock </dev/null & touch meanwhile; wait $!; ./folder-guest flock lock";
    let mut command = shared.command(&[], "");
    command.args(["sh", "-c", script]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    wait_for_ready(&mut output);
    file.unlock().unwrap();
    let mut line = || {
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        line
    };
    assert_eq!((line(), line()), ("locked\n".into(), "locked\n".into()));
    assert!(file.try_lock().is_err());
    let other = shared.shell("cd /shared; ls; ./folder-guest try-flock lock; echo $?");
    assert_eq!(other.expect_status(0).stdout, "folder-guest\nlock\nmeanwhile\n1\n", "{other}");
    // Locks of a guest are released when it ends.
    child.kill().unwrap();
    child.wait().unwrap();
    file.lock().unwrap();
}

#[test]
fn links_do_not_lead_out_of_the_folder() {
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("secret"), "secret of the host").unwrap();
    let shared = Shared::new();
    let name = outside.path().file_name().unwrap();
    symlink(outside.path(), shared.path().join("absolute")).unwrap();
    symlink(Path::new("..").join(name), shared.path().join("relative")).unwrap();
    symlink("/proc/self/root", shared.path().join("magic")).unwrap();
    let outcome = shared.shell(
        "cd /shared; cat absolute/secret relative/secret ../../secret; echo x > absolute/new; echo x > relative/new; \
         cat magic/etc/data; ls /shared/..",
    );
    assert!(!outcome.stdout.contains("secret"), "{outcome}");
    // Links are resolved in the guest.
    assert!(outcome.stdout.contains("no program"), "{outcome}");
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
}

/// The second line of defence: the server and the guest have the moved directory open, and Landlock denies access.
#[test]
#[expect(clippy::print_stdout, reason = "skipped tests are reported")]
fn a_directory_moved_out_of_the_folder_is_inaccessible() {
    if !has_landlock() {
        println!("skipped: this host has no Landlock");
        return;
    }
    let (outside, shared) = (tempfile::tempdir().unwrap(), Shared::new());
    fs::create_dir(shared.path().join("inner")).unwrap();
    fs::write(shared.path().join("inner/secret"), "secret").unwrap();
    let mut command = shared.command(&[], "");
    command.args(["sh", "-c", "cd /shared/inner; echo ready; read line; cat secret; echo x > new"]);
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    wait_for_ready(&mut output);
    fs::rename(shared.path().join("inner"), outside.path().join("inner")).unwrap();
    child.stdin.take().unwrap().write_all(b"\n").unwrap();
    let mut rest = String::new();
    output.read_to_string(&mut rest).unwrap();
    let stderr = String::from_utf8_lossy(&child.wait_with_output().unwrap().stderr).into_owned();
    assert_eq!((rest.as_str(), stderr.matches("Permission denied").count()), ("", 2), "{stderr}");
    assert_eq!(fs::read_dir(outside.path().join("inner")).unwrap().count(), 1);
}

/// Whether the host's kernel has Landlock with the right to rename between directories (`Refer`).
fn has_landlock() -> bool {
    use landlock::{AccessFs, CompatLevel, Compatible, Ruleset, RulesetAttr};
    Ruleset::default().set_compatibility(CompatLevel::HardRequirement).handle_access(AccessFs::Refer).is_ok()
}

#[test]
fn a_read_only_folder_cannot_be_changed() {
    let shared = Shared::new();
    fs::write(shared.path().join("file"), "as it is").unwrap();
    let script = "cd /shared; for what in 'echo x > file' 'echo x >> file' 'rm file' 'mv file b' 'mkdir d' 'ln file b' \
                  'ln -s file b' 'chmod 777 file' 'touch file' 'truncate -s 0 file'; do sh -c \"$what\" && echo $what; done; \
                  cat file; mount -o remount,rw /shared; echo; grep -c 'shared virtiofs rw' /proc/mounts; \
                  rm file || echo > file || echo > new || cat file";
    let outcome = run(shared.command(&[], ":ro").args(["sh", "-c", script]));
    assert_eq!(outcome.stdout, "as it is\n1\nas it is", "{outcome}");
    assert_eq!(outcome.stderr.matches("Read-only file system").count(), 13, "{outcome}");
    assert_eq!(fs::read_to_string(shared.path().join("file")).unwrap(), "as it is");
}

#[test]
fn after_its_server_is_killed_a_folder_returns_io_errors() {
    let shared = Shared::new();
    let script =
        "cd /shared; echo ready; read line; ls; cat a; echo x > b; echo $?; cd /; umount /shared; echo gone";
    let mut command = shared.command(&[], "");
    command.args(["sh", "-c", script]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    wait_for_ready(&mut output);
    kill(server_of(child.id()), libc::SIGKILL);
    child.stdin.take().unwrap().write_all(b"\n").unwrap();
    let rest = child.wait_with_output().unwrap();
    let (mut stdout, stderr) = (String::new(), String::from_utf8_lossy(&rest.stderr));
    output.read_to_string(&mut stdout).unwrap();
    assert_eq!((stdout.as_str(), rest.status.code()), ("1\ngone\n", Some(0)), "{stderr}");
    assert_eq!(stderr.matches("Input/output error").count(), 3, "{stderr}");
    assert!(stderr.ends_with("kindling: folder0: its server has ended\n"), "{stderr}");
}

#[test]
fn the_server_exits_with_its_guest() {
    let shared = Shared::new();
    let mut command = shared.command(&[], "");
    let mut child =
        command.args(["sh", "-c", "echo ready; sleep 1000"]).stdout(Stdio::piped()).spawn().unwrap();
    wait_for_ready(&mut BufReader::new(child.stdout.take().unwrap()));
    let server = server_of(child.id());
    child.kill().unwrap();
    child.wait().unwrap();
    while state_of(server).is_some_and(|state| state != 'Z') {
        std::thread::yield_now();
    }
}

fn wait_for_ready(output: &mut impl BufRead) {
    let mut line = String::new();
    output.read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
}

/// Waits for the server process of a guest's folder and returns its PID.
fn server_of(vmm: u32) -> u32 {
    loop {
        for entry in fs::read_dir("/proc").unwrap() {
            let entry = entry.unwrap();
            let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else { continue };
            let parent = format!(") S {vmm} ");
            if stat.contains("(kindling-fs") && stat.contains(&parent) {
                return stat.split(' ').next().unwrap().parse().unwrap();
            }
        }
        std::thread::yield_now();
    }
}

/// The state of a process, if it exists.
fn state_of(process: u32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    stat.rsplit(") ").next()?.chars().next()
}

#[test]
fn guests_from_a_prebooted_kernel_can_share_any_folder() {
    for _ in 0..2 {
        let shared = Shared::new();
        fs::write(shared.path().join("file"), "its own").unwrap();
        let outcome = run(shared.command(&["--report"], "").args(["cat", "/shared/file"]));
        assert_eq!(outcome.expect_status(0).stdout, "its own");
        outcome.expect_stderr("pre-booted kernel loaded");
    }
}

#[test]
fn several_folders_can_be_shared_and_nested() {
    let (one, two) = (Shared::new(), tempfile::tempdir().unwrap());
    fs::create_dir(one.path().join("inner")).unwrap();
    fs::write(two.path().join("file"), "two").unwrap();
    let options = ["-v", &format!("{}:/shared/inner:ro", two.path().display())];
    let outcome =
        run(one.command(&options, "").args(["sh", "-c", "cat /shared/inner/file; echo x > /shared/file"]));
    assert_eq!(outcome.expect_status(0).stdout, "two");
    assert!(one.path().join("file").exists());
    // A path relative to the current directory.
    let mut relative = one.user.run(&["-v", ".:/x"]);
    let outcome = run(relative.current_dir(two.path()).args(["ls", "/x"]));
    assert_eq!(outcome.expect_status(0).stdout, "file\n");
}

/// Sharing the host's root does not expose interfaces of the host's kernel.
#[test]
fn mounts_below_a_shared_folder_are_not_shared() {
    let user = User::new();
    let script = "cd /host; ls -d proc/; ls -A proc; \
                  cat proc/self/mem || echo x > proc/self/oom_score_adj || mkdir proc/new || echo closed";
    let outcome = run(user.run(&["-v", "/:/host"]).args(["sh", "-c", script]));
    assert_eq!(outcome.expect_status(0).stdout, "proc/\nclosed\n", "{outcome}");
    // Another folder can be mounted over the empty directory of a mount.
    let outcome = run(user
        .run(&["-v", "/:/host", "-v", &format!("{}:/host/proc", user.folder().display())])
        .args(["ls", "/host/proc"]));
    assert!(outcome.expect_status(0).stdout.contains("kindling"), "{outcome}");
}

#[test]
fn an_error_names_the_folder_that_cannot_be_shared() {
    let shared = Shared::new();
    fs::write(shared.path().join("file"), "").unwrap();
    for (name, expected) in [
        ("none", "no such folder"),
        ("file", "not a folder; share the folder that contains it"),
        ("file/x", "a part of the path is not a folder"),
    ] {
        let path = shared.path().join(name);
        let outcome = run(shared.user.run(&["-v", &format!("{}:/x", path.display())]).arg("true"));
        outcome.expect_status(2);
        assert_eq!(outcome.stderr, format!("kindling: cannot share {}: {expected}\n", path.display()));
        assert!(shared.user.has_no_guests());
    }
    let outcome = run(shared.user.run(&["-v", "/proc/self:/x"]).arg("true"));
    outcome.expect_status(2);
    let expected = "the files of the host's proc are interfaces of its kernel";
    assert_eq!(outcome.stderr, format!("kindling: cannot share /proc/self: {expected}\n"));
}
