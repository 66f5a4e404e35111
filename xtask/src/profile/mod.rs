//! `cargo xtask profile`: one boot, or one run of a program ([`run`]), as one timeline.
//!
//! Up to three boots are run, so that recording does not change the reported totals: one without recording, one with
//! marked kernel functions, and one with samples if requested (`docs/profiling.md`).

mod against;
pub(crate) mod boots;
mod devices;
mod kernel_image;
mod page;
mod phases;
mod record;
pub(crate) mod run;
mod stacks;
mod text;
mod timeline;
mod trace;

use crate::build_image::{self, build_with_kernel};
use crate::host::Host;
use crate::kernel::Kernel;
use crate::output::write;
use crate::{cargo, debian, lab};
use anyhow::{Context, Result, bail};
use boots::{Boot, Measured};
use clap::{Args, ValueEnum, value_parser};
use kernel_image::KernelImage;
use kindling_vmm::config::image::Image;
use kindling_vmm::layout::VCPUS_MAX;
use record::{Guest, Profile, Samples};
use std::fs;
use std::path::{Path, PathBuf};

/// What is profiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Scenario {
    /// A boot of the default image's kernel
    Boot,
    /// `kindling run` of a container image from a pre-booted kernel
    Run,
}

#[derive(Args, Debug)]
pub(crate) struct Arguments {
    /// What is profiled
    #[arg(long, value_enum, default_value_t = Scenario::Boot)]
    scenario: Scenario,
    /// Measure in the exact lab, which counts instructions
    #[arg(long)]
    exact: bool,
    /// Profile a run in a spare monitor; for --scenario run
    #[arg(long)]
    spare: bool,
    /// Also sample the guest's stacks at this interval in microseconds [default: 25]
    #[arg(long, value_name = "US", num_args = 0..=1, default_missing_value = "25",
          value_parser = value_parser!(u64).range(1..=1_000_000))]
    sample: Option<u64>,
    /// Compare with the profile.json of an earlier profile
    #[arg(long, value_name = "FILE")]
    against: Option<PathBuf>,
    /// Folder to write profile.html, trace.json and profile.json to [default: target/profile]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Memory of the guest in MiB
    #[arg(long, value_name = "MIB", default_value_t = 128, value_parser = value_parser!(u64).range(16..=1 << 20))]
    memory: u64,
    /// vCPUs of the guest
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = value_parser!(u8).range(1..=i64::from(VCPUS_MAX)))]
    vcpus: u8,
    /// Kernel command line, instead of the image's
    #[arg(long, value_name = "TEXT")]
    cmdline: Option<String>,
    /// Kernel configuration to add to the default image's: a file, or the name of an optional fragment; may be repeated
    #[arg(long, value_name = "FILE|NAME")]
    config_fragment: Vec<PathBuf>,
}

impl Arguments {
    /// Refuses the options that a profile of a run does not have.
    fn check_run(&self) -> Result<()> {
        let given = [
            ("--sample", self.sample.is_some()),
            ("--against", self.against.is_some()),
            ("--out", self.out.is_some()),
            ("--cmdline", self.cmdline.is_some()),
            ("--config-fragment", !self.config_fragment.is_empty()),
        ];
        match given.into_iter().find(|(_, is_given)| *is_given) {
            Some((option, _)) => bail!("{option} is an option of --scenario boot; remove it"),
            None => Ok(()),
        }
    }
}

/// Memory of the lab in MiB in addition to the guest's.
const LAB_OVERHEAD_MIB: u64 = 1024;

