//! What is measured of `kindling run` and `kindling exec`: programs of container images, as their user starts them.

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

/// What programs come from.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct Images {
    /// The program that reads container images, which lies beside ours.
    pub(super) converter: PathBuf,
    /// The monitor of one guest, which lies there too.
    monitor: PathBuf,
    /// The program that serves folders, which lies there too.
    server: PathBuf,
    /// A folder with the program that makes filesystems for volumes.
    filesystems: PathBuf,
    /// A container image of one small program that needs nothing else.
    hello: PathBuf,
    /// A container image of busybox.
    busybox: PathBuf,
    /// Kernel and initramfs, with busybox, of a guest that talks through a port of a virtio console, where a monitor
    /// has such guests.
    console: Option<Console>,
}

/// What a monitor with a virtio console boots.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct Console {
    pub(super) kernel: PathBuf,
    pub(super) initrd: PathBuf,
}

/// What goes through `cat` under `kindling run`.
const STREAM_BYTES: u64 = 1 << 30;
/// What goes through that of another monitor: a lab stands still some time with so many interrupts as those take
/// (docs/testing.md, "The lab"), and what is told is the time for a MiB.
const OTHERS_STREAM_BYTES: u64 = 64 << 20;
/// How much of it at once.
const PIECE: usize = 64 << 10;
/// After how much of it somebody is told.
const STEP: u64 = 16 << 20;
/// A stream that is not through by then stands still.
const STREAM_LIMIT: Duration = Duration::from_secs(120);
/// What a guest says that waits for more commands.
const READY: &str = "ready";
/// A volume of a program's.
const VOLUME: [&str; 2] = ["-v", "data:/data"];
/// A folder of the host's, the one where this runs.
const FOLDER: [&str; 2] = ["-v", ".:/data"];
/// The name of the guest in which commands are run.
const NAME: &str = "bench";

impl Images {
    /// Makes them in a folder, all but the guest with a virtio console.
    pub(super) fn make(folder: &Path) -> Result<Self> {
        let (hello, busybox) = (folder.join("hello"), folder.join("busybox"));
        super::put(&hello.join("tree"), payload::PATH, &payload::program())?;
        put_busybox(&busybox.join("tree"))?;
        let filesystems = folder.join("e2fsprogs");
        test_volumes::programs(&filesystems)?;
        let image = |place: &Path, command| {
            docker_archive::write(place, &place.join("tree"), &json!({ "Cmd": [command] }))
        };
        Ok(Self {
            converter: cargo::release_binary("kindling-oci", "kindling-oci")?,
            monitor: cargo::release_binary("kindling-vmm", "kindling-vmm")?,
            server: cargo::release_binary("kindling-fs", "kindling-fs")?,
            filesystems,
            hello: image(&hello, payload::PATH)?,
            busybox: image(&busybox, "sh")?,
            console: None,
        })
    }

    /// Builds the guest with a virtio console, too, in the same folder.
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

    /// The same in other places, each with a name of its own.
    pub(super) fn map(&self, mut place: impl FnMut(&Path, &str) -> PathBuf) -> Self {
        Self {
            converter: place(&self.converter, "kindling-oci"),
            monitor: place(&self.monitor, "kindling-vmm"),
            server: place(&self.server, "kindling-fs"),
            filesystems: place(&self.filesystems, "e2fsprogs"),
            hello: place(&self.hello, "hello.tar"),
            busybox: place(&self.busybox, "busybox.tar"),
            console: self.console.as_ref().map(|console| Console {
                kernel: place(&console.kernel, "console-kernel"),
                initrd: place(&console.initrd, "console-initrd"),
            }),
        }
    }
}

/// Busybox and the commands that are measured.
fn put_busybox(tree: &Path) -> Result<()> {
    super::put(tree, "/bin/busybox", &fs::read(lab::busybox()?)?)?;
    for name in ["cat", "echo", "sh", "true"] {
        symlink("busybox", tree.join("bin").join(name))?;
    }
    Ok(())
}

