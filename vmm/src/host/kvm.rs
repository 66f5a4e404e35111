//! The result of the KVM probe, its cause and remedy, and KVM's parameters.

use super::{Finding, Sources, is_safe_in_command};
use crate::kvm::DEVICE;
use crate::kvm::probe::{Probe, Restriction};
use std::error::Error;
use std::os::unix::fs::MetadataExt;

const LAB: &str = "until then `cargo xtask lab` runs guests on an emulated machine that has a complete KVM";

/// The virtualization features of the first processor.
#[derive(Clone, Copy, Default)]
struct Processor {
    vmx: bool,
    svm: bool,
    /// Whether this host is itself a virtual machine.
    hypervisor: bool,
}

impl Processor {
    fn of(sources: &Sources) -> Option<Self> {
        let text = sources.read("/proc/cpuinfo").ok()?;
        let flags =
            text.lines().find(|line| line.split(':').next().is_some_and(|key| key.trim() == "flags"))?;
        let mut found = Self::default();
        for flag in flags.split_whitespace() {
            match flag {
                "vmx" => found.vmx = true,
                "svm" => found.svm = true,
                "hypervisor" => found.hypervisor = true,
                _ => {}
            }
        }
        Some(found)
    }

    const fn module(self) -> Option<&'static str> {
        match self {
            Self { vmx: true, .. } => Some("kvm_intel"),
            Self { svm: true, .. } => Some("kvm_amd"),
            _ => None,
        }
    }
}

fn is_loaded(sources: &Sources, module: &str) -> bool {
    sources.exists(&format!("/sys/module/{module}"))
}

/// What of KVM a guest cannot use here (`docs/security.md`).
pub(super) fn restrictions(probe: &Probe) -> Finding {
    const NAME: &str = "kvm_restrictions";
    let Probe::Hardware { missing, .. } = probe else {
        let (why, meaning) = ("KVM runs no guests", "What of KVM a guest could use cannot be told.");
        return Finding::unknown(NAME, why, meaning, "first fix what is said about `kvm`");
    };
    let can = |restrictions: Vec<&Restriction>| {
        restrictions.iter().map(|restriction| restriction.without()).collect::<Vec<_>>().join(", or ")
    };
    let (by_processor, by_kernel): (Vec<_>, Vec<_>) =
        missing.iter().partition(|restriction| restriction.needs_processor());
    if missing.is_empty() {
        let meaning = "A guest can use of KVM only what it needs.";
        return Finding::good(NAME, "KVM has all that restrict guests", meaning);
    }
    if by_kernel.is_empty() {
        let fact = "KVM has all that do not depend on the processor";
        return Finding::good(
            NAME,
            fact,
            format!("With this processor or kernel a guest can {}.", can(by_processor)),
        );
    }
    let fact = format!("KVM lacks {} of five", missing.len());
    let meaning = format!("A guest can {}.", can(by_kernel.into_iter().chain(by_processor).collect()));
    Finding::improvable(NAME, fact, meaning, "Linux 6.0 or newer")
}

