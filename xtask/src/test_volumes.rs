//! Files for volume tests: Debian's mke2fs and debugfs with their libraries, and an image with files at volume targets.

use crate::{cargo, debian};
use anyhow::{Context, Result};
use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::Path;
use xshell::{Shell, cmd};

/// Packages and their libraries that these programs need.
const LIBRARIES: [(&str, &str); 7] = [
    ("libext2fs2", "libext2fs.so.2"),
    ("libext2fs2", "libe2p.so.2"),
    ("libcom-err2", "libcom_err.so.2"),
    ("libblkid1", "libblkid.so.1"),
    ("libuuid1", "libuuid.so.1"),
    ("libss2", "libss.so.2"),
    ("libc6", "libc.so.6"),
];
const LOADER: &str = "ld-linux-x86-64.so.2";
/// Library folders in packages.
const LIBRARY_FOLDERS: [&str; 2] = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"];

/// Copies Debian's mke2fs and debugfs into a folder.
pub(crate) fn programs(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder)?;
    for (package, library) in LIBRARIES.into_iter().chain([("libc6", LOADER)]) {
        let unpacked = debian::unpacked(package)?;
        let file = LIBRARY_FOLDERS
            .map(|scratch| unpacked.join(scratch).join(library))
            .into_iter()
            .find(|file| file.exists());
        let file = file.with_context(|| format!("Debian's package {package} contains no {library}"))?;
        fs::copy(file, folder.join(library))?;
    }
    let programs = debian::unpacked("e2fsprogs")?.join("sbin");
    for program in ["mke2fs", "debugfs"] {
        fs::copy(programs.join(program), folder.join(format!("{program}.program")))?;
        // The lab has no C library.
        let script = format!(
            "#!/bin/sh\nhere=${{0%/*}}\nexec $here/{LOADER} --library-path $here $here/{program}.program \"$@\"\n"
        );
        fs::write(folder.join(program), script)?;
        fs::set_permissions(folder.join(program), Permissions::from_mode(0o755))?;
    }
    Ok(())
}

/// Lays out the folder `e2fsprogs` of the testbed, and builds `volumes.erofs` from `root` with additional files.
pub(crate) fn build(testbed: &Path, root: &Path) -> Result<()> {
    programs(&testbed.join("e2fsprogs"))?;
    let scratch = tempfile::tempdir_in(cargo::target_directory())?;
    let (scratch, image) = (scratch.path(), testbed.join("volumes.erofs"));
    let shell = Shell::new()?;
    cmd!(shell, "cp --archive {root}/. {scratch}").quiet().run()?;
    fs::create_dir_all(scratch.join("srv/large"))?;
    fs::write(scratch.join("srv/large/file"), vec![b'x'; 16 << 20])?;
    content(&scratch.join("srv/data")).context("cannot make the files of a volume")?;
    cmd!(shell, "mkfs.erofs -E noinline_data {image} {scratch}").quiet().ignore_stdout().run()?;
    Ok(())
}

/// Creates files of several kinds, which `kindling run -v` copies into a new volume.
fn content(data: &Path) -> Result<()> {
    fs::create_dir_all(data.join("deep/er"))?;
    fs::write(data.join("deep/er/file"), "words\n".repeat(100_000))?;
    fs::write(data.join("tool"), "")?;
    symlink("deep/er/file", data.join("link"))?;
    fs::set_permissions(data.join("tool"), Permissions::from_mode(0o4750))?;
    fs::set_permissions(data, Permissions::from_mode(0o2770))?;
    if rustix::process::geteuid().is_root() {
        chown(data.join("tool"), Some(1000), Some(100))?;
        chown(data, Some(70), Some(71))?;
        fs::set_permissions(data.join("tool"), Permissions::from_mode(0o4750))?;
        fs::set_permissions(data, Permissions::from_mode(0o2770))?;
    }
    rustix::fs::setxattr(data.join("deep"), "user.colour", b"blue\0red", rustix::fs::XattrFlags::empty())?;
    fs::File::open(data.join("deep"))?
        .set_modified(std::time::UNIX_EPOCH + std::time::Duration::new(1_000_000_000, 5))?;
    Ok(())
}
