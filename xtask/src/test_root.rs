//! The root filesystem of `tests/tests/root.rs`: Debian programs, unusual files of every kind, and a list of all files
//! in `/list`.
//!
//! Each line of the list describes a path: path, mode, user, group, number of hard links, size, device number, content
//! (SHA-256 of a file or of a link's target), extended attributes.

use crate::build_image::{self, Arguments as Image};
use crate::root_tree::RootType;
use crate::test_oci;
use crate::{cargo, debian};
use anyhow::{Context, Result};
use kindling_vmm::config::image::{sha256, sha256_of};
use rustix::fs::{CWD, FileType, Mode, XattrFlags, mknodat, setxattr};
use std::ffi::OsStr;
use std::fmt::Write;
use std::fs::{self, File, Permissions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, lchown, symlink};
use std::path::Path;
use xshell::{Shell, cmd};

/// Packages with programs for the guest, in addition to Python, and their libraries.
const PACKAGES: [&str; 12] = [
    "bash",
    "coreutils",
    "libacl1",
    "libattr1",
    "libc6",
    "libexpat1",
    "libgmp10",
    "libpcre2-8-0",
    "libselinux1",
    "libtinfo6",
    "zlib1g",
    "base-files",
];

/// Builds the image `root` into a folder, and `oci` from the same tree.
pub(crate) fn build(images: &Path) -> Result<()> {
    // Not in /tmp, which may lack extended attributes, and not in the testbed, where a killed run would leave it.
    let scratch = tempfile::tempdir_in(cargo::target_directory())?;
    let root = scratch.path();
    let shell = Shell::new()?;
    let python = debian::unpacked("python3-minimal")?;
    let library = format!("lib{}", debian::version(&python)?.split('_').next().unwrap_or_default());
    let others = PACKAGES.into_iter().chain([&*library]);
    for content in others.map(debian::unpacked).chain([Ok(python)]) {
        let content = content?;
        cmd!(shell, "cp --archive {content}/. {root}").quiet().run()?;
    }
    let python = fs::read_dir(root.join("usr/bin"))?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .find(|name| name.starts_with("python3."))
        .context("the package python3-minimal contains no python3")?;
    symlink(python, root.join("usr/bin/python"))?;
    unusual(&root.join("odd")).context("cannot make the unusual files")?;
    let mut list = String::new();
    add_lines(root, b"", &mut list)?;
    fs::write(root.join("list"), list)?;
    build_image::build(&Image {
        name: Some("root".to_owned()),
        root: Some(root.into()),
        root_type: Some(RootType::Erofs),
        keep_owners: true,
        out: Some(images.join("root")),
        ..Image::default()
    })?;
    test_oci::build(images, root)
}

