//! The container images of `tests/tests/images.rs`: Debian programs in an OCI layout, built with mmdebstrap and umoci.
//!
//! The layout is cached under the digest of the script that builds it. Converted images are in the target directory,
//! and are converted again when `kindling-oci` changes.

use crate::{cache, cargo, debian, lab};
use anyhow::{Context, Result, ensure};
use kindling_vmm::config::image::sha256_of;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use xshell::{Shell, cmd};

/// The hook script of mmdebstrap.
const SCRIPT: &str = include_str!("../test-images/build.sh");
/// Files that no test uses, a third of the total.
const EXCLUDED: [&str; 7] = [
    "/usr/share/doc/*",
    "/usr/share/info/*",
    "/usr/share/locale/*",
    "/usr/share/man/*",
    "/usr/lib/x86_64-linux-gnu/libLLVM*",
    "/usr/lib/postgresql/*/lib/bitcode/*",
    "/usr/lib/postgresql/*/lib/llvmjit*",
];
/// The images that the script builds and tests run.
const NAMES: [&str; 6] = ["busybox", "python", "nginx", "postgres", "node", "podman"];

/// The environment variable with the path of the folder.
pub(crate) const VARIABLE: &str = "KINDLING_TEST_IMAGES";

/// A folder with the layout and a cache with all converted images, and the same as an ext4 image.
#[derive(Debug)]
pub(crate) struct Images {
    pub(crate) folder: PathBuf,
    pub(crate) disk: PathBuf,
    /// The program that converts images.
    pub(crate) program: PathBuf,
}

impl Images {
    /// Converts an image unless it is cached; returns its root filesystem.
    pub(crate) fn prepare(&self, name: &str) -> Result<PathBuf> {
        let image = format!("{}:{name}", self.folder.join("layout").display());
        let mut command = Command::new(&self.program);
        let output =
            command.args(["prepare", "--cache"]).arg(self.folder.join("cache")).arg(image).output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let prepared: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        Ok(prepared["rootfs"].as_str().context("the output of kindling-oci has no rootfs")?.into())
    }
}

/// Builds and converts the images unless they are up to date.
pub(crate) fn build() -> Result<Images> {
    debian::ensure_image_tools()?;
    let layout = layout()?;
    let program = cargo::release_binary("kindling-oci", "kindling-oci")?;
    let key = cache::key(&[&layout.to_string_lossy(), &sha256_of(&program)?]);
    let target = cargo::target_directory().join("test-images");
    let folder = target.join("files");
    let images = Images { disk: target.join("disk.ext4"), folder, program };
    let is_of = target.join("key");
    if fs::read_to_string(&is_of).is_ok_and(|text| text == key) {
        return Ok(images);
    }
    if target.exists() {
        fs::remove_dir_all(&target)?;
    }
    fs::create_dir_all(&images.folder)?;
    let (shell, folder, disk) = (Shell::new()?, &images.folder, &images.disk);
    cmd!(shell, "cp --archive {layout} {folder}/layout").quiet().run()?;
    for name in NAMES {
        images.prepare(name)?;
    }
    // The lab mounts the disk image, because files in its initramfs take memory. Unused blocks stay holes.
    cmd!(shell, "/usr/sbin/mke2fs -q -t ext4 -O ^has_journal -m 0 -E nodiscard -d {folder} {disk} 1800M")
        .quiet()
        .run()?;
    fs::write(is_of, key)?;
    Ok(images)
}

/// Builds the layout unless it is cached.
fn layout() -> Result<PathBuf> {
    let key = cache::key(&[SCRIPT, &EXCLUDED.join("\n")]);
    let target = cache::subdirectory("test-images")?.join(&key);
    let _lock = cache::lock(&format!("test-images-{key}"))?;
    if !target.exists() {
        let draft = cache::Draft::beside(&target)?;
        eprintln!("building container images of Debian's packages ...");
        mmdebstrap(draft.path(), &lab::busybox()?)?;
        draft.publish(&target)?;
    }
    Ok(target.join("layout"))
}

fn mmdebstrap(scratch: &Path, busybox: &Path) -> Result<()> {
    let script = scratch.join("build.sh");
    fs::write(&script, SCRIPT)?;
    let log = fs::File::create(scratch.join("log"))?;
    let excluded = EXCLUDED.iter().map(|pattern| format!("--dpkgopt=path-exclude={pattern}"));
    let status = Command::new("mmdebstrap")
        .args(["--variant=essential", "--format=null"])
        .args(excluded)
        .arg(format!(
            "--customize-hook=sh '{}' \"$1\" '{}' '{}'",
            script.display(),
            scratch.display(),
            busybox.display()
        ))
        .args([&debian::release(), "-"])
        .stdout(log.try_clone()?)
        .stderr(log)
        .status()
        .context("cannot start mmdebstrap")?;
    let said = fs::read_to_string(scratch.join("log")).unwrap_or_default();
    let lines: Vec<_> = said.lines().collect();
    ensure!(status.success(), "mmdebstrap: {}", lines[lines.len().saturating_sub(20)..].join("\n"));
    Ok(())
}
