//! `kindling snapshot` and `kindling restore`: guests that continue, and others that continue from where they were saved.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use tests::guest_console::GuestConsole;
use tests::spare::wait_for;
use tests::user::{SmallTmpfs, User};
use tests::{Outcome, TIMEOUT, run, start};

/// A user, and where the snapshots are.
struct Owner(User);

impl Owner {
    fn new() -> Self {
        Self(User::new())
    }

    /// Starts the guest `one` in the background, and waits until it is ready.
    fn with_guest(options: &[&str], script: &str) -> Self {
        let this = Self::new();
        let mut command = this.0.run(&[&["-d", "--name", "one", "--memory", "64"], options].concat());
        run(command.args(["sh", "-c", script])).expect_status(0);
        wait_for("the guest is not ready", || this.logs("one").stdout.contains("ready").then_some(()));
        this
    }

    fn folder(&self) -> PathBuf {
        self.0.folder().join("saved")
    }

    fn snapshot(&self, name: &str) -> Outcome {
        run(self.0.command("snapshot").arg(name).arg(self.folder()))
    }

    fn restore(&self, options: &[&str]) -> Command {
        let mut command = self.0.command("restore");
        command.args(options).arg(self.folder());
        command
    }

    fn exec(&self, name: &str, script: &str) -> Outcome {
        run(self.0.command("exec").args([name, "sh", "-c", script]))
    }

    fn logs(&self, name: &str) -> Outcome {
        run(self.0.command("logs").arg(name))
    }

    fn state(&self, name: &str) -> String {
        let view = run(self.0.command("inspect").arg(name)).stdout;
        let state = view.split("\"state\": \"").nth(1).unwrap_or_default();
        state.split('"').next().unwrap_or_default().to_owned()
    }

    fn end(self, names: &[&str]) {
        run(self.0.command("rm").arg("-f").args(names)).expect_status(0);
        assert!(self.0.has_no_guests());
    }
}

/// A command with a state of its own: it answers each line with the number of lines so far, and ends as the line says.
const COUNTER: &str = "mkfifo /ask; exec 3<>/ask; echo ready; i=0; while read line <&3; do i=$((i+1)); echo $line $i; \
                       echo $line $i >>/answers; [ $line = end ] && exit $i; done";

#[test]
fn a_guest_continues_and_its_snapshot_continues_in_others() {
    for options in [&[][..], &["--cpus", "2"], &["--jail", "full"], &["--jail", "off", "--spare"]] {
        let owner = Owner::with_guest(options, COUNTER);
        let ask = |name: &str, word: &str, answer: &str| {
            owner.exec(name, &format!("echo {word} >/ask")).expect_status(0);
            wait_for("no answer in the log", || owner.logs(name).stdout.contains(answer).then_some(()));
        };
        ask("one", "before", "before 1");
        owner.exec("one", "sleep 1000 >/dev/null 2>&1 & echo $! >/sleeper").expect_status(0);
        let outcome = owner.snapshot("one");
        assert_eq!(outcome.expect_status(0).stdout, format!("{}\n", owner.folder().display()), "{outcome}");
        // The guest is as before.
        ask("one", "after", "after 2");
        assert_eq!(
            owner.exec("one", "kill -0 $(cat /sleeper) && cat /answers").stdout,
            "before 1\nafter 2\n"
        );
        // Others continue from the snapshot, also after the guest has ended.
        for name in ["two", "three"] {
            let outcome = run(&mut owner.restore(&["-d", "--name", name, "--jail", "require"]));
            assert_eq!(outcome.expect_status(0).stdout, format!("{name}\n"), "{outcome}");
            ask(name, "restored", "restored 2");
            let alive = owner.exec(name, "kill -0 $(cat /sleeper) && cat /answers; hostname");
            assert_eq!(alive.expect_status(0).stdout, format!("before 1\nrestored 2\n{name}\n"), "{alive}");
            assert!(!owner.logs(name).stdout.contains("before"), "output of the other guest");
        }
        run(owner.0.command("kill").arg("one")).expect_status(0);
        owner.exec("two", "echo end >/ask");
        assert_eq!(run(owner.0.command("wait").arg("two")).status, Some(3));
        let list = run(&mut owner.0.command("ps")).stdout;
        assert!(list.contains("three") && list.contains("mkfifo"), "{list}");
        owner.end(&["one", "two", "three"]);
    }
}

#[test]
fn a_suspended_guest_ends_and_continues_later() {
    let owner = Owner::with_guest(&[], COUNTER);
    owner.exec("one", "echo before >/ask").expect_status(0);
    wait_for("no answer", || owner.logs("one").stdout.contains("before 1").then_some(()));
    for round in 2..4 {
        let target = owner.0.folder().join(format!("saved{round}"));
        run(owner.0.command("suspend").arg("one").arg(&target)).expect_status(0);
        assert_eq!(owner.state("one"), "exited");
        run(owner.0.command("rm").arg("one")).expect_status(0);
        let mut restore = owner.0.command("restore");
        run(restore.args(["-d", "--name", "one"]).arg(&target)).expect_status(0);
        owner.exec("one", "echo again >/ask").expect_status(0);
        let answer = format!("again {round}");
        wait_for("no answer", || owner.logs("one").stdout.contains(&answer).then_some(()));
    }
    // Without space, the guest runs on.
    let Some(_mount) = SmallTmpfs::at(&owner.0.folder().join("small")) else { return };
    let target = owner.0.folder().join("small/saved");
    run(owner.0.command("suspend").arg("one").arg(&target)).expect_status(125);
    assert_eq!(owner.state("one"), "running");
    // Without the snapshot that it continues from, whose root filesystem it has.
    fs::remove_dir_all(owner.0.folder().join("saved3")).unwrap();
    owner.snapshot("one").expect_status(125).expect_stderr("cannot keep the root filesystem");
    owner.exec("one", "echo end >/ask");
    assert_eq!(run(owner.0.command("wait").arg("one")).status, Some(4));
    owner.end(&["one"]);
}