/// Whether this user can run guests on this host.
pub(super) fn kvm(sources: &Sources, probe: &Probe) -> Finding {
    const NAME: &str = "kvm";
    match probe {
        Probe::Hardware { loop_time, .. } => {
            let fact = format!("hardware KVM: a million loop iterations in kernel mode took {loop_time:.1?}");
            let mut meaning = String::from("Guests run at the processor's speed.");
            if Processor::of(sources).is_some_and(|processor| processor.hypervisor) {
                meaning += " This host is itself a virtual machine, so each exit to the VMM costs several \
                            times what it costs on metal.";
            }
            Finding::good(NAME, fact, meaning)
        }
        Probe::Software { failed_on } => {
            let module =
                if is_loaded(sources, "kvm_pvm") { "software KVM (kvm_pvm)" } else { "software KVM" };
            let meaning = "This KVM emulates the guest's kernel mode, too slowly or not completely: Linux \
                           guests do not run on it.";
            Finding::bad(NAME, format!("{module}: {failed_on}"), meaning, hardware_advice(sources))
        }
        Probe::NoPermission => {
            let (fact, advice) = permission(sources);
            let mut meaning = String::from("Guests cannot be run by this user.");
            if Processor::of(sources).is_some_and(|processor| processor.module().is_none()) {
                meaning +=
                    " The processor has neither vmx nor svm, so the device is probably a software KVM.";
            }
            Finding::bad(NAME, fact, meaning, advice)
        }
        Probe::Absent => {
            let fact = format!("{DEVICE} does not exist, or has no driver");
            Finding::bad(NAME, fact, "Guests cannot be run on this host.", hardware_advice(sources))
        }
        Probe::Broken(error) => {
            let mut fact = error.to_string();
            let mut cause = error.source();
            while let Some(error) = cause {
                fact += &format!(": {error}");
                cause = error.source();
            }
            let advice = "see what `sudo dmesg | grep -i kvm` says, and end other hypervisors (VirtualBox, \
                          VMware), which use the processor's virtualization exclusively";
            Finding::bad(NAME, fact, "Guests cannot be run on this host.", advice)
        }
    }
}

/// The advice when the processor's virtualization is not in use.
fn hardware_advice(sources: &Sources) -> String {
    let Some(processor) = Processor::of(sources) else {
        return format!(
            "see whether `grep -E 'vmx|svm' /proc/cpuinfo` finds virtualization, and load kvm_intel or kvm_amd \
             if it does; {LAB}"
        );
    };
    match processor.module() {
        Some(module) if is_loaded(sources, module) => format!(
            "the processor can virtualize and {module} is there: in a container, pass the device in \
             (`--device {DEVICE}`); otherwise see what `sudo dmesg | grep -i kvm` says"
        ),
        Some(module) => {
            let load = if is_loaded(sources, "kvm_pvm") {
                "modprobe -r kvm_pvm && sudo modprobe"
            } else {
                "modprobe"
            };
            format!(
                "the processor can virtualize: `sudo {load} {module}`; if that is refused, switch \
                 virtualization (VT-x, AMD-V or SVM) on in the firmware"
            )
        }
        None if processor.hypervisor => format!(
            "this host is a virtual machine without vmx or svm: switch on nested virtualization for it in \
             the hypervisor below, or use a host that has it; {LAB}"
        ),
        None => format!(
            "the processor has neither vmx nor svm: switch virtualization (VT-x, AMD-V or SVM) on in the \
             firmware, if the processor has it; {LAB}"
        ),
    }
}

/// The ids of this process for file permissions.
struct User {
    id: u64,
    groups: Vec<u64>,
}

impl User {
    fn of(sources: &Sources) -> Option<Self> {
        let status = sources.read("/proc/self/status").ok()?;
        let numbers = |key: &str| -> Option<Vec<u64>> {
            let line = status.lines().find_map(|line| line.strip_prefix(key))?;
            line.split_whitespace().map(|number| number.parse().ok()).collect()
        };
        // Real, effective, saved, file system id: the last one determines file permissions.
        let id = *numbers("Uid:")?.get(3)?;
        let mut groups = numbers("Groups:").unwrap_or_default();
        groups.push(*numbers("Gid:")?.get(3)?);
        Some(Self { id, groups })
    }
}

