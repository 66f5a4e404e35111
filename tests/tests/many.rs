//! A hundred guests at once: all work, each takes little memory of the host, and killing some does not affect the others.

use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::Instant;
use tests::user::User;
use tests::{TIMEOUT, kill, print_progress, processes, run};

const GUESTS: usize = 100;
const MEMORY: &str = "64";

/// Maximum memory of the host per guest in KiB, without the guest's own pages: front, monitor, and structures of the host's
/// kernel.
const OVERHEAD_MAX: u64 = 1229;

fn name(number: usize) -> String {
    format!("g{number}")
}

/// Starts a guest in the background, which reads its disk.
fn start(user: &User, number: usize) -> Child {
    let mut command = user.run(&["-d", "--name", &name(number), "--memory", MEMORY]);
    command.args(["sh", "-c", "cat /bin/busybox >/dev/null; sleep 100000"]);
    command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Whether a guest can read its disk, and send the content over vsock.
fn works(user: &User, number: usize, expected: &str) -> bool {
    let mut command = user.command("exec");
    let outcome = run(command.args([&name(number), "md5sum", "/bin/busybox"]));
    outcome.status == Some(0) && outcome.stdout == expected
}

/// The proportional set size (PSS) of a process in KiB: of guest memory, and of everything else. A page that several
/// processes share counts in parts.
fn memory(process: u32) -> (u64, u64) {
    const LARGE: u64 = 1 << 10;
    let (mut guest, mut others, mut is_unnamed, mut is_guest) = (0, 0, false, false);
    for line in fs::read_to_string(format!("/proc/{process}/smaps")).unwrap().lines() {
        let words: Vec<_> = line.split_ascii_whitespace().collect();
        match words[..] {
            // A mapping: addresses, rights, offset, device, inode, file.
            [range, _, _, _, _, ref file @ ..] if range.contains('-') => {
                // Guest memory is anonymous, or a private mapping of the pre-booted kernel's file.
                is_guest = file.iter().any(|part| part.contains("/preboot/"));
                is_unnamed = file.is_empty();
            }
            ["Size:", size, _] => is_guest |= is_unnamed && size.parse::<u64>().unwrap() >= LARGE,
            ["Pss:", size, _] => {
                *if is_guest { &mut guest } else { &mut others } += size.parse::<u64>().unwrap()
            }
            _ => {}
        }
    }
    (guest, others)
}

/// Memory of the host that is not in use, in KiB.
fn available() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap();
    let line = text.lines().find(|line| line.starts_with("MemAvailable:")).unwrap();
    line.split_ascii_whitespace().nth(1).unwrap().parse().unwrap()
}

fn inspect(user: &User, number: usize) -> serde_json::Value {
    let outcome = run(user.command("inspect").arg(name(number)));
    outcome.expect_status(0);
    let value: serde_json::Value = serde_json::from_str(&outcome.stdout).unwrap();
    value.get(0).cloned().unwrap_or(value)
}

#[test]
fn a_hundred_guests_run_at_once() {
    let user = User::new();
    let first = run(user.run(&["--memory", MEMORY]).args(["md5sum", "/bin/busybox"]));
    first.expect_status(0);
    let before = available();
    let started = Instant::now();
    let all: Vec<_> = (0..GUESTS).map(|number| start(&user, number)).collect();
    for child in all {
        let outcome = child.wait_with_output().unwrap();
        assert!(outcome.status.success(), "{}", String::from_utf8_lossy(&outcome.stderr));
    }
    print_progress(&format!("{GUESTS} guests started in {} ms", started.elapsed().as_millis()));
    let broken: Vec<_> = (0..GUESTS).filter(|number| !works(&user, *number, &first.stdout)).collect();
    assert!(broken.is_empty(), "{broken:?}");

    let (mut guest, mut others) = (0, 0);
    let (monitors, fronts) = (processes("kindling-vmm"), processes("kindling"));
    assert_eq!((monitors.len(), fronts.len()), (GUESTS, GUESTS));
    for &process in monitors.iter().chain(&fronts) {
        let (of_guest, of_process) = memory(process);
        (guest, others) = (guest + of_guest, others + of_process);
    }
    let count = GUESTS as u64;
    let taken = (before - available()) / count;
    let (guest, others) = (guest / count, others / count);
    print_progress(&format!(
        "of each guest: {guest} KiB of its memory touched, {others} KiB of its processes, \
         {} KiB of the host's kernel",
        taken.saturating_sub(guest + others)
    ));
    let beyond = taken.saturating_sub(guest);
    assert!(guest > 0 && beyond <= OVERHEAD_MAX, "{guest} KiB, and {beyond} KiB for each guest");

    // Every third guest loses its monitor, every third its front.
    for number in 0..GUESTS {
        let record = inspect(&user, number);
        let process = match number % 3 {
            0 => "pid",
            1 => "front_pid",
            _ => continue,
        };
        kill(u32::try_from(record[process].as_u64().unwrap()).unwrap(), libc::SIGKILL);
    }
    let disturbed: Vec<_> =
        (2..GUESTS).step_by(3).filter(|number| !works(&user, *number, &first.stdout)).collect();
    assert!(disturbed.is_empty(), "{disturbed:?}");
    let names: Vec<_> = (0..GUESTS).map(name).collect();
    run(user.command("rm").arg("--force").args(&names)).expect_status(0);
    assert!(user.has_no_guests());
    let begun = Instant::now();
    while ["kindling-vmm", "kindling"].iter().any(|name| !processes(name).is_empty()) {
        assert!(begun.elapsed() < TIMEOUT, "a process is left");
        std::thread::yield_now();
    }
    // The host's kernel has freed the machines' structures too, within the variation of its caches.
    let _ = Command::new("sync").status();
    let left = before.saturating_sub(available());
    print_progress(&format!("{left} KiB of the host's memory are not free again"));
    assert!(left < 100 << 10, "{left} KiB are left");
}
