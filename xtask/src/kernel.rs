//! The guest kernel: source, configuration and build.
//!
//! Built kernels are cached under the digest of source, configuration and compiler. Kernels of one source share a build
//! directory, so that a changed fragment recompiles only affected objects.

use crate::cache::{self, Draft};
use crate::debian;
use crate::progress::Progress;
use crate::vmlinux;
use anyhow::{Context, Result, bail};
use guest_kernel_config::{Composed, Kconfig, KernelConfig, KernelTree, check};
use kindling_vmm::config::image::{sha256, sha256_of};
use kindling_vmm::layout::VCPUS_MAX;
use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use xshell::{Shell, cmd};

/// The Debian package with the default source.
const DEBIAN_SOURCE: &str = "linux-source-6.12";
/// Version of the build recipe; increment when this module builds kernels differently from the same inputs.
const RECIPE: &str = "2";
/// Number of objects of a kernel with the default fragments, for the progress of the first build.
const USUAL_OBJECTS: u64 = 1150;

/// An unpacked kernel source.
#[derive(Debug)]
pub(crate) struct Source {
    /// The folder with the top-level Makefile.
    pub(crate) directory: PathBuf,
    /// A digest that identifies the source.
    identity: String,
    /// A description of the origin.
    pub(crate) origin: String,
}

/// A built kernel.
#[derive(Debug)]
pub(crate) struct Kernel {
    /// The uncompressed ELF file.
    pub(crate) vmlinux: PathBuf,
    /// The symbols, which are stripped from the ELF file.
    pub(crate) system_map: PathBuf,
    /// `make kernelrelease`.
    pub(crate) version: String,
    /// The maximum number of vCPUs: CONFIG_NR_CPUS.
    pub(crate) vcpus_max: u8,
    /// SHA-256 of the composed configuration.
    pub(crate) config_sha256: String,
    /// Versions of compiler and linker.
    pub(crate) tools: BTreeMap<String, String>,
}

/// Locates or downloads the source: a folder, a tarball, or Debian's package.
pub(crate) fn source(path: Option<&Path>) -> Result<Source> {
    match path {
        None => debian_source(),
        Some(path) if path.is_dir() => directory_source(path),
        Some(path) => tarball_source(path),
    }
}

fn debian_source() -> Result<Source> {
    let package = debian::unpacked(DEBIAN_SOURCE)?;
    let version = debian::version(&package)?;
    let tarball = package.join("usr/src").join(format!("{DEBIAN_SOURCE}.tar.xz"));
    let origin = format!("Debian package {version}");
    unpack(&tarball, cache::key(&["debian", &version]), origin)
}

fn tarball_source(path: &Path) -> Result<Source> {
    let digest =
        sha256_of(path).with_context(|| format!("cannot read the kernel source {}", path.display()))?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    unpack(path, cache::key(&["tarball", &digest]), format!("{name}, SHA-256 {digest}"))
}

/// Unpacks a tarball into the cache unless it is there.
fn unpack(tarball: &Path, identity: String, origin: String) -> Result<Source> {
    let directory = cache::subdirectory("kernel-source")?.join(&identity);
    if !directory.exists() {
        debian::ensure_kernel_build_tools()?;
        let _lock = cache::lock(&format!("kernel-source-{identity}"))?;
        if !directory.exists() {
            eprintln!("unpacking {} ...", tarball.display());
            let draft = Draft::beside(&directory)?;
            let (shell, target) = (Shell::new()?, draft.path());
            // No build uses files in these folders.
            let left_out = ["Documentation", "tools/testing", "drivers/gpu/drm/amd/include"];
            let exclude = left_out.map(|folder| format!("--exclude=*/{folder}/*.[!K]*"));
            cmd!(
                shell,
                "tar --extract --strip-components=1 --file {tarball} --directory {target} {exclude...}"
            )
            .quiet()
            .run()
            .with_context(|| format!("cannot unpack {}", tarball.display()))?;
            require_kernel(target)?;
            draft.publish(&directory)?;
        }
    }
    Ok(Source { directory, identity, origin })
}

