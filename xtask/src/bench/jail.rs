//! The measurements of scenario `jail`: the cost of the monitor's jail for `kindling run`, and of Firecracker's filters and
//! jailer for its boots.

use super::jailer;
use super::measure::{Bench, LIMIT, SETTLE};
use super::metric::Metric;
use super::process;
use super::run::{Images, READY};
use super::vmms::{Kind, Task};
use crate::profile::boots::INIT;
use anyhow::{Context, Result, ensure};
use kindling_vmm::Instant;
use rustix::process::geteuid;
use serde::{Deserialize, Serialize};
use std::fs;
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use tempfile::TempDir;

/// The strictness of the jail, and the user who starts the guest.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub(super) enum Strength {
    /// No jail.
    Off,
    /// The default.
    Standard,
    /// With namespaces and a separate root directory, for root.
    FullAsRoot,
    /// No jail, for another user, whose start has other steps than root's: the baseline of the next.
    OffAsUser,
    /// The full jail for another user.
    FullAsUser,
}

impl Strength {
    pub(super) const ALL: [Self; 5] =
        [Self::Off, Self::Standard, Self::FullAsRoot, Self::OffAsUser, Self::FullAsUser];

    /// The options of `kindling run`.
    const fn options(self) -> &'static [&'static str] {
        match self {
            Self::Off | Self::OffAsUser => &["--report", "--jail", "off"],
            Self::Standard => &["--report"],
            Self::FullAsRoot | Self::FullAsUser => &["--report", "--jail", "full"],
        }
    }

    /// The name in files.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Standard => "standard",
            Self::FullAsRoot => "full_as_root",
            Self::OffAsUser => "off_as_user",
            Self::FullAsUser => "full_as_user",
        }
    }

    /// The title of a column.
    pub(super) const fn title(self) -> &'static str {
        match self {
            Self::Off => "off, ms",
            Self::Standard => "standard, ms",
            Self::FullAsRoot => "full as root, ms",
            Self::OffAsUser => "off as user, ms",
            Self::FullAsUser => "full as user, ms",
        }
    }
}

/// What is measured.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub(super) enum Span {
    /// To the first instruction of init, before which the jail is complete. For other monitors, to the payload's output.
    Init,
    /// To the end of the process.
    Exit,
    /// [`Self::Init`] on a host with many mounts.
    InitWithMounts,
    /// [`Self::Exit`] on a host with many mounts.
    ExitWithMounts,
    /// To the end of several processes that are started at once, for each.
    ExitOfSeveral,
}

impl Span {
    pub(super) const ALL: [Self; 5] =
        [Self::Init, Self::Exit, Self::InitWithMounts, Self::ExitWithMounts, Self::ExitOfSeveral];

    /// The prefix of the name in files.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Init => "jail_start",
            Self::Exit => "jail_exit",
            Self::InitWithMounts => "jail_500_mounts_start",
            Self::ExitWithMounts => "jail_500_mounts_exit",
            Self::ExitOfSeveral => "jail_10_starts",
        }
    }

    /// The title of a table.
    pub(super) const fn title(self) -> &'static str {
        match self {
            Self::Init => "a start with a jail, to init",
            Self::Exit | Self::ExitWithMounts => "the same, to the end of the process",
            Self::InitWithMounts => "on a host with 500 more mounts, to init",
            Self::ExitOfSeveral => "ten at once, to the end of all, per guest",
        }
    }
}

/// Number of mounts of [`Span::InitWithMounts`].
const MOUNTS: u32 = 500;
/// Number of starts of [`Span::ExitOfSeveral`].
const STARTS: u32 = 10;

/// A start that is prepared.
struct Start {
    command: Command,
    /// The output that shows that the program runs.
    text: &'static str,
    /// What the jailer leaves behind.
    _root: Option<jailer::Root>,
}

