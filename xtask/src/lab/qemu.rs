//! Running the lab: QEMU, and the other end of its channel.

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

/// The lab said nothing for this long, and was stopped.
#[derive(Debug)]
pub(crate) struct Silent(pub(super) Duration);

impl std::error::Error for Silent {}

impl fmt::Display for Silent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "it said nothing for {} s", self.0.as_secs())
    }
}

/// Drives a lab's command in place of this process's standard streams: takes what the command prints to either of its
/// streams, and returns what becomes the command's input; an empty answer ends that.
pub(crate) type Driver<'a> = &'a mut dyn FnMut(&[u8]) -> Result<Option<Vec<u8>>>;

/// Boots a lab, runs its job, and returns the command's exit status. A lab that says nothing for `limit` is stopped.
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
    // The lab has powered off, or it is of no use any more.
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

/// The lab's processor for jobs that need XSAVE.
const PROCESSOR_WITH_XSAVE: &str = "EPYC,+svm,+npt";
/// The processor of all other jobs. Like every processor without XSAVE it has no AVX: some programs check the bit of AVX
/// alone (netavark's SHA-512 does).
const PROCESSOR: &str = "EPYC,+svm,+npt,-xsave,-avx,-avx2,-f16c,-fma";

/// TCG says at every start which features of the processor model it does not have.
const UNSUPPORTED: &str = "TCG doesn't support requested feature";

fn last_lines(path: &Path) -> String {
    let bytes = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().filter(|line| !line.contains(UNSUPPORTED)).collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}

fn spawn(job: &Job, kernel: &Path, initramfs: &File, console: &Path, messages: File) -> Result<Child> {
    // The file has no name of its own; QEMU opens it through this process.
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
        command.args(["-drive", &format!("if=virtio,format=raw,readonly=on,file={}", disk.display())]);
    }
    if job.counts_instructions() {
        command.args(["-icount", "shift=0,sleep=off"]);
    }
    die_with_this_process(&mut command);
    command.spawn().context("cannot start qemu-system-x86_64")
}

/// Whatever ends this process, Ctrl-C or SIGKILL, ends QEMU too.
#[expect(unsafe_code, reason = "code between fork and exec")]
fn die_with_this_process(command: &mut Command) {
    use rustix::process::{Signal, set_parent_process_death_signal};
    use std::os::unix::process::CommandExt;
    // SAFETY: the closure makes one system call and neither allocates nor locks.
    unsafe {
        command.pre_exec(|| Ok(set_parent_process_death_signal(Some(Signal::KILL))?));
    }
}

/// Passes this process's standard input on, until it ends or the lab does.
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
    // QEMU takes the end of its standard input for the end of the channel in both directions, so
    // it stays open until this process ends.
    std::mem::forget(channel);
}

/// Passes the command's output on and its files back, until it ends.
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
            ensure!(ready > 0, Silent(limit));
        }
        let (kind, data) = frame::read(&mut channel).context("its channel closed")?;
        match kind {
            Kind::Output | Kind::Error => output(kind, &data)?,
            Kind::FileName => file = Some(create(job, &String::from_utf8_lossy(&data))?),
            Kind::FileData => {
                file.as_mut()
                    .context("a file without a name")?
                    .write_all(&data)
                    .context("copying a file back")?;
            }
            Kind::Failure => bail!("{}", String::from_utf8_lossy(&data)),
            Kind::Exit => return Ok(data.first().copied().unwrap_or(255)),
            Kind::Input => bail!("it sent what only its host sends"),
        }
    }
}

fn write_through(mut stream: impl Write, data: &[u8]) -> Result<()> {
    stream.write_all(data).and_then(|()| stream.flush()).context("cannot pass the command's output on")
}

/// The lab may only send the files that it was asked for.
fn create(job: &Job, name: &str) -> Result<File> {
    let (_, target) = job
        .get
        .iter()
        .find(|(asked, _)| asked == name)
        .with_context(|| format!("nobody asked for {name}"))?;
    if let Some(parent) = target.parent() {
        fs::create_dir_all(parent)?;
    }
    File::create(target).with_context(|| format!("cannot create {}", target.display()))
}
