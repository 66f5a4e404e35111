//! What a host can do for microVMs: facts from `/proc`, `/sys` and `/dev`, what each means, and
//! what would make it better.
//!
//! A check only reads. It takes the root directory from [`Sources`], so that tests lay out the
//! files of any host, and it takes nothing it reads for granted: a file that is missing or says
//! something else than expected is a finding too. What KVM can do is found by
//! [`crate::kvm::probe`], which runs guest code; here its answer is put into words.
//!
//! Times called "reported" come from users of other VMMs on their hosts, not from measurements
//! of this one.

mod cgroup;
mod isolation;
mod kernel;
mod kvm;
mod memory;
mod nx_huge_pages;
mod sources;

pub use sources::Sources;

use crate::kvm::probe::Probe;
use serde::Serialize;

/// How good a fact is for microVMs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Nothing to do.
    Good,
    /// Guests run, and would run or start faster, or be better isolated.
    Improvable,
    /// Guests do not run, run badly, or endanger the host.
    Bad,
    /// The host does not say.
    Unknown,
}

impl Status {
    /// The status as one lower-case word.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::Improvable => "improvable",
            Self::Bad => "bad",
            Self::Unknown => "unknown",
        }
    }
}

/// One fact about the host.
///
/// The constructors see to it that only a good fact comes without advice.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Which fact; stays the same from version to version.
    pub name: &'static str,
    /// How good it is.
    pub status: Status,
    /// What is so.
    pub fact: String,
    /// What that means for microVMs.
    pub meaning: String,
    /// What to do about it, with commands between backticks.
    pub advice: Option<String>,
}

impl Finding {
    fn good(name: &'static str, fact: impl Into<String>, meaning: impl Into<String>) -> Self {
        Self { name, status: Status::Good, fact: fact.into(), meaning: meaning.into(), advice: None }
    }

    fn improvable(
        name: &'static str,
        fact: impl Into<String>,
        meaning: impl Into<String>,
        advice: impl Into<String>,
    ) -> Self {
        let status = Status::Improvable;
        Self { name, status, fact: fact.into(), meaning: meaning.into(), advice: Some(advice.into()) }
    }

    fn bad(
        name: &'static str,
        fact: impl Into<String>,
        meaning: impl Into<String>,
        advice: impl Into<String>,
    ) -> Self {
        Self { status: Status::Bad, ..Self::improvable(name, fact, meaning, advice) }
    }

    fn unknown(
        name: &'static str,
        why: impl Into<String>,
        meaning: impl Into<String>,
        advice: impl Into<String>,
    ) -> Self {
        Self { status: Status::Unknown, ..Self::improvable(name, why, meaning, advice) }
    }
}

/// Everything found, and what it comes to.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Whether guests run at full speed, in one sentence.
    pub verdict: String,
    /// The facts, the most important first.
    pub findings: Vec<Finding>,
}

impl Report {
    /// Looks at a host whose KVM the probe has tried.
    #[must_use]
    pub fn new(sources: &Sources, probe: &Probe) -> Self {
        let findings = vec![
            kvm::kvm(sources, probe),
            kvm::parameters(sources),
            nx_huge_pages::nx_huge_pages(sources),
            kernel::kernel(sources),
            cgroup::cgroup(sources),
            memory::memory(sources),
            memory::hugepages(sources),
            memory::thp(sources),
            isolation::tun(sources),
            isolation::user_namespaces(sources),
        ];
        Self { verdict: verdict(probe, &findings), findings }
    }
}

fn verdict(probe: &Probe, findings: &[Finding]) -> String {
    let reason = match probe {
        Probe::Hardware { .. } => {
            let bad: Vec<_> = names_with(findings, Status::Bad).collect();
            if !bad.is_empty() {
                return format!("guests run on this host, but first see to what is bad: {}", bad.join(", "));
            }
            return match names_with(findings, Status::Improvable).count() {
                0 => "guests run at full speed on this host".into(),
                1 => "guests run at full speed on this host; one thing can be improved".into(),
                count => format!("guests run at full speed on this host; {count} things can be improved"),
            };
        }
        Probe::Software { .. } => "its KVM is software that cannot run Linux",
        Probe::NoPermission => "this user may not open its KVM device",
        Probe::Absent => "it has no KVM",
        Probe::Broken(_) => "its KVM does not work",
    };
    format!("guests do not run on this host: {reason}")
}

fn names_with(findings: &[Finding], status: Status) -> impl Iterator<Item = &'static str> {
    findings.iter().filter(move |finding| finding.status == status).map(|finding| finding.name)
}

/// What a file said, for a fact: on one line, without control characters, and not endless.
fn quoted(text: &str) -> String {
    const LONGEST: usize = 60;
    let short: String = text.trim().chars().take(LONGEST).collect();
    format!("{short:?}")
}

/// Whether a name that this host gave can stand in a command that somebody copies.
fn is_plain(name: &str) -> bool {
    !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || "_-./".contains(c))
}

#[cfg(test)]
mod tests;
