//! `cargo xtask profile --scenario run`: a `kindling run` from a pre-booted kernel on one timeline, with the page faults and
//! exits of its guest.

mod faults;
pub(crate) mod measure;
mod memory;
mod text;

use super::{LAB_OVERHEAD_MIB, read_kernel};
use crate::bench::run::Images;
use crate::build_image::{self, Profile, build_with_kernel};
use crate::host::Host;
use crate::{cargo, debian, lab};
use anyhow::{Result, bail};
use kindling_vmm::Instant;
use kindling_vmm::preboot::SavedMemory;
use measure::{Plan, Record};
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::{Path, PathBuf};

/// A step of the report, and when it was complete, in nanoseconds since the start of the command.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub(crate) struct Step {
    pub(crate) name: String,
    pub(crate) ns: u64,
}

impl Step {
    /// Parses a line of `kindling run --report`: `      2.490      +0.412  first instruction`.
    pub(crate) fn parse(line: &str) -> Option<Self> {
        let (at, rest) = line.trim_start().split_once(' ')?;
        let (own, name) = rest.trim_start().split_once("  ")?;
        own.strip_prefix('+')?;
        let (whole, part) = at.split_once('.').filter(|(_, part)| part.len() == 3)?;
        let microseconds = whole.parse::<u64>().ok()? * 1000 + part.parse::<u64>().ok()?;
        Some(Self { name: name.trim().to_owned(), ns: microseconds * 1000 })
    }
}

/// Measures, and prints tables.
pub(super) fn run(arguments: &super::Arguments) -> Result<u8> {
    let host = Host::choose(arguments.exact, true);
    debian::ensure_lab_tools()?;
    let scratch = tempfile::tempdir()?;
    let (image, kernel) = build_with_kernel(&build_image::Arguments {
        profile: Profile::Run,
        ..build_image::Arguments::default()
    })?;
    let images = Images::make(scratch.path())?;
    let kindling = cargo::release_binary("kindling-cli", "kindling")?;
    let plan = |kindling: &Path, image: &Path, root: &Path| Plan {
        kindling: kindling.to_owned(),
        image: image.to_owned(),
        root: root.to_owned(),
        memory_mib: arguments.memory,
        vcpus: arguments.vcpus,
        program: vec!["true".to_owned()],
        spare: arguments.spare,
    };
    let file = |name: &str| scratch.path().join(name);
    match host {
        Host::Hardware => {
            let plan = plan(&kindling, &image, images.busybox());
            write_plan(&file("plan.json"), &plan)?;
            let files = ["plan.json", "record.json", "kernel"].map(file);
            measure::run(&files.into())?;
        }
        Host::Lab => {
            let plan = plan(Path::new("/bin/kindling"), Path::new("/image"), Path::new("/busybox.tar"));
            write_plan(&file("plan.json"), &plan)?;
            in_lab(arguments, &kindling, &image, &images, scratch.path())?;
        }
    }
    let record: Record = serde_json::from_slice(&fs::read(file("record.json"))?)?;
    let memory = SavedMemory::open(&file("kernel"))?;
    let map = memory::Map::new(&memory, &read_kernel(&kernel)?.symbols)?;
    let (mut faults, mut exits) = faults::evaluate(&record.trace, &memory, &map, arguments.spare);
    // The next spare monitor starts when the run has ended.
    let is_before_end = |at: Instant| at.since(Instant(record.traced.started)) < record.traced.ended;
    faults.retain(|fault| is_before_end(fault.at));
    exits.retain(|exit| is_before_end(exit.at));
    println!("\nmeasured in {}", host.meaning());
    print!("{}", text::report(arguments, &record, &faults, &exits));
    Ok(0)
}

fn write_plan(path: &Path, plan: &Plan) -> Result<()> {
    Ok(fs::write(path, serde_json::to_vec(plan)?)?)
}

/// Runs the plan in a lab, with the same file names in its working directory.
fn in_lab(
    arguments: &super::Arguments,
    kindling: &Path,
    image: &Path,
    images: &Images,
    scratch: &Path,
) -> Result<()> {
    let mut with: Vec<(PathBuf, String)> = vec![
        (kindling.into(), "/bin/kindling".to_owned()),
        (image.into(), "/image".to_owned()),
        (images.busybox().into(), "/busybox.tar".to_owned()),
        (scratch.join("plan.json"), lab::inside("plan.json")),
    ];
    for name in ["kindling-vmm", "kindling-oci"] {
        with.push((cargo::release_binary(name, name)?, format!("/bin/{name}")));
    }
    let files = ["record.json", "kernel"];
    let status = lab::Job {
        exact: true,
        cpus: arguments.vcpus,
        // The file of the pre-booted kernel, which is as long as the guest's memory, is copied, and then read to be sent.
        memory_mib: 3 * arguments.memory + LAB_OVERHEAD_MIB,
        // The lab's init is this program.
        command: ["/init", "profile-run", "plan.json", files[0], files[1]].map(str::to_owned).to_vec(),
        environment: Vec::new(),
        with,
        get: files.map(|name| (lab::inside(name), scratch.join(name))).to_vec(),
        disk: None,
        has_xsave: false,
    }
    .run()?;
    if status != 0 {
        bail!("the runs in the lab failed with status {status}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_parsed_from_the_report() {
        let step = Step::parse("      2.490      +0.412  first instruction").unwrap();
        assert_eq!(step, Step { name: "first instruction".to_owned(), ns: 2_490_000 });
        assert_eq!(Step::parse("boot report (milliseconds since the command was started)"), None);
        assert_eq!(Step::parse("38 exits to the VMM: 10 port writes"), None);
    }
}
