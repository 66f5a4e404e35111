//! `kindling run --spare`: a guest gets a machine that was started ahead, and leaves another. It does not notice.

use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};
use std::fs;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};
use tests::guest_console::GuestConsole;
use tests::spare::{spares_of, wait_for};
use tests::user::User;
use tests::{Outcome, TIMEOUT, kill, run, testbed};

/// A line of the report of a guest in a spare monitor.
const USED: &str = "spare machine configured";

/// A user with a cache of its own, so that no other test has the same spares.
struct Owner(User);

impl Owner {
    /// A user whose first guest has left a spare.
    fn with_spare(options: &[&str]) -> (Self, u32) {
        let this = Self(User::new());
        let outcome = run(this.run(options).arg("true"));
        outcome.expect_status(0);
        assert!(!outcome.stderr.contains(USED), "{outcome}");
        let spare = this.spare();
        (this, spare)
    }

    fn command(&self, name: &str) -> Command {
        let mut command = self.0.command(name);
        command.env("XDG_CACHE_HOME", self.0.folder().join("cache"));
        command
    }

    fn run(&self, options: &[&str]) -> Command {
        let mut command = self.command("run");
        command.args(["--spare", "--report", "--memory", "64"]).args(options).arg(testbed("busybox.erofs"));
        command
    }

    /// Runs a shell script in a spare, and waits until the next one is there.
    fn shell(&self, options: &[&str], script: &str) -> Outcome {
        let before = self.spares();
        let outcome = run(self.run(options).args(["sh", "-c", script]));
        assert!(outcome.stderr.contains(USED), "{outcome}");
        self.spare_beside(&before);
        outcome
    }

    /// The monitors of this user that wait for a front.
    fn spares(&self) -> Vec<u32> {
        spares_of(self.0.folder())
    }

    /// Waits for a spare.
    fn spare(&self) -> u32 {
        wait_for("there is no spare", || self.spares().first().copied())
    }

    /// Waits for a spare other than these, which may be for other guests.
    fn spare_beside(&self, others: &[u32]) -> u32 {
        wait_for("there is no other spare", || self.spares().into_iter().find(|pid| !others.contains(pid)))
    }

    /// Waits until the spares have ended.
    fn expect_no_spare(&self) {
        wait_for("there is a spare", || self.spares().is_empty().then_some(()));
    }
}

#[test]
fn a_guest_in_a_spare_has_its_own_configuration_and_leaves_another_spare() {
    let (owner, first) = Owner::with_spare(&[]);
    let options = ["-e", "A=b", "-w", "/srv", "-u", "7:8", "--hostname", "box"];
    let script = "echo $A; pwd; id -u; id -g; hostname; cat /etc/hostname; echo err >&2; exit 3";
    let outcome = run(owner.run(&options).args(["sh", "-c", script]));
    assert_eq!(outcome.expect_status(3).stdout, "b\n/srv\n7\n8\nbox\nbox\n", "{outcome}");
    outcome.expect_stderr(USED).expect_stderr("err\n");
    owner.spare_beside(&[first]);
    assert!(owner.0.has_no_guests());
}

#[test]
fn guests_in_spares_have_random_numbers_and_clocks_of_their_own() {
    let (owner, _) = Owner::with_spare(&[]);
    let script = "cat /proc/sys/kernel/random/uuid /proc/sys/kernel/random/boot_id; \
                  head -c 16 /dev/urandom | od -An -tx1; mktemp -u; cat /proc/uptime; date +%s";
    // A guest would notice that its machine has waited for so long.
    let made = Instant::now();
    wait_for("time stands still", || (made.elapsed() > Duration::from_secs(2)).then_some(()));
    let before = std::time::UNIX_EPOCH.elapsed().unwrap().as_secs();
    let outcomes = [(); 2].map(|()| owner.shell(&[], script).expect_status(0).stdout.clone());
    let lines = outcomes.each_ref().map(|text| text.lines().collect::<Vec<_>>());
    for (number, what) in ["uuid", "boot id", "random bytes", "temporary name"].into_iter().enumerate() {
        assert_ne!(lines[0][number], lines[1][number], "{what}");
    }
    let uptime: f64 = lines[0][4].split(' ').next().unwrap().parse().unwrap();
    assert!(uptime < 1.5, "the guest counts {uptime} s, for which its machine has waited");
    let time: u64 = lines[0][5].parse().unwrap();
    assert!((before..before + 3).contains(&time), "{time} is not the time of the host, {before}");
}

#[test]
fn spares_with_several_vcpus_volumes_and_shared_directories_work() {
    let (owner, _) = Owner::with_spare(&["--cpus", "2"]);
    let outcome =
        owner.shell(&["--cpus", "2"], "nproc; (true & wait); cat /proc/uptime >/dev/null; echo end");
    assert_eq!(outcome.expect_status(0).stdout, "2\nend\n");
    let folder = owner.0.folder().join("shared");
    fs::create_dir(&folder).unwrap();
    let shared = format!("{}:/shared", folder.display());
    let options = ["-v", "data:/data", "-v", &shared];
    // The spare with two vCPUs is still there.
    let others = owner.spares();
    run(owner.run(&options).args(["sh", "-c", "echo one >/data/a"])).expect_status(0);
    owner.spare_beside(&others);
    let outcome = owner.shell(&options, "cat /data/a; echo two >/shared/b");
    assert_eq!(outcome.expect_status(0).stdout, "one\n");
    assert_eq!(fs::read_to_string(folder.join("b")).unwrap(), "two\n");
}