impl Bench<'_> {
    /// Programs and streams; of a monitor that only has guests, streams.
    pub(super) fn programs(&mut self, images: &Images, runs: u32) -> Result<()> {
        let is_ours = self.vmm.kind.is_ours();
        if is_ours {
            // For the first one the images are converted and the kernel is booted.
            self.program(images, &images.hello, &[], &[], payload::TEXT)?;
            for options in [&[][..], &VOLUME, &FOLDER] {
                self.program(images, &images.busybox, options, &["echo", READY], READY)?;
            }
        }
        for run in 1..=runs {
            eprintln!("run {run} of {runs} ...");
            if is_ours {
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
                let exec = self.one_more_program(images)?;
                self.add(Metric::ExecTrue, exec);
            }
            eprintln!("a stream through cat ...");
            let stream = if is_ours { self.stream(images)? } else { self.console_stream(images)? };
            self.add(Metric::Stream, stream.nanoseconds);
            self.add(Metric::StreamMemory, stream.memory_growth);
        }
        Ok(())
    }

    /// What a program costs that starts from a pre-booted kernel.
    pub(super) fn starts(&mut self, images: &Images, tracer: Option<&Tracer>, runs: u32) -> Result<()> {
        let start = |bench: &Self| bench.program(images, &images.busybox, &[], &["echo", READY], READY);
        // For the first one the image is converted and the kernel is booted.
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

    /// Private memory of a monitor and its guest, whose program waits.
    fn idle_memory(&self, images: &Images) -> Result<u64> {
        thread::sleep(SETTLE);
        let mut run = self.run_command(&images.busybox, &[]);
        run.args(["sh", "-c", &format!("echo {READY}; read -r line")]);
        let mut memory = 0;
        process::run(run, READY, LIMIT, |pid| {
            thread::sleep(SETTLE);
            let maps = fs::read_to_string(format!("/proc/{pid}/smaps")).context("cannot read its smaps")?;
            memory = smaps::private(&maps);
            Ok(())
        })?;
        Ok(memory)
    }

    /// `kindling run` of a program that says something; nanoseconds until it has ended.
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
        // A volume that is not there is made with this.
        let path = std::env::var("PATH").unwrap_or_default();
        run.args(command).env("PATH", format!("{}:{path}", images.filesystems.display()));
        let run = process::run(run, text, LIMIT, |_| Ok(()))?;
        Ok(run.ended.since(run.spawned))
    }

    /// `kindling exec` of a program that does nothing; nanoseconds until it has ended.
    fn one_more_program(&self, images: &Images) -> Result<u64> {
        let mut guest = self.run_command(&images.busybox, &["--name", NAME]);
        guest.args(["sh", "-c", &format!("echo {READY}; read -r line")]);
        let mut nanoseconds = 0;
        process::run(guest, READY, LIMIT, |_| {
            // The first one reads what the second finds in memory.
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

    /// Bytes through `cat` under `kindling run`.
    fn stream(&self, images: &Images) -> Result<Streamed> {
        thread::sleep(SETTLE);
        let mut run = self.run_command(&images.busybox, &[]);
        run.arg("cat").stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut monitor = Monitor::start(run)?;
        let input = monitor.child.stdin.take().context("it has no input")?;
        let output = monitor.child.stdout.take().context("it has no output")?;
        let streamed = echo(STREAM_BYTES, input, output, || self.private_memory(monitor.child.id()))?;
        monitor.end()?;
        Ok(streamed)
    }

    /// The same through a port of a virtio console, from whose device `cat` reads and to which it writes.
    fn console_stream(&self, images: &Images) -> Result<Streamed> {
        thread::sleep(SETTLE);
        let socket = self.scratch.join("console");
        let _ = fs::remove_file(&socket);
        let console = images.console.as_ref().context("the plan has no guest with a virtio console")?;
        let mut command = self.vmm.console_command(console, self.case, &socket);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let mut monitor = Monitor::start(command)?;
        // Its guest boots when somebody has connected.
        let stream = loop {
            match UnixStream::connect(&socket) {
                Err(_) if monitor.child.try_wait()?.is_none() => thread::sleep(SETTLE),
                result => break result.context("it ended before it listened")?,
            }
        };
        let streamed = echo(OTHERS_STREAM_BYTES, stream.try_clone()?, stream, || {
            self.private_memory(monitor.child.id())
        })?;
        monitor.end()?;
        Ok(streamed)
    }

    fn run_command(&self, image: &Path, options: &[&str]) -> Command {
        let mut run = self.kindling("run");
        let (memory, cpus) = (self.case.memory_mib.to_string(), self.case.vcpus.to_string());
        run.args(options).args(["--memory", &memory, "--cpus", &cpus]).arg(image);
        run
    }

    /// A command of ours, of a user who keeps everything in one folder.
    fn kindling(&self, name: &str) -> Command {
        let mut command = Command::new(&self.vmm.path);
        let image = self.vmm.image.as_ref().or(self.guest.image.as_ref());
        command.arg(name).envs(image.map(|image| ("KINDLING_IMAGE", image)));
        for variable in ["XDG_RUNTIME_DIR", "XDG_CACHE_HOME", "XDG_DATA_HOME"] {
            command.env(variable, self.scratch);
        }
        command
    }

    fn private_memory(&self, pid: u32) -> Result<u64> {
        let maps = fs::read_to_string(format!("/proc/{pid}/smaps")).context("cannot read its smaps")?;
        let usage = smaps::without_guest(&maps, self.case.memory_mib << 20);
        Ok(usage.context("its smaps show no memory of the guest's size")?.private)
    }
}

/// How a stream went.
#[derive(Clone, Copy, Debug)]
struct Streamed {
    /// For each MiB.
    nanoseconds: u64,
    /// What the monitor's memory without its guest's grew by.
    memory_growth: u64,
}

/// Sends bytes and takes them back. The guest is up when the first one has returned; that does not count.
fn echo(
    bytes: u64,
    mut input: impl Write + Send + 'static,
    mut output: impl Read,
    memory: impl Fn() -> Result<u64>,
) -> Result<Streamed> {
    input.write_all(b"x")?;
    output.read_exact(&mut [0]).context("its first byte did not come back")?;
    let memory_before = memory()?;
    let start = Instant::now();
    let writer = thread::spawn(move || {
        let piece = vec![0; PIECE];
        let mut left = bytes;
        while left > 0 {
            input.write_all(&piece)?;
            left = left.saturating_sub(PIECE as u64);
        }
        std::io::Result::Ok(input)
    });
    let mut piece = vec![0; PIECE];
    let mut left = bytes;
    while left > 0 {
        let count = output.read(&mut piece)? as u64;
        ensure!(count > 0, "{left} bytes did not come back");
        left = left.saturating_sub(count);
        if left % STEP < count {
            // A lab that says nothing is taken for one that stands still.
            eprintln!("{} MiB left", left >> 20);
        }
    }
    let nanoseconds = Instant::now().since(start);
    let memory_growth = memory()?.saturating_sub(memory_before);
    // The end of its input is the end of the guest; a socket ends with the last who has it.
    let input = writer.join().map_err(|_| anyhow::anyhow!("the writer panicked"))?.context("cannot write")?;
    drop((input, output));
    Ok(Streamed { nanoseconds: nanoseconds / (bytes >> 20), memory_growth })
}

/// A monitor's process, which is killed when its time is over and when this goes away.
struct Monitor {
    child: Child,
    has_ended: mpsc::Sender<()>,
}

impl Monitor {
    fn start(mut command: Command) -> Result<Self> {
        let child = command.spawn().context("it cannot be started")?;
        let (has_ended, ended) = mpsc::channel();
        let pid = Pid::from_child(&child);
        thread::spawn(move || {
            if ended.recv_timeout(STREAM_LIMIT) == Err(mpsc::RecvTimeoutError::Timeout) {
                let _ = kill_process(pid, Signal::KILL);
            }
        });
        Ok(Self { child, has_ended })
    }

    fn end(mut self) -> Result<()> {
        let status = self.child.wait()?;
        ensure!(status.success(), "it ended with {status}");
        Ok(())
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        let _ = self.has_ended.send(());
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
