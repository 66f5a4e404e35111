//! `kindling run` and `kindling exec` behave like the program itself: streams, signals, terminal and exit status are
//! passed through.

use guest_protocol::agent::{Hello, Role};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use tests::guest_console::GuestConsole;
use tests::user::{User, expect_echo};
use tests::{TIMEOUT, run, start, testbed};

#[test]
fn stdout_and_stderr_of_the_program_are_passed_through_unchanged() {
    let user = User::new();
    let outcome = run(&mut user.shell("echo out; echo err >&2; printf 'a\\r\\0b'; exit 7"));
    outcome.expect_status(7);
    assert_eq!((outcome.stdout.as_str(), outcome.stderr.as_str()), ("out\na\0b", "err\n"));
    assert!(user.has_no_guests());
}

#[test]
fn every_byte_of_stdin_is_echoed() {
    let user = User::new();
    let bytes: Vec<u8> =
        (0..3_000_000_u32).flat_map(|number| number.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    expect_echo(user.run(&[]).arg("cat"), &bytes);
}

#[test]
fn empty_stdin_is_end_of_file() {
    let user = User::new();
    assert_eq!(run(user.run(&[]).args(["wc", "-c"])).expect_status(0).stdout, "0\n");
}

#[test]
fn unread_stdin_does_not_delay_the_exit() {
    let user = User::new();
    let mut command = user.run(&[]);
    let mut child = command.arg("true").stdin(Stdio::piped()).spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    let writer = std::thread::spawn(move || while input.write_all(&[0; 4096]).is_ok() {});
    assert!(child.wait().unwrap().success());
    writer.join().unwrap();
}

#[test]
fn closing_the_readers_pipe_ends_the_writer_with_sigpipe() {
    let user = User::new();
    let mut child = user.run(&[]).arg("yes").stdout(Stdio::piped()).spawn().unwrap();
    let mut line = [0; 2];
    child.stdout.take().unwrap().read_exact(&mut line).unwrap();
    assert_eq!(&line, b"y\n");
    // The status of a shell for SIGPIPE.
    assert_eq!(child.wait().unwrap().code(), Some(128 + libc::SIGPIPE));
}

#[test]
fn exit_statuses_follow_the_conventions_of_shells() {
    let user = User::new();
    let status = |arguments: &[&str]| run(user.run(&[]).args(arguments));
    status(&["true"]).expect_status(0);
    status(&["sh", "-c", "exit 255"]).expect_status(255);
    status(&["sh", "-c", "kill -KILL $$"]).expect_status(128 + 9);
    status(&["no-such-program"]).expect_status(127).expect_stderr("no-such-program: not found");
    status(&["/etc/data"]).expect_status(126).expect_stderr("/etc/data: cannot execute");
}

#[test]
fn environment_working_directory_user_and_hostname_are_set() {
    let user = User::new();
    let script = "echo $A $B $HOME; pwd; id -u; id -g; hostname; echo ${TERM-none}";
    let options = ["-e", "A=one two", "-e", "B", "-w", "/srv/deep/er", "-u", "1000:100", "--name", "box"];
    let outcome = run(user.run(&options).env("B", "here").args(["sh", "-c", script]));
    assert_eq!(
        outcome.expect_status(0).stdout,
        "one two here /root\n/srv/deep/er\n1000\n100\nbox\nnone\n",
        "{outcome}"
    );
}

/// Opens the standard streams by each of their names; the first line of standard input is `in`.
const BY_NAME: &str = "head -n 1 < /dev/stdin; echo 1 > /dev/stdout; echo 2 > /dev/fd/1; echo 3 >> /proc/self/fd/1; \
                       echo 4 > /dev/stderr; echo 5 > /proc/self/fd/2; stat -L -c %u /dev/stdout";

#[test]
fn an_unprivileged_user_can_open_the_streams_by_name() {
    let user = User::new();
    let feed = |command: &mut std::process::Command| {
        let mut started = start(command.args(["sh", "-c", BY_NAME]).stdin(Stdio::piped()));
        started.child.stdin.take().unwrap().write_all(b"in\n").unwrap();
        started.finish_within(TIMEOUT)
    };
    let expect = |outcome: &tests::Outcome, user: &str| {
        assert_eq!(outcome.expect_status(0).stdout, format!("in\n1\n2\n3\n{user}\n"), "{outcome}");
        assert_eq!(outcome.stderr, "4\n5\n");
    };
    expect(&feed(&mut user.run(&["-u", "1000:100"])), "1000");
    expect(&feed(&mut user.run(&[])), "0");
    let mut guest = GuestConsole::start(user.run(&["--name", "one", "-u", "7:8"]).args([
        "sh",
        "-c",
        "echo ready > /dev/stdout; read -r line",
    ]));
    guest.expect("ready");
    expect(&feed(user.command("exec").arg("one")), "7");
    expect(&feed(user.command("exec").args(["-u", "5", "one"])), "5");
    guest.send_line();
    guest.expect_status(0);
    // A detached guest has no input, and its output goes to the log.
    run(user.run(&["-d", "--name", "two", "-u", "1000"]).args(["sh", "-c", BY_NAME])).expect_status(0);
    run(user.command("wait").arg("two")).expect_status(0);
    let log = run(user.command("logs").arg("two"));
    assert_eq!(log.expect_status(0).stdout, "1\n2\n3\n1000\n", "{log}");
    assert_eq!(log.stderr, "4\n5\n");
}

#[test]
fn an_unprivileged_user_can_open_the_terminal_by_name() {
    let user = User::new();
    let script = "echo 1 > /dev/stdout; echo 2 > /dev/stderr; echo 3 > /dev/tty; echo 4 > $(tty); \
                  stat -L -c %u:%g:%a /dev/stdin";
    let outcome = run(user.run(&["-t", "-u", "1000"]).args(["sh", "-c", script]));
    assert_eq!(outcome.expect_status(0).stdout, "1\n2\n3\n4\n1000:5:620\n", "{outcome}");
    // The serial console of a guest without an agent.
    let outcome = run(tests::boot().args(["--user", "1000", "--", "/bin/sh", "-c", script]));
    assert!(outcome.expect_status(0).stdout.starts_with("1\n2\n3\n"), "{outcome}");
}

/// Linux's limits are 2 MiB in total and 128 KiB each. The shell prints number and lengths.
#[test]
fn arguments_and_environment_can_reach_the_limits_of_linux() {
    let user = User::new();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("env");
    let entries: String =
        (0..2000).map(|number| format!("VARIABLE_{number}={}\n", "v".repeat(200))).collect();
    std::fs::write(&file, &entries).unwrap();
    let file = file.to_str().unwrap();
    let longest = "x".repeat((128 << 10) - 1);
    let count = ["sh", "-c", "echo $# ${#1} ${#VARIABLE_1999}", "sh"];
    let many = vec!["word"; 100_000];
    let with_long = |command: &mut std::process::Command| run(command.args(count).arg(&longest));
    let with_many = |command: &mut std::process::Command| run(command.args(count).args(&many));
    let mut guest =
        GuestConsole::start(user.run(&["--name", "one"]).args(["sh", "-c", "echo ready; read -r line"]));
    guest.expect("ready");
    for outcome in [
        with_many(&mut user.run(&["--env-file", file])),
        with_many(user.command("exec").args(["--env-file", file, "one"])),
    ] {
        assert_eq!(outcome.expect_status(0).stdout, "100000 4 200\n", "{}", outcome.stderr);
    }
    for outcome in [with_long(&mut user.run(&[])), with_long(user.command("exec").arg("one"))] {
        assert_eq!(outcome.expect_status(0).stdout, "1 131071 0\n", "{}", outcome.stderr);
    }
    with_many(&mut user.run(&["-d", "--name", "two", "--env-file", file])).expect_status(0);
    run(user.command("wait").arg("two")).expect_status(0);
    assert_eq!(run(user.command("logs").arg("two")).expect_status(0).stdout, "100000 4 200\n");
    // Above the limits: the host refuses a single string, and the guest's kernel refuses the total.
    let long_file = folder.path().join("long");
    std::fs::write(&long_file, format!("LONG={longest}\n")).unwrap();
    let options = ["--env-file", long_file.to_str().unwrap()];
    run(user.run(&options).arg("true"))
        .expect_status(2)
        .expect_stderr("has 131076 bytes; Linux takes at most 131071");
    let full: String = (0..2000).map(|number| format!("{number:04}={}\n", "x".repeat(995))).collect();
    std::fs::write(&long_file, format!("{full}LAST={}\n", "x".repeat((2 << 20) - 2000 * 1009 - 90))).unwrap();
    let outcome = run(user.command("exec").args(options).args(["one", "true"]));
    outcome.expect_status(126).expect_stderr("true: cannot execute: argument list too long");
    // Several concurrently.
    let many: Vec<_> =
        (0..8).map(|_| start(user.command("exec").arg("one").args(count).args(&many))).collect();
    for started in many {
        assert_eq!(started.finish_within(TIMEOUT).expect_status(0).stdout, "100000 4 0\n");
    }
    guest.send_line();
    guest.expect_status(0);
}

/// Limits for unprivileged programs are those of a container host.
#[test]
fn resource_limits_are_those_of_container_hosts() {
    let user = User::new();
    let script = "grep ' /dev/mqueue mqueue ' /proc/mounts | cut -d ' ' -f 2; stat -c %a /dev/mqueue; \
                  cd /proc/sys; cat vm/max_map_count vm/overcommit_memory fs/file-max fs/aio-max-nr \
                  fs/inotify/max_user_watches fs/inotify/max_user_instances net/core/somaxconn \
                  net/ipv4/ip_unprivileged_port_start net/ipv4/ping_group_range; \
                  ulimit -n; ulimit -Hn; df -m /dev/shm | tail -n 1 | tr -s ' ' | cut -d ' ' -f 2";
    let outcome = run(user.run(&["-u", "1000"]).args(["sh", "-c", script]));
    let expected = "/dev/mqueue\n1777\n1048576\n1\n1048576\n1048576\n524288\n1024\n4096\n0\n0\t2147483647\n\
                    1024\n524288\n";
    let shm = outcome.expect_status(0).stdout.strip_prefix(expected).map(|rest| rest.trim().parse());
    // Half of the memory; docker's default is 64 MiB.
    assert!(matches!(shm, Some(Ok(200..=256))), "{outcome}");
}

/// Sandboxes, container engines and language runtimes need these (`RUN` in guest-kernel-config).
#[test]
fn a_guest_has_namespaces_cgroups_and_sys() {
    let user = User::new();
    let as_user = "unshare -Ur id -u; stat -c %a /dev/net/tun /dev/fuse; grep -c Seccomp: /proc/self/status; \
                   cat /sys/class/net/lo/address; zcat /proc/config.gz | grep -c -x -e CONFIG_NF_TABLES=y \
                   -e CONFIG_BPF_SYSCALL=y -e CONFIG_STACKPROTECTOR_STRONG=y; cat /proc/self/cgroup";
    let outcome = run(user.run(&["-u", "1000"]).args(["sh", "-c", as_user]));
    assert_eq!(outcome.expect_status(0).stdout, "0\n666\n666\n1\n00:00:00:00:00:00\n3\n0::/\n", "{outcome}");
    let as_root = "cd /sys/fs/cgroup; grep ' /sys/fs/cgroup cgroup2 rw,' /proc/mounts | wc -l; cat cgroup.controllers; \
                   echo '+cpu +memory +pids' > cgroup.subtree_control; mkdir one; echo 10M > one/memory.max; \
                   echo $$ > one/cgroup.procs; cat one/memory.max one/pids.max /proc/self/cgroup; \
                   unshare -fpmnui --mount-proc sh -c 'hostname inner; hostname; echo $$'";
    let outcome = run(&mut user.shell(as_root));
    let expected = "1\ncpuset cpu io memory pids\n10485760\nmax\n0::/one\ninner\n1\n";
    assert_eq!(outcome.expect_status(0).stdout, expected, "{outcome}");
}

#[test]
fn writes_to_dev_full_fail_with_enospc() {
    let user = User::new();
    for script in ["echo x > /dev/full", "cat /etc/passwd > /dev/full", "exec > /dev/full; echo x"] {
        run(&mut user.shell(script)).expect_status(1).expect_stderr("write error: No space left on device");
    }
}

#[test]
fn signals_are_forwarded_to_the_program() {
    let user = User::new();
    let script = "trap 'echo asked; exit 9' TERM; echo ready; while :; do sleep 1; done";
    let mut child = user.shell(script).stdout(Stdio::piped()).spawn().unwrap();
    let mut output = child.stdout.take().unwrap();
    let mut line = [0; 6];
    output.read_exact(&mut line).unwrap();
    signal(&child, libc::SIGTERM);
    let mut rest = String::new();
    output.read_to_string(&mut rest).unwrap();
    assert_eq!((rest.as_str(), child.wait().unwrap().code()), ("asked\n", Some(9)));
}

#[test]
fn a_program_is_killed_after_its_timeout() {
    let user = User::new();
    let outcome = run(user.run(&["--timeout", "1"]).args(["sleep", "1000"]));
    outcome.expect_status(124).expect_stderr("killed after 1 s");
    assert!(user.has_no_guests());
}

#[test]
fn an_unread_stdout_does_not_delay_the_timeout() {
    let user = User::new();
    let mut child = user.run(&["--timeout", "1"]).arg("yes").stdout(Stdio::piped()).spawn().unwrap();
    // Standard output is not read until the command has ended.
    let output = child.stdout.take();
    assert_eq!(child.wait().unwrap().code(), Some(124));
    drop(output);
    assert!(user.has_no_guests());
}

#[test]
fn the_third_signal_ends_the_guest() {
    let user = User::new();
    let mut child = user
        .shell("trap '' TERM; echo ready; while :; do sleep 1; done")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdout.as_mut().unwrap().read_exact(&mut [0; 6]).unwrap();
    // Pending signals are merged, so the signal is sent until the guest has ended.
    let status = loop {
        signal(&child, libc::SIGTERM);
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        std::thread::yield_now();
    };
    assert_eq!(status.code(), Some(128 + libc::SIGTERM));
    assert!(user.has_no_guests());
}

#[test]
fn a_background_process_does_not_delay_the_exit() {
    let user = User::new();
    let outcome = run(&mut user.shell("sleep 1000 & echo done; exit 3"));
    assert_eq!(outcome.expect_status(3).stdout, "done\n");
}

#[test]
fn a_reset_of_the_guest_is_reported_with_status_125() {
    let user = User::new();
    let outcome = run(&mut user.shell("reboot -f; sleep 100"));
    outcome.expect_status(125).expect_stderr("guest");
    assert!(user.has_no_guests());
}

#[test]
fn the_tty_option_allocates_a_terminal() {
    let user = User::new();
    let outcome = run(user.run(&["-t"]).env("TERM", "vt100").args([
        "sh",
        "-c",
        "tty; echo $TERM; stty size; echo err >&2",
    ]));
    assert_eq!(outcome.expect_status(0).stdout, "/dev/pts/0\nvt100\n24 80\nerr\n", "{outcome}");
}

#[test]
fn invalid_arguments_of_run_are_reported() {
    let user = User::new();
    let named = |arguments: &[&str], text: &str| {
        run(user.command("run").args(arguments)).expect_status(2).expect_stderr(text);
        assert!(user.has_no_guests() || !user.folder().join("kindling").exists());
    };
    let image = testbed("busybox.erofs");
    let image = image.to_str().unwrap();
    named(&[image], "the image has no command");
    named(&["--name", "a/b", image, "true"], "invalid guest name");
    named(&["--cpus", "99", image, "true"], "number of vCPUs (vcpu_count) is 99");
    named(&["-u", "somebody", image, "true"], "somebody");
    named(&["-e", "=x", image, "true"], "environment entry");
    named(&["--memory", "1", image, "true"], "memory (mem_size_mib) is 1");
}

#[test]
fn exec_runs_programs_with_the_settings_of_the_guest_or_its_own() {
    let user = User::new();
    let options = ["--name", "one", "-e", "OF=guest", "-e", "BOTH=guest", "-w", "/srv", "-u", "7:8"];
    let script = "echo ready; read -r line; echo end";
    let mut guest = GuestConsole::start(user.run(&options).args(["sh", "-c", script]));
    guest.expect("ready");
    let exec_with =
        |options: &[&str], command: &[&str]| run(user.command("exec").args(options).arg("one").args(command));
    let exec = |command: &[&str]| exec_with(&[], command);
    let outcome = exec(&["sh", "-c", "echo out; echo err >&2; exit 4"]);
    assert_eq!((outcome.expect_status(4).stdout.as_str(), outcome.stderr.as_str()), ("out\n", "err\n"));
    // As with docker, what follows the name is the command.
    exec(&["-w", "/etc"]).expect_status(127).expect_stderr("-w: not found");
    let options = ["-w", "/etc", "-u", "5", "-e", "X=y", "one", "sh", "-c", "pwd; id -u; echo $X"];
    assert_eq!(run(user.command("exec").args(options)).stdout, "/etc\n5\ny\n");
    // Settings that are not given are inherited from the guest's program.
    assert_eq!(
        exec_with(&["-e", "BOTH=command"], &["sh", "-c", "pwd; id -u; id -g; echo $OF $BOTH $HOSTNAME"])
            .stdout,
        "/srv\n7\n8\nguest command one\n"
    );
    exec_with(&["-u", "nobody"], &["true"])
        .expect_status(2)
        .expect_stderr("\"nobody\" is not UID or UID:GID");
    exec(&["nothing"]).expect_status(127);
    // A background process that holds the output neither delays the command nor is killed.
    let outcome = exec(&["sh", "-c", "(sleep 1; touch /tmp/later; sleep 1000) & echo $!"]);
    let child = outcome.expect_status(0).stdout.clone();
    exec(&["sh", "-c", &format!("while [ ! -e /tmp/later ]; do sleep 1; done; kill -0 {}", child.trim())])
        .expect_status(0);
    run(user.run(&["--name", "one"]).arg("true"))
        .expect_status(2)
        .expect_stderr("a guest named one exists already");
    run(user.command("exec").args(["two", "true"])).expect_status(2).expect_stderr("no guest named two");
    // Many concurrently, each with its own exit status.
    let many: Vec<_> = (0..20)
        .map(|number| {
            start(
                user.command("exec")
                    .args(["one", "sh", "-c"])
                    .arg(format!("cat /proc/self/stat > /dev/null; exit {number}")),
            )
        })
        .collect();
    for (number, started) in (0..).zip(many) {
        started.finish_within(TIMEOUT).expect_status(number);
    }
    guest.send_line();
    guest.expect("end");
}

#[test]
fn exec_reports_programs_that_cannot_run_with_the_statuses_of_shells() {
    let user = User::new();
    let mut guest =
        GuestConsole::start(user.run(&["--name", "one"]).args(["sh", "-c", "echo ready; read -r line"]));
    guest.expect("ready");
    let exec = |arguments: &[&str], status: i32, text: &str| {
        let outcome = run(user.command("exec").arg("one").args(arguments));
        outcome.expect_status(status).expect_stderr(text);
        assert_eq!((outcome.stdout.as_str(), outcome.stderr.lines().count()), ("", 1), "{outcome}");
    };
    exec(&["nothing"], 127, "nothing: not found");
    exec(&["/etc/data"], 126, "/etc/data: cannot execute");
    exec(&["/etc"], 126, "/etc: cannot execute");
    run(user.command("exec").args(["-w", "/etc/data", "one", "true"]))
        .expect_status(126)
        .expect_stderr("cannot enter the working directory");
    let make = "cd /bin; printf '#!/bin/no-shell -x\\n' > script; printf x | dd of=busybox2 2> /dev/null; \
                chmod +x script busybox2";
    run(user.command("exec").args(["one", "sh", "-c", make])).expect_status(0);
    exec(&["script"], 127, "script: interpreter /bin/no-shell not found");
    exec(&["/bin/script"], 127, "/bin/script: interpreter /bin/no-shell not found");
    exec(&["busybox2"], 126, "busybox2: cannot execute");
    guest.send_line();
}

#[test]
fn the_end_of_the_guest_during_exec_is_reported() {
    let user = User::new();
    let mut guest =
        GuestConsole::start(user.run(&["--name", "one"]).args(["sh", "-c", "echo ready; read -r line"]));
    guest.expect("ready");
    let mut child =
        GuestConsole::start(user.command("exec").args(["one", "sh", "-c", "echo here; sleep 1000"]));
    child.expect("here");
    guest.signal(libc::SIGKILL);
    assert_eq!(
        child.expect_end("exit status: 125").lines().collect::<Vec<_>>(),
        ["kindling: the guest ended, or its agent closed the connection, before the process had ended"]
    );
    // The guest ends with its payload, which kills whatever else runs in it.
    let user = User::new();
    let mut guest =
        GuestConsole::start(user.run(&["--name", "one"]).args(["sh", "-c", "echo ready; read -r line"]));
    guest.expect("ready");
    let mut child =
        GuestConsole::start(user.command("exec").args(["one", "sh", "-c", "echo here; sleep 1000"]));
    child.expect("here");
    guest.send_line();
    guest.expect_status(0);
    child.expect_status(128 + libc::SIGKILL);
}

/// A process that ended before the guest keeps its exit status and its output, however soon after it the guest ends.
#[test]
fn the_outcome_of_exec_is_not_lost_when_the_guest_ends() {
    const UNTIL_EXEC_HAS_ENDED: &str = "echo ready; until read -r pid 2> /dev/null < /tmp/pid; do :; done; while [ -e /proc/$pid ]; do :; done";
    for _ in 0..2 {
        let user = User::new();
        let mut guest =
            GuestConsole::start(user.run(&["--name", "one"]).args(["sh", "-c", UNTIL_EXEC_HAS_ENDED]));
        guest.expect("ready");
        let program = "echo $$ > /tmp/draft; mv /tmp/draft /tmp/pid; seq 200000; exit 7";
        let outcome = run(user.command("exec").args(["one", "sh", "-c", program]));
        assert!(outcome.expect_status(7).stdout.ends_with("\n199999\n200000\n"));
        guest.expect_status(0);
    }
}

/// Connections without a request, or that close before a process is started, do not use up slots.
#[test]
fn idle_and_aborted_connections_do_not_block_exec() {
    const MANY: u64 = 300;
    let user = User::new();
    let mut guest =
        GuestConsole::start(user.run(&["--name", "one"]).args(["sh", "-c", "echo ready; read -r line"]));
    guest.expect("ready");
    let connect = |more: &[u8]| {
        let mut stream = UnixStream::connect(user.folder().join("kindling/one/vsock")).unwrap();
        stream.write_all(&[&b"CONNECT 1000\n"[..], more].concat()).unwrap();
        let mut answer = [0; 3];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"OK ");
        stream
    };
    let hello = |token, role| Hello { token, role }.to_bytes();
    let exec = || run(user.command("exec").args(["one", "echo", "fine"])).expect_status(0).stdout.clone();
    let silent: Vec<_> = (0..MANY).map(|_| connect(&[])).collect();
    assert_eq!(exec(), "fine\n");
    drop(silent);
    // The control connection is closed, while a stream is still open.
    let streams: Vec<_> = (0..MANY)
        .map(|token| {
            let input = connect(&hello(1000 + token, Role::Input));
            drop(connect(&hello(1000 + token, Role::Control)));
            input
        })
        .collect();
    assert_eq!(exec(), "fine\n");
    let alone: Vec<_> = (0..MANY).map(|token| connect(&hello(2000 + token, Role::Output))).collect();
    assert_eq!(exec(), "fine\n");
    drop((streams, alone));
    guest.send_line();
    guest.expect_status(0);
}

