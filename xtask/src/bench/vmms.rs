//! The monitors that are compared, and their command lines for the same guest.

use super::payload;
use super::plan::Case;
use super::run::Console;
use anyhow::{Context, Result};
use guest_protocol::DEFAULT_COMMAND_LINE;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A monitor.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub(super) struct Vmm {
    /// The name in reports.
    pub(super) name: String,
    /// The syntax of its arguments.
    pub(super) kind: Kind,
    /// The path of its program.
    pub(super) path: PathBuf,
    /// The image of its guests, if it differs from [`Guest::image`].
    pub(super) image: Option<PathBuf>,
}

/// The kind of a monitor, which determines its arguments.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub(super) enum Kind {
    /// Kindling.
    Kindling,
    /// Kindling, started from a pre-booted kernel.
    Prebooted,
    /// QEMU with its microvm machine.
    Qemu,
    /// Firecracker, or a monitor with its configuration file.
    Firecracker,
}

impl Kind {
    /// The kind of a monitor that the user named: another build of Kindling, or one like Firecracker.
    pub(super) fn of(name: &str) -> Self {
        if name.starts_with("kindling") { Self::Kindling } else { Self::Firecracker }
    }
}

/// The guest of every monitor: the same kernel and initramfs.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct Guest {
    /// The kernel.
    pub(super) kernel: PathBuf,
    /// The initramfs.
    pub(super) initrd: PathBuf,
    /// The image of both; `None` if the user chose another kernel.
    pub(super) image: Option<PathBuf>,
}

/// Devices of a guest in addition to its console.
#[derive(Clone, Debug, Default)]
pub(super) struct Devices {
    /// The raw file of its disk.
    pub(super) disk: Option<PathBuf>,
    /// The tap device of its network card.
    pub(super) tap: Option<String>,
    /// The Unix socket of its vsock device; QEMU uses the kernel's vhost-vsock instead.
    pub(super) vsock: Option<PathBuf>,
    /// Whether it has an entropy device.
    pub(super) entropy: bool,
    /// Whether it has a balloon with free page reporting.
    pub(super) balloon: bool,
}

/// The task of init.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Task {
    /// Prints its greeting.
    Greet,
    /// Runs the payload, which prints its line.
    Print,
    /// Runs the payload, which waits for a byte.
    Wait,
    /// Runs the payload that exercises devices, with `count` repetitions, or that measures free page reporting.
    Operate { count: u32, reports: bool },
}

impl Task {
    fn payload(self) -> Vec<String> {
        match self {
            Self::Greet => Vec::new(),
            Self::Print => vec![payload::PATH.to_owned()],
            Self::Wait => vec![payload::PATH.to_owned(), payload::WAIT.to_owned()],
            Self::Operate { count, reports } => {
                let reports = reports.then(|| io_payload::REPORTS.to_owned());
                [payload::IO_PATH.to_owned(), count.to_string()].into_iter().chain(reports).collect()
            }
        }
    }

    /// The console output that shows that the task was reached.
    pub(super) const fn text(self) -> &'static str {
        match self {
            Self::Greet => "Hello from Kindling",
            Self::Print | Self::Wait => payload::TEXT,
            Self::Operate { .. } => io_payload::END,
        }
    }
}

impl Kind {
    /// Whether it is Kindling, which writes boot reports.
    pub(super) const fn is_kindling(self) -> bool {
        matches!(self, Self::Kindling | Self::Prebooted)
    }
}

impl Vmm {
    /// The command that pre-boots the kernel for guests of this size with these devices, for monitors that support it.
    pub(super) fn preboot(&self, guest: &Guest, case: Case, devices: &Devices) -> Option<Command> {
        let image = guest.image.as_ref().filter(|_| self.kind == Kind::Prebooted)?;
        let mut command = Command::new(&self.path);
        command.arg("preboot").arg("--image").arg(image);
        command.args(["--memory", &case.memory_mib.to_string(), "--vcpus", &case.vcpus.to_string()]);
        kindling_devices(&mut command, devices);
        Some(command)
    }

    /// The QEMU command that boots a guest in which `cat` echoes a port of a virtio console. The monitor creates a Unix
    /// socket for the port and boots the guest once it has been connected.
    pub(super) fn console_command(&self, console: &Console, case: Case, socket: &Path) -> Command {
        let mut command = Command::new(&self.path);
        qemu_machine(&mut command, case);
        command.args(["-serial", "null", "-kernel"]).arg(&console.kernel).arg("-initrd").arg(&console.initrd);
        let socket = socket.display();
        command.args(["-chardev", &format!("socket,id=port,path={socket},server=on,wait=on")]);
        command.args(["-device", "virtio-serial-device,bus=virtio-mmio-bus.0"]);
        command.args(["-device", "virtserialport,chardev=port,name=port"]);
        let words = " virtio_mmio.device=512@0xfeb00000:5 -- /bin/sh -c cat<>/dev/vport0p1>&0";
        command.args(["-append", &(command_line(Kind::Qemu, Task::Greet, "") + words)]);
        command
    }