/// Why the device cannot be opened, and the advice.
fn permission(sources: &Sources) -> (String, String) {
    const GROUP_MAY: u32 = 0o060;
    const OTHERS_MAY: u32 = 0o006;
    let Ok(device) = std::fs::metadata(sources.path(DEVICE)) else {
        let advice = format!(
            "join the group that `ls -l {DEVICE}` shows: `sudo usermod -aG kvm $USER`, and log in again"
        );
        return (format!("this user has no permission to open {DEVICE}"), advice);
    };
    let mode = device.mode();
    let gid = u64::from(device.gid());
    let group = group_name(sources, gid).unwrap_or_else(|| gid.to_string());
    let fact = format!(
        "this user has no permission to open {DEVICE}: it belongs to user {} and group {group}, mode {:04o}",
        device.uid(),
        mode & 0o7777
    );
    let group_may = mode & GROUP_MAY == GROUP_MAY;
    let allowed = mode & OTHERS_MAY == OTHERS_MAY
        || User::of(sources).is_some_and(|user| user.id == 0 || (group_may && user.groups.contains(&gid)));
    let advice = if allowed {
        format!(
            "its permissions allow it, so a container or a security policy does not: pass the device in \
             (`--device {DEVICE}`; in Kubernetes a device plugin does that), or ask `sudo dmesg | grep -i denied`"
        )
    } else if group_may && gid != 0 {
        format!("`sudo usermod -aG {group} $USER`, and log in again")
    } else {
        let has_kvm =
            sources.read("/etc/group").is_ok_and(|text| text.lines().any(|line| line.starts_with("kvm:")));
        let make = if has_kvm { "" } else { "`sudo groupadd --system kvm`; " };
        format!(
            "assign it to a separate group and join that: {make}`sudo chown root:kvm {DEVICE} && sudo chmod \
             0660 {DEVICE}`; `sudo usermod -aG kvm $USER`, and log in again"
        )
    };
    (fact, advice)
}

fn group_name(sources: &Sources, gid: u64) -> Option<String> {
    let groups = sources.read("/etc/group").ok()?;
    groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        // The name becomes a part of a command.
        (fields.nth(1)?.parse() == Ok(gid) && is_safe_in_command(name)).then(|| name.to_owned())
    })
}

/// KVM's parameters, if one of them slows guests down.
pub(super) fn parameters(sources: &Sources) -> Finding {
    const NAME: &str = "kvm_parameters";
    const AT_LOAD: &str = "/sys/module/kvm/parameters/enable_virt_at_load";
    let nested_paging = [("kvm_intel", "ept"), ("kvm_amd", "npt")].into_iter().find_map(|(module, name)| {
        let value = sources.read(&format!("/sys/module/{module}/parameters/{name}")).ok()?;
        Some((module, name, value))
    });
    let Some((module, name, value)) = nested_paging else {
        return Finding::unknown(
            NAME,
            "neither kvm_intel nor kvm_amd shows its parameters",
            "Whether KVM uses the processor's nested paging (EPT, NPT) cannot be told.",
            "get a hardware KVM first, see kvm",
        );
    };
    let fact = format!("{module}.{name}={}", super::quoted(&value).trim_matches('"'));
    match value.as_str() {
        "Y" | "1" => {}
        "N" | "0" => {
            return Finding::bad(
                NAME,
                fact,
                "KVM keeps shadow page tables instead of using nested paging: a guest that changes its page \
                 tables, as each new process does, pays with exits.",
                format!(
                    "remove `{name}=0` from /etc/modprobe.d and the kernel command line, and load {module} \
                     again: `sudo modprobe -r {module} && sudo modprobe {module}`; if it stays off, this \
                     processor, or the hypervisor below, does not offer it"
                ),
            );
        }
        _ => {
            let meaning = "Whether KVM uses the processor's nested paging (EPT, NPT) cannot be told.";
            return Finding::unknown(NAME, fact, meaning, format!("see `modinfo {module}`"));
        }
    }
    let nested = "KVM uses the processor's nested paging";
    if sources.read(AT_LOAD).is_ok_and(|value| value == "N") {
        return Finding::improvable(
            NAME,
            format!("{fact}, kvm.enable_virt_at_load=N"),
            format!("{nested}, but the first VM has to wait until virtualization is on in all processors."),
            "remove `enable_virt_at_load=0` from /etc/modprobe.d and the kernel command line, unless another \
             hypervisor on this host needs it",
        );
    }
    Finding::good(NAME, fact, format!("{nested}."))
}
