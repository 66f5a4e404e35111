//! The launch of a guest: its options, the configuration that they result in, its monitor, and its pre-booted kernel.

mod inherited;
mod limits;
mod program;
mod spare;
pub(crate) mod start;

pub use kindling_vmm::Error as MachineError;
pub use kindling_vmm::control::{Failure, Monitor};
pub use kindling_vmm::jail::{CgroupError, Jail, OnRefusal, Strictness};
pub use limits::Limits;
pub use program::spawn_monitor;
pub use spare::NextSpare;
pub use start::preboot;
pub(crate) use start::{Launch, MachineEnd, StartObserver, Started, end_of};

use crate::environment::{self, EnvironmentError};
use crate::guest::origin::Origin;
use crate::guest::{GuestDir, GuestError, GuestRecord, Payload};
use crate::image::{ImageError, Prepared};
use crate::kernel::{self, KernelError};
use crate::mount::{self, MountError, MountRequest, Source};
use crate::network::{self, NetworkError};
use crate::signal;
use crate::template::{Template, TemplateError};
use crate::volume::{self, VolumeError};
use guest_protocol::agent::TerminalSize;
use kindling_vmm::config::devices::{NetworkInterface, RootAccess, RootFilesystem, Vsock};
use kindling_vmm::config::{Config, ConfigError, Console, GuestConfig, MachineConfig};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

const SIGTERM: u8 = 15;
/// The lowest CID of a guest. All guests can use it, because each vsock device has a separate Unix socket.
const GUEST_CID: u32 = 3;