    /// The command that boots the guest. Configuration files of the monitor are written into `scratch`; Kindling writes
    /// its report to `report`.
    pub(super) fn command(
        &self,
        guest: &Guest,
        case: Case,
        task: Task,
        devices: &Devices,
        scratch: &Path,
        report: Option<&Path>,
    ) -> Result<Command> {
        let mut command = Command::new(&self.path);
        match self.kind {
            Kind::Kindling | Kind::Prebooted => kindling(&mut command, guest, case, task, devices, report),
            Kind::Qemu => qemu(&mut command, guest, case, task, devices),
            Kind::Firecracker => {
                let file = scratch.join("firecracker.json");
                std::fs::write(&file, firecracker_configuration(guest, case, task, devices).to_string())
                    .with_context(|| format!("cannot write {}", file.display()))?;
                command.args(["--no-api", "--config-file"]).arg(file);
            }
        }
        Ok(command)
    }
}

fn kindling(
    command: &mut Command,
    guest: &Guest,
    case: Case,
    task: Task,
    devices: &Devices,
    report: Option<&Path>,
) {
    command.arg("boot");
    match &guest.image {
        Some(image) => command.arg("--image").arg(image),
        None => command.arg("--kernel").arg(&guest.kernel).arg("--initrd").arg(&guest.initrd),
    };
    command.args(["--memory", &case.memory_mib.to_string(), "--vcpus", &case.vcpus.to_string()]);
    if let Some(report) = report {
        command.arg("--report-json").arg(report);
    }
    kindling_devices(command, devices);
    if !task.payload().is_empty() {
        command.arg("--").args(task.payload());
    }
}

fn kindling_devices(command: &mut Command, devices: &Devices) {
    if let Some(disk) = &devices.disk {
        command.arg("--drive").arg(disk);
    }
    if let Some(tap) = &devices.tap {
        command.arg("--net").arg(tap);
    }
    if let Some(path) = &devices.vsock {
        command.arg("--vsock").arg(path);
    }
    if devices.entropy {
        command.arg("--entropy");
    }
    if devices.balloon {
        command.args(["--balloon", "0"]);
    }
}

/// The fastest configuration of QEMU: no device that the guest does not need, no ACPI tables, no option ROM, interrupt
/// controllers in KVM (20 % faster to the end than its default, the split irqchip; exact lab), the
/// kernel loaded by qboot, and shutdown by a triple fault, as docs/system/i386/microvm.rst advises.
fn qemu_machine(command: &mut Command, case: Case) {
    let machine = "microvm,accel=kvm,kernel-irqchip=on,acpi=off,pic=off,pit=off,rtc=off,isa-serial=on,x-option-roms=off,\
                   auto-kernel-cmdline=off";
    command.args(["-machine", machine, "-cpu", "host"]);
    command.args(["-m", &case.memory_mib.to_string(), "-smp", &case.vcpus.to_string()]);
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
}

/// The disk uses Linux native AIO without an I/O thread, which takes the fewest instructions of QEMU's options
/// (compared with aio=threads and aio=io_uring, each with cache=none, with and without an I/O thread; exact lab).
fn qemu(command: &mut Command, guest: &Guest, case: Case, task: Task, devices: &Devices) {
    qemu_machine(command, case);
    command.args(["-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"]);
    command.arg("-kernel").arg(&guest.kernel).arg("-initrd").arg(&guest.initrd);
    let mut words = String::new();
    if let Some(disk) = &devices.disk {
        let disk = disk.display();
        command.args(["-drive", &format!("if=none,id=disk,format=raw,cache=none,aio=native,file={disk}")]);
        command.args(["-device", "virtio-blk-device,drive=disk,bus=virtio-mmio-bus.0"]);
        // The first virtio-mmio slot (hw/i386/microvm.c); without ACPI tables the command line describes it.
        words += " virtio_mmio.device=512@0xfeb00000:5";
    }
    if let Some(tap) = &devices.tap {
        command.args(["-netdev", &format!("tap,id=card,ifname={tap},script=no,downscript=no")]);
        command.args(["-device", "virtio-net-device,netdev=card,bus=virtio-mmio-bus.1"]);
        words += " virtio_mmio.device=512@0xfeb00200:6";
    }
    if devices.vsock.is_some() {
        command.args(["-device", "vhost-vsock-device,guest-cid=3,bus=virtio-mmio-bus.2"]);
        words += " virtio_mmio.device=512@0xfeb00400:7";
    }
    if devices.entropy {
        command.args(["-device", "virtio-rng-device,bus=virtio-mmio-bus.3"]);
        words += " virtio_mmio.device=512@0xfeb00600:8";
    }
    if devices.balloon {
        command.args(["-device", "virtio-balloon-device,free-page-reporting=on,bus=virtio-mmio-bus.4"]);
        words += " virtio_mmio.device=512@0xfeb00800:9";
    }
    command.args(["-append", &command_line(Kind::Qemu, task, &words)]);
}

