//! `kindling template` and `kindling run --template`: copies of a guest that was saved after a set-up.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::UNIX_EPOCH;
use tests::network::{enter_host_network, pattern, with_network_programs};
use tests::spare::{spares_of, wait_for};
use tests::user::{SmallTmpfs, User};
use tests::{Outcome, TIMEOUT, run, start, testbed};

/// A line of the report of a guest in a spare monitor.
const USED: &str = "spare machine configured";

/// A user with a template of busybox.
struct Owner(User);

impl Owner {
    /// A user with the template `t`, prepared by a shell script.
    fn with_template(options: &[&str], script: &str) -> Self {
        let this = Self(User::new());
        this.create(options, script).expect_status(0);
        this
    }

    fn create(&self, options: &[&str], script: &str) -> Outcome {
        let mut command = self.command("template");
        command.args(["create", "--memory", "64"]).args(options).arg("t").arg(testbed("busybox.erofs"));
        run(command.args(["sh", "-c", script]))
    }

    /// A command of this user, with a cache of its own, so that no other test has the same spares.
    fn command(&self, name: &str) -> Command {
        let mut command = self.0.command(name);
        command.env("XDG_CACHE_HOME", self.0.folder().join("cache"));
        command
    }

    /// Runs a shell script in a copy.
    fn copy(&self, options: &[&str], script: &str) -> Outcome {
        run(self.command("run").args(["--template", "t"]).args(options).args(["sh", "-c", script]))
    }

    fn template(&self, words: &[&str]) -> Outcome {
        run(self.command("template").args(words))
    }

    fn folder(&self) -> PathBuf {
        self.0.folder().join("data/kindling/templates")
    }

    /// The names in the directory of templates.
    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.folder()).into_iter().flatten().flatten();
        entries.map(|entry| entry.file_name().into_string().unwrap()).collect()
    }
}

#[test]
fn a_copy_continues_where_the_template_was_saved() {
    // A process that computes, one that sleeps and writes later to the set-up's output, and one that waits for the copy.
    let script = "echo prepared >/srv-file; mkfifo /fifo; while :; do i=$((i+1)); done & sleep 1000 & \
                  (read x </fifo; echo $x; echo got $x >/got) & echo output";
    let owner = Owner(User::new());
    assert_eq!(owner.create(&[], script).expect_status(0).stdout, "output\nt\n");
    let script = "cat /srv-file; pidof sleep | wc -w; echo $A; echo hello >/fifo; while [ ! -s /got ]; do :; done; \
                  cat /got; ls /sys/fs/cgroup | grep -c kindling; exit 3";
    for _ in 0..2 {
        let outcome = owner.copy(&["-e", "A=b"], script);
        assert_eq!(outcome.expect_status(3).stdout, "prepared\n1\nb\ngot hello\n0\n", "{outcome}");
        assert_eq!(outcome.stderr, "", "{outcome}");
    }
    // Without a command, it is the image's, and busybox's has none.
    let outcome = run(owner.command("run").args(["--template", "t"]));
    outcome.expect_status(2).expect_stderr("the image has no command");
    assert!(owner.0.has_no_guests());
}

