//! Each invalid input is reported on one line with exit status 2. No test needs KVM.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;
use std::process::Stdio;
use tests::machine_code::{elf, exit};
use tests::{kindling, run};

/// Runs `kindling boot` and checks its one-line error.
#[track_caller]
fn refused(arguments: &[&str], expected: &str) {
    let outcome = run(kindling().arg("boot").args(arguments).stdin(Stdio::null()));
    outcome.expect_status(2).expect_stderr(expected);
    assert_eq!(outcome.stdout, "", "{outcome}");
    assert_eq!(outcome.stderr.lines().count(), 1, "{outcome}");
    assert!(outcome.stderr.starts_with("kindling: "), "{outcome}");
}

/// A folder with a valid kernel.
struct KernelFolder(tempfile::TempDir);

impl KernelFolder {
    fn new() -> Self {
        let scratch = Self(tempfile::tempdir().unwrap());
        scratch.file("kernel", &elf(&exit(0)));
        scratch
    }

    fn file(&self, name: &str, bytes: &[u8]) -> String {
        let path = self.0.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    }

    fn kernel(&self) -> String {
        self.0.path().join("kernel").to_str().unwrap().to_owned()
    }
}

#[test]
fn invalid_kernels_are_refused() {
    let scratch = KernelFolder::new();
    let good = elf(&exit(0));
    refused(&["--kernel", "/nonexistent"], "cannot read /nonexistent: No such file");
    refused(&["--kernel", "/tmp"], "/tmp is not a file");
    refused(&["--kernel", "/dev/null"], "/dev/null is not a file");
    refused(&["--kernel", &scratch.file("k", b"")], "is not a Linux kernel");
    refused(&["--kernel", &scratch.file("k", b"#!/bin/sh\n")], "is not a Linux kernel");
    refused(&["--kernel", &scratch.file("k", &good[..63])], "the file is truncated: the ELF header");
    refused(&["--kernel", &scratch.file("k", &good[..4097])], "the file is truncated: a segment");
    let mut kernel = good.clone();
    kernel[4] = 1;
    refused(&["--kernel", &scratch.file("k", &kernel)], "32-bit ELF file");
    let fifo = scratch.0.path().join("fifo");
    assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    refused(&["--kernel", fifo.to_str().unwrap()], "is not a file");
}

#[test]
fn every_truncation_of_the_elf_headers_is_refused() {
    let scratch = KernelFolder::new();
    let good = elf(&exit(0));
    for length in 4..120 {
        refused(&["--kernel", &scratch.file("k", &good[..length])], "truncated");
    }
}

#[test]
fn invalid_elf_segments_are_refused() {
    let scratch = KernelFolder::new();
    let with = |at: usize, value: u64| {
        let mut kernel = elf(&exit(0));
        kernel[at..at + 8].copy_from_slice(&value.to_le_bytes());
        scratch.file("k", &kernel)
    };
    // Offsets in the only program header: 24 address, 32 size in the file, 40 size in memory.
    refused(&["--kernel", &with(64 + 40, 1 << 30)], "the kernel needs 1025 MiB of memory");
    refused(&["--kernel", &with(64 + 40, u64::MAX)], "impossible sizes");
    refused(&["--kernel", &with(64 + 24, u64::MAX - 4)], "impossible sizes");
    refused(&["--kernel", &with(64 + 32, 1 << 40)], "impossible sizes");
    refused(&["--kernel", &with(64 + 24, 0x8000)], "lies below 1 MiB");
    refused(
        &["--kernel", &with(24, 0x8000)],
        "cannot be booted: its entry point 0x8000 is outside of its segments\n",
    );
}

