//! Command-line arguments of `cargo xtask bench` and their validation.

use super::plan::{Case, Scenario};
use super::vmms::{Kind, Vmm};
use anyhow::{Result, bail};
use clap::Args;
use kindling_vmm::config::image::DESCRIPTION;
use kindling_vmm::layout::VCPUS_MAX;
use rustix::fs::{Access, access};
use std::path::{Path, PathBuf};

#[derive(Args, Debug)]
pub(crate) struct Arguments {
    /// Measure in the exact lab, which counts instructions
    #[arg(long)]
    exact: bool,
    /// Workload of the guests
    #[arg(long, value_enum, default_value_t = Scenario::Boot)]
    scenario: Scenario,
    /// Number of times each measurement is repeated
    #[arg(long, value_name = "N", default_value = "3")]
    runs: String,
    /// Memory of the guests in MiB; several sizes separated by commas
    #[arg(long, value_name = "LIST", default_value = "128")]
    memory: String,
    /// vCPUs of the guests; several numbers separated by commas
    #[arg(long, value_name = "LIST", default_value = "1")]
    vcpus: String,
    /// Additional monitor: a program that takes Firecracker's --no-api --config-file or, if NAME starts
    /// with "kindling", another build of Kindling; may be repeated
    #[arg(long, value_name = "NAME=PATH")]
    vmm: Vec<String>,
    /// Image to start programs from, instead of the image of `kindling run`; may be repeated
    #[arg(long, value_name = "NAME=DIR")]
    image: Vec<String>,
    /// Guest kernel, instead of the kernel of the default image
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Write all rows as JSON to a file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write all rows as an SVG bar chart to a file
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

/// Validated arguments.
#[derive(Debug)]
pub(super) struct Request {
    /// Whether to use the exact lab.
    pub(super) exact: bool,
    /// The workload of the guests.
    pub(super) scenario: Scenario,
    /// Repetitions of each measurement.
    pub(super) runs: u32,
    /// Memory sizes of the guests in MiB.
    pub(super) memory: Vec<u64>,
    /// Numbers of vCPUs.
    pub(super) vcpus: Vec<u8>,
    /// Monitors in addition to Kindling and QEMU.
    pub(super) vmms: Vec<Vmm>,
    /// Named images to compare.
    pub(super) images: Vec<(String, PathBuf)>,
    /// The kernel that replaces the image's.
    pub(super) kernel: Option<PathBuf>,
    /// The file to write JSON to.
    pub(super) json: Option<PathBuf>,
    /// The file to write the SVG chart to.
    pub(super) svg: Option<PathBuf>,
}

/// Names of the built-in rows.
pub(super) const KINDLING: &str = "kindling";
pub(super) const KINDLING_PREBOOT: &str = "kindling-preboot";
pub(super) const QEMU_MICROVM: &str = "qemu-microvm";

/// The minimum memory of a guest in MiB, as enforced by `kindling boot`.
const MEMORY_MIN_MIB: u64 = 16;
/// Upper limit of `--runs`.
const RUNS_MAX: u64 = 10_000;

impl Arguments {
    /// Validates the arguments before anything is built.
    ///
    /// # Errors
    /// Describes the first invalid argument.
    pub(super) fn check(&self) -> Result<Request> {
        let [runs] = list("--runs", &self.runs, 1, RUNS_MAX)?[..] else {
            bail!("--runs {}: expected a single number", self.runs);
        };
        let kernel = self.kernel.as_deref().map(|path| existing("--kernel", path)).transpose()?;
        for (option, path) in [("--json", &self.json), ("--svg", &self.svg)] {
            path.as_deref().map_or(Ok(()), |path| writable(option, path))?;
        }
        if self.json.is_some() && self.json == self.svg {
            bail!("--json and --svg name the same file");
        }
        let runs_programs =
            matches!(self.scenario, Scenario::Run | Scenario::Start | Scenario::Clone | Scenario::Jail);
        let name = self.scenario.name();
        if runs_programs && kernel.is_some() {
            bail!("--scenario {name}: programs run on the kernel of an image; remove --kernel");
        }
        let vmms = named_vmms(&self.vmm)?;
        let is_allowed = |vmm: &Vmm| self.scenario == Scenario::Jail && !vmm.kind.is_kindling();
        if let Some(vmm) = vmms.iter().find(|vmm| runs_programs && !is_allowed(vmm)) {
            bail!("--scenario {name}: programs run under this build; remove --vmm {}", vmm.name);
        }
        if !matches!(self.scenario, Scenario::Start | Scenario::Clone) && !self.image.is_empty() {
            bail!("--image requires --scenario start or clone");
        }
        let vcpus = list("--vcpus", &self.vcpus, 1, VCPUS_MAX.into())?;
        Ok(Request {
            exact: self.exact,
            scenario: self.scenario,
            runs: u32::try_from(runs)?,
            memory: list("--memory", &self.memory, MEMORY_MIN_MIB, host_memory_mib())?,
            vcpus: vcpus.into_iter().map(u8::try_from).collect::<Result<_, _>>()?,
            vmms,
            images: named_images(&self.image)?,
            kernel,
            json: self.json.clone(),
            svg: self.svg.clone(),
        })
    }
}

impl Request {
    /// A request that measures starts from the kernels of these images in the exact lab.
    pub(super) fn of_starts(images: Vec<(String, PathBuf)>, runs: u32) -> Self {
        Self {
            exact: true,
            scenario: Scenario::Start,
            runs,
            memory: vec![128],
            vcpus: vec![1],
            vmms: Vec::new(),
            images,
            kernel: None,
            json: None,
            svg: None,
        }
    }

