//! Containers for comparison with `kindling run`: the same programs on the same root filesystems in crun, runc and
//! bubblewrap, of Debian's packages, and without a container.

use super::metric::Metric;
use super::payload;
use super::plan::{Case, Sample};
use super::process;
use super::run::READY;
use crate::debian;
use crate::output::write;
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

/// The programs, and Debian's packages of them.
const PROGRAMS: [(&str, &str, &str); 3] = [
    ("crun", "crun", "usr/bin/crun"),
    ("runc", "runc", "usr/sbin/runc"),
    ("bwrap", "bubblewrap", "usr/bin/bwrap"),
];
/// Debian's packages of their shared libraries, apart from the C library.
const LIBRARIES: [&str; 11] = [
    "libyajl2",
    "libseccomp2",
    "libcap2",
    "libsystemd0",
    "liblzma5",
    "libzstd1",
    "liblz4-1",
    "libgcrypt20",
    "libgpg-error0",
    "libselinux1",
    "libpcre2-8-0",
];
/// crun without a cgroup, as `kindling run` has none by default.
const NO_CGROUP: &str = "crun, no cgroup";
/// The directories of libraries in packages.
const LIBRARY_FOLDERS: [&str; 2] = ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"];

/// The files of containers.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct Containers {
    /// A directory with the programs, and `lib` with their libraries.
    pub(super) programs: PathBuf,
    /// The root filesystem with busybox.
    pub(super) busybox: PathBuf,
    /// The root filesystem with the small static program.
    pub(super) hello: PathBuf,
}

impl Containers {
    /// Collects the programs in a folder, with the root filesystems that container images were made of.
    pub(super) fn make(folder: &Path, busybox: &Path, hello: &Path) -> Result<Self> {
        let programs = folder.join("containers");
        let libraries = programs.join("lib");
        fs::create_dir_all(&libraries)?;
        for (name, package, path) in PROGRAMS {
            let program = debian::unpacked(package)?.join(path);
            fs::copy(&program, programs.join(name)).with_context(|| format!("no {}", program.display()))?;
        }
        for package in LIBRARIES {
            let unpacked = debian::unpacked(package)?;
            for folder in
                LIBRARY_FOLDERS.map(|folder| unpacked.join(folder)).iter().filter(|path| path.is_dir())
            {
                for entry in fs::read_dir(folder)? {
                    let path = entry?.path();
                    // Links are copied as files of their names.
                    if path.is_file() {
                        fs::copy(&path, libraries.join(path.file_name().unwrap_or_default()))?;
                    }
                }
            }
        }
        // Bubblewrap does not create them in a read-only root.
        for root in [busybox, hello] {
            for name in ["dev", "proc"] {
                fs::create_dir_all(root.join(name))?;
            }
        }
        Ok(Self { programs, busybox: busybox.to_owned(), hello: hello.to_owned() })
    }

    /// The same files elsewhere.
    pub(super) fn map(&self, mut relocate: impl FnMut(&Path, &str) -> PathBuf) -> Self {
        Self {
            programs: relocate(&self.programs, "containers"),
            busybox: relocate(&self.busybox, "busybox-root"),
            hello: relocate(&self.hello, "hello-root"),
        }
    }

    /// The program with the most libraries.
    pub(super) fn crun(&self) -> PathBuf {
        self.programs.join("crun")
    }

    /// Measures each container with each program.
    pub(super) fn measure(&self, case: Case, runs: u32, scratch: &Path) -> Result<Vec<Sample>> {
        let mut samples = Vec::new();
        for name in ["crun", NO_CGROUP, "runc", "bubblewrap", "no container"] {
            eprintln!("measuring {name} ...");
            for (metric, root, arguments, text) in [
                (Metric::RunHello, &self.hello, &[payload::PATH][..], payload::TEXT),
                (Metric::RunBusybox, &self.busybox, &["/bin/busybox", "echo", READY], READY),
            ] {
                // The first run is a warm-up.
                for run in 0..=runs {
                    thread::sleep(super::measure::SETTLE);
                    let command = self.command(name, root, arguments, scratch)?;
                    let result = process::run(command, text, super::measure::LIMIT, |_| Ok(()))?;
                    let value = result.ended.since(result.spawned);
                    if run > 0 {
                        samples.push(Sample { vmm: name.to_owned(), case, metric, value });
                    }
                }
            }
        }
        Ok(samples)
    }

    /// The command that runs a program with a root filesystem.
    fn command(&self, name: &str, root: &Path, arguments: &[&str], scratch: &Path) -> Result<Command> {
        let mut command = match name {
            "no container" => {
                let mut command = Command::new(root.join(arguments[0].trim_start_matches('/')));
                command.args(&arguments[1..]);
                return Ok(command);
            }
            "bubblewrap" => {
                let mut command = Command::new(self.programs.join("bwrap"));
                command.arg("--ro-bind").arg(root).args(["/", "--proc", "/proc", "--dev", "/dev"]);
                command.args(["--unshare-all", "--die-with-parent"]).args(arguments);
                command
            }
            _ => {
                let runtime = if name == "runc" { "runc" } else { "crun" };
                let bundle = scratch.join("bundle");
                fs::create_dir_all(&bundle)?;
                write(&bundle.join("config.json"), &configuration(root, arguments).to_string())?;
                let mut command = Command::new(self.programs.join(runtime));
                command.args((name == NO_CGROUP).then_some("--cgroup-manager=disabled"));
                command.arg("--root").arg(scratch.join("containers")).args(["run", "--bundle"]);
                command.arg(bundle).arg("bench");
                command
            }
        };
        command.env("LD_LIBRARY_PATH", self.programs.join("lib"));
        Ok(command)
    }
}

/// The configuration that `crun spec` and `runc spec` write, for a program without a terminal.
fn configuration(root: &Path, arguments: &[&str]) -> serde_json::Value {
    let capabilities = ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"];
    let namespaces = ["pid", "network", "ipc", "uts", "cgroup", "mount"].map(|kind| json!({ "type": kind }));
    let mount = |destination: &str, kind: &str, options: &[&str]| json!({ "destination": destination, "type": kind, "source": kind, "options": options });
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": false,
            "user": { "uid": 0, "gid": 0 },
            "args": arguments,
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
            "cwd": "/",
            "capabilities": {
                "bounding": capabilities, "effective": capabilities, "permitted": capabilities,
            },
            "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024 }],
            "noNewPrivileges": true,
        },
        "root": { "path": root, "readonly": true },
        "hostname": "bench",
        "mounts": [
            mount("/proc", "proc", &[]),
            mount("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount("/dev/pts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]),
            mount("/dev/shm", "tmpfs", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
            mount("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
            mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
            mount("/sys/fs/cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", "ro"]),
        ],
        "linux": {
            "resources": { "devices": [{ "allow": false, "access": "rwm" }] },
            "namespaces": namespaces,
            "maskedPaths": [
                "/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
                "/proc/timer_stats", "/proc/sched_debug", "/sys/firmware", "/proc/scsi",
            ],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    })
}
