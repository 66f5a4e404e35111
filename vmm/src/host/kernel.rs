//! The host kernel's version, and improvements of the creation of VMs in newer kernels.

use super::{Finding, Sources, quoted};
use std::fmt;

/// A kernel version without the suffix of a distribution.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Version {
    major: u32,
    minor: u32,
    patch: u32,
}

impl Version {
    pub(super) const fn new(major: u32, minor: u32, patch: u32) -> Self {
        Self { major, minor, patch }
    }

    /// Parses a release such as `6.12.117+deb12-cloud-amd64`, `6.8.0-45-generic` or `7.0-rc1`.
    fn parse(release: &str) -> Option<Self> {
        let numbers = release.split(|c: char| c != '.' && !c.is_ascii_digit()).next()?;
        let mut numbers = numbers.split('.');
        let major = numbers.next()?.parse().ok()?;
        let minor = numbers.next()?.parse().ok()?;
        let patch = match numbers.next() {
            Some(patch) if !patch.is_empty() => patch.parse().ok()?,
            _ => 0,
        };
        Some(Self { major, minor, patch })
    }

    /// The version of the running kernel; `None` if it is unknown.
    pub(super) fn of(sources: &Sources) -> Option<Self> {
        Self::parse(&sources.read(RELEASE).ok()?)
    }

    /// Whether KVM starts the thread that recovers huge pages as a thread of the VMM, on the first run of a vCPU.
    /// Before, `KVM_CREATE_VM` created a kernel thread and moved it into the VMM's cgroups. The change is in Linux 6.13
    /// and in the stable kernel 6.12.2.
    pub(super) fn recovers_huge_pages_cheaply(self) -> bool {
        self >= Self::new(6, 13, 0) || (self >= Self::new(6, 12, 2) && self < Self::new(6, 13, 0))
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

const RELEASE: &str = "/proc/sys/kernel/osrelease";

/// An improvement in newer kernels.
struct Improvement {
    /// The first version that contains it, as text.
    since: &'static str,
    is_in: fn(Version) -> bool,
    what: &'static str,
}

const IMPROVEMENTS: [Improvement; 4] = [
    Improvement {
        since: "6.11",
        is_in: |version| version >= Version::new(6, 11, 0),
        what: "a split interrupt controller is set up without waiting for SRCU (reported: now and then \
               20 ms on a busy host)",
    },
    Improvement {
        since: "6.12",
        is_in: |version| version >= Version::new(6, 12, 0),
        what: "virtualization is switched on for all processors when KVM is loaded, not by the first VM",
    },
    Improvement {
        since: "6.13 and 6.12.2",
        is_in: Version::recovers_huge_pages_cheaply,
        what: "creating a VM does not wait for cgroup locks (reported: 20 to 40 ms, see nx_huge_pages)",
    },
    Improvement {
        since: "6.18",
        is_in: |version| version >= Version::new(6, 18, 0),
        what: "registering an ioeventfd does not wait for SRCU",
    },
];

/// The version of the kernel.
pub(super) fn kernel(sources: &Sources) -> Finding {
    const NAME: &str = "kernel";
    const NOT_TOLD: &str = "Newer kernels create VMs faster; whether this one does cannot be told.";
    const LOOK: &str = "compare `uname -r` with 6.18";
    let release = match sources.read(RELEASE) {
        Ok(release) => release,
        Err(error) => return Finding::unknown(NAME, error.to_string(), NOT_TOLD, LOOK),
    };
    let Some(version) = Version::parse(&release) else {
        return Finding::unknown(NAME, format!("a release called {}", quoted(&release)), NOT_TOLD, LOOK);
    };
    let missing: Vec<String> = IMPROVEMENTS
        .iter()
        .filter(|improvement| !(improvement.is_in)(version))
        .map(|improvement| format!("since {}, {}", improvement.since, improvement.what))
        .collect();
    let fact = format!("Linux {version}");
    if missing.is_empty() {
        // The deferred SRCU callback of 6.18 turns the next expedited wait into an ordinary one, as users with
        // CONFIG_HZ=100 found. The VMM can avoid it by the order of its setup, the host cannot.
        return Finding::good(
            NAME,
            fact,
            "It has the known improvements to creating a VM. Reported of 6.18: where ioeventfds are \
             registered before vCPUs are created, the first vCPU can take 20 ms.",
        );
    }
    Finding::improvable(
        NAME,
        fact,
        format!("Newer kernels create VMs faster: {}.", missing.join("; ")),
        "boot the host with Linux 6.18 or later, or one into which its distribution has taken these \
         changes (the version does not show that)",
    )
}

#[cfg(test)]
mod tests {
    use super::Version;
    use proptest::prelude::*;

    #[test]
    fn releases_of_distributions_are_parsed() {
        for (release, expected) in [
            ("6.12.117+deb12-cloud-amd64", Some((6, 12, 117))),
            ("6.8.0-45-generic", Some((6, 8, 0))),
            ("6.18.44-fc-v657", Some((6, 18, 44))),
            ("5.14.0-503.11.1.el9_5.x86_64", Some((5, 14, 0))),
            ("7.0-rc1", Some((7, 0, 0))),
            ("7.1", Some((7, 1, 0))),
            ("6.12.", Some((6, 12, 0))),
            ("6", None),
            ("", None),
            ("linux", None),
            ("6.x", None),
            ("99999999999.1", None),
        ] {
            let expected = expected.map(|(major, minor, patch)| Version::new(major, minor, patch));
            assert_eq!(Version::parse(release), expected, "{release}");
        }
    }

    #[test]
    fn the_recovery_thread_became_cheap_in_6_13_and_in_6_12_2() {
        for (version, cheap) in
            [((6, 1, 200), false), ((6, 12, 0), false), ((6, 12, 1), false), ((6, 12, 2), true)]
        {
            let version = Version::new(version.0, version.1, version.2);
            assert_eq!(version.recovers_huge_pages_cheaply(), cheap, "{version}");
        }
        assert!(Version::new(6, 13, 0).recovers_huge_pages_cheaply());
        assert!(Version::new(7, 0, 0).recovers_huge_pages_cheaply());
    }

    proptest! {
        #[test]
        fn any_release_is_parsed_or_refused(release in "\\PC{0,40}") {
            let _ = Version::parse(&release);
        }

        #[test]
        fn a_version_is_parsed_with_any_suffix(
            major: u32, minor: u32, patch: u32, rest in "([-+_a-z][\\PC]{0,20})?",
        ) {
            let release = format!("{major}.{minor}.{patch}{rest}");
            prop_assert_eq!(Version::parse(&release), Some(Version::new(major, minor, patch)));
        }
    }
}