/// The source in a folder, identified by the names, sizes and modification times of its files: hashing their content
/// would take longer than an up-to-date build may.
fn directory_source(path: &Path) -> Result<Source> {
    let directory = path.canonicalize()?;
    require_kernel(&directory)?;
    let mut stamps = Vec::new();
    stamp(&directory, &mut stamps)?;
    stamps.sort_unstable();
    let name = directory.to_string_lossy();
    let identity = cache::key(&["directory", &name, &sha256(stamps.join("\n").as_bytes())]);
    Ok(Source { identity, origin: format!("folder {}", path.display()), directory })
}

fn stamp(directory: &Path, stamps: &mut Vec<String>) -> Result<()> {
    use std::os::unix::fs::MetadataExt;
    for entry in fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            if entry.file_name() != ".git" {
                stamp(&entry.path(), stamps)?;
            }
            continue;
        }
        let metadata = entry.metadata()?;
        let (seconds, nanoseconds) = (metadata.mtime(), metadata.mtime_nsec());
        stamps.push(format!("{} {} {seconds}.{nanoseconds}", entry.path().display(), metadata.len()));
    }
    Ok(())
}

fn require_kernel(directory: &Path) -> Result<()> {
    if !directory.join("Kbuild").exists() || !directory.join("arch/x86/Kconfig").exists() {
        bail!("{} is not a Linux kernel source: Kbuild or arch/x86/Kconfig is missing", directory.display());
    }
    Ok(())
}

/// The kernel with this configuration, from the cache or built.
pub(crate) fn build(source: &Source, asked: &Composed) -> Result<Kernel> {
    debian::ensure_kernel_build_tools()?;
    let tools = tools()?;
    let versions: String = tools.iter().map(|(name, version)| format!("{name} {version}\n")).collect();
    let key = cache::key(&[RECIPE, &source.identity, &asked.text(), &versions]);
    let target = cache::subdirectory("kernels")?.join(&key);
    if !target.exists() {
        let _lock = cache::lock(&format!("kernel-build-{}", source.identity))?;
        if !target.exists() {
            build_into(source, asked, &target)?;
        }
    }
    let read = |name: &str| -> Result<String> {
        fs::read_to_string(target.join(name)).with_context(|| format!("{} is incomplete", target.display()))
    };
    Ok(Kernel {
        version: read("version")?,
        vcpus_max: vcpus_max(&read("config")?),
        config_sha256: sha256(read("config")?.as_bytes()),
        vmlinux: target.join("vmlinux"),
        system_map: target.join("System.map"),
        tools,
    })
}

/// `CONFIG_NR_CPUS`, capped at the maximum of a machine.
fn vcpus_max(config: &str) -> u8 {
    let number = config.lines().find_map(|line| line.strip_prefix("CONFIG_NR_CPUS="));
    number.and_then(|number| number.parse().ok()).unwrap_or(VCPUS_MAX).min(VCPUS_MAX)
}

fn tools() -> Result<BTreeMap<String, String>> {
    let shell = Shell::new()?;
    let first_line = |text: String| text.lines().next().unwrap_or_default().to_owned();
    let gcc = first_line(cmd!(shell, "gcc --version").quiet().read()?);
    let ld = first_line(cmd!(shell, "ld --version").quiet().read()?);
    Ok(BTreeMap::from([("gcc".to_owned(), gcc), ("ld".to_owned(), ld)]))
}

fn build_into(source: &Source, asked: &Composed, target: &Path) -> Result<()> {
    let work = cache::subdirectory("kernel-build")?.join(&source.identity);
    fs::create_dir_all(&work)?;
    configure_in(source, asked, &work)?;
    compile(source, &work)?;
    let draft = Draft::beside(target)?;
    // Symbols are kept in System.map only.
    vmlinux::pack(&work.join("vmlinux"), &draft.path().join("vmlinux"))?;
    fs::copy(work.join("System.map"), draft.path().join("System.map"))?;
    fs::copy(work.join(".config"), draft.path().join("config"))?;
    let version = make(source, &work).args(["--silent", "kernelrelease"]).output()?;
    fs::write(draft.path().join("version"), String::from_utf8_lossy(&version.stdout).trim())?;
    draft.publish(target)
}

