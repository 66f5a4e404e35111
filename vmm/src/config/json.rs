//! Firecracker's configuration file format.

use super::devices::{Balloon, Devices, Drive, Entropy, NetworkInterface, Pmem, TokenBucket, Vsock};
use super::null::null_is_default;
use super::{BootSource, Config, ConfigError, Console, MachineConfig};
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

/// Maximum size of a configuration file in bytes; larger files are refused.
const FILE_MAX: u64 = 1024 * 1024;
/// Initial buffer size in bytes, which is sufficient for most files.
const INITIAL_CAPACITY: usize = 2048;

/// The file. As in Firecracker, a null section counts as absent, an unknown field is an error, and an unknown section
/// is not.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct ConfigFile {
    boot_source: BootSourceSection,
    #[serde(default, deserialize_with = "null_is_default")]
    machine_config: MachineSection,
    #[serde(default, deserialize_with = "null_is_default")]
    drives: Vec<Drive>,
    #[serde(default, deserialize_with = "null_is_default")]
    network_interfaces: Vec<NetworkInterface>,
    vsock: Option<Vsock>,
    entropy: Option<Entropy>,
    balloon: Option<Balloon>,
    #[serde(default, deserialize_with = "null_is_default")]
    pmem: Vec<Pmem>,
    /// The path of a CPU template, or the template.
    cpu_config: Option<Value>,
    logger: Option<Map<String, Value>>,
    metrics: Option<Map<String, Value>>,
    mmds_config: Option<Map<String, Value>>,
    memory_hotplug: Option<Map<String, Value>>,
    #[serde(default, deserialize_with = "null_is_default")]
    serial: SerialSection,
    #[serde(flatten)]
    unknown: BTreeMap<String, IgnoredAny>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct BootSourceSection {
    kernel_image_path: PathBuf,
    initrd_path: Option<PathBuf>,
    boot_args: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct MachineSection {
    vcpu_count: Option<u64>,
    mem_size_mib: Option<u64>,
    smt: Option<bool>,
    /// The name of `smt` in files of Firecracker before 1.0.
    ht_enabled: Option<bool>,
    track_dirty_pages: Option<bool>,
    huge_pages: Option<HugePages>,
    cpu_template: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct SerialSection {
    serial_out_path: Option<PathBuf>,
    rate_limiter: Option<TokenBucket>,
}

#[derive(Clone, Copy, Deserialize, PartialEq, Eq)]
enum HugePages {
    None,
    Transparent,
    #[serde(rename = "2M")]
    Hugetlbfs,
}

/// A parsed configuration file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileConfig {
    /// The machine.
    pub config: Config,
    /// One line per field that has no effect, with the names of file and field.
    pub warnings: Vec<String>,
}

/// Reads a file of Firecracker's `--config-file` format.
///
/// Paths in it are relative to the current directory, as with Firecracker. The console is the file of the section `serial`,
/// by default [`Console::Stdio`], and the payload is init's greeting; both can be changed in the result.
///
/// # Errors
/// When the file cannot be read or parsed, or a value is not supported; the message names the field.
pub fn from_json_file(path: &Path) -> Result<FileConfig, ConfigError> {
    let text = read_bounded(path, FILE_MAX)?;
    let mut file: ConfigFile = serde_json::from_slice(&text)
        .map_err(|error| ConfigError::Json { path: path.into(), message: error.to_string() })?;
    let warnings = warnings(&file).map(|warning| format!("{}: {warning}", path.display())).collect();
    let machine = machine(&file)?;
    // The root device is the first drive in the guest, regardless of its position in the file.
    file.drives.sort_by_key(|drive| !drive.is_root_device);
    let BootSourceSection { kernel_image_path, initrd_path, boot_args } = file.boot_source;
    let mut boot_source = BootSource { initrd_path, ..BootSource::kernel(kernel_image_path) };
    if let Some(line) = boot_args {
        boot_source.boot_args = line;
    }
    if let Some(root) = root_argument(&file.drives, &file.pmem) {
        // At the start, because the end of the line may be arguments of init.
        boot_source.boot_args.insert_str(0, &root);
    }
    let devices = Devices {
        drives: file.drives,
        network_interfaces: file.network_interfaces,
        vsock: file.vsock,
        entropy: file.entropy,
        balloon: file.balloon,
        pmem: file.pmem,
        ..Devices::default()
    };
    let console = file.serial.serial_out_path.map_or(Console::Stdio, Console::File);
    Ok(FileConfig { config: Config { machine, console, devices, ..Config::new(boot_source) }, warnings })
}

/// The kernel parameters that select the root device, if one of the devices is it. Drives are named in their order.
fn root_argument(drives: &[Drive], pmem: &[Pmem]) -> Option<String> {
    let mode = |is_read_only: bool| if is_read_only { "ro" } else { "rw" };
    if let Some((number, drive)) = drives.iter().enumerate().find(|(_, drive)| drive.is_root_device) {
        let device = match &drive.partuuid {
            Some(partition) => format!("PARTUUID={partition}"),
            None => Devices::drive_name(number),
        };
        return Some(format!("root={device} {} ", mode(drive.is_read_only)));
    }
    let (number, pmem) = pmem.iter().enumerate().find(|(_, pmem)| pmem.root_device)?;
    Some(format!("root=/dev/pmem{number} {} ", mode(pmem.read_only)))
}

fn machine(file: &ConfigFile) -> Result<MachineConfig, ConfigError> {
    let section = &file.machine_config;
    let unsupported =
        |field, value: String, supported| Err(ConfigError::Unsupported { field, value, supported });
    // A CPU template can hide a processor feature for security, so that it cannot be ignored.
    if let Some(template) = section.cpu_template.as_ref().filter(|template| *template != "None") {
        return unsupported("machine-config.cpu_template", template.clone(), "\"None\"");
    }
    if let Some(template) = file.cpu_config.as_ref().filter(|value| !is_empty(value)) {
        let path = template.as_str().map_or_else(|| "{...}".to_owned(), str::to_owned);
        return unsupported("cpu-config", path, "null");
    }
    let MachineConfig { vcpu_count, mem_size_mib } = MachineConfig::default();
    let asked = section.vcpu_count.unwrap_or(vcpu_count.into());
    let vcpu_count = u8::try_from(asked).map_err(|_| ConfigError::VcpuCount(asked))?;
    Ok(MachineConfig { vcpu_count, mem_size_mib: section.mem_size_mib.unwrap_or(mem_size_mib) })
}

/// Whether a value is empty: null, or a list or object that contains only empty values.
fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(values) => values.iter().all(is_empty),
        Value::Object(fields) => fields.values().all(is_empty),
        _ => false,
    }
}

