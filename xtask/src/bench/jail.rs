//! The measurements of scenario `jail`: the cost of the monitor's jail for `kindling run`.

use super::measure::{Bench, LIMIT, SETTLE};
use super::metric::Metric;
use super::run::{Images, READY};
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

    /// The option of `kindling run`.
    const fn options(self) -> &'static [&'static str] {
        match self {
            Self::Off | Self::OffAsUser => &["--jail", "off"],
            Self::Standard => &[],
            Self::FullAsRoot | Self::FullAsUser => &["--jail", "full"],
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

/// The load of the host.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub(super) enum Host {
    /// No mounts and no other starts.
    Quiet,
    /// Many mounts.
    Mounts,
    /// Other starts at the same time.
    Starts,
}

/// Number of mounts of [`Host::Mounts`].
const MOUNTS: u32 = 500;
/// Number of starts of [`Host::Starts`].
const STARTS: u32 = 10;

impl Host {
    pub(super) const ALL: [Self; 3] = [Self::Quiet, Self::Mounts, Self::Starts];

    /// The prefix of the name in files.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Quiet => "jail",
            Self::Mounts => "jail_500_mounts",
            Self::Starts => "jail_10_starts",
        }
    }

    /// The title of a table.
    pub(super) const fn title(self) -> &'static str {
        match self {
            Self::Quiet => "kindling run with a jail, to its exit",
            Self::Mounts => "the same on a host with 500 more mounts",
            Self::Starts => "the same for ten at once, per guest",
        }
    }
}

impl Bench<'_> {
    /// Measures guests in jails.
    pub(super) fn jails(&mut self, images: &Images, runs: u32) -> Result<()> {
        ensure!(
            geteuid().is_root(),
            "--scenario jail starts guests as root and as another user; run it as root"
        );
        let user = User::new()?;
        for host in Host::ALL {
            let _mounts = (host == Host::Mounts).then(|| Mounts::new(self.scratch)).transpose()?;
            let starts = if host == Host::Starts { STARTS } else { 1 };
            for strength in Strength::ALL {
                // Warm-up: converts the image and pre-boots the kernel.
                self.jailed(images, strength, &user, 1)?;
            }
            for run in 1..=runs {
                eprintln!("{}: run {run} of {runs} ...", host.title());
                for strength in Strength::ALL {
                    let nanoseconds = self.jailed(images, strength, &user, starts)?;
                    self.add(Metric::Jail(host, strength), nanoseconds);
                }
            }
        }
        Ok(())
    }

    /// Runs this many guests at once; returns the nanoseconds for each.
    fn jailed(&self, images: &Images, strength: Strength, user: &User, count: u32) -> Result<u64> {
        thread::sleep(SETTLE);
        let start = Instant::now();
        let mut guests = Vec::new();
        for _ in 0..count {
            let mut run = self.run_command(images.busybox(), strength.options());
            run.args(["echo", READY]).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
            if matches!(strength, Strength::OffAsUser | Strength::FullAsUser) {
                user.start(&mut run);
            }
            guests.push(run.spawn().context("cannot start a guest")?);
        }
        for guest in guests {
            let output = guest.wait_with_output()?;
            let text = String::from_utf8_lossy(&output.stdout);
            ensure!(
                output.status.success() && text.trim_end() == READY,
                "it ended with {}: {text}{}",
                output.status,
                String::from_utf8_lossy(&output.stderr)
            );
            ensure!(Instant::now().since(start) < LIMIT.as_nanos().try_into()?, "it took too long");
        }
        Ok(Instant::now().since(start) / u64::from(count))
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
