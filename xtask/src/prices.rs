//! `cargo xtask kernel-config prices`: the cost of each fragment, measured by building the kernel with and without it.

use crate::bench::{self, Start};
use crate::build_image::{self, Arguments as ImageArguments};
use crate::{cargo, kernel, lab};
use anyhow::{Context, Result, ensure};
use guest_kernel_config::{DEFAULT, Fragment, OPTIONAL, Origin, compose, shipped_named};
use kindling_vmm::config::image::Image;
use std::collections::BTreeSet;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

/// Fragments that every measurable guest needs.
const REQUIRED: [&str; 3] = ["base", "kvm-guest", "console"];
/// Memory of the measured guest in MiB.
const GUEST_MIB: u64 = 128;
/// Repetitions of a start; the result is the median.
const STARTS: u32 = 5;

/// Default fragments that depend on this one.
fn dependents(name: &str) -> &'static [&'static str] {
    match name {
        "virtio" => &["block", "net", "ipv6", "vsock", "virtio-fs", "balloon"],
        "net" => &["ipv6"],
        _ => &[],
    }
}

/// A kernel that differs from the default by one fragment.
#[derive(Debug)]
struct Variant {
    /// The fragment; `None` for the default kernel.
    fragment: Option<&'static str>,
    /// The fragments of the kernel.
    parts: Vec<&'static str>,
}

impl Variant {
    fn all() -> Vec<Self> {
        let mut variants = vec![Self { fragment: None, parts: DEFAULT.to_vec() }];
        let mut removable: Vec<_> = DEFAULT.into_iter().filter(|name| !REQUIRED.contains(name)).collect();
        // Similar kernels are built in sequence, so that common objects are compiled once.
        removable.sort_by_key(|name| dependents(name).len());
        for name in removable {
            let gone = |part: &&str| *part == name || dependents(name).contains(part);
            let parts = DEFAULT.into_iter().filter(|part| !gone(part)).collect();
            variants.push(Self { fragment: Some(name), parts });
        }
        for name in OPTIONAL {
            let parts = DEFAULT.into_iter().chain([name]).collect();
            variants.push(Self { fragment: Some(name), parts });
        }
        variants
    }

    /// The fragments, and one that disables the symbols that only the missing fragments enable: many symbols are
    /// enabled by default. Symbols that a missing fragment disables stay disabled.
    fn fragments(&self) -> Result<Vec<Fragment>> {
        let mut fragments = shipped_named(&self.parts)?;
        let kept = compose(&fragments)?;
        let missing: Vec<_> = DEFAULT.into_iter().filter(|name| !self.parts.contains(name)).collect();
        let gone = shipped_named(&missing)?;
        let symbols = gone.iter().flat_map(|fragment| &fragment.symbols).map(|setting| &*setting.symbol);
        // Two fragments may set the same symbol, and one fragment may not set it twice.
        let symbols: BTreeSet<&str> = symbols.filter(|symbol| kept.request(symbol).is_none()).collect();
        let text: String = symbols.iter().map(|symbol| format!("CONFIG_{symbol}=n\n")).collect();
        fragments.push(Fragment::parse("without", text.as_bytes(), Origin::User)?);
        Ok(fragments)
    }

    fn is_default_part(&self) -> bool {
        self.fragment.is_some_and(|name| DEFAULT.contains(&name))
    }

    fn name(&self) -> &'static str {
        self.fragment.unwrap_or("default")
    }
}

/// The default kernel and those of the requested fragments.
fn chosen(only: &[String]) -> Result<Vec<Variant>> {
    let all = Variant::all();
    for name in only {
        let known: Vec<_> = all.iter().filter_map(|variant| variant.fragment).collect();
        ensure!(known.contains(&name.as_str()), "--only {name}: expected one of {}", known.join(", "));
    }
    let is_chosen = |variant: &Variant| {
        only.is_empty() || variant.fragment.is_none_or(|fragment| only.iter().any(|name| name == fragment))
    };
    Ok(all.into_iter().filter(is_chosen).collect())
}

/// The measurements of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Measured {
    /// Nanoseconds from the start of the command to init's first instruction.
    boot_ns: i64,
    /// Bytes of the image's vmlinux.
    kernel_bytes: i64,
    /// Guest memory in bytes that is in use when the payload starts.
    memory_bytes: i64,
    /// The measurements of `kindling run` from the pre-booted kernel; `None` if no program runs.
    start: Option<Start>,
}

impl Measured {
    /// The additional cost of `to` compared with `from`.
    fn price(from: Self, to: Self) -> Self {
        Self {
            boot_ns: to.boot_ns - from.boot_ns,
            kernel_bytes: to.kernel_bytes - from.kernel_bytes,
            memory_bytes: to.memory_bytes - from.memory_bytes,
            start: from.start.zip(to.start).map(|(from, to)| Start {
                ns: to.ns - from.ns,
                faults: to.faults - from.faults,
                idle_bytes: to.idle_bytes - from.idle_bytes,
            }),
        }
    }
}

