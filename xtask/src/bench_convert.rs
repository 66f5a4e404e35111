//! The cost of converting a container image to a root filesystem, compared with mkfs.erofs on the same tree: CPU time
//! of this host (user and system), and wall-clock time.
//!
//! The lab is not used: its processor has no SHA instructions, and there SHA-256 would be nearly all of the work.
//! Wall-clock time on a host is noisy and depends on its idle processors, so only the ratio within one run is
//! meaningful.

use crate::{docker_archive, test_images};
use anyhow::{Context, Result, ensure};
use kindling_vmm::config::image::sha256_of;
use nix::sys::resource::{UsageWho, getrusage};
use serde_json::json;
use std::fmt;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use xshell::{Shell, cmd};

/// The image that is converted: Debian with Node.js, about 200 MiB.
const IMAGE: &str = "node";

/// Medians of all runs.
#[derive(Debug)]
pub(crate) struct Figures {
    /// Bytes of the image's files, as one layer.
    pub(crate) bytes: u64,
    /// `mkfs.erofs` on the unpacked tree.
    pub(crate) mkfs: Times,
    /// `kindling-oci prepare` of the tree as one uncompressed layer.
    pub(crate) plain: Times,
    /// SHA-256 of that layer, which is part of `plain`.
    pub(crate) digest: Times,
    /// `kindling-oci prepare` of the same layer compressed with gzip.
    pub(crate) gzip: Times,
    /// `tar --extract` of that layer, after which `mkfs.erofs` would still have to run.
    pub(crate) unpack: Times,
}

/// CPU time and wall-clock time.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Times {
    /// User and system CPU time.
    pub(crate) processor: Duration,
    /// Wall-clock time.
    pub(crate) waited: Duration,
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |time: Duration| time.as_secs_f64() * 1000.0;
        writeln!(f, "converting {} MiB, ms           processor     waited", self.bytes >> 20)?;
        for (name, times) in [
            ("mkfs.erofs on the tree", self.mkfs),
            ("kindling-oci, layer of tar", self.plain),
            ("  of which the digest, beside the rest", self.digest),
            ("kindling-oci, layer of tar.gz", self.gzip),
            ("tar on that layer, before mkfs.erofs", self.unpack),
        ] {
            let ratio = times.waited.as_secs_f64() / self.mkfs.waited.as_secs_f64();
            writeln!(f, "{name:36} {:7.0}    {:7.0}  {ratio:5.2}x", ms(times.processor), ms(times.waited))?;
        }
        Ok(())
    }
}

/// `cargo xtask bench-convert`.
pub(crate) fn run(runs: usize) -> Result<u8> {
    print!("{}", measure(runs)?);
    Ok(0)
}

/// Measures each conversion `runs` times.
pub(crate) fn measure(runs: usize) -> Result<Figures> {
    let images = test_images::build()?;
    let scratch =
        tempfile::tempdir_in(images.folder.parent().context("the folder of test images has no parent")?)?;
    let scratch = scratch.path();
    let (tree, shell) = (scratch.join("tree"), Shell::new()?);
    let rootfs = images.prepare(IMAGE)?;
    cmd!(shell, "fsck.erofs --extract={tree} {rootfs}").quiet().ignore_stdout().ignore_stderr().run()?;
    let plain = docker_archive::write(scratch, &tree, &json!({}))?;
    let (layer, gzip) = (scratch.join("layer.tar"), scratch.join("gzip.tar"));
    shell.change_dir(scratch);
    cmd!(shell, "gzip --keep layer.tar").quiet().run()?;
    let manifest = json!([{ "Config": "config.json", "Layers": ["layer.tar.gz"] }]);
    fs::write(scratch.join("manifest.json"), manifest.to_string())?;
    cmd!(shell, "tar --create --file {gzip} manifest.json config.json layer.tar.gz").quiet().run()?;
    let erofs = scratch.join("mkfs.erofs");
    let cache = scratch.join("cache");
    let prepare = |archive: &Path| {
        let mut command = Command::new(&images.program);
        command.args(["prepare", "--cache"]).args([&cache, archive]);
        time(&mut command).and_then(|time| Ok((time, fs::remove_dir_all(&cache)?).0))
    };
    let mut times: [Vec<Times>; 5] = Default::default();
    for _ in 0..runs {
        let mut mkfs = Command::new("mkfs.erofs");
        times[0].push(time(mkfs.args(["-T0", "-E", "noinline_data"]).args([&erofs, &tree]))?);
        times[1].push(prepare(&plain)?);
        times[2].push(measured(UsageWho::RUSAGE_THREAD, || Ok(sha256_of(&layer).map(drop)?))?);
        times[3].push(prepare(&gzip)?);
        let (unpacked, compressed) = (scratch.join("unpacked"), scratch.join("layer.tar.gz"));
        fs::create_dir(&unpacked)?;
        let mut tar = Command::new("tar");
        times[4].push(time(
            tar.arg("--extract").arg("--file").arg(compressed).arg("--directory").arg(&unpacked),
        )?);
        fs::remove_dir_all(unpacked)?;
    }
    let [mkfs, plain, digest, gzip, unpack] = times.map(|times| {
        let median = |part: fn(&Times) -> Duration| {
            let mut times: Vec<_> = times.iter().map(part).collect();
            times.sort_unstable();
            times.get(times.len() / 2).copied().unwrap_or_default()
        };
        Times { processor: median(|times| times.processor), waited: median(|times| times.waited) }
    });
    Ok(Figures { bytes: layer.metadata()?.len(), mkfs, plain, digest, gzip, unpack })
}

/// Times of a command.
fn time(command: &mut Command) -> Result<Times> {
    measured(UsageWho::RUSAGE_CHILDREN, || {
        let status =
            command.stdout(Stdio::null()).status().with_context(|| format!("cannot start {command:?}"))?;
        ensure!(status.success(), "{command:?}: {status}");
        Ok(())
    })
}

/// Times of `work`, done by this thread or its children.
fn measured(who: UsageWho, work: impl FnOnce() -> Result<()>) -> Result<Times> {
    let (before, start) = (used(who)?, Instant::now());
    work()?;
    Ok(Times { waited: start.elapsed(), processor: used(who)?.saturating_sub(before) })
}

fn used(who: UsageWho) -> Result<Duration> {
    let usage = getrusage(who)?;
    let [user, system] = [usage.user_time(), usage.system_time()].map(|time| {
        Duration::new(time.tv_sec().unsigned_abs(), 0) + Duration::from_micros(time.tv_usec().unsigned_abs())
    });
    Ok(user + system)
}
