//! Real programs from container images: one image per program, built from Debian packages
//! (`xtask/test-images/build.sh`). Resource exhaustion in a guest does not affect the host or other guests.

use std::fs::{self, Permissions};
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use tests::guest_console::GuestConsole;
use tests::network::{enter_host_network, pattern, with_network_programs};
use tests::terminal::Terminal;
use tests::user::{SmallTmpfs, User, expect_echo};
use tests::{Outcome, run, start, testbed};

fn images() -> PathBuf {
    let folder = std::env::var_os("KINDLING_TEST_IMAGES");
    folder.expect("KINDLING_TEST_IMAGES is not set: these tests are run by `cargo xtask test`").into()
}

/// `kindling run OPTIONS IMAGE`, with an image that has been converted.
fn program(user: &User, options: &[&str], image: &str) -> Command {
    let mut command = user.command("run");
    command.args(options).arg(format!("{}/layout:{image}", images().display()));
    command.env("KINDLING_CACHE", images().join("cache"));
    command
}

/// Runs a command of a user to its end.
#[track_caller]
fn kindling(user: &User, arguments: &[&str]) -> Outcome {
    run(user.command(arguments[0]).args(&arguments[1..]))
}

/// Runs a command with a script on standard input.
#[track_caller]
fn from_stdin(command: &mut Command, script: &str) -> Outcome {
    let mut started = start(command.stdin(Stdio::piped()));
    started.child.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
    started.finish_within(tests::TIMEOUT)
}

#[test]
fn busybox_runs_the_default_command_of_its_image() {
    let user = User::new();
    let outcome = from_stdin(&mut program(&user, &[], "busybox"), "echo hello; exit 3");
    assert_eq!(outcome.expect_status(3).stdout, "hello\n");
    assert!(user.has_no_guests());
}

/// A start of an unchanged image does not execute the converter.
#[test]
fn an_image_that_has_not_changed_is_not_looked_up_again() {
    let user = User::new();
    let (programs, log) = (user.folder().join("programs"), user.folder().join("log"));
    fs::create_dir(&programs).unwrap();
    symlink(testbed("kindling-vmm"), programs.join("kindling-vmm")).unwrap();
    let converter = programs.join("kindling-oci");
    let script = format!(
        "#!/bin/sh\necho run >> {}\nexec {} \"$@\"\n",
        log.display(),
        testbed("kindling-oci").display()
    );
    fs::write(&converter, script).unwrap();
    fs::set_permissions(&converter, Permissions::from_mode(0o755)).unwrap();
    let layout = user.folder().join("image");
    copy_documents(&images().join("layout"), &layout);
    let runs_after = |options: &[&str]| {
        let mut command = user.command("run");
        command.args(options).arg(format!("{}:busybox", layout.display())).args(["echo", "hello"]);
        command.env("KINDLING_CACHE", images().join("cache")).env("KINDLING_PROGRAMS", &programs);
        assert_eq!(run(&mut command).expect_status(0).stdout, "hello\n");
        fs::read_to_string(&log).unwrap().lines().count()
    };
    assert_eq!(runs_after(&[]), 1);
    // What was written just before a request might change again within the same tick of the clock.
    let known = (1..20).find(|&count| runs_after(&[]) == count).unwrap();
    assert_eq!(runs_after(&["--user", "1"]), known + 1);
    assert_eq!(runs_after(&["--pull", "always"]), known + 2);
    fs::write(layout.join("index.json"), fs::read(layout.join("index.json")).unwrap()).unwrap();
    assert_eq!(runs_after(&[]), known + 3);
}

/// Copies the documents of a layout, without its layers, which have been converted.
fn copy_documents(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let (to, metadata) = (to.join(entry.file_name()), entry.metadata().unwrap());
        if metadata.is_dir() {
            copy_documents(&entry.path(), &to);
        } else if metadata.len() < 1 << 16 {
            fs::copy(entry.path(), to).unwrap();
        }
    }
}

