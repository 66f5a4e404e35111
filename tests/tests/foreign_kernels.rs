//! A distribution kernel (Debian's), not configured for this VMM, boots to Kindling's init.

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
fn debians_bzimage_boots() {
    boots("debian/vmlinuz");
}

#[test]
fn debians_vmlinux_boots() {
    boots("debian/vmlinux");
}
