//! `cargo xtask bench`: compares monitors with the same kernel, initramfs and payload.
//!
//! The measuring code runs on the same machine as the monitors: in this process if this machine's KVM can run Linux,
//! otherwise in the exact lab, where this program is started as the lab's command.

mod arguments;
mod boot;
mod clone;
mod containers;
pub(crate) mod files;
mod io;
mod jail;
mod jailer;
pub(crate) mod measure;
mod metric;
pub(crate) mod payload;
pub(crate) mod peer;
mod plan;
mod process;
mod report;
pub(crate) mod run;
mod smaps;
pub(crate) mod statistics;
mod svg;
pub(crate) mod trace;
mod vmms;

pub(crate) use arguments::Arguments;

use crate::host::Host;
use crate::output::write;
use crate::{build_image, cargo, debian, lab};
use anyhow::{Context, Result, bail};
use arguments::Request;
use metric::Metric;
use plan::{Case, Outcome, Plan, Scenario};
use report::{HostDescription, Report};
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use vmms::{Guest, Kind, Vmm};

/// Memory of the lab in MiB in addition to the guest's: its initramfs contains QEMU and its libraries.
const LAB_OVERHEAD_MIB: u64 = 1024;
/// Limit of the time without output: while a monitor runs, a line is printed every five seconds of the lab's clock.
const OUTPUT_TIMEOUT: Duration = Duration::from_secs(60);
/// The path of QEMU in Debian, and in the lab.
const QEMU: &str = "/usr/bin/qemu-system-x86_64";

/// Measures, prints tables and writes files. The exit status is 1 if a monitor failed.
pub(crate) fn run(arguments: &Arguments) -> Result<u8> {
    let request = arguments.check()?;
    let host = Host::choose(request.exact, true);
    let outcome = outcome(&request, host)?;
    let report = Report {
        scenario: request.scenario,
        host: HostDescription {
            kind: host.kind(),
            meaning: host.meaning(),
            notes: notes(&request, &outcome, host),
            machine: outcome.machine,
        },
        rows: statistics::rows(request.scenario, &outcome.samples),
        failures: outcome.failures,
    };
    print!("{}", report.tables());
    if let Some(path) = &request.json {
        write(path, &report.json()?)?;
    }
    if let Some(path) = &request.svg {
        write(path, &svg::picture(&report))?;
    }
    for failure in &report.failures {
        eprintln!("failed: {}, {}: {}", failure.vmm, failure.case, failure.what);
    }
    Ok(u8::from(!report.failures.is_empty()))
}

/// Measures the request.
fn outcome(request: &Request, host: Host) -> Result<Outcome> {
    debian::ensure_lab_tools()?;
    let folder = tempfile::tempdir()?;
    let (scenario, runs) = (request.scenario, request.runs);
    let (guest, vmms) = match scenario {
        Scenario::Start | Scenario::Clone => images(request)?,
        Scenario::Jail => {
            let (_, mut vmms) = images(request)?;
            vmms.extend(request.vmms.iter().cloned());
            // Other monitors boot the image of the boot scenario, because the kernel of `kindling run` has no serial port.
            (guest_of(image(false)?), vmms)
        }
        _ => {
            let guest = guest(request)?;
            let vmms = vmms(request, guest.image.is_some())?;
            (guest, vmms)
        }
    };
    let images = match scenario {
        Scenario::Run => {
            let images = run::Images::make(folder.path())?.with_console(folder.path())?;
            Some(images.with_containers(folder.path())?)
        }
        Scenario::Start | Scenario::Clone | Scenario::Jail => Some(run::Images::make(folder.path())?),
        Scenario::Boot | Scenario::Io => None,
    };
    let plan = Plan { scenario, vmms, guest, images, cases: request.cases().flatten().collect(), runs };
    match host {
        Host::Hardware => measure::measure(&plan),
        Host::Lab => in_labs(request, &plan),
    }
}

/// The cost of a program that starts from a pre-booted kernel: medians of `runs` in the exact lab.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Start {
    /// Nanoseconds of a whole `kindling run`.
    pub(crate) ns: i64,
    /// Page faults on guest memory during that time.
    pub(crate) faults: i64,
    /// Private memory of the monitor and its guest in bytes, while the program waits for input.
    pub(crate) idle_bytes: i64,
}

