//! What a user asks of `cargo xtask bench`, and what is wrong with it.

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
    /// What the guests do
    #[arg(long, value_enum, default_value_t = Scenario::Boot)]
    scenario: Scenario,
    /// How often each measurement is made
    #[arg(long, value_name = "N", default_value = "3")]
    runs: String,
    /// Memory of the guests in MiB: one number, or several with commas between them
    #[arg(long, value_name = "LIST", default_value = "128")]
    memory: String,
    /// Virtual processors of the guests: one number, or several with commas between them
    #[arg(long, value_name = "LIST", default_value = "1")]
    vcpus: String,
    /// Another monitor: a program that takes Firecracker's --no-api --config-file or, with a NAME
    /// that begins with "kindling", another build of ours; may be repeated
    #[arg(long, value_name = "NAME=PATH")]
    vmm: Vec<String>,
    /// Image whose kernel programs start from, in place of the one for `kindling run`; may be repeated
    #[arg(long, value_name = "NAME=DIR")]
    image: Vec<String>,
    /// Guest kernel instead of the default image's
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Write all rows as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw all rows as bars
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

/// A request that can be met, as far as is known before anything runs.
#[derive(Debug)]
pub(super) struct Request {
    /// Whether the exact lab was asked for.
    pub(super) exact: bool,
    /// What the guests do.
    pub(super) scenario: Scenario,
    /// How often each measurement is made.
    pub(super) runs: u32,
    /// MiB of memory of the guests.
    pub(super) memory: Vec<u64>,
    /// Their virtual processors.
    pub(super) vcpus: Vec<u8>,
    /// Monitors beside ours and QEMU's.
    pub(super) vmms: Vec<Vmm>,
    /// Images of a scenario that compares some, by name.
    pub(super) images: Vec<(String, PathBuf)>,
    /// The kernel instead of the image's.
    pub(super) kernel: Option<PathBuf>,
    /// Where the JSON goes.
    pub(super) json: Option<PathBuf>,
    /// Where the picture goes.
    pub(super) svg: Option<PathBuf>,
}

/// Names of the rows that are always there.
pub(super) const OURS: &str = "kindling";
pub(super) const PREBOOTED: &str = "kindling-preboot";
pub(super) const QEMUS: &str = "qemu-microvm";

/// The least memory a guest can have in MiB, as `kindling boot` says.
const MEMORY_MIN_MIB: u64 = 16;
/// More runs than anybody waits for.
const RUNS_MAX: u64 = 10_000;

impl Arguments {
    /// Checks everything that can be checked before anything is built.
    ///
    /// # Errors
    /// Names the first thing that is wrong.
    pub(super) fn check(&self) -> Result<Request> {
        let [runs] = list("--runs", &self.runs, 1, RUNS_MAX)?[..] else {
            bail!("--runs {}: one number is needed", self.runs);
        };
        let kernel = self.kernel.as_deref().map(|path| existing("--kernel", path)).transpose()?;
        for (option, path) in [("--json", &self.json), ("--svg", &self.svg)] {
            path.as_deref().map_or(Ok(()), |path| writable(option, path))?;
        }
        if self.json.is_some() && self.json == self.svg {
            bail!("--json and --svg name the same file");
        }
        let runs_programs = matches!(self.scenario, Scenario::Run | Scenario::Start);
        if runs_programs && (kernel.is_some() || !self.vmm.is_empty()) {
            bail!(
                "--scenario {}: programs run on an image's kernel, under this build; leave out --kernel and --vmm",
                self.scenario.name()
            );
        }
        if self.scenario != Scenario::Start && !self.image.is_empty() {
            bail!("--image: only --scenario start compares images");
        }
        let vcpus = list("--vcpus", &self.vcpus, 1, VCPUS_MAX.into())?;
        Ok(Request {
            exact: self.exact,
            scenario: self.scenario,
            runs: u32::try_from(runs)?,
            memory: list("--memory", &self.memory, MEMORY_MIN_MIB, host_memory_mib())?,
            vcpus: vcpus.into_iter().map(u8::try_from).collect::<Result<_, _>>()?,
            vmms: named_vmms(&self.vmm)?,
            images: named_images(&self.image)?,
            kernel,
            json: self.json.clone(),
            svg: self.svg.clone(),
        })
    }
}