/// A spare is not used by a process that could not have started it with these rights, limits and namespaces.
#[test]
#[expect(unsafe_code, reason = "changes what a child inherits")]
fn a_spare_is_used_only_where_everything_is_inherited_alike() {
    type Change = fn() -> std::io::Result<()>;
    let (owner, spare) = Owner::with_spare(&[]);
    let changes: [(&str, Change); 5] = [
        ("a limit", || {
            let limit = Rlimit { current: Some(400), ..getrlimit(Resource::Nofile) };
            Ok(setrlimit(Resource::Nofile, limit)?)
        }),
        ("a namespace", || {
            // SAFETY: the namespace has no effect on descriptors or memory.
            Ok(unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWUTS) }?)
        }),
        ("no_new_privs", || Ok(rustix::thread::set_no_new_privs(true)?)),
        ("the nice value", || Ok(rustix::process::setpriority_process(None, 5)?)),
        ("the group", || Ok(rustix::thread::set_thread_gid(rustix::process::Gid::from_raw(1))?)),
    ];
    for (what, change) in changes {
        let mut command = owner.run(&[]);
        // SAFETY: the calls neither allocate nor lock.
        unsafe { command.pre_exec(change) };
        let outcome = run(command.arg("true"));
        assert!(!outcome.expect_status(0).stderr.contains(USED), "{what}: {outcome}");
        wait_for("the spare is gone", || owner.spares().contains(&spare).then_some(()));
    }
    // Without a change it is.
    owner.shell(&[], "true");
}

#[test]
fn a_spare_ends_when_its_kernel_changes() {
    let (owner, _) = Owner::with_spare(&[]);
    fs::remove_dir_all(owner.0.folder().join("cache")).unwrap();
    owner.expect_no_spare();
    // The next guest pre-boots, as the first one did.
    let outcome = run(owner.run(&[]).arg("true"));
    assert!(!outcome.expect_status(0).stderr.contains(USED), "{outcome}");
}

#[test]
fn a_spare_that_is_killed_leaves_nothing_and_is_replaced() {
    let (owner, spare) = Owner::with_spare(&[]);
    for signal in [Signal::KILL, Signal::TERM] {
        kill(owner.spare(), signal.as_raw());
        owner.expect_no_spare();
        let outcome = run(owner.run(&[]).arg("true"));
        assert!(!outcome.expect_status(0).stderr.contains("kindling:"), "{outcome}");
        assert_ne!(owner.spare(), spare);
    }
    assert!(owner.0.has_no_guests());
}

#[test]
fn a_spare_that_does_not_answer_is_not_waited_for() {
    let (owner, spare) = Owner::with_spare(&[]);
    kill(spare, libc::SIGSTOP);
    let outcome = run(owner.run(&[]).arg("true"));
    assert!(!outcome.expect_status(0).stderr.contains(USED), "{outcome}");
    kill(spare, libc::SIGKILL);
}

#[test]
fn guests_that_start_at_once_share_no_spare() {
    let (owner, _) = Owner::with_spare(&[]);
    let guests: Vec<_> = (0..4)
        .map(|number| tests::start(owner.run(&[]).args(["sh", "-c", &format!("echo {number}")])))
        .collect();
    let outcomes: Vec<_> = guests.into_iter().map(|guest| guest.finish_within(TIMEOUT)).collect();
    for (number, outcome) in outcomes.iter().enumerate() {
        assert_eq!(outcome.expect_status(0).stdout, format!("{number}\n"));
    }
    // The last may start when the first has left its own.
    assert!(outcomes.iter().any(|outcome| outcome.stderr.contains(USED)));
}

#[test]
fn guests_in_the_background_leave_a_spare_when_they_start() {
    let (owner, first) = Owner::with_spare(&[]);
    let outcome = run(owner.run(&["-d", "--name", "box"]).args(["sleep", "1000"]));
    outcome.expect_status(0);
    let next = owner.spare_beside(&[first]);
    let outcome = run(owner.command("exec").args(["box", "echo", "hello"]));
    assert_eq!(outcome.expect_status(0).stdout, "hello\n");
    run(owner.command("rm").args(["-f", "box"])).expect_status(0);
    // It may look at its files in this moment, instead of waiting.
    wait_for("the spare is gone", || owner.spares().contains(&next).then_some(()));
}

/// The readers of the standard streams do not wait for the next spare.
#[test]
fn a_terminal_and_its_signals_work_in_a_spare() {
    let (owner, _) = Owner::with_spare(&[]);
    let mut run = owner.run(&[]);
    run.args(["sh", "-c", "trap 'echo term; exit 5' TERM; echo ready; while :; do sleep 0.1; done"]);
    let mut guest = GuestConsole::start(&mut run);
    guest.expect("ready");
    guest.signal(libc::SIGTERM);
    guest.expect("term");
    guest.expect_status(5);
}
