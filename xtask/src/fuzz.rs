//! `cargo xtask fuzz`: runs the fuzz targets of `vmm/fuzz`, or replays their corpora.
//!
//! libFuzzer, which the crate `libfuzzer-sys` contains, needs marks in the code that it tests. Stable compilers insert them
//! too: what cargo-fuzz takes a nightly compiler for are sanitizers of memory, of which Rust that is mostly safe has less
//! need.
//!
//! A corpus is a text file in `vmm/fuzz/corpora`: one input a line, in hexadecimal digits, sorted.

use crate::cargo::{shell, target_directory};
use crate::host::workspace;
use anyhow::{Context, Result, bail};
use clap::Args;
use std::collections::BTreeSet;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use xshell::cmd;

const MANIFEST: &str = "vmm/fuzz/Cargo.toml";
const TARGET: &str = "x86_64-unknown-linux-gnu";
/// Marks at each edge of the control flow, and at each comparison (llvm's sancov), and the checks of a debug build.
const FLAGS: &str = "--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
                     -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
                     -Cllvm-args=-sanitizer-coverage-trace-compares -Cdebug-assertions -Coverflow-checks";
/// Maximum number of inputs of a corpus in the repository, and of bytes of an input.
const INPUTS_MAX: usize = 200;
const INPUT_MAX: usize = 512;

#[derive(Args, Debug)]
pub(crate) struct Arguments {
    /// Targets [default: all]
    targets: Vec<String>,
    /// Time of each target in seconds
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Only run the inputs of the corpora, once
    #[arg(long, conflicts_with = "seconds")]
    replay: bool,
    /// Add the shortest inputs that reach more code to the corpora
    #[arg(long, conflicts_with = "replay")]
    keep: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<u8> {
    let all = targets()?;
    if let Some(unknown) = arguments.targets.iter().find(|name| !all.contains(*name)) {
        bail!("no fuzz target {unknown}; there are {}", all.into_iter().collect::<Vec<_>>().join(", "));
    }
    let chosen: Vec<_> =
        all.iter().filter(|name| arguments.targets.is_empty() || arguments.targets.contains(name)).collect();
    let programs = build()?;
    for name in chosen {
        let replayed = arguments.replay.then(tempfile::tempdir).transpose()?;
        let inputs = match &replayed {
            Some(folder) => folder.path().to_owned(),
            None => target_directory().join("fuzz/corpora").join(name),
        };
        unpack(name, &inputs)?;
        let mut fuzzer = Command::new(programs.join(name));
        fuzzer.current_dir(target_directory()).arg(&inputs).arg("-print_final_stats=0");
        let limit = if arguments.replay {
            "-runs=0".to_owned()
        } else {
            format!("-max_total_time={}", arguments.seconds)
        };
        let output = fuzzer.arg(limit).output().context("cannot start the fuzzer")?;
        let text = String::from_utf8_lossy(&output.stderr);
        if !output.status.success() {
            eprintln!("{text}");
            bail!("{name} failed; the input is in {}", target_directory().display());
        }
        // A line such as `#4 DONE cov: 12 ft: 30 corp: 4/80b ...`: edges, and edges with counts, that were reached.
        let figures = text.lines().rfind(|line| line.contains("cov: ")).unwrap_or_default();
        println!("{name}: {}", figures.trim());
        if arguments.keep {
            keep(name, &programs.join(name), &inputs)?;
        }
    }
    Ok(0)
}

/// The names of the targets.
fn targets() -> Result<BTreeSet<String>> {
    let entries = fs::read_dir(workspace().join("vmm/fuzz/fuzz_targets"))?;
    let names =
        entries.map(|entry| Ok(entry?.path().file_stem().map(|stem| stem.to_string_lossy().into_owned())));
    names.filter_map(Result::transpose).collect()
}

/// Builds all targets. Returns the directory of the programs.
fn build() -> Result<PathBuf> {
    let shell = shell()?;
    let folder = target_directory().join("fuzz");
    cmd!(shell, "cargo build --quiet --locked --release --bins --manifest-path {MANIFEST} --target {TARGET} --target-dir {folder}")
        .env("RUSTFLAGS", FLAGS)
        .quiet()
        .run()
        .context("cannot build the fuzz targets")?;
    Ok(folder.join(TARGET).join("release"))
}

fn corpus(name: &str) -> PathBuf {
    workspace().join("vmm/fuzz/corpora").join(name)
}

/// Writes the inputs of a target's corpus to files in a directory, which may have the inputs of earlier runs.
fn unpack(name: &str, folder: &Path) -> Result<()> {
    fs::create_dir_all(folder)?;
    let text = fs::read_to_string(corpus(name)).unwrap_or_default();
    for (number, line) in text.lines().enumerate() {
        let bytes = bytes(line).with_context(|| format!("line {} of the corpus {name}", number + 1))?;
        fs::write(folder.join(format!("{number}")), bytes)?;
    }
    Ok(())
}

/// The bytes of a line.
fn bytes(line: &str) -> Result<Vec<u8>> {
    let digits =
        line.as_bytes().chunks(2).map(|pair| Ok(u8::from_str_radix(std::str::from_utf8(pair)?, 16)?));
    digits.collect()
}

/// Replaces the corpus of a target by the inputs that are needed to reach what all of them reach.
fn keep(name: &str, program: &Path, inputs: &Path) -> Result<()> {
    let least = tempfile::tempdir()?;
    let mut merge = Command::new(program);
    merge.args(["-merge=1", &format!("-max_len={INPUT_MAX}")]).arg(least.path()).arg(inputs);
    let output = merge.output()?;
    if !output.status.success() {
        bail!("cannot merge the inputs of {name}: {}", String::from_utf8_lossy(&output.stderr));
    }
    let mut all = Vec::new();
    for entry in fs::read_dir(least.path())? {
        all.push(fs::read(entry?.path())?);
    }
    all.sort_by_key(Vec::len);
    all.truncate(INPUTS_MAX);
    let lines: BTreeSet<String> = all.iter().map(|bytes| digits(bytes)).collect();
    fs::create_dir_all(corpus(name).parent().context("a corpus is in a directory")?)?;
    let text: String = lines.into_iter().map(|line| line + "\n").collect();
    Ok(fs::write(corpus(name), text)?)
}

fn digits(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inputs_survive_the_corpus() {
        for input in [&[][..], &[0], &[1, 0xff, 0x10]] {
            assert_eq!(bytes(&digits(input)).unwrap(), input);
        }
        assert!(bytes("0g").is_err());
    }

    #[test]
    fn each_target_has_a_corpus_within_bounds() {
        for name in targets().unwrap() {
            let text = fs::read_to_string(corpus(&name)).unwrap();
            assert!(text.lines().count() <= INPUTS_MAX, "{name}");
            assert!(text.lines().all(|line| bytes(line).unwrap().len() <= INPUT_MAX), "{name}");
            let manifest = fs::read_to_string(workspace().join(MANIFEST)).unwrap();
            assert!(manifest.contains(&format!("path = \"fuzz_targets/{name}.rs\"")), "{name}");
        }
    }
}