/// One line per field that can be ignored without harm to the guest, but does not have the effect that the user
/// expects.
fn warnings(file: &ConfigFile) -> impl Iterator<Item = String> {
    let machine = &file.machine_config;
    let has = |section: &Option<Map<String, Value>>| {
        section.as_ref().is_some_and(|fields| !fields.values().all(is_empty))
    };
    let limits_pmem = |pmem: &Pmem| pmem.rate_limiter.is_some_and(|limiter| limiter.is_limit());
    let forwards_mmds = |card: &NetworkInterface| card.allow_mmds_requests == Some(true);
    let no_snapshots = "there are no snapshots that dirty pages would be tracked for";
    let no_threads = "each vCPU is a separate core with one thread";
    let no_mmds = "there is no metadata service";
    let table = [
        ("machine-config.smt", machine.smt == Some(true), no_threads),
        ("machine-config.ht_enabled", machine.ht_enabled == Some(true), no_threads),
        ("machine-config.track_dirty_pages", machine.track_dirty_pages == Some(true), no_snapshots),
        (
            "machine-config.huge_pages",
            machine.huge_pages == Some(HugePages::Hugetlbfs),
            "the guest's memory has transparent huge pages, which need no hugetlbfs",
        ),
        (
            "balloon.free_page_hinting",
            file.balloon.is_some_and(|balloon| balloon.free_page_hinting),
            "there are no hinting runs; free_page_reporting returns free memory",
        ),
        ("pmem.rate_limiter", file.pmem.iter().any(limits_pmem), "flushes of pmem devices are not limited"),
        (
            "network-interfaces.allow_mmds_requests",
            file.network_interfaces.iter().any(forwards_mmds),
            no_mmds,
        ),
        ("mmds-config", has(&file.mmds_config), no_mmds),
        ("logger", has(&file.logger), "there is no log; errors and warnings go to standard error"),
        (
            "metrics",
            has(&file.metrics),
            "there are no metrics; the report of a boot has the time of each step",
        ),
        ("memory-hotplug", has(&file.memory_hotplug), "a guest's memory does not grow"),
        (
            "serial.rate_limiter",
            file.serial.rate_limiter.is_some_and(|limiter| limiter.is_limit()),
            "a console's output is not limited in its rate; a file keeps its end",
        ),
    ];
    let known = table.into_iter().filter(|(_, is_asked, _)| *is_asked);
    let known = known.map(|(field, _, what)| format!("{field} has no effect: {what}"));
    let unknown = file.unknown.keys().map(|name| format!("{name} has no effect: no section has this name"));
    known.chain(unknown)
}