#[test]
fn invalid_initrds_are_refused() {
    let scratch = KernelFolder::new();
    let kernel = scratch.kernel();
    let boot = |initrd: &str, expected: &str| {
        refused(&["--memory", "16", "--kernel", &kernel, "--initrd", initrd], expected)
    };
    boot("/nonexistent", "cannot read /nonexistent");
    boot("/", "/ is not a file");
    let large = scratch.file("large", b"");
    std::fs::File::options().write(true).open(&large).unwrap().set_len(1 << 30).unwrap();
    boot(&large, "are free after the kernel: give the machine more memory");
}

#[test]
fn memory_and_vcpus_out_of_range_are_refused() {
    let scratch = KernelFolder::new();
    let kernel = scratch.kernel();
    for (option, value, expected) in [
        ("--memory", "0", "memory (mem_size_mib) is 0"),
        ("--memory", "1", "memory (mem_size_mib) is 1"),
        ("--memory", "100000000", "but this host has"),
        ("--memory", "18446744073709551615", "but this host has"),
        ("--vcpus", "0", "number of vCPUs (vcpu_count) is 0"),
        ("--vcpus", "17", "number of vCPUs (vcpu_count) is 17"),
        ("--vcpus", "10000", "number of vCPUs (vcpu_count) is 10000"),
    ] {
        refused(&["--kernel", &kernel, option, value], expected);
    }
}

#[test]
fn invalid_command_lines_are_refused() {
    let scratch = KernelFolder::new();
    let kernel = scratch.kernel();
    refused(
        &["--kernel", &kernel, "--cmdline", &"x".repeat(2048)],
        "2048 bytes; the kernel takes at most 2047",
    );
    let json = r#"{"boot-source": {"kernel_image_path": "k", "boot_args": "a\u0000b"}}"#;
    refused(
        &["--config-file", &scratch.file("c.json", json.as_bytes())],
        "the kernel command line has a NUL",
    );
    refused(&["--kernel", &kernel, "--env", "=x", "--", "sh"], "\"=x\" is not of the form NAME=VALUE");
}

