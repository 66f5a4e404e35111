//! Settings of a running kernel (/proc/sys) that an image's kernel has from its start: what container hosts have.
//!
//! They are parameters of the kernel command line, which the kernel applies before init: a pre-booted kernel has them,
//! and no start pays for them.

use crate::fragment::Fragment;
use std::fmt::Write as _;

/// A setting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sysctl {
    /// Its name, with dots, as sysctl(8) has it.
    pub name: &'static str,
    /// Its value.
    pub value: &'static str,
    /// The fragment without which the kernel has no such setting.
    pub fragment: &'static str,
}

/// The settings of every image.
pub const SYSCTLS: [Sysctl; 8] = [
    // As Fedora and Ubuntu have it; Elasticsearch and OpenSearch refuse less than 262,144.
    Sysctl { name: "vm.max_map_count", value: "1048576", fragment: "base" },
    // As on every node of Kubernetes: a large sparse mapping takes no memory until it is written. The kernel's own
    // estimate refuses one that is larger than the guest's memory, which a container's host has more of.
    Sysctl { name: "vm.overcommit_memory", value: "1", fragment: "base" },
    // The kernel's own limits for these grow with memory, and suit machines that are larger than a guest.
    Sysctl { name: "fs.file-max", value: "1048576", fragment: "base" },
    Sysctl { name: "fs.inotify.max_user_watches", value: "524288", fragment: "base" },
    Sysctl { name: "fs.inotify.max_user_instances", value: "1024", fragment: "base" },
    // Databases with asynchronous direct I/O; 65,536 are for one.
    Sysctl { name: "fs.aio-max-nr", value: "1048576", fragment: "base" },
    // A program that is alone on a machine may use its low ports, and ping.
    Sysctl { name: "net.ipv4.ip_unprivileged_port_start", value: "0", fragment: "net" },
    Sysctl { name: "net.ipv4.ping_group_range", value: "0 2147483647", fragment: "net" },
];

/// The parameters for a kernel of these fragments, each with a blank before it.
#[must_use]
pub fn sysctl_parameters(fragments: &[Fragment]) -> String {
    let mut text = String::new();
    for Sysctl { name, value, fragment } in SYSCTLS {
        if fragments.iter().any(|has| has.name == fragment) {
            let quote = if value.contains(' ') { "\"" } else { "" };
            let _ = write!(text, " {quote}sysctl.{name}={value}{quote}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shipped::{DEFAULT, shipped_named};

    #[test]
    fn only_what_the_kernel_has_is_set() {
        let all = sysctl_parameters(&shipped_named(&DEFAULT).unwrap());
        assert!(all.starts_with(" sysctl.vm.max_map_count=1048576 sysctl.vm."), "{all}");
        assert!(all.ends_with(" \"sysctl.net.ipv4.ping_group_range=0 2147483647\""), "{all}");
        assert_eq!(all.matches("sysctl.").count(), SYSCTLS.len());
        let base = sysctl_parameters(&shipped_named(&["base"]).unwrap());
        assert!(!base.contains("sysctl.net.") && base.contains("sysctl.vm."), "{base}");
        assert_eq!(sysctl_parameters(&[]), "");
    }

    #[test]
    fn they_leave_room_on_the_command_line() {
        // Of 2048 bytes, in which up to 30 devices are announced with some 40 bytes each.
        let all = sysctl_parameters(&shipped_named(&DEFAULT).unwrap());
        assert!(all.len() < 512, "{}", all.len());
    }
}
