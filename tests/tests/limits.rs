//! Limits of a noisy guest: processes, disk and network rates.
#![expect(unsafe_code, reason = "starts processes in a cgroup as another user")]

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use tests::guest_console::GuestConsole;
use tests::user::User;
use tests::{Outcome, run};

/// Runs a shell script in a guest with options of `kindling run`.
#[track_caller]
fn shell(user: &User, options: &[&str], script: &str) -> Outcome {
    run(user.run(options).args(["sh", "-c", script]))
}

/// Starts this many processes that outlive the shell, and prints how many there are.
const MANY: &str =
    "i=0; while [ $i -lt 60 ]; do sleep 1000 < /dev/null > /dev/null 2>&1 & i=$((i+1)); done; echo $i";

#[test]
fn processes_are_limited() {
    let user = User::new();
    assert_eq!(shell(&user, &[], MANY).expect_status(0).stdout, "60\n");
    let limited = ["--pids-limit", "20"];
    let outcome = shell(&user, &limited, MANY);
    assert_ne!(outcome.status, Some(0), "{}", outcome.stdout);
    outcome.expect_stderr("can't fork");
    // Up to the limit. The hierarchy above it is not visible, and it cannot be written to.
    let script = "i=0; while [ $i -lt 17 ]; do sleep 1000 < /dev/null > /dev/null 2>&1 & i=$((i+1)); done; echo $i; \
                  cat /sys/fs/cgroup/pids.max /proc/self/cgroup; \
                  (echo max > /sys/fs/cgroup/pids.max) 2>&1 | grep -c -i 'error\\|denied\\|not permitted'; \
                  mkdir /tmp/c; mount -t cgroup2 none /tmp/c; ls -d /tmp/c/guest 2> /dev/null; cat /tmp/c/pids.max";
    assert_eq!(shell(&user, &limited, script).expect_status(0).stdout, "17\n21\n0::/\n1\n21\n");
    // Threads and the processes of exec count as well.
    let outcome = shell(&user, &["--pids-limit", "1"], "echo alone; true | true");
    assert_eq!(outcome.stdout, "alone\n");
    outcome.expect_stderr("can't fork");
}

/// Seconds that a guest needs to write 3 MiB to a volume.
fn writing(user: &User, options: &[&str]) -> f64 {
    const SCRIPT: &str = "up() { cut -d' ' -f1 /proc/uptime; }; a=$(up); \
                          dd if=/dev/zero of=/data/file bs=64k count=48 conv=fsync 2> /dev/null; echo $a $(up)";
    let outcome = shell(user, &[&["-v", "data:/data"], options].concat(), SCRIPT);
    let times: Vec<f64> =
        outcome.expect_status(0).stdout.split_whitespace().map(|word| word.parse().unwrap()).collect();
    times[1] - times[0]
}

/// The limits count in the guest's time, and a slow host makes a guest slower, not faster.
#[test]
fn disks_are_limited_by_bytes_and_requests() {
    let user = User::new();
    // The first mebibyte is the burst.
    assert!(writing(&user, &["--disk-bps", "1m"]) >= 1.9);
    assert!(writing(&user, &["--disk-bps", "2048k"]) >= 0.4);
    // The kernel's default of 1.25 MiB for a request makes three of them at least.
    assert!(writing(&user, &["--disk-iops", "1"]) >= 2.0);
}

#[test]
fn a_limit_of_a_network_that_does_not_exist_is_an_error() {
    let user = User::new();
    shell(&user, &["--net-bps", "1m"], "true")
        .expect_status(2)
        .expect_stderr("--net-bps needs a network: --net user");
    assert!(user.has_no_guests());
}

const HIERARCHY: &str = "/sys/fs/cgroup";

/// Starts a guest that waits for a line.
fn waiting(user: &User, options: &[&str]) -> GuestConsole {
    let mut guest = GuestConsole::start(user.run(options).args(["sh", "-c", "echo ready; read -r line"]));
    guest.expect("ready");
    guest
}

/// The directory of a monitor's cgroup.
fn cgroup(monitor: &Path) -> PathBuf {
    let text = fs::read_to_string(monitor.join("cgroup")).unwrap();
    Path::new(HIERARCHY).join(text.trim().strip_prefix("0::/").expect("no cgroup v2"))
}

/// The cgroups of guests in a cgroup.
fn guests_in(parent: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(parent).unwrap().map(|entry| entry.unwrap().path());
    entries.filter(|path| path.file_name().unwrap().to_string_lossy().starts_with("kindling-")).collect()
}

#[test]
fn a_fraction_of_a_processor_is_a_limit_of_the_monitors_cgroup() {
    let user = User::new();
    for jail in ["require", "full"] {
        let mut guest =
            waiting(&user, &["--cpus", "0.5", "--memory", "64", "--name", "half", "--jail", jail]);
        let monitor = guest.process();
        let [path] = &guests_in(Path::new(HIERARCHY))[..] else { panic!("not one cgroup") };
        let pid = monitor.file_name().unwrap().to_str().unwrap();
        assert_eq!(path.file_name().unwrap().to_str(), Some(format!("kindling-half-{pid}").as_str()));
        let file = |name: &str| fs::read_to_string(path.join(name)).unwrap().trim().to_owned();
        assert_eq!(file("cgroup.procs"), pid);
        assert_eq!(file("cpu.max"), "50000 100000");
        assert_eq!(file("memory.max"), (129 * (1 << 20)).to_string());
        assert_eq!(file("pids.max"), "513");
        // A second of work needs two.
        let burn =
            "a=$(cut -d. -f1 /proc/uptime); while [ $(($(cut -d. -f1 /proc/uptime) - a)) -lt 2 ]; do :; done";
        run(user.command("exec").args(["half", "sh", "-c", burn])).expect_status(0);
        let throttled = file("cpu.stat");
        let throttled = throttled.lines().find_map(|line| line.strip_prefix("nr_throttled ")).unwrap();
        assert!(throttled.parse::<u32>().unwrap() > 5, "{throttled}");
        guest.send_line();
        guest.expect_status(0);
        assert_eq!(guests_in(Path::new(HIERARCHY)), <[PathBuf; 0]>::default());
    }
}

