//! The jail of a monitor, as far as it can be chosen; [`crate::jail`] confines the process.

use serde::{Deserialize, Serialize};

/// How strictly a monitor is jailed.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub enum Strictness {
    /// A host without a layer that every supported kernel has is an error. Layers of newer kernels are left out on
    /// others.
    #[default]
    Standard,
    /// A host without one of the layers is an error.
    Require,
    /// As [`Self::Require`], with namespaces and a root directory of the monitor's own ([`crate::jail::Layer::Namespaces`]).
    Full,
    /// Layers that the host does not have are left out.
    BestEffort,
    /// No jail.
    Off,
}

/// What happens when a thread executes a system call that its filter refuses.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub enum OnRefusal {
    /// The monitor ends, and its front reports the call.
    #[default]
    End,
    /// The call is executed, and the host's kernel logs it.
    Log,
}

/// The jail of a monitor.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Jail {
    /// How strictly it is applied.
    pub strictness: Strictness,
    /// What happens to a system call that is refused.
    pub on_refusal: OnRefusal,
}

impl Jail {
    /// No jail.
    pub const OFF: Self = Self { strictness: Strictness::Off, on_refusal: OnRefusal::End };

    /// Whether there is a jail.
    #[must_use]
    pub const fn is_on(&self) -> bool {
        !matches!(self.strictness, Strictness::Off)
    }
}
