//! The measurements of scenarios `run` and `start`: `kindling run` and `kindling exec` of programs in container images.

use super::containers::Containers;
use super::measure::{Bench, LIMIT, SETTLE};
use super::metric::Metric;
use super::payload;
use super::trace::{self, Traced, Tracer};
use super::{process, smaps};
use crate::{build_image, cargo, docker_archive, lab, test_volumes};
use anyhow::{Context, Result, ensure};
use kindling_vmm::Instant;
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

/// Container images and the programs that run them.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Images {
    /// `kindling-oci`, which lies beside `kindling`.
    pub(super) converter: PathBuf,
    /// `kindling-vmm`, which lies there too.
    monitor: PathBuf,
    /// `kindling-fs`, which lies there too.
    server: PathBuf,
    /// A folder with mke2fs, which formats volumes.
    filesystems: PathBuf,
    /// A container image of one small static program.
    hello: PathBuf,
    /// A container image of busybox.
    busybox: PathBuf,
    /// Kernel and initramfs (with busybox) of a guest with a virtio console, for other monitors.
    console: Option<Console>,
    /// The same programs in containers.
    pub(super) containers: Option<Containers>,
}

/// The kernel and initramfs of a guest with a virtio console.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct Console {
    pub(super) kernel: PathBuf,
    pub(super) initrd: PathBuf,
}

/// Bytes of the stream through `cat` under `kindling run`.
const STREAM_BYTES: u64 = 1 << 30;
/// Bytes of the stream of other monitors. Their many interrupts hang a lab after some time (docs/testing.md, "The
/// lab"), and the result is the time per MiB.
const CONSOLE_STREAM_BYTES: u64 = 64 << 20;
/// Bytes of one write or read.
const CHUNK_LEN: usize = 64 << 10;
/// Bytes between two progress lines.
const PROGRESS_STEP: u64 = 16 << 20;
/// Timeout of a stream.
const STREAM_TIMEOUT: Duration = Duration::from_secs(120);
/// The line that a guest prints before it waits for commands.
pub(super) const READY: &str = "ready";
/// The option for a volume.
const VOLUME: [&str; 2] = ["-v", "data:/data"];
/// The option for a shared folder, the current directory.
const FOLDER: [&str; 2] = ["-v", ".:/data"];
/// The name of the guest that runs commands.
const NAME: &str = "bench";

impl Images {
    /// Creates the images in a folder, without the guest with a virtio console.
    pub(crate) fn make(folder: &Path) -> Result<Self> {
        let (hello, busybox) = (folder.join("hello"), folder.join("busybox"));
        super::put(&hello.join("tree"), payload::PATH, &payload::program())?;
        put_busybox(&busybox.join("tree"))?;
        let filesystems = folder.join("e2fsprogs");
        test_volumes::programs(&filesystems)?;
        let image = |folder: &Path, command| {
            docker_archive::write(folder, &folder.join("tree"), &json!({ "Cmd": [command] }))
        };
        Ok(Self {
            converter: cargo::release_binary("kindling-oci", "kindling-oci")?,
            monitor: cargo::release_binary("kindling-vmm", "kindling-vmm")?,
            server: cargo::release_binary("kindling-fs", "kindling-fs")?,
            filesystems,
            hello: image(&hello, payload::PATH)?,
            busybox: image(&busybox, "sh")?,
            console: None,
            containers: None,
        })
    }

    /// The container image of busybox.
    pub(crate) fn busybox(&self) -> &Path {
        &self.busybox
    }

    /// The container image of one small static program.
    pub(super) fn hello(&self) -> &Path {
        &self.hello
    }

    /// The folder with the programs that format volumes.
    pub(crate) fn filesystems(&self) -> &Path {
        &self.filesystems
    }

    /// Adds containers, in the same folder.
    pub(super) fn with_containers(self, folder: &Path) -> Result<Self> {
        let tree = |name: &str| folder.join(name).join("tree");
        let containers = Containers::make(folder, &tree("busybox"), &tree("hello"))?;
        Ok(Self { containers: Some(containers), ..self })
    }

    /// Adds the guest with a virtio console, in the same folder.
    pub(super) fn with_console(self, folder: &Path) -> Result<Self> {
        let fragment = folder.join("console.config");
        fs::write(&fragment, include_str!("console.config"))?;
        let image = build_image::build(&build_image::Arguments {
            name: Some("bench-console".to_owned()),
            root: Some(folder.join("busybox/tree")),
            config_fragment: vec![fragment],
            ..build_image::Arguments::default()
        })?;
        let console = Console { kernel: image.join("vmlinux"), initrd: image.join("initramfs.cpio") };
        Ok(Self { console: Some(console), ..self })
    }