/// A reader that does not read blocks only its own writer, and the VMM's memory does not grow.
#[test]
fn an_unread_stream_blocks_only_its_own_writer() {
    let user = User::new();
    let mut guest =
        GuestConsole::start(user.run(&["--name", "still"]).args(["sh", "-c", "echo ready; read -r line"]));
    guest.expect("ready");
    let mut stuck = user.command("exec").args(["still", "yes"]).stdout(Stdio::piped()).spawn().unwrap();
    let exec = |script: &str| run(user.command("exec").args(["still", "sh", "-c", script]));
    // The writer blocks on its full pipe, while other commands are served.
    exec("while ! grep -q '^State:.S' /proc/$(pidof yes)/status; do :; done").expect_status(0);
    let before = guest.rss_kib();
    for _ in 0..5 {
        exec("head -c 1000000 /dev/zero").expect_status(0);
    }
    assert!(guest.rss_kib() < before + 1024, "{} KiB, then {}", before, guest.rss_kib());
    signal(&stuck, libc::SIGKILL);
    let _ = stuck.wait();
    guest.send_line();
}

#[expect(unsafe_code, reason = "kill has no safe wrapper in std")]
fn signal(child: &std::process::Child, number: i32) {
    let pid = i32::try_from(child.id()).expect("a process id");
    // SAFETY: kill does not access memory; the process is our child and has not been waited for.
    unsafe { libc::kill(pid, number) };
}

