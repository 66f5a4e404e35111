//! The kernel functions that begin a phase, with descriptions.

use super::kernel_image::{Initcall, KernelImage};
use std::collections::HashMap;

/// Functions in boot order, each with a description of the work until the next one: from `start_kernel` and
/// `kernel_init` in init/main.c, and from `setup_arch` in arch/x86/kernel/setup.c. Functions that the compiler inlined
/// have no symbol, and their time is attributed to the previous function.
const FUNCTIONS: [(&str, &str); 48] = [
    ("x86_64_start_kernel", "clears the kernel's bss, early page tables"),
    ("start_kernel", "the entry of the architecture-independent kernel"),
    ("setup_arch", "boot parameters, the processor"),
    ("early_cpu_init", "identifies the processor"),
    ("e820__memory_setup", "the memory map, early parameters"),
    ("init_hypervisor_platform", "detects the hypervisor, its clock"),
    ("init_mem_mapping", "page tables for all memory"),
    ("reserve_real_mode", "memory for starting other processors"),
    ("initmem_init", "memory zones, struct pages; the MP table, APICs"),
    ("jump_label_init", "static keys"),
    ("setup_per_cpu_areas", "per-CPU data"),
    ("parse_early_param", "the command line"),
    ("vfs_caches_init_early", "hash tables of dentries and inodes"),
    ("trap_init", "exceptions"),
    ("mm_core_init", "the page allocator"),
    ("mem_init", "releases memory to the page allocator"),
    ("kmem_cache_init", "the slab allocator, vmalloc"),
    ("sched_init", "the scheduler"),
    ("workqueue_init_early", "workqueues, without threads"),
    ("rcu_init", "read-copy-update"),
    ("init_IRQ", "interrupt descriptors and vectors"),
    ("init_timers", "timers"),
    ("timekeeping_init", "the clocks"),
    ("random_init", "random numbers"),
    ("perf_event_init", "performance counters"),
    ("console_init", "the first console"),
    ("x86_late_time_init", "interrupt controllers, the timer's interrupt"),
    ("calibrate_delay", "calibrates the delay loop"),
    ("arch_cpu_finalize_init", "processor bugs, floating point"),
    ("alternative_instructions", "patches code for this processor"),
    ("cred_init", "credentials, processes, signals"),
    ("vfs_caches_init", "caches of filesystems, the first mounts"),
    ("proc_root_init", "/proc, control groups"),
    ("rest_init", "the first threads"),
    ("kernel_init_freeable", "from here on in the thread that becomes init"),
    ("native_smp_prepare_cpus", "the local APIC, data of the secondary processors"),
    ("workqueue_init", "threads of workqueues"),
    ("smp_init", "starts the secondary processors"),
    ("sched_init_smp", "scheduling on several processors"),
    ("page_alloc_init_late", "the rest of the page allocator"),
    ("driver_init", "the driver model, /dev and /sys"),
    ("wait_for_initramfs", "waits until the initramfs is unpacked"),
    ("console_on_rootfs", "init's standard streams"),
    ("async_synchronize_full", "waits for asynchronous initialization"),
    ("free_initmem", "frees init memory"),
    ("mark_rodata_ro", "write-protects code and constants"),
    ("do_sysctl_args", "sysctl settings of the command line"),
    ("run_init_process", "loads init and enters it"),
];
/// The phase before the first function.
pub(super) const ENTRY: (&str, &str) = ("entry", "assembly: page tables, the kernel's 64-bit mode");

/// The function from which on the kernel calls the initcalls level by level.
pub(super) const CALLS_INITCALLS: &str = "kernel_init_freeable";

/// Descriptions of the steps of VMM and init, which end when they are complete.
const STEPS: [(&str, &str); 14] = [
    ("command entered", "the host starts the process"),
    ("configuration checked", "arguments, image.json"),
    ("kernel loaded", "guest memory with kernel, initrd and boot tables"),
    ("KVM opened", "capabilities of KVM and the processor"),
    ("VM created", "KVM's VM, its memory slots and interrupt controllers"),
    ("devices built", "serial port, boot marks, configuration"),
    ("vCPUs created", "CPUID and initial registers"),
    ("first instruction", "the first vCPU thread starts"),
    ("init: filesystems mounted", "/proc, /sys, /dev, /run, /tmp"),
    ("init: hostname and loopback set", "console and loopback interface"),
    ("init: configuration read", "the payload, from the VMM"),
    ("guest ended", "init prints its greeting, drains the console, exits"),
    ("vCPUs stopped", "their threads end"),
    ("process ended", "the host frees memory and descriptors"),
];

/// The description of a step of VMM or init.
pub(super) fn about_step(name: &str) -> &'static str {
    STEPS.iter().find(|(step, _)| *step == name).map_or("", |(_, about)| about)
}

/// The target of a mark.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum MarkTarget {
    /// A phase of the kernel.
    Phase(&'static str, &'static str),
    /// An initcall.
    Initcall(Initcall),
}

/// The functions to mark, by address.
pub(super) fn functions(kernel: &KernelImage, initcalls: &[Initcall]) -> HashMap<u64, MarkTarget> {
    let symbols = &kernel.symbols;
    let phases = FUNCTIONS.iter().filter_map(|&(name, about)| {
        let address = symbols.address(name).filter(|&address| symbols.function(address) == Some(name))?;
        Some((address, MarkTarget::Phase(name, about)))
    });
    let mut functions: HashMap<u64, MarkTarget> = phases.collect();
    // A function that is both is treated as an initcall.
    functions.extend(initcalls.iter().map(|call| (call.address, MarkTarget::Initcall(call.clone()))));
    functions
}

/// The functions of [`FUNCTIONS`] without a symbol in a kernel.
pub(super) fn without_symbol(kernel: &KernelImage) -> Vec<String> {
    let missing = FUNCTIONS.iter().filter(|(name, _)| kernel.symbols.address(name).is_none());
    missing.map(|(name, _)| (*name).to_owned()).collect()
}

/// The function list for `kindling boot --profile-functions`.
pub(super) fn list(functions: &HashMap<u64, MarkTarget>) -> String {
    let name = |begins: &MarkTarget| match begins {
        MarkTarget::Phase(name, _) => (*name).to_owned(),
        MarkTarget::Initcall(call) => call.name.clone(),
    };
    let mut functions: Vec<(u64, String)> =
        functions.iter().map(|(address, begins)| (*address, name(begins))).collect();
    functions.sort();
    functions.iter().map(|(address, name)| format!("{address:x} {name}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::super::kernel_image::tests::{TEXT, kernel};
    use super::*;

    #[test]
    fn functions_without_a_symbol_are_omitted() {
        let image = kernel(&[0x90; 64], &[("setup_arch", 0), ("pty_init", 16), ("free_initmem", 32)], "");
        let pty = Initcall {
            address: TEXT + 16,
            name: "pty_init".into(),
            level: "device",
            file: Some("pty".into()),
        };
        let functions = functions(&image, std::slice::from_ref(&pty));
        assert_eq!(functions.len(), 3);
        assert_eq!(functions[&(TEXT + 16)], MarkTarget::Initcall(pty));
        assert!(matches!(functions[&TEXT], MarkTarget::Phase("setup_arch", _)));
        assert_eq!(
            list(&functions),
            "ffffffff81000000 setup_arch\nffffffff81000010 pty_init\nffffffff81000020 free_initmem\n"
        );
    }
}