/// A cgroup that is delegated to a user, with a cgroup for the user's processes in it; removed on drop.
struct Delegated {
    path: PathBuf,
    user: u32,
}

impl Delegated {
    fn new(name: &str, user: u32) -> Self {
        fs::write(Path::new(HIERARCHY).join("cgroup.subtree_control"), "+cpu +memory +pids").unwrap();
        let path = Path::new(HIERARCHY).join(name);
        for directory in [path.clone(), path.join("processes")] {
            fs::create_dir(&directory).unwrap();
            for file in ["", "cgroup.procs", "cgroup.subtree_control"] {
                std::os::unix::fs::chown(directory.join(file), Some(user), Some(user)).unwrap();
            }
        }
        Self { path, user }
    }

    /// Makes a command run in the inner cgroup, as the user.
    fn start(&self, command: &mut std::process::Command) {
        let (file, user) = (self.path.join("processes/cgroup.procs"), self.user);
        let enter = move || {
            fs::write(&file, "0")?;
            // SAFETY: the calls change the user of the new process only.
            let is_user = unsafe { libc::setgid(user) == 0 && libc::setuid(user) == 0 };
            if is_user { Ok(()) } else { Err(std::io::Error::last_os_error()) }
        };
        // SAFETY: this process has one other thread at most, which holds no lock of the allocator while it waits.
        unsafe { command.pre_exec(enter) };
    }
}

impl Drop for Delegated {
    fn drop(&mut self) {
        for directory in [self.path.join("processes"), self.path.clone()] {
            let _ = fs::remove_dir(directory);
        }
    }
}

#[test]
fn another_user_than_root_needs_a_delegated_cgroup() {
    const USER: u32 = 1000;
    let user = User::new();
    std::os::unix::fs::chown(user.folder(), Some(USER), Some(USER)).unwrap();
    let command = || {
        let mut command = user.run(&["--cpus", "1.5"]);
        command.args(["sh", "-c", "nproc; read -r line"]).env("XDG_CACHE_HOME", user.folder().join("cache"));
        command
    };
    run(command().uid(USER).gid(USER)).expect_status(125).expect_stderr(
        "no cgroup of this process is delegated to the user, with the controllers cpu, memory, pids",
    );
    let delegated = Delegated::new("delegated", USER);
    let mut command = command();
    delegated.start(&mut command);
    let mut guest = GuestConsole::start(&mut command);
    guest.expect("2");
    let own = cgroup(&guest.process());
    assert_eq!(own.parent(), Some(delegated.path.as_path()));
    assert_eq!(fs::read_to_string(own.join("cpu.max")).unwrap(), "150000 100000\n");
    guest.send_line();
    guest.expect_status(0);
    assert!(!own.exists() && user.has_no_guests());
}

#[test]
fn cgroups_of_killed_starts_are_removed_by_the_next() {
    let user = User::new();
    let parent = Delegated::new("parent", 0);
    let options = ["--cgroup-parent", "/parent"];
    let guest = waiting(&user, &options);
    let own = cgroup(&guest.process());
    assert_eq!(guests_in(&parent.path), [own.as_path()]);
    assert_eq!(fs::read_to_string(own.join("memory.max")).unwrap(), format!("{}\n", 584 << 20));
    guest.signal(libc::SIGKILL);
    // Threads of the monitor may outlive its first one, which cgroup.procs lists.
    let since = std::time::Instant::now();
    while !fs::read_to_string(own.join("cgroup.events")).unwrap().contains("populated 0") {
        assert!(since.elapsed() < tests::TIMEOUT, "the monitor still runs");
        std::thread::yield_now();
    }
    shell(&user, &options, "true").expect_status(0);
    assert_eq!(guests_in(&parent.path), <[PathBuf; 0]>::default());
    shell(&user, &["--cgroup-parent", "absent"], "true")
        .expect_status(2)
        .expect_stderr("cannot read /sys/fs/cgroup/absent/cgroup.subtree_control: No such file or directory");
    let bare = Path::new(HIERARCHY).join("parent/processes");
    fs::create_dir(bare.join("inner")).unwrap();
    shell(&user, &["--cgroup-parent", "parent/processes/inner"], "true")
        .expect_status(2)
        .expect_stderr("parent/processes/inner has no controllers memory, pids: enable them");
    fs::remove_dir(bare.join("inner")).unwrap();
    // A detached guest keeps its cgroup until it ends.
    run(user.run(&["-d", "--name", "stays", "--cgroup-parent", "parent"]).args(["sleep", "1000"]))
        .expect_status(0);
    assert_eq!(guests_in(&parent.path).len(), 1);
    run(user.command("rm").args(["-f", "stays"])).expect_status(0);
    assert_eq!(guests_in(&parent.path), <[PathBuf; 0]>::default());
}
