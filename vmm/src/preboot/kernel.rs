//! A pre-booted kernel that a machine can continue from: its file, open and checked.

use super::error::PrebootError;
use super::file;
use super::state::{FREEZE_AT, MadeFor, State, features};
use crate::config::Config;
use crate::devices::boot_mark::BootMarks;
use crate::devices::virtio;
use crate::error::Error;
use crate::kvm::Hypervisor;
use crate::layout;
use crate::memory::{self, GuestMemory, MemoryError};
use crate::start_latch::StartLatch;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A pre-booted kernel that a machine can continue from.
#[derive(Debug)]
pub(crate) struct Preboot {
    path: PathBuf,
    pub(crate) state: State,
    file: File,
}

impl Preboot {
    /// Opens the one that the configuration names, unless it is open; none where it names none or the file does not
    /// exist.
    pub(crate) fn open(config: &Config, file: Option<File>) -> Result<Option<Self>, PrebootError> {
        let Some(path) = &config.preboot else { return Ok(None) };
        match file.map_or_else(|| file::open(path), Ok) {
            Err(error) if error.is_absent() => Ok(None),
            file => Self::read(file?, path, config).map(Some),
        }
    }

    /// Reads one that is open; `path` is for messages.
    pub(super) fn read(file: File, path: &Path, config: &Config) -> Result<Self, PrebootError> {
        let state = file::read(&file, path)?;
        let this = Self { path: path.into(), state, file };
        let asked = MadeFor::config(config)?;
        let made = &this.state.made_for;
        if made.vmm != asked.vmm {
            return Err(this.made("by another version of kindling"));
        }
        if made.image != asked.image || made.boot_args != asked.boot_args {
            return Err(this.made("from another image or with another command line"));
        }
        if *made != asked || this.state.vcpus.len() != usize::from(asked.vcpu_count) {
            return Err(this.made("for another number of vCPUs or another memory size"));
        }
        let ram = layout::ram_ranges(asked.mem_size_mib * layout::MIB);
        let ram: Vec<_> = ram.into_iter().map(|(start, size)| start.0..start.0 + size).collect();
        if this.state.marked >= this.state.vcpus.len() {
            let what = "none of its vCPUs runs init".to_owned();
            return Err(PrebootError::Invalid { path: this.path, what });
        }
        let pages = [&this.state.extents, &this.state.written];
        if !pages.into_iter().all(|extents| memory::are_valid(extents, &ram)) {
            let what = "its pages are not those of a guest".to_owned();
            return Err(PrebootError::Invalid { path: this.path, what });
        }
        Ok(this)
    }

    /// Why a machine cannot continue from it after all.
    pub(crate) fn not_restored(path: PathBuf, error: Error) -> PrebootError {
        PrebootError::Restore { path, source: Box::new(error) }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the machine's devices can take the place of those that the kernel was booted with.
    pub(crate) fn check_devices(
        &self,
        identities: impl Iterator<Item = virtio::DeviceIdentity>,
    ) -> Option<PrebootError> {
        let is_same = identities.eq(self.state.virtio.iter().map(|state| state.identity.clone()));
        (!is_same).then(|| self.made("for other devices"))
    }

    /// Whether this host's guests see the processor that the kernel was booted on.
    pub(crate) fn check_host(&self, hypervisor: &Hypervisor) -> Option<PrebootError> {
        let here = hypervisor.cpuid(self.state.made_for.vcpu_count);
        let is_same = features(&here).eq(&self.state.cpuid);
        (!is_same).then(|| self.made("on another kind of processor, or with another KVM"))
    }

    fn made(&self, made: &'static str) -> PrebootError {
        PrebootError::Other { path: self.path.clone(), made }
    }

    /// Puts the guest's pages into its memory.
    pub(crate) fn fill(&self, memory: &GuestMemory) -> Result<(), MemoryError> {
        memory.map_contents(&self.state.extents, &self.file, file::PAGES)
    }

    /// Has those pages copied that the guest is going to write to when its init has started, which so need not wait
    /// for them, and lets the other vCPUs start then.
    pub(crate) fn go_on_at_init(&self, memory: &GuestMemory, marks: &mut BootMarks) -> Arc<StartLatch> {
        let latch = Arc::new(StartLatch::closed_except(self.state.marked));
        let (memory, written, opened) = (memory.clone(), self.state.written.clone(), Arc::clone(&latch));
        marks.call_at(FREEZE_AT as u8, move || {
            // What cannot be copied is mapped.
            let _ = memory.copy_in_advance(&written);
            opened.open();
        });
        latch
    }
}
