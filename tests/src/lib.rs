//! Shared helpers of the tests: the testbed, running `kindling`, and tiny guests in machine code.
//!
//! `cargo xtask test` lays out the *testbed*, a folder with the programs, images and kernels of the tests, makes it
//! available on the host with KVM, and sets `KINDLING_TESTBED` to its path.

pub mod faults;
pub mod guest_console;
pub mod io_uring;
pub mod machine_code;
pub mod network;
pub mod spare;
pub mod terminal;
pub mod user;
pub mod vsock;

use std::fmt;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

/// Timeout of every wait for a guest.
///
/// The clock of a lab that counts instructions goes on to its next timer while the lab waits for the host's disk, and takes this long in
/// a few seconds on a busy host.
pub const TIMEOUT: Duration = Duration::from_secs(1200);

/// The number of rounds of a repeated test: `usual`, or the value of `KINDLING_ROUNDS`.
///
/// # Panics
/// When `KINDLING_ROUNDS` is not a number.
#[must_use]
pub fn rounds(usual: u32) -> u32 {
    std::env::var("KINDLING_ROUNDS")
        .map_or(usual, |text| text.parse().expect("KINDLING_ROUNDS is not a number of rounds"))
}

/// Prints a progress line of a long test immediately; the harness would capture standard output until the end.
pub fn print_progress(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// A file or folder of the testbed.
///
/// # Panics
/// Outside `cargo xtask test`, or when there is no such file.
#[must_use]
pub fn testbed(name: &str) -> PathBuf {
    let Some(testbed) = std::env::var_os("KINDLING_TESTBED") else {
        panic!("KINDLING_TESTBED is not set: these tests are run by `cargo xtask test`");
    };
    let path = PathBuf::from(testbed).join(name);
    assert!(path.exists(), "the testbed contains no {name}");
    path
}

/// The `kindling` command.
#[must_use]
pub fn kindling() -> Command {
    Command::new(testbed("kindling"))
}

/// `kindling boot` of the busybox image, with standard input from /dev/null.
#[must_use]
pub fn boot() -> Command {
    let mut command = kindling();
    command.arg("boot").arg("--image").arg(testbed("images/busybox")).stdin(Stdio::null());
    command
}

/// A copy of an image, whose kernel a test can pre-boot without affecting other tests.
#[derive(Debug)]
pub struct Image(tempfile::TempDir);

impl Image {
    /// Copies an image of the testbed.
    ///
    /// # Panics
    /// When copying fails.
    #[must_use]
    pub fn copy_of(name: &str) -> Self {
        let image = Self(tempfile::tempdir().expect("cannot make a folder"));
        for entry in std::fs::read_dir(testbed("images").join(name)).expect("cannot read the image") {
            let entry = entry.expect("cannot read the image");
            std::fs::copy(entry.path(), image.path().join(entry.file_name())).expect("cannot copy the image");
        }
        image
    }

    /// The image's folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// A `kindling` command for this image, with standard input from /dev/null.
    #[must_use]
    pub fn command(&self, name: &str) -> Command {
        let mut command = kindling();
        command.arg(name).arg("--image").arg(self.path()).stdin(Stdio::null());
        command
    }

    /// Pre-boots the kernel; returns the file.
    ///
    /// # Panics
    /// When pre-booting fails.
    #[track_caller]
    #[must_use]
    pub fn preboot(&self, vcpus: &str, memory: &str) -> PathBuf {
        let outcome = run(self.command("preboot").args(["--vcpus", vcpus, "--memory", memory]));
        let file = self.path().join(format!("preboot/{vcpus}-{memory}"));
        outcome
            .expect_status(0)
            .expect_stderr(&format!("wrote {}; `kindling boot` continues from it", file.display()));
        assert_eq!(outcome.stdout, "", "{outcome}");
        file
    }

    /// Runs a shell script in a guest that starts from the pre-booted kernel.
    ///
    /// # Panics
    /// When the guest boots its own kernel instead.
    #[track_caller]
    #[must_use]
    pub fn prebooted_shell(&self, options: &[&str], script: &str) -> Outcome {
        let report = self.path().join("report.json");
        let mut command = self.command("boot");
        command.args(options).arg("--report-json").arg(&report);
        let outcome = run(command.args(["--", "/bin/sh", "-c", script]));
        assert!(is_from_prebooted_kernel(&report), "the guest booted instead: {outcome}");
        assert!(!outcome.stderr.contains("preboot"), "{outcome}");
        outcome
    }
}

/// Whether a guest started from a pre-booted kernel, according to its boot report.
///
/// # Panics
/// When the report cannot be read.
#[must_use]
pub fn is_from_prebooted_kernel(report: &Path) -> bool {
    std::fs::read_to_string(report).expect("no report").contains("pre-booted kernel loaded")
}

/// Boots the default image without a payload and checks init's greeting.
///
/// # Panics
/// When the greeting is not as expected.
#[track_caller]
pub fn expect_greeting(vcpus: u32, memory_mib: u32) {
    let outcome = run(kindling()
        .args(["boot", "--vcpus", &vcpus.to_string(), "--memory", &memory_mib.to_string(), "--image"])
        .arg(testbed("images/default"))
        .stdin(Stdio::null()));
    outcome.expect_status(0);
    let words: Vec<&str> = outcome.stdout.split_whitespace().collect();
    let position = |word: &str| words.iter().position(|w| *w == word).unwrap_or_else(|| panic!("{outcome}"));
    assert_eq!(words[position("on") + 1], vcpus.to_string(), "{outcome}");
    // The kernel reserves part of the memory: about 16 MiB and 2 %.
    let usable: u32 = words[position("usable,") - 2].parse().expect("no number");
    assert!(usable < memory_mib && usable > memory_mib - memory_mib / 40 - 24, "{outcome}");
    assert_eq!(outcome.stdout.lines().count(), 1, "a quiet kernel prints nothing: {outcome}");
    assert_eq!(outcome.stderr, "", "{outcome}");
}

/// The exit status and output of a program.
#[derive(Debug)]
pub struct Outcome {
    /// Exit status; `None` when a signal killed it.
    pub status: Option<i32>,
    /// Standard output without carriage returns.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "status {:?}\nstdout:\n{}\nstderr:\n{}", self.status, self.stdout, self.stderr)
    }
}

