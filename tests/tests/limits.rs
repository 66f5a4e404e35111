//! Limits of a noisy guest: processes, disk and network rates.

use tests::user::User;
use tests::{Outcome, run, testbed};

/// Runs a shell script in a guest with options of `kindling run`.
#[track_caller]
fn shell(user: &User, options: &[&str], script: &str) -> Outcome {
    run(user.run(options).args(["sh", "-c", script]))
}

/// Starts this many processes that outlive the shell, and prints how many there are.
const MANY: &str =
    "i=0; while [ $i -lt 60 ]; do sleep 1000 < /dev/null > /dev/null 2>&1 & i=$((i+1)); done; echo $i";

#[test]
fn processes_are_limited_for_root_too() {
    let user = User::new();
    assert_eq!(shell(&user, &[], MANY).expect_status(0).stdout, "60\n");
    let limited = ["--pids-limit", "20"];
    let outcome = shell(&user, &limited, MANY);
    assert_ne!(outcome.status, Some(0), "{}", outcome.stdout);
    outcome.expect_stderr("can't fork");
    // Up to the limit, and without a way to lift it: the hierarchy above is not visible.
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
    assert!(writing(&user, &["--disk-bps", "1g", "--disk-iops", "1000000"]) < 1.9);
}

#[test]
fn a_limit_of_a_network_that_does_not_exist_is_an_error() {
    let user = User::new();
    shell(&user, &["--net-bps", "1m"], "true")
        .expect_status(2)
        .expect_stderr("--net-bps needs a network: --net user");
    assert!(user.has_no_guests());
}
