//! Runs QEMU and serves the host's end of the lab's channel.

use super::frame::{self, Kind};
use super::{Job, corrected_qemu, disk};
use crate::debian;
use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

/// The error of a lab that was stopped because it printed nothing for this time.
#[derive(Debug)]
pub(crate) struct OutputTimeout(pub(super) Duration);

impl std::error::Error for OutputTimeout {}

impl fmt::Display for OutputTimeout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no output for {} s", self.0.as_secs())
    }
}

/// Replaces this process's standard streams: gets the command's standard output and standard error, and returns input
/// for the command. An empty answer closes the command's input.
pub(crate) type Driver<'a> = &'a mut dyn FnMut(&[u8]) -> Result<Option<Vec<u8>>>;

/// Boots a lab, runs its job, and returns the command's exit status. A lab without output for `limit` is stopped.
pub(super) fn run(job: &Job, limit: Option<Duration>, driver: Option<Driver<'_>>) -> Result<u8> {
    debian::ensure_lab_tools()?;
    let kernel = disk::kernel()?;
    let initramfs = disk::pack(job)?;
    let console = tempfile::NamedTempFile::new()?;
    let messages = tempfile::NamedTempFile::new()?;
    let mut child = spawn(job, &kernel, &initramfs, console.path(), messages.reopen()?)?;
    let channel = child.stdout.take().context("QEMU has no standard output")?;
    let mut input = child.stdin.take().context("QEMU has no standard input")?;
    let result = match driver {
        Some(driver) => serve(job, channel, limit, |_, data| match driver(data)? {
            Some(answer) => Ok(frame::write(&mut input, Kind::Input, &answer)?),
            None => Ok(()),
        }),
        None => {
            std::thread::spawn(move || forward_input(input));
            serve(job, channel, limit, |kind, data| match kind {
                Kind::Error => write_through(io::stderr(), data),
                _ => write_through(io::stdout(), data),
            })
        }
    };
    // The lab has sent its result, or has failed.
    let _ = child.kill();
    let _ = child.wait();
    result.with_context(|| {
        format!(
            "the lab failed; the end of its console:\n{}\nthe end of QEMU's messages:\n{}\nbecause",
            last_lines(console.path()),
            last_lines(messages.path())
        )
    })
}

/// The CPU model for jobs that require XSAVE.
const PROCESSOR_WITH_XSAVE: &str = "EPYC,+svm,+npt";
/// The CPU model of all other jobs. It has neither XSAVE nor AVX: some programs check only the CPUID bit of AVX
/// (netavark's SHA-512 does).
const PROCESSOR: &str = "EPYC,+svm,+npt,-xsave,-avx,-avx2,-f16c,-fma";

/// TCG prints this at every start for unsupported features of the CPU model.
const UNSUPPORTED: &str = "TCG doesn't support requested feature";

fn last_lines(path: &Path) -> String {
    let bytes = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().filter(|line| !line.contains(UNSUPPORTED)).collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}

