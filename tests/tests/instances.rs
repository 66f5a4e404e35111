//! Detached guests (`kindling run -d`) and their management by name.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{ChildStdout, Stdio};
use std::time::Instant;
use tests::guest_console::GuestConsole;
use tests::terminal::Terminal;
use tests::user::{SmallTmpfs, User};
use tests::{Outcome, TIMEOUT, kill, run, testbed};

/// A script that exits with status 3 once /tmp/end exists.
const UNTIL_END: &str =
    "echo out; echo err >&2; until sleep 1; [ -e /tmp/end ]; do :; done; echo end; exit 3";

/// Runs a command of a user to its end.
#[track_caller]
fn kindling(user: &User, arguments: &[&str]) -> Outcome {
    run(user.command(arguments[0]).args(&arguments[1..]))
}

/// Starts a detached guest with a shell script. It returns only because the guest's VMM holds none of the command's
/// streams.
#[track_caller]
fn detach(user: &User, options: &[&str], script: &str) {
    let outcome = run(user.run(&[&["-d"], options].concat()).args(["sh", "-c", script]));
    let name = options.last().expect("a name");
    outcome.expect_status(0);
    assert_eq!((outcome.stdout, outcome.stderr), (format!("{name}\n"), String::new()));
}

/// Ends a guest that runs [`UNTIL_END`], within a second: a process that runs when the guest ends is killed.
fn end(user: &User, name: &str) {
    kindling(user, &["exec", name, "touch", "/tmp/end"]).expect_status(0);
}

/// The exit status is recorded even if the disk was too full for the log.
#[test]
fn a_full_runtime_directory_still_records_the_exit_status() {
    let user = User::new();
    let Some(_disk) = SmallTmpfs::at(&user.folder().join("small")) else { return };
    let command = |arguments: &[&str]| {
        let mut command = user.command(arguments[0]);
        command.args(&arguments[1..]).env("XDG_RUNTIME_DIR", user.folder().join("small"));
        command
    };
    let image = testbed("busybox.erofs");
    let mut start = command(&["run", "-d", "--name", "full"]);
    start.arg(image).args(["sh", "-c", "yes | head -c 9000000; exit 6"]);
    run(&mut start).expect_status(0);
    run(&mut command(&["wait", "full"])).expect_status(6);
    run(&mut command(&["rm", "full"])).expect_status(0);
}

/// A stopped monitor (SIGSTOP) simulates a guest that accepts neither connections nor messages.
#[test]
fn exec_in_an_unresponsive_guest_can_be_interrupted_and_restores_the_terminal() {
    let user = User::new();
    detach(&user, &["--name", "still"], UNTIL_END);
    let pid = inspect(&user, "still")["pid"].as_u64().and_then(|pid| pid.try_into().ok()).expect("no pid");
    kill(pid, libc::SIGSTOP);
    let terminal = Terminal::open();
    let before = terminal.flags();
    let mut exec = terminal.start(user.command("exec").args(["-t", "still", "true"]));
    // Raw mode is set after the signals are forwarded to the guest.
    let since = Instant::now();
    while terminal.flags() & libc::ECHO != 0 {
        assert!(since.elapsed() < TIMEOUT, "no raw mode");
        std::thread::yield_now();
    }
    // Each of these signals is one more message to the guest, and the connection buffers about 280.
    for _ in 0..1000 {
        kill(exec.id(), libc::SIGRTMIN() + 1);
    }
    for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGTERM] {
        kill(exec.id(), signal);
    }
    assert_eq!(exec.wait().expect("cannot wait").code(), Some(128 + libc::SIGTERM));
    assert_eq!(terminal.flags(), before);
    kill(pid, libc::SIGCONT);
    end(&user, "still");
    kindling(&user, &["wait", "still"]).expect_status(3);
}

/// The row of a guest in `kindling ps`, without its age.
#[track_caller]
fn row(user: &User, options: &[&str], name: &str) -> Option<String> {
    let outcome = kindling(user, &[&["ps"], options].concat());
    let row = outcome.expect_status(0).stdout.lines().find(|line| line.starts_with(name))?.to_owned();
    let cells: Vec<_> = row.split("  ").map(str::trim).filter(|cell| !cell.is_empty()).collect();
    Some(cells[..cells.len() - 1].join("|"))
}

#[track_caller]
fn inspect(user: &User, name: &str) -> serde_json::Value {
    serde_json::from_str(&kindling(user, &["inspect", name]).expect_status(0).stdout).expect("no JSON")
}

/// Follows the log of a guest.
fn follow(user: &User, name: &str) -> (std::process::Child, BufReader<ChildStdout>) {
    let mut command = user.command("logs");
    let mut child = command
        .args(["-f", name])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("cannot start");
    let lines = BufReader::new(child.stdout.take().expect("no output"));
    (child, lines)
}

