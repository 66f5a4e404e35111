//! An idle guest with devices causes no wakeups of the VMM's event loop.

use std::io::{BufRead, BufReader, Write};
use std::process::Stdio;
use tests::network::{enter_network_namespace, make_tap, shell};

/// The number of context switches of a process's main thread, which runs the event loop.
fn switches(process: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/task/{process}/status")).unwrap();
    let counts = status.lines().filter_map(|line| line.split_once("voluntary_ctxt_switches:"));
    counts.map(|(_, count)| count.trim().parse::<u64>().unwrap()).sum()
}

#[test]
fn the_event_loop_does_not_wake_up_while_the_guest_is_idle() {
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk");
    std::fs::write(&disk, vec![1; 1 << 20]).unwrap();
    enter_network_namespace();
    make_tap("tap0", "10.9.0.1");
    // IPv6 on the host would send router and neighbour solicitations.
    shell(
        "for file in /proc/sys/net/ipv6/conf/tap0/disable_ipv6; do test ! -e $file || echo 1 > $file; done",
    );
    // Free page reporting ends 16 seconds after the boot, as a trace showed. The next half minute is measured; the
    // guest's own timer ticks do not count. There is no entropy device, which the guest's kernel reads every ten
    // seconds. There is no network traffic, after which both ends probe their neighbour for a while, and no IPv6,
    // which keeps soliciting routers.
    let script = "set -e; f=/proc/sys/net/ipv6/conf/eth0/disable_ipv6; test ! -e $f || echo 1 > $f; \
                  dd if=/dev/vda of=/dev/null 2>/dev/null; sleep 30; \
                  echo sleeping; sleep 30; echo awake; read word; echo has $word";
    let mut command = tests::boot();
    command.arg("--drive").arg(&disk).arg("--vsock").arg(folder.path().join("vsock"));
    command.args(["--balloon", "8", "--net", "tap0,ip=10.9.0.2/24"]);
    command.args(["--", "/bin/sh", "-c", script]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let process = child.id();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut wait_for = |text: &str| {
        assert!(lines.any(|line| line.unwrap().contains(text)), "the guest ended before it printed {text:?}");
        switches(process)
    };
    let before = wait_for("sleeping");
    let after = wait_for("awake");
    assert_eq!(after - before, 0, "the event loop woke up");
    // Console input does wake the event loop, so the counter works.
    child.stdin.take().unwrap().write_all(b"something\n").unwrap();
    assert!(wait_for("has something") > after);
    assert!(child.wait().unwrap().success());
}
