//! Firecracker's configuration file boots the same guest as the command line does.

use std::process::Stdio;
use tests::{kindling, run, testbed};

#[test]
fn a_file_of_firecrackers_boots() {
    let config = serde_json::json!({
        "boot-source": {
            "kernel_image_path": testbed("images/busybox/vmlinux"),
            "initrd_path": testbed("images/busybox/initramfs.cpio"),
            "boot_args": "console=ttyS0 quiet reboot=k panic=-1",
        },
        "machine-config": { "vcpu_count": 2, "mem_size_mib": 160 },
    });
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), config.to_string()).unwrap();
    let outcome = run(kindling()
        .args(["boot", "--config-file"])
        .arg(file.path())
        .args(["--", "/bin/sh", "-c", "nproc; cat /proc/cmdline; exit 4"])
        .stdin(Stdio::null()));
    assert_eq!(outcome.expect_status(4).stdout, "2\nconsole=ttyS0 quiet reboot=k panic=-1\n");
}

#[test]
fn the_command_line_goes_before_the_file() {
    let config = serde_json::json!({
        "boot-source": { "kernel_image_path": testbed("images/busybox/vmlinux") },
        "machine-config": { "vcpu_count": 2 },
    });
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), config.to_string()).unwrap();
    let outcome = run(kindling()
        .args(["boot", "--vcpus", "1", "--initrd"])
        .arg(testbed("images/busybox/initramfs.cpio"))
        .arg("--config-file")
        .arg(file.path())
        .args(["--", "nproc"])
        .stdin(Stdio::null()));
    assert_eq!(outcome.expect_status(0).stdout, "1\n");
}