impl Request {
    /// Starts from the kernels of some images, in the exact lab.
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

    /// The sizes of guests, those with equally many vCPUs together.
    pub(super) fn cases(&self) -> impl Iterator<Item = Vec<Case>> {
        self.vcpus
            .iter()
            .map(|&vcpus| self.memory.iter().map(|&memory_mib| Case { memory_mib, vcpus }).collect())
    }
}

/// Numbers with commas between them.
fn list(option: &str, text: &str, min: u64, max: u64) -> Result<Vec<u64>> {
    let mut numbers = Vec::new();
    for word in text.split(',') {
        let Ok(number) = word.trim().parse::<u64>() else {
            bail!(
                "{option} {text}: {word:?} is not a number; write for example {option} {min} or {min},{max}"
            );
        };
        if !(min..=max).contains(&number) {
            bail!("{option} {text}: {number} is not between {min} and {max}");
        }
        if numbers.contains(&number) {
            bail!("{option} {text}: {number} is there twice");
        }
        numbers.push(number);
    }
    Ok(numbers)
}

/// MiB of memory of this machine: no guest can have more.
fn host_memory_mib() -> u64 {
    let information = rustix::system::sysinfo();
    // 32-bit kernels count in words of another size than 64-bit ones.
    #[expect(clippy::useless_conversion, reason = "the field's type depends on the C library")]
    let bytes = u64::from(information.totalram) * u64::from(information.mem_unit);
    bytes >> 20
}

/// What an option of the form NAME=PATH says.
fn named<'a>(option: &str, value: &'a str) -> Result<(&'a str, &'a str)> {
    let named = value.split_once('=').filter(|(name, path)| !name.is_empty() && !path.is_empty());
    let Some((name, path)) = named else { bail!("{option} {value}: not of the form NAME=PATH") };
    if name.chars().any(char::is_control) {
        bail!("{option} {value:?}: the name has a control character in it");
    }
    Ok((name, path))
}

