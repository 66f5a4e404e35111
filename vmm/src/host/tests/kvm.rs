//! The finding about the KVM probe, and KVM's parameters.

use super::{HARDWARE, Host, expect, expect_finding, software};
use crate::host::{Finding, Status, kvm};
use crate::kvm::KvmError;
use crate::kvm::probe::Probe;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

fn cpuinfo(flags: &str) -> String {
    format!(
        "processor\t: 0\nvmx flags\t: ept\nflags\t\t: fpu {flags} sse\n\nprocessor\t: 1\nflags\t\t: vmx svm\n"
    )
}

#[track_caller]
fn expect_kvm(probe: &Probe, files: &[(&str, &str)], status: Status, words: &str) -> Finding {
    let finding = kvm::kvm(&Host::with(files).sources(), probe);
    expect_finding(&finding, status, words);
    finding
}

#[test]
fn hardware_kvm_is_good_and_reports_nesting() {
    let finding = expect_kvm(&HARDWARE, &[("/proc/cpuinfo", &cpuinfo("vmx"))], Status::Good, "speed");
    assert!(finding.fact.contains("350.0µs"), "{}", finding.fact);
    assert!(!finding.meaning.contains("virtual machine"));
    expect_kvm(&HARDWARE, &[("/proc/cpuinfo", &cpuinfo("vmx hypervisor"))], Status::Good, "virtual machine");
    expect_kvm(&HARDWARE, &[], Status::Good, "speed");
}

#[test]
fn software_kvm_is_bad_with_its_cause_and_remedy() {
    let hidden = cpuinfo("hypervisor");
    let finding =
        expect_kvm(&software(), &[("/proc/cpuinfo", &hidden)], Status::Bad, "nested virtualization");
    assert_eq!(finding.fact, "software KVM: POPCNT failed");
    assert!(finding.advice.unwrap().contains("cargo xtask lab"));
    let finding =
        expect_kvm(&software(), &[("/sys/module/kvm_pvm/refcnt", "0")], Status::Bad, "grep -E 'vmx|svm'");
    assert_eq!(finding.fact, "software KVM (kvm_pvm): POPCNT failed");
    let both = [("/sys/module/kvm_pvm/refcnt", "0"), ("/proc/cpuinfo", &cpuinfo("svm"))];
    expect_kvm(&software(), &both, Status::Bad, "`sudo modprobe -r kvm_pvm && sudo modprobe kvm_amd`");
}

#[test]
fn without_a_device_the_advice_depends_on_the_processor() {
    for (flags, advice) in [
        ("vmx", "`sudo modprobe kvm_intel`"),
        ("svm hypervisor", "`sudo modprobe kvm_amd`"),
        ("hypervisor", "nested virtualization"),
        ("", "neither vmx nor svm"),
    ] {
        expect_kvm(&Probe::Absent, &[("/proc/cpuinfo", &cpuinfo(flags))], Status::Bad, advice);
    }
    let loaded = [("/sys/module/kvm_intel/refcnt", "0"), ("/proc/cpuinfo", &cpuinfo("vmx"))];
    expect_kvm(&Probe::Absent, &loaded, Status::Bad, "--device /dev/kvm");
    expect_kvm(&Probe::Absent, &[("/proc/cpuinfo", "Features : fp asimd")], Status::Bad, "grep -E 'vmx|svm'");
    expect_kvm(&Probe::Absent, &[], Status::Bad, "grep -E 'vmx|svm'");
}

#[test]
fn a_broken_device_is_reported_with_its_cause() {
    let source = std::io::Error::from_raw_os_error(libc::EBUSY);
    let broken = Probe::Broken(KvmError::Ioctl { what: "create a VM", source });
    let finding = expect_kvm(&broken, &[], Status::Bad, "dmesg");
    assert!(finding.fact.starts_with("KVM refused to create a VM: "), "{}", finding.fact);
    assert!(finding.fact.contains("busy"), "{}", finding.fact);
}

/// Expects advice for a user without permission to open the device, which has this mode and the group of the files that
/// this process creates.
#[track_caller]
fn expect_permission(mode: u32, group: &str, status: &str, words: &str) {
    let host = Host::with(&[("/dev/kvm", "")]);
    let device = host.sources().path("/dev/kvm");
    fs::set_permissions(&device, fs::Permissions::from_mode(mode)).unwrap();
    let gid = fs::metadata(&device).unwrap().gid().to_string();
    host.write("/etc/group", group.replace("GID", &gid).as_bytes());
    host.write("/proc/self/status", status.replace("GID", &gid).as_bytes());
    let finding = kvm::kvm(&host.sources(), &Probe::NoPermission);
    expect_finding(&finding, Status::Bad, words);
    assert!(finding.fact.contains(&format!("mode {mode:04o}")), "{}", finding.fact);
}