#[test]
fn missing_networks_volumes_and_kernels_are_reported() {
    let user = User::new();
    let refused = |options: &[&str], words: &str| {
        let outcome = run(user.run(options).arg("true").env("XDG_DATA_HOME", user.folder()));
        outcome.expect_status(2).expect_stderr(words);
        assert_eq!(outcome.stderr.lines().count(), 1, "{outcome}");
        assert!(user.has_no_guests());
    };
    refused(&["--net", "none", "-p", "8080:80"], "--publish needs a network");
    refused(&["--network", "host"], "unsupported network \"host\": use --net user");
    refused(
        &["-v", "data:/a", "-v", "data:/b"],
        "--volume data:/b: this volume is mounted at another path already",
    );
    let nowhere = run(user.run(&[]).arg("true").env("KINDLING_IMAGE", "/nowhere"));
    nowhere.expect_status(2).expect_stderr(
        "the directory of the guest kernel is /nowhere, which has no image.json: set KINDLING_IMAGE",
    );
    let outcome = run(user.run(&["-w", "/etc/data/x"]).arg("true"));
    outcome
        .expect_status(126)
        .expect_stderr("cannot enter the working directory /etc/data/x: not a directory");
}

/// The first run with a guest size pre-boots a kernel, which takes a while.
#[test]
fn interrupting_the_first_pre_boot_leaves_nothing() {
    let user = User::new();
    let cache = user.folder().join("cache");
    let mut command = user.run(&["--name", "one"]);
    let started = start(command.arg("true").env("XDG_CACHE_HOME", &cache));
    // The folder `preboot` is created right before the boot.
    let kernels = cache.join("kindling/kernels");
    let is_begun = || {
        let inner = std::fs::read_dir(&kernels).ok().and_then(|mut kernels| kernels.next()?.ok());
        inner.is_some_and(|kernel| kernel.path().join("preboot").is_dir())
    };
    let begin = std::time::Instant::now();
    while !is_begun() {
        assert!(begin.elapsed() < TIMEOUT, "no kernel is being pre-booted");
        std::thread::yield_now();
    }
    started.signal(libc::SIGINT);
    started.finish_within(TIMEOUT).expect_status(128 + libc::SIGINT);
    assert!(user.has_no_guests());
    let preboot = std::fs::read_dir(&kernels).unwrap().next().unwrap().unwrap().path().join("preboot");
    assert_eq!(std::fs::read_dir(preboot).unwrap().count(), 0);
}

