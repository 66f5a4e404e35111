//! A program that uses the library resizes the balloon of a running guest.

use kindling_vmm::config::devices::Balloon;
use kindling_vmm::config::image::Image;
use kindling_vmm::{ExitReason, Instant, Machine, Timeline};
use std::time::Duration;
use tests::{TIMEOUT, print_progress, testbed};

const MIB: u64 = 1 << 20;

/// Resident memory of this process in bytes, guest memory included.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

/// Polls until a condition holds.
#[track_caller]
fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let until = std::time::Instant::now() + TIMEOUT;
    while !condition() {
        assert!(
            std::time::Instant::now() < until,
            "{what}: not within {TIMEOUT:?}; {} MiB",
            resident() / MIB
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_balloon_of_1_gib_is_inflated_and_deflated_at_run_time() {
    const AMOUNT: u64 = 1024;
    // Every page that the guest writes again is a page fault on the host, which dominates the time of this test.
    const AGAIN: u64 = AMOUNT / 2;
    // The guest uses the memory, loses it to the balloon, and uses part of it again. Files in a tmpfs use memory.
    let script = format!(
        "mount -o remount,size=95% /tmp
         total() {{ grep MemTotal /proc/meminfo | tr -dc 0-9; }}
         fill() {{ dd if=/dev/zero of=/tmp/file bs=1M count=$1 2>/dev/null && [ $(stat -c %s /tmp/file) = $(($1 << 20)) ]; }}
         all=$(total)
         fill {AMOUNT} || exit 1
         rm /tmp/file
         echo used
         while [ $(total) -gt $((all - {AMOUNT} * 1024)) ]; do sleep 0.1; done
         while [ $(total) -lt $all ]; do sleep 0.1; done
         fill {AGAIN} || exit 2"
    );
    let directory = testbed("images/busybox");
    let mut config = Image::open(&directory).unwrap().config(&directory);
    // Less memory remains outside the balloon than the guest writes again.
    config.machine.mem_size_mib = AMOUNT + 256;
    config.devices.balloon = Some(Balloon { stats_polling_interval_s: 1, ..Balloon::default() });
    config.guest.arguments = ["/bin/sh", "-c", &script].map(|word| word.as_bytes().to_vec()).to_vec();
    let console = tempfile::NamedTempFile::new().unwrap();
    config.console = kindling_vmm::config::Console::File(console.path().into());
    let running = Machine::new(&config, Timeline::starting_at(Instant::now())).unwrap().start().unwrap();
    let balloon = running.balloon().unwrap();
    let guest = std::thread::spawn(move || running.wait());

    wait_until("the guest has used its memory", || {
        std::fs::read_to_string(console.path()).unwrap().contains("used")
    });
    assert!(resident() > AMOUNT * MIB, "{} MiB", resident() / MIB);
    print_progress("used");
    balloon.set_amount(AMOUNT);
    assert_eq!(balloon.amount(), AMOUNT);
    wait_until("the balloon is full", || balloon.actual() == AMOUNT);
    wait_until("the host has reclaimed the memory", || resident() < 512 * MIB);
    let total = || balloon.statistics().total_memory.unwrap_or(u64::MAX);
    wait_until("the guest's statistics show it", || total() < 512 * MIB);
    print_progress("inflated");
    balloon.set_amount(0);
    wait_until("the balloon is empty", || balloon.actual() == 0);
    print_progress("deflated");
    wait_until("the guest has used its memory again", || guest.is_finished());
    let exit = guest.join().unwrap();
    assert_eq!(exit.reason, ExitReason::Payload(0), "{:?}", exit.console_tail);
}
