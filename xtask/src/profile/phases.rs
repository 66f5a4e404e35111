//! The kernel functions that begin a phase, with descriptions.

use super::kernel_image::{Initcall, KernelImage};
use std::collections::HashMap;

/// Functions in boot order, each with a description of the work until the next one: from `start_kernel` and
/// `kernel_init` in init/main.c, and from `setup_arch` in arch/x86/kernel/setup.c. Functions that the compiler inlined
/// have no symbol, and their time is attributed to the previous function.
const FUNCTIONS: [(&str, &str); 48] = [
    ("x86_64_start_kernel", "clears the kernel's own data, the first page tables"),
    ("start_kernel", "the first of the kernel that is the same on every processor"),
    ("setup_arch", "what the boot loader left, the processor"),
    ("early_cpu_init", "which processor this is"),
    ("e820__memory_setup", "the map of the memory, early parameters"),
    ("init_hypervisor_platform", "which hypervisor this is, its clock"),
    ("init_mem_mapping", "page tables for all memory"),
    ("reserve_real_mode", "memory for starting other processors"),
    ("initmem_init", "zones of memory, struct pages; the MP table, APICs"),
    ("jump_label_init", "switches in the kernel's code"),
    ("setup_per_cpu_areas", "data that each processor has"),
    ("parse_early_param", "the command line"),
    ("vfs_caches_init_early", "tables of names and inodes"),
    ("trap_init", "exceptions"),
    ("mm_core_init", "the page allocator"),
    ("mem_init", "gives memory to the page allocator"),
    ("kmem_cache_init", "the slab allocator, vmalloc"),
    ("sched_init", "the scheduler"),
    ("workqueue_init_early", "work queues, before there are threads"),
    ("rcu_init", "read-copy-update"),
    ("init_IRQ", "interrupt descriptors and vectors"),
    ("init_timers", "timers"),
    ("timekeeping_init", "the clocks"),
    ("random_init", "random numbers"),
    ("perf_event_init", "performance counters"),
    ("console_init", "the first console"),
    ("x86_late_time_init", "interrupt controllers, the timer's interrupt"),
    ("calibrate_delay", "how long a loop takes"),
    ("arch_cpu_finalize_init", "processor bugs, floating point"),
    ("alternative_instructions", "patches code for this processor"),
    ("cred_init", "credentials, processes, signals"),
    ("vfs_caches_init", "filesystems' caches, the first mounts"),
    ("proc_root_init", "/proc, control groups"),
    ("rest_init", "the first threads"),
    ("kernel_init_freeable", "from here on in the thread that becomes init"),
    ("native_smp_prepare_cpus", "the local APIC, the other processors' data"),
    ("workqueue_init", "work queues' threads"),
    ("smp_init", "starts the other processors"),
    ("sched_init_smp", "scheduling on several processors"),
    ("page_alloc_init_late", "what is left of the page allocator"),
    ("driver_init", "the driver model, /dev and /sys"),
    ("wait_for_initramfs", "waits until the initramfs is unpacked"),
    ("console_on_rootfs", "init's standard streams"),
    ("async_synchronize_full", "waits for what goes on beside"),
    ("free_initmem", "gives the memory of initialisation back"),
    ("mark_rodata_ro", "protects code and constants"),
    ("do_sysctl_args", "what the command line sets"),
    ("run_init_process", "loads init and enters it"),
];
/// The phase before the first function.
pub(super) const ENTRY: (&str, &str) = ("entry", "assembly: page tables, 64-bit mode of the kernel's own");

/// The function from which on the kernel calls the initcalls level by level.
pub(super) const CALLS_INITCALLS: &str = "kernel_init_freeable";

/// Descriptions of the steps of VMM and init, which end when they are complete.
const STEPS: [(&str, &str); 14] = [
    ("command entered", "the host starts the process"),
    ("configuration checked", "arguments, image.json"),
    ("kernel loaded", "guest memory, with kernel, initrd and boot tables in it"),
    ("KVM opened", "what KVM and processor can do"),
    ("VM created", "KVM's machine, its memory, its interrupt controllers"),
    ("devices built", "serial port, boot marks, configuration"),
    ("vCPUs created", "their features, their first registers"),
    ("first instruction", "the first vCPU's thread starts"),
    ("init: filesystems mounted", "/proc, /sys, /dev, /run, /tmp"),
    ("init: hostname and loopback set", "console and network of its own"),
    ("init: configuration read", "what the VMM asks it to run"),
    ("guest ended", "init greets, waits for the console, ends the machine"),
    ("vCPUs stopped", "their threads end"),
    ("process ended", "the host takes memory and descriptors back"),
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
