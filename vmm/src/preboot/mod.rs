//! Pre-booted kernels: the state of a machine whose guest has reached init, saved in a file from which later machines
//! continue.
//!
//! A kernel boots the same way each time if image, vCPUs, memory and processor are the same. A monitor therefore boots
//! a machine once ([`crate::control::Monitor::start_preboot`]) and stops it just before init's first boot mark
//! ([`guest_protocol::BootMark::InitEntered`]). Nothing before that mark depends on the payload, and init executes the
//! instruction of the mark again in each later machine. Later machines map the saved pages of guest memory and set the
//! registers. State that two guests must not share, random numbers and the time, is requested by init afterwards and
//! replaced before the payload runs.
//!
//! A snapshot is the same at a later mark ([`guest_protocol::BootMark::Frozen`]): all processes of a guest are frozen, and
//! continue in each copy ([`crate::control::Monitor::start_for_snapshot`]). A guest that runs on is saved while its vCPUs wait
//! ([`crate::control::Requester::snapshot`]).

pub(crate) mod capture;
pub(crate) mod destination;
pub(crate) mod error;
pub(crate) mod file;
pub(crate) mod kernel;
pub(crate) mod pages;
pub(crate) mod saved;
pub(crate) mod snapshot;
pub(crate) mod state;
pub(crate) mod trial_root;
pub(crate) mod verified;

pub use error::PrebootError;
pub use saved::SavedMemory;
pub use snapshot::{length_max, time_limit};
pub use state::key;
/// Reads bytes as the beginning of a file of a pre-booted kernel, without its magic and format, which a fuzzer seldom finds.
#[cfg(fuzzing)]
pub fn decode(bytes: &[u8]) {
    file::decode(bytes);
}