/// Processes that were frozen, and those that are started in the copy, draw random numbers as their first act.
#[test]
fn copies_are_individuals() {
    let id = "0123456789abcdef0123456789abcdef";
    let setup = format!(
        "cat /proc/sys/kernel/random/boot_id /proc/sys/kernel/random/uuid >/dev/null; echo {id} >/etc/machine-id; \
         head -c 64 /dev/urandom >/dev/null; mkfifo /fifo; \
         (read x </fifo; head -c 16 /dev/urandom | od -An -tx1 >/drawn; echo done >/done) & true"
    );
    let owner = Owner::with_template(&[], &setup);
    let script = "head -c 16 /dev/urandom | od -An -tx1; cat /proc/sys/kernel/random/uuid /proc/sys/kernel/random/boot_id; \
                  cat /run/kindling/copy_id /etc/machine-id; mktemp -u; echo >/fifo; \
                  while [ ! -e /done ]; do :; done; cat /drawn; hostname; cat /etc/hostname; \
                  tail -n 1 /etc/hosts; cut -d' ' -f1 /proc/uptime; date +%s";
    let before = UNIX_EPOCH.elapsed().unwrap().as_secs();
    let spare = ["--spare", "--report"];
    let mut outcomes: Vec<_> = (0..2).map(|_| owner.copy(&[], script)).collect();
    outcomes.push(owner.copy(&spare, script));
    for _ in 0..2 {
        wait_for("there is no spare", || spares_of(owner.0.folder()).first().copied());
        let outcome = owner.copy(&spare, script);
        outcome.expect_stderr(USED);
        outcomes.push(outcome);
    }
    let all: Vec<Vec<_>> =
        outcomes.iter().map(|outcome| outcome.expect_status(0).stdout.lines().collect()).collect();
    let names = [
        "urandom",
        "uuid",
        "boot_id",
        "copy_id",
        "machine-id",
        "name",
        "urandom of a frozen process",
        "hostname",
    ];
    for (number, name) in names.into_iter().enumerate() {
        let mut values: Vec<_> = all.iter().map(|lines| lines[number]).collect();
        values.sort_unstable();
        values.dedup();
        assert_eq!(values.len(), all.len(), "{name}: {values:?}");
        assert!(!values.contains(&id) && values.iter().all(|value| value.len() >= 8), "{values:?}");
    }
    for lines in all {
        assert_eq!((lines[7], lines[9]), (lines[8], format!("127.0.1.1\t{}", lines[7]).as_str()));
        let uptime: f64 = lines[10].parse().unwrap();
        assert!(uptime < 5.0, "the guest counts {uptime} s, for which it was a file");
        let time: u64 = lines[11].parse().unwrap();
        assert!((before..before + 60).contains(&time), "{time} is not the time of the host, {before}");
    }
}

#[test]
fn what_a_copy_writes_shows_nowhere_else() {
    let owner = Owner::with_template(
        &[],
        "echo template >/file; head -c 3000000 /dev/zero >/large; cat /bin/busybox >/dev/null",
    );
    let sum = |outcome: &Outcome| outcome.expect_status(0).stdout.clone();
    let script = "cat /file; md5sum </large; md5sum </bin/busybox";
    let before = sum(&owner.copy(&[], script));
    // Files, memory and the page cache, by the guest's root.
    let script = "echo copy >/file; head -c 3000000 /dev/urandom >/large; echo x >>/bin/busybox; rm -rf /etc; sync; \
                  dd if=/dev/urandom of=/dev/pmem0 bs=4096 count=100 conv=notrunc 2>&1 | head -n 1; \
                  head -c 20000000 /dev/urandom >/dev/shm/fill; echo done";
    let outcome = owner.copy(&[], script);
    assert!(sum(&outcome).ends_with("done\n"), "{outcome}");
    assert_eq!(sum(&owner.copy(&[], "cat /file; md5sum </large; md5sum </bin/busybox")), before);
}

#[test]
fn templates_may_have_several_vcpus() {
    let owner =
        Owner::with_template(&["--cpus", "2"], "(while :; do :; done) & (while :; do :; done) & true");
    let script = "nproc; kill $(pidof sh | sed \"s/\\b$$\\b//\"); (true & true & wait); echo end";
    let first = owner.copy(&["--spare"], script);
    assert_eq!(first.expect_status(0).stdout, "2\nend\n", "{first}");
    wait_for("there is no spare", || spares_of(owner.0.folder()).first().copied());
    let second = owner.copy(&["--spare", "--report"], script);
    assert_eq!(second.expect_status(0).expect_stderr(USED).stdout, "2\nend\n", "{second}");
}

#[test]
fn copies_run_in_the_background_and_take_commands() {
    let owner = Owner::with_template(&[], "echo hello >/greeting");
    let names = ["one", "two"];
    for name in names {
        let mut command = owner.command("run");
        run(command.args(["-d", "--name", name, "--template", "t", "sleep", "1000"])).expect_status(0);
    }
    for name in names {
        let outcome = run(owner.command("exec").args([name, "sh", "-c", "cat /greeting; hostname"]));
        assert_eq!(outcome.expect_status(0).stdout, format!("hello\n{name}\n"));
    }
    // The template is not needed any more.
    assert_eq!(owner.template(&["rm", "t"]).expect_status(0).stdout, "t\n");
    let outcome = run(owner.command("exec").args(["one", "cat", "/greeting", "/bin/busybox"]));
    outcome.expect_status(0);
    run(owner.command("rm").args(["-f", "one", "two"])).expect_status(0);
    assert!(owner.names().is_empty() && owner.0.has_no_guests());
}

