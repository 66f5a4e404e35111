//! `cargo xtask root-prices`: the cost of a root filesystem as an initramfs and as EROFS on a disk, by its size.

use crate::build_image::{self, Arguments as ImageArguments};
use crate::root_tree::RootType;
use crate::{cargo, lab};
use anyhow::{Context, Result, ensure};
use clap::Args;
use guest_protocol::BootMark;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

#[derive(Args, Debug)]
pub(crate) struct Arguments {
    /// Sizes of the root filesystem in MiB, separated by commas
    #[arg(long, value_name = "MIB", value_delimiter = ',', default_values_t = [2, 3, 4, 6, 8, 16, 30])]
    size: Vec<u64>,
}

/// Size in bytes of each file in a tree.
const FILE: u64 = 64 << 10;
/// Memory of the guest in MiB.
const GUEST_MIB: u64 = 128;
const FORMS: [(RootType, &str); 2] = [(RootType::Initramfs, "initramfs"), (RootType::Erofs, "EROFS")];
const MINIMAL: &str = "/bin/busybox cat /proc/meminfo";
/// The payloads and how they start: a minimal one, one that reads the whole filesystem, and the minimal one from a
/// pre-booted kernel.
const STARTS: [(&str, &str, &str); 3] = [
    ("little", "--cold", MINIMAL),
    ("all", "--cold", "/bin/busybox sh -c 'for f in /bin/busybox /data/*; do cat $f; done > /dev/null'"),
    ("continued", "", MINIMAL),
];

/// Builds the images, boots each in one exact lab, and prints the table.
pub(crate) fn run(arguments: &Arguments) -> Result<u8> {
    let scratch = tempfile::tempdir()?;
    let mut images = Vec::new();
    for &size in &arguments.size {
        let root = tempfile::tempdir()?;
        fill(root.path(), size << 20).with_context(|| format!("--size {size}"))?;
        for (form, name) in FORMS {
            let image = format!("{size}-{name}");
            build_image::build(&ImageArguments {
                name: Some(image.clone()),
                root: Some(root.path().into()),
                root_type: Some(form),
                out: Some(scratch.path().join(&image)),
                ..ImageArguments::default()
            })?;
            images.push((size, name, image));
        }
    }
    measure(&images, scratch.path())?;
    print!("{}", table(&images, scratch.path())?);
    Ok(0)
}

/// Fills a tree to this size: busybox, and files with different content.
fn fill(root: &Path, bytes: u64) -> Result<()> {
    let busybox = root.join("bin/busybox");
    fs::create_dir(root.join("bin"))?;
    fs::create_dir(root.join("data"))?;
    let taken = fs::copy(lab::busybox()?, &busybox)?;
    ensure!(taken <= bytes, "busybox alone takes {taken} bytes");
    let mut block = vec![0_u8; usize::try_from(FILE)?];
    for number in 0..(bytes - taken) / FILE {
        block[..8].copy_from_slice(&number.to_le_bytes());
        fs::write(root.join(format!("data/{number}")), &block)?;
    }
    Ok(())
}

fn measure(images: &[(u64, &str, String)], scratch: &Path) -> Result<()> {
    let mut script = String::new();
    let mut get: Vec<(String, PathBuf)> = Vec::new();
    for (_, _, image) in images {
        let _ = writeln!(script, "kindling preboot --image /images/{image} --memory {GUEST_MIB} || exit 1");
        for (start, options, command) in STARTS {
            let name = format!("{image}-{start}");
            let _ = writeln!(
                script,
                "kindling boot --image /images/{image} --memory {GUEST_MIB} {options} --report-json {name}.json \
                 -- {command} > {name}.out || exit 1"
            );
            for kind in ["json", "out"] {
                let file = format!("{name}.{kind}");
                get.push((lab::inside(&file), scratch.join(&file)));
            }
        }
    }
    let mut with = vec![(cargo::release_binary("kindling-cli", "kindling")?, "/bin/kindling".to_owned())];
    with.extend(images.iter().map(|(_, _, image)| (scratch.join(image), format!("/images/{image}"))));
    let job = lab::Job {
        exact: true,
        cpus: 1,
        memory_mib: 4096,
        command: ["/bin/sh", "-c", &script].map(str::to_owned).to_vec(),
        environment: Vec::new(),
        with,
        get,
        disk: None,
        has_xsave: false,
    };
    let status = job.run()?;
    ensure!(status == 0, "a guest failed (status {status}); see its output above");
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "for display")]
fn table(images: &[(u64, &str, String)], scratch: &Path) -> Result<String> {
    let mut text = String::from(
        "| root, MiB | form | to the payload, ms | to the end, ms | to the end of reading it all, ms | \
         guest memory taken, MiB | pre-booted: to the payload, ms | to the end, ms |\n\
         |---:|---|---:|---:|---:|---:|---:|---:|\n",
    );
    for (size, form, image) in images {
        let report = |start: &str, step: &str| {
            time_of(&fs::read(scratch.join(format!("{image}-{start}.json")))?, step)
        };
        let started = report("little", BootMark::PayloadStarted.name())?;
        let ended = report("little", "guest ended")?;
        let read = report("all", "guest ended")?;
        let continued = report("continued", BootMark::PayloadStarted.name())?;
        let continued_end = report("continued", "guest ended")?;
        let meminfo = fs::read_to_string(scratch.join(format!("{image}-little.out")))?;
        let free = crate::prices::free_kib(&meminfo).with_context(|| format!("no MemFree in {meminfo:?}"))?;
        let taken = GUEST_MIB as f64 - free as f64 / 1024.0;
        let ms = |ns: i64| ns as f64 / 1e6;
        let _ = writeln!(
            text,
            "| {size} | {form} | {:.2} | {:.2} | {:.2} | {taken:.1} | {:.2} | {:.2} |",
            ms(started),
            ms(ended),
            ms(read),
            ms(continued),
            ms(continued_end)
        );
    }
    Ok(text)
}

/// Nanoseconds from the start of the command to a step of its report.
fn time_of(report: &[u8], step: &str) -> Result<i64> {
    let report: serde_json::Value = serde_json::from_slice(report)?;
    let steps = report["steps"].as_array().context("the boot report has no steps")?;
    let step = steps
        .iter()
        .find(|found| found["name"] == step)
        .with_context(|| format!("the boot report has no step {step:?}"))?;
    step["ns"].as_i64().context("a step of the boot report has no time")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_found_by_its_name() {
        let report = br#"{"steps": [{"name": "a", "ns": 1}, {"name": "b", "ns": 2}]}"#;
        assert_eq!(time_of(report, "b").unwrap(), 2);
        assert!(time_of(report, "c").unwrap_err().to_string().contains("\"c\""));
    }
}