/// Reads a file of at most `limit` bytes, regardless of its metadata.
pub(crate) fn read_bounded(path: &Path, limit: u64) -> Result<Vec<u8>, ConfigError> {
    let failed = |source| ConfigError::Read { path: path.into(), source };
    // The initial capacity avoids repeated reallocations and reads for most files.
    let mut bytes = Vec::with_capacity(INITIAL_CAPACITY);
    File::open(path).and_then(|file| file.take(limit + 1).read_to_end(&mut bytes)).map_err(failed)?;
    if bytes.len() as u64 > limit {
        return Err(ConfigError::FileTooLarge { path: path.into(), limit });
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_file(text: &str) -> Result<FileConfig, ConfigError> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vm.json");
        std::fs::write(&path, text).unwrap();
        from_json_file(&path)
    }

    fn read(text: &str) -> Result<Config, ConfigError> {
        let FileConfig { config, warnings } = read_file(text)?;
        assert_eq!(warnings, [""; 0]);
        Ok(config)
    }

    /// A file with these sections in addition to its boot source.
    fn with(sections: &str) -> String {
        format!(r#"{{"boot-source": {{"kernel_image_path": "k"}}, {sections}}}"#)
    }

    #[test]
    fn a_firecracker_file_is_accepted_unchanged() {
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
    fn absent_fields_have_defaults() {
        let config = read(r#"{"boot-source": {"kernel_image_path": "k"}}"#).unwrap();
        assert_eq!(config.boot_source, BootSource::kernel("k"));
        assert_eq!(config.machine, MachineConfig::default());
    }

    #[test]
    fn null_is_absent_everywhere() {
        let config = read(
            r#"{
                "boot-source": { "kernel_image_path": "k", "initrd_path": null, "boot_args": null },
                "machine-config": {
                    "vcpu_count": null, "mem_size_mib": null, "smt": null, "ht_enabled": null,
                    "track_dirty_pages": null, "huge_pages": null, "cpu_template": null
                },
                "drives": [{
                    "drive_id": "d", "path_on_host": "f", "is_root_device": null, "is_read_only": null,
                    "partuuid": null, "cache_type": null, "io_engine": null, "rate_limiter": null,
                    "direct": null, "socket": null
                }],
                "network-interfaces": [{
                    "iface_id": "n", "host_dev_name": "tap", "guest_mac": null, "mtu": null, "guest_ip": null,
                    "gateway": null, "nameserver": null, "allow_mmds_requests": null,
                    "rx_rate_limiter": { "bandwidth": null, "ops": null }, "tx_rate_limiter": null
                }],
                "vsock": { "guest_cid": 3, "uds_path": "v", "vsock_id": null },
                "entropy": { "rate_limiter": null },
                "balloon": {
                    "amount_mib": null, "deflate_on_oom": null, "stats_polling_interval_s": null,
                    "free_page_reporting": null, "free_page_hinting": null
                },
                "pmem": [{
                    "id": "p", "path_on_host": "f", "root_device": null, "read_only": null, "rate_limiter": null
                }]
            }"#,
        )
        .unwrap();
        assert_eq!(config.boot_source, BootSource::kernel("k"));
        assert_eq!(config.machine, MachineConfig::default());
        assert_eq!(config.devices.drives, [Drive::new("d", "f")]);
        let limiter = Some(super::super::devices::RateLimiter::default());
        let card = NetworkInterface { rx_rate_limiter: limiter, ..NetworkInterface::new("n", "tap") };
        assert_eq!(config.devices.network_interfaces, [card]);
        assert_eq!(config.devices.entropy, Some(Entropy::default()));
        assert_eq!(config.devices.balloon, Some(Balloon::default()));
        config.devices.validate(128).unwrap();

        let sections = r#""machine-config": null, "drives": null, "network-interfaces": null, "vsock": null,
            "entropy": null, "balloon": null, "pmem": null, "cpu-config": null, "logger": null, "metrics": null,
            "mmds-config": null, "memory-hotplug": null, "serial": null"#;
        assert_eq!(read(&with(sections)).unwrap(), Config::new(BootSource::kernel("k")));
    }

    #[test]
    fn values_without_effect_are_accepted_silently() {
        let machine = r#""machine-config": {
            "vcpu_count": 1, "mem_size_mib": 128, "smt": false, "ht_enabled": false, "track_dirty_pages": false,
            "huge_pages": "Transparent", "cpu_template": "None"
        }, "balloon": { "amount_mib": 0, "free_page_hinting": false }, "cpu-config": { "cpuid_modifiers": [] },
        "logger": {}, "pmem": [{ "id": "p", "path_on_host": "f", "rate_limiter": {
            "ops": { "size": 0, "refill_time": 100 }, "bandwidth": { "size": 5, "refill_time": 0 }
        } }]"#;
        read(&with(machine)).unwrap().devices.validate(128).unwrap();
    }

    #[test]
    fn ignored_values_cause_a_warning_that_names_the_field() {
        let pmem = r#""pmem": [{ "id": "p", "path_on_host": "f", "rate_limiter": {
            "ops": { "size": 1, "refill_time": 1 } } }]"#;
        let card = r#""network-interfaces": [
            { "iface_id": "n", "host_dev_name": "t", "allow_mmds_requests": true }]"#;
        for (sections, field) in [
            (r#""machine-config": { "smt": true }"#, "machine-config.smt"),
            (r#""machine-config": { "ht_enabled": true }"#, "machine-config.ht_enabled"),
            (r#""machine-config": { "track_dirty_pages": true }"#, "machine-config.track_dirty_pages"),
            (r#""machine-config": { "huge_pages": "2M" }"#, "machine-config.huge_pages"),
            (r#""balloon": { "free_page_hinting": true }"#, "balloon.free_page_hinting"),
            (pmem, "pmem.rate_limiter"),
            (card, "network-interfaces.allow_mmds_requests"),
            (r#""mmds-config": { "network_interfaces": ["n"] }"#, "mmds-config"),
            (r#""logger": { "log_path": "log" }"#, "logger"),
            (r#""metrics": { "metrics_path": "metrics" }"#, "metrics"),
            (r#""memory-hotplug": { "total_size_mib": 1024 }"#, "memory-hotplug"),
            (
                r#""serial": { "rate_limiter": { "size": 1, "one_time_burst": 2, "refill_time": 1 } }"#,
                "serial.rate_limiter",
            ),
            (r#""drivez": [{ "a": [1, null, "x"] }]"#, "drivez"),
        ] {
            let FileConfig { config, warnings } = read_file(&with(sections)).unwrap();
            config.devices.validate(128).unwrap();
            let [warning] = &warnings[..] else { panic!("{sections}: {warnings:?}") };
            assert!(warning.contains(&format!("/vm.json: {field} has no effect: ")), "{warning}");
        }
    }

    #[test]
    fn the_console_can_be_a_file() {
        let config = read(&with(r#""serial": { "serial_out_path": "out", "rate_limiter": null }"#)).unwrap();
        assert_eq!(config.console, Console::File("out".into()));
        for section in ["null", "{}", r#"{ "serial_out_path": null }"#] {
            let config = read(&with(&format!(r#""serial": {section}"#))).unwrap();
            assert_eq!(config.console, Console::Stdio, "{section}");
        }
        assert!(read(&with(r#""serial": { "path": "out" }"#)).unwrap_err().to_string().contains("`path`"));
    }

    #[test]
    fn the_root_drive_is_the_first_disk() {
        let drives = r#""drives": [
            { "drive_id": "a", "path_on_host": "f" }, { "drive_id": "b", "path_on_host": "f" },
            { "drive_id": "root", "path_on_host": "f", "is_root_device": true, "is_read_only": true }
        ]"#;
        let config = read(&with(drives)).unwrap();
        let ids: Vec<_> = config.devices.drives.iter().map(|drive| &*drive.drive_id).collect();
        assert_eq!(ids, ["root", "a", "b"]);
        assert!(config.boot_source.boot_args.starts_with("root=/dev/vda ro "), "{:?}", config.boot_source);
    }

    #[test]
    fn errors_name_invalid_devices() {
        let drive = |fields: &str| format!(r#""drives": [{{ "drive_id": "d"{fields} }}]"#);
        let two_roots = r#""drives": [{ "drive_id": "d", "path_on_host": "f", "is_root_device": true }],
            "pmem": [{ "id": "p", "path_on_host": "f", "root_device": true }]"#;
        for (sections, expected) in [
            (drive(r#", "socket": "s""#), "drives.socket = s is not supported"),
            (drive(""), "drive d has no path_on_host"),
            (drive(r#", "path_on_host": null"#), "drive d has no path_on_host"),
            (two_roots.to_owned(), "d and p are both the root device"),
        ] {
            let error = read(&with(&sections)).unwrap().devices.validate(128).unwrap_err().to_string();
            assert!(error.contains(expected), "{sections}: {error}");
        }
    }

    #[test]
    fn errors_name_the_mistake() {
        let machine = |text: &str| {
            format!(r#"{{"boot-source": {{"kernel_image_path": "k"}}, "machine-config": {text}}}"#)
        };
        let table = [
            (r#"{"boot-source": {"kernel": "k"}}"#.into(), "unknown field `kernel`"),
            (r#"{"machine-config": {}}"#.into(), "missing field `boot-source`"),
            (r#"{"boot-source": {}}"#.into(), "missing field `kernel_image_path`"),
            (r#"{"boot-source": {"kernel_image_path": 7}}"#.into(), "invalid type: integer `7`"),
            (machine(r#"{"vcpu_count": "2"}"#), "invalid type: string \"2\""),
            (machine(r#"{"vcpu_count": -1}"#), "invalid value: integer `-1`"),
            (machine(r#"{"vcpu_count": 10000}"#), "number of vCPUs (vcpu_count) is 10000"),
            (machine(r#"{"vcpu_count": 2, "vcpu_count": 3}"#), "duplicate field `vcpu_count`"),
            (machine(r#"{"mem_size_mib": 1.5}"#), "invalid type: floating point"),
            (machine(r#"{"mem_size_mib": 99999999999999999999}"#), "invalid type: floating point"),
            (machine(r#"{"huge_pages": "1G"}"#), "unknown variant `1G`"),
            (machine(r#"{"threads": 2}"#), "unknown field `threads`"),
            (r#"{"boot-source": null}"#.into(), "invalid type: null"),
            (with(r#""cpu-config": "template.json""#), "cpu-config = template.json is not supported"),
            (with(r#""cpu-config": {"cpuid_modifiers": [{"leaf": "0x1"}]}"#), "cpu-config = {...}"),
            (with(r#""logger": 7"#), "invalid type: integer `7`, expected a map"),
            (with(r#""drives": [null]"#), "invalid type: null"),
            (with(r#""drives": {}"#), "invalid type: map"),
            (with(r#""vsock": {"guest_cid": 3}"#), "missing field `uds_path`"),
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
    fn the_error_names_a_missing_file() {
        let error = from_json_file(Path::new("/nonexistent/vm.json")).unwrap_err();
        assert_eq!(error.to_string(), "cannot read /nonexistent/vm.json");
    }
}
