//! `kindling-jailer`: Firecracker's jailer's command line, for `kindling boot`.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;
use tests::guest_console::{GuestConsole, PREAMBLE};
use tests::{Outcome, TIMEOUT, run, testbed};

const USER: u32 = 4321;
const GROUP: u32 = 4322;

/// A directory for root directories, with the files of a machine in one of them.
struct Base(tempfile::TempDir);

impl Base {
    fn new() -> Self {
        let base = Self(tempfile::tempdir().unwrap());
        fs::create_dir_all(base.root("one").join("image")).unwrap();
        for entry in fs::read_dir(testbed("images/busybox")).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), base.root("one").join("image").join(entry.file_name())).unwrap();
        }
        base
    }

    fn root(&self, id: &str) -> PathBuf {
        self.0.path().join("kindling").join(id).join("root")
    }

    /// A jailer for `kindling`.
    fn jailer(&self, options: &[&str]) -> Command {
        let mut command = Command::new(testbed("kindling-jailer"));
        command.arg("--exec-file").arg(testbed("kindling")).arg("--chroot-base-dir").arg(self.0.path());
        command.args(["--uid", &USER.to_string(), "--gid", &GROUP.to_string()]).args(options);
        command
    }

    /// The names in a root directory.
    fn left(&self, id: &str) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(self.root(id))
            .into_iter()
            .flatten()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

/// Starts a guest that waits for a line; it ends with status 7 then.
fn waiting(base: &Base, options: &[&str]) -> GuestConsole {
    let script = format!("{PREAMBLE} echo ready; wait_line; exit 7");
    let mut jailer = base.jailer(options);
    jailer.args(["--", "--image", "/image", "--memory", "64", "--", "/bin/sh", "-c", &script]);
    let mut guest = GuestConsole::start(&mut jailer);
    guest.expect("ready");
    guest
}

