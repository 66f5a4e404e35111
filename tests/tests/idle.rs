//! A guest with devices that does nothing costs its host nothing: the VMM's event loop sleeps.

use std::io::{BufRead, BufReader, Write};
use std::process::Stdio;
use tests::network::{enter_new, make_tap, shell};

/// How often a process's first thread, which runs the event loop, has gone to sleep or been put aside.
fn switches(process: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/task/{process}/status")).unwrap();
    let counts = status.lines().filter_map(|line| line.split_once("voluntary_ctxt_switches:"));
    counts.map(|(_, count)| count.trim().parse::<u64>().unwrap()).sum()
}

#[test]
fn the_event_loop_sleeps_while_the_guest_does() {
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk");
    std::fs::write(&disk, vec![1; 1 << 20]).unwrap();
    enter_new();
    make_tap("tap0", "10.9.0.1");
    // The host's IPv6 would ask for routers and neighbours.
    shell(
        "for file in /proc/sys/net/ipv6/conf/tap0/disable_ipv6; do test ! -e $file || echo 1 > $file; done",
    );
    // Free pages are reported, the last ones 16 seconds after the boot, as a trace showed. Then half a minute,
    // in which the guest's own clock ticks as it likes.
    // There is no entropy device: the guest's kernel asks for more of it every ten seconds. Nor are there packets:
    // after one, both ends ask for a while whether the other is still there, and IPv6 asks for routers ever again.
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
        assert!(lines.any(|line| line.unwrap().contains(text)), "the guest ended before it said {text:?}");
        switches(process)
    };
    let before = wait_for("sleeping");
    let after = wait_for("awake");
    assert_eq!(after - before, 0, "the event loop woke up");
    // What is counted does count.
    child.stdin.take().unwrap().write_all(b"something\n").unwrap();
    assert!(wait_for("has something") > after);
    assert!(child.wait().unwrap().success());
}
