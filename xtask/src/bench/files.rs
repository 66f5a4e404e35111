//! Files that monitors need in the lab besides their program: shared libraries and firmware.

use super::vmms::{Kind, Vmm};
use super::{VMMS, jailer};
use crate::cargo;
use anyhow::Result;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Firmware of QEMU's microvm machine, from Debian's package qemu-system-data.
const FIRMWARE: [&str; 2] = ["/usr/share/qemu/qboot.rom", "/usr/share/qemu/bios-microvm.bin"];
/// The dynamic loader's cache; without it each start would search for the libraries.
const LOADER_CACHE: &str = "/etc/ld.so.cache";

/// The files that a monitor needs besides its program, which has the path `inside` in the lab, with their paths in the lab.
pub(super) fn needed(vmm: &Vmm, inside: &Path) -> Result<Vec<(PathBuf, String)>> {
    let mut files = shared_libraries(&vmm.path)?;
    if vmm.kind == Kind::Qemu {
        files.extend(in_place(FIRMWARE.map(str::to_owned).to_vec()));
    }
    let jailer = jailer::beside(&vmm.path);
    if vmm.kind == Kind::Firecracker && jailer.exists() {
        files.push((jailer, jailer::beside(inside).to_string_lossy().into_owned()));
    }
    if vmm.kind.is_kindling() {
        // The command finds its monitor in its own directory, by name.
        files.push((cargo::release_binary("kindling-vmm", "kindling-vmm")?, format!("{VMMS}/kindling-vmm")));
    }
    Ok(files)
}

/// The shared libraries of a program and its loader, at the same paths as on the host; empty for a static program.
pub(crate) fn shared_libraries(program: &Path) -> Result<Vec<(PathBuf, String)>> {
    let mut files = libraries(program)?;
    if !files.is_empty() {
        files.push(LOADER_CACHE.to_owned());
    }
    Ok(in_place(files))
}

/// The files that exist. The source is resolved through symbolic links; the target is the requested path.
fn in_place(files: Vec<String>) -> Vec<(PathBuf, String)> {
    let files = files.into_iter().filter(|file| Path::new(file).exists());
    files.map(|file| (PathBuf::from(&file), file)).collect()
}

/// The libraries of a program and its loader; empty for a static program or a script.
fn libraries(program: &Path) -> Result<Vec<String>> {
    let output = Command::new("ldd").arg(program).output()?;
    if !output.status.success() {
        return Ok(Vec::new());
    }
    Ok(paths(&String::from_utf8_lossy(&output.stdout)))
}

/// The paths in the output of ldd: `libz.so.1 => /lib/libz.so.1 (0x...)` or `/lib64/ld.so (0x...)`.
fn paths(ldd: &str) -> Vec<String> {
    let path = |line: &str| {
        let (_, path) = line.split_once(" => ").unwrap_or(("", line));
        path.split_whitespace().next().filter(|word| word.starts_with('/')).map(str::to_owned)
    };
    ldd.lines().filter_map(path).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_read_from_ldd() {
        let text = "\tlinux-vdso.so.1 (0x00007ffe)\n\tlibz.so.1 => /lib/x86_64-linux-gnu/libz.so.1 (0x1)\n\
                    \tlibmissing.so => not found\n\t/lib64/ld-linux-x86-64.so.2 (0x2)\n\tstatically linked\n";
        assert_eq!(paths(text), ["/lib/x86_64-linux-gnu/libz.so.1", "/lib64/ld-linux-x86-64.so.2"]);
    }
}