/// Measures starts from the kernels of named images, in the order of the images. A kernel with which no program starts
/// is reported on standard error and has no value.
///
/// # Errors
/// When nothing can be measured.
pub(crate) fn starts(images: Vec<(String, PathBuf)>, runs: u32) -> Result<Vec<Option<Start>>> {
    let request = Request::of_starts(images, runs);
    let outcome = outcome(&request, Host::Lab)?;
    for failure in &outcome.failures {
        eprintln!("cannot start a program with the kernel {}: {}", failure.vmm, failure.what);
    }
    let rows = statistics::rows(request.scenario, &outcome.samples);
    let start = |name: &str| {
        let value = |metric| {
            let row = rows.iter().find(|row| row.vmm == name && row.metric == metric)?;
            i64::try_from(row.median).ok()
        };
        Some(Start {
            ns: value(Metric::RunBusybox)?,
            faults: value(Metric::RunFaults)?,
            idle_bytes: value(Metric::IdleMemory)?,
        })
    };
    Ok(request.images.iter().map(|(name, _)| start(name)).collect())
}

/// The monitors: Kindling, Kindling from a pre-booted kernel if there is an image, QEMU, and those given with `--vmm`.
fn vmms(request: &Request, has_image: bool) -> Result<Vec<Vmm>> {
    let ours = cargo::release_binary("kindling-cli", "kindling")?;
    let always = [
        (arguments::KINDLING, Kind::Kindling, ours.clone()),
        (arguments::KINDLING_PREBOOT, Kind::Prebooted, ours),
        (arguments::QEMU_MICROVM, Kind::Qemu, PathBuf::from(QEMU)),
    ];
    // `kindling run` always starts from a pre-booted kernel.
    let has_prebooted = has_image && request.scenario != Scenario::Run;
    let always = always.into_iter().filter(|(_, kind, _)| has_prebooted || *kind != Kind::Prebooted);
    let always = always.map(|(name, kind, path)| Vmm { name: name.to_owned(), kind, path, image: None });
    Ok(always.into_iter().chain(request.vmms.iter().cloned()).collect())
}

/// Kindling once per image, and the guest of the first image.
fn images(request: &Request) -> Result<(Guest, Vec<Vmm>)> {
    let ours = cargo::release_binary("kindling-cli", "kindling")?;
    let mut images = request.images.clone();
    if images.is_empty() {
        images.push(("run".to_owned(), build_image::of_profile(build_image::Profile::Run)?));
    }
    let guest = guest_of(images[0].1.clone());
    let vmm = |(name, image)| Vmm { name, kind: Kind::Kindling, path: ours.clone(), image: Some(image) };
    Ok((guest, images.into_iter().map(vmm).collect()))
}

/// The kernel, initramfs and image that guests boot.
fn guest(request: &Request) -> Result<Guest> {
    let guest = guest_of(match request.scenario {
        Scenario::Run => build_image::of_profile(build_image::Profile::Run)?,
        scenario => image(scenario == Scenario::Io)?,
    });
    Ok(match &request.kernel {
        Some(kernel) => Guest { kernel: kernel.clone(), image: None, ..guest },
        None => guest,
    })
}

fn guest_of(image: PathBuf) -> Guest {
    Guest { kernel: image.join("vmlinux"), initrd: image.join("initramfs.cpio"), image: Some(image) }
}

/// The default image with the payload in its root filesystem, and the payload that exercises devices if requested.
pub(crate) fn image(uses_devices: bool) -> Result<PathBuf> {
    let root = tempfile::tempdir()?;
    put(root.path(), payload::PATH, &payload::program())?;
    let mut name = "bench".to_owned();
    if uses_devices {
        put(root.path(), payload::IO_PATH, &fs::read(cargo::release_binary("io-payload", "io-payload")?)?)?;
        name += "-io";
    }
    build_image::build(&build_image::Arguments {
        name: Some(name),
        root: Some(root.path().into()),
        ..build_image::Arguments::default()
    })
}

/// The directory of monitors in the lab.
const VMMS: &str = "/vmms";

/// Adds an executable to a root filesystem.
fn put(root: &Path, path: &str, program: &[u8]) -> Result<()> {
    let file = root.join(path.trim_start_matches('/'));
    file.parent().map_or(Ok(()), fs::create_dir_all)?;
    fs::write(&file, program)?;
    Ok(fs::set_permissions(&file, Permissions::from_mode(0o755))?)
}

/// Measures in one lab per number of vCPUs: the lab has as many processors as the guest has vCPUs. With one processor,
/// the times of guest, monitor and host kernel add up, whichever thread they run on.
fn in_labs(request: &Request, plan: &Plan) -> Result<Outcome> {
    let mut whole = Outcome::default();
    for cases in request.cases() {
        let outcome = in_lab(cases, plan)?;
        whole.machine = outcome.machine;
        whole.samples.extend(outcome.samples);
        whole.failures.extend(outcome.failures);
        whole.omitted.extend(outcome.omitted);
    }
    whole.omitted.sort();
    whole.omitted.dedup();
    Ok(whole)
}

