//! Checks of a host's suitability for microVMs: facts from `/proc`, `/sys` and `/dev`, their meaning, and advice for
//! improvements.
//!
//! A check only reads. It takes the root directory from [`Sources`], so that tests can provide the files of any host,
//! and it does not rely on their content: a missing file or unexpected content is a finding as well.
//! [`crate::kvm::probe`] tests KVM by running guest code; its result is explained here.
//!
//! Times called "reported" come from users of other VMMs on their hosts, not from measurements of this VMM.

mod cgroup;
mod isolation;
mod kernel;
mod kvm;
mod memory;
mod nx_huge_pages;
mod sharing;
mod sources;

pub use sources::Sources;

use crate::kvm::probe::Probe;
use serde::Serialize;
use std::path::PathBuf;

/// The directories of the cgroups (v2) in which this user can create others and move own processes there, from the topmost
/// one. `None` if the place of this process in the hierarchy is unknown.
pub(crate) fn delegated_cgroups() -> Option<Vec<PathBuf>> {
    Some(cgroup::delegated(&Sources::host())?.into_iter().map(PathBuf::from).collect())
}

/// The assessment of a fact.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Nothing to improve.
    Good,
    /// Guests run. With the advice they run or start faster, or are better isolated.
    Improvable,
    /// Guests do not run, run badly, or endanger the host.
    Bad,
    /// The host does not provide the information.
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

/// A fact about the host.
///
/// The constructors ensure that every finding has advice unless it is good.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The identifier of the fact, which is the same in all versions.
    pub name: &'static str,
    /// The assessment.
    pub status: Status,
    /// The fact.
    pub fact: String,
    /// Its meaning for microVMs.
    pub meaning: String,
    /// Advice, with commands in backticks; `None` if and only if the status is good.
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

/// All findings and their summary.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Whether guests run at full speed, as one sentence.
    pub verdict: String,
    /// The findings in descending order of importance.
    pub findings: Vec<Finding>,
}

impl Report {
    /// Checks a host. `probe` is the result of the probe of its KVM.
    #[must_use]
    pub fn new(sources: &Sources, probe: &Probe) -> Self {
        let findings = vec![
            kvm::kvm(sources, probe),
            kvm::parameters(sources),
            kvm::restrictions(probe),
            nx_huge_pages::nx_huge_pages(sources),
            kernel::kernel(sources),
            cgroup::cgroup(sources),
            memory::memory(sources),
            memory::hugepages(sources),
            memory::thp(sources),
            isolation::tun(sources),
            isolation::user_namespaces(sources),
            isolation::jail(sources),
            sharing::smt(sources),
            sharing::mitigations(sources),
            sharing::ksm(sources),
            sharing::swap(sources),
        ];
        Self { verdict: verdict(probe, &findings), findings }
    }
}

fn verdict(probe: &Probe, findings: &[Finding]) -> String {
    let reason = match probe {
        Probe::Hardware { .. } => {
            let bad: Vec<_> = names_with(findings, Status::Bad).collect();
            if !bad.is_empty() {
                return format!("guests run on this host, but first fix what is bad: {}", bad.join(", "));
            }
            return match names_with(findings, Status::Improvable).count() {
                0 => "guests run at full speed on this host".into(),
                1 => "guests run at full speed on this host; one thing can be improved".into(),
                count => format!("guests run at full speed on this host; {count} things can be improved"),
            };
        }
        Probe::Software { .. } => "its KVM is software that cannot run Linux",
        Probe::NoPermission => "this user has no permission to open its KVM device",
        Probe::Absent => "it has no KVM",
        Probe::Broken(_) => "its KVM does not work",
    };
    format!("guests do not run on this host: {reason}")
}

fn names_with(findings: &[Finding], status: Status) -> impl Iterator<Item = &'static str> {
    findings.iter().filter(move |finding| finding.status == status).map(|finding| finding.name)
}

/// Quotes the content of a file in a fact: in one line, without control characters, and truncated.
fn quoted(text: &str) -> String {
    const MAX_LEN: usize = 60;
    let short: String = text.trim().chars().take(MAX_LEN).collect();
    format!("{short:?}")
}

/// Whether a name from this host can be part of a command that the user copies.
fn is_safe_in_command(name: &str) -> bool {
    !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || "_-./".contains(c))
}

#[cfg(test)]
mod tests;
