//! Opens and checks a pre-booted kernel, and restores guest memory from it.

use super::error::PrebootError;
use super::file;
use super::pages::PagesInAdvance;
use super::state::{Inputs, Stage, State, features};
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

/// A pre-booted kernel, or a snapshot, that a machine can continue from: an open file and its state.
#[derive(Debug)]
pub(crate) struct Preboot {
    path: PathBuf,
    pub(crate) state: State,
    file: File,
}

impl Preboot {
    /// Opens the pre-booted kernel that the configuration names, or uses `file` if it is open already. Returns `None`
    /// if the configuration names none or the file does not exist.
    pub(crate) fn open(config: &Config, file: Option<File>) -> Result<Option<Self>, PrebootError> {
        let Some(path) = &config.preboot else { return Ok(None) };
        match file.map_or_else(|| file::open(path), Ok) {
            Err(error) if error.is_not_found() => Ok(None),
            file => Self::read(file?, path, config).map(Some),
        }
    }

    /// Opens the snapshot at `path`, or uses `file` if it is open already.
    pub(crate) fn open_snapshot(
        path: &Path,
        config: &Config,
        file: Option<File>,
    ) -> Result<Self, PrebootError> {
        Self::read(file.map_or_else(|| file::open(path), Ok)?, path, config)
    }

    /// Reads an open file, and checks that it was made for this configuration. `path` is for error messages.
    pub(super) fn read(file: File, path: &Path, config: &Config) -> Result<Self, PrebootError> {
        let state = file::read(&file, path)?;
        let this = Self { path: path.into(), state, file };
        let required = Inputs::of_config(config)?;
        let made = &this.state.inputs;
        if made.stage != required.stage {
            return Err(this.mismatch(match made.stage {
                Stage::Kernel => "as a pre-booted kernel, and is no snapshot",
                Stage::Guest => "as a snapshot, and is no pre-booted kernel",
            }));
        }
        if made.vmm != required.vmm {
            return Err(this.mismatch("by another version of kindling"));
        }
        if made.image != required.image || made.boot_args != required.boot_args {
            return Err(this.mismatch("from another image or with another command line"));
        }
        if *made != required || this.state.vcpus.len() != usize::from(required.vcpu_count) {
            return Err(this.mismatch("for another number of vCPUs or another memory size"));
        }
        let ram = layout::ram_ranges(required.mem_size_mib * layout::MIB);
        let ram: Vec<_> = ram.into_iter().map(|(start, size)| start.0..start.0 + size).collect();
        if this.state.init_vcpu >= this.state.vcpus.len() {
            let what = "none of its vCPUs runs init".to_owned();
            return Err(PrebootError::Invalid { path: this.path, what });
        }
        let State { extents, written, used, read, .. } = &this.state;
        let pages = [extents, written, used, read];
        if !pages.into_iter().all(|extents| memory::are_valid(extents, &ram)) {
            let what = "its pages are not those of a guest".to_owned();
            return Err(PrebootError::Invalid { path: this.path, what });
        }
        Ok(this)
    }

    /// The error of a machine that could not be restored from the file at `path`.
    pub(crate) fn restore_error(path: PathBuf, error: Error) -> PrebootError {
        PrebootError::Restore { path, source: Box::new(error) }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Checks that the machine's devices can replace those with which the kernel was booted, and that guests of this host see
    /// the same processor as the kernel then.
    pub(crate) fn check_machine(
        &self,
        identities: impl Iterator<Item = virtio::DeviceIdentity>,
        hypervisor: &Hypervisor,
    ) -> Result<(), PrebootError> {
        if !identities.eq(self.state.virtio.iter().map(|state| state.identity.clone())) {
            return Err(self.mismatch("for other devices"));
        }
        let here = hypervisor.cpuid(self.state.inputs.vcpu_count);
        if !features(&here).eq(&self.state.cpuid) {
            return Err(self.mismatch("on another kind of processor, or with another KVM"));
        }
        Ok(())
    }

    fn mismatch(&self, made: &'static str) -> PrebootError {
        PrebootError::Mismatch { path: self.path.clone(), made }
    }

    /// Maps the saved pages into guest memory.
    pub(crate) fn fill(&self, memory: &GuestMemory) -> Result<(), MemoryError> {
        memory.map_contents(&self.state.extents, &self.file, file::PAGES_OFFSET)
    }

    /// The pages that are prepared before the guest uses them.
    pub(crate) fn in_advance(&self, is_spare: bool) -> PagesInAdvance {
        let State { used, written, read, .. } = &self.state;
        let has_more = (is_spare || self.is_snapshot()) && !used.is_empty();
        PagesInAdvance {
            copied: if has_more { used.clone() } else { written.clone() },
            read: self.is_snapshot().then(|| read.clone()),
        }
    }

    /// Whether this is a snapshot.
    fn is_snapshot(&self) -> bool {
        self.state.inputs.stage == Stage::Guest
    }

    /// Registers a callback for init's first boot mark that copies these pages, and then opens the returned latch, at which
    /// the other vCPUs wait. Init starts sooner than if the pages were copied before. Those of a snapshot have been copied.
    pub(crate) fn open_latch_at_init(
        &self,
        memory: &GuestMemory,
        pages: &PagesInAdvance,
        marks: &mut BootMarks,
    ) -> Arc<StartLatch> {
        let latch = Arc::new(StartLatch::closed_except(self.state.init_vcpu));
        let copied = if pages.are_of_snapshot() { Vec::new() } else { pages.copied.clone() };
        let (memory, opened) = (memory.clone(), Arc::clone(&latch));
        marks.call_at(self.state.inputs.stage.mark() as u8, move || {
            // A page that cannot be copied now is copied on the first write.
            let _ = memory.copy_in_advance(&copied);
            opened.open();
        });
        latch
    }
}
