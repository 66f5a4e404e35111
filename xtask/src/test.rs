//! `cargo xtask test`: unit tests, then the tests that boot guests.
//!
//! The files of `tests/tests` are separate, statically linked programs. Those named `on_host_*` need no KVM and run on
//! this machine. Those named `exact_*` run in the exact lab. All others run on this machine's KVM or in the lab. A lab
//! has one processor, or several for programs named `smp_*`.

use crate::build_image::{self, Arguments as Image, Profile};
use crate::host::{Host, workspace};
use crate::test_images::Images;
use crate::test_lab::Queue;
use crate::test_report::{Report, Transcript};
use crate::{
    cache, cargo, debian, lab, profile, test_images, test_lab, test_network, test_oci, test_root,
    test_volumes,
};
use anyhow::{Context, Result, bail};
use clap::Args;
use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;
use xshell::{Shell, cmd};

#[derive(Args, Debug)]
pub(crate) struct Arguments {
    /// Run only test programs and tests whose names contain this
    filter: Option<String>,
    /// Run only the slow tests, which are skipped by default
    #[arg(long)]
    ignored: bool,
}

/// Processors of the lab for tests with several vCPUs: as many as the largest guest has.
const SMP_LAB_CPUS: u8 = 4;

/// Prefixes of test programs that do not run with KVM on one processor.
const ON_HOST: &str = "on_host_";
const EXACT: &str = "exact_";
const SMP: &str = "smp_";

/// The program of another monitor, and the test program that requires it.
pub(crate) const FIRECRACKER: &str = "firecracker";

/// Runs the tests. The exit status is 1 if one failed.
pub(crate) fn run(arguments: &Arguments) -> Result<u8> {
    let started = Instant::now();
    let filter = arguments.filter.as_deref().unwrap_or("");
    let host = Host::choose(false, true);
    let (_lock, testbed) = testbed()?;
    let images = test_images::build()?;
    let location = tempfile::Builder::new().prefix("test-programs-").tempdir_in(cargo::target_directory())?;
    let mut programs = programs(arguments.ignored, location.path())?;
    // Programs without matching tests are skipped, because a lab takes longer to boot than most tests.
    programs.retain(|program| program.has_tests(filter));
    if programs.is_empty() {
        bail!("no test or test program matches {filter:?}");
    }
    if !testbed.join(FIRECRACKER).exists() {
        println!("\n{FIRECRACKER} not found in PATH: skipping the test that boots the image with it");
        programs.retain(|program| program.name != FIRECRACKER);
    }
    let chosen = |prefix: &str| -> Vec<&Program> {
        programs.iter().filter(|program| program.prefix() == prefix).collect()
    };
    let here =
        |location, programs| Step::Host { location, programs, testbed: &testbed, images: &images, filter };
    let queue = |cpus, prefix, images| Queue::new(cpus, chosen(prefix), &testbed, images, filter);
    let crates = (filter.is_empty() && !arguments.ignored).then_some(Step::UnitTests);
    let on_host = here("on this host", chosen(ON_HOST));
    let booting = queue(1, "", Some(&*images.disk));
    let (smp, exact) = (queue(SMP_LAB_CPUS, SMP, None), queue(1, EXACT, None));
    // Its lab has another CPU model.
    let firecracker = queue(1, FIRECRACKER, None);
    let first = crates.into_iter().chain([on_host]);
    let lanes: Vec<Vec<Step<'_>>> = match host {
        Host::Hardware => {
            let kvm = "on this host's KVM";
            let programs = ["", FIRECRACKER, SMP].into_iter().flat_map(chosen).collect();
            let last = [here(kvm, programs), Step::Lab(&exact)];
            vec![first.chain(last).collect()]
        }
        Host::Lab if two_labs_fit() => {
            let second = [&smp, &firecracker, &exact, &booting].map(Step::Lab);
            vec![vec![Step::Lab(&booting)], first.chain(second).collect()]
        }
        Host::Lab => vec![first.chain([&booting, &smp, &firecracker, &exact].map(Step::Lab)).collect()],
    };
    let report = Report::new(started, lanes.len() == 1 || programs.len() == 1);
    let run = |lane: Vec<Step<'_>>| {
        let result = lane.iter().try_for_each(|step| step.run(&report));
        // Printed immediately, because the other lane may run for minutes.
        result.inspect_err(|error| eprintln!("\n{error:#}"))
    };
    let results: Vec<Result<()>> = std::thread::scope(|scope| {
        let threads: Vec<_> = lanes.into_iter().map(|lane| scope.spawn(|| run(lane))).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|_| bail!("a thread panicked")))
            .collect()
    });
    let passed = report.finish();
    results.into_iter().collect::<Result<()>>()?;
    Ok(u8::from(!passed))
}