#[track_caller]
fn expect_line(lines: &mut BufReader<ChildStdout>, expected: &str) {
    let mut line = String::new();
    lines.read_line(&mut line).expect("cannot read");
    assert_eq!(line, format!("{expected}\n"));
}

#[test]
fn a_detached_guest_runs_on_and_is_kept_after_its_exit() {
    let user = User::new();
    detach(&user, &["--name", "web"], UNTIL_END);
    assert_eq!(
        row(&user, &[], "web").expect("no row"),
        format!("web|busybox.erofs|{}...|running", &command()[..40])
    );
    end(&user, "web");
    kindling(&user, &["wait", "web"]).expect_status(3);
    assert_eq!(row(&user, &[], "web"), None, "ended guests are listed only with -a");
    assert!(row(&user, &["-a"], "web").expect("no row").ends_with("|exited 3"));
    let log = kindling(&user, &["logs", "web"]);
    assert_eq!((log.expect_status(0).stdout.as_str(), log.stderr.as_str()), ("out\nend\n", "err\n"));
    kindling(&user, &["exec", "web", "true"]).expect_status(2).expect_stderr("the guest web has ended");
    let details = inspect(&user, "web");
    assert_eq!((&details["state"], &details["status"]), (&"exited".into(), &3.into()), "{details}");
    assert_eq!((&details["pid"], &details["host"]), (&().into(), &().into()), "{details}");
    run(user.run(&["--name", "web"]).arg("true"))
        .expect_status(2)
        .expect_stderr("`kindling rm web` removes it");
    assert_eq!(kindling(&user, &["rm", "web"]).expect_status(0).stdout, "web\n");
    assert!(user.has_no_guests());
    kindling(&user, &["rm", "web"]).expect_status(2).expect_stderr("no guest named web");
}

/// The command of these guests as shown by `ps`.
fn command() -> String {
    format!("sh -c {UNTIL_END}")
}

#[test]
fn a_detached_guest_has_its_own_session_and_none_of_the_commands_streams() {
    let user = User::new();
    detach(&user, &["-e", "TOKEN=hush-hush", "--name", "free"], UNTIL_END);
    let details = inspect(&user, "free");
    let pids = ["front_pid", "pid"].map(|name| details[name].as_u64().expect("no pid"));
    let own = kindling(&user, &["exec", "free", "sh", "-c", "echo $TOKEN"]);
    assert_eq!(own.expect_status(0).stdout, "hush-hush\n");
    for pid in pids {
        // Every user of the host can read the command line.
        let line = fs::read(format!("/proc/{pid}/cmdline")).expect("no process");
        assert!(!String::from_utf8_lossy(&line).contains("hush-hush"));
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("no process");
        let session: u64 =
            stat.rsplit(") ").next().expect("no fields").split(' ').nth(3).unwrap().parse().unwrap();
        assert_eq!(session, pid);
    }
    let folder = user.folder().join("kindling/free");
    let open = |number: u8| fs::read_link(format!("/proc/{}/fd/{number}", pids[0])).expect("not open");
    let null = || "/dev/null".into();
    assert_eq!([open(0), open(1), open(2)], [null(), null(), folder.join("report")]);
    // The monitor has no pipe, and no descriptor of a folder or a terminal.
    let open = fs::read_dir(format!("/proc/{}/fd", pids[1])).expect("no process");
    let open = open.map(|entry| fs::read_link(entry.unwrap().path()).unwrap_or_default());
    let paths: Vec<_> = open.filter(|path| path.starts_with("/")).collect();
    let is_expected = |path: &PathBuf| {
        ["/dev/null", "/dev/kvm"].iter().any(|device| path == Path::new(device))
            || path.is_file()
            || path.starts_with("/memfd:")
    };
    assert!(paths.iter().all(is_expected), "{paths:?}");
    assert_eq!(details["state"], "running");
    assert_eq!(details["socket"], folder.join("vsock").to_str().unwrap());
    assert!(details["host"]["memory_kib"].as_u64() > Some(1024), "{details}");
    let stats = kindling(&user, &["stats", "free"]);
    let line = stats.expect_status(0).stdout.lines().nth(1).expect("no row").to_owned();
    assert!(line.starts_with("free  ") && line.contains(" MiB  ") && line.ends_with(" s"), "{stats}");
    let all: serde_json::Value =
        serde_json::from_str(&kindling(&user, &["ps", "--json"]).stdout).expect("no JSON");
    assert_eq!((&all[0]["name"], &all[0]["memory_mib"]), (&"free".into(), &512.into()), "{all}");
    kindling(&user, &["rm", "free"]).expect_status(2).expect_stderr("the guest free is running");
    kindling(&user, &["rm", "-f", "free"]).expect_status(0);
    assert!(user.has_no_guests());
}

