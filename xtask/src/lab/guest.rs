//! PID 1 of the lab: loads KVM, runs the command, and sends its output and exit status to the host.
//!
//! The `xtask` program is the lab's init: started as PID 1 it runs this module instead of parsing arguments.

use super::frame::{self, Kind};
use super::{Job, WORKING_DIRECTORY};
use anyhow::{Context, Result};
use rustix::fs::{CWD, Mode, mkdirat};
use rustix::mount::{MountFlags, mount};
use rustix::process::{WaitOptions, wait};
use serde::{Deserialize, Serialize};
use std::ffi::CStr;
use std::fs::{self, File, Permissions};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The path of the request in the lab's initramfs.
pub(super) const REQUEST: &str = "/request.json";
/// The folder of kernel modules.
pub(super) const MODULES: &str = "/modules";
/// The channel to the host: the first port of the virtio console device.
const CHANNEL: &str = "/dev/vport0p1";

/// The command to run, and the files to send back.
#[derive(Debug, Deserialize, Serialize)]
pub(super) struct Request {
    command: Vec<String>,
    environment: Vec<(String, String)>,
    get: Vec<String>,
}

impl Request {
    pub(super) fn of(job: &Job) -> Self {
        Self {
            command: job.command.clone(),
            environment: job.environment.clone(),
            get: job.get.iter().map(|(name, _)| name.clone()).collect(),
        }
    }

    pub(super) fn to_json(&self) -> Result<Vec<u8>> {
        Ok(serde_json::to_vec(self)?)
    }
}

/// Whether this process is PID 1 of a lab.
pub(crate) fn is_inside() -> bool {
    std::process::id() == 1 && fs::exists(REQUEST).unwrap_or(false)
}

type Channel = Arc<Mutex<File>>;

/// Runs the request and powers the lab off.
pub(crate) fn main() -> ! {
    let channel = mount_filesystems()
        .and_then(|()| Ok(File::options().read(true).write(true).open(CHANNEL)?))
        .unwrap_or_else(|error| {
            eprintln!("lab: {error:#}");
            power_off()
        });
    let channel = Arc::new(Mutex::new(channel));
    let result = run(&channel);
    let _ = match result {
        Ok(status) => send(&channel, Kind::Exit, &[status]),
        Err(error) => send(&channel, Kind::Failure, format!("{error:#}").as_bytes()),
    };
    power_off()
}

/// Powers the lab off, unless the host has stopped it before, which it does when it has the result: a write to the channel
/// returns before the host gets the data, and QEMU loses what it has not passed on when the lab powers off.
fn power_off() -> ! {
    /// In a lab that counts instructions, the time of a wait would pass immediately, but that of these does not.
    const LIMIT: Duration = Duration::from_secs(10);
    let end = Instant::now() + LIMIT;
    while Instant::now() < end {
        std::hint::spin_loop();
    }
    let _ = rustix::system::reboot(rustix::system::RebootCommand::PowerOff);
    loop {
        std::thread::park();
    }
}

/// Mounts over the initial rootfs, because pivot_root(2), which sandboxes call, fails on the rootfs itself.
fn cover_root() -> Result<()> {
    const MOUNT_POINT: &str = "/root";
    rustix::mount::mount_bind("/", MOUNT_POINT)?;
    rustix::process::chdir(MOUNT_POINT)?;
    rustix::mount::mount_move(MOUNT_POINT, "/")?;
    Ok(rustix::process::chroot(".")?)
}

fn mount_filesystems() -> Result<()> {
    cover_root().context("cannot mount a root filesystem")?;
    let plain: &CStr = c"";
    for (kind, target) in [
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("tracefs", "/sys/kernel/tracing"),
        ("devtmpfs", "/dev"),
        ("devpts", "/dev/pts"),
        ("tmpfs", "/dev/shm"),
        ("tmpfs", "/tmp"),
        ("cgroup2", "/sys/fs/cgroup"),
    ] {
        let _ = mkdirat(CWD, target, Mode::from_raw_mode(0o755));
        mount(kind, target, kind, MountFlags::empty(), plain)
            .with_context(|| format!("cannot mount {target}"))?;
    }
    Ok(())
}

fn run(channel: &Channel) -> Result<u8> {
    let request: Request = serde_json::from_slice(&fs::read(REQUEST)?)?;
    load_modules()?;
    mount_disk()?;
    install_busybox()?;
    let status = run_command(&request, channel)?;
    for name in &request.get {
        send_file(channel, name)?;
    }
    Ok(status)
}

