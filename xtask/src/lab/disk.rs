//! The files that the lab boots from: Debian's kernel, and an initramfs with KVM's modules, the command and its files.

use super::{Job, WORKING_DIRECTORY, guest};
use crate::archive::Archive;
use crate::debian;
use anyhow::{Context, Result};
use std::fs::{self, File};
use std::io::BufWriter;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use xshell::{Shell, cmd};

/// The Debian package of the lab's kernel.
pub(crate) const KERNEL_PACKAGE: &str = "linux-image-6.12-cloud-amd64";
const BUSYBOX_PACKAGE: &str = "busybox-static";

/// The lab's kernel.
pub(crate) fn kernel() -> Result<PathBuf> {
    let boot = debian::unpacked(KERNEL_PACKAGE)?.join("boot");
    file_starting_with(&boot, "vmlinuz-")
}

/// Debian's statically linked busybox.
pub(crate) fn busybox() -> Result<PathBuf> {
    let package = debian::unpacked(BUSYBOX_PACKAGE)?;
    // The program moved from /bin to /usr/bin between Debian releases.
    ["bin/busybox", "usr/bin/busybox"]
        .map(|name| package.join(name))
        .into_iter()
        .find(|path| path.exists())
        .with_context(|| format!("{BUSYBOX_PACKAGE} contains no busybox"))
}

fn file_starting_with(directory: &Path, prefix: &str) -> Result<PathBuf> {
    fs::read_dir(directory)?
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .find(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix)))
        .with_context(|| format!("{} contains no {prefix}*", directory.display()))
}

/// Packs the lab's initramfs into an unnamed temporary file.
pub(super) fn pack(job: &Job) -> Result<File> {
    let mut archive = Archive::default();
    for (name, permissions) in
        [("dev", 0o755), ("proc", 0o555), ("sys", 0o555), ("tmp", 0o1777), ("root", 0o700)]
    {
        archive.directory(name, permissions)?;
    }
    archive.directory(WORKING_DIRECTORY, 0o755)?;
    let stripped = tempfile::tempdir()?;
    // This path works even if another build has replaced the file.
    let this_program = format!("/proc/{}/exe", std::process::id());
    let init = strip(Path::new(&this_program), stripped.path(), "init")?;
    archive.file("init", &init, 0o755)?;
    archive.file("bin/busybox", &busybox()?, 0o755)?;
    add_modules(&mut archive)?;
    for (number, (source, target)) in job.with.iter().enumerate() {
        let named = || format!("cannot put {} into the lab", source.display());
        if source.is_dir() {
            archive.directory(target, 0o755)?;
            archive.tree(target, source).with_context(named)?;
            continue;
        }
        let permissions = source.metadata().with_context(named)?.permissions().mode() & 0o7777;
        let source = strip(source, stripped.path(), &number.to_string()).unwrap_or_else(|_| source.clone());
        archive.file(target, &source, permissions).with_context(named)?;
    }
    archive.bytes(guest::REQUEST, guest::Request::of(job).to_json()?)?;
    let file = tempfile::tempfile()?;
    archive.write(BufWriter::new(&file)).context("cannot write the lab's initramfs")?;
    Ok(file)
}

/// A copy of a program without debugging information, which is most of a debug build.
fn strip(program: &Path, directory: &Path, name: &str) -> Result<PathBuf> {
    let mut magic = [0; 4];
    std::io::Read::read_exact(&mut File::open(program)?, &mut magic)?;
    anyhow::ensure!(&magic == b"\x7fELF", "not a program");
    let (shell, target) = (Shell::new()?, directory.join(name));
    cmd!(shell, "objcopy --strip-debug {program} {target}").quiet().ignore_stderr().run()?;
    Ok(target)
}

/// Adds the modules of KVM and of devices that QEMU implements in the kernel (vhost), in load order. A module may be
/// missing because it is built in.
fn add_modules(archive: &mut Archive) -> Result<()> {
    let modules = debian::unpacked(KERNEL_PACKAGE)?.join("lib/modules");
    let release = file_starting_with(&modules, "6.")?;
    for (number, path) in [
        "virt/lib/irqbypass",
        "drivers/crypto/ccp/ccp",
        "arch/x86/kvm/kvm",
        "arch/x86/kvm/kvm-amd",
        "drivers/block/brd",
        "drivers/block/virtio_blk",
        "drivers/net/tun",
        "net/vmw_vsock/vsock",
        "net/vmw_vsock/vmw_vsock_virtio_transport_common",
        "drivers/vhost/vhost_iotlb",
        "drivers/vhost/vhost",
        "drivers/vhost/vhost_vsock",
    ]
    .iter()
    .enumerate()
    {
        let file = release.join("kernel").join(format!("{path}.ko.xz"));
        if file.exists() {
            archive.file(&format!("{}/{number:02}.ko.xz", guest::MODULES), &file, 0o644)?;
        }
    }
    Ok(())
}
