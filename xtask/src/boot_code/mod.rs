//! `cargo xtask boot-code`: finds out which of the VMM's functions a boot executes, and writes the list by
//! which the linker puts them side by side (`vmm/boot-code.ld`).
//!
//! The VMM is linked once more with its symbols and a link map. Boots of it are followed in the lab, with a
//! breakpoint on each function ([`follow`]); what was reached becomes patterns of the linker's language ([`link_map`]).

pub(crate) mod follow;
mod link_map;

use crate::bench::{self, payload};
use crate::host::workspace;
use crate::{cargo, debian, lab};
use anyhow::{Context, Result, bail};
use clap::Args;
use io_payload::DISK_BYTES;
use link_map::LinkMap;
use std::collections::BTreeSet;
use std::fmt::Write;
use std::fs::{self, File};
use std::path::PathBuf;
use xshell::cmd;

#[derive(Args, Debug)]
pub(crate) struct Arguments {
    /// Say whether the list is what a boot executes now, and leave it as it is
    #[arg(long)]
    check: bool,
}

/// The list, from the workspace's root on.
const LIST: &str = "vmm/boot-code.ld";
/// MiB of the lab's memory.
const LAB_MIB: u64 = 1024;
/// The disk in the lab.
const DISK: &str = "disk";

/// What the list says of itself.
const HEAD: &str = "/*
 * The code that a boot executes, side by side; `cargo xtask boot-code` writes this file.
 *
 * A page fault maps the 16 pages around it. Where the linker takes functions as they come, the few hundred KiB of
 * functions that a boot needs are spread over all of the program, and nearly all of it gets mapped: page after
 * page at the start, and off again at the end. Nothing depends on this list being complete or up to date: what it
 * does not name is linked behind it, and a name that nothing has is no error.
 *
 * It names functions one by one, because patterns for whole modules also take their error messages and what only
 * tools need. Names are mangled and have a digest inside, for which there is a star. The C library's parts are
 * named by its object files; beside the copying functions of the processor on which the list was made stand those
 * of others.
 */
SECTIONS
{
  .text.boot :
  {
    /* Stubs of the functions of which there is one for each kind of processor. */
    *(.iplt)
";

/// Follows boots, and writes the list or compares it; the exit status is 1 when `--check` finds a difference.
pub(crate) fn run(arguments: &Arguments) -> Result<u8> {
    debian::ensure_lab_tools()?;
    let image = bench::image(true)?;
    let place = tempfile::tempdir()?;
    let (program, map) = linked_with_symbols(place.path().join("map"))?;
    let map = LinkMap::parse(&map).context("the linker's map cannot be read")?;
    let runs = [
        ("A start from a pre-booted kernel.", "", payload::PATH.to_owned()),
        ("A boot.", "--cold", payload::PATH.to_owned()),
        ("A start with devices, and their use.", follow::DEVICES, format!("{} 1", payload::IO_PATH)),
    ];
    let plan = follow::Plan {
        addresses: map.addresses().collect(),
        runs: runs.iter().map(|(_, options, payload)| format!("{options} -- {payload}")).collect(),
    };
    let reached = in_lab(&plan, program, image)?;
    let mut list = HEAD.to_owned();
    let mut named = BTreeSet::new();
    for ((title, ..), addresses) in runs.iter().zip(&reached) {
        let patterns: BTreeSet<_> = map.patterns(addresses).difference(&named).cloned().collect();
        let _ = writeln!(list, "    /* {title} */");
        for pattern in &patterns {
            let _ = writeln!(list, "    {pattern}");
        }
        eprintln!("{} functions reached, {} patterns more: {title}", addresses.len(), patterns.len());
        named.extend(patterns);
    }
    list += "  }\n}\nINSERT BEFORE .text;\n";
    let path = workspace().join(LIST);
    if !arguments.check {
        crate::output::write(&path, &list)?;
        return Ok(0);
    }
    let patterns = |text: &str| -> BTreeSet<String> {
        text.lines().map(str::trim).filter(|line| line.starts_with('*')).map(str::to_owned).collect()
    };
    let (now, before) = (patterns(&list), patterns(&fs::read_to_string(&path)?));
    now.difference(&before).for_each(|pattern| println!("+ {pattern}"));
    before.difference(&now).for_each(|pattern| println!("- {pattern}"));
    Ok(u8::from(now != before))
}

/// Builds the VMM as it is released, but with its symbols, and the link map of that.
fn linked_with_symbols(map: PathBuf) -> Result<(PathBuf, String)> {
    let shell = cargo::shell()?;
    let target = cargo::target_directory().join("boot-code");
    let option = format!("link-arg=-Wl,-Map={}", map.display());
    // Where nothing has changed, cargo would not link, and there would be no map.
    let program = target.join("x86_64-unknown-linux-gnu/release/kindling");
    let _ = fs::remove_file(&program);
    cmd!(
        shell,
        "cargo rustc --quiet --release --package kindling-cli --bin kindling --target-dir {target}
         --config profile.release.strip=false -- -C {option}"
    )
    .env_remove("RUSTFLAGS")
    .quiet()
    .run()
    .context("cannot build kindling with symbols")?;
    let text = fs::read_to_string(&map).context("the linker wrote no map")?;
    Ok((program, text))
}

/// Follows the runs of a plan: for each, the addresses that it reached.
fn in_lab(plan: &follow::Plan, program: PathBuf, image: PathBuf) -> Result<Vec<BTreeSet<u64>>> {
    let place = tempfile::tempdir()?;
    let file = |name: &str| place.path().join(name);
    fs::write(file("plan.json"), serde_json::to_vec(plan)?)?;
    File::create(file(DISK))?.set_len(DISK_BYTES)?;
    let status = lab::Job {
        cpus: 1,
        memory_mib: LAB_MIB,
        command: ["/init", "follow-boots", "plan.json", "reached.json"].map(str::to_owned).to_vec(),
        with: vec![
            (program, "/bin/kindling".to_owned()),
            (image, follow::IMAGE.to_owned()),
            (file("plan.json"), lab::inside("plan.json")),
            (file(DISK), lab::inside(DISK)),
        ],
        get: vec![(lab::inside("reached.json"), file("reached.json"))],
        disk: None,
        has_xsave: false,
        ..lab::Job::default()
    }
    .run()?;
    if status != 0 {
        bail!("following boots in the lab ended with status {status}");
    }
    serde_json::from_slice(&fs::read(file("reached.json"))?).context("what the lab found cannot be read")
}