#[test]
fn a_guest_with_rm_is_removed_at_its_exit() {
    let user = User::new();
    detach(&user, &["--rm", "--name", "short"], UNTIL_END);
    let (mut log, mut lines) = follow(&user, "short");
    expect_line(&mut lines, "out");
    end(&user, "short");
    expect_line(&mut lines, "end");
    assert!(log.wait().unwrap().success());
    assert!(user.has_no_guests());
}

#[test]
fn a_failed_start_reports_the_reason_and_leaves_no_guest() {
    let user = User::new();
    /// The end of the superblock; nothing after it is intact.
    const SUPERBLOCK_END: usize = 1024 + 128;
    let mut bytes = fs::read(testbed("busybox.erofs")).unwrap();
    bytes[SUPERBLOCK_END..].fill(0);
    let broken = user.folder().join("broken.erofs");
    fs::write(&broken, bytes).unwrap();
    let outcome = run(user.command("run").arg("-d").arg(&broken).arg("true"));
    outcome
        .expect_status(125)
        .expect_stderr("last stage reached: init: ")
        .expect_stderr("last lines of the console");
    assert_eq!(outcome.stdout, "");
    let outcome = run(&mut user.run(&["-d"]));
    outcome.expect_status(2).expect_stderr("the image has no command");
    assert!(user.has_no_guests());
}

/// Errors that a shell reports for a command are reported before the guest gets a name.
#[test]
fn a_program_that_cannot_be_started_fails_the_command_and_leaves_no_guest() {
    let user = User::new();
    let start = |options: &[&str], program: &str, status: i32, text: &str| {
        let outcome = run(user.run(&[&["-d"], options].concat()).arg(program));
        outcome.expect_status(status).expect_stderr(text);
        assert_eq!((outcome.stdout.as_str(), outcome.stderr.lines().count()), ("", 1), "{outcome}");
        assert!(user.has_no_guests());
    };
    start(&[], "no-such-program", 127, "no-such-program: not found");
    start(&["-t"], "/no/such/program", 127, "/no/such/program: not found");
    start(&["--rm"], "/etc/data", 126, "/etc/data: cannot execute");
    start(&["-w", "/etc/data"], "true", 126, "cannot enter the working directory");
    // A program that exits immediately was still started.
    let outcome = run(user.run(&["-d", "--name", "soon"]).arg("false"));
    assert_eq!((outcome.expect_status(0).stdout.as_str(), outcome.stderr.as_str()), ("soon\n", ""));
    kindling(&user, &["wait", "soon"]).expect_status(1);
}

#[test]
fn real_time_signals_reach_the_program() {
    let user = User::new();
    let script = "trap 'echo three' 37; trap 'echo last' 64; echo ready; while :; do sleep 1; done";
    detach(&user, &["--name", "told"], script);
    let (_log, mut lines) = follow(&user, "told");
    expect_line(&mut lines, "ready");
    for (signal, line) in [("RTMIN+3", "three"), ("SIGRTMAX", "last"), ("37", "three")] {
        kindling(&user, &["kill", "-s", signal, "told"]).expect_status(0);
        expect_line(&mut lines, line);
    }
    // The first real-time signal interrupts vCPUs and is reserved.
    kindling(&user, &["kill", "-s", "RTMIN", "told"]).expect_status(2).expect_stderr("invalid signal");
    kindling(&user, &["rm", "-f", "told"]).expect_status(0);
    // For a guest in the foreground as well.
    let mut guest = GuestConsole::start(user.run(&["--name", "front"]).args(["sh", "-c", script]));
    guest.expect("ready");
    for signal in ["RTMIN+3", "RTMIN+3", "RTMIN+3", "RTMIN+3"] {
        kindling(&user, &["kill", "-s", signal, "front"]).expect_status(0);
        guest.expect("three");
    }
}

#[test]
fn stop_sends_sigterm_and_kills_after_the_timeout() {
    let user = User::new();
    let wait = "while :; do sleep 1; done";
    detach(&user, &["--name", "polite"], &format!("trap 'echo asked; exit 9' TERM; echo ready; {wait}"));
    detach(&user, &["--name", "deaf"], &format!("trap '' TERM; echo ready; {wait}"));
    for name in ["polite", "deaf"] {
        expect_line(&mut follow(&user, name).1, "ready");
    }
    let outcome = kindling(&user, &["stop", "--time", "5", "polite", "none", "deaf"]);
    outcome.expect_status(2).expect_stderr("no guest named none");
    assert_eq!(outcome.stdout, "polite\ndeaf\n");
    assert!(row(&user, &["-a"], "polite").expect("no row").ends_with("|exited 9"));
    assert!(row(&user, &["-a"], "deaf").expect("no row").ends_with("|exited 137"));
    assert_eq!(kindling(&user, &["logs", "polite"]).stdout, "ready\nasked\n");
    // Stopping a guest that has ended succeeds.
    kindling(&user, &["stop", "deaf"]).expect_status(0);
    kindling(&user, &["rm", "deaf", "polite"]).expect_status(0);
    assert!(user.has_no_guests());
}