fn spawn(job: &Job, kernel: &Path, initramfs: &File, console: &Path, messages: File) -> Result<Child> {
    // The file is unnamed; QEMU opens it through this process's descriptor.
    let initrd = format!("/proc/{}/fd/{}", std::process::id(), initramfs.as_raw_fd());
    let processor = if job.has_xsave { PROCESSOR_WITH_XSAVE } else { PROCESSOR };
    let mut command = Command::new(corrected_qemu::program());
    command
        .args(["-accel", "tcg,thread=single", "-cpu", processor, "-M", "q35,i8042=off"])
        .args(["-smp", &job.cpus.to_string(), "-m", &job.memory_mib.to_string()])
        .args(["-nodefaults", "-display", "none", "-no-reboot"])
        .args(["-serial", &format!("file:{}", console.display())])
        .args(["-chardev", "stdio,id=channel,signal=off", "-device", "virtio-serial-pci"])
        .args(["-device", "virtserialport,chardev=channel"])
        .arg("-kernel")
        .arg(kernel)
        .args(["-initrd", &initrd])
        .args(["-append", "console=ttyS0 quiet panic=-1 mitigations=off"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(messages);
    if let Some(disk) = &job.disk {
        // While a lab that counts instructions waits for the host's disk, its clock goes on to its next timer, so that time limits
        // expire at once. From the host's memory, reads do not wait.
        let mut file = File::open(disk).context("cannot open the lab's disk")?;
        io::copy(&mut file, &mut io::sink()).context("cannot read the lab's disk")?;
        command.args(["-drive", &format!("if=virtio,format=raw,readonly=on,file={}", disk.display())]);
    }
    if job.counts_instructions() {
        command.args(["-icount", "shift=0,sleep=off"]);
    }
    die_with_this_process(&mut command);
    command.spawn().context("cannot start qemu-system-x86_64")
}

/// Kills QEMU when this process ends, even by SIGKILL.
#[expect(unsafe_code, reason = "code between fork and exec")]
fn die_with_this_process(command: &mut Command) {
    use rustix::process::{Signal, set_parent_process_death_signal};
    use std::os::unix::process::CommandExt;
    // SAFETY: the closure makes one system call and neither allocates nor locks.
    unsafe {
        command.pre_exec(|| Ok(set_parent_process_death_signal(Some(Signal::KILL))?));
    }
}

/// Forwards this process's standard input until it or the lab ends.
fn forward_input(mut channel: ChildStdin) {
    let mut buffer = vec![0; 4096];
    loop {
        let length = io::stdin().read(&mut buffer).unwrap_or(0);
        if frame::write(&mut channel, Kind::Input, &buffer[..length]).is_err() {
            return;
        }
        if length == 0 {
            break;
        }
    }
    // QEMU closes both directions of the channel at the end of its standard input, so the input stays open until this
    // process ends.
    std::mem::forget(channel);
}

/// Forwards the command's output and receives its files, until the command exits.
fn serve(
    job: &Job,
    mut channel: ChildStdout,
    limit: Option<Duration>,
    mut output: impl FnMut(Kind, &[u8]) -> Result<()>,
) -> Result<u8> {
    let mut file: Option<File> = None;
    loop {
        if let Some(limit) = limit {
            let time = Timespec::try_from(limit)?;
            let mut descriptors = [PollFd::new(&channel, PollFlags::IN)];
            let ready = retry_on_intr(|| poll(&mut descriptors, Some(&time)))?;
            ensure!(ready > 0, OutputTimeout(limit));
        }
        let (kind, data) = frame::read(&mut channel).context("the channel to the lab was closed")?;
        match kind {
            Kind::Output | Kind::Error => output(kind, &data)?,
            Kind::FileName => file = Some(create(job, &String::from_utf8_lossy(&data))?),
            Kind::FileData => {
                file.as_mut()
                    .context("the lab sent file data without a name")?
                    .write_all(&data)
                    .context("cannot write a file from the lab")?;
            }
            Kind::Failure => bail!("{}", String::from_utf8_lossy(&data)),
            Kind::Exit => return Ok(data.first().copied().unwrap_or(255)),
            Kind::Input => bail!("the lab sent a frame of standard input"),
        }
    }
}

fn write_through(mut stream: impl Write, data: &[u8]) -> Result<()> {
    stream.write_all(data).and_then(|()| stream.flush()).context("cannot forward the command's output")
}

/// Creates a file that the lab sends; only requested files are accepted.
fn create(job: &Job, name: &str) -> Result<File> {
    let (_, target) = job
        .get
        .iter()
        .find(|(asked, _)| asked == name)
        .with_context(|| format!("the lab sent {name}, which was not requested"))?;
    if let Some(parent) = target.parent() {
        fs::create_dir_all(parent)?;
    }
    File::create(target).with_context(|| format!("cannot create {}", target.display()))
}