/// The configuration file for Firecracker.
fn firecracker_configuration(guest: &Guest, case: Case, task: Task, devices: &Devices) -> serde_json::Value {
    let drive = |path: &PathBuf| {
        serde_json::json!({
            "drive_id": "disk", "path_on_host": path, "is_root_device": false, "is_read_only": false,
        })
    };
    let mut configuration = serde_json::json!({
        "boot-source": {
            "kernel_image_path": guest.kernel,
            "initrd_path": guest.initrd,
            "boot_args": command_line(Kind::Firecracker, task, ""),
        },
        "drives": devices.disk.iter().map(drive).collect::<Vec<_>>(),
        "machine-config": { "vcpu_count": case.vcpus, "mem_size_mib": case.memory_mib },
    });
    if let Some(tap) = &devices.tap {
        configuration["network-interfaces"] =
            serde_json::json!([{ "iface_id": "card", "host_dev_name": tap }]);
    }
    if let Some(path) = &devices.vsock {
        configuration["vsock"] = serde_json::json!({ "guest_cid": 3, "uds_path": path });
    }
    if devices.entropy {
        configuration["entropy"] = serde_json::json!({});
    }
    if devices.balloon {
        configuration["balloon"] = serde_json::json!({
            "amount_mib": 0, "deflate_on_oom": true, "free_page_reporting": true,
        });
    }
    configuration
}

/// The kernel command line for other monitors, from which init takes its payload. Firecracker exits at a reset through
/// the keyboard controller, QEMU's microvm at a triple fault.
fn command_line(kind: Kind, task: Task, words: &str) -> String {
    let mut line = match kind {
        Kind::Qemu => DEFAULT_COMMAND_LINE.replace("reboot=k", "reboot=t"),
        Kind::Kindling | Kind::Prebooted | Kind::Firecracker => DEFAULT_COMMAND_LINE.to_owned(),
    };
    line += words;
    if !task.payload().is_empty() {
        line += " -- ";
        line += &task.payload().join(" ");
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guest() -> Guest {
        Guest { kernel: "/k".into(), initrd: "/i".into(), image: None }
    }
    const CASE: Case = Case { memory_mib: 256, vcpus: 2 };

    #[test]
    fn firecracker_is_configured_by_a_file() {
        let scratch = tempfile::tempdir().unwrap();
        let vmm = Vmm { name: "fc".into(), kind: Kind::of("fc"), path: "/fc".into(), image: None };
        let command =
            vmm.command(&guest(), CASE, Task::Wait, &Devices::default(), scratch.path(), None).unwrap();
        let file = scratch.path().join("firecracker.json");
        let arguments: Vec<_> = command.get_args().collect();
        assert_eq!(arguments, ["--no-api".as_ref(), "--config-file".as_ref(), file.as_os_str()]);
        let written: serde_json::Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
        assert_eq!(written["boot-source"]["kernel_image_path"], "/k");
        assert_eq!(written["boot-source"]["initrd_path"], "/i");
        assert_eq!(written["machine-config"]["vcpu_count"], 2);
        assert_eq!(written["machine-config"]["mem_size_mib"], 256);
        let line = written["boot-source"]["boot_args"].as_str().unwrap();
        assert!(line.starts_with("console=ttyS0 quiet reboot=k "), "{line}");
        assert!(line.ends_with(" -- /bin/payload wait"), "{line}");
    }

    #[test]
    fn qemu_boots_the_same_guest_and_shuts_down_by_a_triple_fault() {
        let vmm = Vmm { name: "q".into(), kind: Kind::Qemu, path: "/q".into(), image: None };
        let none = Devices::default();
        let command = vmm.command(&guest(), CASE, Task::Greet, &none, Path::new("/"), None).unwrap();
        let words: Vec<_> = command.get_args().map(|word| word.to_string_lossy()).collect();
        let after = |option: &str| &*words[words.iter().position(|word| word == option).unwrap() + 1];
        assert_eq!((after("-m"), after("-smp")), ("256", "2"));
        assert_eq!((after("-kernel"), after("-initrd")), ("/k", "/i"));
        assert!(after("-append").contains(" reboot=t "), "{words:?}");
        assert!(!after("-append").contains(" -- "), "{words:?}");
    }

    #[test]
    fn the_kind_of_a_monitor_follows_from_its_name() {
        assert_eq!(Kind::of("kindling-before"), Kind::Kindling);
        assert_eq!(Kind::of("firecracker"), Kind::Firecracker);
        assert_eq!(Kind::of("anything"), Kind::Firecracker);
    }
}
