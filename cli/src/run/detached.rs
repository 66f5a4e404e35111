//! A guest that goes on when the command that started it has ended: a process of its own stays with it.

use crate::{STATUS_FAILURE, say};
use kindling::guest::GuestDir;
use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags, fcntl_add_seals, memfd_create, open};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, Write};
use std::os::unix::ffi::OsStrExt;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

/// Bytes of a command line: more than the host's kernel takes (`_STK_LIM` in fs/exec.c).
const LINE_MAX: u64 = 8 << 20;

/// Starts that process, and waits until its guest is ready or it has said why there is none; the exit status.
pub(super) fn start() -> io::Result<u8> {
    let mut child = Command::new(std::env::current_exe()?)
        .arg("stay")
        .stdin(in_memory(std::env::args_os())?)
        .stdout(Stdio::piped())
        .spawn()?;
    let mut name = String::new();
    if let Some(output) = child.stdout.take() {
        BufReader::new(output).read_line(&mut name)?;
    }
    if name.ends_with('\n') {
        return Ok(say(name.as_bytes()));
    }
    let code = child.wait()?.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.filter(|&code| code != 0).unwrap_or(STATUS_FAILURE))
}

/// A command line in a file without a name. Everybody can read the command line of a process, and this one may have
/// secrets of the guest's environment and lives as long as the guest.
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

/// The command line that the command wrote for this process, which has an empty input from then on.
pub(super) fn line() -> io::Result<Vec<OsString>> {
    let mut text = Vec::new();
    io::stdin().take(LINE_MAX).read_to_end(&mut text)?;
    rustix::stdio::dup2_stdin(open("/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?)?;
    // Behind each word is a zero.
    let words = text.strip_suffix(&[0]).ok_or(io::ErrorKind::InvalidData)?;
    Ok(words.split(|&byte| byte == 0).map(|word| OsStr::from_bytes(word).to_owned()).collect())
}

/// The command that waits for the guest to be ready, as the process that stays sees it: the other end of its output.
#[derive(Debug)]
pub(super) struct Starter {
    report: File,
    null: File,
    has_gone: AtomicBool,
}

impl Starter {
    pub(super) fn new(guest: &GuestDir) -> io::Result<Self> {
        let null = open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?.into();
        let report = guest.create_report()?;
        Ok(Self { report, null, has_gone: AtomicBool::new(false) })
    }

    /// Tells it that the guest is ready. From here on nothing connects this process to a terminal. Until then it
    /// belonged to the command's job, so that Ctrl-C ended both.
    pub(super) fn let_go(&self, instance: &str) {
        let _ = rustix::process::setsid();
        let _ = rustix::stdio::dup2_stderr(&self.report);
        self.has_gone.store(true, Ordering::Release);
        let _ = writeln!(io::stdout(), "{instance}");
        let _ = rustix::stdio::dup2_stdout(&self.null);
    }

    /// Whether it was told.
    pub(super) fn has_gone(&self) -> bool {
        self.has_gone.load(Ordering::Acquire)
    }
}
