//! A profile as a file: what `profile.json` holds and `--against` reads.
//!
//! Times are nanoseconds. Those that are not lengths count from the start of the VMM's process.

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// What tells this file from every other.
const FORMAT: &str = "kindling-profile";
/// Raised when a reader of the older ones would misunderstand the file.
const VERSION: u32 = 1;
/// A file of more bytes than this is no profile: one with samples has about 200 KiB.
const FILE_MAX: u64 = 64 << 20;

/// The profile of a boot.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub(super) struct Profile {
    pub(super) format: String,
    pub(super) version: u32,
    pub(super) host: Host,
    pub(super) guest: Guest,
    pub(super) totals: Totals,
    /// In the order of their lanes, and by time inside each.
    pub(super) phases: Vec<Phase>,
    /// Exits to the VMM, the most frequent first.
    pub(super) exits: Vec<Exits>,
    /// Functions that would begin a phase and that the compiler put into their callers.
    pub(super) without_mark: Vec<String>,
    pub(super) perturbation: Perturbation,
    /// Where the guest was, if samples were asked for.
    pub(super) samples: Option<Samples>,
}

/// Where it was measured.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub(super) struct Host {
    /// `exact-lab` or `hardware`.
    pub(super) kind: String,
    /// What a time from there means.
    pub(super) meaning: String,
}

/// What was booted.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub(super) struct Guest {
    pub(super) kernel: String,
    pub(super) kernel_config_sha256: String,
    pub(super) command_line: String,
    pub(super) memory_mib: u64,
    pub(super) vcpus: u8,
}

/// How long a boot takes of which nothing is recorded.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub(super) struct Totals {
    /// From the start of the process to the first instruction of the guest.
    pub(super) vmm: u64,
    /// From there to the first instruction of init.
    pub(super) kernel: u64,
    /// From the start of the process to the first instruction of init.
    pub(super) init_reached: u64,
    /// From the start of the process to its end.
    pub(super) process: u64,
}

/// What somebody does at a time; lanes go on beside one another.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Lane {
    /// The monitor, before and after the guest runs.
    Vmm,
    /// The kernel's functions in a row.
    Kernel,
    /// The kernel's initcalls, each of which lies in a phase of the lane before.
    Initcall,
    /// Init.
    Init,
}

impl Lane {
    /// What a reader calls it.
    pub(super) const fn title(self) -> &'static str {
        match self {
            Self::Vmm => "VMM",
            Self::Kernel => "kernel",
            Self::Initcall => "initcall",
            Self::Init => "init",
        }
    }
}

/// A part of the boot.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub(super) struct Phase {
    pub(super) lane: Lane,
    pub(super) name: String,
    /// What it is for or, for an initcall, its level and the kernel's file it is from.
    pub(super) about: String,
    pub(super) start: u64,
    pub(super) duration: u64,
}

/// Exits of one kind.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub(super) struct Exits {
    /// `port read`, `port write`, `memory read` or `memory write`.
    pub(super) reason: String,
    /// The port or the guest-physical address.
    pub(super) address: u64,
    /// Whose it is.
    pub(super) device: String,
    /// How many there were before init's first instruction.
    pub(super) before_init: u64,
    /// When each was, those of init included.
    pub(super) at: Vec<u64>,
}

/// What recording changes.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
pub(super) struct Perturbation {
    /// By how much longer the kernel took with marked functions.
    pub(super) marked_longer: i64,
    /// First calls of marked functions.
    pub(super) marks: u64,
    /// What was taken off the times of the marked boot for each mark before.
    pub(super) cost_of_mark: u64,
    /// The part of it for which the VMM held the guest.
    pub(super) held_per_mark: u64,
    /// By how much longer it took with samples as well.
    pub(super) sampled_longer: Option<i64>,
}

/// Where the guest was at regular moments.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub(super) struct Samples {
    pub(super) interval_us: u64,
    /// The time that one sample stands for.
    pub(super) ns_per_sample: u64,
    /// Phase and functions from the outermost to the innermost, and how often these were met.
    pub(super) stacks: Vec<(Vec<String>, u64)>,
}

impl Profile {
    /// The format's own fields.
    pub(super) fn format() -> (String, u32) {
        (FORMAT.to_owned(), VERSION)
    }

    /// As JSON.
    pub(super) fn to_json(&self) -> Result<String> {
        Ok(serde_json::to_string(self)? + "\n")
    }

