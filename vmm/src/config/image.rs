//! A bootable image: a folder with a kernel, a root filesystem and a description of both.

use super::{
    BootSource, Config, ConfigError, Devices, GuestConfig, InterruptControllers, MachineConfig,
    devices::RootFilesystem, json::read_bounded,
};
use crate::layout::VCPUS_MAX;
use hmac_sha256::Hash;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// File name of the description in an image's folder.
pub const DESCRIPTION: &str = "image.json";
/// Maximum size of a description in bytes; larger files are refused.
const DESCRIPTION_MAX: u64 = 1024 * 1024;

/// `image.json`: the files of an image, and what it was built from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Image {
    /// Version of the description: [`Self::FORMAT`].
    pub format: u32,
    /// Name of the image.
    pub name: String,
    /// The kernel.
    pub kernel: ImageFile,
    /// The initramfs: init, and the root filesystem if it is not a separate file.
    pub initrd: ImageFile,
    /// The root filesystem (EROFS), unless it is in the initramfs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub root: Option<ImageFile>,
    /// The configuration of the container image that the root filesystem was made from, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<Container>,
    /// The kernel command line.
    pub boot_args: String,
    /// Maximum number of vCPUs that the kernel supports. By default there is no limit other than that of a machine.
    #[serde(default = "default_vcpus_max")]
    pub vcpus_max: u8,
    /// Version of the kernel, such as 6.12.30.
    pub kernel_version: String,
    /// Origin of the kernel's source.
    pub kernel_source: String,
    /// SHA-256 of the composed kernel configuration.
    pub kernel_config_sha256: String,
    /// Names of the configuration fragments in the order of their composition.
    pub fragments: Vec<String>,
    /// Build tools and their versions.
    pub tools: BTreeMap<String, String>,
    /// Build time in seconds since 1970; always 0, so that builds are reproducible.
    pub build_time: u64,
}

const fn default_vcpus_max() -> u8 {
    VCPUS_MAX
}

/// The default process of a container image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Container {
    /// The image's id: the digest of its configuration.
    pub digest: String,
    /// Entrypoint and command.
    pub arguments: Vec<String>,
    /// Environment entries, `NAME=value`.
    pub environment: Vec<String>,
    /// Working directory.
    pub working_directory: String,
    /// User id.
    pub user_id: u32,
    /// Group id.
    pub group_id: u32,
    /// Supplementary group ids.
    pub groups: Vec<u32>,
}

impl Container {
    fn guest(&self) -> GuestConfig {
        let strings = |list: &[String]| list.iter().map(|text| text.clone().into_bytes()).collect();
        GuestConfig {
            arguments: strings(&self.arguments),
            environment: strings(&self.environment),
            working_directory: Some(self.working_directory.clone().into_bytes()),
            user_id: self.user_id,
            group_id: self.group_id,
            groups: self.groups.clone(),
            ..GuestConfig::default()
        }
    }
}

/// One file of an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageFile {
    /// File name in the image's folder.
    pub file: String,
    /// Size in bytes.
    pub size: u64,
    /// SHA-256 in 64 lower-case hexadecimal digits.
    pub sha256: String,
}

/// SHA-256 of an image's kernel and initramfs in 64 lower-case hexadecimal digits, from its description.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Digests {
    /// Digest of the kernel.
    pub kernel: String,
    /// Digest of the initramfs.
    pub initrd: String,
}

impl Image {
    /// Version of the description that this program reads and writes.
    pub const FORMAT: u32 = 1;

    /// Reads the description of the image in a folder, and compares the sizes of its files with it. Digests are checked
    /// by [`Self::verify`], which reads all files completely.
    ///
    /// # Errors
    /// When the description or a file is missing or invalid.
    pub fn open(directory: &Path) -> Result<Self, ConfigError> {
        let path = directory.join(DESCRIPTION);
        let text = read_bounded(&path, DESCRIPTION_MAX)?;
        let invalid = |message: String| ConfigError::Json { path: path.clone(), message };
        let image: Self = serde_json::from_slice(&text).map_err(|error| invalid(error.to_string()))?;
        if image.format != Self::FORMAT {
            return Err(invalid(format!(
                "its format is {}, this program reads {}",
                image.format,
                Self::FORMAT
            )));
        }
        for file in image.files() {
            if Path::new(&file.file).file_name() != Some(file.file.as_ref()) {
                return Err(invalid(format!(
                    "{:?} is not the name of a file in the image's folder",
                    file.file
                )));
            }
            if !is_sha256(&file.sha256) {
                let (digest, file) = (&file.sha256, &file.file);
                return Err(invalid(format!(
                    "{digest:?}, of {file}, is not a SHA-256: 64 hexadecimal digits"
                )));
            }
            let path = directory.join(&file.file);
            // Symbolic links could lead out of the folder, and device files have no size.
            let metadata = std::fs::symlink_metadata(&path)
                .map_err(|source| ConfigError::Read { path: path.clone(), source })?;
            if !metadata.is_file() {
                return Err(ConfigError::ImageFile { path, what: "it is not a regular file".into() });
            }
            let size = metadata.len();
            if size != file.size {
                let what = format!("it has {size} bytes instead of {}", file.size);
                return Err(ConfigError::ImageFile { path, what });
            }
        }
        Ok(image)
    }

