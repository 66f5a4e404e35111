//! What a user wants of a new guest, and the machine and the program that it becomes.

use crate::environment::{self, EnvironmentError};
use crate::guest::{GuestDir, GuestError, GuestRecord, Payload};
use crate::image::{ImageError, Prepared};
use crate::kernel::{self, KernelError};
use crate::mount::{self, MountError, MountRequest, Source};
use crate::volume::{self, VolumeError};
use crate::{network, signal};
use guest_protocol::agent::TerminalSize;
use kindling_vmm::config::devices::{NetworkInterface, Vsock};
use kindling_vmm::config::image::Image;
use kindling_vmm::config::{Config, ConfigError, Console, GuestConfig, MachineConfig};
use kindling_vmm::control::{ControlError, Event, Failure, Monitor};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

const SIGTERM: u8 = 15;
/// The first number that a guest can have; each guest is alone behind its socket.
const GUEST_CID: u32 = 3;

/// Why no guest can be started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LaunchError {
    /// The image cannot be used.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// There is no kernel.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The guest's directory cannot be made or used.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// The machine cannot be built or started.
    #[error(transparent)]
    Machine(#[from] kindling_vmm::Error),
    /// The monitor could not build or start the machine.
    #[error("{}", .0.message)]
    Monitor(Failure),
    /// The guest ended before it could be asked for anything.
    #[error("the guest did not start: {0}")]
    Ended(String),
    /// `kindling-vmm` cannot be started.
    #[error("cannot run kindling-vmm, which has to lie beside kindling")]
    NoMonitor(#[source] std::io::Error),
    /// What is to be mounted is not said rightly.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// A volume cannot be had.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// Others could change pre-booted kernels.
    #[error("the cache of kernels cannot be used")]
    Cache(#[from] trusted_path::Error),
    /// A file of entries cannot be used.
    #[error(transparent)]
    Environment(#[from] EnvironmentError),
    /// Ports are published, and there is no network.
    #[error("--publish needs a network, and --net none says that there is none")]
    NoNetwork,
    /// A network as other tools have it.
    #[error("there is no network {0:?}: --net user reaches what the host does, and --publish lets in")]
    Network(OsString),
    /// Neither the image nor the user names a command.
    #[error("the image names no command; write one behind its name")]
    NoCommand,
    /// The host refused something.
    #[error("the host refused to {0}")]
    Host(&'static str, #[source] std::io::Error),
}

impl From<ConfigError> for LaunchError {
    fn from(error: ConfigError) -> Self {
        Self::Machine(error.into())
    }
}

impl LaunchError {
    /// Whether asking for something else can help, rather than the host.
    #[must_use]
    pub const fn is_users(&self) -> bool {
        match self {
            Self::Machine(error) => error.is_user_error(),
            Self::Monitor(failure) => failure.is_user_error,
            Self::Host(..) | Self::Ended(_) | Self::Image(ImageError::Failed(_)) => false,
            Self::Guest(error) => error.is_users(),
            Self::Volume(error) => error.is_users(),
            _ => true,
        }
    }
}

/// What a user wants of a new guest. Text is as users of docker write it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LaunchOptions {
    /// The image, as it was written; for the guest's record.
    pub image: OsString,
    /// The guest runs a command, with which it ends; otherwise it runs what it is asked to until it is stopped.
    pub has_payload: bool,
    /// The command, instead of the image's.
    pub command: Vec<OsString>,
    /// Replaces the image's entrypoint; empty for none.
    pub entrypoint: Option<OsString>,
    /// Entries of the environment: `NAME=VALUE`, or `NAME` for this process's value.
    pub env: Vec<OsString>,
    /// Files with such entries, which come first.
    pub env_files: Vec<PathBuf>,
    /// Working directory of the command, instead of the image's.
    pub working_directory: Option<OsString>,
    /// Hostname, instead of the guest's name.
    pub hostname: Option<OsString>,
    /// The command has a terminal, which starts with this size.
    pub terminal: Option<TerminalSize>,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Virtual processors, 1 to 16.
    pub vcpus: u64,
    /// `none`, `user` or a tap device, with further words as [`network::interface`] takes them.
    pub network: Option<OsString>,
    /// Published ports, as [`network::parse_publish`] takes them.
    pub publish: Vec<OsString>,
    /// Volumes and folders: `NAME:/GUEST` or `/HOST:/GUEST`, with `:ro` behind it where they are only read.
    pub volumes: Vec<OsString>,
    /// Programs only read the root filesystem.
    pub is_root_read_only: bool,
    /// Boot the kernel, also where it was booted before.
    pub is_cold: bool,
    /// The guest's directory stays when the guest has ended, until it is removed.
    pub is_kept: bool,
}

/// A guest that can be started.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The machine.
    pub config: Config,
    /// What others learn of the guest.
    pub record: GuestRecord,
}

impl LaunchOptions {
    /// The machine for a prepared image, and what is written down of its guest. Makes the volumes that are missing.
    ///
    /// # Errors
    /// When something is wrong with what is asked for, the kernel or the host.
    pub fn plan(&self, directory: &GuestDir, prepared: &Prepared) -> Result<Plan, LaunchError> {
        let mounts = mount::parse_all(&self.volumes)?;
        let config = self.config(directory, prepared, &mounts)?;
        let record = self.record(&config, prepared, &mounts);
        Ok(Plan { config, record })
    }

    fn config(
        &self,
        directory: &GuestDir,
        prepared: &Prepared,
        mounts: &[MountRequest],
    ) -> Result<Config, LaunchError> {
        let kernel = kernel::kernel_image()?;
        let image = Image::open(&kernel)?;
        let mut config = image.config(&kernel);
        let vcpu_count = u8::try_from(self.vcpus).map_err(|_| ConfigError::VcpuCount(self.vcpus))?;
        config.machine = MachineConfig { vcpu_count, mem_size_mib: self.memory_mib };
        config.console = Console::Null;
        config.devices.root = Some(prepared.rootfs.clone());
        config.devices.network_interfaces.extend(self.interface()?);
        network::publish_all(&self.publish, &mut config.devices)?;
        config.devices.vsock =
            Some(Vsock { guest_cid: GUEST_CID, uds_path: directory.socket(), vsock_id: None });
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
        config.validate()?;
        if !self.is_cold {
            config.preboot = kernel::preboot_path(&config)?;
        }
        Ok(config)
    }

    fn interface(&self) -> Result<Option<NetworkInterface>, LaunchError> {
        let network = match &self.network {
            None if self.publish.is_empty() => return Ok(None),
            None => OsStr::new("user"),
            Some(network) if network == "none" && self.publish.is_empty() => return Ok(None),
            Some(network) if network == "none" => return Err(LaunchError::NoNetwork),
            Some(network) if ["host", "bridge", "default"].iter().any(|name| network == name) => {
                return Err(LaunchError::Network(network.clone()));
            }
            Some(network) => network,
        };
        Ok(Some(network::interface(network, 0)?))
    }

    /// What init is told of the command.
    fn guest(&self, directory: &GuestDir, prepared: &Prepared) -> Result<GuestConfig, LaunchError> {
        let of_image = &prepared.config;
        let strings = |list: &[String]| list.iter().map(|text| text.clone().into_bytes()).collect::<Vec<_>>();
        let entrypoint = match &self.entrypoint {
            Some(program) if program.is_empty() => Vec::new(),
            Some(program) => vec![program.as_bytes().to_vec()],
            None => strings(&of_image.entrypoint),
        };
        let command = if !self.command.is_empty() {
            self.command.iter().map(|word| word.as_bytes().to_vec()).collect()
        } else if self.entrypoint.is_some() {
            Vec::new()
        } else {
            strings(&of_image.cmd)
        };
        let arguments = if self.has_payload { [entrypoint, command].concat() } else { Vec::new() };
        if arguments.is_empty() && self.has_payload {
            return Err(LaunchError::NoCommand);
        }
        let mut environment = strings(&of_image.env);
        environment::set_all(&mut environment, &self.env_files, &self.env)?;
        let name = self.hostname.clone().unwrap_or_else(|| directory.name().into());
        let mut default = |entry: String| {
            let name = entry.split_inclusive('=').next().unwrap_or_default().as_bytes().to_vec();
            if !environment.iter().any(|given| given.starts_with(&name)) {
                environment.push(entry.into_bytes());
            }
        };
        if let Some(home) = &of_image.user.home {
            default(format!("HOME={home}"));
        }
        default(format!("HOSTNAME={}", name.to_string_lossy()));
        if self.terminal.is_some() {
            default(format!("TERM={}", std::env::var("TERM").unwrap_or_else(|_| "xterm".to_owned())));
        }
        let workdir = self.working_directory.as_ref().map(|directory| directory.as_bytes().to_vec());
        let of_image_workdir =
            Some(of_image.working_dir.clone().into_bytes()).filter(|directory| !directory.is_empty());
        Ok(GuestConfig {
            arguments,
            environment,
            working_directory: workdir.or(of_image_workdir),
            hostname: Some(name.as_bytes().to_vec()),
            user_id: of_image.user.uid,
            group_id: of_image.user.gid,
            groups: of_image.user.groups.clone(),
            terminal: self.terminal,
            agent: true,
            is_root_read_only: self.is_root_read_only,
            ..GuestConfig::default()
        })
    }

    /// What is written down of the guest, for those who find it by its name.
    fn record(&self, config: &Config, prepared: &Prepared, mounts: &[MountRequest]) -> GuestRecord {
        let stop_signal = prepared.config.stop_signal.as_deref().and_then(|name| signal::parse(name).ok());
        let text = |bytes: &Vec<u8>| String::from_utf8_lossy(bytes).into_owned();
        let since_1970 = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        GuestRecord {
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
            status: None,
        }
    }
}

/// Starts the monitor of a new guest: `kindling-vmm`, in the folder that KINDLING_PROGRAMS names or beside this program.
///
/// # Errors
/// When it is missing, others can change it, or the host refuses it.
pub fn spawn_monitor() -> Result<Monitor, LaunchError> {
    match trusted_path::companion("kindling-vmm") {
        Ok(program) => Monitor::spawn(&program).map_err(LaunchError::NoMonitor),
        Err(error) if error.is_absent() => Err(LaunchError::NoMonitor(std::io::ErrorKind::NotFound.into())),
        Err(error) => Err(KernelError::Untrusted(error).into()),
    }
}

/// Pre-boots the kernel of a configuration, unless that was done before. A kernel that cannot be pre-booted is no error:
/// the guest boots it; the reason is returned. `next_event` waits for an event of the monitor that does it.
///
/// # Errors
/// When the kernel is not the one that its image names, others can change the cache, or KVM cannot be used.
pub fn make_preboot(
    config: &Config,
    next_event: impl FnMut(&Monitor) -> Result<Event, ControlError>,
) -> Result<Option<LaunchError>, LaunchError> {
    let Some(path) = config.preboot.as_ref().filter(|path| !path.exists()) else { return Ok(None) };
    // Others could change a kernel that they may write to.
    trusted_path::make_folder(path.parent().unwrap_or(path))?;
    match preboot(config, path, next_event) {
        Ok(()) => Ok(None),
        Err(error @ LaunchError::Machine(kindling_vmm::Error::Config(_) | kindling_vmm::Error::Kvm(_))) => {
            Err(error)
        }
        Err(LaunchError::Monitor(failure)) if failure.is_kvm_error => Err(LaunchError::Monitor(failure)),
        Err(error) => Ok(Some(error)),
    }
}

/// Pre-boots the kernel of a configuration in a monitor, into a file that appears at `path` when guests have continued
/// from it.
///
/// # Errors
/// When a file, the kernel, KVM or the host prevents it.
pub fn preboot(
    config: &Config,
    path: &Path,
    mut next_event: impl FnMut(&Monitor) -> Result<Event, ControlError>,
) -> Result<(), LaunchError> {
    let mut monitor = spawn_monitor()?;
    let draft = monitor.start_preboot(config, path)?;
    match next_event(&monitor).map_err(kindling_vmm::Error::from)? {
        Event::Prebooted => Ok(draft.publish()?),
        Event::Failed(failure) => Err(LaunchError::Monitor(failure)),
        _ => Err(kindling_vmm::Error::from(ControlError::Version).into()),
    }
}