    /// Reads the profile of an earlier boot.
    ///
    /// # Errors
    /// Says why the file is none.
    pub(super) fn open(path: &Path) -> Result<Self> {
        #[derive(Deserialize)]
        struct Head {
            format: String,
            version: u32,
        }
        let name = path.display();
        let foreign = || format!("{name} is not a profile: write one with `cargo xtask profile --out DIR`");
        if !path.is_file() {
            bail!("there is no file {name}: --against takes the profile.json of an earlier profile");
        }
        let mut text = Vec::new();
        let file = File::open(path).with_context(|| format!("cannot read {name}"))?;
        file.take(FILE_MAX + 1).read_to_end(&mut text).with_context(|| format!("cannot read {name}"))?;
        if text.len() as u64 > FILE_MAX {
            bail!("{}", foreign());
        }
        let head: Head = serde_json::from_slice(&text).with_context(foreign)?;
        if head.format != FORMAT {
            bail!("{}", foreign());
        }
        if head.version != VERSION {
            bail!(
                "{name} has version {}, this program reads {VERSION}: profile that boot again",
                head.version
            );
        }
        serde_json::from_slice(&text).with_context(|| format!("{name} is not a whole profile"))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A phase of a test.
    pub(in super::super) fn phase(lane: Lane, name: &str, start: u64, duration: u64) -> Phase {
        Phase { lane, name: name.to_owned(), about: String::new(), start, duration }
    }

    /// A small profile whose words are a guest's worst.
    pub(in super::super) fn profile() -> Profile {
        let (format, version) = Profile::format();
        let evil = "</script><img src=x onerror=alert(1)>&\"'\u{2028}\u{1b}[2J";
        Profile {
            format,
            version,
            host: Host { kind: "exact-lab".into(), meaning: "instructions".into() },
            guest: Guest {
                kernel: "6.12".into(),
                kernel_config_sha256: String::new(),
                command_line: evil.into(),
                memory_mib: 128,
                vcpus: 1,
            },
            totals: Totals { vmm: 1_000_000, kernel: 4_000_000, init_reached: 5_000_000, process: 7_000_000 },
            phases: vec![
                phase(Lane::Vmm, "kernel loaded", 0, 1_000_000),
                phase(Lane::Kernel, evil, 1_000_000, 4_000_000),
                phase(Lane::Initcall, "pty_init", 2_000_000, 1_500_000),
                phase(Lane::Init, "init: configuration read", 5_000_000, 10),
            ],
            exits: vec![Exits {
                reason: "port write".into(),
                address: 0x3f8,
                device: "serial port".into(),
                before_init: 1,
                at: vec![2_000_000, 5_000_000],
            }],
            without_mark: vec!["jump_label_init".into()],
            perturbation: Perturbation {
                marked_longer: 900,
                marks: 3,
                cost_of_mark: 300,
                held_per_mark: 100,
                sampled_longer: Some(-5),
            },
            samples: Some(Samples {
                interval_us: 25,
                ns_per_sample: 20_000,
                stacks: vec![(vec![evil.into(), "f".into()], 3)],
            }),
        }
    }

    fn opened(text: &str) -> Result<Profile> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("profile.json");
        std::fs::write(&path, text).unwrap();
        Profile::open(&path)
    }

    #[test]
    fn what_is_written_is_read() {
        assert_eq!(opened(&profile().to_json().unwrap()).unwrap(), profile());
    }

    #[test]
    fn other_files_are_refused() {
        let json = profile().to_json().unwrap();
        let table = [
            ("", "is not a profile"),
            ("[]", "is not a profile"),
            ("{\"start_ns\": 1}", "is not a profile"),
            (&json.replace("kindling-profile", "other"), "is not a profile"),
            (&json.replace("\"version\":1", "\"version\":2"), "has version 2, this program reads 1"),
            (&json.replace("\"phases\"", "\"phasez\""), "is not a whole profile"),
        ];
        for (text, expected) in table {
            let message = format!("{:#}", opened(text).unwrap_err());
            assert!(message.contains(expected), "{message:?} should say {expected:?}");
            assert_eq!(message.lines().count(), 1, "{message}");
        }
        let message = Profile::open(Path::new("/nonexistent")).unwrap_err().to_string();
        assert!(message.starts_with("there is no file /nonexistent"), "{message}");
    }
}