fn named_images(options: &[String]) -> Result<Vec<(String, PathBuf)>> {
    let mut images: Vec<(String, PathBuf)> = Vec::new();
    for option in options {
        let (name, path) = named("--image", option)?;
        if images.iter().any(|(other, _)| other == name) {
            bail!("--image {option}: there is a row {name} already; choose another name");
        }
        if !Path::new(path).join(DESCRIPTION).is_file() {
            bail!(
                "--image {option}: there is no {DESCRIPTION} in {path}; `cargo xtask build-image` makes images"
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
        if [OURS, PREBOOTED, QEMUS].contains(&name) || vmms.iter().any(|vmm| vmm.name == name) {
            bail!("--vmm {option}: there is a row {name} already; choose another name");
        }
        let path = existing("--vmm", Path::new(path))?;
        if access(&path, Access::EXEC_OK).is_err() {
            bail!("--vmm {option}: {} is not executable", path.display());
        }
        vmms.push(Vmm { name: name.to_owned(), kind: Kind::of(name), path, image: None });
    }
    Ok(vmms)
}

/// A file that is there, as an absolute path.
fn existing(option: &str, path: &Path) -> Result<PathBuf> {
    if !path.exists() {
        bail!("{option}: there is no {}", path.display());
    }
    if !path.is_file() {
        bail!("{option}: {} is not a file", path.display());
    }
    Ok(std::path::absolute(path)?)
}

/// Measuring takes minutes: what cannot be written is said before.
fn writable(option: &str, path: &Path) -> Result<()> {
    if path.is_dir() || path.file_name().is_none() {
        bail!("{option}: {} is not the name of a file", path.display());
    }
    let folder = crate::output::folder_of(path);
    if !folder.is_dir() {
        bail!("{option}: there is no folder {}", folder.display());
    }
    if access(folder, Access::WRITE_OK).is_err() {
        bail!("{option}: files in {} cannot be written", folder.display());
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
    fn lists_become_sizes() {
        let request = check(&["--memory", "64, 128,16", "--vcpus", "2,1"]).unwrap();
        let cases: Vec<_> = request.cases().flatten().map(|case| (case.memory_mib, case.vcpus)).collect();
        assert_eq!(cases, [(64, 2), (128, 2), (16, 2), (64, 1), (128, 1), (16, 1)]);
        assert_eq!((request.runs, request.scenario), (3, Scenario::Boot));
    }

    #[test]
    fn what_is_wrong_is_named_on_one_line() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name).display().to_string();
        std::fs::write(path("plain"), "").unwrap();
        let (plain, absent, folder) = (path("plain"), path("absent"), path(""));
        let firecracker = |path: &str| format!("fc={path}");
        for (words, expected) in [
            (vec!["--runs", "0"], "--runs 0: 0 is not between 1 and 10000".to_owned()),
            (vec!["--runs", "1,2"], "--runs 1,2: one number is needed".to_owned()),
            (vec!["--runs", "x"], "--runs x: \"x\" is not a number".to_owned()),
            (vec!["--memory", "64,,128"], "--memory 64,,128: \"\" is not a number".to_owned()),
            (vec!["--memory", "15"], "--memory 15: 15 is not between 16 and ".to_owned()),
            (vec!["--memory", "99999999999"], "99999999999 is not between 16 and ".to_owned()),
            (vec!["--memory", "64,64"], "--memory 64,64: 64 is there twice".to_owned()),
            (vec!["--vcpus", "17"], "--vcpus 17: 17 is not between 1 and 16".to_owned()),
            (vec!["--vcpus", "1,-1"], "\"-1\" is not a number".to_owned()),
            (vec!["--vmm", "fc"], "--vmm fc: not of the form NAME=PATH".to_owned()),
            (vec!["--vmm", "=x"], "--vmm =x: not of the form NAME=PATH".to_owned()),
            (vec!["--vmm", "kindling=/bin/sh"], "there is a row kindling already".to_owned()),
            (vec!["--vmm", &firecracker(&absent)], format!("--vmm: there is no {absent}")),
            (vec!["--vmm", &firecracker(&plain)], format!("{plain} is not executable")),
            (vec!["--vmm", &firecracker(&folder)], format!("{folder} is not a file")),
            (vec!["--kernel", &absent], format!("--kernel: there is no {absent}")),
            (vec!["--json", &folder], format!("--json: {folder} is not the name of a file")),
            (vec!["--svg", "/absent/x"], "--svg: there is no folder /absent".to_owned()),
            (vec!["--scenario", "run", "--kernel", &plain], "leave out --kernel".to_owned()),
            (vec!["--scenario", "run", "--vmm", "a=/bin/sh"], "leave out --kernel".to_owned()),
            (vec!["--scenario", "start", "--vmm", "a=/bin/sh"], "--scenario start: ".to_owned()),
            (vec!["--image", "a=/"], "only --scenario start compares images".to_owned()),
            (vec!["--scenario", "start", "--image", "a"], "--image a: not of the form NAME=PATH".to_owned()),
            (
                vec!["--scenario", "start", "--image", "a=/"],
                "--image a=/: there is no image.json in /".to_owned(),
            ),
            (vec!["--svg", "x", "--json", "x"], "--json and --svg name the same file".to_owned()),
        ] {
            let error = check(&words).unwrap_err();
            assert!(error.contains(&expected), "{words:?}: {error}");
            assert_eq!(error.lines().count(), 1, "{words:?}: {error}");
        }
    }

    #[test]
    fn monitors_are_taken_by_name() {
        let request = check(&["--vmm", "firecracker=/bin/sh", "--vmm", "kindling-old=/bin/sh"]).unwrap();
        let kinds: Vec<_> = request.vmms.iter().map(|vmm| (&*vmm.name, vmm.kind)).collect();
        assert_eq!(kinds, [("firecracker", Kind::Firecracker), ("kindling-old", Kind::Kindling)]);
    }
}
