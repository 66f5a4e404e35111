//! `cargo xtask boot-code`: determines which functions of the command and of the monitor a start executes, and writes the
//! linker scripts that group them (`cli/boot-code.ld` and `vmm/boot-code.ld`).
//!
//! The programs are linked with symbols and a link map. Starts are traced in the lab with a breakpoint on each function
//! ([`follow`]). The functions that were hit become linker-script patterns ([`link_map`]).

pub(crate) mod follow;
mod link_map;

use crate::bench::{self, payload, run::Images};
use crate::build_image::{self, Profile};
use crate::host::workspace;
use crate::{cargo, container, debian, lab};
use anyhow::{Context, Result, bail};
use clap::Args;
use follow::Functions;
use io_payload::DISK_BYTES;
use link_map::LinkMap;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use xshell::cmd;

#[derive(Args, Debug)]
pub(crate) struct Arguments {
    /// Compare the lists with the functions that a start executes, without writing them
    #[arg(long)]
    check: bool,
}

/// A program whose code is ordered.
struct Program {
    package: &'static str,
    name: &'static str,
    /// The path of its list in the workspace.
    list: &'static str,
    /// The title of the most frequent run.
    first: &'static str,
    /// The titles of a second kind of runs. What both kinds execute lies between what only one of them does, so that the
    /// code of each is contiguous.
    second: &'static [&'static str],
    /// The titles of other runs.
    others: &'static [&'static str],
}

const PROGRAMS: [Program; 2] = [
    Program {
        package: "kindling-cli",
        name: "kindling",
        list: "cli/boot-code.ld",
        first: RUN,
        second: &[PREBOOTED, COLD, DEVICES],
        others: &[MOUNTS, EXEC, DETACHED],
    },
    Program {
        package: "kindling-vmm",
        name: "kindling-vmm",
        list: "vmm/boot-code.ld",
        first: RUN,
        second: &[],
        others: &[MOUNTS, DETACHED, COLD_RUN],
    },
];

const RUN: &str = "run";
const MOUNTS: &str = "run, with a volume and a folder";
const DETACHED: &str = "run -d";
const COLD_RUN: &str = "run --cold";
const EXEC: &str = "exec";
const PREBOOTED: &str = "boot, from a pre-booted kernel";
const COLD: &str = "boot";
const DEVICES: &str = "boot, with devices that are used";

/// Programs and runs for the lab.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct Plan {
    programs: Functions,
    environment: BTreeMap<String, String>,
    runs: Vec<Run>,
}

/// Runs of the same kind, with the arguments of `kindling`; a line is split at spaces.
#[derive(Debug, Deserialize, Serialize)]
struct Run {
    title: String,
    before: Vec<String>,
    /// The commands that are traced. Their standard input has one line.
    commands: Vec<String>,
    after: Vec<String>,
}

/// The runs. `tar` and `erofs` are container images with busybox.
fn runs(tar: &str, erofs: &str) -> Vec<Run> {
    let run = |title: &str, before: &[&str], commands: &[&str], after: &[&str]| {
        let lines = |texts: &[&str]| texts.iter().map(|&text| text.to_owned()).collect();
        Run { title: title.to_owned(), before: lines(before), commands: lines(commands), after: lines(after) }
    };
    let boot = |title, options: &str, program: &str| {
        let options = format!("--memory 128 {options}");
        let preboot = format!("preboot --image {BOOT_IMAGE} {options}");
        let before: &[&str] = if title == COLD { &[] } else { &[&preboot] };
        run(title, before, &[&format!("boot --image {BOOT_IMAGE} {options} -- {program}")], &[])
    };
    let (of_tar, of_erofs) = (format!("run {OPTIONS} {tar} cat"), format!("run {erofs} cat"));
    let mounts = format!("run -v data:/data -v .:/folder {tar} true");
    vec![
        // The first run converts the image and pre-boots the kernel.
        run(RUN, &[&of_tar], &[&of_tar, &of_erofs], &[]),
        run(MOUNTS, &[&mounts], &[&mounts], &[]),
        run(DETACHED, &[], &[&format!("run -d {OPTIONS} {tar} echo line")], &[]),
        run(COLD_RUN, &[], &[&format!("run --cold {tar} true")], &[]),
        run(
            EXEC,
            &[&format!("run -d --name guest {tar} busybox sleep 1000")],
            &["exec -i guest cat"],
            &["rm -f guest"],
        ),
        boot(PREBOOTED, "", payload::PATH),
        boot(COLD, "--cold", payload::PATH),
        boot(DEVICES, follow::DEVICES, &format!("{} 1", payload::IO_PATH)),
    ]
}

