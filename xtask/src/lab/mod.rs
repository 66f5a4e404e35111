//! The lab: an emulated machine with KVM, for hosts without a usable one.
//!
//! QEMU's TCG emulates AMD SVM with nested paging. A stock Debian kernel in it loads `kvm_amd` and provides a complete
//! KVM, without /dev/kvm or root on the host. In *exact* mode one instruction takes one nanosecond of the lab's clock,
//! so that times count instructions and are the same on every host.

mod corrected_qemu;
mod disk;
mod frame;
pub(crate) mod guest;
mod qemu;

pub(crate) use disk::{busybox, kernel};
pub(crate) use qemu::{Driver, OutputTimeout};

use crate::build_image::{self, Profile};
use crate::cargo;
use anyhow::{Context, Result, bail};
use clap::Args;
use std::path::{Path, PathBuf};
use std::time::Duration;

#[derive(Args, Debug)]
pub(crate) struct Arguments {
    /// Count instructions: one instruction takes one nanosecond of the lab's clock
    #[arg(long)]
    exact: bool,
    /// Number of processors of the lab
    #[arg(long, default_value_t = 1)]
    cpus: u8,
    /// Memory of the lab in MiB
    #[arg(long, value_name = "MIB", default_value_t = 2048)]
    memory: u64,
    /// File or folder to copy into the lab's working directory, or to DEST; may be repeated
    #[arg(long, value_name = "FILE[:DEST]")]
    with: Vec<String>,
    /// ext4 filesystem image to mount read-only at /disk in the lab
    #[arg(long, value_name = "FILE")]
    disk: Option<PathBuf>,
    /// Enable XSAVE in the lab's processor, which Firecracker requires
    #[arg(long)]
    xsave: bool,
    /// File to copy from the lab after the command, to the current directory or to DEST; may be repeated
    #[arg(long, value_name = "FILE[:DEST]")]
    get: Vec<String>,
    /// Command to run; the lab has `kindling` and its helper programs, busybox, and the default image in
    /// /images/default
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// The working directory of commands in the lab.
pub(crate) const WORKING_DIRECTORY: &str = "/work";

/// The mount point of a job's disk in the lab.
pub(crate) const DISK: &str = "/disk";

/// Placeholder in a command for the time of its start: CLOCK_MONOTONIC in nanoseconds.
pub(crate) const NOW: &str = "{now}";

/// Replaces [`NOW`] in an argument.
pub(crate) fn with_time(argument: &str) -> String {
    argument.replace(NOW, &kindling_vmm::Instant::now().0.to_string())
}

/// A command to run in a lab, with its files.
#[derive(Debug, Default)]
pub(crate) struct Job {
    /// Whether the lab's clock counts instructions.
    pub(crate) exact: bool,
    /// Number of processors.
    pub(crate) cpus: u8,
    /// Memory in MiB.
    pub(crate) memory_mib: u64,
    /// The command.
    pub(crate) command: Vec<String>,
    /// Environment variables of the command.
    pub(crate) environment: Vec<(String, String)>,
    /// Files and folders of the host, with their paths in the lab.
    pub(crate) with: Vec<(PathBuf, String)>,
    /// Files of the lab to copy back, with their paths on the host.
    pub(crate) get: Vec<(String, PathBuf)>,
    /// An ext4 filesystem image mounted at [`DISK`], which takes no memory, unlike files in `with`.
    pub(crate) disk: Option<PathBuf>,
    /// Whether the processor has XSAVE, which Firecracker requires. Guest programs then do not return from signal
    /// handlers (docs/testing.md, "The lab").
    pub(crate) has_xsave: bool,
}

impl Job {
    /// Whether the lab counts instructions. With several processors it always does: otherwise about a quarter of the
    /// guests with four vCPUs hung during boot, for an unknown reason. With counted instructions the scheduling of the
    /// processors is deterministic, and none hung.
    pub(crate) const fn counts_instructions(&self) -> bool {
        self.exact || self.cpus > 1
    }

    /// Runs the command with this process's standard streams; returns its exit status.
    pub(crate) fn run(&self) -> Result<u8> {
        qemu::run(self, None, None)
    }

    /// Runs the command with a driver in place of the standard streams. A lab without output for `timeout` is an error,
    /// [`OutputTimeout`].
    pub(crate) fn drive(&self, timeout: Duration, driver: Driver<'_>) -> Result<u8> {
        qemu::run(self, Some(timeout), Some(driver))
    }

    /// Runs the command with the standard streams. A lab without output for `timeout` is an error.
    pub(crate) fn run_with_output_timeout(&self, timeout: Duration) -> Result<u8> {
        qemu::run(self, Some(timeout), None)
    }
}

/// `cargo xtask lab`.
pub(crate) fn run(arguments: &Arguments) -> Result<u8> {
    let kindling = cargo::release_binary("kindling-cli", "kindling")?;
    let image = build_image::of_profile(Profile::Boot)?;
    let mut with = vec![
        (kindling, "/bin/kindling".to_owned()),
        (cargo::release_binary("kindling-oci", "kindling-oci")?, "/bin/kindling-oci".to_owned()),
        (cargo::release_binary("kindling-vmm", "kindling-vmm")?, "/bin/kindling-vmm".to_owned()),
        (cargo::release_binary("kindling-fs", "kindling-fs")?, "/bin/kindling-fs".to_owned()),
        (image, "/images/default".to_owned()),
    ];
    // `kindling run` prefers the image `run`. It is included only if it has been built before, because a build takes
    // minutes.
    if cargo::target_directory().join("images/run").exists() {
        with.push((build_image::of_profile(Profile::Run)?, "/images/run".to_owned()));
    }
    for text in &arguments.with {
        with.push(into_lab(text)?);
    }
    let get = arguments.get.iter().map(|text| out_of_lab(text)).collect::<Result<_>>()?;
    let job = Job {
        exact: arguments.exact,
        cpus: arguments.cpus,
        memory_mib: arguments.memory,
        command: arguments.command.clone(),
        environment: Vec::new(),
        with,
        get,
        disk: arguments.disk.clone(),
        has_xsave: arguments.xsave,
    };
    job.run()
}

fn into_lab(text: &str) -> Result<(PathBuf, String)> {
    let (source, target) = match text.split_once(':') {
        Some((source, target)) => (source, Some(target)),
        None => (text, None),
    };
    let path = PathBuf::from(source);
    if !path.exists() {
        bail!("--with {text}: {source} does not exist");
    }
    let name = path.file_name().with_context(|| format!("--with {text}: {source} has no file name"))?;
    let target = target.map_or_else(|| name.to_string_lossy().into_owned(), str::to_owned);
    Ok((path, inside(&target)))
}

fn out_of_lab(text: &str) -> Result<(String, PathBuf)> {
    let (source, target) = match text.split_once(':') {
        Some((source, target)) => (source, PathBuf::from(target)),
        None => (text, Path::new(text).file_name().with_context(|| format!("--get {text}"))?.into()),
    };
    Ok((inside(source), target))
}

/// Makes a path absolute, relative to the lab's working directory.
pub(crate) fn inside(path: &str) -> String {
    if path.starts_with('/') { path.to_owned() } else { format!("{WORKING_DIRECTORY}/{path}") }
}
