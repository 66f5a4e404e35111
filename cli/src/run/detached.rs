//! `kindling run --detach`: a background process (`kindling stay`) is the front of the guest.

use crate::{STATUS_FAILURE, print};
use kindling::guest::GuestDir;
use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags, fcntl_add_seals, memfd_create, open};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, Write};
use std::os::unix::ffi::OsStrExt;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

/// Maximum length of a command line in bytes: more than the host's kernel accepts (`_STK_LIM` in fs/exec.c).
const LINE_MAX: u64 = 8 << 20;

/// Starts the background process, and waits until it has started its guest or printed an error. Returns the exit status.
pub(super) fn start() -> io::Result<u8> {
    let mut child = Command::new(std::env::current_exe()?)
        .arg("stay")
        .stdin(in_memory(std::env::args_os().skip(1))?)
        .stdout(Stdio::piped())
        .spawn()?;
    let mut name = String::new();
    if let Some(output) = child.stdout.take() {
        BufReader::new(output).read_line(&mut name)?;
    }
    if name.ends_with('\n') {
        return Ok(print(name.as_bytes()));
    }
    let code = child.wait()?.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.filter(|&code| code != 0).unwrap_or(STATUS_FAILURE))
}

/// A sealed memfd with the arguments after `kindling`. All users can read the arguments of a process; those of a guest
/// may contain secrets in environment variables, and the background process lives as long as the guest.
fn in_memory(line: impl Iterator<Item = OsString>) -> io::Result<File> {
    let mut file = File::from(memfd_create("arguments", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?);
    for word in line {
        file.write_all(word.as_bytes())?;
        file.write_all(&[0])?;
    }
    file.rewind()?;
    fcntl_add_seals(&file, SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
    Ok(file)
}

/// Reads the command line from standard input, which is replaced by /dev/null.
pub(super) fn line() -> io::Result<Vec<OsString>> {
    let mut text = Vec::new();
    io::stdin().take(LINE_MAX).read_to_end(&mut text)?;
    rustix::stdio::dup2_stdin(open("/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?)?;
    // A zero terminates each word.
    let words = text.strip_suffix(&[0]).ok_or(io::ErrorKind::InvalidData)?;
    Ok(words.split(|&byte| byte == 0).map(|word| OsStr::from_bytes(word).to_owned()).collect())
}

/// The command `kindling run --detach` that waits for the start of the guest, as seen from the background process. The
/// command reads the name of the guest from a pipe, the standard output of the background process.
#[derive(Debug)]
pub(super) struct Launcher {
    report: File,
    null: File,
    is_released: AtomicBool,
}

impl Launcher {
    pub(super) fn new(guest: &GuestDir) -> io::Result<Self> {
        let null = open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?.into();
        let report = guest.create_report()?;
        Ok(Self { report, null, is_released: AtomicBool::new(false) })
    }

    /// Reports the started guest to the command, which then ends, and detaches this process from the terminal. Until then
    /// both are in one process group, so that Ctrl-C ends both.
    pub(super) fn release(&self, guest: &str) {
        let _ = rustix::process::setsid();
        let _ = rustix::stdio::dup2_stderr(&self.report);
        self.is_released.store(true, Ordering::Release);
        let _ = writeln!(io::stdout(), "{guest}");
        let _ = rustix::stdio::dup2_stdout(&self.null);
    }

    /// Whether the command was released.
    pub(super) fn is_released(&self) -> bool {
        self.is_released.load(Ordering::Acquire)
    }
}
