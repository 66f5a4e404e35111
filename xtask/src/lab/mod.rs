//! The lab: an emulated machine with an ordinary KVM, for hosts that have none.
//!
//! QEMU's TCG emulates AMD's SVM with nested paging. A stock Debian kernel in it loads `kvm_amd`
//! and offers a complete KVM: neither /dev/kvm nor root nor a special host is needed. In *exact*
//! mode one instruction is one nanosecond of the lab's clock, so that times count instructions and
//! are the same on every machine.

mod corrected_qemu;
mod disk;
mod frame;
pub(crate) mod guest;
mod qemu;

pub(crate) use disk::{busybox, kernel};
pub(crate) use qemu::{Driver, Silent};

use crate::build_image::{self, Profile};
use crate::cargo;
use anyhow::{Context, Result, bail};
use clap::Args;
use std::path::{Path, PathBuf};
use std::time::Duration;

#[derive(Args, Debug)]
pub(crate) struct Arguments {
    /// Count instructions: one is one nanosecond of the lab's clock
    #[arg(long)]
    exact: bool,
    /// Processors of the lab
    #[arg(long, default_value_t = 1)]
    cpus: u8,
    /// Memory of the lab in MiB
    #[arg(long, value_name = "MIB", default_value_t = 2048)]
    memory: u64,
    /// File or folder to put into the lab's working directory, or at DEST; may be repeated
    #[arg(long, value_name = "FILE[:DEST]")]
    with: Vec<String>,
    /// Image of an ext4 filesystem, which is at /disk in the lab, read-only
    #[arg(long, value_name = "FILE")]
    disk: Option<PathBuf>,
    /// Give the lab's processor XSAVE, which Firecracker needs
    #[arg(long)]
    xsave: bool,
    /// File to copy back when the command has ended, into the current directory or to DEST; may
    /// be repeated
    #[arg(long, value_name = "FILE[:DEST]")]
    get: Vec<String>,
    /// Command to run; `kindling` with its other programs, busybox's commands and the default image
    /// (/images/default) are there
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// Where commands run inside the lab.
pub(crate) const WORKING_DIRECTORY: &str = "/work";

/// Where a job's disk is inside the lab.
pub(crate) const DISK: &str = "/disk";

/// Stands in a command for the time at which it is started: CLOCK_MONOTONIC in nanoseconds.
pub(crate) const NOW: &str = "{now}";

/// An argument with [`NOW`] replaced.
pub(crate) fn with_time(argument: &str) -> String {
    argument.replace(NOW, &kindling_vmm::Instant::now().0.to_string())
}

/// What to run in a lab, and with what.
#[derive(Debug, Default)]
pub(crate) struct Job {
    /// Whether time counts instructions.
    pub(crate) exact: bool,
    /// Processors.
    pub(crate) cpus: u8,
    /// MiB of memory.
    pub(crate) memory_mib: u64,
    /// The command.
    pub(crate) command: Vec<String>,
    /// Its environment.
    pub(crate) environment: Vec<(String, String)>,
    /// Files and folders of the host, and where they go.
    pub(crate) with: Vec<(PathBuf, String)>,
    /// Files of the lab, and where they go on the host.
    pub(crate) get: Vec<(String, PathBuf)>,
    /// An ext4 filesystem that is read from where it is, at [`DISK`]: what is in `with` takes memory.
    pub(crate) disk: Option<PathBuf>,
    /// Whether the processor has XSAVE, without which Firecracker does not start. Programs of guests do not return
    /// from a signal handler then (docs/testing.md, "The lab").
    pub(crate) has_xsave: bool,
}

impl Job {
    /// Whether the lab counts instructions. With several processors it always does: without, about
    /// a quarter of the guests with four vCPUs hung while they booted, for a reason not found;
    /// counted, the processors take turns in the same way every time, and none did.
    pub(crate) const fn counts_instructions(&self) -> bool {
        self.exact || self.cpus > 1
    }

    /// Runs the command with this process's standard streams; its exit status.
    pub(crate) fn run(&self) -> Result<u8> {
        qemu::run(self, None, None)
    }

    /// Runs the command with a driver in place of the standard streams. A lab that says nothing for `limit` is an
    /// error, which is [`Silent`].
    pub(crate) fn drive(&self, limit: Duration, driver: Driver<'_>) -> Result<u8> {
        qemu::run(self, Some(limit), Some(driver))
    }

    /// Runs the command with the standard streams. A lab that says nothing for `limit` is an error.
    pub(crate) fn run_unless_silent(&self, limit: Duration) -> Result<u8> {
        qemu::run(self, Some(limit), None)
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
    // `kindling run` prefers its own kernel. It is built only for users who have asked for it before: that takes minutes.
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
        bail!("--with {text}: there is no {source}");
    }
    let name = path.file_name().with_context(|| format!("--with {text}: {source} has no name"))?;
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

/// An absolute path inside the lab.
pub(crate) fn inside(path: &str) -> String {
    if path.starts_with('/') { path.to_owned() } else { format!("{WORKING_DIRECTORY}/{path}") }
}
