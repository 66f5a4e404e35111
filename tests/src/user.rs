//! An isolated user of `kindling run`.

use crate::{kindling, testbed};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The home and runtime directories of a user, separate for each test.
#[derive(Debug)]
pub struct User(tempfile::TempDir);

impl Default for User {
    fn default() -> Self {
        Self::new()
    }
}

impl User {
    /// A user without guests.
    ///
    /// # Panics
    /// When the folder cannot be created.
    #[must_use]
    pub fn new() -> Self {
        Self(tempfile::tempdir().expect("cannot make a folder"))
    }

    /// The runtime directory.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.0.path()
    }

    /// `kindling COMMAND` as this user, with standard input from /dev/null. Users share the cache of pre-booted
    /// kernels.
    #[must_use]
    pub fn command(&self, name: &str) -> Command {
        let mut command = kindling();
        command
            .arg(name)
            .env("XDG_RUNTIME_DIR", self.0.path())
            .env("XDG_CACHE_HOME", std::env::temp_dir())
            .env("XDG_DATA_HOME", self.0.path().join("data"))
            .env("PATH", format!("{}:/bin:/usr/bin", testbed("e2fsprogs").display()))
            .env("KINDLING_IMAGE", testbed("images/run"))
            .stdin(Stdio::null());
        command
    }

    /// An example of the library as this user, with Kindling's programs in another directory.
    #[must_use]
    pub fn example(&self, name: &str) -> Command {
        let mut command = Command::new(testbed("examples").join(name));
        command.env("KINDLING_PROGRAMS", testbed("."));
        for (name, value) in self.command("run").get_envs() {
            command.env(name, value.unwrap_or_default());
        }
        command.stdin(Stdio::null());
        command
    }

    /// `kindling run OPTIONS IMAGE` of the busybox image.
    #[must_use]
    pub fn run(&self, options: &[&str]) -> Command {
        let mut command = self.command("run");
        command.args(options).arg(testbed("busybox.erofs"));
        command
    }

    /// Runs a shell script in a guest.
    #[must_use]
    pub fn shell(&self, script: &str) -> Command {
        let mut command = self.run(&[]);
        command.args(["sh", "-c", script]);
        command
    }

    /// Whether the runtime directory contains no guests.
    #[must_use]
    pub fn has_no_guests(&self) -> bool {
        // The lock of the assignment of ports remains.
        let is_guest = |entry: std::io::Result<std::fs::DirEntry>| {
            entry.map_or(true, |entry| entry.file_name() != ".ports")
        };
        std::fs::read_dir(self.0.path().join("kindling")).is_ok_and(|mut entries| !entries.any(is_guest))
    }
}

/// A tmpfs of 8 MiB, unmounted on drop.
#[derive(Debug)]
pub struct SmallTmpfs(PathBuf);

impl SmallTmpfs {
    /// Mounts it on a folder, which is created. Prints a message and returns `None` if the user may not mount.
    ///
    /// # Panics
    /// When the folder cannot be created.
    #[must_use]
    #[expect(clippy::print_stdout, reason = "skipped checks are reported")]
    pub fn at(folder: &Path) -> Option<Self> {
        std::fs::create_dir_all(folder).expect("cannot make a folder");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "size=8m,mode=700", "tmpfs"]).arg(folder);
        if mount.status().is_ok_and(|status| status.success()) {
            return Some(Self(folder.to_owned()));
        }
        println!("skipped: this user may not mount a tmpfs");
        None
    }
}

impl Drop for SmallTmpfs {
    fn drop(&mut self) {
        // Lazily, because a process that is exiting may still have files open there.
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// Sends bytes to a command that must echo them and exit with status 0.
///
/// # Panics
/// When other bytes are received, or the command fails.
#[track_caller]
pub fn expect_echo(command: &mut Command, bytes: &[u8]) {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let (mut input, sent) = (child.stdin.take().unwrap(), bytes.to_vec());
    let writer = std::thread::spawn(move || input.write_all(&sent));
    let mut got = Vec::new();
    child.stdout.take().unwrap().read_to_end(&mut got).unwrap();
    writer.join().unwrap().unwrap();
    assert!(got == bytes, "received {} bytes of {}, or different ones", got.len(), bytes.len());
    assert!(child.wait().unwrap().success());
}