    /// Compares the digests of the image's files with the description.
    ///
    /// # Errors
    /// Names the file that differs.
    pub fn verify(&self, directory: &Path) -> Result<(), ConfigError> {
        for file in self.files() {
            let path = directory.join(&file.file);
            let digest =
                sha256_of(&path).map_err(|source| ConfigError::Read { path: path.clone(), source })?;
            if digest != file.sha256 {
                let what = format!("its SHA-256 is {digest} instead of {}", file.sha256);
                return Err(ConfigError::ImageFile { path, what });
            }
        }
        Ok(())
    }

    /// All files of the image except for the description.
    fn files(&self) -> impl Iterator<Item = &ImageFile> {
        [&self.kernel, &self.initrd].into_iter().chain(&self.root)
    }

    /// A machine of the default size with this image, which is in `directory`.
    #[must_use]
    pub fn config(&self, directory: &Path) -> Config {
        let mut config = Config::new(self.boot_source(directory));
        config.devices.root = self.root.as_ref().map(|file| RootFilesystem::new(directory.join(&file.file)));
        config.guest = self.container.as_ref().map(Container::guest).unwrap_or_default();
        config
    }

    /// Kernel and initramfs of this image, which is in `directory`.
    #[must_use]
    pub fn boot_source(&self, directory: &Path) -> BootSource {
        let path = |file: &ImageFile| -> PathBuf { directory.join(&file.file) };
        BootSource {
            kernel_image_path: path(&self.kernel),
            initrd_path: Some(path(&self.initrd)),
            boot_args: self.boot_args.clone(),
            // The kernels of images read the MP table: the fragment kvm-guest enables it.
            interrupt_controllers: InterruptControllers::IoApic,
            vcpus_max: self.vcpus_max,
            image_digests: Some(Digests {
                kernel: self.kernel.sha256.clone(),
                initrd: self.initrd.sha256.clone(),
            }),
        }
    }

    /// The path of the pre-booted kernel of the image in `directory`, for a machine of this size with devices of these
    /// types.
    #[must_use]
    pub fn preboot_path(directory: &Path, machine: &MachineConfig, devices: &Devices) -> PathBuf {
        let kinds = devices.kinds();
        let dash = if kinds.is_empty() { "" } else { "-" };
        let name = format!("{}-{}{dash}{kinds}", machine.vcpu_count, machine.mem_size_mib);
        directory.join("preboot").join(name)
    }
}

/// SHA-256 of a file in hexadecimal digits.
///
/// # Errors
/// When the file cannot be read.
pub fn sha256_of(path: &Path) -> io::Result<String> {
    sha256_copying(File::open(path)?, io::sink())
}

/// SHA-256 of all bytes of a reader in hexadecimal digits. The bytes are also written to `copy`.
///
/// # Errors
/// When the reader or the writer fails.
pub(crate) fn sha256_copying(mut reader: impl Read, mut copy: impl io::Write) -> io::Result<String> {
    let mut digest = Hash::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match reader.read(&mut buffer)? {
            0 => break,
            length => {
                digest.update(&buffer[..length]);
                copy.write_all(&buffer[..length])?;
            }
        }
    }
    Ok(hexadecimal(&digest.finalize()))
}