    /// The sizes of guests, grouped by the number of vCPUs.
    pub(super) fn cases(&self) -> impl Iterator<Item = Vec<Case>> {
        self.vcpus
            .iter()
            .map(|&vcpus| self.memory.iter().map(|&memory_mib| Case { memory_mib, vcpus }).collect())
    }
}

/// Parses numbers separated by commas.
fn list(option: &str, text: &str, min: u64, max: u64) -> Result<Vec<u64>> {
    let mut numbers = Vec::new();
    for word in text.split(',') {
        let Ok(number) = word.trim().parse::<u64>() else {
            bail!(
                "{option} {text}: {word:?} is not a number; for example: {option} {min} or {option} {min},{max}"
            );
        };
        if !(min..=max).contains(&number) {
            bail!("{option} {text}: {number} is not between {min} and {max}");
        }
        if numbers.contains(&number) {
            bail!("{option} {text}: {number} is repeated");
        }
        numbers.push(number);
    }
    Ok(numbers)
}

/// Memory of this machine in MiB: the upper limit of a guest's.
fn host_memory_mib() -> u64 {
    let information = rustix::system::sysinfo();
    // The integer types differ between C libraries.
    #[expect(clippy::useless_conversion, reason = "the field's type depends on the C library")]
    let bytes = u64::from(information.totalram) * u64::from(information.mem_unit);
    bytes >> 20
}

/// Splits an option of the form NAME=PATH.
fn named<'a>(option: &str, value: &'a str) -> Result<(&'a str, &'a str)> {
    let named = value.split_once('=').filter(|(name, path)| !name.is_empty() && !path.is_empty());
    let Some((name, path)) = named else { bail!("{option} {value}: expected NAME=PATH") };
    if name.chars().any(char::is_control) {
        bail!("{option} {value:?}: the name contains a control character");
    }
    Ok((name, path))
}

fn named_images(options: &[String]) -> Result<Vec<(String, PathBuf)>> {
    let mut images: Vec<(String, PathBuf)> = Vec::new();
    for option in options {
        let (name, path) = named("--image", option)?;
        if images.iter().any(|(other, _)| other == name) {
            bail!("--image {option}: the name {name} is already in use; choose another name");
        }
        if !Path::new(path).join(DESCRIPTION).is_file() {
            bail!(
                "--image {option}: {path} contains no {DESCRIPTION}; build an image with `cargo xtask build-image`"
            );
        }
        images.push((name.to_owned(), std::path::absolute(path)?));
    }
    Ok(images)
}

fn named_vmms(options: &[String]) -> Result<Vec<Vmm>> {
    let mut vmms: Vec<Vmm> = Vec::new();
    for option in options {
        let (name, path) = named("--vmm", option)?;
        if [KINDLING, KINDLING_PREBOOT, QEMU_MICROVM].contains(&name)
            || vmms.iter().any(|vmm| vmm.name == name)
        {
            bail!("--vmm {option}: the name {name} is already in use; choose another name");
        }
        let path = existing("--vmm", Path::new(path))?;
        if access(&path, Access::EXEC_OK).is_err() {
            bail!("--vmm {option}: {} is not executable", path.display());
        }
        vmms.push(Vmm { name: name.to_owned(), kind: Kind::of(name), path, image: None });
    }
    Ok(vmms)
}

/// The absolute path of an existing file.
fn existing(option: &str, path: &Path) -> Result<PathBuf> {
    if !path.exists() {
        bail!("{option}: {} does not exist", path.display());
    }
    if !path.is_file() {
        bail!("{option}: {} is not a file", path.display());
    }
    Ok(std::path::absolute(path)?)
}

