//! The monitor's program, `kindling-vmm`.

use super::LaunchError;
use crate::kernel::KernelError;
use kindling_vmm::control::Monitor;
use std::path::PathBuf;

/// Starts the monitor of a new guest: `kindling-vmm`, from the directory that KINDLING_PROGRAMS names, or else from the
/// directory of the calling program.
///
/// # Errors
/// When the program is missing, other users can change it, or the host cannot execute it.
pub fn spawn_monitor() -> Result<Monitor, LaunchError> {
    Monitor::spawn(&monitor_program()?).map_err(LaunchError::NoMonitor)
}

/// The path of `kindling-vmm`.
pub(super) fn monitor_program() -> Result<PathBuf, LaunchError> {
    match trusted_path::companion("kindling-vmm") {
        Ok(program) => Ok(program),
        Err(error) if error.is_absent() => Err(LaunchError::NoMonitor(std::io::ErrorKind::NotFound.into())),
        Err(error) => Err(KernelError::Untrusted(error).into()),
    }
}