    /// Replaces each path by the result of `relocate`, which gets a unique name for it.
    pub(crate) fn map(&self, mut relocate: impl FnMut(&Path, &str) -> PathBuf) -> Self {
        Self {
            converter: relocate(&self.converter, "kindling-oci"),
            monitor: relocate(&self.monitor, "kindling-vmm"),
            server: relocate(&self.server, "kindling-fs"),
            filesystems: relocate(&self.filesystems, "e2fsprogs"),
            hello: relocate(&self.hello, "hello.tar"),
            busybox: relocate(&self.busybox, "busybox.tar"),
            console: self.console.as_ref().map(|console| Console {
                kernel: relocate(&console.kernel, "console-kernel"),
                initrd: relocate(&console.initrd, "console-initrd"),
            }),
            containers: self.containers.as_ref().map(|containers| containers.map(relocate)),
        }
    }
}

/// Adds busybox and the applets that are measured to a root filesystem.
fn put_busybox(tree: &Path) -> Result<()> {
    super::put(tree, "/bin/busybox", &fs::read(lab::busybox()?)?)?;
    for name in ["cat", "echo", "sh", "true"] {
        symlink("busybox", tree.join("bin").join(name))?;
    }
    Ok(())
}

impl Bench<'_> {
    /// Measures programs and streams; for other monitors, streams only.
    pub(super) fn programs(&mut self, images: &Images, runs: u32) -> Result<()> {
        let is_kindling = self.vmm.kind.is_kindling();
        if is_kindling {
            // Warm-up: converts the images and pre-boots the kernel.
            self.program(images, &images.hello, &[], &[], payload::TEXT)?;
            for options in [&[][..], &VOLUME, &FOLDER] {
                self.program(images, &images.busybox, options, &["echo", READY], READY)?;
            }
        }
        for run in 1..=runs {
            eprintln!("run {run} of {runs} ...");
            if is_kindling {
                let hello = self.program(images, &images.hello, &[], &[], payload::TEXT)?;
                self.add(Metric::RunHello, hello);
                for (metric, options) in [
                    (Metric::RunBusybox, &[][..]),
                    (Metric::RunVolume, &VOLUME),
                    (Metric::RunFolder, &FOLDER),
                ] {
                    let busybox = self.program(images, &images.busybox, options, &["echo", READY], READY)?;
                    self.add(metric, busybox);
                }
                let spare = ["--spare"];
                for (metric, image, command, text) in [
                    (Metric::SpareHello, &images.hello, &[][..], payload::TEXT),
                    (Metric::SpareBusybox, &images.busybox, &["echo", READY], READY),
                ] {
                    // The one before leaves the spare.
                    self.program(images, image, &spare, command, text)?;
                    let nanoseconds = self.program(images, image, &spare, command, text)?;
                    self.add(metric, nanoseconds);
                }
                let exec = self.exec_program(images)?;
                self.add(Metric::ExecTrue, exec);
                let [first, second] = self.own_memory(images)?;
                self.add(Metric::IdleOwnMemory, first);
                self.add(Metric::SecondOwnMemory, second);
            }
            eprintln!("a stream through cat ...");
            let stream = if is_kindling { self.stream(images)? } else { self.console_stream(images)? };
            self.add(Metric::Stream, stream.nanoseconds);
            self.add(Metric::StreamMemory, stream.memory_growth);
        }
        Ok(())
    }

    /// Measures starts of a program from a pre-booted kernel.
    pub(super) fn starts(&mut self, images: &Images, tracer: Option<&Tracer>, runs: u32) -> Result<()> {
        let start = |bench: &Self| bench.program(images, &images.busybox, &[], &["echo", READY], READY);
        // Warm-up: converts the image and pre-boots the kernel.
        start(self)?;
        start(self)?;
        for run in 1..=runs {
            eprintln!("run {run} of {runs} ...");
            let nanoseconds = start(self)?;
            self.add(Metric::RunBusybox, nanoseconds);
            if let Some(tracer) = tracer {
                tracer.start(&Traced::EVENTS)?;
                start(self)?;
                let faults = trace::page_faults(&tracer.finish()?);
                self.add(Metric::RunFaults, faults);
            }
            let memory = self.idle_memory(images)?;
            self.add(Metric::IdleMemory, memory);
        }
        Ok(())
    }

    /// The private memory of front and monitor, including the guest, while the program waits for input.
    fn idle_memory(&self, images: &Images) -> Result<u64> {
        thread::sleep(SETTLE);
        let mut memory = 0;
        process::run(self.waiting_program(images), READY, LIMIT, |front| {
            thread::sleep(SETTLE);
            memory = Self::all_private_memory(front)?;
            Ok(())
        })?;
        Ok(memory)
    }

    /// The private memory of a front and its monitor, including the guest's.
    pub(super) fn all_private_memory(front: u32) -> Result<u64> {
        Ok(smaps::private(&maps(front)?) + smaps::private(&maps(monitor_of(front)?)?))
    }

    /// The private memory of front and monitor, without the guest's, while the program waits for input: of a guest alone,
    /// and of one beside it.
    fn own_memory(&self, images: &Images) -> Result<[u64; 2]> {
        thread::sleep(SETTLE);
        let mut memory = [0; 2];
        process::run(self.waiting_program(images), READY, LIMIT, |first| {
            thread::sleep(SETTLE);
            memory[0] = self.private_memory(first)?;
            process::run(self.waiting_program(images), READY, LIMIT, |second| {
                thread::sleep(SETTLE);
                memory[1] = self.private_memory(second)?;
                Ok(())
            })?;
            Ok(())
        })?;
        Ok(memory)
    }

    /// A guest whose program prints [`READY`] and waits for input.
    fn waiting_program(&self, images: &Images) -> Command {
        let mut run = self.run_command(&images.busybox, &[]);
        run.args(["sh", "-c", &format!("echo {READY}; read -r line")]);
        run
    }

    /// The nanoseconds of `kindling run` of a program that prints `text`, until its exit.
    fn program(
        &self,
        images: &Images,
        image: &Path,
        options: &[&str],
        command: &[&str],
        text: &str,
    ) -> Result<u64> {
        thread::sleep(SETTLE);
        let mut run = self.run_command(image, options);
        // Missing volumes are formatted with the programs in this folder.
        let path = std::env::var("PATH").unwrap_or_default();
        run.args(command).env("PATH", format!("{}:{path}", images.filesystems.display()));
        let run = process::run(run, text, LIMIT, |_| Ok(()))?;
        Ok(run.ended.since(run.spawned))
    }

    /// The nanoseconds of `kindling exec` of a program that does nothing, until its exit.
    fn exec_program(&self, images: &Images) -> Result<u64> {
        let mut guest = self.run_command(&images.busybox, &["--name", NAME]);
        guest.args(["sh", "-c", &format!("echo {READY}; read -r line")]);
        let mut nanoseconds = 0;
        process::run(guest, READY, LIMIT, |_| {
            // The first run is a warm-up of the page cache.
            for _ in 0..2 {
                thread::sleep(SETTLE);
                let mut exec = self.kindling("exec");
                exec.args([NAME, "true"]);
                let run = process::run(exec, "", LIMIT, |_| Ok(()))?;
                nanoseconds = run.ended.since(run.spawned);
            }
            Ok(())
        })?;
        Ok(nanoseconds)
    }

    /// Streams bytes through `cat` under `kindling run`.
    fn stream(&self, images: &Images) -> Result<Streamed> {
        thread::sleep(SETTLE);
        let mut run = self.run_command(&images.busybox, &[]);
        run.arg("cat").stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut monitor = Monitor::start(run)?;
        let input = monitor.child.stdin.take().context("the monitor has no standard input")?;
        let output = monitor.child.stdout.take().context("the monitor has no standard output")?;
        let streamed = echo(STREAM_BYTES, input, output, || self.private_memory(monitor.child.id()))?;
        monitor.end()?;
        Ok(streamed)
    }

    /// Streams bytes through a port of a virtio console that `cat` reads and writes.
    fn console_stream(&self, images: &Images) -> Result<Streamed> {
        thread::sleep(SETTLE);
        let socket = self.scratch.join("console");
        let _ = fs::remove_file(&socket);
        let console = images.console.as_ref().context("the plan has no guest with a virtio console")?;
        let mut command = self.vmm.console_command(console, self.case, &socket);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let mut monitor = Monitor::start(command)?;
        // The guest boots after the socket has been connected.
        let stream = loop {
            match UnixStream::connect(&socket) {
                Err(_) if monitor.child.try_wait()?.is_none() => thread::sleep(SETTLE),
                result => break result.context("the monitor exited before it listened")?,
            }
        };
        let streamed = echo(CONSOLE_STREAM_BYTES, stream.try_clone()?, stream, || {
            self.private_memory(monitor.child.id())
        })?;
        monitor.end()?;
        Ok(streamed)
    }

    pub(super) fn run_command(&self, image: &Path, options: &[&str]) -> Command {
        let mut run = self.kindling("run");
        let (memory, cpus) = (self.case.memory_mib.to_string(), self.case.vcpus.to_string());
        run.args(options).args(["--memory", &memory, "--cpus", &cpus]).arg(image);
        run
    }

    /// A command of `kindling` with all of its user directories in one folder.
    pub(super) fn kindling(&self, name: &str) -> Command {
        let mut command = Command::new(&self.vmm.path);
        let image = self.vmm.image.as_ref().or(self.guest.image.as_ref());
        command.arg(name).envs(image.map(|image| ("KINDLING_IMAGE", image)));
        for variable in ["XDG_RUNTIME_DIR", "XDG_CACHE_HOME", "XDG_DATA_HOME"] {
            command.env(variable, self.scratch);
        }
        command
    }

    /// The private memory of a monitor, and of its front where it has one, without guest memory.
    fn private_memory(&self, pid: u32) -> Result<u64> {
        let (monitor, front) = match self.vmm.kind.is_kindling() {
            true => (monitor_of(pid)?, smaps::private(&maps(pid)?)),
            false => (pid, 0),
        };
        let usage = smaps::without_guest(&maps(monitor)?, self.case.memory_mib << 20);
        Ok(usage.context("its smaps show no memory of the guest's size")?.private + front)
    }
}