#[test]
fn every_signal_sent_reaches_the_program() {
    let user = User::new();
    let script = "trap 'echo HUP' HUP; trap 'echo USR1' USR1; trap 'echo WINCH' WINCH; echo ready; \
                  while :; do sleep 1; done";
    detach(&user, &["--name", "told"], script);
    let (mut log, mut lines) = follow(&user, "told");
    expect_line(&mut lines, "ready");
    // In the foreground, the third signal would end the guest.
    for name in ["HUP", "HUP", "HUP", "HUP", "USR1", "WINCH"] {
        kindling(&user, &["kill", "-s", name, "told"]).expect_status(0);
        expect_line(&mut lines, name);
    }
    kindling(&user, &["kill", "-s", "SEGV", "told"]).expect_status(2).expect_stderr("invalid signal");
    assert_eq!(kindling(&user, &["kill", "told"]).expect_status(0).stdout, "told\n");
    assert!(log.wait().unwrap().success(), "following the log ends with the guest");
    assert!(row(&user, &["-a"], "told").expect("no row").ends_with("|exited 137"));
    kindling(&user, &["kill", "told"]).expect_status(2).expect_stderr("has ended");
}

#[test]
fn a_guest_whose_monitor_is_killed_has_exited_with_125() {
    let user = User::new();
    detach(&user, &["--name", "gone"], UNTIL_END);
    expect_line(&mut follow(&user, "gone").1, "out");
    let pid = inspect(&user, "gone")["pid"].to_string();
    tests::kill(pid.parse().unwrap(), libc::SIGKILL);
    kindling(&user, &["wait", "gone"]).expect_status(125);
    assert!(row(&user, &["-a"], "gone").expect("no row").ends_with("|exited 125"));
    let details = inspect(&user, "gone");
    let report = details["report"].as_str().expect("no report");
    assert_eq!(report, "kindling: kindling-vmm was killed by signal 9; the host may be out of memory\n");
    kindling(&user, &["rm", "gone"]).expect_status(0);
    assert!(user.has_no_guests());
}

#[test]
fn a_guest_whose_kindling_process_is_killed_is_dead() {
    let user = User::new();
    detach(&user, &["--name", "gone"], UNTIL_END);
    expect_line(&mut follow(&user, "gone").1, "out");
    let pid = inspect(&user, "gone")["front_pid"].to_string();
    tests::kill(pid.parse().unwrap(), libc::SIGKILL);
    kindling(&user, &["wait", "gone"])
        .expect_status(125)
        .expect_stderr("the kindling process that ran it crashed or was killed");
    assert_eq!(row(&user, &[], "gone"), None);
    assert!(row(&user, &["-a"], "gone").expect("no row").ends_with("|dead"));
    for command in [&["exec", "gone", "true"][..], &["kill", "gone"], &["stats", "gone"]] {
        kindling(&user, command).expect_status(2).expect_stderr("the guest gone has ended");
    }
    assert_eq!(kindling(&user, &["logs", "-f", "gone"]).expect_status(0).stdout, "out\n");
    kindling(&user, &["stop", "gone"]).expect_status(0);
    run(user.run(&["--name", "gone"]).arg("true")).expect_status(2).expect_stderr("`kindling rm gone`");
    // The record contains no PID, because the kernel may have reused it.
    let record = fs::read_to_string(user.folder().join("kindling/gone/guest.json")).unwrap();
    assert!(!record.contains("\"pid\""), "{record}");
    kindling(&user, &["rm", "-f", "gone"]).expect_status(0);
    assert!(user.has_no_guests());
    run(user.run(&["--name", "gone"]).args(["sh", "-c", "exit 4"])).expect_status(4);
}

#[test]
fn a_guest_in_the_foreground_can_be_listed_stopped_and_killed() {
    let user = User::new();
    let start = |name: &str| {
        let mut guest =
            GuestConsole::start(user.run(&["--name", name]).args(["sh", "-c", "echo ready; cat"]));
        guest.expect("ready");
        guest
    };
    let guest = start("front");
    assert!(row(&user, &[], "front").expect("no row").ends_with("|running"));
    kindling(&user, &["logs", "front"]).expect_status(2).expect_stderr("went to the `kindling run`");
    kindling(&user, &["stop", "front"]).expect_status(0);
    assert!(user.has_no_guests());
    drop(guest);
    let guest = start("front");
    kindling(&user, &["kill", "front"]).expect_status(0);
    assert!(user.has_no_guests());
    drop(guest);
}