#[test]
fn restored_guests_are_individuals() {
    let owner =
        Owner::with_guest(&[], "head -c 16 /dev/urandom >/dev/null; mkfifo /ask; echo ready; read x </ask");
    owner.snapshot("one").expect_status(0);
    let draw = "cat /proc/sys/kernel/random/uuid; head -c 16 /dev/urandom | od -An -tx1; cat /run/kindling/copy_id; \
                cat /proc/sys/kernel/random/boot_id";
    let mut drawn = vec![owner.exec("one", draw).expect_status(0).stdout.clone()];
    for name in ["two", "three"] {
        run(&mut owner.restore(&["-d", "--name", name])).expect_status(0);
        let outcome = owner.exec(name, &format!("{draw}; date +%s >/now"));
        drawn.push(outcome.expect_status(0).stdout.clone());
    }
    for line in 0..4 {
        let mut values: Vec<_> = drawn.iter().map(|all| all.lines().nth(line).unwrap()).collect();
        values.sort_unstable();
        values.dedup();
        assert_eq!(values.len(), 3, "line {line}: {drawn:?}");
    }
    owner.end(&["one", "two", "three"]);
}

#[test]
fn a_restored_command_in_the_foreground_has_input_output_and_status() {
    let owner = Owner::new();
    let script = "echo ready; read a; echo got $a; read b; echo and $b >&2; exit 7";
    let mut guest = GuestConsole::start(owner.0.run(&["-i", "--name", "one"]).args(["sh", "-c", script]));
    guest.expect("ready");
    owner.snapshot("one").expect_status(0);
    for _ in 0..2 {
        let mut restored = GuestConsole::start(&mut owner.restore(&["-i"]));
        restored.send_line();
        restored.expect("got");
        restored.send_line();
        restored.expect_status(7);
    }
    guest.send_line();
    guest.expect("got");
    guest.send_line();
    guest.expect_status(7);
    assert!(owner.0.has_no_guests());
}

#[test]
fn what_cannot_be_saved_or_restored_is_named() {
    let owner = Owner::with_guest(&[], COUNTER);
    owner.snapshot("other").expect_status(2).expect_stderr("no guest named other");
    run(owner.0.command("pause").arg("one")).expect_status(0);
    owner.snapshot("one").expect_status(2).expect_stderr("the guest one is paused");
    run(owner.0.command("resume").arg("one")).expect_status(0);
    let mut with_volume = owner.0.run(&["-d", "--name", "two", "-v", "data:/data"]);
    run(with_volume.args(["sleep", "1000"])).expect_status(0);
    owner.snapshot("two").expect_status(2).expect_stderr("the guest two cannot be saved: it has volumes");
    run(&mut owner.restore(&[])).expect_stderr("cannot open");
    assert!(!owner.folder().exists());
    owner.snapshot("one").expect_status(0);
    owner.snapshot("one").expect_status(2).expect_stderr("saved exists already");
    run(owner.restore(&[]).args(["--memory", "64"])).expect_status(2);
    // A damaged snapshot.
    let memory = owner.folder().join("memory");
    let file = fs::File::options().write(true).open(&memory).unwrap();
    file.set_len(1 << 20).unwrap();
    run(&mut owner.restore(&[])).expect_stderr("it ends before its last page");
    owner.end(&["one", "two"]);
}

/// The guest continues, and no file remains.
#[test]
fn a_snapshot_that_fails_leaves_the_guest_alone() {
    let owner = Owner::with_guest(&["--cpus", "2"], COUNTER);
    let Some(_mount) = SmallTmpfs::at(&owner.0.folder().join("small")) else { return };
    let target = owner.0.folder().join("small/saved");
    let full = run(owner.0.command("snapshot").arg("one").arg(&target));
    full.expect_status(125).expect_stderr("No space left on device");
    assert_eq!(fs::read_dir(target.parent().unwrap()).unwrap().count(), 0);
    // Commands that are killed at different points. On one processor, a yield lets them and the guest run.
    for yields in 0..20 {
        let snapshot = start(owner.0.command("snapshot").arg("one").arg(owner.folder()));
        (0..20 * yields).for_each(|_| std::thread::yield_now());
        snapshot.signal(9);
        let _ = snapshot.finish_within(TIMEOUT);
        let _ = fs::remove_dir_all(owner.folder());
        owner.exec("one", "echo word >/ask").expect_status(0);
    }
    wait_for("no answer", || owner.logs("one").stdout.contains("word 20").then_some(()));
    let names = fs::read_dir(owner.0.folder()).unwrap().map(|entry| entry.unwrap().file_name());
    assert!(names.into_iter().all(|name| name == "kindling" || name == "small" || name == "data"));
    owner.snapshot("one").expect_status(0);
    owner.end(&["one"]);
}
