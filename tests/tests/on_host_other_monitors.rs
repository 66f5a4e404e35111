//! Kindling's image boots under other monitors, which lack its I/O ports: init takes its payload from the kernel
//! command line.

use std::process::{Command, Stdio};
use tests::{run, testbed};

/// Boots under QEMU's microvm machine with TCG; returns the console output.
fn qemu(arguments: &str) -> String {
    qemu_with(&[], arguments)
}

/// Boots with additional options of QEMU.
fn qemu_with(options: &[&str], arguments: &str) -> String {
    let line = format!("console=ttyS0 reboot=t panic=-1 quiet {arguments}");
    let outcome = run(Command::new("qemu-system-x86_64")
        .args(["-accel", "tcg", "-cpu", "max", "-M", "microvm,isa-serial=on,rtc=off", "-m", "128"])
        .args(["-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio", "-kernel"])
        .arg(testbed("images/busybox/vmlinux"))
        .arg("-initrd")
        .arg(testbed("images/busybox/initramfs.cpio"))
        .args(["-append", &line])
        .args(options)
        .stdin(Stdio::null()));
    outcome.expect_status(0);
    outcome.stdout
}

/// In QEMU, ports without a device read as all ones. This device reads as a fixed byte and accepts writes.
#[test]
fn another_device_at_kindlings_ports_is_not_taken_for_kindling() {
    for byte in ["0x00", "0x0c", "0xff"] {
        let device = |port, sink| format!("isa-debugcon,iobase={port},chardev={sink},readback={byte}");
        let (request, data) = (device("0x558", "a"), device("0x55c", "b"));
        let sinks = ["-chardev", "null,id=a", "-chardev", "null,id=b"];
        let options = [&sinks[..], &["-device", &request, "-device", &data]].concat();
        let console = qemu_with(&options, "-- /bin/sh -c \"echo it runs; exit 3\"");
        assert!(console.contains("it runs\ninit: exit status 3\n"), "{byte}: {console}");
    }
}

#[test]
fn qemu_takes_the_payload_from_the_command_line() {
    let console = qemu(
        "kindling.env=A=\"one two\" kindling.uid=1000 kindling.cwd=/usr kindling.hostname=box \
         -- /bin/sh -c \"echo $A; id -u; pwd; hostname; exit 3\"",
    );
    assert!(console.contains("one two\n1000\n/usr\nbox\ninit: exit status 3\n"), "{console}");
}

/// The parameter describes QEMU's last virtio-mmio slot (hw/i386/microvm.c). QEMU appends its own parameters after the
/// payload's arguments, where the kernel ignores them.
#[test]
fn qemu_boots_an_image_whose_root_is_a_disk() {
    let line = "console=ttyS0 reboot=t panic=-1 quiet virtio_mmio.device=512@0xfeb00e00:12 kindling.root=/dev/vda \
                -- /bin/bash -c \"cat /odd/plain\"";
    let drive = format!(
        "id=root,if=none,format=raw,readonly=on,file={}",
        testbed("images/root/root.erofs").display()
    );
    let outcome = run(Command::new("qemu-system-x86_64")
        .args(["-accel", "tcg", "-cpu", "max", "-M", "microvm,isa-serial=on,rtc=off,acpi=off", "-m", "256"])
        .args(["-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio", "-kernel"])
        .arg(testbed("images/root/vmlinux"))
        .arg("-initrd")
        .arg(testbed("images/root/initramfs.cpio"))
        .args(["-drive", &drive, "-device", "virtio-blk-device,drive=root", "-append", line])
        .stdin(Stdio::null()));
    assert!(outcome.expect_status(0).stdout.contains("plaininit: exit status 0\n"), "{outcome}");
}

#[test]
fn init_without_a_payload_prints_its_greeting_under_qemu() {
    let console = qemu("");
    assert!(console.contains("Hello from Kindling: Linux"), "{console}");
    assert!(console.contains("after the kernel started its clock.\ninit: exit status 0\n"), "{console}");
}

#[test]
fn an_invalid_number_on_the_kernel_command_line_is_reported() {
    let console = qemu("kindling.uid=root -- /bin/true");
    assert!(console.contains("kindling.uid=root on the kernel command line is not a number"), "{console}");
}