/// The host can map huge pages only of files in memory, where the cache seldom is.
#[test]
fn pre_booted_kernels_can_be_in_another_directory() {
    let user = User::new();
    let [cache, kernels] = ["cache", "kernels"].map(|name| user.folder().join(name));
    for _ in 0..2 {
        let mut command = user.run(&["--report"]);
        command.arg("true").env("XDG_CACHE_HOME", &cache).env("KINDLING_KERNELS", &kernels);
        run(&mut command).expect_status(0).expect_stderr("pre-booted kernel loaded");
    }
    assert!(!cache.join("kindling/kernels").exists());
    assert_eq!(std::fs::read_dir(&kernels).unwrap().count(), 1);

    // A relative path, and a directory that does not exist and cannot be created.
    let mut command = user.run(&[]);
    command.arg("true").env("KINDLING_KERNELS", "relative").current_dir(user.folder());
    run(&mut command).expect_status(0);
    assert_eq!(std::fs::read_dir(user.folder().join("relative")).unwrap().count(), 1);
    let mut command = user.run(&[]);
    command.arg("true").env("KINDLING_KERNELS", "/proc/kernels");
    let failed = run(&mut command);
    failed.expect_status(2).expect_stderr("/proc/kernels");
    assert!(user.has_no_guests());
}

