//! `kindling run` and `kindling exec` are like running the program itself: its streams, signals, terminal and exit
//! status are the caller's.

use guest_protocol::agent::{Hello, Role};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use tests::conversation::Conversation;
use tests::user::{User, expect_echo};
use tests::{PATIENCE, run, start, testbed};

#[test]
fn a_program_has_its_streams_to_itself() {
    let user = User::new();
    let outcome = run(&mut user.shell("echo out; echo err >&2; printf 'a\\r\\0b'; exit 7"));
    outcome.expect_status(7);
    assert_eq!((outcome.stdout.as_str(), outcome.stderr.as_str()), ("out\na\0b", "err\n"));
    assert!(user.is_tidy());
}

#[test]
fn every_byte_goes_through() {
    let user = User::new();
    let bytes: Vec<u8> =
        (0..3_000_000_u32).flat_map(|number| number.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    expect_echo(user.run(&[]).arg("cat"), &bytes);
}

#[test]
fn input_that_ends_is_the_end_of_a_file() {
    let user = User::new();
    assert_eq!(run(user.run(&[]).args(["wc", "-c"])).expect_status(0).stdout, "0\n");
}

#[test]
fn a_program_that_does_not_read_is_none_the_worse() {
    let user = User::new();
    let mut command = user.run(&[]);
    let mut child = command.arg("true").stdin(Stdio::piped()).spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    let writer = std::thread::spawn(move || while input.write_all(&[0; 4096]).is_ok() {});
    assert!(child.wait().unwrap().success());
    writer.join().unwrap();
}

#[test]
fn who_reads_no_more_ends_who_writes() {
    let user = User::new();
    let mut child = user.run(&[]).arg("yes").stdout(Stdio::piped()).spawn().unwrap();
    let mut line = [0; 2];
    child.stdout.take().unwrap().read_exact(&mut line).unwrap();
    assert_eq!(&line, b"y\n");
    // SIGPIPE, as in a shell.
    assert_eq!(child.wait().unwrap().code(), Some(128 + libc::SIGPIPE));
}

#[test]
fn statuses_are_those_of_shells() {
    let user = User::new();
    let status = |arguments: &[&str]| run(user.run(&[]).args(arguments));
    status(&["true"]).expect_status(0);
    status(&["sh", "-c", "exit 255"]).expect_status(255);
    status(&["sh", "-c", "kill -KILL $$"]).expect_status(128 + 9);
    status(&["no-such-program"]).expect_status(127).expect_stderr("no-such-program: not found");
    status(&["/etc/data"]).expect_status(126).expect_stderr("/etc/data: cannot execute");
}

#[test]
fn environment_directory_user_and_names_are_as_asked() {
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

/// Opens the standard streams by each of their names; `in` is what standard input begins with.
const BY_NAME: &str = "head -n 1 < /dev/stdin; echo 1 > /dev/stdout; echo 2 > /dev/fd/1; echo 3 >> /proc/self/fd/1; \
                       echo 4 > /dev/stderr; echo 5 > /proc/self/fd/2; stat -L -c %u /dev/stdout";

#[test]
fn a_user_opens_the_streams_by_their_names() {
    let user = User::new();
    let feed = |command: &mut std::process::Command| {
        let mut started = start(command.args(["sh", "-c", BY_NAME]).stdin(Stdio::piped()));
        started.child.stdin.take().unwrap().write_all(b"in\n").unwrap();
        started.finish_within(PATIENCE)
    };
    let expect = |outcome: &tests::Outcome, user: &str| {
        assert_eq!(outcome.expect_status(0).stdout, format!("in\n1\n2\n3\n{user}\n"), "{outcome}");
        assert_eq!(outcome.stderr, "4\n5\n");
    };
    expect(&feed(&mut user.run(&["-u", "1000:100"])), "1000");
    expect(&feed(&mut user.run(&[])), "0");
    let mut guest = Conversation::start(user.run(&["--name", "one", "-u", "7:8"]).args([
        "sh",
        "-c",
        "echo ready > /dev/stdout; read -r line",
    ]));
    guest.expect("ready");
    expect(&feed(user.command("exec").arg("one")), "7");
    expect(&feed(user.command("exec").args(["-u", "5", "one"])), "5");
    guest.go_on();
    guest.expect_status(0);
    // In the background: no input, and output to the log.
    run(user.run(&["-d", "--name", "two", "-u", "1000"]).args(["sh", "-c", BY_NAME])).expect_status(0);
    run(user.command("wait").arg("two")).expect_status(0);
    let log = run(user.command("logs").arg("two"));
    assert_eq!(log.expect_status(0).stdout, "1\n2\n3\n1000\n", "{log}");
    assert_eq!(log.stderr, "4\n5\n");
}

#[test]
fn a_user_opens_the_terminal_by_its_names() {
    let user = User::new();
    let script = "echo 1 > /dev/stdout; echo 2 > /dev/stderr; echo 3 > /dev/tty; echo 4 > $(tty); \
                  stat -L -c %u:%g:%a /dev/stdin";
    let outcome = run(user.run(&["-t", "-u", "1000"]).args(["sh", "-c", script]));
    assert_eq!(outcome.expect_status(0).stdout, "1\n2\n3\n4\n1000:5:620\n", "{outcome}");
    // The console of a guest without an agent.
    let outcome = run(tests::boot().args(["--user", "1000", "--", "/bin/sh", "-c", script]));
    assert!(outcome.expect_status(0).stdout.starts_with("1\n2\n3\n"), "{outcome}");
}

/// 2 MiB together and 128 KiB each are Linux's limits; what the shell sees of each case is its number and length.
#[test]
fn arguments_and_environment_are_as_long_as_linux_takes_them() {
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
        Conversation::start(user.run(&["--name", "one"]).args(["sh", "-c", "echo ready; read -r line"]));
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
    // Beyond: by the host, and where the kernel adds something of its own, by the guest.
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
    // Many at once.
    let many: Vec<_> =
        (0..8).map(|_| start(user.command("exec").arg("one").args(count).args(&many))).collect();
    for started in many {
        assert_eq!(started.finish_within(PATIENCE).expect_status(0).stdout, "100000 4 0\n");
    }
    guest.go_on();
    guest.expect_status(0);
}

/// What the machine is to a program that is not root: as on a container's host.
#[test]
fn limits_are_those_of_container_hosts() {
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
    // Half of the memory, where docker gives 64 MiB.
    assert!(matches!(shm, Some(Ok(200..=256))), "{outcome}");
}

/// What sandboxes, container engines and language runtimes look for (`RUN` in guest-kernel-config).
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
fn a_device_that_is_full_fails_who_writes() {
    let user = User::new();
    for script in ["echo x > /dev/full", "cat /etc/passwd > /dev/full", "exec > /dev/full; echo x"] {
        run(&mut user.shell(script)).expect_status(1).expect_stderr("write error: No space left on device");
    }
}

#[test]
fn signals_are_the_programs() {
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
fn a_program_that_nobody_stops_is_killed_in_time() {
    let user = User::new();
    let outcome = run(user.run(&["--timeout", "1"]).args(["sleep", "1000"]));
    outcome.expect_status(124).expect_stderr("killed after 1 s");
    assert!(user.is_tidy());
}

#[test]
fn a_reader_that_waits_does_not_keep_a_guest_beyond_its_time() {
    let user = User::new();
    let mut child = user.run(&["--timeout", "1"]).arg("yes").stdout(Stdio::piped()).spawn().unwrap();
    // Nobody reads until it has ended.
    let output = child.stdout.take();
    assert_eq!(child.wait().unwrap().code(), Some(124));
    drop(output);
    assert!(user.is_tidy());
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
    // Signals that are on their way count once, so each is sent until the guest has ended.
    let status = loop {
        signal(&child, libc::SIGTERM);
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        std::thread::yield_now();
    };
    assert_eq!(status.code(), Some(128 + libc::SIGTERM));
    assert!(user.is_tidy());
}

#[test]
fn a_background_child_does_not_keep_a_status() {
    let user = User::new();
    let outcome = run(&mut user.shell("sleep 1000 & echo done; exit 3"));
    assert_eq!(outcome.expect_status(3).stdout, "done\n");
}

#[test]
fn a_guest_that_dies_is_explained() {
    let user = User::new();
    let outcome = run(&mut user.shell("reboot -f; sleep 100"));
    outcome.expect_status(125).expect_stderr("guest");
    assert!(user.is_tidy());
}

#[test]
fn a_terminal_is_one() {
    let user = User::new();
    let outcome = run(user.run(&["-t"]).env("TERM", "vt100").args([
        "sh",
        "-c",
        "tty; echo $TERM; stty size; echo err >&2",
    ]));
    assert_eq!(outcome.expect_status(0).stdout, "/dev/pts/0\nvt100\n24 80\nerr\n", "{outcome}");
}

#[test]
fn what_cannot_be_run_is_named() {
    let user = User::new();
    let named = |arguments: &[&str], text: &str| {
        run(user.command("run").args(arguments)).expect_status(2).expect_stderr(text);
        assert!(user.is_tidy() || !user.folder().join("kindling").exists());
    };
    let image = testbed("busybox.erofs");
    let image = image.to_str().unwrap();
    named(&[image], "the image names no command");
    named(&["--name", "a/b", image, "true"], "is no name for a guest");
    named(&["--cpus", "99", image, "true"], "vcpu_count is 99");
    named(&["-u", "somebody", image, "true"], "somebody");
    named(&["-e", "=x", image, "true"], "environment entry");
    named(&["--memory", "1", image, "true"], "mem_size_mib is 1");
}

#[test]
fn more_programs_run_in_a_guest() {
    let user = User::new();
    let options = ["--name", "one", "-e", "OF=guest", "-e", "BOTH=guest", "-w", "/srv", "-u", "7:8"];
    let script = "echo ready; read -r line; echo end";
    let mut guest = Conversation::start(user.run(&options).args(["sh", "-c", script]));
    guest.expect("ready");
    let exec = |arguments: &[&str]| run(user.command("exec").arg("one").args(arguments));
    let outcome = exec(&["sh", "-c", "echo out; echo err >&2; exit 4"]);
    assert_eq!((outcome.expect_status(4).stdout.as_str(), outcome.stderr.as_str()), ("out\n", "err\n"));
    assert_eq!(
        exec(&["-w", "/etc", "-u", "5", "-e", "X=y", "sh", "-c", "pwd; id -u; echo $X"]).stdout,
        "/etc\n5\ny\n"
    );
    // What it is not told it has from the guest's own.
    assert_eq!(
        exec(&["-e", "BOTH=command", "sh", "-c", "pwd; id -u; id -g; echo $OF $BOTH $HOSTNAME"]).stdout,
        "/srv\n7\n8\nguest command one\n"
    );
    exec(&["-u", "nobody", "true"]).expect_status(2).expect_stderr("\"nobody\" is not UID or UID:GID");
    exec(&["nothing"]).expect_status(127);
    // A child that holds the output keeps neither this command nor its own life.
    let outcome = exec(&["sh", "-c", "(sleep 1; touch /tmp/later; sleep 1000) & echo $!"]);
    let child = outcome.expect_status(0).stdout.clone();
    exec(&["sh", "-c", &format!("while [ ! -e /tmp/later ]; do sleep 1; done; kill -0 {}", child.trim())])
        .expect_status(0);
    run(user.run(&["--name", "one"]).arg("true"))
        .expect_status(2)
        .expect_stderr("there is a guest named one already");
    run(user.command("exec").args(["two", "true"])).expect_status(2).expect_stderr("no guest named two");
    // Many at once, each with its own.
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
        started.finish_within(PATIENCE).expect_status(number);
    }
    guest.go_on();
    guest.expect("end");
}

#[test]
fn what_exec_cannot_run_has_the_status_of_shells() {
    let user = User::new();
    let mut guest =
        Conversation::start(user.run(&["--name", "one"]).args(["sh", "-c", "echo ready; read -r line"]));
    guest.expect("ready");
    let exec = |arguments: &[&str], status: i32, text: &str| {
        let outcome = run(user.command("exec").arg("one").args(arguments));
        outcome.expect_status(status).expect_stderr(text);
        assert_eq!((outcome.stdout.as_str(), outcome.stderr.lines().count()), ("", 1), "{outcome}");
    };
    exec(&["nothing"], 127, "nothing: not found");
    exec(&["/etc/data"], 126, "/etc/data: cannot execute");
    exec(&["/etc"], 126, "/etc: cannot execute");
    exec(&["-w", "/etc/data", "true"], 126, "cannot enter the working directory");
    let make = "cd /bin; printf '#!/bin/no-shell -x\\n' > script; printf x | dd of=busybox2 2> /dev/null; \
                chmod +x script busybox2";
    run(user.command("exec").args(["one", "sh", "-c", make])).expect_status(0);
    exec(&["script"], 127, "script: interpreter /bin/no-shell not found");
    exec(&["/bin/script"], 127, "/bin/script: interpreter /bin/no-shell not found");
    exec(&["busybox2"], 126, "busybox2: cannot execute");
    guest.go_on();
}

#[test]
fn a_guest_that_dies_in_the_middle_of_exec_is_said() {
    let user = User::new();
    let mut guest =
        Conversation::start(user.run(&["--name", "one"]).args(["sh", "-c", "echo ready; read -r line"]));
    guest.expect("ready");
    let mut child =
        Conversation::start(user.command("exec").args(["one", "sh", "-c", "echo here; sleep 1000"]));
    child.expect("here");
    guest.signal(libc::SIGKILL);
    assert_eq!(
        child.expect_end("exit status: 125").lines().collect::<Vec<_>>(),
        ["kindling: the guest ended, or its agent hung up, before the process had ended"]
    );
    // The payload's end is the guest's, whoever else runs in it.
    let user = User::new();
    let mut guest =
        Conversation::start(user.run(&["--name", "one"]).args(["sh", "-c", "echo ready; read -r line"]));
    guest.expect("ready");
    let mut child =
        Conversation::start(user.command("exec").args(["one", "sh", "-c", "echo here; sleep 1000"]));
    child.expect("here");
    guest.go_on();
    guest.expect_status(0);
    child.expect_status(125);
}

/// Whoever connects and does not say what for, or leaves before there is a process, takes nobody's place.
#[test]
fn who_connects_for_nothing_takes_no_place() {
    const MANY: u64 = 300;
    let user = User::new();
    let mut guest =
        Conversation::start(user.run(&["--name", "one"]).args(["sh", "-c", "echo ready; read -r line"]));
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
    // With its streams still there, and without its control.
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
    guest.go_on();
    guest.expect_status(0);
}

/// A reader that does not read stops its own writer and nothing else, and memory stays where it is.
#[test]
fn a_reader_that_waits_stops_one_writer() {
    let user = User::new();
    let mut guest =
        Conversation::start(user.run(&["--name", "still"]).args(["sh", "-c", "echo ready; read -r line"]));
    guest.expect("ready");
    let mut stuck = user.command("exec").args(["still", "yes"]).stdout(Stdio::piped()).spawn().unwrap();
    let exec = |script: &str| run(user.command("exec").args(["still", "sh", "-c", script]));
    // The writer sleeps in its pipe in the end, and others are served all the same.
    exec("while ! grep -q '^State:.S' /proc/$(pidof yes)/status; do :; done").expect_status(0);
    let before = guest.rss_kib();
    for _ in 0..5 {
        exec("head -c 1000000 /dev/zero").expect_status(0);
    }
    assert!(guest.rss_kib() < before + 1024, "{} KiB, then {}", before, guest.rss_kib());
    signal(&stuck, libc::SIGKILL);
    let _ = stuck.wait();
    guest.go_on();
}

#[expect(unsafe_code, reason = "kill has no safe wrapper in std")]
fn signal(child: &std::process::Child, number: i32) {
    let pid = i32::try_from(child.id()).expect("a process id");
    // SAFETY: kill has no memory effects; the process is our child and not yet waited for.
    unsafe { libc::kill(pid, number) };
}

#[test]
fn networks_volumes_and_kernels_that_are_not_there_are_named() {
    let user = User::new();
    let refused = |options: &[&str], words: &str| {
        let outcome = run(user.run(options).arg("true").env("XDG_DATA_HOME", user.folder()));
        outcome.expect_status(2).expect_stderr(words);
        assert_eq!(outcome.stderr.lines().count(), 1, "{outcome}");
        assert!(user.is_tidy());
    };
    refused(&["--net", "none", "-p", "8080:80"], "--net none says that there is none");
    refused(&["--network", "host"], "there is no network \"host\": --net user reaches");
    refused(
        &["-v", "data:/a", "-v", "data:/b"],
        "--volume data:/b: this volume is mounted elsewhere already",
    );
    let nowhere = run(user.run(&[]).arg("true").env("KINDLING_IMAGE", "/nowhere"));
    nowhere.expect_status(2).expect_stderr("KINDLING_IMAGE is /nowhere, where there is no image.json");
    let outcome = run(user.run(&["-w", "/etc/data/x"]).arg("true"));
    outcome
        .expect_status(126)
        .expect_stderr("cannot enter the working directory /etc/data/x: not a directory");
}

/// The first run of a size boots a kernel for later ones, which takes a while.
#[test]
fn who_does_not_want_to_wait_for_a_kernel_leaves_nothing() {
    let user = User::new();
    let cache = user.folder().join("cache");
    let mut command = user.run(&["--name", "one"]);
    let started = start(command.arg("true").env("XDG_CACHE_HOME", &cache));
    // Its folder is the last that is made before.
    let kernels = cache.join("kindling/kernels");
    let is_begun = || {
        let inner = std::fs::read_dir(&kernels).ok().and_then(|mut kernels| kernels.next()?.ok());
        inner.is_some_and(|kernel| kernel.path().join("preboot").is_dir())
    };
    let begin = std::time::Instant::now();
    while !is_begun() {
        assert!(begin.elapsed() < PATIENCE, "no kernel is booted");
        std::thread::yield_now();
    }
    started.signal(libc::SIGINT);
    started.finish_within(PATIENCE).expect_status(128 + libc::SIGINT);
    assert!(user.is_tidy());
    let preboot = std::fs::read_dir(&kernels).unwrap().next().unwrap().unwrap().path().join("preboot");
    assert_eq!(std::fs::read_dir(preboot).unwrap().count(), 0);
}

/// A folder above the program may be one where anybody makes folders.
#[test]
fn a_kernel_of_somebody_else_is_not_run() {
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
    assert!(words.contains("there is no kernel to run it on"), "{words}");
}

#[test]
fn a_dead_guests_folder_says_so() {
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