/// Lays out the testbed; returns it with a lock that keeps other runs from changing it.
pub(crate) fn testbed() -> Result<(cache::Lock, PathBuf)> {
    debian::ensure_erofs_tools()?;
    debian::ensure_lab_tools()?;
    let key = cache::key(&[&cargo::target_directory().to_string_lossy()]);
    let lock = cache::lock(&format!("testbed-{key}"))?;
    Ok((lock, lay_out_testbed()?))
}

/// Whether two labs can run in parallel: each uses one processor and its memory of the host.
fn two_labs_fit() -> bool {
    const BOTH_KIB: u64 = 2 * test_lab::MEMORY_MIB * 1024;
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let available = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:")?.strip_suffix("kB"));
    let available = available.and_then(|kib| kib.trim().parse().ok()).unwrap_or(0);
    processors >= 2 && available >= BOTH_KIB
}

/// A step of a test run. Steps of a lane are sequential; lanes run in parallel.
enum Step<'a> {
    /// The unit tests of the crates.
    UnitTests,
    /// Test programs on this machine.
    Host {
        location: &'static str,
        programs: Vec<&'a Program>,
        testbed: &'a Path,
        images: &'a Images,
        filter: &'a str,
    },
    /// Test programs in a lab.
    Lab(&'a Queue<'a>),
}

impl Step<'_> {
    fn run(&self, report: &Report) -> Result<()> {
        match self {
            Self::UnitTests => unit_tests(report),
            Self::Host { location, programs, testbed, images, filter } => {
                for program in programs {
                    let mut command = Command::new(&program.path);
                    command.args(program.arguments(filter));
                    command.env("KINDLING_TESTBED", testbed).env(test_images::VARIABLE, &images.folder);
                    run_on_host(command, report.transcript(&program.name, location))?;
                }
                Ok(())
            }
            Self::Lab(queue) => queue.work(report),
        }
    }
}

/// Runs the unit tests of the crates. guest-init is always built separately.
fn unit_tests(report: &Report) -> Result<()> {
    // The package `tests` boots guests.
    let others = ["--workspace", "--exclude", "guest-init", "--exclude", "tests"];
    for (name, package) in [("crates", &others[..]), ("crate of init", &["--package", "guest-init"])] {
        let mut command = Command::new("cargo");
        command.args(["test", "--quiet", "--no-fail-fast"]).args(package).current_dir(workspace());
        run_on_host(command, report.transcript(name, "unit tests, on this host"))?;
    }
    Ok(())
}

/// Runs a command and records its standard output and standard error in a transcript.
fn run_on_host(mut command: Command, mut transcript: Transcript<'_>) -> Result<()> {
    let (mut output, write) = std::io::pipe()?;
    command.stdin(Stdio::null()).stdout(write.try_clone()?).stderr(write);
    let mut child = command.spawn().with_context(|| format!("cannot start {:?}", command.get_program()))?;
    // The command holds the write end of the pipe, which must be closed for the output to end.
    drop(command);
    let mut buffer = [0; 8192];
    while let length @ 1.. = output.read(&mut buffer)? {
        transcript.add(&buffer[..length]);
    }
    transcript.end(child.wait()?.success());
    Ok(())
}

/// A test program.
#[derive(Debug)]
pub(crate) struct Program {
    pub(crate) name: String,
    pub(crate) path: PathBuf,
    /// Whether to run the slow tests instead of the others.
    pub(crate) is_slow: bool,
}

impl Program {
    /// The prefix of the name, which determines where the program runs.
    fn prefix(&self) -> &'static str {
        [ON_HOST, EXACT, SMP, FIRECRACKER]
            .into_iter()
            .find(|prefix| self.name.starts_with(prefix))
            .unwrap_or_default()
    }

    /// Whether any test matches the filter.
    fn has_tests(&self, filter: &str) -> bool {
        let output = Command::new(&self.path).arg("--list").args(self.arguments(filter)).output();
        // A program that cannot list its tests fails when it is run.
        output.map_or(true, |output| String::from_utf8_lossy(&output.stdout).contains(": test\n"))
    }

    /// The arguments of the program. A filter that matches the program's name selects all of its tests.
    pub(crate) fn arguments(&self, filter: &str) -> Vec<String> {
        let mut arguments = vec!["--test-threads=1".to_owned()];
        if self.is_slow {
            arguments.push("--ignored".to_owned());
        }
        if !self.name.contains(filter) {
            arguments.push(filter.to_owned());
        }
        arguments
    }
}

