//! A kernel that nobody configured for this VMM, Debian's, boots to our init.

use std::process::Stdio;
use tests::{kindling, run, testbed};

#[track_caller]
fn boots(kernel: &str) {
    let initrd = testbed("images/busybox/initramfs.cpio");
    let outcome = run(kindling()
        .args(["boot", "--memory", "512", "--kernel"])
        .arg(testbed(kernel))
        .arg("--initrd")
        .arg(initrd)
        .args(["--", "/bin/sh", "-c", "uname -r; exit 3"])
        .stdin(Stdio::null()));
    outcome.expect_status(3);
    assert!(outcome.stdout.contains("cloud-amd64\n"), "{outcome}");
}

#[test]
fn debian_as_bzimage() {
    boots("debian/vmlinuz");
}

#[test]
fn debian_as_the_vmlinux_inside_it() {
    boots("debian/vmlinux");
}
