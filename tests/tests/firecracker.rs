//! Kindling's image boots under Firecracker. `cargo xtask test` skips this with a message if `firecracker` is not in
//! PATH.

use std::process::{Command, Stdio};
use tests::{run, testbed};

#[test]
fn the_image_boots_under_firecracker_with_a_payload_from_the_command_line() {
    let line = "console=ttyS0 reboot=k panic=-1 quiet -- /bin/sh -c \"echo it runs; exit 3\"";
    let config = serde_json::json!({
        "boot-source": {
            "kernel_image_path": testbed("images/busybox/vmlinux"),
            "initrd_path": testbed("images/busybox/initramfs.cpio"),
            "boot_args": line,
        },
        "drives": [],
        "machine-config": { "vcpu_count": 1, "mem_size_mib": 128 },
    });
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), config.to_string()).unwrap();
    let outcome = run(Command::new(testbed("firecracker"))
        .args(["--no-api", "--config-file"])
        .arg(file.path())
        .stdin(Stdio::null()));
    outcome.expect_status(0);
    assert!(outcome.stdout.contains("it runs\ninit: exit status 3\n"), "{outcome}");
}