impl Outcome {
    /// Checks the exit status.
    ///
    /// # Panics
    /// When the status differs; the message has all output.
    #[track_caller]
    pub fn expect_status(&self, status: i32) -> &Self {
        assert_eq!(self.status, Some(status), "{self}");
        self
    }

    /// Checks that standard error contains a text.
    ///
    /// # Panics
    /// When it does not; the message has all output.
    #[track_caller]
    pub fn expect_stderr(&self, text: &str) -> &Self {
        assert!(self.stderr.contains(text), "standard error should contain {text:?}; {self}");
        self
    }

    /// Expects text on standard output.
    ///
    /// # Panics
    /// When it is not there.
    pub fn expect_stdout(&self, text: &str) -> &Self {
        assert!(self.stdout.contains(text), "standard output should have {text:?}; {self}");
        self
    }
}

/// A running program whose output is collected.
#[derive(Debug)]
pub struct Started {
    /// The process.
    pub child: Child,
    stdout: Option<JoinHandle<Vec<u8>>>,
    stderr: Option<JoinHandle<Vec<u8>>>,
}

fn collect(stream: Option<impl Read + Send + 'static>) -> Option<JoinHandle<Vec<u8>>> {
    let mut stream = stream?;
    Some(std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = stream.read_to_end(&mut bytes);
        bytes
    }))
}

/// Starts a program whose output is collected.
///
/// # Panics
/// When it cannot be started.
#[must_use]
pub fn start(command: &mut Command) -> Started {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("cannot start");
    let (stdout, stderr) = (collect(child.stdout.take()), collect(child.stderr.take()));
    Started { child, stdout, stderr }
}

impl Started {
    /// Waits for the program to exit.
    ///
    /// # Panics
    /// When it takes longer than `limit`; the program is then killed.
    #[track_caller]
    #[must_use]
    pub fn finish_within(mut self, limit: Duration) -> Outcome {
        let pid = self.child.id();
        let (sender, receiver) = mpsc::channel();
        let waiter = std::thread::spawn(move || {
            let status = self.child.wait().expect("cannot wait");
            let _ = sender.send(());
            (status, self.stdout, self.stderr)
        });
        let in_time = receiver.recv_timeout(limit).is_ok();
        if !in_time {
            kill(pid, libc::SIGKILL);
        }
        let (status, stdout, stderr) = waiter.join().expect("the waiting thread panicked");
        let text = |thread: Option<JoinHandle<Vec<u8>>>| {
            let bytes = thread.map(|thread| thread.join().expect("the reading thread panicked"));
            String::from_utf8_lossy(&bytes.unwrap_or_default()).replace('\r', "")
        };
        let outcome = Outcome { status: status.code(), stdout: text(stdout), stderr: text(stderr) };
        assert!(in_time, "the program did not end within {limit:?}; {outcome}");
        outcome
    }

    /// Sends a signal to the program.
    pub fn signal(&self, signal: i32) {
        kill(self.child.id(), signal);
    }
}

/// The processes of this name, those included that have ended and are not reaped.
///
/// # Panics
/// Without /proc.
#[must_use]
pub fn processes(name: &str) -> Vec<u32> {
    let entries = std::fs::read_dir("/proc").expect("/proc is mounted");
    let ids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    ids.filter(|id| {
        std::fs::read_to_string(format!("/proc/{id}/comm")).is_ok_and(|comm| comm.trim_end() == name)
    })
    .collect()
}

/// Sends a signal to a process of a test.
///
/// # Panics
/// When `pid` is out of range.
#[expect(unsafe_code, reason = "kill has no safe wrapper in std")]
pub fn kill(pid: u32, signal: i32) {
    let pid = i32::try_from(pid).expect("a process id");
    // SAFETY: kill does not access memory; the process belongs to a test and has not been waited for.
    unsafe { libc::kill(pid, signal) };
}

/// Runs a program to its end.
///
/// # Panics
/// When it takes longer than [`TIMEOUT`].
#[track_caller]
#[must_use]
pub fn run(command: &mut Command) -> Outcome {
    start(command).finish_within(TIMEOUT)
}
