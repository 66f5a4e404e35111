//! The file format of a profile: `profile.json`, which `--against` reads.
//!
//! Times are in nanoseconds. Points in time count from the start of the VMM's process.

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// The format identifier.
const FORMAT: &str = "kindling-profile";
/// The format version, incremented at incompatible changes.
const VERSION: u32 = 1;
/// The maximum size of a file; one with samples has about 200 KiB.
const FILE_MAX: u64 = 64 << 20;

/// The profile of a boot.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub(super) struct Profile {
    pub(super) format: String,
    pub(super) version: u32,
    pub(super) host: Host,
    pub(super) guest: Guest,
    pub(super) totals: Totals,
    /// Sorted by lane, then by time.
    pub(super) phases: Vec<Phase>,
    /// Exits to the VMM, the most frequent first.
    pub(super) exits: Vec<Exits>,
    /// Functions that would begin a phase but were inlined by the compiler.
    pub(super) without_mark: Vec<String>,
    pub(super) perturbation: Perturbation,
    /// Stack samples, if requested.
    pub(super) samples: Option<Samples>,
}

/// The host of the measurement.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub(super) struct Host {
    /// `exact-lab` or `hardware`.
    pub(super) kind: String,
    /// The meaning of times on the host.
    pub(super) meaning: String,
}

/// The guest.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub(super) struct Guest {
    pub(super) kernel: String,
    pub(super) kernel_config_sha256: String,
    pub(super) command_line: String,
    pub(super) memory_mib: u64,
    pub(super) vcpus: u8,
}

/// Durations of a boot without recording.
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

/// A lane of the timeline; lanes run in parallel.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Lane {
    /// The VMM, before and after the guest runs.
    Vmm,
    /// The kernel's phases.
    Kernel,
    /// The kernel's initcalls, each within a phase of the kernel's lane.
    Initcall,
    /// Init.
    Init,
}

impl Lane {
    /// The title.
    pub(super) const fn title(self) -> &'static str {
        match self {
            Self::Vmm => "VMM",
            Self::Kernel => "kernel",
            Self::Initcall => "initcall",
            Self::Init => "init",
        }
    }
}

/// A phase of the boot.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub(super) struct Phase {
    pub(super) lane: Lane,
    pub(super) name: String,
    /// A description; for an initcall its level and source file.
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
    /// The device at the address.
    pub(super) device: String,
    /// The number of exits before init's first instruction.
    pub(super) before_init: u64,
    /// The time of each exit, including those during init.
    pub(super) at: Vec<u64>,
}

/// The overhead of recording.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
pub(super) struct Perturbation {
    /// The additional duration of the kernel's boot with marked functions.
    pub(super) marked_longer: i64,
    /// The number of marks: first calls of marked functions.
    pub(super) marks: u64,
    /// The time subtracted from times of the marked boot per preceding mark.
    pub(super) cost_of_mark: u64,
    /// The time per mark for which the VMM held the guest.
    pub(super) held_per_mark: u64,
    /// The additional duration with samples.
    pub(super) sampled_longer: Option<i64>,
}

/// Periodic stack samples of the guest.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub(super) struct Samples {
    pub(super) interval_us: u64,
    /// The time represented by one sample.
    pub(super) ns_per_sample: u64,
    /// Stacks of phase and functions, outermost first, with the number of their samples.
    pub(super) stacks: Vec<(Vec<String>, u64)>,
}

impl Profile {
    /// The format identifier and version.
    pub(super) fn format() -> (String, u32) {
        (FORMAT.to_owned(), VERSION)
    }

    /// The profile as JSON.
    pub(super) fn to_json(&self) -> Result<String> {
        Ok(serde_json::to_string(self)? + "\n")
    }

    /// Reads the profile of an earlier boot.
    ///
    /// # Errors
    /// When the file is not a valid profile.
    pub(super) fn open(path: &Path) -> Result<Self> {
        #[derive(Deserialize)]
        struct Head {
            format: String,
            version: u32,
        }
        let name = path.display();
        let foreign = || format!("{name} is not a profile; create one with `cargo xtask profile --out DIR`");
        if !path.is_file() {
            bail!("{name} does not exist; --against expects the profile.json of an earlier profile");
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
                "{name} has version {}, but this program reads version {VERSION}; create the profile again",
                head.version
            );
        }
        serde_json::from_slice(&text).with_context(|| format!("{name} is an invalid profile"))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A phase of a test.
    pub(in super::super) fn phase(lane: Lane, name: &str, start: u64, duration: u64) -> Phase {
        Phase { lane, name: name.to_owned(), about: String::new(), start, duration }
    }

    /// A small profile with hostile text of a guest.
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
    fn a_written_profile_is_read_back() {
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
            (
                &json.replace("\"version\":1", "\"version\":2"),
                "has version 2, but this program reads version 1",
            ),
            (&json.replace("\"phases\"", "\"phasez\""), "is an invalid profile"),
        ];
        for (text, expected) in table {
            let message = format!("{:#}", opened(text).unwrap_err());
            assert!(message.contains(expected), "{message:?} should say {expected:?}");
            assert_eq!(message.lines().count(), 1, "{message}");
        }
        let message = Profile::open(Path::new("/nonexistent")).unwrap_err().to_string();
        assert!(message.starts_with("/nonexistent does not exist"), "{message}");
    }
}