#[test]
fn python_reads_a_script_from_stdin_and_prints_its_traceback_to_stderr() {
    let user = User::new();
    let outcome = from_stdin(&mut program(&user, &[], "python"), "print('out')\nraise ValueError('no')\n");
    assert_eq!(outcome.expect_status(1).stdout, "out\n");
    assert_eq!(
        outcome.stderr,
        "Traceback (most recent call last):\n  File \"<stdin>\", line 2, in <module>\nValueError: no\n"
    );
}

/// The session shown in README.md has the documented output.
#[test]
fn the_session_in_the_readme_has_the_documented_output() {
    const README: &str = include_str!("../../README.md");
    const COMMAND: &str = " | kindling run ./images:python";
    let (user, mut runs) = (User::new(), 0);
    let block = README.split("```text\n").find(|block| block.contains(COMMAND)).unwrap();
    let session = block.split("```").next().unwrap();
    for shown in session.split("$ echo '").skip(1) {
        let (script, rest) = shown.split_once('\'').unwrap();
        let expected = rest.strip_prefix(COMMAND).unwrap().strip_prefix('\n').unwrap();
        let outcome = from_stdin(&mut program(&user, &[], "python"), script);
        assert_eq!(outcome.stdout.clone() + &outcome.stderr, expected, "{outcome}");
        runs += 1;
    }
    assert_eq!(runs, 2);
}

