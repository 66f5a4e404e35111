//! The balloon: unused guest memory returns to the host, and can be reclaimed by the guest.

use serde_json::json;
use std::process::Command;
use tests::guest_console::{GuestConsole, PREAMBLE};
use tests::{Outcome, boot, kindling, run, testbed};

const MIB: u64 = 1024;

/// Shell functions that fill guest memory: files in a tmpfs use memory.
const FILL: &str = "fill() { dd if=/dev/zero of=/tmp/$1 bs=1M count=$1 2>/dev/null; }; \
                    mount -o remount,size=95% /tmp;";

/// Boots from a Firecracker configuration file with this balloon.
fn boot_with(balloon: &serde_json::Value, memory: u64) -> (Command, tempfile::NamedTempFile) {
    let config = json!({
        "boot-source": {
            "kernel_image_path": testbed("images/busybox/vmlinux"),
            "initrd_path": testbed("images/busybox/initramfs.cpio"),
        },
        "machine-config": { "vcpu_count": 1, "mem_size_mib": memory },
        "balloon": balloon,
    });
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), config.to_string()).unwrap();
    let mut command = kindling();
    command.args(["boot", "--config-file"]).arg(file.path());
    (command, file)
}

fn number(text: &str) -> u64 {
    text.split_whitespace().next().and_then(|word| word.parse().ok()).unwrap_or_else(|| panic!("{text:?}"))
}

#[test]
fn freed_guest_memory_returns_to_the_host_and_can_be_used_again() {
    let script = format!(
        "{PREAMBLE} {FILL} fill 2048; echo filled; wait_line; rm /tmp/2048; echo freed; wait_line; \
         fill 512; echo filled again; wait_line"
    );
    let mut guest = GuestConsole::start(boot().args([
        "--memory",
        "3072",
        "--balloon",
        "0",
        "--",
        "/bin/sh",
        "-c",
        &script,
    ]));
    guest.expect("filled");
    assert!(guest.rss_kib() > 2048 * MIB, "{} KiB", guest.rss_kib());
    guest.send_line();
    guest.expect("freed");
    guest.wait_until("the host has reclaimed the memory", |guest| guest.rss_kib() < 300 * MIB);
    guest.send_line();
    guest.expect("filled again");
    assert!(guest.rss_kib() > 512 * MIB, "{} KiB", guest.rss_kib());
    guest.send_line();
    guest.expect_status(0);
}

#[test]
fn an_inflated_balloon_reduces_the_guests_memory_and_the_vmms_rss() {
    let (mut command, _file) = boot_with(&json!({ "amount_mib": 384, "deflate_on_oom": false }), 512);
    let script = format!(
        "{PREAMBLE} total() {{ grep MemTotal /proc/meminfo | tr -dc 0-9; }}; \
         while [ $(total) -ge $((128 * 1024)) ]; do sleep 0.01; done; echo total $(total); wait_line"
    );
    let mut guest = GuestConsole::start(command.args(["--", "/bin/sh", "-c", &script]));
    let total = number(&guest.expect("total"));
    assert!(total < 128 * MIB, "{total} KiB");
    // The last pages may still be in the queue, and the VMM uses some memory itself.
    guest.wait_until("the host has reclaimed the balloon's memory", |guest| guest.rss_kib() < 140 * MIB);
    guest.send_line();
    guest.expect_status(0);
}

/// A guest with 256 MiB and a balloon of 160 MiB that needs 160 MiB itself.
fn starve(deflate_on_oom: bool) -> Outcome {
    let balloon = json!({ "amount_mib": 160, "deflate_on_oom": deflate_on_oom });
    let (mut command, _file) = boot_with(&balloon, 256);
    let script = format!(
        "{FILL} free() {{ grep MemFree /proc/meminfo | tr -dc 0-9; }}; \
         while [ $(free) -gt $((96 * 1024)) ]; do sleep 0.01; done; \
         fill 160 || echo starved; wc -c < /tmp/160"
    );
    run(command.args(["--", "/bin/sh", "-c", &script]))
}

#[test]
fn deflate_on_oom_returns_memory_to_a_guest_under_pressure() {
    let outcome = starve(true);
    assert!(outcome.expect_status(0).stdout.contains(&(160 << 20).to_string()), "{outcome}");
}

#[test]
fn without_deflate_on_oom_the_balloon_stays_inflated() {
    let outcome = starve(false);
    assert!(!outcome.stdout.contains(&(160 << 20).to_string()), "{outcome}");
}

#[test]
fn a_balloon_as_large_as_the_guest_is_refused() {
    run(boot().args(["--memory", "128", "--balloon", "128"]))
        .expect_status(2)
        .expect_stderr("a balloon of 128 MiB is too large for a guest of 128 MiB");
}