/// With KINDLING_ROUNDS, as many copies as the memory of the lab is enough for.
#[test]
fn many_copies_run_at_once() {
    let owner = Owner::with_template(&[], "echo hello >/greeting");
    let copies = tests::rounds(16);
    let started: Vec<_> = (0..copies)
        .map(|number| {
            let mut command = owner.command("run");
            let name = format!("copy{number}");
            start(command.args(["-d", "--rm", "--name", &name, "--template", "t", "sleep", "100000"]))
        })
        .collect();
    started.into_iter().for_each(|copy| _ = copy.finish_within(TIMEOUT).expect_status(0));
    for number in 0..copies {
        let outcome = run(owner.command("exec").args([&format!("copy{number}"), "cat", "/greeting"]));
        assert_eq!(outcome.expect_status(0).stdout, "hello\n");
    }
    let names = (0..copies).map(|number| format!("copy{number}"));
    run(owner.command("rm").arg("-f").args(names)).expect_status(0);
    assert!(owner.0.has_no_guests());
}

#[test]
fn templates_are_listed_and_removed() {
    let owner = Owner::with_template(&[], "true");
    let list = owner.template(&["ls"]);
    let line: Vec<_> = list.expect_status(0).stdout.lines().nth(1).unwrap().split_whitespace().collect();
    assert_eq!((line[0], line[2], line[4]), ("t", "64", "1"), "{list}");
    let json = owner.template(&["ls", "--json"]);
    json.expect_status(0).expect_stdout("\"memory_mib\": 64").expect_stdout("\"name\": \"t\"");
    owner.create(&[], "true").expect_status(2).expect_stderr("a template named t exists already");
    assert_eq!(owner.template(&["rm", "t", "u"]).expect_status(2).stdout, "t\n");
    assert_eq!(owner.template(&["ls"]).expect_status(0).stdout.lines().count(), 1);
    for words in [&["rm", "t"][..], &["rm", "../t"], &["create", ".t", "/image"]] {
        let outcome = owner.template(words);
        assert_eq!(outcome.expect_status(2).stderr.lines().count(), 1, "{outcome}");
    }
    owner
        .copy(&[], "true")
        .expect_status(2)
        .expect_stderr("no template named t; `kindling template ls` lists");
    assert!(owner.names().is_empty() && owner.0.has_no_guests());
}

#[test]
fn a_setup_that_fails_leaves_no_template() {
    let owner = Owner(User::new());
    let outcome = owner.create(&[], "exit 7");
    outcome.expect_status(7).expect_stderr("the command ended with status 7; no template was created");
    let outcome = owner.create(&[], "kill -KILL -1; kill -KILL $$");
    outcome.expect_status(137);
    let missing = owner.template(&["create", "t", "/nonexistent.erofs"]);
    assert_eq!(missing.expect_status(2).stderr.lines().count(), 1, "{missing}");
    let small = owner.template(&["create", "--memory", "3", "t", testbed("busybox.erofs").to_str().unwrap()]);
    small.expect_status(2).expect_stderr("a Linux guest needs at least 16 MiB");
    // A guest that hides its cgroups cannot be saved, and says so.
    let outcome = owner.create(&[], "umount /sys/fs/cgroup");
    outcome.expect_status(125).expect_stderr("the guest cannot freeze its processes");
    assert!(owner.names().is_empty() && owner.0.has_no_guests());
}

#[test]
fn options_of_another_machine_are_refused() {
    let owner = Owner::with_template(&[], "true");
    for (options, message) in [
        (&["--memory", "128"][..], "--memory and --cpus are those of the template"),
        (&["--cpus", "2"], "--memory and --cpus are those of the template"),
        (&["-v", "a:/b"], "--volume cannot be combined with a template"),
        (&["--net", "user"], "--net or --publish cannot be combined with a template"),
        (&["-p", "80"], "--net or --publish cannot be combined with a template"),
        (&["--net", "tap0"], "--net TAP cannot be combined with a template"),
        (&["--read-only"], "--read-only cannot be combined with a template"),
        (&["--cold"], "--cold cannot be combined with a template"),
        (&["--pids-limit", "9"], "--pids-limit, --disk-bps, --disk-iops or --net-bps cannot be combined"),
    ] {
        let outcome = owner.copy(options, "true");
        assert_eq!(outcome.expect_status(2).expect_stderr(message).stderr.lines().count(), 1, "{outcome}");
    }
    run(&mut owner.command("run")).expect_status(2).expect_stderr("IMAGE is missing");
    assert!(owner.0.has_no_guests());
}