fn field(process: &Path, name: &str) -> String {
    let text = fs::read_to_string(process.join("status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(&format!("{name}:"))).expect("no such field");
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The process of the program.
fn program(base: &Base) -> PathBuf {
    let pid = fs::read_to_string(base.root("one").join("kindling.pid")).unwrap();
    Path::new("/proc").join(pid)
}

#[test]
fn a_machine_in_a_jail_has_nothing_but_its_directory_and_leaves_nothing() {
    let base = Base::new();
    let limits =
        ["--cgroup", "memory.max=300M", "--cgroup", "pids.max=50", "--parent-cgroup", "machines/small"];
    let resources = ["--resource-limit", "no-file=300", "--resource-limit", "fsize=5000000"];
    let mut guest = waiting(&base, &[&["--id", "one"], &limits[..], &resources[..]].concat());
    let process = program(&base);
    let ids = |id: u32| [id.to_string().as_str(); 4].join(" ");
    assert_eq!([field(&process, "Uid"), field(&process, "Gid")], [ids(USER), ids(GROUP)]);
    for (name, value) in [
        ("Groups", ""),
        ("NoNewPrivs", "1"),
        ("CapPrm", "0000000000000000"),
        ("CapEff", "0000000000000000"),
        ("CapInh", "0000000000000000"),
        ("CapAmb", "0000000000000000"),
    ] {
        assert_eq!(field(&process, name), value, "{name}");
    }
    let root = fs::metadata(process.join("root/.")).unwrap();
    let expected = fs::metadata(base.root("one")).unwrap();
    assert_eq!((root.dev(), root.ino(), root.uid()), (expected.dev(), expected.ino(), USER));
    // The program is not there.
    assert_eq!(base.left("one"), ["dev", "image", "kindling.pid"]);
    for namespace in ["ipc", "uts", "cgroup"] {
        let of = |process: &Path| fs::read_link(process.join("ns").join(namespace)).unwrap();
        assert_ne!(of(&process), of(Path::new("/proc/self")), "{namespace}");
    }
    let limits = fs::read_to_string(process.join("limits")).unwrap();
    for (name, value) in
        [("Max open files", "300"), ("Max file size", "5000000"), ("Max core file size", "0")]
    {
        let line = limits.lines().find(|line| line.starts_with(name)).unwrap();
        assert_eq!(line[name.len()..].split_whitespace().next(), Some(value), "{name}");
    }
    assert_eq!(fs::read(process.join("environ")).unwrap(), b"");
    for descriptor in fs::read_dir(process.join("fd")).unwrap() {
        let target = fs::read_link(descriptor.unwrap().path()).unwrap();
        assert!(!target.is_dir(), "a descriptor of the directory {}", target.display());
    }
    let cgroup = Path::new("/sys/fs/cgroup/machines/small/one");
    let file = |name: &str| fs::read_to_string(cgroup.join(name)).unwrap().trim().to_owned();
    assert_eq!((file("memory.max"), file("pids.max")), ((300 << 20).to_string(), "50".to_owned()));
    assert_eq!(file("cgroup.procs"), process.file_name().unwrap().to_str().unwrap());
    // A second one with the same name.
    run(base.jailer(&["--id", "one"]).args(["--", "--help"]))
        .expect_status(2)
        .expect_stderr("another program runs with this --id");
    guest.send_line();
    guest.expect_status(7);
    assert_eq!(base.left("one"), ["image"]);
    assert!(!Path::new("/sys/fs/cgroup/machines").exists());
}

#[test]
fn a_signal_reaches_the_program_and_its_end_is_reported() {
    let base = Base::new();
    let guest = waiting(&base, &["--id", "one"]);
    guest.signal(libc::SIGTERM);
    guest.expect_end(&format!("exit status: {}", 128 + libc::SIGTERM));
    assert_eq!(base.left("one"), ["image"]);
    // Without files of the user, no directory is left either.
    let outcome = run(base.jailer(&["--id", "two"]).args(["--", "doctor", "--json"]));
    assert!(outcome.stdout.starts_with('{'), "{outcome}");
    assert!(!base.root("two").parent().unwrap().exists());
}

#[test]
fn a_machine_in_the_background_is_the_first_process_of_its_namespace() {
    let base = Base::new();
    let console = base.root("one").join("console");
    for mode in [&["--new-pid-ns"][..], &["--daemonize"], &["--new-pid-ns", "--daemonize"]] {
        let mut jailer = base.jailer(&[&["--id", "one"], mode].concat());
        jailer.args(["--", "--image", "/image", "--memory", "64", "--console", "/console"]);
        jailer.args(["--", "/bin/sh", "-c", "echo ready; sleep 1000"]);
        // Without --daemonize the program keeps the standard streams, so that a pipe would not end.
        let status =
            jailer.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap();
        assert!(status.success(), "{status}");
        let process = program(&base);
        let pid: i32 = process.file_name().unwrap().to_str().unwrap().parse().unwrap();
        let since = Instant::now();
        while !fs::read_to_string(&console).is_ok_and(|text| text.contains("ready")) {
            assert!(
                process.exists() && since.elapsed() < TIMEOUT,
                "the program has ended, or prints nothing"
            );
            std::thread::yield_now();
        }
        let in_namespace = field(&process, "NSpid");
        let expected = if mode.contains(&"--new-pid-ns") { format!("{pid} 1") } else { pid.to_string() };
        assert_eq!(in_namespace, expected);
        let stdin = fs::read_link(process.join("fd/0")).unwrap();
        if mode.contains(&"--daemonize") {
            assert_eq!(stdin, Path::new("/dev/null"));
            assert_ne!(field(&process, "NSsid"), field(Path::new("/proc/self"), "NSsid"));
        }
        tests::kill(pid.try_into().unwrap(), libc::SIGTERM);
        wait_until(|| !base.root("one").join("dev").exists());
        fs::remove_file(&console).unwrap();
    }
    let mut absent = base.jailer(&["--id", "one", "--daemonize", "--netns", "/run/netns/absent"]);
    run(&mut absent)
        .expect_status(125)
        .expect_stderr("kindling-jailer: cannot open the network namespace /run/netns/absent: No such file");
}

fn wait_until(condition: impl Fn() -> bool) {
    let since = Instant::now();
    while !condition() {
        assert!(since.elapsed() < TIMEOUT, "it does not happen");
        std::thread::yield_now();
    }
}

#[test]
fn a_killed_jailer_takes_its_program_with_it_and_the_next_one_cleans_up() {
    let base = Base::new();
    let guest = waiting(&base, &["--id", "one", "--cgroup", "pids.max=50"]);
    let process = program(&base);
    guest.signal(libc::SIGKILL);
    wait_until(|| !process.exists() || field(&process, "State").starts_with('Z'));
    assert_eq!(base.left("one"), ["dev", "image", "kindling.pid"]);
    // The device belongs to another user.
    let device = base.root("one").join("dev/kvm");
    std::os::unix::fs::chown(&device, Some(99), None).unwrap();
    let mut guest = waiting(&base, &["--id", "one", "--cgroup", "pids.max=50"]);
    assert_eq!(fs::metadata(&device).unwrap().uid(), USER);
    guest.send_line();
    guest.expect_status(7);
    // What the killed one has left was there before.
    assert_eq!(base.left("one"), ["dev", "image"]);
    for cgroup in ["kindling/one", "kindling"] {
        fs::remove_dir(Path::new("/sys/fs/cgroup").join(cgroup)).unwrap();
    }
}

#[test]
fn processes_that_the_program_leaves_end_with_it() {
    let base = Base::new();
    let script = "while :; do :; done & while :; do :; done & exit 3";
    let program = |options: &[&str]| {
        let mut command = base.jailer(&["--id", "one", "--exec-file", "/bin/busybox"]);
        command.args(options).args(["--", "sh", "-c", script]);
        run(&mut command)
    };
    for options in [&[][..], &["--cgroup", "pids.max=50"]] {
        program(options).expect_status(3);
        let of_user = fs::read_dir("/proc")
            .unwrap()
            .flatten()
            .filter(|entry| entry.metadata().is_ok_and(|process| process.uid() == USER));
        assert_eq!(of_user.count(), 0);
    }
    assert!(!base.0.path().join("busybox").exists() && !Path::new("/sys/fs/cgroup/busybox").exists());
}

/// What a caller may pass on: a strict umask, signals that are ignored, and a terminal.
#[test]
fn the_state_of_the_caller_does_not_reach_the_program() {
    let base = Base::new();
    let script = "umask 077; trap '' CHLD PIPE; exec \"$@\"";
    let mut command = Command::new("sh");
    command.args(["-c", script, "sh"]).arg(testbed("kindling-jailer"));
    command.args(base.jailer(&["--id", "one"]).get_args());
    let guest_script = format!("{PREAMBLE} echo ready; wait_line; exit 7");
    command.args(["--", "--image", "/image", "--memory", "64", "--", "/bin/sh", "-c", &guest_script]);
    let mut guest = GuestConsole::start(&mut command);
    guest.expect("ready");
    assert_eq!(fs::metadata(base.root("one").join("dev")).unwrap().mode() & 0o777, 0o755);
    let process = program(&base);
    // SIGCHLD is number 17. The program itself ignores SIGPIPE.
    let ignored = u64::from_str_radix(&field(&process, "SigIgn"), 16).unwrap();
    assert_eq!(ignored & (1 << 16), 0, "{ignored:x}");
    assert_ne!(field(&process, "NSsid"), field(Path::new("/proc/self"), "NSsid"));
    guest.send_line();
    guest.expect_status(7);
}

/// The user of an earlier program with the same name owns the root directory.
#[test]
fn what_a_user_left_in_the_directory_does_not_lead_out_of_it() {
    let base = Base::new();
    let outside = base.0.path().join("outside");
    fs::create_dir(&outside).unwrap();
    let refused = |path: &str| -> Outcome {
        let outcome = run(base.jailer(&["--id", "one"]).args(["--", "--help"]));
        outcome
            .expect_status(2)
            .expect_stderr(&format!("one/root/{path} is not what this program would create there"));
        outcome
    };
    symlink(&outside, base.root("one").join("dev")).unwrap();
    refused("dev");
    fs::remove_file(base.root("one").join("dev")).unwrap();
    fs::create_dir(base.root("one").join("dev")).unwrap();
    // In a directory of the user, a process of it could replace the device.
    std::os::unix::fs::chown(base.root("one").join("dev"), Some(USER), Some(GROUP)).unwrap();
    refused("dev");
    std::os::unix::fs::chown(base.root("one").join("dev"), Some(0), Some(0)).unwrap();
    for (target, name) in [("/etc/passwd", "dev/kvm"), ("/dev/null", "dev/kvm")] {
        let path = base.root("one").join(name);
        symlink(target, &path).unwrap();
        refused(name);
        fs::remove_file(&path).unwrap();
    }
    symlink("/etc", base.root("one").join("dev/net")).unwrap();
    refused("dev/net");
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
    // Neither does the file with the PID follow a link.
    fs::remove_file(base.root("one").join("dev/net")).unwrap();
    let victim = base.0.path().join("victim");
    fs::write(&victim, "untouched").unwrap();
    symlink(&victim, base.root("one").join("kindling.pid")).unwrap();
    run(base.jailer(&["--id", "one"]).args(["--", "--help"])).expect_status(0);
    assert_eq!(fs::read_to_string(&victim).unwrap(), "untouched");
    // The parents belong to root.
    let other = base.0.path().join("kindling");
    std::os::unix::fs::chown(&other, Some(USER), None).unwrap();
    run(base.jailer(&["--id", "one"]).args(["--", "--help"]))
        .expect_status(2)
        .expect_stderr("belongs to the user 4321");
}

#[test]
fn a_machine_joins_a_network_namespace() {
    let base = Base::new();
    let mut other =
        GuestConsole::start(Command::new("unshare").args(["-n", "sh", "-c", "echo $$; read -r line"]));
    let pid = other.expect("");
    let mut guest = waiting(&base, &["--id", "one", "--netns", &format!("/proc/{pid}/ns/net")]);
    let namespace = |process: &Path| fs::read_link(process.join("ns/net")).unwrap();
    assert_eq!(namespace(&program(&base)), namespace(&Path::new("/proc").join(&pid)));
    assert_ne!(namespace(&program(&base)), namespace(Path::new("/proc/self")));
    guest.send_line();
    guest.expect_status(7);
    other.send_line();
    other.expect_status(0);
}

#[test]
fn invalid_requests_are_errors_that_leave_nothing() {
    let base = Base::new();
    let refused = |options: &[&str], status: i32, message: &str| {
        run(base.jailer(options).args(["--", "--help"])).expect_status(status).expect_stderr(message);
        assert_eq!(base.left("one"), ["image"]);
        assert!(!base.root("three").parent().unwrap().exists());
    };
    refused(&["--id", "../one"], 2, "--id \"../one\": expected 1 to 64 letters");
    refused(&["--id", "three", "--exec-file", "/absent"], 2, "cannot open /absent");
    refused(
        &["--id", "three", "--cgroup", "memory.max=x"],
        125,
        "cannot write to /sys/fs/cgroup/kindling/three/memory.max: Invalid argument",
    );
    refused(&["--id", "three", "--cgroup", "absent.max=1"], 125, "/sys/fs/cgroup has no controllers absent");
    assert!(!Path::new("/sys/fs/cgroup/kindling").exists());
    let folder = tempfile::tempdir().unwrap();
    let script = folder.path().join("script");
    fs::write(&script, "no program").unwrap();
    refused(
        &["--id", "three", "--exec-file", script.to_str().unwrap()],
        125,
        "cannot execute the program: Permission denied",
    );
}
