//! Hosts that consist of files: each check is tested with good, bad, missing and invalid content.

mod kvm;

use super::{Finding, Report, Sources, Status};
use super::{cgroup, isolation, kernel, memory, nx_huge_pages, sharing};
use crate::kvm::KvmError;
use crate::kvm::probe::{Probe, Restriction};
use proptest::prelude::*;
use std::fs;
use std::time::Duration;
use tempfile::TempDir;

/// A host that consists of files only.
struct Host {
    root: TempDir,
}

impl Host {
    fn with(files: &[(&str, &str)]) -> Self {
        let host = Self { root: TempDir::new().unwrap() };
        for (path, text) in files {
            host.write(path, text.as_bytes());
        }
        host
    }

    fn write(&self, path: &str, bytes: &[u8]) {
        let path = self.sources().path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    fn sources(&self) -> Sources {
        Sources::under(self.root.path())
    }
}

type Check = fn(&Sources) -> Finding;

/// Every check that only reads files.
const CHECKS: [Check; 14] = [
    super::kvm::parameters,
    nx_huge_pages::nx_huge_pages,
    kernel::kernel,
    cgroup::cgroup,
    memory::memory,
    memory::hugepages,
    memory::thp,
    isolation::tun,
    isolation::user_namespaces,
    isolation::jail,
    sharing::smt,
    sharing::mitigations,
    sharing::ksm,
    sharing::swap,
];

/// Every file that a check reads.
const FILES: [&str; 33] = [
    "/proc/cpuinfo",
    "/proc/meminfo",
    "/proc/self/cgroup",
    "/proc/self/mountinfo",
    "/proc/self/status",
    "/proc/sys/kernel/apparmor_restrict_unprivileged_userns",
    "/proc/sys/kernel/osrelease",
    "/proc/sys/kernel/seccomp/actions_avail",
    "/proc/sys/kernel/unprivileged_userns_clone",
    "/proc/sys/user/max_user_namespaces",
    "/proc/swaps",
    "/proc/sys/vm/overcommit_memory",
    "/sys/devices/system/cpu/smt/active",
    "/sys/devices/system/cpu/vulnerabilities/itlb_multihit",
    "/sys/devices/system/cpu/vulnerabilities/mds",
    "/sys/devices/system/cpu/vulnerabilities/vmscape",
    "/sys/fs/cgroup/cgroup.controllers",
    "/sys/fs/cgroup/cgroup.procs",
    "/sys/fs/cgroup/memory.max",
    "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages",
    "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages",
    "/sys/kernel/mm/hugepages/hugepages-2048kB/resv_hugepages",
    "/sys/kernel/mm/ksm/run",
    "/sys/kernel/mm/transparent_hugepage/enabled",
    "/sys/kernel/mm/transparent_hugepage/hugepages-2048kB/enabled",
    "/sys/kernel/security/lsm",
    "/sys/module/kvm/parameters/enable_virt_at_load",
    "/sys/module/kvm/parameters/nx_huge_pages",
    "/sys/module/kvm_amd/parameters/npt",
    "/sys/module/kvm_intel/parameters/ept",
    "/dev/kvm",
    "/dev/net/tun",
    "/etc/group",
];

const RELEASE: &str = "/proc/sys/kernel/osrelease";
const NX: &str = "/sys/module/kvm/parameters/nx_huge_pages";
const MULTIHIT: &str = "/sys/devices/system/cpu/vulnerabilities/itlb_multihit";
const MOUNTS: &str = "/proc/self/mountinfo";
const CONTROLLERS: &str = "/sys/fs/cgroup/cgroup.controllers";
const CGROUP2: &str = "35 24 0:30 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n";
const CGROUP2_FAVORED: &str = "35 24 0:30 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate,favordynmods\n";
/// The place of this process in the hierarchy, and the file that this user may write to.
const OWN: (&str, &str) = ("/proc/self/cgroup", "0::/\n");
const PROCS: (&str, &str) = ("/sys/fs/cgroup/cgroup.procs", "");
const CGROUP1: &str = "36 31 0:33 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n";

/// Expects a finding of this status on a host with these files, with `words` in its advice, or in its meaning if there
/// is no advice.
#[track_caller]
fn expect(check: Check, files: &[(&str, &str)], status: Status, words: &str) {
    let finding = check(&Host::with(files).sources());
    expect_finding(&finding, status, words);
}

#[track_caller]
fn expect_finding(finding: &Finding, status: Status, words: &str) {
    assert_eq!(finding.status, status, "{finding:#?}");
    let text = finding.advice.as_ref().unwrap_or(&finding.meaning);
    assert!(text.contains(words), "{words:?} is not in {finding:#?}");
}

const HARDWARE: Probe = Probe::Hardware { loop_time: Duration::from_micros(350), missing: Vec::new() };

fn software() -> Probe {
    Probe::Software { failed_on: "POPCNT failed".into() }
}

#[test]
fn nx_huge_pages_of_a_processor_that_is_not_affected() {
    let check = |nx: &str, release: &str, mounts: &str, status, words: &str| {
        let files = [(NX, nx), (MULTIHIT, "Not affected\n"), (RELEASE, release), (MOUNTS, mounts)];
        expect(nx_huge_pages::nx_huge_pages, &files, status, words);
    };
    check("never\n", "6.1.0", CGROUP2, Status::Good, "without the thread");
    check("N\n", "6.8.0-45-generic", CGROUP2, Status::Improvable, "echo never | sudo tee /sys/module/kvm");
    check("N\n", "6.1.0-25-amd64", CGROUP2, Status::Improvable, "may refuse the value");
    check("N\n", "6.8.0", CGROUP2_FAVORED, Status::Good, "favordynmods");
    check("N\n", "6.12.1", CGROUP2, Status::Improvable, "echo never");
    check("N\n", "6.12.2", CGROUP2, Status::Good, "cheaply");
    check("N\n", "6.18.44", CGROUP2, Status::Good, "cheaply");
    check("N\n", "noise", "noise", Status::Improvable, "echo never");
    check("Y\n", "6.18.44", CGROUP2, Status::Improvable, "echo auto");
}

#[test]
fn only_old_kernels_may_refuse_the_value_never() {
    for (release, may_refuse) in [("6.1.0", true), ("6.4.16", true), ("6.5.0", false), ("noise", true)] {
        let host = Host::with(&[(NX, "N"), (MULTIHIT, "Not affected"), (RELEASE, release)]);
        let advice = nx_huge_pages::nx_huge_pages(&host.sources()).advice.unwrap();
        assert_eq!(advice.contains("may refuse the value"), may_refuse, "{release}: {advice}");
    }
}

#[test]
fn nx_huge_pages_of_a_processor_that_is_affected() {
    let check = |nx: &str, multihit: &str, release: &str, status, words: &str| {
        let files = [(NX, nx), (MULTIHIT, multihit), (RELEASE, release), (MOUNTS, CGROUP2)];
        expect(nx_huge_pages::nx_huge_pages, &files, status, words);
    };
    const SPLIT: &str = "KVM: Mitigation: Split huge pages\n";
    check("Y\n", SPLIT, "6.8.0", Status::Improvable, "favordynmods");
    check("Y\n", SPLIT, "6.13.0", Status::Good, "cheaply");
    check("N\n", "KVM: Vulnerable\n", "6.18.0", Status::Bad, "mitigations=off");
    check("never\n", "KVM: Vulnerable\n", "6.18.0", Status::Bad, "mitigations=off");
    // For a processor of unknown status the advice does not disable the mitigation.
    check("N\n", "", "6.8.0", Status::Improvable, "favordynmods");
}

#[test]
fn nx_huge_pages_that_say_nothing() {
    expect(nx_huge_pages::nx_huge_pages, &[], Status::Unknown, "kvm module");
    expect(nx_huge_pages::nx_huge_pages, &[(NX, "\u{1b}[2J")], Status::Unknown, "modinfo kvm");
    let finding = nx_huge_pages::nx_huge_pages(&Host::with(&[(NX, "\u{1b}[2J")]).sources());
    assert!(!finding.fact.contains('\u{1b}'), "{}", finding.fact);
}

#[test]
fn kernels() {
    expect(kernel::kernel, &[(RELEASE, "6.18.44-fc-v657\n")], Status::Good, "known improvements");
    expect(kernel::kernel, &[(RELEASE, "7.0-rc1\n")], Status::Good, "known improvements");
    expect(kernel::kernel, &[(RELEASE, "6.12.117+deb12-cloud-amd64\n")], Status::Improvable, "6.18");
    expect(kernel::kernel, &[(RELEASE, "generic\n")], Status::Unknown, "uname -r");
    expect(kernel::kernel, &[], Status::Unknown, "uname -r");
}

#[test]
fn the_finding_lists_the_missing_improvements() {
    for (release, lacks) in [
        ("6.10.14", vec!["6.11", "6.12,", "6.13", "6.18"]),
        ("6.11.0", vec!["6.12,", "6.13", "6.18"]),
        ("6.12.1", vec!["6.13", "6.18"]),
        ("6.12.2", vec!["6.18"]),
        ("6.17.9", vec!["6.18"]),
    ] {
        let finding = kernel::kernel(&Host::with(&[(RELEASE, release)]).sources());
        for since in ["6.11", "6.12,", "6.13", "6.18"] {
            let said = finding.meaning.contains(&format!("since {since}"));
            assert_eq!(said, lacks.contains(&since), "{release}: {since}: {}", finding.meaning);
        }
    }
}

#[test]
fn cgroups() {
    let check = |mounts: &str, controllers: &str, release: &str, status, words: &str| {
        let files = [(MOUNTS, mounts), (CONTROLLERS, controllers), (RELEASE, release), OWN, PROCS];
        expect(cgroup::cgroup, &files, status, words);
    };
    const ALL: &str = "cpuset cpu io memory hugetlb pids\n";
    check(CGROUP2_FAVORED, ALL, "6.8.0", Status::Good, "does not wait");
    check(CGROUP2, ALL, "6.8.0", Status::Improvable, "mount -o remount,favordynmods /sys/fs/cgroup");
    check(CGROUP2, ALL, "noise", Status::Improvable, "remount,favordynmods");
    check(&CGROUP2.replace("/sys/fs/cgroup", "/c;reboot"), ALL, "6.8.0", Status::Improvable, "-t cgroup2");
    check(CGROUP2, ALL, "5.15.0", Status::Good, "share");
    check(CGROUP2_FAVORED, "cpu memory\n", "6.8.0", Status::Improvable, "Delegate=yes");
    let hybrid = format!("{CGROUP1}{CGROUP2_FAVORED}");
    check(&hybrid, "\n", "6.8.0", Status::Improvable, "systemd.unified_cgroup_hierarchy=1");
    check(CGROUP1, ALL, "6.8.0", Status::Improvable, "systemd.unified_cgroup_hierarchy=1");
    check("noise - cgroup2", ALL, "6.8.0", Status::Improvable, "mount -t cgroup2");
    check("", "", "", Status::Improvable, "mount -t cgroup2");
    expect(cgroup::cgroup, &[], Status::Unknown, "mount -t cgroup2");
}

#[test]
fn only_slow_kernels_wait_for_cgroups_to_create_a_vm() {
    for (release, waits) in [("6.8.0", true), ("noise", true), ("6.12.2", false), ("6.18.0", false)] {
        let host = Host::with(&[(MOUNTS, CGROUP2), (CONTROLLERS, "cpu memory pids"), (RELEASE, release)]);
        let meaning = cgroup::cgroup(&host.sources()).meaning;
        assert_eq!(meaning.contains("Creating a VM"), waits, "{release}: {meaning}");
        assert!(meaning.contains("oving a process"), "{release}: {meaning}");
    }
}

#[test]
fn a_cgroup_that_is_not_delegated_is_improvable() {
    let files = [(MOUNTS, CGROUP2_FAVORED), (CONTROLLERS, "cpu memory pids"), (RELEASE, "6.8.0"), OWN];
    expect(cgroup::cgroup, &files, Status::Improvable, "-p Delegate=yes");
    let finding = cgroup::cgroup(&Host::with(&[&files[..], &[PROCS]].concat()).sources());
    assert_eq!(
        finding.fact,
        "cgroup v2 at /sys/fs/cgroup; /sys/fs/cgroup is delegated to this user; favordynmods is on"
    );
}

#[test]
fn missing_controllers_are_named() {
    let host = Host::with(&[(MOUNTS, CGROUP2_FAVORED), (CONTROLLERS, "memory cpuset pids")]);
    let finding = cgroup::cgroup(&host.sources());
    assert_eq!(finding.fact, "cgroup v2 at /sys/fs/cgroup without the controllers cpu; favordynmods is on");
}

const PLENTY: &str = "MemTotal:       24684092 kB\nMemFree:  1 kB\nMemAvailable:   24263628 kB\n";

#[test]
fn amounts_of_memory() {
    let check = |meminfo: &str, status, words: &str| {
        expect(memory::memory, &[("/proc/meminfo", meminfo)], status, words);
    };
    check(PLENTY, Status::Good, "first touches");
    check("MemTotal: 2097152 kB\nMemAvailable: 1048575 kB\n", Status::Improvable, "--memory");
    check("MemTotal: 2097152 kB\nMemAvailable: 262143 kB\n", Status::Bad, "--memory");
    check("MemTotal: 2097152 kB\n", Status::Unknown, "free -m");
    check("MemTotal: x kB\nMemAvailable: 99999999999999999999 kB\n", Status::Unknown, "free -m");
    check("MemTotal: 1 kB\nMemAvailable: 18446744073709551615 kB\n", Status::Unknown, "free -m");
    expect(memory::memory, &[], Status::Unknown, "free -m");
}

#[test]
fn memory_that_may_not_be_overcommitted() {
    const OVERCOMMIT: &str = "/proc/sys/vm/overcommit_memory";
    let files = |mode| [("/proc/meminfo", PLENTY), (OVERCOMMIT, mode)];
    expect(memory::memory, &files("2\n"), Status::Improvable, "vm.overcommit_memory=0");
    expect(memory::memory, &files("0\n"), Status::Good, "first touches");
    expect(memory::memory, &files("noise"), Status::Good, "first touches");
}

#[test]
fn the_lowest_limit_of_all_ancestors_counts() {
    let check = |own: &str, limits: &[(&str, &str)], status, words: &str| {
        let mut files = vec![("/proc/meminfo", PLENTY), (MOUNTS, CGROUP2), ("/proc/self/cgroup", own)];
        files.extend(limits);
        expect(memory::memory, &files, status, words);
    };
    const TOP: &str = "/sys/fs/cgroup/memory.max";
    const OUTER: &str = "/sys/fs/cgroup/a.slice/memory.max";
    const INNER: &str = "/sys/fs/cgroup/a.slice/b/memory.max";
    check("0::/\n", &[(TOP, "104857600\n")], Status::Bad, "memory.max");
    check("0::/a.slice/b\n", &[(OUTER, "104857600\n"), (INNER, "max\n")], Status::Bad, "memory.max");
    check("0::/a.slice/b\n", &[(OUTER, "max\n"), (INNER, "524288000\n")], Status::Improvable, "memory.max");
    check("0::/a.slice/b\n", &[(OUTER, "104857600\n"), (INNER, "524288000\n")], Status::Bad, "memory.max");
    check("0::/a.slice\n", &[(OUTER, "max\n"), (INNER, "1\n")], Status::Good, "first touches");
    check("1:cpu:/\n", &[(TOP, "1\n")], Status::Good, "first touches");
    check("0::/../x\n", &[(TOP, "1\n")], Status::Good, "first touches");
    check("0::/\n", &[(TOP, "\u{fffd}\n")], Status::Good, "first touches");
}

#[test]
fn a_container_without_a_cgroup_namespace_finds_its_limit() {
    let mounts = "35 24 0:30 /docker/1 /sys/fs/cgroup ro - cgroup2 cgroup ro\n";
    let files = [
        ("/proc/meminfo", PLENTY),
        (MOUNTS, mounts),
        ("/proc/self/cgroup", "0::/docker/1/x\n"),
        ("/sys/fs/cgroup/x/memory.max", "104857600\n"),
    ];
    expect(memory::memory, &files, Status::Bad, "memory.max");
}

#[test]
fn reserved_huge_pages() {
    let check = |all: &str, free: &str, reserved: &str, status, words: &str| {
        let path = |name| format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{name}_hugepages");
        let (nr, free_path, resv) = (path("nr"), path("free"), path("resv"));
        let files = [(&*nr, all), (&*free_path, free), (&*resv, reserved)];
        expect(memory::hugepages, &files, status, words);
    };
    check("512\n", "500\n", "0\n", Status::Good, "32 to 56");
    check("0\n", "0\n", "0\n", Status::Improvable, "vm.nr_hugepages");
    check("512\n", "0\n", "0\n", Status::Improvable, "raise");
    check("512\n", "100\n", "100\n", Status::Improvable, "raise");
    check("512\n", "100\n", "noise", Status::Good, "32 to 56");
    check("18446744073709551615", "18446744073709551615", "0", Status::Good, "32 to 56");
    check("many\n", "0\n", "0\n", Status::Unknown, "meminfo");
    expect(memory::hugepages, &[], Status::Unknown, "meminfo");
}

#[test]
fn transparent_huge_pages() {
    const ENABLED: &str = "/sys/kernel/mm/transparent_hugepage/enabled";
    const OF_2_MIB: &str = "/sys/kernel/mm/transparent_hugepage/hugepages-2048kB/enabled";
    expect(memory::thp, &[(ENABLED, "[always] madvise never\n")], Status::Good, "where it can");
    expect(memory::thp, &[(ENABLED, "always [madvise] never\n")], Status::Good, "VMM asks");
    expect(memory::thp, &[(ENABLED, "always madvise [never]\n")], Status::Improvable, "echo madvise");
    expect(memory::thp, &[(ENABLED, "always madvise never\n")], Status::Unknown, "cat");
    expect(memory::thp, &[], Status::Unknown, "cat /sys/kernel/mm/transparent_hugepage/enabled");
    let inherited = [(ENABLED, "always madvise [never]"), (OF_2_MIB, "always [inherit] madvise never")];
    expect(memory::thp, &inherited, Status::Improvable, "transparent_hugepage/enabled`");
    let own = [(ENABLED, "[always] madvise never"), (OF_2_MIB, "always inherit madvise [never]")];
    expect(memory::thp, &own, Status::Improvable, "hugepages-2048kB/enabled`");
}

#[test]
fn tap_devices() {
    expect(isolation::tun, &[("/dev/net/tun", "")], Status::Good, "CAP_NET_ADMIN");
    expect(isolation::tun, &[], Status::Improvable, "modprobe tun");
    // A directory cannot be opened for writing, not even by root.
    expect(isolation::tun, &[("/dev/net/tun/x", "")], Status::Unknown, "ls -l");
}

#[test]
fn namespaces_of_users() {
    const MOST: (&str, &str) = ("/proc/sys/user/max_user_namespaces", "96365\n");
    const DEBIAN: &str = "/proc/sys/kernel/unprivileged_userns_clone";
    const UBUNTU: &str = "/proc/sys/kernel/apparmor_restrict_unprivileged_userns";
    let check = isolation::user_namespaces;
    expect(check, &[MOST], Status::Good, "without root");
    expect(check, &[MOST, (DEBIAN, "1\n"), (UBUNTU, "0\n")], Status::Good, "without root");
    expect(check, &[(MOST.0, "0\n")], Status::Improvable, "user.max_user_namespaces");
    expect(check, &[MOST, (DEBIAN, "0\n")], Status::Improvable, "unprivileged_userns_clone=1");
    expect(check, &[MOST, (UBUNTU, "1\n")], Status::Improvable, "AppArmor profile");
    expect(check, &[(MOST.0, "few")], Status::Unknown, "unshare");
    expect(check, &[], Status::Unknown, "unshare");
}

#[test]
fn layers_of_the_jail() {
    const ACTIONS: (&str, &str) =
        ("/proc/sys/kernel/seccomp/actions_avail", "kill_process trap errno allow\n");
    const MODULES: (&str, &str) = ("/sys/kernel/security/lsm", "lockdown,capability,landlock,yama\n");
    let check = isolation::jail;
    for (release, status, words) in [
        ("6.12.1-amd64", Status::Good, "no further"),
        ("6.11.9", Status::Improvable, "Linux 6.12"),
        ("6.1.0-18", Status::Improvable, "Linux 6.12"),
        ("5.10.0", Status::Bad, "5.13"),
        ("new", Status::Unknown, "uname -r"),
    ] {
        expect(check, &[ACTIONS, MODULES, (RELEASE, release)], status, words);
    }
    const NEW: (&str, &str) = (RELEASE, "6.12.1");
    expect(
        check,
        &[ACTIONS, (MODULES.0, "capability,yama\n"), NEW],
        Status::Bad,
        "lsm=landlock,capability,yama`",
    );
    expect(check, &[(ACTIONS.0, "allow\n"), MODULES, NEW], Status::Bad, "CONFIG_SECCOMP_FILTER");
    expect(check, &[ACTIONS, NEW], Status::Unknown, "--jail require");
    expect(check, &[MODULES, NEW], Status::Unknown, "--jail require");
}

#[test]
fn what_guests_of_different_owners_share() {
    const FLAWS: &str = "/sys/devices/system/cpu/vulnerabilities";
    let (mds, vmscape) = (format!("{FLAWS}/mds"), format!("{FLAWS}/vmscape"));
    for (number, status, of_smt, of_ksm) in [
        ("0\n", Status::Good, "core", "equal"),
        ("1\n", Status::Improvable, "smt/control", "ksm/run"),
        ("x", Status::Unknown, "lscpu", "ksm/run"),
    ] {
        expect(sharing::smt, &[("/sys/devices/system/cpu/smt/active", number)], status, of_smt);
        expect(sharing::ksm, &[("/sys/kernel/mm/ksm/run", number)], status, of_ksm);
    }
    expect(
        sharing::mitigations,
        &[(&mds, "Not affected\n"), (&vmscape, "Mitigation: IBPB\n")],
        Status::Good,
        "No known",
    );
    let open = [(&*mds, "Vulnerable: Clear CPU buffers attempted\n"), (&*vmscape, "Mitigation: IBPB\n")];
    expect(sharing::mitigations, &open, Status::Improvable, "mitigations=off");
    expect(sharing::mitigations, &[], Status::Unknown, "current");
    const HEAD: &str = "Filename\tType\tSize\tUsed\tPriority\n";
    let swaps = |lines: &str, status, words| {
        expect(sharing::swap, &[("/proc/swaps", &format!("{HEAD}{lines}"))], status, words);
    };
    swaps("", Status::Good, "never");
    swaps("/dev/zram0 partition 1 0 100\n", Status::Good, "never");
    swaps("/dev/sda2 partition 1 0 -2\n", Status::Improvable, "swapoff");
    expect(sharing::swap, &[], Status::Unknown, "swapon");
}

#[test]
fn the_verdict_is_about_kvm_first() {
    let empty = Host::with(&[]);
    let verdict = |probe: &Probe| Report::new(&empty.sources(), probe).verdict;
    // An empty host lacks tap devices; everything else is unknown.
    assert_eq!(verdict(&HARDWARE), "guests run at full speed on this host; one thing can be improved");
    assert_eq!(
        verdict(&software()),
        "guests do not run on this host: its KVM is software that cannot run Linux"
    );
    assert_eq!(verdict(&Probe::Absent), "guests do not run on this host: it has no KVM");
    assert_eq!(
        verdict(&Probe::NoPermission),
        "guests do not run on this host: this user has no permission to open its KVM device"
    );

    let no_ept = Host::with(&[("/sys/module/kvm_intel/parameters/ept", "N")]);
    assert_eq!(
        Report::new(&no_ept.sources(), &HARDWARE).verdict,
        "guests run on this host, but first fix what is bad: kvm_parameters"
    );
}

#[test]
fn missing_restrictions_of_kvm_are_named() {
    let finding = |missing: &[Restriction]| {
        super::kvm::restrictions(&Probe::Hardware { loop_time: Duration::ZERO, missing: missing.to_vec() })
    };
    assert_eq!(finding(&[]).status, Status::Good);
    let of_processor = finding(&[Restriction::NotifyExits, Restriction::BusLocks]);
    assert_eq!(of_processor.status, Status::Good);
    assert!(
        of_processor
            .meaning
            .ends_with("exceptions without end, or stop the memory accesses of all processors by bus locks.")
    );
    let old = finding(&[Restriction::BusLocks, Restriction::Counters]);
    assert_eq!((old.status, old.fact.as_str()), (Status::Improvable, "KVM lacks 2 of five"));
    assert!(
        old.meaning
            .starts_with("A guest can time other users of the processor by performance counters, or stop")
    );
    assert_eq!(super::kvm::restrictions(&Probe::Absent).status, Status::Unknown);
}

#[test]
fn names_are_stable_and_differ() {
    let report = Report::new(&Host::with(&[]).sources(), &Probe::Absent);
    let names: Vec<_> = report.findings.iter().map(|finding| finding.name).collect();
    assert_eq!(
        names,
        [
            "kvm",
            "kvm_parameters",
            "kvm_restrictions",
            "nx_huge_pages",
            "kernel",
            "cgroup",
            "memory",
            "hugepages",
            "thp",
            "tun",
            "user_namespaces",
            "jail",
            "smt",
            "mitigations",
            "ksm",
            "swap"
        ]
    );
}

#[test]
fn a_finding_as_json() {
    let finding = Finding::improvable("thp", "never", "slow", "echo");
    assert_eq!(
        serde_json::to_string(&finding).unwrap(),
        r#"{"name":"thp","status":"improvable","fact":"never","meaning":"slow","advice":"echo"}"#
    );
    for status in [Status::Good, Status::Improvable, Status::Bad, Status::Unknown] {
        assert_eq!(serde_json::to_value(status).unwrap(), status.word());
    }
}

/// Checks the invariants of all findings.
#[track_caller]
fn is_well_formed(finding: &Finding) {
    assert_eq!(finding.advice.is_none(), finding.status == Status::Good, "{finding:#?}");
    for text in [&finding.fact, &finding.meaning].into_iter().chain(&finding.advice) {
        assert!(!text.is_empty() && !text.chars().any(char::is_control), "{finding:#?}");
    }
    // Facts may quote files; all other texts are constant, and their backticks are balanced.
    for text in [&finding.meaning].into_iter().chain(&finding.advice) {
        assert!(text.matches('`').count() % 2 == 0, "{finding:#?}");
    }
    assert!(finding.meaning.ends_with('.'), "{finding:#?}");
}

#[test]
fn findings_that_are_not_good_have_advice() {
    let empty = Host::with(&[]);
    for probe in [HARDWARE, software(), Probe::NoPermission, Probe::Absent, Probe::Broken(KvmError::Absent)] {
        Report::new(&empty.sources(), &probe).findings.iter().for_each(is_well_formed);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_content_of_any_file_is_a_panic_or_moves_the_cursor(
        contents in proptest::collection::vec(
            prop_oneof![
                proptest::collection::vec(any::<u8>(), 0..200),
                "(Y|N|never|[0-9]{1,22}|\\[[a-z]{1,7}\\]| - cgroup2 [a-z]{0,3}|[A-Z][a-z]{2,4}:|[ \t\n]){0,12}"
                    .prop_map(String::into_bytes),
            ],
            FILES.len(),
        ),
    ) {
        let host = Host::with(&[]);
        for (path, bytes) in FILES.iter().zip(&contents) {
            host.write(path, bytes);
        }
        for check in CHECKS {
            is_well_formed(&check(&host.sources()));
        }
        for probe in [HARDWARE, software(), Probe::NoPermission, Probe::Absent] {
            is_well_formed(&super::kvm::kvm(&host.sources(), &probe));
        }
    }
}