#[test]
fn a_damaged_template_is_refused_by_its_name() {
    let owner = Owner::with_template(&[], "true");
    let folder = owner.folder().join("t");
    let memory = fs::File::options().read(true).write(true).open(folder.join("memory")).unwrap();
    let refused = |what: &str, message: &str| {
        let outcome = owner.copy(&[], "true");
        assert!(matches!(outcome.status, Some(2 | 125)), "{what}: {outcome}");
        assert_eq!(outcome.expect_stderr(message).stderr.lines().count(), 1, "{what}: {outcome}");
        assert!(
            outcome.stderr.contains("/t/") || outcome.stderr.contains("template t "),
            "{what}: {outcome}"
        );
    };
    let mut header = [0; 24];
    memory.read_exact_at(&mut header, 0).unwrap();
    for at in 0..header.len() {
        let mut changed = header;
        changed[at] ^= 0x40;
        memory.write_all_at(&changed, 0).unwrap();
        refused(&format!("byte {at}"), "memory");
    }
    memory.write_all_at(&header, 0).unwrap();
    owner.copy(&[], "true").expect_status(0);
    // A root filesystem that was changed, and one of the same content that is another file.
    let root = folder.join("root.erofs");
    let content = fs::read(&root).unwrap();
    fs::write(&root, &content).unwrap();
    refused("another root", "was changed; remove it with `kindling template rm`");
    fs::remove_file(&root).unwrap();
    refused("no root", "No such file");
    // A record.
    let record = fs::read_to_string(folder.join("template.json")).unwrap();
    for text in [
        "",
        "{}",
        &record[..record.len() / 2],
        &record.replace("\"mem_size_mib\": 64", "\"mem_size_mib\": -1"),
    ] {
        fs::write(folder.join("template.json"), text).unwrap();
        refused(text, "its record is invalid");
        // The others are listed.
        owner.template(&["ls"]).expect_status(2).expect_stderr("template t").expect_stdout("NAME");
    }
    owner.template(&["rm", "t"]).expect_status(0);
}

/// Each page table, register and list of the state: a guest does not start, ends, or is unharmed; its host is not.
#[test]
fn bytes_of_the_state_that_are_changed_harm_at_most_the_copy() {
    let owner = Owner::with_template(&[], "true");
    let path = owner.folder().join("t/memory");
    let memory = fs::File::options().read(true).write(true).open(path).unwrap();
    let mut length = [0; 4];
    memory.read_exact_at(&mut length, 12).unwrap();
    let length = u64::from(u32::from_le_bytes(length));
    for at in (16..16 + length).step_by(usize::try_from(length / 40).unwrap()) {
        let mut byte = [0];
        memory.read_exact_at(&mut byte, at).unwrap();
        memory.write_all_at(&[byte[0] ^ 0x5a], at).unwrap();
        let outcome = owner.copy(&["--timeout", "5"], "echo alive");
        let is_alive = outcome.status == Some(0) && outcome.stdout == "alive\n";
        assert!(is_alive || outcome.status.is_some_and(|status| status != 0), "byte {at}: {outcome}");
        assert!(
            !outcome.stderr.contains("panicked") && !outcome.stderr.contains("kindling-vmm failed"),
            "byte {at}: {outcome}"
        );
        memory.write_all_at(&byte, at).unwrap();
    }
    owner.copy(&[], "true").expect_status(0);
    assert!(owner.0.has_no_guests());
}

#[test]
fn another_template_of_the_same_name_has_no_copies_of_the_first() {
    let owner = Owner::with_template(&[], "echo first >/which");
    assert_eq!(owner.copy(&["--spare"], "cat /which").expect_status(0).stdout, "first\n");
    wait_for("there is no spare", || spares_of(owner.0.folder()).first().copied());
    owner.template(&["rm", "t"]).expect_status(0);
    owner.create(&[], "echo second >/which").expect_status(0);
    let outcome = owner.copy(&["--spare", "--report"], "cat /which");
    assert_eq!(outcome.expect_status(0).stdout, "second\n");
    assert!(!outcome.stderr.contains(USED), "{outcome}");
    // The spare of the first ends.
    wait_for("there is a spare of a template that was removed", || {
        (spares_of(owner.0.folder()).len() < 2).then_some(())
    });
}

