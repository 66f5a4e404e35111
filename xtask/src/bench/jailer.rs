//! Firecracker's jailer, which starts a Firecracker as another user in a root directory of its own.

use super::measure::Bench;
use super::vmms::{Guest, Task};
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The user of the jailed process, who needs no account.
const USER: &str = "1000";

/// The jailer of a Firecracker: the file beside it that is named as Firecracker's releases name it.
pub(super) fn beside(firecracker: &Path) -> PathBuf {
    let name = firecracker.file_name().unwrap_or_default().to_string_lossy();
    firecracker.with_file_name(name.replace("firecracker", "jailer"))
}

/// The directory of a jail, which the jailer does not remove. It is removed on drop.
pub(super) struct Root(PathBuf);

impl Drop for Root {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The command that boots a guest in a jail, with the kernel, the initramfs and the configuration in its directory.
pub(super) fn command(bench: &Bench<'_>, number: u32) -> Result<(Command, Root)> {
    let base = bench.scratch.join("jailer");
    let program = &bench.vmm.path;
    let machine =
        base.join(program.file_name().context("the monitor's path has no name")?).join(number.to_string());
    let root = machine.join("root");
    fs::create_dir_all(&root)?;
    let jailed = Root(machine);
    let inside = Guest { kernel: "/kernel".into(), initrd: "/initrd".into(), image: None };
    for (from, to) in [(&bench.guest.kernel, "kernel"), (&bench.guest.initrd, "initrd")] {
        fs::copy(from, root.join(to)).with_context(|| format!("cannot copy {}", from.display()))?;
    }
    bench.vmm.command(&inside, bench.case, Task::Print, &bench.devices, &root, None)?;
    let mut command = Command::new(beside(program));
    command
        .args(["--id", &number.to_string(), "--exec-file"])
        .arg(program)
        .args(["--uid", USER, "--gid", USER]);
    command.arg("--chroot-base-dir").arg(base).args(["--", "--no-api", "--config-file", "/firecracker.json"]);
    Ok((command, jailed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_jailer_has_the_name_of_a_release() {
        assert_eq!(beside(Path::new("/a/firecracker")), Path::new("/a/jailer"));
        assert_eq!(beside(Path::new("/a/firecracker-v1.9.0-x86_64")), Path::new("/a/jailer-v1.9.0-x86_64"));
        // The directory is not renamed.
        assert_eq!(beside(Path::new("/firecracker/firecracker")), Path::new("/firecracker/jailer"));
    }
}
