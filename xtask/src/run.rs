//! `cargo xtask run`: builds everything and boots the default image.

use crate::build_image::{self, relative};
use crate::host::Host;
use crate::{cargo, lab};
use anyhow::Result;
use clap::Args;
use kindling_vmm::config::image::Image;
use std::path::PathBuf;
use std::process::Command;

#[derive(Args, Debug)]
pub(crate) struct Arguments {
    /// Boot in the exact lab, which counts instructions
    #[arg(long)]
    exact: bool,
    /// Memory of the guest in MiB
    #[arg(long, value_name = "MIB", default_value_t = 128)]
    memory: u64,
    /// vCPUs of the guest
    #[arg(long, value_name = "N", default_value_t = 1)]
    vcpus: u8,
    /// Command to run in the guest, instead of printing the greeting
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// Memory of the lab in MiB in addition to the guest's.
const LAB_OVERHEAD_MIB: u64 = 1024;

/// Builds the default image if necessary, boots it and prints its boot report.
pub(crate) fn run(arguments: &Arguments) -> Result<u8> {
    let host = Host::choose(arguments.exact, arguments.vcpus > 1);
    let image = build_image::of_profile(build_image::Profile::Boot)?;
    let description = Image::open(&image)?;
    description.verify(&image)?;
    let kindling = cargo::release_binary("kindling-cli", "kindling")?;
    println!(
        "image: {} (Linux {}, {} KiB kernel, {} KiB root filesystem)",
        relative(&image),
        description.kernel_version,
        description.kernel.size / 1024,
        description.initrd.size / 1024,
    );
    let boot = |kindling: &str, image: &str| {
        let mut words = [kindling, "boot", "--report", "--started-at", lab::NOW, "--image", image]
            .map(str::to_owned)
            .to_vec();
        words.extend(["--memory".to_owned(), arguments.memory.to_string()]);
        words.extend(["--vcpus".to_owned(), arguments.vcpus.to_string()]);
        if !arguments.command.is_empty() {
            words.push("--".to_owned());
            words.extend(arguments.command.iter().cloned());
        }
        words
    };
    match host {
        Host::Hardware => {
            let words = boot(&kindling.to_string_lossy(), &image.to_string_lossy());
            let status =
                Command::new(&words[0]).args(words[1..].iter().map(|word| lab::with_time(word))).status()?;
            Ok(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(255))
        }
        Host::Lab => lab::Job {
            exact: arguments.exact,
            cpus: arguments.vcpus.max(1),
            memory_mib: arguments.memory + LAB_OVERHEAD_MIB,
            command: boot("/bin/kindling", "/images/default"),
            environment: Vec::new(),
            with: vec![(kindling, "/bin/kindling".to_owned()), (image, "/images/default".to_owned())],
            get: Vec::<(String, PathBuf)>::new(),
            disk: None,
            has_xsave: false,
        }
        .run(),
    }
}