/// Measures, prints tables and writes files.
pub(crate) fn run(arguments: &Arguments) -> Result<u8> {
    if arguments.scenario == Scenario::Run {
        arguments.check_run()?;
        return run::run(arguments);
    }
    if arguments.spare {
        bail!("--spare is an option of --scenario run; add that, or remove --spare");
    }
    let out = arguments.out.clone().unwrap_or_else(|| cargo::target_directory().join("profile"));
    // Arguments are checked before anything that takes time.
    let earlier = arguments.against.as_deref().map(Profile::open).transpose()?;
    fs::create_dir_all(&out).with_context(|| format!("cannot create the folder {}", out.display()))?;
    let host = Host::choose(arguments.exact, true);
    let default = arguments.config_fragment.is_empty();
    let (image, kernel) = build_with_kernel(&build_image::Arguments {
        name: Some(if default { "default" } else { "profile" }.to_owned()),
        config_fragment: arguments.config_fragment.clone(),
        ..build_image::Arguments::default()
    })?;
    let kernel = read_kernel(&kernel)?;
    let functions = phases::functions(&kernel, &kernel.initcalls()?);
    let measured =
        Session { arguments, image: &image, functions: &phases::list(&functions) }.measure(host)?;
    let profile = profile(arguments, host, &Image::open(&image)?, &kernel, &measured, &functions)?;
    print!("{}", text::report(&profile));
    if let Some(earlier) = &earlier {
        print!("{}", against::report(earlier, &profile));
    }
    let page = page::html(&profile, earlier.as_ref())?;
    let files = [
        ("profile.html", page, "timeline and flame view, for a browser"),
        ("trace.json", trace::json(&profile)?, "for ui.perfetto.dev"),
        ("profile.json", profile.to_json()?, "for --against and for programs"),
    ];
    println!();
    for (name, content, what) in files {
        let path = out.join(name);
        write(&path, &content)?;
        println!("{}: {what}", build_image::relative(&path));
    }
    Ok(0)
}

/// The list of kernel functions for `kindling boot --profile-functions`.
pub(crate) fn function_list(kernel: &Kernel) -> Result<String> {
    let kernel = read_kernel(kernel)?;
    Ok(phases::list(&phases::functions(&kernel, &kernel.initcalls()?)))
}

fn read_kernel(kernel: &Kernel) -> Result<KernelImage> {
    let failed = |path: &Path| format!("cannot read {}", path.display());
    let file = fs::read(&kernel.vmlinux).with_context(|| failed(&kernel.vmlinux))?;
    let map = fs::read_to_string(&kernel.system_map).with_context(|| failed(&kernel.system_map))?;
    KernelImage::new(file, &map)
}

/// Builds a profile from the measurements.
fn profile(
    arguments: &Arguments,
    host: Host,
    image: &Image,
    kernel: &KernelImage,
    measured: &Measured,
    functions: &timeline::Functions,
) -> Result<Profile> {
    let perturbation = timeline::perturbation(measured)?;
    let cost = perturbation.cost_of_mark;
    let samples = |records: &boots::Records| -> Result<Samples> {
        let stacks = timeline::stacks(records, kernel, functions)?;
        let init = records.report.at(boots::INIT)?;
        let in_kernel = records.samples.iter().filter(|sample| sample.0 < init).count() as u64;
        Ok(Samples {
            interval_us: arguments.sample.unwrap_or_default(),
            // All samples represent the same time, so that the overhead of sampling cancels out.
            ns_per_sample: measured.plain.kernel_time()? / in_kernel.max(1),
            stacks,
        })
    };
    let (format, version) = Profile::format();
    Ok(Profile {
        format,
        version,
        host: record::Host { kind: host.kind().to_owned(), meaning: host.meaning().to_owned() },
        guest: Guest {
            kernel: image.kernel_version.clone(),
            kernel_config_sha256: image.kernel_config_sha256.clone(),
            command_line: arguments.cmdline.clone().unwrap_or_else(|| image.boot_args.clone()),
            memory_mib: arguments.memory,
            vcpus: arguments.vcpus,
        },
        totals: timeline::totals(measured)?,
        phases: timeline::phases(measured, functions, cost)?,
        exits: timeline::exits(measured, cost)?,
        without_mark: phases::without_symbol(kernel),
        perturbation,
        samples: measured.sampled.as_ref().map(samples).transpose()?,
    })
}

/// The arguments of the boots.
struct Session<'a> {
    arguments: &'a Arguments,
    image: &'a Path,
    functions: &'a str,
}