fn load_modules() -> Result<()> {
    /// The kernel decompresses the module (include/uapi/linux/module.h).
    const COMPRESSED_FILE: i32 = 4;
    let mut modules: Vec<_> =
        fs::read_dir(MODULES)?.map(|entry| entry.map(|e| e.path())).collect::<Result<_, _>>()?;
    modules.sort();
    for module in modules {
        rustix::system::finit_module(File::open(&module)?, c"", COMPRESSED_FILE)
            .with_context(|| format!("cannot load {}", module.display()))?;
    }
    // What udev's rules set.
    let _ = fs::set_permissions("/dev/kvm", Permissions::from_mode(0o666));
    Ok(())
}

/// Mounts the job's disk, if it has one.
fn mount_disk() -> Result<()> {
    const DEVICE: &str = "/dev/vda";
    if fs::exists(DEVICE)? {
        fs::create_dir_all(super::DISK)?;
        mount(DEVICE, super::DISK, "ext4", MountFlags::RDONLY, c"").context("cannot mount the disk")?;
    }
    Ok(())
}

fn install_busybox() -> Result<()> {
    let status = Command::new("/bin/busybox").args(["--install", "-s", "/bin"]).status()?;
    anyhow::ensure!(status.success(), "busybox --install failed");
    // Hosts have the mke2fs of e2fsprogs, or none. Busybox's does not support ext4, and lies in a system folder.
    Ok(fs::remove_file("/bin/mke2fs")?)
}

fn run_command(request: &Request, channel: &Channel) -> Result<u8> {
    let (program, arguments) = request.command.split_first().context("the request has no command")?;
    let mut command = Command::new(program);
    command
        .args(arguments.iter().map(|argument| super::with_time(argument)))
        .env_clear()
        .envs([("PATH", "/bin"), ("HOME", "/root"), ("TERM", "dumb")])
        .envs(request.environment.iter().map(|(name, value)| (name, value)))
        .current_dir(WORKING_DIRECTORY)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0);
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            send(channel, Kind::Error, format!("{program}: {error}\n").as_bytes())?;
            return Ok(if error.kind() == std::io::ErrorKind::NotFound { 127 } else { 126 });
        }
    };
    let outputs = forward_outputs(&mut child, channel);
    forward_input(&mut child, channel)?;
    let status = reap(&child);
    for output in outputs {
        // The threads end when all writers have closed the pipes: background processes of the command are killed.
        let group = rustix::process::Pid::from_child(&child);
        let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
        let _ = output.join();
    }
    Ok(status)
}

/// Waits for the command, and reaps orphans.
fn reap(child: &Child) -> u8 {
    let pid = rustix::process::Pid::from_child(child);
    loop {
        match wait(WaitOptions::empty()) {
            Ok(Some((ended, status))) if ended == pid => {
                let code =
                    status.exit_status().or_else(|| status.terminating_signal().map(|signal| 128 + signal));
                return code.and_then(|code| u8::try_from(code).ok()).unwrap_or(255);
            }
            Ok(_) => {}
            Err(_) => return 255,
        }
    }
}

fn forward_outputs(child: &mut Child, channel: &Channel) -> Vec<JoinHandle<()>> {
    let mut threads = Vec::new();
    if let Some(output) = child.stdout.take() {
        threads.push(forward(output, Kind::Output, channel));
    }
    if let Some(output) = child.stderr.take() {
        threads.push(forward(output, Kind::Error, channel));
    }
    threads
}

fn forward(mut source: impl Read + Send + 'static, kind: Kind, channel: &Channel) -> JoinHandle<()> {
    let channel = Arc::clone(channel);
    std::thread::spawn(move || {
        let mut buffer = vec![0; frame::DATA_MAX];
        while let Ok(length @ 1..) = source.read(&mut buffer) {
            if send(&channel, kind, &buffer[..length]).is_err() {
                return;
            }
        }
    })
}

fn forward_input(child: &mut Child, channel: &Channel) -> Result<()> {
    let Some(mut input) = child.stdin.take() else { return Ok(()) };
    let mut channel = channel.lock().map_err(|_| anyhow::anyhow!("a thread panicked"))?.try_clone()?;
    std::thread::spawn(move || {
        while let Ok((Kind::Input, data)) = frame::read(&mut channel) {
            if data.is_empty() || input.write_all(&data).is_err() {
                return;
            }
        }
    });
    Ok(())
}

fn send_file(channel: &Channel, name: &str) -> Result<()> {
    let mut file = File::open(name).with_context(|| format!("the command did not write {name}"))?;
    send(channel, Kind::FileName, name.as_bytes())?;
    let mut buffer = vec![0; frame::DATA_MAX];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(()),
            length => send(channel, Kind::FileData, &buffer[..length])?,
        }
    }
}

fn send(channel: &Channel, kind: Kind, data: &[u8]) -> Result<()> {
    let mut channel = channel.lock().map_err(|_| anyhow::anyhow!("a thread panicked"))?;
    Ok(frame::write(&mut *channel, kind, data)?)
}