/// An error of the start of a guest.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LaunchError {
    /// The image cannot be used.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// There is no usable guest kernel.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The guest's directory cannot be created or used.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// The configuration of the machine is invalid, or its resources cannot be opened.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The monitor could not build or start the machine.
    #[error("{}", .0.message)]
    Monitor(Failure),
    /// The guest ended, or did not respond, before its agent accepted processes.
    #[error("the guest did not start: {0}")]
    Ended(String),
    /// `kindling-vmm`, the monitor, cannot be executed.
    #[error("cannot run kindling-vmm; install it in the same directory as kindling")]
    NoMonitor(#[source] std::io::Error),
    /// A mount is invalid.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// A network card or a published port is invalid.
    #[error(transparent)]
    NetworkOption(#[from] NetworkError),
    /// A volume cannot be used.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// Other users could change the pre-booted kernels.
    #[error("cannot use the directory of pre-booted kernels")]
    Cache(#[from] trusted_path::Error),
    /// An environment file is invalid.
    #[error(transparent)]
    Environment(#[from] EnvironmentError),
    /// Ports are published, and the network is `none`.
    #[error("--publish needs a network; use --net user instead of --net none")]
    NoNetwork,
    /// A network of docker that does not exist here: `host`, `bridge` or `default`.
    #[error(
        "unsupported network {0:?}: use --net user for outgoing connections, and --publish for incoming ones"
    )]
    Network(OsString),
    /// The monitor cannot be limited by a cgroup.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The network is limited, and the guest has none.
    #[error("--net-bps needs a network: --net user, or a tap device")]
    NothingToLimit,
    /// Neither the image nor the user names a command.
    #[error("the image has no command; give one after the image")]
    NoCommand,
    /// The template cannot be used.
    #[error(transparent)]
    Template(Box<TemplateError>),
    /// An operation of the host failed.
    #[error("the host refused to {0}")]
    Host(&'static str, #[source] std::io::Error),
}

impl From<TemplateError> for LaunchError {
    fn from(error: TemplateError) -> Self {
        Self::Template(error.into())
    }
}

impl From<ConfigError> for LaunchError {
    fn from(error: ConfigError) -> Self {
        Self::Machine(error.into())
    }
}

impl LaunchError {
    /// Returns whether the request is at fault, rather than the host.
    #[must_use]
    pub fn is_user_error(&self) -> bool {
        match self {
            Self::Machine(error) => error.is_user_error(),
            Self::Monitor(failure) => failure.is_user_error,
            Self::Host(..) | Self::Ended(_) | Self::Image(ImageError::Failed(_)) => false,
            Self::Cgroup(error) => error.is_user_error(),
            Self::Guest(error) => error.is_user_error(),
            Self::Volume(error) => error.is_user_error(),
            Self::Template(error) => error.is_user_error(),
            _ => true,
        }
    }

    /// Returns whether KVM cannot be used, which `kindling doctor` explains.
    #[must_use]
    pub const fn is_kvm_error(&self) -> bool {
        match self {
            Self::Machine(error) => matches!(error, MachineError::Kvm(_)),
            Self::Monitor(failure) => failure.is_kvm_error,
            _ => false,
        }
    }
}

/// Options of a new guest. Text has the syntax of `docker run`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LaunchOptions {
    /// Image, as the user wrote it, for the guest's record.
    pub image: OsString,
    /// Whether the guest runs a command and ends with it. Otherwise it runs until it is stopped.
    pub has_payload: bool,
    /// Command and arguments. Defaults to the image's.
    pub command: Vec<OsString>,
    /// Entrypoint. Defaults to the image's; empty for none.
    pub entrypoint: Option<OsString>,
    /// Environment variables: `NAME=VALUE`, or `NAME` for the value that the calling process has.
    pub env: Vec<OsString>,
    /// Files with such variables, one a line. Those of [`env`](Self::env) override them.
    pub env_files: Vec<PathBuf>,
    /// Working directory of the command. Defaults to the image's.
    pub working_directory: Option<OsString>,
    /// Hostname. Defaults to the guest's name.
    pub hostname: Option<OsString>,
    /// Initial size of the command's terminal. Without one, the streams are pipes.
    pub terminal: Option<TerminalSize>,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Number of vCPUs, 1 to 16.
    pub vcpus: u64,
    /// Network: `none`, `user` or a tap device, with the options of [`network::interface`]. Defaults to `user` if ports are
    /// published, and to `none` otherwise.
    pub network: Option<OsString>,
    /// Published ports, with the syntax of [`network::publish_all`].
    pub publish: Vec<OsString>,
    /// Volumes and folders of the host: `NAME:/GUEST` or `/HOST:/GUEST`, followed by `:ro` for a read-only mount.
    pub volumes: Vec<OsString>,
    /// Whether the root filesystem is mounted read-only.
    pub is_root_read_only: bool,
    /// Whether the guest boots its kernel even if there is a pre-booted one.
    pub is_cold: bool,
    /// Whether the guest's directory remains after the end of the guest, until it is removed.
    pub is_kept: bool,
    /// The template that the guest is a copy of. Memory, vCPUs and devices are the template's.
    pub template: Option<Template>,
    /// Whether the guest is a snapshot that continues, with its own command.
    pub continues: bool,
    /// Whether the guest gets a spare monitor if there is one, and leaves another for the next guest.
    pub uses_spares: bool,
    /// Limits beyond memory and vCPUs.
    pub limits: Limits,
    /// Directory of an existing cgroup in which the monitor gets one of its own, with limits of memory and threads.
    pub cgroup_parent: Option<PathBuf>,
    /// The jail of the monitor.
    pub jail: Jail,
}

/// Configuration and record of a guest that is ready to start.
struct Plan {
    config: Config,
    record: GuestRecord,
}

impl LaunchOptions {
    /// Returns the configuration and the record of a guest with a prepared image. Creates missing volumes.
    fn plan(&self, directory: &GuestDir, prepared: &Prepared) -> Result<Plan, LaunchError> {
        let mounts = mount::parse_all(&self.volumes)?;
        let config = match &self.template {
            Some(template) => self.config_of_copy(template, directory, prepared)?,
            None => self.config(directory, prepared, &mounts)?,
        };
        let record = self.record(&config, prepared, &mounts);
        Ok(Plan { config, record })
    }

    fn config(
        &self,
        directory: &GuestDir,
        prepared: &Prepared,
        mounts: &[MountRequest],
    ) -> Result<Config, LaunchError> {
        let (kernel, image) = kernel::open_image()?;
        let mut config = image.config(&kernel);
        let vcpu_count = u8::try_from(self.vcpus).map_err(|_| ConfigError::VcpuCount(self.vcpus))?;
        config.machine = MachineConfig { vcpu_count, mem_size_mib: self.memory_mib };
        config.console = Console::Null;
        config.jail = self.jail;
        let has_memory_devices = image.fragments.iter().any(|fragment| fragment == "pmem");
        config.devices.root = Some(self.root(&prepared.rootfs, has_memory_devices));
        config.devices.network_interfaces.extend(self.interface()?);
        network::publish_all(&self.publish, &mut config.devices)?;
        config.devices.vsock = Some(vsock(directory));
        config.guest = self.guest(directory, prepared)?;
        for request in mounts {
            match &request.source {
                Source::Volume(name) => {
                    let disk = volume::for_guest(name, request.is_read_only)?;
                    mount::add_volume(&mut config, disk, request);
                }
                Source::Folder(path) => mount::add_folder(&mut config, path, request),
            }
        }
        self.limits.apply(&mut config);
        config.validate()?;
        if !self.is_cold {
            config.preboot = kernel::preboot_path(&config)?;
        }
        Ok(config)
    }

    /// The configuration of a copy of a template.
    fn config_of_copy(
        &self,
        template: &Template,
        directory: &GuestDir,
        prepared: &Prepared,
    ) -> Result<Config, LaunchError> {
        self.forbid_in_template()?;
        let asks_for_network =
            !self.publish.is_empty() || self.network.as_ref().is_some_and(|network| network != "none");
        if asks_for_network && !template.has_network() {
            return Err(
                TemplateError::Fixed("--net or --publish", "it was created without --net user").into()
            );
        }
        if template.has_network() && self.network.as_ref().is_some_and(|network| network != "user") {
            return Err(TemplateError::Fixed("--net", "it was created with --net user").into());
        }
        let mut config = template.config()?;
        network::publish_all(&self.publish, &mut config.devices)?;
        config.jail = self.jail;
        config.devices.vsock = Some(vsock(directory));
        config.guest = self.guest(directory, prepared)?;
        config.validate()?;
        Ok(config)
    }

    /// Refuses what neither the guest of a template nor its copies can have.
    pub(crate) fn forbid_in_template(&self) -> Result<(), LaunchError> {
        let limits = Limits { cpu_millis: None, ..self.limits };
        let all = [
            (!self.volumes.is_empty(), "--volume", "`kindling cp` copies files into a guest"),
            (
                self.network.as_ref().is_some_and(|network| !is_user_network(network)),
                "--net TAP",
                "it may have --net user",
            ),
            (self.is_root_read_only, "--read-only", "its root filesystem is writable"),
            (self.is_cold, "--cold", "its kernel runs already"),
            (
                limits != Limits::default(),
                "--pids-limit, --disk-bps, --disk-iops or --net-bps",
                "it has none",
            ),
        ];
        match all.into_iter().find(|(is_given, ..)| *is_given) {
            Some((_, option, reason)) => Err(TemplateError::Fixed(option, reason).into()),
            None => Ok(()),
        }
    }

    /// The root filesystem: in memory, if the kernel can do that, unless it is large, its use is limited, or its file is on a
    /// filesystem of a network or of a program. If such a file cannot be read, a guest gets an error from a disk; one that has it
    /// as memory would wait.
    fn root(&self, path: &Path, has_memory_devices: bool) -> RootFilesystem {
        let mut root = RootFilesystem::new(path);
        let length = std::fs::metadata(path).ok().filter(std::fs::Metadata::is_file).map(|file| file.len());
        let is_limited = self.limits.disk_bandwidth.is_some() || self.limits.disk_operations.is_some();
        if let Some(length) = length.filter(|_| has_memory_devices && !is_limited && is_local(path)) {
            root.access = RootAccess::for_file(length, self.memory_mib.saturating_mul(1 << 20));
        }
        root
    }

    /// Locks the assignment of ports if ports are published.
    fn lock_ports(&self, directory: &GuestDir) -> Result<Option<File>, LaunchError> {
        let parent = directory.folder().parent().filter(|_| !self.publish.is_empty());
        let lock = parent.map(network::lock_ports).transpose();
        Ok(lock.map_err(|source| LaunchError::Host("lock the assignment of ports", source))?.flatten())
    }

    fn interface(&self) -> Result<Option<NetworkInterface>, LaunchError> {
        let network = match &self.network {
            None if self.publish.is_empty() => return self.no_interface(),
            None => OsStr::new("user"),
            Some(network) if network == "none" && self.publish.is_empty() => return self.no_interface(),
            Some(network) if network == "none" => return Err(LaunchError::NoNetwork),
            Some(network) if ["host", "bridge", "default"].iter().any(|name| network == name) => {
                return Err(LaunchError::Network(network.clone()));
            }
            Some(network) => network,
        };
        Ok(Some(network::interface(network, 0)?))
    }

    const fn no_interface(&self) -> Result<Option<NetworkInterface>, LaunchError> {
        if self.limits.network_bandwidth.is_some() { Err(LaunchError::NothingToLimit) } else { Ok(None) }
    }

    /// The configuration for init: command, environment, user, hostname.
    fn guest(&self, directory: &GuestDir, prepared: &Prepared) -> Result<GuestConfig, LaunchError> {
        let defaults = &prepared.config;
        let strings = |list: &[String]| list.iter().map(|text| text.clone().into_bytes()).collect::<Vec<_>>();
        let entrypoint = match &self.entrypoint {
            Some(program) if program.is_empty() => Vec::new(),
            Some(program) => vec![program.as_bytes().to_vec()],
            None => strings(&defaults.entrypoint),
        };
        let command = if !self.command.is_empty() {
            self.command.iter().map(|word| word.as_bytes().to_vec()).collect()
        } else if self.entrypoint.is_some() {
            Vec::new()
        } else {
            strings(&defaults.cmd)
        };
        let has_command = self.has_payload && !self.continues;
        let arguments = if has_command { [entrypoint, command].concat() } else { Vec::new() };
        if arguments.is_empty() && has_command {
            return Err(LaunchError::NoCommand);
        }
        let mut environment = strings(&defaults.env);
        environment::set_all(&mut environment, &self.env_files, &self.env)?;
        let name = self.hostname.clone().unwrap_or_else(|| directory.name().into());
        let mut default = |entry: String| {
            let name = entry.split_inclusive('=').next().unwrap_or_default().as_bytes().to_vec();
            if !environment.iter().any(|given| given.starts_with(&name)) {
                environment.push(entry.into_bytes());
            }
        };
        if let Some(home) = &defaults.user.home {
            default(format!("HOME={home}"));
        }
        default(format!("HOSTNAME={}", name.to_string_lossy()));
        if self.terminal.is_some() {
            default(format!("TERM={}", std::env::var("TERM").unwrap_or_else(|_| "xterm".to_owned())));
        }
        let workdir = self.working_directory.as_ref().map(|directory| directory.as_bytes().to_vec());
        let image_workdir =
            Some(defaults.working_dir.clone().into_bytes()).filter(|directory| !directory.is_empty());
        Ok(GuestConfig {
            arguments,
            environment,
            working_directory: workdir.or(image_workdir),
            hostname: Some(name.as_bytes().to_vec()),
            user_id: defaults.user.uid,
            group_id: defaults.user.gid,
            groups: defaults.user.groups.clone(),
            terminal: self.terminal,
            agent: true,
            is_root_read_only: self.is_root_read_only,
            ..GuestConfig::default()
        })
    }

    /// The record of the guest, for commands that find it by its name.
    fn record(&self, config: &Config, prepared: &Prepared, mounts: &[MountRequest]) -> GuestRecord {
        let stop_signal = prepared.config.stop_signal.as_deref().and_then(|name| signal::parse(name).ok());
        let text = |bytes: &Vec<u8>| String::from_utf8_lossy(bytes).into_owned();
        let since_1970 = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let can_be_saved = self.forbid_in_template().is_ok();
        let record = GuestRecord {
            image: self.image.to_string_lossy().into_owned(),
            directory: std::env::current_dir().unwrap_or_default(),
            command: config.guest.arguments.iter().map(text).collect(),
            payload: Payload {
                environment: config.guest.environment.iter().map(text).collect(),
                working_directory: config.guest.working_directory.as_ref().map(text),
                user: prepared.config.user.clone(),
            },
            started: since_1970.map_or(0, |time| time.as_secs()),
            memory_mib: config.machine.mem_size_mib,
            vcpus: config.machine.vcpu_count,
            stop_signal: stop_signal.unwrap_or(SIGTERM),
            is_embedded: !self.has_payload,
            is_kept: self.is_kept,
            volumes: mounts.iter().filter_map(MountRequest::volume).map(str::to_owned).collect(),
            ports: config.devices.network_interfaces.iter().flat_map(|card| card.forwards.clone()).collect(),
            status: None,
            origin: can_be_saved.then(|| Origin::new(config, prepared).to_text()).flatten(),
        };
        match self.template.as_ref().filter(|_| self.continues).and_then(Template::guest_record) {
            Some(GuestRecord { command, payload, stop_signal, .. }) => GuestRecord {
                command: command.clone(),
                payload: payload.clone(),
                stop_signal: *stop_signal,
                ..record
            },
            None => record,
        }
    }
}

/// Whether the value of `--net` is `none`, or user-mode networking.
fn is_user_network(network: &OsStr) -> bool {
    network == "none" || network.as_bytes().split(|&byte| byte == b',').next() == Some(b"user")
}

/// The vsock of a guest, over which its agent is reached.
fn vsock(directory: &GuestDir) -> Vsock {
    Vsock { guest_cid: GUEST_CID, uds_path: directory.socket(), vsock_id: None }
}

/// Whether a file is on a filesystem of this host's kernel. Numbers of others (include/uapi/linux/magic.h): NFS, CIFS, SMB, 9P,
/// Ceph, AFS and FUSE.
fn is_local(path: &Path) -> bool {
    const OTHERS: [i64; 7] =
        [0x6969, 0xff53_4d42, 0xfe53_4d42, 0x0102_1997, 0x00c3_6400, 0x6b41_4653, 0x6573_5546];
    rustix::fs::statfs(path).is_ok_and(|filesystem| !OTHERS.contains(&filesystem.f_type))
}