/// Builds all variants, boots each in one exact lab, and prints the table; also writes it to `out`.
pub(crate) fn run(kernel_source: Option<&Path>, only: &[String], out: Option<&Path>) -> Result<u8> {
    let scratch = tempfile::tempdir()?;
    let variants = chosen(only)?;
    let source = kernel::source(kernel_source)?;
    // Configuration errors show within seconds, while the builds take an hour.
    for variant in &variants {
        let asked = compose(&variant.fragments()?)?;
        kernel::configure(&source, &asked).with_context(|| format!("the kernel of {}", variant.name()))?;
    }
    for (number, variant) in variants.iter().enumerate() {
        eprintln!("kernel {} of {}: {}", number + 1, variants.len(), variant.name());
        build(variant, &source, &scratch.path().join(variant.name()))
            .with_context(|| format!("the kernel of {}", variant.name()))?;
    }
    let measured = measure(&variants, scratch.path())?;
    let text = table(&variants, &measured);
    print!("{text}");
    if let Some(path) = out {
        let draft = path.with_extension("draft");
        fs::write(&draft, &text)
            .and_then(|()| fs::rename(&draft, path))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(0)
}

fn build(variant: &Variant, source: &kernel::Source, directory: &Path) -> Result<()> {
    let fragments = variant.fragments()?;
    let arguments = ImageArguments {
        name: Some(variant.name().to_owned()),
        out: Some(directory.to_owned()),
        ..ImageArguments::default()
    };
    build_image::build_of(&arguments, source, &fragments)?;
    Ok(())
}

/// Boots each kernel to init and to a payload that prints the guest's memory, and measures starts of programs.
fn measure(variants: &[Variant], scratch: &Path) -> Result<Vec<Measured>> {
    let busybox = scratch.join("busybox.cpio");
    let root = tempfile::tempdir()?;
    fs::create_dir(root.path().join("bin"))?;
    fs::copy(lab::busybox()?, root.path().join("bin/busybox"))?;
    let init = cargo::release_binary("guest-init", "guest-init")?;
    build_image::root_filesystem(&init, Some(root.path()), false, &busybox)?;

    let mut script = String::new();
    let mut get: Vec<(String, PathBuf)> = Vec::new();
    for variant in variants {
        let name = variant.name();
        let _ = writeln!(script, "kindling boot --image /prices/{name} --report-json {name}.json || exit 1");
        let _ = writeln!(
            script,
            "kindling boot --image /prices/{name} --initrd /prices/busybox.cpio \
             -- /bin/busybox cat /proc/meminfo > {name}.memory || exit 1"
        );
        for kind in ["json", "memory"] {
            let file = format!("{name}.{kind}");
            get.push((lab::inside(&file), scratch.join(&file)));
        }
    }
    let job = lab::Job {
        exact: true,
        cpus: 1,
        memory_mib: 2048,
        command: ["/bin/sh", "-c", &script].map(str::to_owned).to_vec(),
        environment: Vec::new(),
        with: vec![
            (cargo::release_binary("kindling-cli", "kindling")?, "/bin/kindling".to_owned()),
            (scratch.to_owned(), "/prices".to_owned()),
        ],
        get,
        disk: None,
        has_xsave: false,
    };
    let status = job.run()?;
    ensure!(status == 0, "a kernel failed to boot (status {status}); see its output above");
    let images = variants.iter().map(|variant| (variant.name().to_owned(), scratch.join(variant.name())));
    let starts = bench::starts(images.collect(), STARTS)?;
    let starts = variants.iter().zip(starts);
    starts.map(|(variant, start)| read(scratch, variant.name(), start)).collect()
}

fn read(scratch: &Path, name: &str, start: Option<Start>) -> Result<Measured> {
    let report: serde_json::Value = serde_json::from_slice(&fs::read(scratch.join(format!("{name}.json")))?)?;
    let steps = report["steps"].as_array().context("the boot report has no steps")?;
    let init = guest_protocol::BootMark::InitEntered.name();
    let step = steps.iter().find(|step| step["name"] == init).context("the boot did not reach init")?;
    let memory = fs::read_to_string(scratch.join(format!("{name}.memory")))?;
    let free = free_kib(&memory).with_context(|| format!("{name}: no MemFree in {memory:?}"))?;
    let image = Image::open(&scratch.join(name))?;
    Ok(Measured {
        boot_ns: step["ns"].as_i64().context("a step of the boot report has no time")?,
        kernel_bytes: i64::try_from(image.kernel.size)?,
        memory_bytes: i64::try_from(GUEST_MIB * 1024)? * 1024 - free * 1024,
        start,
    })
}

/// `MemFree` in /proc/meminfo, in KiB.
pub(crate) fn free_kib(meminfo: &str) -> Option<i64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemFree:"))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok()
}

