//! The fragments that come with this crate.

use crate::fragment::{Fragment, FragmentError, Origin};

/// Name and text of each fragment. A fragment may depend on earlier ones.
const SHIPPED: [(&str, &str); 20] = [
    ("base", include_str!("../fragments/base.config")),
    ("kvm-guest", include_str!("../fragments/kvm-guest.config")),
    ("console", include_str!("../fragments/console.config")),
    ("virtio", include_str!("../fragments/virtio.config")),
    ("block", include_str!("../fragments/block.config")),
    ("net", include_str!("../fragments/net.config")),
    ("ipv6", include_str!("../fragments/ipv6.config")),
    ("vsock", include_str!("../fragments/vsock.config")),
    ("filesystems", include_str!("../fragments/filesystems.config")),
    ("virtio-fs", include_str!("../fragments/virtio-fs.config")),
    ("balloon", include_str!("../fragments/balloon.config")),
    ("pmem", include_str!("../fragments/pmem.config")),
    ("uniprocessor", include_str!("../fragments/uniprocessor.config")),
    ("sysfs", include_str!("../fragments/sysfs.config")),
    ("container", include_str!("../fragments/container.config")),
    ("netfilter", include_str!("../fragments/netfilter.config")),
    ("hardening", include_str!("../fragments/hardening.config")),
    ("mitigations", include_str!("../fragments/mitigations.config")),
    ("paravirt-spinlocks", include_str!("../fragments/paravirt-spinlocks.config")),
    ("debug", include_str!("../fragments/debug.config")),
];

/// The fragments of the kernel for `kindling boot`, which every kernel contains.
pub const DEFAULT: [&str; 11] = [
    "base",
    "kvm-guest",
    "console",
    "virtio",
    "block",
    "net",
    "ipv6",
    "vsock",
    "filesystems",
    "virtio-fs",
    "balloon",
];

/// Fragments that an image may request in addition.
pub const OPTIONAL: [&str; 9] = [
    "pmem",
    "uniprocessor",
    "sysfs",
    "container",
    "netfilter",
    "hardening",
    "mitigations",
    "paravirt-spinlocks",
    "debug",
];

/// Fragments of the kernel for `kindling run`, in addition to the default ones. Its guests continue from a pre-booted
/// kernel, so that most options that slow down a boot cost nothing (docs/kernel-prices.md).
pub const RUN: [&str; 4] = ["pmem", "container", "netfilter", "hardening"];

/// All fragments of this crate, default and optional.
///
/// # Errors
///
/// When a fragment does not parse, which a test of this crate rules out.
pub fn shipped() -> Result<Vec<Fragment>, FragmentError> {
    SHIPPED.iter().map(|(name, text)| parse(name, text)).collect()
}

/// The fragments with these names, in this order.
///
/// # Errors
///
/// When no fragment has such a name.
pub fn shipped_named<S: AsRef<str>>(names: &[S]) -> Result<Vec<Fragment>, FragmentError> {
    names.iter().map(|name| by_name(name.as_ref())).collect()
}

fn by_name(wanted: &str) -> Result<Fragment, FragmentError> {
    match SHIPPED.iter().find(|(name, _)| *name == wanted) {
        Some((name, text)) => parse(name, text),
        None => Err(FragmentError::Unknown {
            name: wanted.to_owned(),
            known: SHIPPED.map(|(name, _)| name).join(", "),
        }),
    }
}

fn parse(name: &str, text: &str) -> Result<Fragment, FragmentError> {
    let origin = if OPTIONAL.contains(&name) { Origin::Optional } else { Origin::Default };
    Fragment::parse(name, text.as_bytes(), origin)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compose;

    #[test]
    fn all_shipped_fragments_parse_and_compose() {
        let fragments = shipped().unwrap();
        let names: Vec<_> = fragments.iter().map(|f| f.name.as_str()).collect();
        assert_eq!(names, [&DEFAULT[..], &OPTIONAL[..]].concat());
        for fragment in &fragments {
            assert!(!fragment.header.is_empty(), "{} has no header", fragment.name);
            assert!(!fragment.symbols.is_empty(), "{} is empty", fragment.name);
        }
        let composed = compose(&fragments).unwrap();
        assert!(composed.len() > 100, "only {} settings", composed.len());
    }

    #[test]
    fn the_kernel_for_run_composes() {
        assert!(RUN.iter().all(|name| OPTIONAL.contains(name)));
        compose(&shipped_named(&[&DEFAULT[..], &RUN].concat()).unwrap()).unwrap();
    }

    #[test]
    fn every_file_in_the_folder_is_shipped() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/fragments");
        let mut files: Vec<_> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        files.sort();
        let mut shipped = SHIPPED.map(|(name, _)| format!("{name}.config"));
        shipped.sort();
        assert_eq!(files, shipped);
    }

    #[test]
    fn fragments_by_name() {
        let fragments = shipped_named(&["debug", "base"]).unwrap();
        assert_eq!(fragments[0].name, "debug");
        assert_eq!(fragments[1].name, "base");
        let error = shipped_named(&["bsae"]).unwrap_err().to_string();
        assert!(error.starts_with("no such fragment: \"bsae\" (available: base, kvm-guest,"));
    }
}