/// Checks that a file can be written before the measurement, which takes minutes.
fn writable(option: &str, path: &Path) -> Result<()> {
    if path.is_dir() || path.file_name().is_none() {
        bail!("{option}: {} is not a file name", path.display());
    }
    let folder = crate::output::folder_of(path);
    if !folder.is_dir() {
        bail!("{option}: the folder {} does not exist", folder.display());
    }
    if access(folder, Access::WRITE_OK).is_err() {
        bail!("{option}: the folder {} is not writable", folder.display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        arguments: Arguments,
    }

    fn check(words: &[&str]) -> Result<Request, String> {
        let line = Line::try_parse_from([&["bench"], words].concat()).map_err(|error| error.to_string())?;
        line.arguments.check().map_err(|error| format!("{error:#}"))
    }

    #[test]
    fn lists_of_memory_and_vcpus_are_combined_into_cases() {
        let request = check(&["--memory", "64, 128,16", "--vcpus", "2,1"]).unwrap();
        let cases: Vec<_> = request.cases().flatten().map(|case| (case.memory_mib, case.vcpus)).collect();
        assert_eq!(cases, [(64, 2), (128, 2), (16, 2), (64, 1), (128, 1), (16, 1)]);
        assert_eq!((request.runs, request.scenario), (3, Scenario::Boot));
    }

    #[test]
    fn each_invalid_argument_is_reported_on_one_line() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name).display().to_string();
        std::fs::write(path("plain"), "").unwrap();
        let (plain, absent, folder) = (path("plain"), path("absent"), path(""));
        let firecracker = |path: &str| format!("fc={path}");
        for (words, expected) in [
            (vec!["--runs", "0"], "--runs 0: 0 is not between 1 and 10000".to_owned()),
            (vec!["--runs", "1,2"], "--runs 1,2: expected a single number".to_owned()),
            (vec!["--runs", "x"], "--runs x: \"x\" is not a number".to_owned()),
            (vec!["--memory", "64,,128"], "--memory 64,,128: \"\" is not a number".to_owned()),
            (vec!["--memory", "15"], "--memory 15: 15 is not between 16 and ".to_owned()),
            (vec!["--memory", "99999999999"], "99999999999 is not between 16 and ".to_owned()),
            (vec!["--memory", "64,64"], "--memory 64,64: 64 is repeated".to_owned()),
            (vec!["--vcpus", "17"], "--vcpus 17: 17 is not between 1 and 16".to_owned()),
            (vec!["--vcpus", "1,-1"], "\"-1\" is not a number".to_owned()),
            (vec!["--vmm", "fc"], "--vmm fc: expected NAME=PATH".to_owned()),
            (vec!["--vmm", "=x"], "--vmm =x: expected NAME=PATH".to_owned()),
            (vec!["--vmm", "kindling=/bin/sh"], "the name kindling is already in use".to_owned()),
            (vec!["--vmm", &firecracker(&absent)], format!("--vmm: {absent} does not exist")),
            (vec!["--vmm", &firecracker(&plain)], format!("{plain} is not executable")),
            (vec!["--vmm", &firecracker(&folder)], format!("{folder} is not a file")),
            (vec!["--kernel", &absent], format!("--kernel: {absent} does not exist")),
            (vec!["--json", &folder], format!("--json: {folder} is not a file name")),
            (vec!["--svg", "/absent/x"], "--svg: the folder /absent does not exist".to_owned()),
            (vec!["--scenario", "run", "--kernel", &plain], "remove --kernel".to_owned()),
            (vec!["--scenario", "run", "--vmm", "a=/bin/sh"], "remove --vmm a".to_owned()),
            (vec!["--scenario", "jail", "--vmm", "kindling-a=/bin/sh"], "remove --vmm kindling-a".to_owned()),
            (vec!["--scenario", "jail", "--kernel", &plain], "remove --kernel".to_owned()),
            (vec!["--scenario", "start", "--vmm", "a=/bin/sh"], "--scenario start: ".to_owned()),
            (vec!["--image", "a=/"], "--image requires --scenario start".to_owned()),
            (vec!["--scenario", "start", "--image", "a"], "--image a: expected NAME=PATH".to_owned()),
            (
                vec!["--scenario", "start", "--image", "a=/"],
                "--image a=/: / contains no image.json".to_owned(),
            ),
            (vec!["--svg", "x", "--json", "x"], "--json and --svg name the same file".to_owned()),
        ] {
            let error = check(&words).unwrap_err();
            assert!(error.contains(&expected), "{words:?}: {error}");
            assert_eq!(error.lines().count(), 1, "{words:?}: {error}");
        }
    }

    #[test]
    fn the_name_of_a_monitor_selects_its_kind() {
        let request = check(&["--vmm", "firecracker=/bin/sh", "--vmm", "kindling-old=/bin/sh"]).unwrap();
        let kinds: Vec<_> = request.vmms.iter().map(|vmm| (&*vmm.name, vmm.kind)).collect();
        assert_eq!(kinds, [("firecracker", Kind::Firecracker), ("kindling-old", Kind::Kindling)]);
    }
}