#[expect(clippy::cast_precision_loss, reason = "for display")]
fn table(variants: &[Variant], measured: &[Measured]) -> String {
    let mut text = String::from(
        "| fragment | boot, ms | vmlinux, KiB | guest memory at init, KiB | start, ms | faults | idle guest, KiB | |\n\
         |---|---:|---:|---:|---:|---:|---:|---|\n",
    );
    let base = measured[0];
    for (variant, kernel) in variants.iter().zip(measured) {
        let (price, sign, note) = match variant.fragment {
            None => (*kernel, "", "the whole default kernel".to_owned()),
            Some(name) if variant.is_default_part() => {
                let others = dependents(name);
                let with = if others.is_empty() {
                    String::new()
                } else {
                    format!("with what needs it: {}", others.join(", "))
                };
                (Measured::price(*kernel, base), "+", with)
            }
            Some(_) => (Measured::price(base, *kernel), "+", "optional".to_owned()),
        };
        let number = |value: f64, digits: usize| {
            if sign.is_empty() { format!("{value:.digits$}") } else { format!("{value:+.digits$}") }
        };
        let of_start = |show: &dyn Fn(Start) -> String| price.start.map_or_else(|| "–".to_owned(), show);
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {} | {} | {note} |",
            variant.name(),
            number(price.boot_ns as f64 / 1e6, 2),
            number(price.kernel_bytes as f64 / 1024.0, 0),
            number(price.memory_bytes as f64 / 1024.0, 0),
            of_start(&|start| number(start.ns as f64 / 1e6, 2)),
            of_start(&|start| number(start.faults as f64, 0)),
            of_start(&|start| number(start.idle_bytes as f64 / 1024.0, 0)),
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_removable_or_optional_fragment_has_one_variant() {
        let names: Vec<_> = Variant::all().iter().map(Variant::name).collect();
        for name in DEFAULT.iter().chain(&OPTIONAL).filter(|name| !REQUIRED.contains(name)) {
            assert_eq!(names.iter().filter(|other| *other == name).count(), 1, "{name}");
        }
        assert_eq!(names[0], "default");
    }

    #[test]
    fn the_fragments_of_every_variant_compose() {
        for variant in Variant::all() {
            compose(&variant.fragments().unwrap()).unwrap();
        }
    }

    #[test]
    fn symbols_of_a_missing_fragment_are_disabled() {
        let all = Variant::all();
        let without = |name: &str| {
            let variant = all.iter().find(|variant| variant.fragment == Some(name)).unwrap();
            compose(&variant.fragments().unwrap()).unwrap().text()
        };
        let text = without("ipv6");
        assert!(text.contains("# CONFIG_IPV6 is not set") && text.contains("# CONFIG_IPV6_SIT is not set"));
        // The fragment filesystems also enables the block layer.
        let text = without("block");
        assert!(text.contains("# CONFIG_VIRTIO_BLK is not set") && text.contains("CONFIG_BLOCK=y"));
    }

    #[test]
    fn a_single_fragment_is_measured_with_the_default_and_must_be_known() {
        let names = |only: &str| -> Result<Vec<_>> {
            Ok(chosen(&[only.to_owned()])?.iter().map(Variant::name).collect())
        };
        assert_eq!(names("ipv6").unwrap(), ["default", "ipv6"]);
        assert!(names("base").unwrap_err().to_string().starts_with("--only base: expected one of "));
        assert_eq!(chosen(&[]).unwrap().len(), Variant::all().len());
    }

    #[test]
    fn the_table_shows_differences_from_the_default() {
        let kernel = |boot_ns, kernel_bytes, memory_bytes| Measured {
            boot_ns,
            kernel_bytes,
            memory_bytes,
            start: (kernel_bytes != 2048).then_some(Start {
                ns: boot_ns * 2,
                faults: boot_ns / 1_000_000,
                idle_bytes: memory_bytes * 2,
            }),
        };
        let variants = [
            Variant { fragment: None, parts: Vec::new() },
            Variant { fragment: Some("net"), parts: Vec::new() },
            Variant { fragment: Some("debug"), parts: Vec::new() },
        ];
        let measured = [
            kernel(10_000_000, 4096, 1 << 20),
            kernel(8_500_000, 3072, 1 << 19),
            kernel(11_000_000, 2048, 1 << 20),
        ];
        let text = table(&variants, &measured);
        assert!(
            text.contains("| default | 10.00 | 4 | 1024 | 20.00 | 10 | 2048 | the whole default kernel |"),
            "{text}"
        );
        assert!(
            text.contains("| net | +1.50 | +1 | +512 | +3.00 | +2 | +1024 | with what needs it: ipv6 |"),
            "{text}"
        );
        assert!(text.contains("| debug | +1.00 | -2 | +0 | – | – | – | optional |"), "{text}");
    }

    #[test]
    fn free_memory_is_parsed_from_meminfo() {
        assert_eq!(free_kib("MemTotal:  200 kB\nMemFree:          123 kB\n"), Some(123));
        assert_eq!(free_kib("MemTotal:  200 kB\n"), None);
    }
}