/// The mappings of a process.
fn maps(pid: u32) -> Result<String> {
    fs::read_to_string(format!("/proc/{pid}/smaps")).context("cannot read its smaps")
}

/// The monitor that a front has started.
fn monitor_of(front: u32) -> Result<u32> {
    let children = fs::read_to_string(format!("/proc/{front}/task/{front}/children"))?;
    let is_monitor = |pid: &u32| {
        fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim_end() == "kindling-vmm")
    };
    let mut children = children.split_whitespace().filter_map(|pid| pid.parse().ok());
    children.find(is_monitor).context("the front has no monitor")
}

/// The measurement of a stream.
#[derive(Clone, Copy, Debug)]
struct Streamed {
    /// Time per MiB.
    nanoseconds: u64,
    /// Growth of the monitor's memory without guest memory.
    memory_growth: u64,
}

/// Sends bytes and receives their echo. The first byte is not measured: its echo shows that the guest has booted.
fn echo(
    bytes: u64,
    mut input: impl Write + Send + 'static,
    mut output: impl Read,
    memory: impl Fn() -> Result<u64>,
) -> Result<Streamed> {
    input.write_all(b"x")?;
    output.read_exact(&mut [0]).context("the first byte was not echoed")?;
    let memory_before = memory()?;
    let start = Instant::now();
    let writer = thread::spawn(move || {
        let piece = vec![0; CHUNK_LEN];
        let mut left = bytes;
        while left > 0 {
            input.write_all(&piece)?;
            left = left.saturating_sub(CHUNK_LEN as u64);
        }
        std::io::Result::Ok(input)
    });
    let mut piece = vec![0; CHUNK_LEN];
    let mut left = bytes;
    while left > 0 {
        let count = output.read(&mut piece)? as u64;
        ensure!(count > 0, "{left} bytes were not echoed");
        left = left.saturating_sub(count);
        if left % PROGRESS_STEP < count {
            // Regular output keeps the lab below its output timeout.
            eprintln!("{} MiB left", left >> 20);
        }
    }
    let nanoseconds = Instant::now().since(start);
    let memory_growth = memory()?.saturating_sub(memory_before);
    // The guest ends at the end of its input; a socket is closed when all of its descriptors are.
    let input = writer.join().map_err(|_| anyhow::anyhow!("the writer panicked"))?.context("cannot write")?;
    drop((input, output));
    Ok(Streamed { nanoseconds: nanoseconds / (bytes >> 20), memory_growth })
}

/// A monitor's process, which is killed after [`STREAM_TIMEOUT`] and on drop.
struct Monitor {
    child: Child,
    end_sender: mpsc::Sender<()>,
}

impl Monitor {
    fn start(mut command: Command) -> Result<Self> {
        let child = command.spawn().context("cannot start the monitor")?;
        let (end_sender, ended) = mpsc::channel();
        let pid = Pid::from_child(&child);
        thread::spawn(move || {
            if ended.recv_timeout(STREAM_TIMEOUT) == Err(mpsc::RecvTimeoutError::Timeout) {
                let _ = kill_process(pid, Signal::KILL);
            }
        });
        Ok(Self { child, end_sender })
    }

    fn end(mut self) -> Result<()> {
        let status = self.child.wait()?;
        ensure!(status.success(), "it ended with {status}");
        Ok(())
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        let _ = self.end_sender.send(());
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