/// Configures a kernel with these fragments, and checks that their settings took effect.
pub(crate) fn configure(source: &Source, asked: &Composed) -> Result<KernelConfig> {
    debian::ensure_kernel_build_tools()?;
    let target = tempfile::tempdir()?;
    configure_in(source, asked, target.path())
}

fn configure_in(source: &Source, asked: &Composed, work: &Path) -> Result<KernelConfig> {
    let config = work.join(".config");
    run_quietly(make(source, work).arg("tinyconfig"), "make tinyconfig")?;
    let base = fs::read_to_string(&config)?;
    fs::write(&config, format!("{base}\n{}", asked.text()))?;
    run_quietly(make(source, work).arg("olddefconfig"), "make olddefconfig")?;
    let result = KernelConfig::read(&config)?;
    let kconfig = Kconfig::read(&KernelTree::new(&source.directory))?;
    if let Err(unmet) = check(asked, &result, &kconfig) {
        let list: String = unmet.iter().map(|unmet| format!("\n  {unmet}")).collect();
        bail!("settings that did not take effect in the kernel's configuration:{list}");
    }
    Ok(result)
}

/// `make` for this source and build directory, reproducible across machines and users.
fn make(source: &Source, work: &Path) -> Command {
    let mut command = Command::new("make");
    for name in ["MAKEFLAGS", "ARCH", "CROSS_COMPILE", "KCFLAGS", "KCONFIG_CONFIG", "LOCALVERSION", "O"] {
        command.env_remove(name);
    }
    command
        .arg("-C")
        .arg(&source.directory)
        .arg(format!("O={}", work.display()))
        .env("LC_ALL", "C")
        .env("KBUILD_BUILD_TIMESTAMP", "Thu Jan  1 00:00:00 UTC 1970")
        .env("KBUILD_BUILD_VERSION", "1")
        .env("KBUILD_BUILD_USER", "kindling")
        .env("KBUILD_BUILD_HOST", "kindling")
        .stdin(Stdio::null());
    command
}

fn run_quietly(command: &mut Command, what: &str) -> Result<()> {
    let output = command.output().with_context(|| format!("cannot run {what}"))?;
    if !output.status.success() {
        bail!("{what} failed:\n{}", last_lines(&String::from_utf8_lossy(&output.stderr)));
    }
    Ok(())
}

fn last_lines(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}

/// Compiles `vmlinux` and shows the number of objects built.
fn compile(source: &Source, work: &Path) -> Result<()> {
    let count = work.join("objects");
    let known = fs::read_to_string(&count).ok().and_then(|text| text.parse().ok());
    let mut progress = Progress::new("building the guest kernel", "objects", known.unwrap_or(USUAL_OBJECTS));
    let jobs = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let log_path = work.join("build.log");
    let log = fs::File::create(&log_path)?;
    let mut child = make(source, work)
        .arg(format!("-j{jobs}"))
        .arg("vmlinux")
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()
        .context("cannot run make")?;
    let mut objects = 0_u64;
    if let Some(output) = child.stdout.take() {
        for line in BufReader::new(output).lines() {
            if matches!(line?.split_whitespace().next(), Some("CC" | "AS")) {
                objects += 1;
                progress.advance();
            }
        }
    }
    if !child.wait()?.success() {
        let log = fs::read_to_string(&log_path).unwrap_or_default();
        bail!("building the kernel failed; the end of {}:\n{}", log_path.display(), last_lines(&log));
    }
    progress.finish();
    if known.is_none_or(|known| objects > known) {
        fs::write(&count, objects.to_string())?;
    }
    Ok(())
}