/// Options that many users of `kindling run` pass.
const OPTIONS: &str = "--rm --name guest --env A=b --workdir / --user 0:0 --memory 512 --cpus 1";
/// The path of the image of `kindling boot` in the lab.
const BOOT_IMAGE: &str = "/images/bench";
/// The path of the kernel for `kindling run` there.
const RUN_IMAGE: &str = "/images/run";
/// The path of a root filesystem in the lab.
const EROFS: &str = "/images/busybox.erofs";
/// Memory of the lab in MiB.
const LAB_MIB: u64 = 2048;
/// The file name of the guest's disk in the lab.
const DISK: &str = "disk";

/// The start of a list.
const HEAD: &str = "/*
 * The code that starts execute, side by side. Generated by `cargo xtask boot-code`.
 *
 * A page fault maps the 16 pages around it. In the linker's default order the few hundred KiB of functions that a start
 * needs are spread over the whole program, and nearly all of it gets mapped: page after page at the start, and
 * unmapped at the end. Nothing depends on this list being complete or current: other functions are linked after it,
 * and a pattern without a match is not an error.
 *
 * Functions are listed one by one, because patterns for whole modules would include their error paths and code that
 * only tools need. Names are mangled and contain a digest, for which there is a wildcard. The C library's functions
 * are listed by object file; next to the copying functions of the processor on which the list was generated are those
 * of other processors.
 */