impl Session<'_> {
    /// Runs the boots on the host, and reads their records.
    fn measure(&self, host: Host) -> Result<Measured> {
        debian::ensure_lab_tools()?;
        let kindling = cargo::release_binary("kindling-cli", "kindling")?;
        let scratch = tempfile::tempdir()?;
        let list = scratch.path().join("functions");
        fs::write(&list, self.functions)?;
        let times: Vec<u64> = match host {
            Host::Hardware => boots::run_all(&self.plan(&kindling, self.image, scratch.path()))?,
            Host::Lab => {
                self.in_lab(kindling, scratch.path())?;
                boots::read(&scratch.path().join("times.json"))?
            }
        };
        let file = |name: &str| scratch.path().join(name);
        Ok(Measured {
            plain: boots::read(&file("plain.json"))?,
            // The first boot is a warm-up.
            plain_time: *times.get(1).context("the boots reported no times")?,
            marked: boots::read(&file("marked.json"))?,
            sampled: self.arguments.sample.map(|_| boots::read(&file("sampled.json"))).transpose()?,
        })
    }

    /// The boots to run: a warm-up boot, because the first run of a program on a host is slower, and one of each kind.
    fn plan(&self, kindling: &Path, image: &Path, scratch: &Path) -> Vec<Boot> {
        let file = |name: &str| scratch.join(name).display().to_string();
        let boot = |name: &str, more: &[&str]| {
            let mut command = vec![kindling.display().to_string(), "boot".into()];
            command.extend(["--image".into(), image.display().to_string()]);
            command.extend(["--memory".into(), self.arguments.memory.to_string()]);
            command.extend(["--vcpus".into(), self.arguments.vcpus.to_string()]);
            command.extend(["--console".into(), file("console")]);
            command.extend(["--started-at".into(), lab::NOW.into()]);
            if let Some(line) = &self.arguments.cmdline {
                command.extend(["--cmdline".into(), line.clone()]);
            }
            command.extend(more.iter().map(|&word| word.to_owned()));
            Boot { name: name.to_owned(), command }
        };
        let list = file("functions");
        let mut plan = vec![
            boot("first", &["--report-json", &file("plain.json")]),
            boot("plain", &["--report-json", &file("plain.json")]),
            boot("marked", &["--profile", &file("marked.json"), "--profile-functions", &list]),
        ];
        if let Some(interval) = self.arguments.sample {
            let interval = interval.to_string();
            let words =
                ["--profile", &file("sampled.json"), "--profile-functions", &list, "--sample", &interval];
            plan.push(boot("sampled", &words));
        }
        plan
    }

    /// Runs the boots in one lab, with the same file names in its working directory.
    fn in_lab(&self, kindling: PathBuf, scratch: &Path) -> Result<()> {
        let plan = scratch.join("plan.json");
        let boots = self.plan(
            Path::new("/bin/kindling"),
            Path::new("/images/default"),
            Path::new(lab::WORKING_DIRECTORY),
        );
        fs::write(&plan, serde_json::to_vec(&boots)?)?;
        let mut files = vec!["times.json", "plain.json", "marked.json"];
        files.extend(self.arguments.sample.map(|_| "sampled.json"));
        let status = lab::Job {
            exact: true,
            cpus: self.arguments.vcpus,
            memory_mib: self.arguments.memory + LAB_OVERHEAD_MIB,
            // The lab's init is this program.
            command: ["/init", "profile-boots", "plan.json", "times.json"].map(str::to_owned).to_vec(),
            environment: Vec::new(),
            with: vec![
                (kindling, "/bin/kindling".to_owned()),
                (self.image.into(), "/images/default".to_owned()),
                (plan, lab::inside("plan.json")),
                (scratch.join("functions"), lab::inside("functions")),
            ],
            get: files.iter().map(|name| (lab::inside(name), scratch.join(name))).collect(),
            disk: None,
            has_xsave: false,
        }
        .run()?;
        if status != 0 {
            bail!("the boots in the lab failed with status {status}");
        }
        Ok(())
    }
}