/// A parent folder of the program may be writable by other users.
#[test]
fn a_kernel_of_another_user_is_not_run() {
    let user = User::new();
    let (program, folder) = (user.folder().join("bin/kindling"), user.folder().join("images/run"));
    std::fs::create_dir_all(program.parent().unwrap()).unwrap();
    std::fs::copy(testbed("kindling"), &program).unwrap();
    std::fs::copy(testbed("kindling-vmm"), program.with_file_name("kindling-vmm")).unwrap();
    std::fs::create_dir_all(&folder).unwrap();
    for file in std::fs::read_dir(testbed("images/run")).unwrap() {
        let file = file.unwrap().path();
        if file.is_file() {
            std::fs::copy(&file, folder.join(file.file_name().unwrap())).unwrap();
        }
    }
    let run_copy = |status| {
        let mut command = std::process::Command::new(&program);
        command.arg("run").arg(testbed("busybox.erofs")).arg("true").stdin(Stdio::null());
        command.env("XDG_RUNTIME_DIR", user.folder()).env("XDG_CACHE_HOME", std::env::temp_dir());
        run(&mut command).expect_status(status).stderr.clone()
    };
    run_copy(0);
    std::os::unix::fs::chown(&folder, Some(12345), None).unwrap();
    let words = run_copy(2);
    assert!(words.contains("no guest kernel found"), "{words}");
}

#[test]
fn commands_on_a_dead_guest_report_it() {
    let user = User::new();
    let mut guest = user.run(&["--name", "gone"]);
    let mut guest =
        guest.args(["sh", "-c", "echo ready; sleep 1000"]).stdout(Stdio::piped()).spawn().unwrap();
    guest.stdout.as_mut().unwrap().read_exact(&mut [0; 6]).unwrap();
    guest.kill().unwrap();
    guest.wait().unwrap();
    run(user.command("exec").args(["gone", "true"])).expect_status(2).expect_stderr("has ended");
    run(user.run(&["--name", "gone"]).arg("true")).expect_status(2).expect_stderr("kindling rm");
}
