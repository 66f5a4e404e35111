//! A guest that goes on when the command that started it has ended: a process of its own stays with it.

use crate::instances::{Instance, REPORT};
use crate::{STATUS_FAILURE, say};
use rustix::fs::{Mode, OFlags, open};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

/// Starts that process, and waits until its guest is ready or it has said why there is none; the exit status.
pub(super) fn start() -> io::Result<u8> {
    let mut arguments = std::env::args_os().skip(1);
    let mut child = Command::new(std::env::current_exe()?)
        .args(arguments.next())
        .arg("--stay")
        .args(arguments)
        .stdin(Stdio::null())
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

/// The command that waits for the guest to be ready, as the process that stays sees it: the other end of its output.
#[derive(Debug)]
pub(super) struct Starter {
    report: File,
    null: File,
    has_gone: AtomicBool,
}

impl Starter {
    pub(super) fn new(instance: &Instance) -> io::Result<Self> {
        let null = open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?.into();
        let report = File::create(instance.folder().join(REPORT))?;
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