SECTIONS
{
  .text.boot :
  {
    /* Stubs of functions with a variant per processor (IFUNC). */
    *(.iplt)
";

/// The end of a list.
const TAIL: &str = "  }
}
INSERT BEFORE .text;

/*
 * Data that no start reads, and that would separate what starts do read: the C library's tables of characters, powers of
 * ten, error names and locales, its long messages, tables for floating point numbers and Unicode, and those of the code that
 * prints backtraces.
 */
SECTIONS
{
  .rodata.unread :
  {
    *libc.a:C-c*.o(.rodata .rodata.*)
    *libc.a:err*.o(.rodata .rodata.*)
    *libc.a:fpioconst.o(.rodata .rodata.*)
    *libc.a:gconv*.o(.rodata .rodata.*)
    *libc.a:load*.o(.rodata .rodata.*)
    *libc.a:plural*.o(.rodata .rodata.*)
    *libc.a:siglist.o(.rodata .rodata.*)
    *libc.a:*(.rodata.str1.8)
    *libc.a:printf*.o(.rodata .rodata.*)
    *(.rodata.*POW10*)
    *(.rodata.*12unicode_data*)
    *(.rodata.*5gimli*)
    *(.rodata.*9addr2line*)
  }
}
INSERT AFTER .rodata;
";

/// Traces starts and writes or compares the lists. The exit status is 1 if `--check` finds a difference.
pub(crate) fn run(arguments: &Arguments) -> Result<u8> {
    debian::ensure_lab_tools()?;
    let scratch = tempfile::tempdir()?;
    let images = Images::make(scratch.path())?;
    let tar = images.busybox().to_string_lossy().into_owned();
    let erofs = container::prepare(&tar, Some(&scratch.path().join("cache")))?.rootfs;
    let mut with = vec![(erofs, EROFS.to_owned())];
    let mut maps = Vec::new();
    let mut functions = Functions::new();
    for program in &PROGRAMS {
        let (path, map) = linked_with_symbols(program, &scratch.path().join(program.name))?;
        with.push((path, format!("/bin/{}", program.name)));
        let map = LinkMap::parse(&map).context("cannot parse the linker's map")?;
        functions.insert(program.name.to_owned(), map.addresses().collect());
        maps.push(map);
    }
    let images = images.map(|path, name| {
        let place = format!("/bin/{name}");
        if !functions.contains_key(name) {
            with.push((path.to_owned(), place.clone()));
        }
        place.into()
    });
    with.push((bench::image(true)?, BOOT_IMAGE.to_owned()));
    let run_image = build_image::Arguments { profile: Profile::Run, ..build_image::Arguments::default() };
    with.push((build_image::build(&run_image)?, RUN_IMAGE.to_owned()));
    let environment = [
        ("KINDLING_IMAGE", RUN_IMAGE.to_owned()),
        ("XDG_RUNTIME_DIR", "/run".to_owned()),
        ("XDG_CACHE_HOME", "/run".to_owned()),
        ("XDG_DATA_HOME", "/run".to_owned()),
        // Volumes are formatted with the programs in this folder.
        ("PATH", format!("/bin:{}", images.filesystems().display())),
    ];
    let plan = Plan {
        programs: functions,
        environment: environment.into_iter().map(|(name, value)| (name.to_owned(), value)).collect(),
        runs: runs(&images.busybox().to_string_lossy(), EROFS),
    };
    let reached = in_lab(&plan, with)?;
    let mut is_current = true;
    for (program, map) in PROGRAMS.iter().zip(&maps) {
        let list = list(program, map, &plan.runs, &reached);
        let path = workspace().join(program.list);
        if arguments.check {
            is_current &= compare(program.list, &fs::read_to_string(&path)?, &list);
        } else {
            crate::output::write(&path, &list)?;
        }
    }
    Ok(u8::from(!is_current))
}

/// The list of a program.
fn list(program: &Program, map: &LinkMap, runs: &[Run], reached: &[Functions]) -> String {
    let patterns_of = |title: &str| -> BTreeSet<String> {
        let of_run = runs.iter().zip(reached).find(|(run, _)| run.title == title);
        let addresses = of_run.and_then(|(_, reached)| reached.get(program.name));
        addresses.map(|addresses| map.patterns(addresses)).unwrap_or_default()
    };
    let first = patterns_of(program.first);
    let second: BTreeSet<_> = program.second.iter().flat_map(|title| patterns_of(title)).collect();
    let mut groups = vec![(program.first, first.difference(&second).cloned().collect::<BTreeSet<_>>())];
    if !second.is_empty() {
        groups.push(("Both.", first.intersection(&second).cloned().collect()));
    }
    let mut named = first;
    for &title in program.second.iter().chain(program.others) {
        let patterns: BTreeSet<_> = patterns_of(title).difference(&named).cloned().collect();
        named.extend(patterns.iter().cloned());
        groups.push((title, patterns));
    }
    let mut list = HEAD.to_owned();
    for (title, patterns) in groups {
        eprintln!("{}: {} patterns: {title}", program.name, patterns.len());
        let _ = writeln!(list, "    /* {title} */");
        for pattern in &patterns {
            let _ = writeln!(list, "    {pattern}");
        }
    }
    list + TAIL
}

/// Prints how the patterns of a list differ from those that it has now. Returns whether they are the same.
fn compare(path: &str, before: &str, now: &str) -> bool {
    let patterns = |text: &str| -> BTreeSet<String> {
        text.lines().map(str::trim).filter(|line| line.starts_with('*')).map(str::to_owned).collect()
    };
    let (now, before) = (patterns(now), patterns(before));
    now.difference(&before).for_each(|pattern| println!("{path}: + {pattern}"));
    before.difference(&now).for_each(|pattern| println!("{path}: - {pattern}"));
    now == before
}

/// Builds a program as in a release, with symbols; returns it and its link map. `folder` does not exist.
fn linked_with_symbols(program: &Program, folder: &Path) -> Result<(PathBuf, String)> {
    let shell = cargo::shell()?;
    let target = cargo::target_directory().join("boot-code");
    fs::create_dir(folder)?;
    let map = folder.join("map");
    let option = format!("link-arg=-Wl,-Map={}", map.display());
    let Program { package, name, .. } = program;
    // Cargo does not link an up-to-date program, and then there would be no map.
    let built = target.join("x86_64-unknown-linux-gnu/release").join(name);
    let _ = fs::remove_file(&built);
    cmd!(
        shell,
        "cargo rustc --quiet --release --package {package} --bin {name} --target-dir {target}
         --config profile.release.strip=false -- -C {option}"
    )
    .env_remove("RUSTFLAGS")
    .quiet()
    .run()
    .with_context(|| format!("cannot build {name} with symbols"))?;
    let text = fs::read_to_string(&map).context("the linker wrote no map")?;
    Ok((built, text))
}

/// Traces the runs of a plan in the lab; returns the functions that each reached.
fn in_lab(plan: &Plan, mut with: Vec<(PathBuf, String)>) -> Result<Vec<Functions>> {
    let scratch = tempfile::tempdir()?;
    let file = |name: &str| scratch.path().join(name);
    fs::write(file("plan.json"), serde_json::to_vec(plan)?)?;
    File::create(file(DISK))?.set_len(DISK_BYTES)?;
    with.push((file("plan.json"), lab::inside("plan.json")));
    with.push((file(DISK), lab::inside(DISK)));
    let status = lab::Job {
        cpus: 1,
        memory_mib: LAB_MIB,
        command: ["/init", "follow-boots", "plan.json", "reached.json"].map(str::to_owned).to_vec(),
        with,
        get: vec![(lab::inside("reached.json"), file("reached.json"))],
        disk: None,
        has_xsave: false,
        ..lab::Job::default()
    }
    .run()?;
    if status != 0 {
        bail!("tracing starts in the lab failed with status {status}");
    }
    serde_json::from_slice(&fs::read(file("reached.json"))?)
        .context("cannot parse the addresses from the lab")
}