#[test]
fn invalid_configuration_files_are_refused() {
    let scratch = KernelFolder::new();
    let json = |text: &str, expected: &str| {
        refused(&["--config-file", &scratch.file("c.json", text.as_bytes())], expected)
    };
    json(r#"{"boot-source": {"kernel_image_path": "k", "boot_arg": ""}}"#, "unknown field `boot_arg`");
    json(r#"{"boot-source": {"kernel_image_path": 1}}"#, "invalid type: integer `1`");
    json(r#"{"boot-source": {"kernel_image_path": "/nonexistent"}}"#, "cannot read /nonexistent");
    json("", "EOF while parsing");
    json(&" ".repeat(10 << 20), "larger than a configuration file can be");
    refused(&["--config-file", "/nonexistent.json"], "cannot read /nonexistent.json: No such file");
}

#[test]
fn control_characters_of_a_file_do_not_reach_the_terminal() {
    let scratch = KernelFolder::new();
    let json = r#"{"boot-source": {"kernel_image_path": "k", "\u001b[31mred\u0007": 1}}"#;
    refused(&["--config-file", &scratch.file("c.json", json.as_bytes())], "unknown field `.[31mred.`");
}

#[test]
fn a_closed_standard_error_does_not_change_the_exit_status() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let status = kindling().args(["boot", "--kernel", "/nonexistent"]).stderr(writer).status().unwrap();
    assert_eq!(status.code(), Some(2));
}

/// Otherwise the first files that the program opens would get the descriptors of the standard streams, and messages
/// would be written into them.
#[test]
fn closed_standard_streams_are_not_reused_for_files() {
    let scratch = KernelFolder::new();
    let path = scratch.0.path().join("image.json");
    std::fs::write(&path, "{}").unwrap();
    let script = r#"exec "$0" boot --image "$1" 0<&- 1>&- 2>&-"#;
    let directory = scratch.0.path();
    let status = std::process::Command::new("sh")
        .args(["-c", script])
        .arg(tests::testbed("kindling"))
        .arg(directory)
        .status()
        .unwrap();
    assert_eq!(status.code(), Some(2));
    assert_eq!(std::fs::read(&path).unwrap(), b"{}");
}

#[test]
fn invalid_images_are_refused() {
    let scratch = KernelFolder::new();
    let path = scratch.0.path().to_str().unwrap().to_owned();
    refused(&["--image", "/nonexistent"], "cannot read /nonexistent/image.json");
    refused(&["--image", &path], "image.json: No such file");
    let image = tests::testbed("images/busybox");
    for name in ["vmlinux", "initramfs.cpio", "image.json"] {
        std::fs::copy(image.join(name), Path::new(&path).join(name)).unwrap();
    }
    let vmlinux = Path::new(&path).join("vmlinux");
    let mut bytes = std::fs::read(&vmlinux).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&vmlinux, &bytes).unwrap();
    refused(
        &["--verify", "--image", &path],
        "vmlinux is not the file that image.json describes: its SHA-256 is",
    );
    bytes.push(0);
    std::fs::write(&vmlinux, &bytes).unwrap();
    refused(&["--image", &path], "is not the file that image.json describes: it has");
}

#[test]
fn invalid_vsock_paths_are_refused() {
    let scratch = KernelFolder::new();
    let kernel = scratch.kernel();
    let at = |path: &str, expected: &str| refused(&["--kernel", &kernel, "--vsock", path], expected);
    let file = scratch.file("taken", b"mine");
    at(&file, "taken cannot be the vsock's socket: it exists and is not a socket; choose");
    assert_eq!(std::fs::read(&file).unwrap(), b"mine");
    at("/nonexistent/vsock", "/nonexistent/vsock cannot be the vsock's socket: No such file");
    let path = scratch.0.path().join("used");
    let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    at(path.to_str().unwrap(), "it is in use, perhaps by another guest; choose another path");
    at(&format!("/tmp/{}", "x".repeat(92)), "has 97 bytes; the path of a socket has at most 96");
}

#[test]
fn an_invalid_console_file_is_refused() {
    let scratch = KernelFolder::new();
    let kernel = scratch.kernel();
    // Without KVM the error is about KVM, and the console file is not reached.
    let outcome = run(kindling()
        .args(["boot", "--kernel", &kernel, "--console", "/nonexistent/console"])
        .stdin(Stdio::null()));
    outcome.expect_status(2);
}

#[test]
fn usage_errors_are_status_2() {
    for arguments in [
        &["boot"][..],
        &["boot", "--kernel", "a", "--image", "b"],
        &["boot", "--kernel", "a", "--memory", "many"],
        &["boot", "--kernel", "a", "--memory", "-1"],
        &["boot", "--kernel", "a", "--user", "root"],
        &["boot", "--kernel", "a", "--verify"],
        &["bot"],
    ] {
        run(kindling().args(arguments).stdin(Stdio::null())).expect_status(2).expect_stderr("kindling: ");
    }
    let not_utf8 = OsString::from_vec(vec![0xff]);
    run(kindling().args(["boot", "--kernel"]).arg(&not_utf8).stdin(Stdio::null())).expect_status(2);
}

#[test]
fn invalid_disks_are_refused() {
    let scratch = KernelFolder::new();
    let kernel = scratch.kernel();
    let refused = |drives: &[&str], expected: &str| {
        let mut arguments = vec!["--kernel", &kernel];
        arguments.extend(drives.iter().flat_map(|drive| ["--drive", drive]));
        refused(&arguments, expected);
    };
    refused(&["/nonexistent"], "/nonexistent cannot be a drive: No such file");
    refused(&["/tmp"], "/tmp cannot be a drive: it is a directory");
    refused(&["/tmp:ro"], "/tmp cannot be a drive: it is a directory");
    refused(&["/dev/null"], "/dev/null cannot be a drive: it is neither a file nor a block device");
    refused(&[&scratch.file("empty", b"")], "it is empty");
    refused(&[&scratch.file("odd", &[0; 1000])], "its 1000 bytes are not a multiple of 512");
    let disk = scratch.file("disk", &[0; 4096]);
    refused(&[&disk, &disk], "it is in use");
    refused(&[&disk, &format!("{disk}:ro")], "it is in use");
    let fifo = scratch.0.path().join("fifo");
    assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    refused(&[fifo.to_str().unwrap()], "it is neither a file nor a block device");
    let many = vec![format!("{disk}:ro"); 20];
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    refused(&many, "20 devices are configured; a machine has at most 19");
}

#[test]
fn invalid_device_options_are_refused() {
    let scratch = KernelFolder::new();
    let kernel = scratch.kernel();
    let path = format!("/tmp/{}", "x".repeat(103));
    let table: [(&[&str], &str); 7] = [
        (&["--vsock", &path], "has 108 bytes; the path of a socket has at most 96"),
        (&["--net", "tap0,mac=06:00"], "--net tap0,mac=06:00: \"06:00\" is not an Ethernet address"),
        (&["--net", "tap0,mac=ff:ff:ff:ff:ff:ff"], "is the address of a group of cards"),
        (&["--net", "tap0,mtu=70000"], "\"70000\" is not a number of bytes"),
        (&["--net", "tap0,tap1"], "\"tap1\" is none of"),
        (&["-p", "8080:80"], "--publish 8080:80: it needs --net user"),
        (&["--net", "user", "-p", "8080:"], "\"\" is not a port"),
    ];
    for (arguments, expected) in table {
        refused(&[&["--kernel", &kernel], arguments].concat(), expected);
    }
}

#[test]
fn invalid_devices_in_a_configuration_file_are_refused() {
    let scratch = KernelFolder::new();
    let kernel = scratch.kernel();
    let disk = scratch.file("disk", &[0; 4096]);
    let drive = |id: &str, more: &str| format!(r#"{{"drive_id": "{id}", "path_on_host": "{disk}"{more}}}"#);
    let root = |id| drive(id, r#", "is_root_device": true, "is_read_only": true"#);
    let read_only = r#", "is_read_only": true"#;
    for (sections, expected) in [
        (format!(r#""drives": [{}]"#, drive("a b", "")), "\"a b\" cannot be the name of a device"),
        (format!(r#""drives": [{}]"#, drive("", "")), "\"\" cannot be the name of a device"),
        (
            format!(r#""drives": [{}, {}]"#, drive("a", read_only), drive("a", read_only)),
            "two devices are called \"a\"",
        ),
        (format!(r#""drives": [{}, {}]"#, drive("a", ""), drive("b", "")), "it is in use"),
        (
            format!(r#""drives": [{}, {}]"#, root("a"), root("b")),
            "a and b are both the root device; a machine has one",
        ),
        (format!(r#""drives": [{}]"#, drive("a", r#", "cache_type": "None""#)), "unknown variant `None`"),
        (
            format!(r#""drives": [{}]"#, drive("a", r#", "socket": "x""#)),
            "drives.socket = x is not supported",
        ),
        (
            r#""vsock": {"guest_cid": 2, "uds_path": "/tmp/v"}"#.into(),
            "guest_cid is 2; those of guests go from 3",
        ),
        (r#""vsock": {"guest_cid": 4294967295, "uds_path": "/tmp/v"}"#.into(), "guest_cid is 4294967295"),
        (
            r#""network-interfaces": [{"iface_id": "e", "host_dev_name": "t", "guest_mac": "x"}]"#.into(),
            "\"x\" is not an Ethernet address",
        ),
    ] {
        let file = scratch.file(
            "vm.json",
            format!(r#"{{"boot-source": {{"kernel_image_path": "{kernel}"}}, {sections}}}"#).as_bytes(),
        );
        refused(&["--config-file", &file], expected);
    }
}

#[test]
fn invalid_network_options_are_refused() {
    let scratch = KernelFolder::new();
    let kernel = scratch.kernel();
    for (net, expected) in [
        ("a-name-of-17-byte", "an interface name has 1 to 15 bytes"),
        ("", "an interface name has 1 to 15 bytes"),
        ("a/b", "this is not a valid interface name"),
        ("tap0,mtu=67", "network interface net0: its MTU is 67; one is 68 to 65535 bytes"),
        ("tap0,mtu=65536", "\"65536\" is not a number of bytes"),
        ("tap0,gw=10.0.0.1", "needs the guest's address (ip=ADDRESS/PREFIX) too"),
        ("user,ip=10.0.0.2/24", "with passt the guest's address is 10.0.2.15"),
    ] {
        refused(&["--net", net, "--kernel", &kernel], expected);
    }
    // A port that is in use.
    let listener = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let expected = format!("port {port} of the host is in use; choose another port");
    refused(&["--net", "user", "-p", &format!("{port}:80"), "--kernel", &kernel], &expected);
}

#[test]
#[expect(clippy::print_stdout, reason = "skipped tests are reported")]
fn net_user_without_passt_is_refused() {
    if ["/usr/bin/passt", "/usr/local/bin/passt"].into_iter().any(|program| Path::new(program).exists()) {
        println!("skipped: this host has passt in a system folder");
        return;
    }
    let scratch = KernelFolder::new();
    let kernel = scratch.kernel();
    let outcome = run(kindling().env("PATH", "").args(["boot", "--net", "user", "--kernel", &kernel]));
    outcome
        .expect_status(2)
        .expect_stderr("the program passt is not installed; Debian has it in the package passt");
}

#[test]
#[expect(clippy::print_stdout, reason = "skipped tests are reported")]
fn a_host_without_usable_kvm_is_reported_on_one_line() {
    if kindling_vmm::probe::probe().is_good() {
        println!("skipped: this host has a usable KVM");
        return;
    }
    let scratch = KernelFolder::new();
    let mut command = kindling();
    command.arg("run").arg(tests::testbed("busybox.erofs")).arg("true").stdin(Stdio::null());
    command.env("XDG_CACHE_HOME", scratch.0.path()).env("XDG_RUNTIME_DIR", scratch.0.path());
    let outcome = run(command.env("KINDLING_IMAGE", tests::testbed("images/busybox")));
    assert!([Some(2), Some(125)].contains(&outcome.status), "{outcome}");
    assert_eq!(outcome.stderr.lines().count(), 1, "{outcome}");
    outcome.expect_stderr("; `kindling doctor` shows what this host lacks, and `cargo xtask run`");
}

/// `kindling` passes the monitor a socket as its standard input.
#[test]
fn kindling_vmm_started_by_hand_or_by_another_version_is_refused() {
    let outcome =
        run(std::process::Command::new(tests::testbed("kindling-vmm")).stdin(std::process::Stdio::null()));
    outcome.expect_status(125).expect_stderr("this program is started by `kindling`, not by users");
    let (ours, its) = std::os::unix::net::UnixStream::pair().unwrap();
    std::io::Write::write_all(&mut &ours, b"\x05\0\0\0hello").unwrap();
    drop(ours);
    let input = std::process::Stdio::from(std::os::fd::OwnedFd::from(its));
    let outcome = run(std::process::Command::new(tests::testbed("kindling-vmm")).stdin(input));
    outcome.expect_status(125).expect_stderr("of different versions");
    let (_ours, its) = std::os::unix::net::UnixStream::pair().map(|(ours, its)| (drop(ours), its)).unwrap();
    let input = std::process::Stdio::from(std::os::fd::OwnedFd::from(its));
    let outcome = run(std::process::Command::new(tests::testbed("kindling-vmm")).stdin(input));
    assert_eq!(outcome.expect_status(0).stderr, "", "a closed socket without a request must not be an error");
}
