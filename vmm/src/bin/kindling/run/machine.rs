//! The machine and the program that are asked for, from the arguments and what the image says.

use super::mounts::{self, Source, Wanted};
use super::source::{self, Prepared};
use super::{Arguments, RunError, client, environment};
use crate::devices::DeviceArguments;
use crate::instances::Instance;
use crate::{bytes, volumes};
use kindling::config::image::Image;
use kindling::config::{Config, ConfigError, Console, GuestConfig, MachineConfig};
use kindling::preboot;
use std::path::PathBuf;
use trusted_path::Owners;

impl Arguments {
    pub(super) fn config(
        &self,
        instance: &Instance,
        prepared: &Prepared,
        wanted: &[Wanted],
    ) -> Result<Config, RunError> {
        let kernel = source::kernel_image()?;
        let image = Image::open(&kernel)?;
        let mut config = image.config(&kernel);
        let vcpu_count = u8::try_from(self.cpus).map_err(|_| ConfigError::VcpuCount(self.cpus))?;
        config.machine = MachineConfig { vcpu_count, mem_size_mib: self.memory };
        config.console = Console::Null;
        config.devices.root = Some(prepared.rootfs.clone());
        let mut devices = DeviceArguments {
            publish: self.publish.clone(),
            vsock: Some(instance.socket().into()),
            ..DeviceArguments::default()
        };
        match &self.net {
            None if self.publish.is_empty() => {}
            None => devices.net.push("user".into()),
            Some(net) if net == "none" && self.publish.is_empty() => {}
            Some(net) if net == "none" => return Err(RunError::NoNetwork),
            Some(net) if ["host", "bridge", "default"].iter().any(|name| net == name) => {
                return Err(RunError::Network(net.clone()));
            }
            Some(net) => devices.net.push(net.clone()),
        }
        devices.add_to(&mut config.devices)?;
        config.guest = self.guest(instance, prepared)?;
        for wanted in wanted {
            match &wanted.source {
                Source::Volume(name) => {
                    let disk = volumes::for_guest(name, wanted.is_read_only)?;
                    mounts::add_volume(&mut config, disk, wanted);
                }
                Source::Folder(path) => mounts::add_folder(&mut config, path, wanted)?,
            }
        }
        config.validate()?;
        if !self.cold {
            config.preboot = preboot_path(&config)?;
        }
        Ok(config)
    }

    fn guest(&self, instance: &Instance, prepared: &Prepared) -> Result<GuestConfig, RunError> {
        let of_image = &prepared.config;
        let strings = |list: &[String]| list.iter().map(|text| text.clone().into_bytes()).collect::<Vec<_>>();
        let entrypoint = match &self.entrypoint {
            Some(program) if program.is_empty() => Vec::new(),
            Some(program) => vec![bytes(program)],
            None => strings(&of_image.entrypoint),
        };
        let command = if !self.command.is_empty() {
            self.command.iter().map(bytes).collect()
        } else if self.entrypoint.is_some() {
            Vec::new()
        } else {
            strings(&of_image.cmd)
        };
        let arguments = [entrypoint, command].concat();
        if arguments.is_empty() {
            return Err(RunError::NoCommand);
        }
        let mut environment = strings(&of_image.env);
        environment::set_all(&mut environment, &self.env_file, &self.env)?;
        let name = self.hostname.clone().unwrap_or_else(|| instance.name().into());
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
        if self.tty {
            default(format!("TERM={}", std::env::var("TERM").unwrap_or_else(|_| "xterm".to_owned())));
        }
        let workdir = self.workdir.as_ref().map(bytes);
        let of_image_workdir =
            Some(of_image.working_dir.clone().into_bytes()).filter(|directory| !directory.is_empty());
        Ok(GuestConfig {
            arguments,
            environment,
            working_directory: workdir.or(of_image_workdir),
            hostname: Some(bytes(&name)),
            user_id: of_image.user.uid,
            group_id: of_image.user.gid,
            groups: of_image.user.groups.clone(),
            terminal: self.tty.then(client::new_terminal_size),
            agent: true,
            is_root_read_only: self.read_only,
            ..GuestConfig::default()
        })
    }
}

/// Where the kernel is that was booted before for guests like this one; the same for all root filesystems.
fn preboot_path(config: &Config) -> Result<Option<PathBuf>, trusted_path::Error> {
    let Some((cache, key)) = source::cache().zip(preboot::key(config)) else { return Ok(None) };
    let path = Image::preboot_path(&cache.join("kernels").join(key), &config.machine, &config.devices);
    match trusted_path::folder(path.parent().unwrap_or(&path), Owners::own()) {
        Err(error) if !error.is_absent() => Err(error),
        _ => Ok(Some(path)),
    }
}
