//! A user of `kindling run`, who has nothing to do with others.

use crate::{kindling, testbed};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A user's home and runtime directory, of which each test has its own.
#[derive(Debug)]
pub struct User(tempfile::TempDir);

impl Default for User {
    fn default() -> Self {
        Self::new()
    }
}

impl User {
    /// Without guests.
    ///
    /// # Panics
    /// When no folder can be made.
    #[must_use]
    pub fn new() -> Self {
        Self(tempfile::tempdir().expect("cannot make a folder"))
    }

    /// The runtime directory.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.0.path()
    }

    /// `kindling COMMAND` as this user, without input. Kernels that are booted once are shared by all.
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

    /// `kindling run OPTIONS IMAGE` with busybox.
    #[must_use]
    pub fn run(&self, options: &[&str]) -> Command {
        let mut command = self.command("run");
        command.args(options).arg(testbed("busybox.erofs"));
        command
    }

    /// A shell script in a guest.
    #[must_use]
    pub fn shell(&self, script: &str) -> Command {
        let mut command = self.run(&[]);
        command.args(["sh", "-c", script]);
        command
    }

    /// Whether no guest has left anything.
    #[must_use]
    pub fn is_tidy(&self) -> bool {
        std::fs::read_dir(self.0.path().join("kindling")).is_ok_and(|mut entries| entries.next().is_none())
    }
}

/// A disk of 8 MiB, as long as this lives.
#[derive(Debug)]
pub struct SmallDisk(PathBuf);

impl SmallDisk {
    /// Mounts it on a folder, which is made. Says so where this user may not mount.
    ///
    /// # Panics
    /// When the folder cannot be made.
    #[must_use]
    #[expect(clippy::print_stdout, reason = "what is not tested is said")]
    pub fn at(folder: &Path) -> Option<Self> {
        std::fs::create_dir_all(folder).expect("cannot make a folder");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "size=8m,mode=700", "tmpfs"]).arg(folder);
        if mount.status().is_ok_and(|status| status.success()) {
            return Some(Self(folder.to_owned()));
        }
        println!("no small disk: this user may not mount");
        None
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // A process that ends may still have something open there.
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// Sends bytes into a command and compares what comes back with them; it ends with status 0.
///
/// # Panics
/// When other bytes come back, or it fails.
#[track_caller]
pub fn expect_echo(command: &mut Command, bytes: &[u8]) {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let (mut input, sent) = (child.stdin.take().unwrap(), bytes.to_vec());
    let writer = std::thread::spawn(move || input.write_all(&sent));
    let mut got = Vec::new();
    child.stdout.take().unwrap().read_to_end(&mut got).unwrap();
    writer.join().unwrap().unwrap();
    assert!(got == bytes, "{} bytes of {} came back, or others", got.len(), bytes.len());
    assert!(child.wait().unwrap().success());
}