#[test]
fn a_lack_of_permission_comes_with_a_remedy() {
    const STRANGER: &str =
        "Name:\tx\nUid:\t1000\t1000\t1000\t1000\nGid:\t1000\t1000\t1000\t1000\nGroups:\t24 25 \n";
    const MEMBER: &str = "Uid:\t1000\t1000\t1000\t1000\nGid:\t1000\t1000\t1000\t1000\nGroups:\t24 GID \n";
    const ROOT: &str = "Uid:\t0\t0\t0\t0\nGid:\t0\t0\t0\t0\nGroups:\t\n";
    const NO_GROUP: &str =
        "`sudo chown root:kvm /dev/kvm && sudo chmod 0660 /dev/kvm`; `sudo usermod -aG kvm $USER`";
    expect_permission(0o600, "wheel:x:GID:\n", STRANGER, NO_GROUP);
    expect_permission(0o600, "wheel:x:GID:\n", STRANGER, "groupadd --system kvm");
    expect_permission(0o640, "wheel:x:GID:\nkvm:x:1:\n", STRANGER, "join that: `sudo chown");
    expect_permission(0o660, "wheel:x:GID:\n", MEMBER, "permissions allow it");
    expect_permission(0o640, "wheel:x:GID:\n", MEMBER, NO_GROUP);
    expect_permission(0o620, "wheel:x:GID:\n", MEMBER, NO_GROUP);
    expect_permission(0o666, "wheel:x:GID:\n", STRANGER, "permissions allow it");
    expect_permission(0o600, "wheel:x:GID:\n", ROOT, "permissions allow it");
    expect_permission(0o666, "", "", "permissions allow it");
    expect_permission(0o600, "noise", "Uid:\tx\n", NO_GROUP);
    // Joining the group of root is never advised. That group owns the files of tests that run as root.
    let expected =
        if rustix::process::getegid().is_root() { NO_GROUP } else { "sudo usermod -aG wheel $USER" };
    expect_permission(0o660, "a:x:77777:\nwheel:x:GID:me\n", STRANGER, expected);
    let finding = expect_kvm(&Probe::NoPermission, &[], Status::Bad, "usermod -aG kvm");
    assert!(!finding.meaning.contains("software"), "{}", finding.meaning);
    let files = [("/proc/cpuinfo", &*cpuinfo("hypervisor"))];
    let finding = expect_kvm(&Probe::NoPermission, &files, Status::Bad, "usermod -aG kvm");
    assert!(finding.meaning.contains("probably a software KVM"), "{}", finding.meaning);
}

#[test]
fn a_device_of_another_group_names_that_group() {
    let host = Host::with(&[("/dev/kvm", ""), ("/etc/group", "adm:x:4:\nvirt:x:4321:\n")]);
    let device = host.sources().path("/dev/kvm");
    fs::set_permissions(&device, fs::Permissions::from_mode(0o660)).unwrap();
    // Only root can give files away.
    if std::os::unix::fs::chown(&device, None, Some(4321)).is_ok() {
        let finding = kvm::kvm(&host.sources(), &Probe::NoPermission);
        assert_eq!(finding.advice.unwrap(), "`sudo usermod -aG virt $USER`, and log in again");
        host.write("/etc/group", b"bad name;reboot:x:4321:\n");
        let finding = kvm::kvm(&host.sources(), &Probe::NoPermission);
        assert_eq!(finding.advice.unwrap(), "`sudo usermod -aG 4321 $USER`, and log in again");
    }
}

#[test]
fn kvm_parameters() {
    const EPT: &str = "/sys/module/kvm_intel/parameters/ept";
    const NPT: &str = "/sys/module/kvm_amd/parameters/npt";
    const AT_LOAD: &str = "/sys/module/kvm/parameters/enable_virt_at_load";
    expect(kvm::parameters, &[(EPT, "Y\n"), (AT_LOAD, "Y\n")], Status::Good, "nested paging");
    expect(kvm::parameters, &[(NPT, "1\n")], Status::Good, "nested paging");
    expect(kvm::parameters, &[(EPT, "N\n")], Status::Bad, "modprobe kvm_intel");
    expect(kvm::parameters, &[(NPT, "0\n")], Status::Bad, "`npt=0`");
    expect(kvm::parameters, &[(NPT, "Y\n"), (AT_LOAD, "N\n")], Status::Improvable, "enable_virt_at_load=0");
    expect(kvm::parameters, &[(EPT, "maybe")], Status::Unknown, "modinfo kvm_intel");
    expect(kvm::parameters, &[], Status::Unknown, "see kvm");
}