#[test]
fn python_has_threads_processes_shared_memory_names_and_limits() {
    let script = r#"
import ctypes, mmap, multiprocessing, os, resource, socket, subprocess, threading
from multiprocessing import shared_memory

def square(number):
    return number * number

if __name__ == "__main__":
    found = []
    threads = [threading.Thread(target=lambda number=number: found.append(number)) for number in range(20)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    print("threads", sum(found))
    with multiprocessing.Pool(3) as pool:
        print("processes", pool.map(square, range(5)))
    memory = shared_memory.SharedMemory(create=True, size=1 << 20)
    memory.buf[0] = 7
    other = shared_memory.SharedMemory(memory.name)
    print("shared", other.buf[0])
    other.close(); memory.close(); memory.unlink()
    print("names", socket.gethostbyname("localhost"), socket.gethostname(), open("/etc/hostname").read().strip())
    socket.gethostbyname(socket.gethostname())
    print("user", os.getuid(), os.environ["HOME"], os.getcwd(), oct(os.umask(0)))
    print("descriptors", *resource.getrlimit(resource.RLIMIT_NOFILE))
    sparse = mmap.mmap(-1, 16 << 30, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    sparse[8 << 30] = 7
    print("sparse", sparse[8 << 30], sparse[0])
    queues = ctypes.CDLL("librt.so.1", use_errno=True)
    queues.mq_open.restype = ctypes.c_int
    print("queue", queues.mq_open(b"/queue", os.O_CREAT | os.O_RDWR, 0o600, None) >= 0, os.listdir("/dev/mqueue"))
    socket.socket().bind(("", 80))
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP)
    if os.path.exists("/usr/bin/su"):
        print(subprocess.run(["su", "nobody"], stdin=subprocess.DEVNULL, capture_output=True).returncode)
    print(subprocess.run(["greet"], check=True, capture_output=True, text=True).stdout, end="")
"#;
    let user = User::new();
    let options = ["--name", "box", "-u", "www-data"];
    let outcome = from_stdin(&mut program(&user, &options, "python"), script);
    assert_eq!(
        outcome.expect_status(0).stdout,
        "threads 190\nprocesses [0, 1, 4, 9, 16]\nshared 7\nnames 127.0.0.1 box box\n\
         user 33 /var/www / 0o22\ndescriptors 1024 524288\nsparse 7 0\nqueue True ['queue']\n1\nhello from a wheel\n",
        "{outcome}"
    );
    assert_eq!(outcome.stderr, "");
}

/// Entrypoints with gosu, su-exec or setpriv do this.
#[test]
fn a_program_that_drops_privileges_can_open_its_streams_by_name() {
    let user = User::new();
    let script = "import os; os.setgid(33); os.setuid(33); print(open('/dev/stdin').readline(), end=''); \
                  open('/dev/stderr', 'w').write('error'); open('/dev/stdout', 'w').write('out')";
    let outcome = from_stdin(program(&user, &[], "python").args(["python3", "-uc", script]), "in\n");
    assert_eq!((outcome.expect_status(0).stdout.as_str(), outcome.stderr.as_str()), ("in\nout", "error"));
}

#[test]
fn python_echoes_every_byte_of_its_input() {
    let user = User::new();
    let bytes = pattern(4 << 20);
    let script = "import sys, shutil; shutil.copyfileobj(sys.stdin.buffer, sys.stdout.buffer)";
    expect_echo(program(&user, &[], "python").args(["python3", "-c", script]), &bytes);
}

/// SQLite refuses to write if the inode number of the path differs from that of the open file. `KINDLING_ROUNDS` sets
/// the number of rounds; the default is one.
#[test]
fn three_processes_write_one_sqlite_database_in_a_shared_folder() {
    const SCRIPT: &str = r#"
import multiprocessing, sqlite3

def write(number):
    database = sqlite3.connect("/data/db", timeout=60, isolation_level=None)
    for count in range(100):
        database.execute("INSERT INTO t VALUES (?, ?)", (number, count))

if __name__ == "__main__":
    database = sqlite3.connect("/data/db", isolation_level=None)
    print(database.execute("PRAGMA journal_mode=WAL").fetchone()[0])
    database.execute("CREATE TABLE IF NOT EXISTS t (process, count)")
    processes = [multiprocessing.Process(target=write, args=(number,)) for number in range(3)]
    [process.start() for process in processes]
    [process.join() for process in processes]
    print([process.exitcode for process in processes], database.execute("SELECT COUNT(*) FROM t").fetchone()[0])
"#;
    let user = User::new();
    let data = tempfile::tempdir().unwrap();
    for round in 1..=tests::rounds(1) {
        let folder = format!("{}:/data", data.path().display());
        let outcome = from_stdin(&mut program(&user, &["-v", &folder], "python"), SCRIPT);
        let expected = format!("wal\n[0, 0, 0] {}\n", 300 * round);
        assert_eq!(outcome.expect_status(0).stdout, expected, "round {round}: {outcome}");
        tests::print_progress(&format!("round {round}"));
    }
}

#[test]
fn node_runs_worker_threads() {
    let user = User::new();
    let script = "const { Worker } = require('worker_threads'); let sum = 0; \
        for (let n = 1; n <= 3; n++) \
            new Worker(`require('worker_threads').parentPort.postMessage(${n} * 7)`, { eval: true }) \
                .on('message', (value) => { sum += value; if (sum === 42) console.log('hello', sum); }); \
        process.exitCode = 5;";
    let outcome = from_stdin(&mut program(&user, &["-m", "1024"], "node"), script);
    assert_eq!((outcome.expect_status(5).stdout.as_str(), outcome.stderr.as_str()), ("hello 42\n", ""));
}

/// Like the official image, this one logs to the standard streams and has its own stop signal.
#[test]
fn nginx_serves_a_page_logs_the_request_and_stops_gracefully() {
    enter_host_network();
    let user = User::new();
    let mut server = with_network_programs(program(&user, &["-d", "--name", "web", "-p", "80"], "nginx"));
    // Messages go to standard error, which nginx opens by name.
    server.args(["nginx", "-g", "daemon off; error_log /dev/stderr notice;"]);
    run(&mut server).expect_status(0);
    let port = assigned_port(&user, "web");
    let curl = |options: &[&str], path: &str| {
        let url = format!("http://127.0.0.1:{port}/{path}");
        run(with_network_programs(Command::new("curl")).arg("-sSf").args(options).arg(&url))
    };
    // passt accepts connections before the guest listens.
    let retry = ["--retry", "60", "--retry-delay", "1", "--retry-all-errors"];
    let page = curl(&retry, "index.html");
    assert!(page.expect_status(0).stdout.ends_with("a page of nginx\n"), "{page}");
    curl(&[], "absent").expect_status(22);
    assert!(kindling(&user, &["inspect", "web"]).stdout.contains("\"stop_signal\": 3"), "SIGQUIT");
    kindling(&user, &["stop", "web"]).expect_status(0);
    // A guest that was killed would have status 137.
    kindling(&user, &["wait", "web"]).expect_status(0);
    let log = kindling(&user, &["logs", "web"]);
    let (pages, errors) = (&log.expect_status(0).stdout, &log.stderr);
    assert!(pages.contains("\"GET /index.html HTTP/1.1\" 200 16 "), "{log}");
    assert!(
        errors.contains("signal 3 (SIGQUIT) received") && errors.contains("gracefully shutting down"),
        "{log}"
    );
    kindling(&user, &["rm", "web"]).expect_status(0);
    assert!(user.has_no_guests());
}

/// The port of the host that was assigned to port 80 of a guest, which publishes no other.
fn assigned_port(user: &User, name: &str) -> u16 {
    let port = kindling(user, &["port", name, "80"]);
    let address = port.expect_status(0).stdout.trim_end();
    let number = address.strip_prefix("0.0.0.0:").and_then(|port| port.parse().ok());
    assert_eq!(kindling(user, &["port", name]).stdout, format!("80/tcp -> {address}\n"));
    assert!(kindling(user, &["ps"]).stdout.contains(&format!("  {address}->80/tcp\n")), "{address}");
    kindling(user, &["port", name, "80/udp"]).expect_status(2).expect_stderr("does not publish 80/udp");
    number.unwrap_or_else(|| panic!("{address:?} is not a port of all addresses"))
}

/// Waits until PostgreSQL in the guest `db` accepts connections.
#[track_caller]
fn expect_database(user: &User) {
    let mut guest = GuestConsole::start(user.command("exec").args([
        "db",
        "sh",
        "-c",
        "until pg_isready; do sleep 1; done; echo ready; cat",
    ]));
    guest.expect("ready");
}

#[track_caller]
fn sql(user: &User, statement: &str) -> String {
    kindling(user, &["exec", "db", "psql", "-At", "-c", statement]).expect_status(0).stdout.clone()
}

#[test]
fn postgres_keeps_committed_data_when_its_guest_is_stopped_or_killed() {
    let user = User::new();
    let start = || {
        let options = ["-d", "--rm", "--name", "db", "-v", "data:/var/lib/postgresql/data"];
        run(&mut program(&user, &options, "postgres")).expect_status(0);
        expect_database(&user);
    };
    start();
    assert_eq!(
        sql(&user, "create table words (word text); insert into words values ('one')"),
        "CREATE TABLE\nINSERT 0 1\n"
    );
    assert_eq!(kindling(&user, &["stop", "--time", "60", "db"]).expect_status(0).stdout, "db\n");
    start();
    assert_eq!(sql(&user, "insert into words values ('two') returning word"), "two\nINSERT 0 1\n");
    // Kills the machine without notice.
    kindling(&user, &["kill", "db"]).expect_status(0);
    start();
    assert_eq!(sql(&user, "select string_agg(word, ' ') from words"), "one two\n");
    let owner = kindling(&user, &["exec", "db", "sh", "-c", "whoami; stat -c %U:%a $PGDATA"]);
    assert_eq!(owner.expect_status(0).stdout, "postgres\npostgres:700\n");
    kindling(&user, &["kill", "db"]).expect_status(0);
}

/// Debian's container engine needs namespaces, cgroups, an overlay, a bridge, and address translation.
#[test]
fn podman_runs_a_container_in_a_guest() {
    let user = User::new();
    let script = "tar -C /srv/container -c . | podman import -q - inner > /dev/null\n\
        podman run --rm --memory 64m --pids-limit 50 --hostname box inner sh -c '\n\
            hostname; id -u; cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/pids.max'\n\
        podman run -d -p 8080:80 inner sh -c 'echo published > /page && exec httpd -f -p 80 -h /' > /dev/null\n\
        podman run --rm inner sh -c 'until wget -q -O - http://10.88.0.1:8080/page; do :; done'";
    let options = ["-v", "data:/var/lib/containers"];
    let outcome = run(program(&user, &options, "podman").args(["sh", "-ec", script]));
    assert_eq!(outcome.expect_status(0).stdout, "box\n0\n67108864\n50\npublished\n", "{outcome}");
}

#[test]
fn bubblewrap_creates_a_sandbox_without_root() {
    let user = User::new();
    let sandbox = ["bwrap", "--unshare-all", "--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev"];
    let mut command = program(&user, &["-u", "1000"], "podman");
    let outcome = run(command.args(sandbox).args(["sh", "-c", "id -u; echo $$"]));
    assert_eq!(outcome.expect_status(0).stdout, "1000\n2\n", "{outcome}");
}

/// A second guest, which must stay responsive.
struct Neighbour(GuestConsole);

impl Neighbour {
    fn new(user: &User) -> Self {
        let script = "echo ready; while read -r line; do echo $line; done";
        let mut guest = GuestConsole::start(user.run(&["--memory", "64"]).args(["sh", "-c", script]));
        guest.expect("ready");
        Self(guest)
    }

    #[track_caller]
    fn expect_response(&mut self) {
        self.0.send_line();
        self.0.expect("on");
    }
}

#[test]
fn a_fork_bomb_affects_only_its_own_guest() {
    let user = User::new();
    let mut neighbour = Neighbour::new(&user);
    let bomb = "echo ready; read -r line; bomb() { bomb | bomb & }; bomb; sleep 1000";
    let mut guest =
        GuestConsole::start(user.run(&["--name", "bomb", "--memory", "64"]).args(["sh", "-c", bomb]));
    guest.expect("ready");
    let before = guest.rss_kib();
    guest.send_line();
    guest.wait_until("the fork bomb uses memory", |guest| guest.rss_kib() > before + (12 << 10));
    neighbour.expect_response();
    assert!(guest.rss_kib() < 96 << 10, "{} KiB", guest.rss_kib());
    kindling(&user, &["kill", "bomb"]).expect_status(0);
    neighbour.expect_response();
}

#[test]
fn a_program_that_exhausts_memory_is_the_only_one_killed() {
    let user = User::new();
    let mut neighbour = Neighbour::new(&user);
    let script =
        "import sys\nprint('ready', flush=True)\nall = []\nwhile True: all.append(bytearray(1 << 20))";
    let outcome = run(program(&user, &["--memory", "128"], "python").args(["python3", "-c", script]));
    outcome.expect_status(128 + libc::SIGKILL);
    assert_eq!((outcome.stdout.as_str(), outcome.stderr.as_str()), ("ready\n", ""));
    // Killing another program than the payload does not end the guest.
    let mut guest = GuestConsole::start(user.run(&["--name", "hog", "--memory", "128"]).args([
        "sh",
        "-c",
        "echo ready; read -r line; echo end",
    ]));
    guest.expect("ready");
    kindling(&user, &["exec", "hog", "sh", "-c", "tail /dev/zero"]).expect_status(128 + libc::SIGKILL);
    kindling(&user, &["exec", "hog", "true"]).expect_status(0);
    guest.send_line();
    guest.expect("end");
    neighbour.expect_response();
}

#[test]
fn a_full_root_filesystem_affects_only_its_own_guest() {
    let user = User::new();
    let script = "dd if=/dev/zero of=/large bs=1M; echo $?; rm /large; echo more > /small && cat /small";
    let outcome = run(user.run(&["--memory", "128"]).args(["sh", "-c", script]));
    assert_eq!(outcome.expect_status(0).stdout, "1\nmore\n");
    outcome.expect_stderr("No space left on device");
}

/// The process that converts an image exits with the command that started it.
#[test]
fn the_conversion_of_an_image_stops_when_its_command_is_killed() {
    let user = User::new();
    let cache = user.folder().join("cache");
    let mut command = user.command("run");
    command.arg(format!("{}/layout:node", images().display())).env("XDG_CACHE_HOME", &cache);
    let mut child = command.spawn().unwrap();
    let converter = loop {
        let tasks = fs::read_to_string(format!("/proc/{0}/task/{0}/children", child.id())).unwrap();
        if let Some(child) = tasks.split_whitespace().next() {
            break child.to_owned();
        }
        std::thread::yield_now();
    };
    // The converter has started and has set its parent-death signal.
    while !cache.join("kindling/oci").exists() {
        std::thread::yield_now();
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let is_there = || {
        let stat = fs::read_to_string(format!("/proc/{converter}/stat")).unwrap_or_default();
        stat.contains("(kindling-oci) ") && !stat.contains(") Z ")
    };
    while is_there() {
        std::thread::yield_now();
    }
    assert!(files_in(&cache) < 100 << 20, "the image was converted completely");
}

#[test]
fn a_conversion_that_runs_out_of_space_leaves_no_files() {
    let scratch = tempfile::tempdir().unwrap();
    let Some(_disk) = SmallTmpfs::at(scratch.path()) else { return };
    let path = scratch.path().to_str().unwrap();
    let image = format!("{}/layout:node", images().display());
    let outcome = run(Command::new(testbed("kindling-oci")).args(["prepare", "--cache", path, &image]));
    outcome.expect_status(1).expect_stderr("the disk is full but for 5 % or 2 GiB, which is kept for others");
    assert_eq!(outcome.stderr.lines().count(), 1, "{outcome}");
    assert_eq!(files_in(scratch.path()), 0, "{outcome}");
}

/// The total size of all files below a folder.
fn files_in(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.map(|path| if path.is_dir() { files_in(&path) } else { path.metadata().unwrap().len() }).sum()
}

#[test]
fn full_screen_programs_work_on_a_terminal() {
    let user = User::new();
    let mut terminal = Terminal::open();
    terminal.resize(30, 100);
    let script = "trap 'stty size; echo resized' WINCH; stty size; echo rea''dy; read -r line; vi /tmp/f; cat /tmp/f; top";
    let mut child = terminal.start(user.run(&["-t"]).env("TERM", "vt100").args(["sh", "-c", script]));
    assert!(terminal.wait_for("ready").starts_with("30 100\r\n"));
    terminal.resize(40, 120);
    assert!(terminal.wait_for("resized").contains("40 120\r\n"));
    terminal.type_keys(b"on\n");
    // vi draws a tilde for each line after the end of the file.
    terminal.wait_for("~");
    terminal.type_keys(b"i");
    terminal.wait_for("I /tmp/f");
    terminal.type_keys(b"typed");
    terminal.wait_for("typed");
    terminal.type_keys(b"\x1b");
    terminal.wait_for("- /tmp/f");
    terminal.type_keys(b":wq\r");
    terminal.wait_for("typed\r\n");
    terminal.wait_for("Mem:");
    terminal.type_keys(b"q");
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn a_detached_guest_can_have_a_terminal() {
    let user = User::new();
    let script = "tty; stty size; echo err >&2; exit 4";
    run(user.run(&["-d", "-t", "--name", "screen"]).args(["sh", "-c", script])).expect_status(0);
    kindling(&user, &["wait", "screen"]).expect_status(4);
    let log = kindling(&user, &["logs", "screen"]);
    assert_eq!((log.expect_status(0).stdout.as_str(), log.stderr.as_str()), ("/dev/pts/0\n24 80\nerr\n", ""));
    kindling(&user, &["rm", "screen"]).expect_status(0);
}
