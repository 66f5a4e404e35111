//! A Firecracker configuration file configures the same guest as the command line.

use std::process::Stdio;
use tests::{kindling, run, testbed};

#[test]
fn a_firecracker_configuration_boots_and_unsupported_fields_are_reported() {
    let config = serde_json::json!({
        "boot-source": {
            "kernel_image_path": testbed("images/busybox/vmlinux"),
            "initrd_path": testbed("images/busybox/initramfs.cpio"),
            "boot_args": "console=ttyS0 quiet reboot=k panic=-1",
        },
        "machine-config": {
            "vcpu_count": 2, "mem_size_mib": 160, "smt": false, "track_dirty_pages": true, "huge_pages": "None",
        },
        "drives": [],
        "network-interfaces": [],
        "cpu-config": null,
        "balloon": null,
        "vsock": null,
        "logger": { "log_path": "/nonexistent/log", "level": "Info" },
        "metrics": null,
        "mmds-config": null,
        "entropy": null,
        "pmem": [],
        "memory-hotplug": null,
        "later\u{1b}[31m-section": { "field": 1 },
    });
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), config.to_string()).unwrap();
    let outcome = run(kindling()
        .args(["boot", "--config-file"])
        .arg(file.path())
        .args(["--", "/bin/sh", "-c", "nproc; cat /proc/cmdline; exit 4"])
        .stdin(Stdio::null()));
    assert_eq!(outcome.expect_status(4).stdout, "2\nconsole=ttyS0 quiet reboot=k panic=-1\n");
    let start = format!("kindling: {}: ", file.path().display());
    let warned: Vec<_> = outcome
        .stderr
        .lines()
        .map(|line| line.strip_prefix(&start).and_then(|line| line.split_once(" has no effect: ")).unwrap().0)
        .collect();
    assert_eq!(warned, ["machine-config.track_dirty_pages", "logger", "later.[31m-section"], "{outcome}");
}

#[test]
fn command_line_options_override_the_file() {
    let console = tempfile::NamedTempFile::new().unwrap();
    let config = serde_json::json!({
        "boot-source": { "kernel_image_path": testbed("images/busybox/vmlinux") },
        "machine-config": { "vcpu_count": 2 },
        "serial": { "serial_out_path": console.path() },
    });
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), config.to_string()).unwrap();
    let boot = |options: &[&str]| {
        let mut command = kindling();
        command.args(["boot", "--initrd"]).arg(testbed("images/busybox/initramfs.cpio"));
        command.arg("--config-file").arg(file.path());
        let outcome = run(command.args(options).args(["--", "nproc"]).stdin(Stdio::null()));
        outcome.expect_status(0).stdout.clone()
    };
    assert_eq!(boot(&[]), "");
    assert_eq!(std::fs::read_to_string(console.path()).unwrap(), "2\r\n");
    assert_eq!(boot(&["--vcpus", "1", "--console", "stdio"]), "1\n");
}
