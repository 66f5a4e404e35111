//! The jail of `kindling-vmm`: which rights the process has when its guest runs.
//!
//! The guest is assumed to take over the monitor. All that the monitor needs is open before the guest's first
//! instruction, so that it can do without everything else. [`Jail::confine_process`] takes away paths, the network,
//! privileges and resources; [`Jail::confine_thread`] takes away system calls, from each thread others
//! ([`TABLE`]).

mod capabilities;
mod cgroup;
mod filter;
mod landlock;
mod layer;
mod names;
mod namespaces;
mod refusal;
mod table;

pub use crate::config::jail::{Jail, OnRefusal, Strictness};
pub use cgroup::{Cgroup, CgroupError, CgroupLimits};
pub use layer::{Layer, Limits};
pub use names::name_of;
pub(crate) use refusal::{STATUS_REFUSED, describe};
pub use table::{Call, Rule, TABLE, Thread};

use std::io;
use std::iter;

/// Why a monitor cannot be jailed.
#[derive(Debug, thiserror::Error)]
#[error("this host cannot {what} for the jail of the guest; `--jail best-effort` runs the guest without it")]
#[non_exhaustive]
pub struct JailError {
    /// The operation that failed, as a phrase after "cannot".
    pub what: &'static str,
    /// The host's error.
    pub source: io::Error,
}

/// Enters layers of the jail, for tools that examine them one by one. Returns the layers that the host does not have, with
/// its errors.
pub fn enter(layers: &[Layer], limits: Limits) -> Vec<(Layer, io::Error)> {
    layer::enter(layers, limits)
}

/// The action of the filters.
const FILTER_SYSTEM_CALLS: &str = "filter system calls by seccomp";

/// Enters a layer that is required.
fn require(layer: Layer) -> Result<(), JailError> {
    let missing = enter(&[layer], Limits::default()).into_iter().next();
    missing.map_or(Ok(()), |(layer, source)| Err(JailError { what: layer.action(), source }))
}

impl Jail {
    /// Confines this process, which has one thread, by all layers except the filters of system calls. Returns what the host
    /// cannot do, as phrases after "cannot", with the filters if they may be left out.
    ///
    /// # Errors
    /// When the host does not have a layer that is required.
    pub fn confine_process(&self, limits: Limits) -> Result<Vec<&'static str>, JailError> {
        if !self.is_on() {
            return Ok(Vec::new());
        }
        let missing = if self.strictness == Strictness::Full {
            // The namespaces drop all capabilities but those to change the root directory, which `enter_root` drops.
            let others = Layer::ALL.into_iter().filter(|layer| *layer != Layer::Capabilities);
            enter(&iter::once(Layer::Namespaces).chain(others).collect::<Vec<_>>(), limits)
        } else {
            enter(&Layer::ALL, limits)
        };
        let is_required = |layer: Layer| match self.strictness {
            Strictness::Standard => layer.is_in_every_kernel(),
            Strictness::Require | Strictness::Full => true,
            Strictness::BestEffort | Strictness::Off => false,
        };
        let mut left_out = Vec::new();
        for (layer, source) in missing {
            if is_required(layer) {
                return Err(JailError { what: layer.action(), source });
            }
            left_out.push(layer.action());
        }
        if self.strictness == Strictness::BestEffort && !filter::is_available() {
            left_out.push(FILTER_SYSTEM_CALLS);
        }
        Ok(left_out)
    }

    /// The jail of a process that starts several machines, one after the other, and so needs paths and threads.
    #[must_use]
    pub(crate) const fn without_root(mut self) -> Self {
        if matches!(self.strictness, Strictness::Full) {
            self.strictness = Strictness::Require;
        }
        self
    }

    /// Limits what this process may use, after [`Self::confine_process`] without these limits.
    ///
    /// # Errors
    /// When the host refuses.
    pub(crate) fn limit_process(&self, limits: Limits) -> Result<(), JailError> {
        if !self.is_on() {
            return Ok(());
        }
        let missing = enter(&[Layer::Limits], limits).into_iter().next();
        missing.map_or(Ok(()), |(layer, source)| Err(JailError { what: layer.action(), source }))
    }

    /// Forbids other processes of the user to read this process's memory.
    pub(crate) fn hide_memory(&self) {
        if self.is_on() {
            // It fails on no kernel.
            let _ = layer::hide_memory();
        }
    }

    /// Changes the root directory of this process, if the jail is full, when the process needs no more paths.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn enter_root(&self) -> Result<(), JailError> {
        if self.strictness != Strictness::Full {
            return Ok(());
        }
        require(Layer::Root)
    }

    /// Confines the calling thread to the system calls of its kind. Threads that it starts later inherit them.
    ///
    /// # Errors
    /// When the host does not have seccomp and it is required.
    pub fn confine_thread(&self, thread: Thread) -> Result<(), JailError> {
        if !self.is_on() {
            return Ok(());
        }
        if thread == Thread::EventLoop {
            self.hide_memory();
        }
        if self.strictness == Strictness::Full && thread != Thread::EventLoop {
            // It may have been started before `enter_root`, and has the capabilities to change the root directory then.
            require(Layer::Capabilities)?;
        }
        match filter::install(thread, self.on_refusal) {
            Err(source) if self.strictness != Strictness::BestEffort => {
                Err(JailError { what: FILTER_SYSTEM_CALLS, source })
            }
            _ => Ok(()),
        }
    }
}
