//! Debian packages: tools that are installed, and packages that are only unpacked.

use crate::cache;
use anyhow::{Context, Result, bail};
use std::fs;
use std::io::{BufRead, IsTerminal};
use std::path::{Path, PathBuf};
use xshell::{Shell, cmd};

/// Required tools: a file that shows that the tool is installed, and its package.
const KERNEL_BUILD: [(&str, &str); 8] = [
    ("/usr/bin/make", "make"),
    ("/usr/bin/gcc", "gcc"),
    ("/usr/bin/flex", "flex"),
    ("/usr/bin/bison", "bison"),
    ("/usr/bin/bc", "bc"),
    ("/usr/bin/xz", "xz-utils"),
    ("/usr/bin/perl", "perl"),
    ("/usr/include/gelf.h", "libelf-dev"),
];
const LAB: [(&str, &str); 2] =
    [("/usr/bin/qemu-system-x86_64", "qemu-system-x86"), ("/usr/bin/zstd", "zstd")];
const EROFS: [(&str, &str); 1] = [("/usr/bin/mkfs.erofs", "erofs-utils")];
/// The environment variable that allows commands as root without a prompt.
const CONSENT_VARIABLE: &str = "KINDLING_INSTALL";

const IMAGES: [(&str, &str); 2] = [("/usr/bin/mmdebstrap", "mmdebstrap"), ("/usr/bin/umoci", "umoci")];

/// Installs missing packages for kernel builds.
pub(crate) fn ensure_kernel_build_tools() -> Result<()> {
    ensure(&KERNEL_BUILD)
}

/// Installs missing packages for the lab.
pub(crate) fn ensure_lab_tools() -> Result<()> {
    ensure(&LAB)
}

/// Installs missing packages for EROFS images.
pub(crate) fn ensure_erofs_tools() -> Result<()> {
    ensure(&EROFS)
}

/// Installs missing packages for building container images from packages.
pub(crate) fn ensure_image_tools() -> Result<()> {
    ensure(&IMAGES)
}

/// The code name of this machine's Debian release.
pub(crate) fn release() -> String {
    let text = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let name = text.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    name.unwrap_or("stable").to_owned()
}

fn ensure(needed: &[(&str, &str)]) -> Result<()> {
    let missing: Vec<&str> =
        needed.iter().filter(|(file, _)| !Path::new(file).exists()).map(|(_, package)| *package).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let list = missing.join(" ");
    if !Path::new("/usr/bin/apt-get").exists() {
        bail!("missing packages: {list}; install them by their Debian names (this system has no apt-get)");
    }
    confirm_root("installing", &format!("apt-get install {list}"))?;
    let _lock = cache::lock("apt")?;
    install(&missing).with_context(|| format!("cannot install {list}; try: sudo apt-get install {list}"))
}

fn install(packages: &[&str]) -> Result<()> {
    let install = || {
        let words = ["install", "--yes", "--quiet", "--no-install-recommends"];
        apt_get(&[&words[..], packages].concat())
    };
    // Package lists may be missing or outdated.
    install().or_else(|_| update().and_then(|()| install()))
}

/// Announces a command that runs as root. Root's consent is implied by running xtask. Other users are asked, because
/// `sudo` may not ask for a password.
fn confirm_root(what: &str, command: &str) -> Result<()> {
    if rustix::process::geteuid().is_root() {
        eprintln!("{what}: {command} ...");
        return Ok(());
    }
    if std::env::var_os(CONSENT_VARIABLE).is_some_and(|value| value == "yes") {
        eprintln!("{what}, as {CONSENT_VARIABLE} allows: sudo {command} ...");
        return Ok(());
    }
    if !std::io::stdin().is_terminal() {
        bail!("root is required; run the command, or set {CONSENT_VARIABLE}=yes: sudo {command}");
    }
    eprint!("Run as root: sudo {command}  [y/N] ");
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer)?;
    if ["y", "yes"].contains(&answer.trim().to_ascii_lowercase().as_str()) {
        return Ok(());
    }
    bail!("declined: sudo {command}")
}

/// Runs `apt-get` as root.
fn apt_get(words: &[&str]) -> Result<()> {
    let shell = Shell::new()?;
    let command = if rustix::process::geteuid().is_root() {
        cmd!(shell, "apt-get {words...}")
    } else {
        cmd!(shell, "sudo apt-get {words...}")
    };
    Ok(command.env("DEBIAN_FRONTEND", "noninteractive").quiet().ignore_stdout().run()?)
}

/// The unpacked content of a package, which is not installed. `name` may be a metapackage that depends on the package
/// with the current version.
pub(crate) fn unpacked(name: &str) -> Result<PathBuf> {
    let target = cache::subdirectory("debian")?.join(name);
    if target.exists() {
        return Ok(target);
    }
    let _lock = cache::lock(&format!("debian-{name}"))?;
    if target.exists() {
        return Ok(target);
    }
    let draft = cache::Draft::beside(&target)?;
    let package = resolve(name)?;
    eprintln!("downloading {package} from Debian ...");
    let file = download(&package, draft.path())?;
    let shell = Shell::new()?;
    let directory = draft.path();
    cmd!(shell, "dpkg-deb --extract {file} {directory}").quiet().run()?;
    fs::write(directory.join(VERSION), file.file_name().unwrap_or_default().as_encoded_bytes())?;
    fs::remove_file(&file)?;
    draft.publish(&target)?;
    Ok(target)
}

/// The file in an unpacked package with the name of the package file.
const VERSION: &str = "PACKAGE";

/// The name of the package file, which contains its version.
pub(crate) fn version(unpacked: &Path) -> Result<String> {
    fs::read_to_string(unpacked.join(VERSION))
        .with_context(|| format!("{} is incomplete", unpacked.display()))
}

/// The versioned package of a metapackage of the kernel or Python; other names are returned unchanged.
fn resolve(name: &str) -> Result<String> {
    let prefix = match name {
        "python3-minimal" => "python3.",
        name if name.starts_with("linux-image-") => "linux-image-",
        _ => return Ok(name.to_owned()),
    };
    let shell = Shell::new()?;
    let mut depends =
        cmd!(shell, "apt-cache depends {name}").quiet().ignore_stderr().read().unwrap_or_default();
    if depends.is_empty() {
        update()?;
        depends = cmd!(shell, "apt-cache depends {name}").quiet().read()?;
    }
    let mut dependencies =
        depends.lines().filter_map(|line| line.split_once("Depends: ")).map(|(_, name)| name);
    let package = dependencies.find(|dependency| dependency.starts_with(prefix));
    Ok(package.unwrap_or(name).to_owned())
}

fn update() -> Result<()> {
    confirm_root("fetching Debian's package lists", "apt-get update")?;
    apt_get(&["update", "--quiet"]).context("cannot fetch Debian's package lists; try: sudo apt-get update")
}

/// Downloads a package file into a directory.
fn download(package: &str, directory: &Path) -> Result<PathBuf> {
    let shell = Shell::new()?;
    shell.change_dir(directory);
    let fetch =
        || cmd!(shell, "apt-get download --quiet {package}").quiet().ignore_stdout().ignore_stderr().run();
    if fetch().is_err() {
        update()?;
        fetch().with_context(|| format!("cannot download Debian's package {package}"))?;
    }
    let files: Vec<PathBuf> =
        fs::read_dir(directory)?.map(|entry| entry.map(|e| e.path())).collect::<Result<_, _>>()?;
    files
        .into_iter()
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .with_context(|| format!("apt-get download {package} produced no file"))
}