impl Bench<'_> {
    /// Measures guests in jails.
    pub(super) fn jails(&mut self, images: &Images, runs: u32) -> Result<()> {
        ensure!(
            geteuid().is_root(),
            "--scenario jail starts guests as root and as another user; run it as root"
        );
        let user = User::new()?;
        let strengths = self.strengths();
        self.single(images, &strengths, &user, runs, Span::Init, Span::Exit)?;
        let mounts = Mounts::new(self.scratch)?;
        self.single(images, &strengths, &user, runs, Span::InitWithMounts, Span::ExitWithMounts)?;
        drop(mounts);
        for run in 1..=runs {
            eprintln!("{}: run {run} of {runs} ...", Span::ExitOfSeveral.title());
            for &strength in &strengths {
                let nanoseconds = self.many(images, strength, &user)?;
                self.add(Metric::Jail(Span::ExitOfSeveral, strength), nanoseconds);
            }
        }
        Ok(())
    }

    /// Measures guests one after the other: their starts and their ends.
    fn single(
        &mut self,
        images: &Images,
        strengths: &[Strength],
        user: &User,
        runs: u32,
        start: Span,
        end: Span,
    ) -> Result<()> {
        for &strength in strengths {
            // Warm-up: converts the image and pre-boots the kernel.
            self.one(images, strength, user)?;
        }
        for run in 1..=runs {
            eprintln!("{}: run {run} of {runs} ...", start.title());
            for &strength in strengths {
                let run = self.one(images, strength, user)?;
                self.add(Metric::Jail(start, strength), self.start_of(&run)?);
                self.add(Metric::Jail(end, strength), run.ended.since(run.spawned));
            }
        }
        Ok(())
    }

    /// The jails that the monitor has.
    fn strengths(&mut self) -> Vec<Strength> {
        if self.vmm.kind.is_kindling() {
            return Strength::ALL.to_vec();
        }
        let mut strengths = vec![Strength::Off, Strength::Standard];
        let jailer = jailer::beside(&self.vmm.path);
        if jailer.exists() {
            strengths.push(Strength::FullAsRoot);
        } else {
            self.omitted.push(format!("{} in its jailer: there is no {}", self.vmm.name, jailer.display()));
        }
        strengths
    }

    /// Prepares a start.
    fn start(&self, images: &Images, strength: Strength, user: &User, number: u32) -> Result<Start> {
        if self.vmm.kind == Kind::Firecracker {
            let text = Task::Print.text();
            if strength == Strength::FullAsRoot {
                let (command, root) = jailer::command(self, number)?;
                return Ok(Start { command, text, _root: Some(root) });
            }
            let mut command =
                self.vmm.command(self.guest, self.case, Task::Print, &self.devices, self.scratch, None)?;
            command.args((strength == Strength::Off).then_some("--no-seccomp"));
            return Ok(Start { command, text, _root: None });
        }
        let mut command = self.run_command(images.busybox(), strength.options());
        command.args(["echo", READY]);
        if matches!(strength, Strength::OffAsUser | Strength::FullAsUser) {
            user.start(&mut command);
        }
        Ok(Start { command, text: READY, _root: None })
    }

    /// Runs one guest.
    fn one(&self, images: &Images, strength: Strength, user: &User) -> Result<process::Run> {
        thread::sleep(SETTLE);
        let start = self.start(images, strength, user, 0)?;
        process::run(start.command, start.text, LIMIT, |_| Ok(()))
    }

    /// The nanoseconds of a run until its guest has started.
    fn start_of(&self, run: &process::Run) -> Result<u64> {
        if !self.vmm.kind.is_kindling() {
            return Ok(run.seen.since(run.spawned));
        }
        run.step(INIT)
    }

    /// Runs several guests at once; returns the nanoseconds for each.
    fn many(&self, images: &Images, strength: Strength, user: &User) -> Result<u64> {
        let starts = (0..STARTS).map(|number| self.start(images, strength, user, number));
        let mut starts = starts.collect::<Result<Vec<_>>>()?;
        thread::sleep(SETTLE);
        let began = Instant::now();
        let mut guests = Vec::new();
        for start in &mut starts {
            let command = start.command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
            guests.push(command.spawn().context("cannot start a guest")?);
        }
        for (guest, start) in guests.into_iter().zip(&starts) {
            let output = guest.wait_with_output()?;
            let text = String::from_utf8_lossy(&output.stdout);
            ensure!(
                output.status.success() && text.contains(start.text),
                "it ended with {}: {text}{}",
                output.status,
                String::from_utf8_lossy(&output.stderr)
            );
            ensure!(Instant::now().since(began) < LIMIT.as_nanos().try_into()?, "it took too long");
        }
        Ok(Instant::now().since(began) / u64::from(STARTS))
    }
}

/// A user other than root, with separate directories.
struct User(TempDir);

impl User {
    /// A user ID that needs no account.
    const ID: u32 = 1000;

    fn new() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        chown(folder.path(), Some(Self::ID), Some(Self::ID))?;
        Ok(Self(folder))
    }

    /// Makes this user start the command.
    fn start(&self, command: &mut Command) {
        command.uid(Self::ID).gid(Self::ID);
        for variable in ["XDG_RUNTIME_DIR", "XDG_CACHE_HOME", "XDG_DATA_HOME"] {
            command.env(variable, self.0.path());
        }
    }
}

/// Many mounts, unmounted on drop.
struct Mounts(PathBuf);

impl Mounts {
    fn new(scratch: &Path) -> Result<Self> {
        let this = Self(scratch.join("mounts"));
        for number in 0..MOUNTS {
            let at = this.0.join(number.to_string());
            fs::create_dir_all(&at)?;
            let mounted = Command::new("mount").args(["-t", "tmpfs", "none"]).arg(at).status()?;
            ensure!(mounted.success(), "mount ended with {mounted}");
        }
        Ok(this)
    }
}

impl Drop for Mounts {
    fn drop(&mut self) {
        for number in 0..MOUNTS {
            let _ = Command::new("umount").arg(self.0.join(number.to_string())).status();
        }
    }
}
