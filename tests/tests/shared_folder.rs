//! A folder of the host in a guest (`kindling run -v /HOST:/GUEST`): what programs do there is as on a disk, and nothing
//! outside of it can be reached.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};
use tests::user::User;
use tests::{Outcome, kill, run, testbed};

/// A folder that is shared.
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
fn programs_find_a_disk() {
    let shared = Shared::new();
    fs::copy(testbed("folder-guest"), shared.path().join("folder-guest")).unwrap();
    let outcome = shared.shell("/shared/folder-guest /shared 1000");
    outcome.expect_status(0);
    assert_eq!(outcome.stdout.lines().count(), 16, "{outcome}");
    // As another user the folder is that one's.
    let outcome =
        run(shared.command(&["-u", "1000:100"], "").args(["/shared/folder-guest", "/shared", "1000"]));
    outcome.expect_status(0);
    assert_eq!(fs::read_dir(shared.path()).unwrap().count(), 1);
}

#[test]
fn what_one_writes_the_other_reads() {
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
    assert!(shared.user.is_tidy());
}

#[test]
fn a_directory_may_be_large() {
    let shared = Shared::new();
    for number in 0..3_000 {
        fs::File::create(shared.path().join(format!("a file with the number {number}"))).unwrap();
    }
    let outcome = shared.shell("cd /shared; ls | sort -u | wc -l; rm *9; ls | wc -l");
    assert_eq!(outcome.expect_status(0).stdout, "3000\n2700\n", "{outcome}");
    assert_eq!(fs::read_dir(shared.path()).unwrap().count(), 2_700);
}

#[test]
fn what_changes_on_the_host_is_seen() {
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

/// A file that becomes longer is whole for whoever opens it next, however soon.
#[test]
fn a_file_that_is_opened_has_its_length() {
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
        // Into the same file, and as editors do it.
        let name = if length % 2 == 0 { "file" } else { "new" };
        fs::write(shared.path().join(name), "0".repeat(length + 1)).unwrap();
        fs::rename(shared.path().join(name), shared.path().join("file")).unwrap();
        input.write_all(b"\n").unwrap();
    }
    drop(input);
    assert!(child.wait().unwrap().success());
}

/// A program of a guest, another guest, and the host exclude each other, and wait for each other.
#[test]
fn locks_hold_between_guests_and_the_host() {
    let shared = Shared::new();
    let file = fs::File::create(shared.path().join("lock")).unwrap();
    file.lock().unwrap();
    // One that does not wait, and one that does, while another request of its guest is served.
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
    // What a guest has locked is free when it ends.
    child.kill().unwrap();
    child.wait().unwrap();
    file.lock().unwrap();
}

#[test]
fn nothing_leads_out() {
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
    // A link leads to where it would lead in the guest.
    assert!(outcome.stdout.contains("no program"), "{outcome}");
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
}

/// The second guard: the server has what is moved open, as the guest has, and the host's kernel does not let it in.
#[test]
#[expect(clippy::print_stdout, reason = "what is not tested is said")]
fn what_was_moved_away_is_out_of_reach() {
    if !has_landlock() {
        println!("this host has no Landlock");
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

/// Whether the host's kernel confines a process that may also move files.
fn has_landlock() -> bool {
    use landlock::{AccessFs, CompatLevel, Compatible, Ruleset, RulesetAttr};
    Ruleset::default().set_compatibility(CompatLevel::HardRequirement).handle_access(AccessFs::Refer).is_ok()
}

#[test]
fn a_folder_that_is_only_read_stays_as_it_is() {
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
fn a_server_that_is_killed_is_an_error() {
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
fn a_server_ends_with_its_guest() {
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

/// The process that serves the folder of a guest, once there is one.
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

/// What a process does, if it is there.
fn state_of(process: u32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    stat.rsplit(") ").next()?.chars().next()
}

#[test]
fn a_kernel_that_was_booted_before_goes_on_with_any_folder() {
    for _ in 0..2 {
        let shared = Shared::new();
        fs::write(shared.path().join("file"), "its own").unwrap();
        let outcome = run(shared.command(&["--report"], "").args(["cat", "/shared/file"]));
        assert_eq!(outcome.expect_status(0).stdout, "its own");
        outcome.expect_stderr("pre-booted kernel loaded");
    }
}

#[test]
fn several_folders_and_folders_in_folders() {
    let (one, two) = (Shared::new(), tempfile::tempdir().unwrap());
    fs::create_dir(one.path().join("inner")).unwrap();
    fs::write(two.path().join("file"), "two").unwrap();
    let options = ["-v", &format!("{}:/shared/inner:ro", two.path().display())];
    let outcome =
        run(one.command(&options, "").args(["sh", "-c", "cat /shared/inner/file; echo x > /shared/file"]));
    assert_eq!(outcome.expect_status(0).stdout, "two");
    assert!(one.path().join("file").exists());
    // A path from where the caller is.
    let mut relative = one.user.run(&["-v", ".:/x"]);
    let outcome = run(relative.current_dir(two.path()).args(["ls", "/x"]));
    assert_eq!(outcome.expect_status(0).stdout, "file\n");
}

/// A share of the host's root: nothing in it is an interface of the host's kernel.
#[test]
fn what_is_mounted_below_a_folder_is_not_shared() {
    let user = User::new();
    let script = "cd /host; ls -d proc/; ls -A proc; \
                  cat proc/self/mem || echo x > proc/self/oom_score_adj || mkdir proc/new || echo closed";
    let outcome = run(user.run(&["-v", "/:/host"]).args(["sh", "-c", script]));
    assert_eq!(outcome.expect_status(0).stdout, "proc/\nclosed\n", "{outcome}");
    // Another filesystem has a folder of its own, in the directory that stands for it.
    let outcome = run(user
        .run(&["-v", "/:/host", "-v", &format!("{}:/host/proc", user.folder().display())])
        .args(["ls", "/host/proc"]));
    assert!(outcome.expect_status(0).stdout.contains("kindling"), "{outcome}");
}

#[test]
fn folders_that_cannot_be_shared_are_named() {
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
        assert!(shared.user.is_tidy());
    }
    let outcome = run(shared.user.run(&["-v", "/proc/self:/x"]).arg("true"));
    outcome.expect_status(2);
    let expected = "the files of the host's proc are interfaces of its kernel";
    assert_eq!(outcome.stderr, format!("kindling: cannot share /proc/self: {expected}\n"));
}
