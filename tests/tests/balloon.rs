//! Memory that a guest does not use goes back to the host.

use serde_json::json;
use std::process::Command;
use tests::conversation::{Conversation, PREAMBLE};
use tests::{Outcome, boot, kindling, run, testbed};

const MIB: u64 = 1024;

/// Fills memory and frees it again when told to. Files of a tmpfs are memory.
const FILL: &str = "fill() { dd if=/dev/zero of=/tmp/$1 bs=1M count=$1 2>/dev/null; }; \
                    mount -o remount,size=95% /tmp;";

/// A boot from Firecracker's file with this balloon.
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
fn memory_that_was_freed_is_the_hosts_again_and_can_be_had_once_more() {
    let script = format!(
        "{PREAMBLE} {FILL} fill 2048; echo filled; heard; rm /tmp/2048; echo freed; heard; \
         fill 512; echo filled again; heard"
    );
    let mut guest = Conversation::start(boot().args([
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
    guest.go_on();
    guest.expect("freed");
    guest.wait_until("the memory is back", |guest| guest.rss_kib() < 300 * MIB);
    guest.go_on();
    guest.expect("filled again");
    assert!(guest.rss_kib() > 512 * MIB, "{} KiB", guest.rss_kib());
    guest.go_on();
    guest.expect_status(0);
}

#[test]
fn a_balloon_is_missing_in_the_guests_memory() {
    let (mut command, _file) = boot_with(&json!({ "amount_mib": 384, "deflate_on_oom": false }), 512);
    let script = format!(
        "{PREAMBLE} total() {{ grep MemTotal /proc/meminfo | tr -dc 0-9; }}; \
         while [ $(total) -ge $((128 * 1024)) ]; do sleep 0.01; done; echo total $(total); heard"
    );
    let mut guest = Conversation::start(command.args(["--", "/bin/sh", "-c", &script]));
    let total = number(&guest.expect("total"));
    assert!(total < 128 * MIB, "{total} KiB");
    // The last pages may be on their way, and the VMM has some itself.
    guest.wait_until("the host has the rest", |guest| guest.rss_kib() < 140 * MIB);
    guest.go_on();
    guest.expect_status(0);
}

/// A guest of 256 MiB with a balloon of 160 MiB that needs 160 MiB itself.
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
fn a_guest_that_runs_out_of_memory_takes_it_back_from_the_balloon() {
    let outcome = starve(true);
    assert!(outcome.expect_status(0).stdout.contains(&(160 << 20).to_string()), "{outcome}");
}

#[test]
fn a_balloon_that_is_to_stay_does() {
    let outcome = starve(false);
    assert!(!outcome.stdout.contains(&(160 << 20).to_string()), "{outcome}");
}

#[test]
fn balloons_that_cannot_be_are_refused() {
    run(boot().args(["--memory", "128", "--balloon", "128"]))
        .expect_status(2)
        .expect_stderr("a balloon of 128 MiB is too large for a guest of 128 MiB");
}