/// Whether a text is a digest as written by this module. Digests are used as parts of paths.
#[must_use]
pub fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// SHA-256 of bytes in hexadecimal digits.
#[must_use]
pub fn sha256(bytes: &[u8]) -> String {
    hexadecimal(&Hash::hash(bytes))
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(directory: &Path) -> Image {
        let file = |name: &str, bytes: &[u8]| {
            std::fs::write(directory.join(name), bytes).unwrap();
            ImageFile { file: name.into(), size: bytes.len() as u64, sha256: sha256(bytes) }
        };
        Image {
            format: 1,
            name: "test".into(),
            kernel: file("vmlinux", b"kernel"),
            initrd: file("initrd", b""),
            root: None,
            container: None,
            boot_args: "quiet".into(),
            vcpus_max: 16,
            kernel_version: "6.12.0".into(),
            kernel_source: "test".into(),
            kernel_config_sha256: sha256(b""),
            fragments: vec![],
            tools: BTreeMap::new(),
            build_time: 0,
        }
    }

    fn save(directory: &Path, image: &Image) {
        std::fs::write(directory.join(DESCRIPTION), serde_json::to_vec(image).unwrap()).unwrap();
    }

    #[test]
    fn digests_are_sha256() {
        // FIPS 180-2, appendix B.1.
        assert_eq!(sha256(b"abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }

    #[test]
    fn an_image_is_opened_and_verified() {
        let directory = tempfile::tempdir().unwrap();
        let image = image(directory.path());
        save(directory.path(), &image);
        let opened = Image::open(directory.path()).unwrap();
        assert_eq!(opened, image);
        opened.verify(directory.path()).unwrap();
        let source = opened.boot_source(directory.path());
        assert_eq!(source.kernel_image_path, directory.path().join("vmlinux"));
        assert_eq!(source.boot_args, "quiet");
    }

    #[test]
    fn errors_name_changed_files() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        let image = image(path);
        save(path, &image);
        std::fs::write(path.join("vmlinux"), b"kernex").unwrap();
        let message = Image::open(path).unwrap().verify(path).unwrap_err().to_string();
        assert!(
            message.contains("vmlinux is not the file that image.json describes: its SHA-256 is"),
            "{message}"
        );
        std::fs::write(path.join("vmlinux"), b"longer than before").unwrap();
        let message = Image::open(path).unwrap_err().to_string();
        assert!(message.contains("it has 18 bytes instead of 6"), "{message}");
        std::fs::remove_file(path.join("vmlinux")).unwrap();
        std::os::unix::fs::symlink("/dev/zero", path.join("vmlinux")).unwrap();
        assert!(Image::open(path).unwrap_err().to_string().contains("it is not a regular file"));
        std::fs::remove_file(path.join("vmlinux")).unwrap();
        assert!(Image::open(path).unwrap_err().to_string().contains("cannot read"));
    }

    #[test]
    fn the_root_filesystem_is_verified_as_well() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        let mut image = image(path);
        let text = serde_json::to_string(&image).unwrap();
        assert!(!text.contains("root"), "it is omitted without one: {text}");
        assert_eq!(image.config(path).devices.root, None);
        std::fs::write(path.join("root.erofs"), b"root").unwrap();
        let file = ImageFile { file: "root.erofs".into(), size: 4, sha256: sha256(b"root") };
        image.root = Some(file.clone());
        save(path, &image);
        let opened = Image::open(path).unwrap();
        opened.verify(path).unwrap();
        assert_eq!(opened.config(path).devices.root, Some(RootFilesystem::new(path.join("root.erofs"))));
        std::fs::write(path.join("root.erofs"), b"tree").unwrap();
        let message = opened.verify(path).unwrap_err().to_string();
        assert!(
            message.contains("root.erofs is not the file that image.json describes: its SHA-256"),
            "{message}"
        );
        std::fs::write(path.join("root.erofs"), b"ro").unwrap();
        assert!(Image::open(path).unwrap_err().to_string().contains("it has 2 bytes instead of 4"));
        std::fs::remove_file(path.join("root.erofs")).unwrap();
        std::os::unix::fs::symlink("vmlinux", path.join("root.erofs")).unwrap();
        assert!(Image::open(path).unwrap_err().to_string().contains("it is not a regular file"));
        image.root = Some(ImageFile { file: "../root.erofs".into(), ..file });
        save(path, &image);
        assert!(Image::open(path).unwrap_err().to_string().contains("is not the name of a file"));
    }

    #[test]
    fn the_guest_runs_the_container_image_s_process() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        let mut image = image(path);
        assert_eq!(image.config(path).guest, GuestConfig::default());
        image.container = Some(Container {
            digest: "sha256:0".into(),
            arguments: vec!["sh".into(), "-c".into()],
            environment: vec!["A=b".into()],
            working_directory: "/srv".into(),
            user_id: 5,
            group_id: 6,
            groups: vec![7],
        });
        save(path, &image);
        let guest = Image::open(path).unwrap().config(path).guest;
        assert_eq!(guest.arguments, [&b"sh"[..], b"-c"]);
        assert_eq!((guest.environment, guest.working_directory), (vec![b"A=b".into()], Some(b"/srv".into())));
        assert_eq!((guest.user_id, guest.group_id, guest.groups), (5, 6, vec![7]));
    }

    #[test]
    fn invalid_descriptions_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        let good = image(path);
        type Change = fn(&mut Image);
        let cases: [(&str, Change); 8] = [
            ("of vmlinux, is not a SHA-256: 64 hexadecimal digits", |image| {
                image.kernel.sha256 = "../../x".into()
            }),
            ("of initrd, is not a SHA-256", |image| image.initrd.sha256 = String::new()),
            ("of vmlinux, is not a SHA-256", |image| image.kernel.sha256.make_ascii_uppercase()),
            ("of vmlinux, is not a SHA-256", |image| image.kernel.sha256 += "0"),
            ("its format is 2", |image| image.format = 2),
            ("\"../vmlinux\" is not the name of a file", |image| image.kernel.file = "../vmlinux".into()),
            ("\"/vmlinux\" is not the name of a file", |image| image.kernel.file = "/vmlinux".into()),
            ("\"\" is not the name of a file", |image| image.initrd.file = String::new()),
        ];
        for (expected, change) in cases {
            let mut image = good.clone();
            change(&mut image);
            save(path, &image);
            let message = Image::open(path).unwrap_err().to_string();
            assert!(message.contains(expected), "{message:?} should say {expected:?}");
        }
        std::fs::write(path.join(DESCRIPTION), "{\"format\": 1}").unwrap();
        assert!(Image::open(path).unwrap_err().to_string().contains("missing field `name`"));
    }
}