/// The guest with paths in the lab.
fn guest_inside(guest: &Guest, put: &mut dyn FnMut(&Path, &str) -> PathBuf) -> Guest {
    match &guest.image {
        Some(image) => {
            let image = put(image, "/guest/image");
            let file = |path: &Path| image.join(path.file_name().unwrap_or_default());
            Guest { kernel: file(&guest.kernel), initrd: file(&guest.initrd), image: Some(image.clone()) }
        }
        None => Guest {
            kernel: put(&guest.kernel, "/guest/kernel"),
            initrd: put(&guest.initrd, "/guest/initrd"),
            image: None,
        },
    }
}

fn in_lab(cases: Vec<Case>, plan: &Plan) -> Result<Outcome> {
    let guest = &plan.guest;
    let cpus = cases.iter().map(|case| case.vcpus).max().unwrap_or(1);
    let memory = cases.iter().map(|case| case.memory_mib).max().unwrap_or(0);
    let mut with: Vec<(PathBuf, String)> = Vec::new();
    let mut put = |path: &Path, target: &str| {
        with.push((path.to_owned(), target.to_owned()));
        PathBuf::from(target)
    };
    let inside = guest_inside(guest, &mut put);
    let images = plan.images.as_ref().map(|images| {
        let copy = |path: &Path, name: &str| put(path, &format!("{VMMS}/{name}"));
        images.map(copy)
    });
    if let Some(containers) = plan.images.as_ref().and_then(|images| images.containers.as_ref()) {
        // The C library and the loader of the host.
        with.extend(files::shared_libraries(&containers.crun())?);
    }
    let mut there = Vec::new();
    for (number, vmm) in plan.vmms.iter().enumerate() {
        let path = match vmm.kind {
            // QEMU looks up its firmware relative to its own path.
            Kind::Qemu => QEMU.to_owned(),
            // Its jailer requires the name.
            Kind::Firecracker => format!("{VMMS}/{number}-firecracker"),
            Kind::Kindling | Kind::Prebooted => format!("{VMMS}/{number}"),
        };
        with.push((vmm.path.clone(), path.clone()));
        with.extend(files::needed(vmm, Path::new(&path))?);
        let image = vmm.image.as_ref().map(|image| {
            let target = format!("{VMMS}/{number}-image");
            with.push((image.clone(), target.clone()));
            target.into()
        });
        there.push(Vmm { path: path.into(), image, ..vmm.clone() });
    }
    let (file, outcome) = (tempfile::NamedTempFile::new()?, tempfile::NamedTempFile::new()?);
    let content = Plan { vmms: there, guest: inside, images, cases, ..*plan };
    fs::write(file.path(), serde_json::to_vec(&content)?)?;
    with.push((file.path().into(), lab::inside("plan.json")));
    let status = lab::Job {
        exact: true,
        cpus,
        memory_mib: memory + LAB_OVERHEAD_MIB,
        // The lab's init is this program.
        command: ["/init", "measure", "plan.json", "outcome.json"].map(str::to_owned).to_vec(),
        environment: Vec::new(),
        with,
        get: vec![(lab::inside("outcome.json"), outcome.path().into())],
        disk: None,
        has_xsave: needs_xsave(&plan.vmms),
    }
    .run_with_output_timeout(OUTPUT_TIMEOUT)?;
    if status != 0 {
        bail!("measuring in the lab failed with status {status}");
    }
    serde_json::from_slice(&fs::read(outcome.path())?).context("cannot parse the outcome from the lab")
}

/// Whether a monitor requires XSAVE. All monitors are then measured on a processor that has it, so that their guests
/// have the same work to do.
fn needs_xsave(vmms: &[Vmm]) -> bool {
    vmms.iter().any(|vmm| vmm.kind == Kind::Firecracker)
}

/// Notes on individual values, for the table and the JSON.
fn notes(request: &Request, outcome: &Outcome, host: Host) -> Vec<String> {
    let foreign = request.vmms.iter().filter(|vmm| !vmm.kind.is_kindling()).map(|vmm| &*vmm.name);
    let mut names: Vec<&str> = [arguments::QEMU_MICROVM].into_iter().chain(foreign).collect();
    let has_init = |name: &str| {
        let mut samples = outcome.samples.iter();
        samples.any(|sample| sample.vmm == name && sample.metric == Metric::SpawnToInit)
    };
    names.retain(|name| has_init(name));
    let mut notes = Vec::new();
    if !names.is_empty() {
        let names = names.join(", ");
        notes.push(format!(
            "* for {names} it is the first byte, which is not compared with the first instruction"
        ));
    }
    if host == Host::Lab && needs_xsave(&request.vmms) {
        notes.push(
            "the lab's processor has XSAVE, which Firecracker needs; without --vmm it has not".to_owned(),
        );
    }
    notes.extend(outcome.omitted.iter().map(|what| format!("not measured: {what}")));
    notes
}