/// Creates unusual files of every kind. Those that only root can create are skipped for other users.
fn unusual(odd: &Path) -> Result<()> {
    fs::create_dir(odd)?;
    let file = |name: &[u8], content: &[u8], permissions: u32| -> Result<()> {
        let path = odd.join(OsStr::from_bytes(name));
        fs::write(&path, content)?;
        Ok(fs::set_permissions(path, Permissions::from_mode(permissions))?)
    };
    for (name, permissions) in
        [("plain", 0o644), ("executable", 0o755), ("setuid", 0o4755), ("setgid", 0o2755), ("private", 0o400)]
    {
        file(name.as_bytes(), name.as_bytes(), permissions)?;
    }
    for size in [0, 1, 4095, 4096, 4097, 100_000] {
        file(format!("size-{size}").as_bytes(), &vec![b'x'; size], 0o644)?;
    }
    file(b"not \xff\xfe UTF-8\n", b"", 0o644)?;
    // The maximum of mkfs.erofs 1.5.
    file(&[b'n'; 254], b"", 0o644)?;
    File::create(odd.join("sparse"))?.set_len((3 << 20) + 1)?;
    fs::hard_link(odd.join("plain"), odd.join("another-name"))?;
    for (name, target) in [("relative", "plain"), ("absolute", "/odd/plain"), ("nowhere", "no/such/file")] {
        symlink(target, odd.join(name))?;
    }
    symlink("d/".repeat(2000), odd.join("long"))?;
    let many = odd.join("many");
    fs::create_dir(&many)?;
    for number in 0..2000 {
        File::create(many.join(number.to_string()))?;
    }
    fs::create_dir(odd.join("sticky"))?;
    fs::set_permissions(odd.join("sticky"), Permissions::from_mode(0o1777))?;
    mknodat(CWD, odd.join("fifo"), FileType::Fifo, Mode::from_raw_mode(0o600), 0)?;
    setxattr(odd.join("executable"), "user.colour", b"blue\0red", XattrFlags::empty())?;
    if !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    for (name, user, group) in [("size-1", 1000, 100), ("size-0", 4_000_000_000, 70_000)] {
        chown(odd.join(name), Some(user), Some(group))?;
    }
    lchown(odd.join("nowhere"), Some(7), Some(8))?;
    mknodat(
        CWD,
        odd.join("null"),
        FileType::CharacterDevice,
        Mode::from_raw_mode(0o666),
        rustix::fs::makedev(1, 3),
    )?;
    // struct vfs_cap_data of linux/capability.h, revision 2: CAP_SYS_TIME is permitted and effective.
    let mut capability = [0_u8; 20];
    capability[..4].copy_from_slice(&0x0200_0001_u32.to_le_bytes());
    capability[4..8].copy_from_slice(&(1_u32 << 25).to_le_bytes());
    // Busybox selects its applet by the name of the program.
    fs::create_dir(odd.join("capable"))?;
    fs::copy(crate::lab::busybox()?, odd.join("capable/busybox"))?;
    setxattr(odd.join("capable/busybox"), "security.capability", &capability, XattrFlags::empty())?;
    Ok(())
}

fn add_lines(folder: &Path, inside: &[u8], list: &mut String) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().as_bytes();
        let inside = [inside, b"/", name].concat();
        let metadata = path.symlink_metadata()?;
        let content = if metadata.is_file() {
            sha256_of(&path)?
        } else if metadata.is_symlink() {
            sha256(fs::read_link(&path)?.as_os_str().as_bytes())
        } else {
            "-".to_owned()
        };
        // Link count and size of directories differ in an overlay.
        let (names, bytes) = if metadata.is_dir() { (1, 0) } else { (metadata.nlink(), metadata.len()) };
        let _ = write!(list, "{} {:o} ", escaped(&inside), metadata.mode());
        let _ = write!(list, "{} {} {names} {bytes} ", metadata.uid(), metadata.gid());
        let _ = writeln!(list, "{} {content} {}", metadata.rdev(), attributes(&path)?);
        if metadata.is_dir() {
            add_lines(&path, &inside, list)?;
        }
    }
    Ok(())
}

/// `name=value` of each extended attribute, sorted; values in hexadecimal.
fn attributes(path: &Path) -> Result<String> {
    let mut buffer = vec![0_u8; 65536];
    let length = rustix::fs::llistxattr(path, &mut buffer[..]).unwrap_or(0);
    let mut found = Vec::new();
    for name in buffer[..length].split(|&byte| byte == 0).filter(|name| !name.is_empty()) {
        let mut value = vec![0_u8; 65536];
        let length = rustix::fs::lgetxattr(path, name, &mut value[..])?;
        let digits: String = value[..length].iter().map(|byte| format!("{byte:02x}")).collect();
        found.push(format!("{}={digits}", String::from_utf8_lossy(name)));
    }
    found.sort();
    Ok(found.join(","))
}

/// Escapes every byte except ASCII letters, digits and `/._-` as `%` and two hexadecimal digits.
fn escaped(path: &[u8]) -> String {
    path.iter().fold(String::new(), |mut text, &byte| {
        if byte.is_ascii_alphanumeric() || b"/._-".contains(&byte) {
            text.push(byte.into());
        } else {
            let _ = write!(text, "%{byte:02x}");
        }
        text
    })
}
