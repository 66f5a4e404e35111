//! `cargo xtask build-image`: kernel, root filesystem and `image.json` in one folder.

use crate::archive::Archive;
use crate::cache::{self, Draft};
use crate::container;
use crate::kernel::{self, Kernel};
use crate::root_tree::{self, RootType, Survey};
use crate::{cargo, host};
use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use guest_kernel_config::{DEFAULT, Fragment, RUN, compose, shipped_named};
use kindling_vmm::config::image::{DESCRIPTION, Image, ImageFile, sha256_of};
use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};

/// The purpose of an image's kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Profile {
    /// For `kindling run`, which starts guests from a pre-booted kernel: all features
    Run,
    /// For `kindling boot`: without features that slow down a boot
    Boot,
}

impl Profile {
    /// The configuration fragments of the kernel.
    pub(crate) fn fragments(self) -> Vec<&'static str> {
        match self {
            Self::Run => [&DEFAULT[..], &RUN].concat(),
            Self::Boot => DEFAULT.to_vec(),
        }
    }

    /// The default name of an image.
    pub(crate) const fn image_name(self) -> &'static str {
        match self {
            Self::Run => "run",
            Self::Boot => "default",
        }
    }
}

#[derive(Args, Debug)]
pub(crate) struct Arguments {
    /// Purpose of the kernel
    #[arg(long, value_enum, default_value = "boot")]
    pub(crate) profile: Profile,
    /// Name of the image [default: default, or run with --profile run]
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Kernel configuration to add: a file, or the name of an optional fragment (pmem, uniprocessor, sysfs,
    /// container, netfilter, hardening, mitigations, paravirt-spinlocks, debug); may be repeated
    #[arg(long, value_name = "FILE|NAME")]
    pub(crate) config_fragment: Vec<PathBuf>,
    /// Program to use as /init, instead of Kindling's init
    #[arg(long, value_name = "FILE")]
    pub(crate) init: Option<PathBuf>,
    /// Folder with the content of the root filesystem
    #[arg(long, value_name = "DIR")]
    pub(crate) root: Option<PathBuf>,
    /// Container image to use as the root filesystem, whose command the guest runs: an OCI layout, an archive of
    /// `docker save`, or a name in a registry
    #[arg(long, value_name = "OCI", conflicts_with_all = ["root", "init"])]
    pub(crate) from: Option<String>,
    /// Cache for the converted image, instead of the user's cache
    #[arg(skip)]
    pub(crate) from_cache: Option<PathBuf>,
    /// Type of the root filesystem [default: initramfs up to 3 MiB, EROFS above]
    #[arg(long, value_enum, requires = "root")]
    pub(crate) root_type: Option<RootType>,
    /// Keep the owners and groups of the files of --root, instead of root
    #[arg(long, requires = "root")]
    pub(crate) keep_owners: bool,
    /// Kernel command line, instead of the default
    #[arg(long, value_name = "TEXT")]
    pub(crate) cmdline: Option<String>,
    /// Kernel source: a folder or a tarball, instead of Debian's package
    #[arg(long, value_name = "DIR|TARBALL")]
    pub(crate) kernel_source: Option<PathBuf>,
    /// Folder to write the image to [default: target/images/NAME]
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
}

impl Arguments {
    fn image_name(&self) -> &str {
        self.name.as_deref().unwrap_or_else(|| self.profile.image_name())
    }
}

impl Default for Arguments {
    fn default() -> Self {
        Self {
            profile: Profile::Boot,
            name: None,
            config_fragment: Vec::new(),
            init: None,
            root: None,
            from: None,
            from_cache: None,
            root_type: None,
            keep_owners: false,
            cmdline: None,
            kernel_source: None,
            out: None,
        }
    }
}

/// Files of an image in addition to kernel and image.json.
const INITRAMFS: &str = "initramfs.cpio";
const EROFS: &str = "root.erofs";

/// Directories of every initramfs, with their permissions.
const DIRECTORIES: [(&str, u32); 7] = [
    ("dev", 0o755),
    ("proc", 0o555),
    ("root", 0o700),
    ("run", 0o755),
    ("sys", 0o555),
    ("tmp", 0o1777),
    ("etc", 0o755),
];

/// Builds the image and prints its path.
pub(crate) fn run(arguments: &Arguments) -> Result<u8> {
    let directory = build(arguments)?;
    println!("{}", directory.display());
    Ok(0)
}

/// Builds the image unless it is up to date; returns its folder.
pub(crate) fn build(arguments: &Arguments) -> Result<PathBuf> {
    Ok(build_with_kernel(arguments)?.0)
}

/// Builds the image of a profile with default arguments.
pub(crate) fn of_profile(profile: Profile) -> Result<PathBuf> {
    build(&Arguments { profile, ..Arguments::default() })
}

/// Builds an image; returns its folder and its kernel.
pub(crate) fn build_with_kernel(arguments: &Arguments) -> Result<(PathBuf, Kernel)> {
    let fragments = fragments(arguments.profile, &arguments.config_fragment)?;
    build_of(arguments, &kernel::source(arguments.kernel_source.as_deref())?, &fragments)
}

/// Builds an image with a kernel of these fragments.
pub(crate) fn build_of(
    arguments: &Arguments,
    source: &kernel::Source,
    fragments: &[Fragment],
) -> Result<(PathBuf, Kernel)> {
    let out = match &arguments.out {
        Some(path) => std::path::absolute(path)?,
        None => cargo::target_directory().join("images").join(arguments.image_name()),
    };
    // An unusable root is reported before a kernel is built for it.
    let survey = arguments.root.as_deref().map(Survey::of).transpose()?;
    let prepared = arguments
        .from
        .as_deref()
        .map(|image| container::prepare(image, arguments.from_cache.as_deref()))
        .transpose()?;
    let kernel = kernel::build(source, &compose(fragments)?)?;
    let init = match &arguments.init {
        Some(path) => path.clone(),
        None => cargo::release_binary("guest-init", "guest-init")?,
    };

    let _lock = cache::lock(&format!("image-{}", cache::key(&[&out.to_string_lossy()])))?;
    let draft = Draft::beside(&out)?;
    // A copy, not a link: changes to an image must not change the cache.
    let vmlinux = draft.path().join("vmlinux");
    fs::copy(&kernel.vmlinux, &vmlinux).with_context(|| format!("cannot write {}", vmlinux.display()))?;
    let tool = match &prepared {
        Some(prepared) => {
            root_filesystem(&init, None, false, &draft.path().join(INITRAMFS))?;
            fs::copy(&prepared.rootfs, draft.path().join(EROFS))
                .context("cannot copy the root filesystem")?;
            Some(("kindling-oci", env!("CARGO_PKG_VERSION").to_owned()))
        }
        None => write_root(arguments, survey.as_ref(), &init, draft.path())?.map(|tool| ("mkfs.erofs", tool)),
    };
    let image = Image {
        format: Image::FORMAT,
        name: arguments.image_name().to_owned(),
        kernel: describe(draft.path(), "vmlinux")?,
        initrd: describe(draft.path(), INITRAMFS)?,
        root: tool.as_ref().map(|_| describe(draft.path(), EROFS)).transpose()?,
        container: prepared.map(container::container),
        boot_args: arguments
            .cmdline
            .clone()
            .unwrap_or_else(|| guest_protocol::DEFAULT_COMMAND_LINE.to_owned()),
        vcpus_max: kernel.vcpus_max,
        kernel_version: kernel.version.clone(),
        kernel_source: source.origin.clone(),
        kernel_config_sha256: kernel.config_sha256.clone(),
        fragments: fragments.iter().map(|fragment| fragment.name.clone()).collect(),
        tools: kernel
            .tools
            .clone()
            .into_iter()
            .chain(tool.map(|(name, version)| (name.to_owned(), version)))
            .collect(),
        build_time: 0,
    };
    fs::write(draft.path().join(DESCRIPTION), serde_json::to_string_pretty(&image)? + "\n")?;
    if Image::open(&out).is_ok_and(|present| present == image) {
        return Ok((out, kernel));
    }
    draft.publish(&out)?;
    Ok((out, kernel))
}

/// The fragments of a profile and the additional ones: files, or names of shipped fragments.
pub(crate) fn fragments(profile: Profile, extra: &[PathBuf]) -> Result<Vec<Fragment>> {
    let mut fragments = shipped_named(&profile.fragments())?;
    for path in extra {
        let name = path.to_string_lossy();
        let fragment = if path.components().count() == 1 && !path.exists() {
            shipped_named(&[&*name])
                .map(|mut found| found.remove(0))
                .with_context(|| format!("{name} is neither a file nor the name of a fragment"))?
        } else {
            Fragment::read(path)?
        };
        // The profile may already include it.
        if !fragments.contains(&fragment) {
            fragments.push(fragment);
        }
    }
    Ok(fragments)
}

/// Writes the root filesystem in the requested or the suitable form. For EROFS, returns the version of the tool that
/// made it; the initramfs then contains only init.
fn write_root(
    arguments: &Arguments,
    survey: Option<&Survey>,
    init: &Path,
    directory: &Path,
) -> Result<Option<String>> {
    let initramfs = directory.join(INITRAMFS);
    let (Some(root), Some(survey)) = (&arguments.root, survey) else {
        root_filesystem(init, None, false, &initramfs)?;
        return Ok(None);
    };
    // With the user's own init, files stay in the initramfs unless the user chose otherwise.
    let usual = if arguments.init.is_some() { RootType::Initramfs } else { survey.root_type() };
    let keep_owners = arguments.keep_owners;
    match arguments.root_type.unwrap_or(usual) {
        RootType::Initramfs => {
            if let Some(reason) = survey.initramfs_obstacle() {
                eprintln!("warning: {reason}, which an initramfs cannot store; use --root-type erofs");
            }
            root_filesystem(init, Some(root), keep_owners, &initramfs)?;
            Ok(None)
        }
        RootType::Erofs => {
            root_filesystem(init, None, false, &initramfs)?;
            root_tree::make_erofs(root, survey, keep_owners, &directory.join(EROFS)).map(Some)
        }
    }
}

/// Writes an initramfs with init and the content of a folder.
pub(crate) fn root_filesystem(
    init: &Path,
    root: Option<&Path>,
    keep_owners: bool,
    target: &Path,
) -> Result<()> {
    let mut archive = Archive::default();
    archive.keeps_owners = keep_owners;
    for (name, permissions) in DIRECTORIES {
        archive.directory(name, permissions)?;
    }
    if let Some(root) = root {
        archive.tree("", root)?;
    }
    archive.file("init", init, 0o755)?;
    archive
        .write(BufWriter::new(File::create(target)?))
        .with_context(|| format!("cannot write {}", target.display()))
}

fn describe(directory: &Path, name: &str) -> Result<ImageFile> {
    let path = directory.join(name);
    Ok(ImageFile { file: name.to_owned(), size: fs::metadata(&path)?.len(), sha256: sha256_of(&path)? })
}

/// A path relative to the workspace, for messages.
pub(crate) fn relative(path: &Path) -> String {
    path.strip_prefix(host::workspace()).unwrap_or(path).display().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

    /// A tmpfs of `mib` MiB; only root can mount one.
    struct SmallTmpfs(tempfile::TempDir);

    impl SmallTmpfs {
        fn new(mib: u64) -> Option<Self> {
            let scratch = tempfile::tempdir().unwrap();
            let size = std::ffi::CString::new(format!("size={mib}m")).unwrap();
            mount("none", scratch.path(), "tmpfs", MountFlags::empty(), &*size).ok()?;
            Some(Self(scratch))
        }
    }

    impl Drop for SmallTmpfs {
        fn drop(&mut self) {
            let _ = unmount(self.0.path(), UnmountFlags::DETACH);
        }
    }

    #[test]
    fn a_profile_determines_the_name_and_the_fragments_of_an_image() {
        let run = Arguments { profile: Profile::Run, ..Arguments::default() };
        assert_eq!((run.image_name(), Arguments::default().image_name()), ("run", "default"));
        assert_eq!(Arguments { name: Some("x".to_owned()), ..run }.image_name(), "x");
        let names = |profile| -> Vec<_> {
            fragments(profile, &[]).unwrap().into_iter().map(|fragment| fragment.name).collect()
        };
        assert_eq!(names(Profile::Boot), DEFAULT);
        assert_eq!(names(Profile::Run), [&DEFAULT[..], &RUN].concat());
        let with_pmem = fragments(Profile::Run, &["pmem".into()]).unwrap();
        assert_eq!(with_pmem.len(), DEFAULT.len() + RUN.len(), "pmem is a fragment of profile run");
    }

    #[test]
    fn a_full_disk_leaves_the_previous_image_unchanged() {
        let Some(disk) = SmallTmpfs::new(16) else {
            eprintln!("skipped: mounting a small tmpfs requires root");
            return;
        };
        let (root, out) = (tempfile::tempdir().unwrap(), disk.0.path().join("image"));
        fs::create_dir(&out).unwrap();
        fs::write(out.join("old"), "old").unwrap();
        fs::write(root.path().join("file"), "small").unwrap();
        let arguments = Arguments {
            root: Some(root.path().into()),
            root_type: Some(RootType::Erofs),
            ..Arguments::default()
        };
        // The tree grows after the survey, so that the check of the free space passes.
        let survey = Survey::of(root.path()).unwrap();
        fs::write(root.path().join("file"), vec![1; 32 << 20]).unwrap();
        let draft = Draft::beside(&out).unwrap();
        let init = root.path().join("init");
        fs::write(&init, "init").unwrap();
        let error = write_root(&arguments, Some(&survey), &init, draft.path());
        let text = format!("{:#}", error.unwrap_err());
        assert!(text.contains("No space left on device"), "{text}");
        drop(draft);
        let names = |folder: &Path| -> Vec<_> {
            fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name()).collect()
        };
        assert_eq!(names(disk.0.path()), ["image"]);
        assert_eq!(names(&out), ["old"]);
    }
}
