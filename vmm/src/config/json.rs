//! Firecracker's configuration file.

use super::devices::{Balloon, Devices, Drive, Entropy, NetworkInterface, Pmem, Vsock};
use super::{BootSource, Config, ConfigError, MachineConfig};
use serde::Deserialize;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

/// A configuration file of more bytes than this is a mistake.
const FILE_MAX: u64 = 1024 * 1024;
/// More bytes than a description has that nobody wrote by hand.
const ORDINARY: usize = 2048;

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct ConfigFile {
    boot_source: BootSourceSection,
    #[serde(default)]
    machine_config: MachineSection,
    #[serde(default)]
    drives: Vec<Drive>,
    #[serde(default)]
    network_interfaces: Vec<NetworkInterface>,
    #[serde(default)]
    vsock: Option<Vsock>,
    #[serde(default)]
    entropy: Option<Entropy>,
    #[serde(default)]
    balloon: Option<Balloon>,
    #[serde(default)]
    pmem: Vec<Pmem>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct BootSourceSection {
    kernel_image_path: PathBuf,
    initrd_path: Option<PathBuf>,
    boot_args: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct MachineSection {
    vcpu_count: u64,
    mem_size_mib: u64,
    smt: bool,
    track_dirty_pages: bool,
    huge_pages: Option<String>,
    cpu_template: Option<String>,
}

impl Default for MachineSection {
    fn default() -> Self {
        let MachineConfig { vcpu_count, mem_size_mib } = MachineConfig::default();
        Self {
            vcpu_count: vcpu_count.into(),
            mem_size_mib,
            smt: false,
            track_dirty_pages: false,
            huge_pages: None,
            cpu_template: None,
        }
    }
}

/// Reads a file of Firecracker's `--config-file` format: boot source, machine and devices.
///
/// Paths in it are relative to the current directory, as they are for Firecracker. The console is
/// [`Console::Stdio`] and the payload is init's greeting; both can be changed in the result.
///
/// # Errors
/// Names the field that is unknown, of the wrong type, or asks for something that is not there.
pub fn from_json_file(path: &Path) -> Result<Config, ConfigError> {
    let text = read_bounded(path, FILE_MAX)?;
    let file: ConfigFile = serde_json::from_slice(&text)
        .map_err(|error| ConfigError::Json { path: path.into(), message: error.to_string() })?;
    let BootSourceSection { kernel_image_path, initrd_path, boot_args } = file.boot_source;
    let mut boot_source = BootSource { initrd_path, ..BootSource::kernel(kernel_image_path) };
    if let Some(line) = boot_args {
        boot_source.boot_args = line;
    }
    if let Some(root) = root_argument(&file.drives, &file.pmem) {
        // In front, because a line may end with arguments of init's.
        boot_source.boot_args.insert_str(0, &root);
    }
    let devices = Devices {
        drives: file.drives,
        network_interfaces: file.network_interfaces,
        vsock: file.vsock,
        entropy: file.entropy,
        balloon: file.balloon,
        pmem: file.pmem,
        shared_folders: Vec::new(),
        root: None,
    };
    Ok(Config { machine: machine(file.machine_config)?, devices, ..Config::new(boot_source) })
}

/// The words on the command line that name the root device, if one of the devices is it. The guest counts
/// drives in the order of the file.
fn root_argument(drives: &[Drive], pmem: &[Pmem]) -> Option<String> {
    let mode = |is_read_only: bool| if is_read_only { "ro" } else { "rw" };
    let drive = drives.iter().zip('a'..='z').find(|(drive, _)| drive.is_root_device);
    if let Some((drive, letter)) = drive {
        let device = match &drive.partuuid {
            Some(partition) => format!("PARTUUID={partition}"),
            None => format!("/dev/vd{letter}"),
        };
        return Some(format!("root={device} {} ", mode(drive.is_read_only)));
    }
    let (number, pmem) = pmem.iter().enumerate().find(|(_, pmem)| pmem.root_device)?;
    Some(format!("root=/dev/pmem{number} {} ", mode(pmem.read_only)))
}

fn machine(section: MachineSection) -> Result<MachineConfig, ConfigError> {
    let unsupported =
        |field, value: String, supported| Err(ConfigError::Unsupported { field, value, supported });
    if section.smt {
        return unsupported("machine-config.smt", "true".into(), "false");
    }
    if section.track_dirty_pages {
        return unsupported("machine-config.track_dirty_pages", "true".into(), "false");
    }
    if let Some(pages) = section.huge_pages.filter(|pages| pages != "None") {
        return unsupported("machine-config.huge_pages", pages, "\"None\"");
    }
    if let Some(template) = section.cpu_template.filter(|template| template != "None") {
        return unsupported("machine-config.cpu_template", template, "\"None\"");
    }
    let vcpu_count =
        u8::try_from(section.vcpu_count).map_err(|_| ConfigError::VcpuCount(section.vcpu_count))?;
    Ok(MachineConfig { vcpu_count, mem_size_mib: section.mem_size_mib })
}

/// Reads a file that must not be larger than `limit` bytes, whatever its metadata says.
pub(crate) fn read_bounded(path: &Path, limit: u64) -> Result<Vec<u8>, ConfigError> {
    let failed = |source| ConfigError::Read { path: path.into(), source };
    // Room for an ordinary description: a vector that grows while it is read costs a call each time.
    let mut bytes = Vec::with_capacity(ORDINARY);
    File::open(path).and_then(|file| file.take(limit + 1).read_to_end(&mut bytes)).map_err(failed)?;
    if bytes.len() as u64 > limit {
        return Err(ConfigError::FileTooLarge { path: path.into(), limit });
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Config, ConfigError> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vm.json");
        std::fs::write(&path, text).unwrap();
        from_json_file(&path)
    }

    #[test]
    fn a_file_of_firecrackers_is_read_as_it_is() {
        let config = read(
            r#"{
                "boot-source": {
                    "kernel_image_path": "vmlinux",
                    "boot_args": "console=ttyS0 reboot=k panic=1",
                    "initrd_path": null
                },
                "machine-config": {
                    "vcpu_count": 2, "mem_size_mib": 1024, "smt": false,
                    "track_dirty_pages": false, "huge_pages": "None"
                }
            }"#,
        )
        .unwrap();
        assert_eq!(config.boot_source.kernel_image_path, Path::new("vmlinux"));
        assert_eq!(config.boot_source.initrd_path, None);
        assert_eq!(config.boot_source.boot_args, "console=ttyS0 reboot=k panic=1");
        assert_eq!(config.machine, MachineConfig { vcpu_count: 2, mem_size_mib: 1024 });
    }

    #[test]
    fn what_is_left_out_has_defaults() {
        let config = read(r#"{"boot-source": {"kernel_image_path": "k"}}"#).unwrap();
        assert_eq!(config.boot_source, BootSource::kernel("k"));
        assert_eq!(config.machine, MachineConfig::default());
    }

    #[test]
    fn mistakes_are_named() {
        let machine = |text: &str| {
            format!(r#"{{"boot-source": {{"kernel_image_path": "k"}}, "machine-config": {text}}}"#)
        };
        let table = [
            (r#"{"boot-source": {"kernel_image_path": "k"}, "drivez": []}"#.into(), "unknown field `drivez`"),
            (r#"{"boot-source": {"kernel": "k"}}"#.into(), "unknown field `kernel`"),
            (r#"{"machine-config": {}}"#.into(), "missing field `boot-source`"),
            (r#"{"boot-source": {}}"#.into(), "missing field `kernel_image_path`"),
            (r#"{"boot-source": {"kernel_image_path": 7}}"#.into(), "invalid type: integer `7`"),
            (machine(r#"{"vcpu_count": "2"}"#), "invalid type: string \"2\""),
            (machine(r#"{"vcpu_count": -1}"#), "invalid value: integer `-1`"),
            (machine(r#"{"vcpu_count": 10000}"#), "vcpu_count is 10000"),
            (machine(r#"{"vcpu_count": 2, "vcpu_count": 3}"#), "duplicate field `vcpu_count`"),
            (machine(r#"{"mem_size_mib": 1.5}"#), "invalid type: floating point"),
            (machine(r#"{"mem_size_mib": 99999999999999999999}"#), "invalid type: floating point"),
            (machine(r#"{"smt": true}"#), "machine-config.smt = true is not supported"),
            (machine(r#"{"huge_pages": "2M"}"#), "machine-config.huge_pages = 2M"),
            (machine(r#"{"cpu_template": "T2"}"#), "machine-config.cpu_template = T2"),
            (String::new(), "EOF while parsing"),
            ("[".repeat(100_000), "invalid type: sequence"),
            (format!("{{\"boot-source\": {}", "{\"kernel_image_path\":".repeat(10_000)), "invalid type: map"),
            ("\u{0}".into(), "expected value at line 1 column 1"),
        ];
        for (text, expected) in table {
            let message = read(&text).unwrap_err().to_string();
            assert!(message.contains(expected), "{message:?} should say {expected:?}");
        }
    }

    #[test]
    fn ten_mebibytes_of_json_are_not_read() {
        let error = read(&" ".repeat(10 << 20)).unwrap_err();
        assert!(matches!(error, ConfigError::FileTooLarge { limit: FILE_MAX, .. }));
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = from_json_file(Path::new("/nonexistent/vm.json")).unwrap_err();
        assert_eq!(error.to_string(), "cannot read /nonexistent/vm.json");
    }
}