/// Builds the test programs and links them into `location`, where a parallel build does not replace them.
pub(crate) fn programs(is_slow: bool, location: &Path) -> Result<Vec<Program>> {
    let shell = cargo::shell()?;
    let output = cmd!(shell, "cargo test --quiet --package tests --tests --no-run --message-format=json")
        .quiet()
        .read()
        .context("cannot build the tests")?;
    let mut programs = Vec::new();
    for line in output.lines() {
        let message: serde_json::Value = serde_json::from_str(line)?;
        let is_test = message["target"]["kind"][0] == "test";
        if let (true, Some(path), Some(name)) =
            (is_test, message["executable"].as_str(), message["target"]["name"].as_str())
        {
            let kept = location.join(name);
            fs::hard_link(path, &kept).with_context(|| format!("cannot link {path}"))?;
            programs.push(Program { name: name.to_owned(), path: kept, is_slow });
        }
    }
    if programs.is_empty() {
        bail!("cargo built no test programs");
    }
    programs.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(programs)
}

/// Builds the examples of the library `kindling`, which tests run.
fn examples(location: &Path) -> Result<()> {
    let shell = cargo::shell()?;
    let output = cmd!(shell, "cargo build --quiet --package kindling --examples --message-format=json")
        .quiet()
        .read()
        .context("cannot build the examples")?;
    fs::create_dir_all(location)?;
    for line in output.lines() {
        let message: serde_json::Value = serde_json::from_str(line)?;
        let is_example = message["target"]["kind"][0] == "example";
        if let (true, Some(path), Some(name)) =
            (is_example, message["executable"].as_str(), message["target"]["name"].as_str())
        {
            fs::copy(path, location.join(name))?;
        }
    }
    Ok(())
}

/// Lays out the files that tests use: programs, images, the function list of their kernel, and Debian's kernel as
/// bzImage and vmlinux.
fn lay_out_testbed() -> Result<PathBuf> {
    let testbed = cargo::target_directory().join("testbed");
    let images = testbed.join("images");
    fs::create_dir_all(&images)?;
    fs::create_dir_all(testbed.join("debian"))?;
    fs::copy(cargo::release_binary("kindling-cli", "kindling")?, testbed.join("kindling"))?;
    fs::copy(cargo::release_binary("kindling-vmm", "kindling-vmm")?, testbed.join("kindling-vmm"))?;
    fs::copy(cargo::release_binary("kindling-fs", "kindling-fs")?, testbed.join("kindling-fs"))?;
    fs::copy(cargo::release_binary("kindling-jailer", "kindling-jailer")?, testbed.join("kindling-jailer"))?;
    examples(&testbed.join("examples"))?;
    fs::copy(cargo::release_binary("tests", "folder-guest")?, testbed.join("folder-guest"))?;
    fs::copy(cargo::release_binary("guest-init", "guest-init")?, testbed.join("init"))?;
    let image = Image { out: Some(images.join("default")), ..Image::default() };
    let (_, kernel) = build_image::build_with_kernel(&image)?;
    fs::write(testbed.join("functions"), profile::function_list(&kernel)?)?;
    erofs(&testbed.join("pmem.erofs"))?;
    let root = tempfile::tempdir()?;
    busybox_root(root.path())?;
    build_image::build(&Image {
        name: Some("busybox".to_owned()),
        root: Some(root.path().into()),
        out: Some(images.join("busybox")),
        ..Image::default()
    })?;
    build_image::build(&Image { profile: Profile::Run, out: Some(images.join("run")), ..Image::default() })?;
    build_image::build(&Image {
        profile: Profile::Run,
        name: Some("pmem".to_owned()),
        root: Some(root.path().into()),
        out: Some(images.join("pmem")),
        ..Image::default()
    })?;
    let (shell, busybox, root_folder) = (Shell::new()?, testbed.join("busybox.erofs"), root.path());
    cmd!(shell, "mkfs.erofs -T0 --all-root -E noinline_data {busybox} {root_folder}")
        .quiet()
        .ignore_stdout()
        .run()?;
    filesystem(&testbed)?;
    test_volumes::build(&testbed, root.path())?;
    test_root::build(&images)?;
    test_oci::programs(&testbed)?;
    fs::copy(cargo::release_binary("tests", "vsock-guest")?, root.path().join("bin/vsock-guest"))?;
    build_image::build(&Image {
        name: Some("vsock".to_owned()),
        root: Some(root.path().into()),
        out: Some(images.join("vsock")),
        ..Image::default()
    })?;
    let path = std::env::var_os("PATH").unwrap_or_default();
    match std::env::split_paths(&path).map(|folder| folder.join(FIRECRACKER)).find(|file| file.is_file()) {
        Some(file) => drop(fs::copy(file, testbed.join(FIRECRACKER))?),
        None => drop(fs::remove_file(testbed.join(FIRECRACKER))),
    }
    test_network::build(&testbed, root.path())?;
    let bzimage = fs::read(lab::kernel()?)?;
    fs::write(testbed.join("debian/vmlinuz"), &bzimage)?;
    unpack_kernel(&bzimage, &testbed.join("debian/vmlinux"))?;
    Ok(testbed)
}

