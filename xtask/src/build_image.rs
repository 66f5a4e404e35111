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

/// What an image's kernel is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Profile {
    /// For `kindling run`, which starts guests from a pre-booted kernel: complete
    Run,
    /// For `kindling boot`: what costs a boot time is left out
    Boot,
}

impl Profile {
    /// The fragments of its kernel.
    pub(crate) fn fragments(self) -> Vec<&'static str> {
        match self {
            Self::Run => [&DEFAULT[..], &RUN].concat(),
            Self::Boot => DEFAULT.to_vec(),
        }
    }

    /// What an image is called that has no other name.
    pub(crate) const fn image_name(self) -> &'static str {
        match self {
            Self::Run => "run",
            Self::Boot => "default",
        }
    }
}

#[derive(Args, Debug)]
pub(crate) struct Arguments {
    /// What the kernel is for
    #[arg(long, value_enum, default_value = "boot")]
    pub(crate) profile: Profile,
    /// Name of the image [default: default, or run with --profile run]
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Kernel configuration to add: a file, or the name of an optional fragment: pmem, uniprocessor, sysfs,
    /// container, netfilter, hardening, mitigations, paravirt-spinlocks, debug;
    /// may be repeated
    #[arg(long, value_name = "FILE|NAME")]
    pub(crate) config_fragment: Vec<PathBuf>,
    /// Program to use as /init instead of Kindling's
    #[arg(long, value_name = "FILE")]
    pub(crate) init: Option<PathBuf>,
    /// Folder whose content becomes the root filesystem
    #[arg(long, value_name = "DIR")]
    pub(crate) root: Option<PathBuf>,
    /// Container image that becomes the root filesystem, and whose command the guest runs: an OCI layout, an archive of
    /// `docker save`, or a registry's name
    #[arg(long, value_name = "OCI", conflicts_with_all = ["root", "init"])]
    pub(crate) from: Option<String>,
    /// Where it is kept when it is converted, instead of the user's cache
    #[arg(skip)]
    pub(crate) from_cache: Option<PathBuf>,
    /// What the root filesystem is [default: an initramfs up to 3 MiB, EROFS above]
    #[arg(long, value_enum, requires = "root")]
    pub(crate) root_type: Option<RootType>,
    /// Keep the users and groups that own the files of --root; otherwise root owns them
    #[arg(long, requires = "root")]
    pub(crate) keep_owners: bool,
    /// Kernel command line instead of the default
    #[arg(long, value_name = "TEXT")]
    pub(crate) cmdline: Option<String>,
    /// Kernel source: a folder or a tarball, instead of Debian's package
    #[arg(long, value_name = "DIR|TARBALL")]
    pub(crate) kernel_source: Option<PathBuf>,
    /// Folder to make [default: target/images/NAME]
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

/// Files of an image beside its kernel and description.
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

/// Builds the image and says where it is.
pub(crate) fn run(arguments: &Arguments) -> Result<u8> {
    let directory = build(arguments)?;
    println!("{}", directory.display());
    Ok(0)
}

/// Builds the image unless it is there and made from the same inputs; returns its folder.
pub(crate) fn build(arguments: &Arguments) -> Result<PathBuf> {
    Ok(build_with_kernel(arguments)?.0)
}

/// Builds the image of a profile, with nothing of the user's in it.
pub(crate) fn of_profile(profile: Profile) -> Result<PathBuf> {
    build(&Arguments { profile, ..Arguments::default() })
}

/// Builds an image, and tells where its kernel came from.
pub(crate) fn build_with_kernel(arguments: &Arguments) -> Result<(PathBuf, Kernel)> {
    let fragments = fragments(arguments.profile, &arguments.config_fragment)?;
    build_of(arguments, &kernel::source(arguments.kernel_source.as_deref())?, &fragments)
}

/// The same with a kernel of these fragments.
pub(crate) fn build_of(
    arguments: &Arguments,
    source: &kernel::Source,
    fragments: &[Fragment],
) -> Result<(PathBuf, Kernel)> {
    let out = match &arguments.out {
        Some(path) => std::path::absolute(path)?,
        None => cargo::target_directory().join("images").join(arguments.image_name()),
    };
    // A root that cannot be one is named before a kernel is built for it.
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
    // A copy, not a link: what somebody does to an image must not change the cache.
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
        container: prepared.map(container::Prepared::into_container),
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

/// The fragments of a profile, and those that were asked for: a file, or the name of a shipped one.
pub(crate) fn fragments(profile: Profile, extra: &[PathBuf]) -> Result<Vec<Fragment>> {
    let mut fragments = shipped_named(&profile.fragments())?;
    for path in extra {
        let name = path.to_string_lossy();
        let fragment = if path.components().count() == 1 && !path.exists() {
            shipped_named(&[&*name])
                .map(|mut found| found.remove(0))
                .with_context(|| format!("{name} is neither a file nor a fragment"))?
        } else {
            Fragment::read(path)?
        };
        // The profile may have it.
        if !fragments.contains(&fragment) {
            fragments.push(fragment);
        }
    }
    Ok(fragments)
}

/// Writes the root filesystem in the form that was asked for or suits it. Where it is EROFS, the version of the
/// tool that made it; the initramfs has init alone then.
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
    // An init of the user's own finds its files where it always found them, unless he says otherwise.
    let usual = if arguments.init.is_some() { RootType::Initramfs } else { survey.root_type() };
    let keep_owners = arguments.keep_owners;
    match arguments.root_type.unwrap_or(usual) {
        RootType::Initramfs => {
            if let Some(reason) = survey.beyond_initramfs() {
                eprintln!("warning: {reason}, which an initramfs cannot hold; --root-type erofs can");
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

/// An initramfs with init, and what lies below a folder.
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

/// Where the default image is, relative to the workspace, for messages.
pub(crate) fn relative(path: &Path) -> String {
    path.strip_prefix(host::workspace()).unwrap_or(path).display().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

    /// A filesystem in memory of so many MiB, at a folder of its own; nothing for users who are not root.
    struct SmallDisk(tempfile::TempDir);

    impl SmallDisk {
        fn new(mib: u64) -> Option<Self> {
            let place = tempfile::tempdir().unwrap();
            let size = std::ffi::CString::new(format!("size={mib}m")).unwrap();
            mount("none", place.path(), "tmpfs", MountFlags::empty(), &*size).ok()?;
            Some(Self(place))
        }
    }

    impl Drop for SmallDisk {
        fn drop(&mut self) {
            let _ = unmount(self.0.path(), UnmountFlags::DETACH);
        }
    }

    #[test]
    fn a_profile_names_the_image_and_its_fragments() {
        let run = Arguments { profile: Profile::Run, ..Arguments::default() };
        assert_eq!((run.image_name(), Arguments::default().image_name()), ("run", "default"));
        assert_eq!(Arguments { name: Some("x".to_owned()), ..run }.image_name(), "x");
        let names = |profile| -> Vec<_> {
            fragments(profile, &[]).unwrap().into_iter().map(|fragment| fragment.name).collect()
        };
        assert_eq!(names(Profile::Boot), DEFAULT);
        assert_eq!(names(Profile::Run), [&DEFAULT[..], &RUN].concat());
        let with_pmem = fragments(Profile::Run, &["pmem".into()]).unwrap();
        assert_eq!(with_pmem.len(), DEFAULT.len() + RUN.len(), "pmem is one of them");
    }

    #[test]
    fn a_disk_that_becomes_full_leaves_the_image_as_it_was() {
        let Some(disk) = SmallDisk::new(16) else {
            eprintln!("not tested: only root can make a small filesystem");
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
        // Somebody fills the tree when its size is known already, so that nothing refuses it before it is written.
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