#[test]
fn a_creation_that_is_killed_leaves_nothing() {
    let owner = Owner(User::new());
    let mut command = owner.command("template");
    command.args(["create", "--memory", "64", "t"]).arg(testbed("busybox.erofs"));
    let started = start(command.args(["sh", "-c", "echo ready >&2; sleep 1000"]));
    wait_for("no guest runs", || (!owner.0.has_no_guests()).then_some(()));
    started.signal(libc::SIGKILL);
    let _ = started.finish_within(TIMEOUT);
    // Its guest ends with it, and is not listed.
    wait_for("the guest runs on", || {
        let outcome = run(owner.command("ps").arg("-a"));
        (outcome.expect_status(0).stdout.lines().count() == 1).then_some(())
    });
    assert!(owner.names().is_empty());
}

#[test]
fn a_full_filesystem_is_reported() {
    let owner = Owner(User::new());
    let data = owner.0.folder().join("data");
    let Some(_disk) = SmallTmpfs::at(&data) else { return };
    let outcome = owner.create(&[], "true");
    outcome.expect_status(125).expect_stderr("cannot write the snapshot: No space left on device");
    assert!(owner.names().is_empty() && owner.0.has_no_guests());
    // The file of the snapshot is gone, too.
    let free = rustix::fs::statvfs(&data).unwrap();
    assert!(free.f_bfree * 100 > free.f_blocks * 95, "{} of {} blocks are free", free.f_bfree, free.f_blocks);
}

/// A server that listens when the template is saved accepts connections in each copy, which has its own passt.
#[test]
fn copies_have_a_network() {
    enter_host_network();
    let owner = Owner(User::new());
    // Also a connection to the host, which ends, and one within the guest, which does not.
    let listener = TcpListener::bind("192.0.2.1:9000").unwrap();
    let held = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        stream.write_all(b"hello\n").unwrap();
        stream.read(&mut [0])
    });
    let script = "while :; do nc -l -p 80 -e /bin/cat; done & while ! netstat -ltn | grep -q ':80 '; do sleep 0; done; \
                  mkfifo /hold; sleep 100000 >/hold & (nc 192.0.2.1 9000 </hold >/from; echo closed >/closed) & \
                  while [ ! -s /from ]; do sleep 0; done; \
                  nc -l -p 81 -e /bin/cat & while ! netstat -ltn | grep -q ':81 '; do sleep 0; done; \
                  mkfifo /in; sleep 100000 >/in & nc 127.0.0.1 81 </in >/out & \
                  while ! netstat -tn | grep -q '127.0.0.1:81 .*ESTABLISHED'; do sleep 0; done";
    let mut command = with_network_programs(owner.command("template"));
    command.args(["create", "--memory", "64", "--net", "user", "t"]).arg(testbed("busybox.erofs"));
    assert_eq!(run(command.args(["sh", "-c", script])).expect_status(0).stdout, "t\n");
    assert_eq!(held.join().unwrap().unwrap(), 0, "the host reads the end of the stream");
    let names = ["one", "two", "three"];
    for (name, options) in names.into_iter().zip([&[][..], &["--spare"], &["--spare"]]) {
        let mut command = with_network_programs(owner.command("run"));
        command.args(["-d", "--name", name, "-p", "8000-8010:80", "--template", "t"]).args(options);
        // They have other ports.
        run(command.args(["sleep", "1000"])).expect_status(0);
        if !options.is_empty() {
            wait_for("there is no spare", || spares_of(owner.0.folder()).first().copied());
        }
    }
    for name in names {
        let port = run(owner.command("port").args([name, "80"])).expect_status(0).stdout.clone();
        let mut stream = TcpStream::connect(port.trim().replace("0.0.0.0", "127.0.0.1")).unwrap();
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        let bytes = pattern(100_000);
        let (mut writer, sent) = (stream.try_clone().unwrap(), bytes.clone());
        let writer = std::thread::spawn(move || writer.write_all(&sent).unwrap());
        let mut back = vec![0; bytes.len()];
        stream.read_exact(&mut back).unwrap();
        writer.join().unwrap();
        assert!(back == bytes, "{name}");
        let script = "cat /etc/resolv.conf /etc/hosts; netstat -tn | grep -c '192.0.2.1:9000 .*ESTABLISHED'; echo data >/in; \
                      for i in 1 2 3 4 5 6 7 8 9; do [ -s /out ] || sleep 1; done; cat /out";
        let outcome = run(owner.command("exec").args([name, "sh", "-c", script]));
        let expected = format!("nameserver 10.0.2.3\n127.0.0.1\tlocalhost\n10.0.2.15\t{name}\n0\ndata\n");
        assert_eq!(outcome.expect_status(0).stdout, expected);
    }
    run(owner.command("rm").arg("-f").args(names)).expect_status(0);
    assert!(owner.0.has_no_guests());
}