/// Creates an empty ext4 filesystem for a guest's disk, and adds a static e2fsck.
fn filesystem(testbed: &Path) -> Result<()> {
    const MIB: u64 = 1 << 20;
    let image = testbed.join("ext4");
    fs::File::create(&image)?.set_len(32 * MIB)?;
    let shell = Shell::new()?;
    // The lab stores files in memory: unused blocks stay holes.
    cmd!(shell, "/usr/sbin/mke2fs -q -t ext4 -E nodiscard -F {image}").quiet().run()?;
    fs::copy(debian::unpacked("e2fsck-static")?.join("sbin/e2fsck.static"), testbed.join("e2fsck"))?;
    Ok(())
}

/// Creates an EROFS image whose files a guest can map: uncompressed and page-aligned.
fn erofs(target: &Path) -> Result<()> {
    debian::ensure_erofs_tools()?;
    let root = tempfile::tempdir()?;
    let root = root.path();
    fs::write(root.join("word"), "a word\n")?;
    let large: Vec<u8> = (0_u32..4 << 20).flat_map(u32::to_le_bytes).collect();
    fs::write(root.join("large"), large)?;
    let shell = Shell::new()?;
    cmd!(shell, "mkfs.erofs -T0 -E noinline_data {target} {root}").quiet().ignore_stdout().run()?;
    Ok(())
}

/// Creates a root filesystem with Debian's busybox and links for its applets.
fn busybox_root(root: &Path) -> Result<()> {
    for name in ["bin", "etc", "usr"] {
        fs::create_dir(root.join(name))?;
    }
    let busybox = root.join("bin/busybox");
    fs::copy(lab::busybox()?, &busybox)?;
    let shell = Shell::new()?;
    // A dangling link, as in images with systemd.
    std::os::unix::fs::symlink("../run/systemd/resolve/stub-resolv.conf", root.join("etc/resolv.conf"))?;
    for name in cmd!(shell, "{busybox} --list").quiet().read()?.lines().filter(|name| *name != "busybox") {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(name))?;
    }
    fs::write(root.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\n")?;
    fs::write(root.join("etc/data"), "no program\n")?;
    fs::set_permissions(root.join("etc/data"), fs::Permissions::from_mode(0o644))?;
    Ok(())
}

/// Extracts the vmlinux of a bzImage. Its header has the position of the compressed kernel
/// (`payload_offset` at 0x248, counted from the end of the setup sectors at 0x1f1, and
/// `payload_length`), whose last four bytes are the uncompressed length
/// (Documentation/arch/x86/boot.rst).
fn unpack_kernel(bzimage: &[u8], target: &Path) -> Result<()> {
    let word = |at: usize| -> Result<usize> {
        let bytes = bzimage.get(at..at + 4).context("the bzImage is truncated")?;
        Ok(usize::try_from(u32::from_le_bytes(bytes.try_into()?))?)
    };
    let setup = (usize::from(*bzimage.get(0x1f1).context("the bzImage is truncated")?) + 1) * 512;
    let start = setup + word(0x248)?;
    let payload = bzimage.get(start..start + word(0x24c)? - 4).context("the bzImage is truncated")?;
    let tool = match payload {
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "zstd",
        [0xfd, b'7', b'z', ..] => "xz",
        [0x1f, 0x8b, ..] => "gzip",
        _ => bail!("the bzImage has an unknown compression format"),
    };
    let packed = tempfile::NamedTempFile::new()?;
    fs::write(packed.path(), payload)?;
    let input = fs::File::open(packed.path())?;
    let status =
        Command::new(tool).args(["-d", "-c"]).stdin(input).stdout(fs::File::create(target)?).status()?;
    anyhow::ensure!(status.success(), "{tool} could not unpack the kernel");
    Ok(())
}
