//! What it costs to make a root filesystem of a container image, beside mkfs.erofs for the same tree: processor time of
//! this host, in user space and in the kernel.
//!
//! The lab would not do: it has no instructions for SHA-256, which is nearly all of the work there.

use crate::{docker_archive, test_images};
use anyhow::{Context, Result, ensure};
use kindling::config::image::sha256_of;
use nix::sys::resource::{UsageWho, getrusage};
use serde_json::json;
use std::fmt;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;
use xshell::{Shell, cmd};

/// The image that is converted: Debian with Node.js, about 200 MiB.
const IMAGE: &str = "node";

/// Medians of processor time.
#[derive(Debug)]
pub(crate) struct Figures {
    /// Bytes of the image's files, as one layer.
    pub(crate) bytes: u64,
    /// `mkfs.erofs` on the unpacked tree.
    pub(crate) mkfs: Duration,
    /// `kindling-oci prepare` of the tree as one layer that is not compressed.
    pub(crate) plain: Duration,
    /// The digest of that layer, which is a part of `plain`.
    pub(crate) digest: Duration,
    /// `kindling-oci prepare` of the same layer compressed with gzip.
    pub(crate) gzip: Duration,
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |time: Duration| time.as_secs_f64() * 1000.0;
        writeln!(f, "converting {} MiB, processor time in ms", self.bytes >> 20)?;
        writeln!(f, "mkfs.erofs on the tree          {:7.0}", ms(self.mkfs))?;
        writeln!(f, "kindling-oci, layer of tar      {:7.0}", ms(self.plain))?;
        writeln!(f, "  of which the digest           {:7.0}", ms(self.digest))?;
        writeln!(f, "  and the rest                  {:7.0}", ms(self.plain.saturating_sub(self.digest)))?;
        writeln!(f, "kindling-oci, layer of tar.gz   {:7.0}", ms(self.gzip))?;
        write!(f, "  of which inflating            {:7.0}", ms(self.gzip.saturating_sub(self.plain)))
    }
}

/// `cargo xtask bench-convert`.
pub(crate) fn run(runs: usize) -> Result<u8> {
    println!("{}", measure(runs)?);
    Ok(0)
}

/// Measures each so often.
pub(crate) fn measure(runs: usize) -> Result<Figures> {
    let images = test_images::build()?;
    let place = tempfile::tempdir_in(images.folder.parent().context("no place")?)?;
    let place = place.path();
    let (tree, shell) = (place.join("tree"), Shell::new()?);
    let rootfs = images.prepare(IMAGE)?;
    cmd!(shell, "fsck.erofs --extract={tree} {rootfs}").quiet().ignore_stdout().ignore_stderr().run()?;
    let plain = docker_archive::write(place, &tree, &json!({}))?;
    let (layer, gzip) = (place.join("layer.tar"), place.join("gzip.tar"));
    shell.change_dir(place);
    cmd!(shell, "gzip --keep layer.tar").quiet().run()?;
    let manifest = json!([{ "Config": "config.json", "Layers": ["layer.tar.gz"] }]);
    fs::write(place.join("manifest.json"), manifest.to_string())?;
    cmd!(shell, "tar --create --file {gzip} manifest.json config.json layer.tar.gz").quiet().run()?;
    let erofs = place.join("mkfs.erofs");
    let cache = place.join("cache");
    let prepare = |archive: &Path| {
        let mut command = Command::new(&images.program);
        command.args(["prepare", "--cache"]).args([&cache, archive]);
        time(&mut command).and_then(|time| Ok((time, fs::remove_dir_all(&cache)?).0))
    };
    let mut times: [Vec<Duration>; 4] = Default::default();
    for _ in 0..runs {
        let mut mkfs = Command::new("mkfs.erofs");
        times[0].push(time(mkfs.args(["-T0", "-E", "noinline_data"]).args([&erofs, &tree]))?);
        times[1].push(prepare(&plain)?);
        let before = used(UsageWho::RUSAGE_THREAD)?;
        sha256_of(&layer)?;
        times[2].push(used(UsageWho::RUSAGE_THREAD)?.saturating_sub(before));
        times[3].push(prepare(&gzip)?);
    }
    let [mkfs, plain, digest, gzip] = times.map(|mut times| {
        times.sort_unstable();
        times.get(times.len() / 2).copied().unwrap_or_default()
    });
    Ok(Figures { bytes: layer.metadata()?.len(), mkfs, plain, digest, gzip })
}

/// The processor time that a command takes.
fn time(command: &mut Command) -> Result<Duration> {
    let before = used(UsageWho::RUSAGE_CHILDREN)?;
    let status =
        command.stdout(Stdio::null()).status().with_context(|| format!("cannot start {command:?}"))?;
    ensure!(status.success(), "{command:?}: {status}");
    Ok(used(UsageWho::RUSAGE_CHILDREN)?.saturating_sub(before))
}

fn used(who: UsageWho) -> Result<Duration> {
    let usage = getrusage(who)?;
    let [user, system] = [usage.user_time(), usage.system_time()].map(|time| {
        Duration::new(time.tv_sec().unsigned_abs(), 0) + Duration::from_micros(time.tv_usec().unsigned_abs())
    });
    Ok(user + system)
}
